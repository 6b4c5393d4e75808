"""The measuring of benchmarks/timing.py and speed.py; nothing here depends on how fast it runs."""

import platform
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from benchmark_scripts import FOLDER
from jax import lax

import dispatch  # isort: skip  # found from benchmark_scripts on
import figures  # isort: skip
import nets  # isort: skip
import speed  # isort: skip
import speed_tables  # isort: skip
import timing  # isort: skip
from layers import Bnjax, Layer, Linen  # isort: skip

SHAPE = (256, 128)


class Known:
    """A program of known cost on a machine whose load is `load(number of the turn)`."""

    def __init__(self, cost, log, load=lambda turn: 1.0):
        self.cost, self.log, self.load = cost, log, load

    def __call__(self, calls):
        self.log.append((self, calls))
        return self.cost * calls * self.load(len(self.log))


def subject(kind, **options):
    return speed.Subject(kind, speed.Case(SHAPE, -1, jnp.float32, **options))


# --- turns and ratios --------------------------------------------------------------------


def test_ratios_are_those_of_the_costs_whatever_the_load():
    log = []
    turns = iter(range(10_000))
    load = [1.0, 1.0, 5.0, 5.0, 1.5, 1.5, 9.0, 9.0]
    programs = {
        "one": Known(1e-3, log, lambda _: load[next(turns) // 2 % len(load)]),
        "other": Known(3e-3, log, lambda _: load[next(turns) // 2 % len(load)]),
    }
    times = timing.in_turns(programs, rounds=9, seconds=0.05)
    quiet = timing.in_turns(
        {k: Known(p.cost, log) for k, p in programs.items()}, rounds=3, seconds=0.05
    )
    assert timing.ratios(quiet["other"], quiet["one"]) == pytest.approx((3, 3, 3))
    assert len(times["one"]) == len(times["other"]) == 9
    spread = timing.ratios(times["other"], times["one"])
    assert spread.low <= spread.median <= spread.high


def test_each_round_has_a_turn_of_each_and_begins_with_another_one():
    log = []
    programs = {name: Known(1e-3, log) for name in "abc"}
    names = {program: name for name, program in programs.items()}
    timing.in_turns(programs, rounds=4, seconds=0.1)
    turns = "".join(names[program] for program, _ in log[-15:])
    assert turns == "abcbcacababcbca"
    # All turns take as long.
    assert {calls for _, calls in log[-15:]} == {100}


def test_the_round_before_does_not_count():
    log = []
    timing.in_turns({"a": Known(1e-3, log)}, rounds=3, seconds=0.1)
    before = len(log) - 3  # the turn
    slow = Known(1e-3, [], lambda turn: 100.0 if turn == before else 1.0)
    times = timing.in_turns({"a": slow}, rounds=3, seconds=0.1)
    assert times["a"] == pytest.approx([1e-3] * 3)


def test_a_pause_while_calls_are_counted_leaves_turns_as_long():
    log = []
    paused = Known(1e-6, log, lambda turn: 1e5 if turn == 2 else 1.0)
    timing.in_turns({"a": paused}, rounds=1, seconds=0.1)
    assert log[-1][1] * paused.cost == pytest.approx(0.1, rel=0.5)


def test_ratios_need_the_same_rounds():
    with pytest.raises(ValueError, match="of the same rounds, got 2 and 3"):
        timing.ratios([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="of the same rounds, got 0 and 0"):
        timing.ratios([], [])


def test_median_and_quartiles_of_the_ratios_not_of_the_times():
    spread = timing.ratios([1.0, 20.0, 3.0, 40.0, 5.0], [1.0, 10.0, 1.0, 10.0, 1.0])
    assert spread == (3, 2, 4)
    assert str(spread) == "3.00 (2.00 to 4.00)"


def test_calls_from_python_take_as_long_as_they_take():
    counted = []
    calls = timing.Calls(lambda: (time.sleep(1e-3), counted.append(0)))
    assert calls(5) >= 5e-3
    assert len(counted) == 5


# --- the loop ----------------------------------------------------------------------------


def test_the_loop_runs_the_work_so_many_times():
    x = jnp.arange(4.0)
    loop = timing.Loop(lambda given: {"y": given[0] * 2, "n": given[1]}, (x, jnp.int32(3)))
    loop(0)
    np.testing.assert_array_equal(loop.results[1], jnp.zeros(4))
    for calls in (1, 5):
        assert loop(calls) > 0
        assert loop.results[0] == 3
        np.testing.assert_array_equal(loop.results[1], x * 2)


def test_the_loop_runs_more_than_once():
    seen = []
    given = jnp.float32(2)

    def work(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x)
        return x + 1

    timing.Loop(work, given)(4)
    jax.effects_barrier()
    assert seen == [2.0] * 4


@pytest.mark.parametrize("work", speed_tables.WORK)
@pytest.mark.parametrize("kind", [Bnjax, Linen])
def test_the_loop_copies_nothing_and_nothing_is_taken_out_of_it(kind, work):
    x = jnp.zeros(SHAPE)
    loop = subject(kind, near=False).program(work, x, x)
    assert loop.copies(x.size) == 0
    assert loop.outside() == []


def compiled(body, *given):
    run = jax.jit(lambda n, given: lax.fori_loop(0, n, body, given))
    return run.lower(3, given).compile().as_text()


def test_a_loop_that_swaps_its_arrays_copies():
    x = jnp.ones(SHAPE)
    text = compiled(lambda i, carry: (carry[1], carry[0] * 2), x, x)
    assert timing.copies(text, x.size, entry=False) > 0
    assert timing.copies(text, x.size + 1, entry=True) == 0


def test_what_is_taken_out_of_a_loop_is_seen():
    x = jnp.ones(SHAPE)
    text = compiled(lambda i, carry: (carry[0], carry[1] * carry[0].sum(0, keepdims=True)), x, x)
    assert "fusion" in timing.outside(text) or "reduce" in timing.outside(text)


def test_copies_that_the_work_makes_are_not_the_loops():
    """To change one entry of what is still needed takes a copy."""
    x = jnp.ones(SHAPE)
    loop = timing.Loop(lambda x: x.at[0, 0].set(3.0), x)
    assert timing.copies(loop.compiled.as_text(), x.size, entry=False) > 0
    assert loop.copies(x.size) == 0


def test_operations_and_their_sizes():
    line = "  %copy.3 = f32[8,4]{1,0} copy(%p), metadata={}"
    assert timing.operation(line) == ("copy", 32)
    line = "  ROOT %t = (s32[], f32[2,3]{1,0}, /*index=2*/bf16[9]{0}) tuple(%a, %b, %c)"
    assert timing.operation(line) == ("tuple", 9)
    assert timing.operation("  %c = s32[] constant(0)") == ("constant", 1)


def test_kept_memory_is_touched_once():
    """By a process of its own, which keeps it for good."""
    code = """if True:
        import resource, sys, numpy as np, timing
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.empty(2**25, np.uint8).fill(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        kept = timing.keep_memory()
        faults()
        print(kept, faults())
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True,
                         check=True)  # fmt: skip
    kept, faults = run.stdout.split()
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("no glibc")
    assert kept == "True" and int(faults) < 100  # 8192 pages


# --- the layers --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Bnjax, Linen])
def test_running_statistics_are_near_or_new(kind):
    near, new = subject(kind, mean=10.0), subject(kind, mean=10.0, near=False)
    x = np.asarray(near.case.batch(10.0))
    np.testing.assert_allclose(near.layer.running(near.variables)[0], x.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(new.layer.running(new.variables)[0], np.zeros(SHAPE[1]))


def test_the_error_of_the_variance():
    assert subject(Bnjax).error(1000) < 1e-5
    assert subject(Linen).error(10) < 1e-3
    assert subject(Linen).error(1000) > 0.1


class Refusing(Layer):
    name = "refusing"

    def build(self, o):
        raise RuntimeError


def rows_of(*kinds, works=(speed_tables.FORWARD,)):
    case = speed.Case(SHAPE, -1, jnp.float32)
    return list(speed.measured(case, kinds, works, speed.Settings(2, 1e-4)))


def test_a_row_for_each_layer_also_where_one_refuses():
    rows = rows_of(Bnjax, Linen, Refusing)
    assert [row["layer"] for row in rows] == ["bnjax", "flax.linen", "refusing"]
    assert all(tuple(row) == speed.COLUMNS for row in rows)
    assert rows[0]["ratio"] == "1.000" and float(rows[1]["ratio"]) > 0
    assert rows[2]["ratio"] == "" and rows[2]["note"] == "error (RuntimeError)"
    table = speed_tables.shapes(rows, speed_tables.FORWARD)
    assert table[0]["refusing"] == "error (RuntimeError)"


def test_bnjax_may_not_refuse(monkeypatch):
    monkeypatch.setattr(Bnjax, "build", Refusing.build)
    with pytest.raises(RuntimeError):
        rows_of(Bnjax)


def made(layer, shape, work, ratio, mean="0.5"):
    row = dict.fromkeys(speed.COLUMNS, "") | {"channels": "last", "dtype": "float32", "mean": mean}
    row |= {"shape": shape, "layer": layer, "work": work, "ratio": str(ratio)}
    row |= dict.fromkeys(speed_tables.ERRORS, f"{1e-3 * ratio:.1e}")
    return row | {"low": "1", "high": "2", "running mean": "0", "times the limit": "1.50"}


def test_tables_of_made_up_rows():
    forward, training, _ = speed_tables.WORK
    rows = [made("bnjax", s, w, 1.0) for s in ("8x4", "9x4") for w in (forward, training)]
    rows += [made("flax.linen", "8x4", w, r) for w, r in ((forward, 0.5), (training, 1.5))]
    rows += [made("flax.linen", "9x4", w, r) for w, r in ((forward, 2.0), (training, 6.0))]
    rows += [made("flax.linen", "9x4", forward, 7.0, mean="10")]
    flax = speed_tables.means(rows)[1]
    assert (flax["forward"], flax["forward + backward"], flax["evaluation"]) == ("1.00", "3.00", "")
    assert flax["least of forward + backward"] == "1.50"
    assert flax["variance error at 1000"] == "6e-03"
    assert speed_tables.shapes(rows, training)[1]["flax.linen"] == "6.00, 6e-03, 6e-03"
    assert speed_tables.at_large_means(rows)[0]["forward"] == "7.00 (1.00 to 2.00)"
    names = list(speed_tables.limited(rows)[0])
    assert names[3:5] == ["forward, bnjax", "forward + backward, bnjax"]


# --- models and calls --------------------------------------------------------------------


def test_models_differ_in_their_layer_only():
    x = jnp.asarray(np.random.default_rng(0).random((8, 784), np.float32))
    labels = jnp.arange(8)
    for of, model, layers in (
        (nets.of_linen, nets.MLP, nets.LINEN),
        (nets.of_nnx, nets.NNXMLP, nets.NNX),
    ):
        losses = []
        for layer in layers.values():
            net = of(model, layer)
            run = jax.jit(lambda net=net: nets.step(net)(*net.init(x), x, labels)[2])
            losses.append(float(run()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", dispatch.KINDS)
def test_calls_agree(kind):
    """All kinds are called with the same arrays, and give the same y."""
    call = dispatch.Call(kind, speed_tables.TRAINING)
    y = jax.tree.leaves(call.jitted()(*call.arguments))[0]
    x, dy = map(np.asarray, call.arguments[-2:])
    assert x.shape == dy.shape == dispatch.SHAPE
    np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), atol=1e-4)


def test_phases_of_a_call():
    seconds = dispatch.Call(Linen, speed_tables.EVALUATION).from_empty_caches()
    assert list(seconds) == [*dispatch.PHASES, dispatch.TOGETHER]
    assert all(value >= 0 for value in seconds.values())


def test_pictures_show_every_peer():
    rows = [
        made(layer, shape, work, ratio)
        for shape in ("8x4", "9x4")
        for work in speed_tables.WORK
        for layer, ratio in (("bnjax", 1.0), ("flax.linen", 2.0), ("torch", 3.0))
    ]
    drawn = figures.speed(rows)
    panels = drawn.axes
    assert [panel.get_title() for panel in panels] == [
        "forward, float32",
        "forward + backward, float32",
    ]
    dots = {line.get_label(): list(line.get_xdata()) for line in panels[1].lines}
    assert dots["flax.linen"] == [2, 2] and dots["torch"] == [3, 3] and "bnjax" not in dots
    (panel,) = figures.speed_accuracy(rows).axes
    dots = {line.get_label(): line.get_xydata()[0] for line in panel.lines}
    np.testing.assert_allclose(dots["torch"], [3, 3e-3])
    plt.close("all")
