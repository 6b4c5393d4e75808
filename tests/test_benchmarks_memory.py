"""Memory against traffic: what benchmarks/memory.py counts, and what its results say."""

import jax
import matplotlib.pyplot as plt
import pytest
from benchmark_scripts import results

import figures  # isort: skip  # found from benchmark_scripts on
import memory  # isort: skip
import memory_tables  # isort: skip

TINY = memory.Problem("ResNet-10", 2, 8, "float32")


def of(found, layer, kept, blocks):
    (row,) = (r for r in found if (r["layer"], r["kept"], r["together"]) == (layer, kept, blocks))
    return row


@pytest.fixture(scope="module")
def counted():
    return memory.rows("cpu", TINY, False, lambda line: None)


def test_first_row_is_what_others_are_divided_by(counted):
    first = counted[0]
    assert (first["layer"], first["kept"]) == ("flax.linen", "all")
    for row in counted:
        for name in ("temporary", "moved"):
            assert float(row[f"{name} / flax"]) == pytest.approx(row[name] / first[name], abs=1e-3)


def test_every_way_is_counted_once(counted):
    """Blocks of a stage that has but one are not put together."""
    names = [(row["layer"], row["kept"], row["together"]) for row in counted]
    assert len(set(names)) == len(names) == len(memory.ways(TINY)) < len(memory.WAYS)


def test_branches_stand_apart(counted):
    assert of(counted, "flax.linen", "all", 0)["apart"] == 0
    assert of(counted, "bnjax", "all", 0)["apart"] > 0


def test_networks_have_their_parameters():
    """As many as in the papers, with a stem of 3 x 3 for small images, and 1000 classes."""
    for name, expected in (("ResNet-18", 11_689_512 - 9_408 + 1_728), ("ResNet-50", 25_557_032)):
        problem = memory.Problem(name, 1, 32, "float32")
        net = memory.network(problem, "flax.linen", "all", 0)
        variables = jax.eval_shape(net.init, jax.random.key(0), memory.images(problem))
        found = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", memory_tables.RESULTS)
def test_tables_show_every_row(name):
    rows, _ = results.read(f"memory-{name}")
    table = memory_tables.memory(name)()
    assert table.count("\n| ") == len(rows) + 1
    for row in rows:
        assert f"| {row['layer']} | {memory_tables.KEPT[row['kept']]} |" in table


# Of the two policies the one that keeps more and recomputes no convolution, where it is enough.
LEAN = {
    ("cpu", "ResNet-18"): "save_inputs",
    ("cuda", "ResNet-18"): "save_inputs",
    ("cuda", "ResNet-50"): "save_moments",
    ("tpu", "ResNet-10"): "save_moments",
}


@pytest.mark.parametrize("platform", memory.PLATFORMS)
def test_leaner_than_flax(platform):
    """At most 0.65 of flax's memory at no more than 1.25 of what it moves, branches included."""
    rows, _ = results.read(f"memory-{platform}")
    for group in memory_tables.networks(rows).values():
        kept = LEAN[platform, group[0]["network"]]
        lean = min((row for row in group if row["kept"] == kept), key=lambda r: int(r["temporary"]))
        assert float(lean["temporary / flax"]) <= 0.65
        assert float(memory_tables.with_branches(lean, group[0])) <= 1.25


def test_leaner_here():
    """Compiled now, by versions of jax whose policies save memory on the CPU, and by others."""
    problem = memory.Problem("ResNet-10", 16, 32, "float32")
    merged = jax.__version_info__ < memory.NOT_MERGED
    assert memory.name("cpu") == ("memory-cpu-merged" if merged else "memory-cpu")
    ways = ("flax.linen", "all", 0), ("bnjax", "all", 0), ("bnjax", "save_inputs", 1)
    flax, plain, lean = (memory.counts(memory.compiled("cpu", problem, *w).program) for w in ways)
    assert plain["temporary"] <= 0.75 * flax["temporary"]
    assert lean["temporary"] <= (0.75 if merged else 0.65) * flax["temporary"]
    assert merged == (lean["temporary"] > 0.95 * plain["temporary"])
    for ours in (plain, lean):
        assert ours["moved"] + ours["apart"] <= flax["moved"]


def test_picture_shows_every_way(counted):
    (panel,) = figures.memory({"tiny": [{k: str(v) for k, v in r.items()} for r in counted]}).axes
    dots = {line.get_label(): len(line.get_xdata()) for line in panel.lines}
    for layer in ("bnjax", "flax.linen"):
        assert dots[layer] == sum(row["layer"] == layer for row in counted)
    plt.close("all")
