"""Heat maps, distributions and tables: what they show, read off the objects they return."""

import io
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
import rich.console
from matplotlib import pyplot
from messages import check_message

import bnjax
from bnjax import diagnostics
from bnjax._diagnostics.curves import distributions
from bnjax._diagnostics.monitor import QUANTITIES, Observation
from bnjax._diagnostics.plots import heat_map, shortened
from bnjax._diagnostics.records import Record
from bnjax._diagnostics.tables import shown, table

RNG = np.random.default_rng(0)
DEEP = [
    f"ResNetStage_{i // 12}/BottleneckResNetBlock_{i % 12}/BatchNorm_{i % 3}" for i in range(50)
]


def layer(name, channels, **quantities):
    gaps = {"mean_gap": RNG.exponential(size=channels), "log_var_ratio": RNG.normal(size=channels)}
    return SimpleNamespace(layer=name, per_channel=gaps | quantities)


def drawn(figure):
    """The values of the map's cells, NaN where it has none."""
    return np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.fixture(autouse=True)
def no_traces():
    """Nothing of pyplot's, and no style, is changed."""
    before = dict(matplotlib.rcParams)
    yield
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_heat_map_shows_every_channel():
    records = [layer(f"BatchNorm_{i}", 7) for i in range(3)]
    figure = heat_map(records)
    np.testing.assert_array_equal(drawn(figure), [r.per_channel["mean_gap"] for r in records])
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [r.layer for r in records]
    assert axes.get_xlabel() == "channel" and not texts(figure)
    assert axes.images[0].get_clim()[0] == 0


def test_heat_map_of_layers_of_several_widths():
    """None of many channels is lost, nor what is not finite, nor that a layer has no number."""
    wide = np.full(1000, 0.5)
    wide[[123, 124, 900]] = 50, -80, np.inf
    records = [layer("wide", 1000, log_var_ratio=wide), layer("narrow", 2), layer("none", 3)]
    records[1].per_channel["log_var_ratio"] = np.array([-1.0, 2.0])
    del records[2].per_channel["log_var_ratio"]
    figure = heat_map(records, "log_var_ratio")
    cells = drawn(figure)
    assert {-80.0} < set(np.unique(cells[0][np.isfinite(cells[0])])) <= {0.5, 50.0, -80.0}
    np.testing.assert_array_equal(np.unique(cells[1], return_counts=True), [[-1, 2], [200, 200]])
    black = np.ma.filled(figure.axes[0].images[1].get_array(), 0) == 1
    assert black.sum() == 1 and np.isnan(cells[0][black[0]]).all() and np.isnan(cells[2]).all()
    assert texts(figure) == ["not finite", "no such number"]
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high  # white is 0
    widths = [axes for axes in figure.axes if axes.get_ylabel() == "channels"]
    assert [t.get_text() for t in widths[0].get_yticklabels()] == ["1,000", "2", ""]


def test_deep_networks_are_drawn():
    """Without a warning, and with names that are told apart."""
    figure = heat_map([layer(name, 64 * 2 ** (i // 13)) for i, name in enumerate(DEEP)])
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert len(set(names)) == len(set(DEEP)) and max(map(len, names)) <= 34
    figure.savefig(io.BytesIO(), format="png", dpi=40)


@pytest.mark.parametrize(
    "name, length, expected",
    [
        ("layers/3", 34, "layers/3"),
        (DEEP[10], 28, "ResN…_0/Bott…_10/BatchNorm_1"),
        ("x" * 20 + "y" * 20, 11, "xxxxx…yyyy"),
    ],
)
def test_shortened(name, length, expected):
    assert shortened(name, length) == expected


def observations(names, steps, channels):
    return [
        Observation(step, name, dict(zip(QUANTITIES, RNG.normal(size=(5, channels)), strict=True)))
        for step in steps
        for name in names
    ]


def lines(axes):
    return {line.get_label(): line.get_data() for line in axes.lines}


def test_distributions_over_channels():
    records = observations(["a", "b"], [0, 100, 200], 20)
    records[2].per_channel["median"][:] = np.nan  # of a, at step 100
    figure = distributions(records)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("a", "b")
    for label, name in (
        ("15th percentile", "low"),
        ("median", "median"),
        ("85th percentile", "high"),
    ):
        x, y = lines(second)[label]
        expected = [np.percentile(r.per_channel[name], 50) for r in records[1::2]]
        np.testing.assert_array_equal(x, [0, 100, 200])
        np.testing.assert_allclose(y, expected)
    assert np.isnan(lines(first)["median"][1]).tolist() == [False, True, False]
    assert lines(first)["not finite"][0].tolist() == [100]
    band = second.collections[0].get_paths()[0].get_extents()
    tops = [np.percentile(r.per_channel["high"], 90) for r in records[1::2]]
    assert band.ymax == pytest.approx(max(tops))


def test_distributions_of_channels():
    records = observations(["a", "b"], [0, 5], 20)
    (axes,) = distributions(records, layer="b", channel=[3, 7]).axes
    found = lines(axes)
    assert len(found) == 6
    expected = [r.per_channel["high"][7] for r in records[1::2]]
    np.testing.assert_array_equal(found["85th percentile, channel 7"][1], expected)


def record(name, **numbers):
    usual = {
        "layer": name,
        "channels": 100,
        "entries": 60.0,
        "mean_gap": 0.1,
        "log_var_ratio": -0.05,
        "output_difference": 0.1,
        "distance": 0.05,
        "activation": "sigmoid",
        "saturated": 0.25,
        "dead": 0,
        "exploding": 0,
        "not_finite": 0,
        "bad_statistics": 0,
        "untrained": 0.0,
        "updates": None,
        "momentum": 0.99,
        "per_channel": {},
    }
    return Record(**usual | numbers)


def printed(what):
    console = rich.console.Console(width=100, file=io.StringIO(), color_system=None)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def cells(line):
    return line.replace(" !", "!").split()


def test_table():
    found = printed(table([record("BatchNorm_0"), record("BatchNorm_1", mean_gap=2.5)]))
    assert " ".join(cells(found[3])) == "BatchNorm_0 100 60 0.10 -0.05 0.10 0.05 25% sigmoid"
    assert " ".join(cells(found[4])) == "BatchNorm_1 100 60 2.50! -0.05 0.10 0.05 25% sigmoid"
    assert found[5].startswith("momentum 0.99;")


def test_table_of_the_worst_fits_a_terminal():
    worst = {
        "channels": 99_999,
        "entries": 1e9,
        "mean_gap": np.nan,
        "log_var_ratio": -np.inf,
        "output_difference": 1e12,
        "distance": np.nan,
        "saturated": 1.0,
        "dead": 5,
        "not_finite": 10**9,
        "untrained": 1.0,
        "updates": 10**9,
        "momentum": 0.9,
    }
    found = printed(table([record(name, **worst) for name in DEEP] + [record("last")]))
    assert max(map(len, found)) <= 100
    row = "ResN…_0/Bott…_10/BatchNorm_1! 99,999 1e+09 nan! -inf! 1e+12! nan! 100% sigmoid! 1e+09"
    assert " ".join(cells(found[3 + 10])) == row
    troubles = f"{DEEP[10]}: 5 dead, 1,000,000,000 inputs not finite, 100% untrained"
    assert troubles in " ".join(found)  # which may be wrapped
    assert any(line.startswith("momentum 0.9 to 0.99;") for line in found)


def test_table_of_a_monitor():
    (step,) = observations(["a"], [1200], 3)
    numbers = [step.row()[name] for name in QUANTITIES]
    found = cells(printed(table([step]))[3])
    assert found[:2] == ["1,200", "a"]
    assert [float(cell.rstrip("!")) for cell in found[2:]] == pytest.approx(numbers, abs=0.005)


def test_report_begins_with_its_findings():
    code = "variables = bnjax.recalibrate(model, variables, train_batches)"
    finding = SimpleNamespace(cause="lagging", sentence="Too [slow].", remedy=f"{code}  # or so")
    overall = {"output_difference": 0.4567, "accuracy_evaluation": 0.125}
    found = printed(shown([finding], overall, [record("BatchNorm_0")]))
    assert found[:3] == ["1. lagging: Too [slow].", f"    {code}", "    # or so"]
    assert [line.split() for line in found[4:6]] == [
        ["output", "difference", "0.4567"],
        ["accuracy", "evaluation", "12.5%"],
    ]
    assert found[9].startswith("BatchNorm_0")
    assert printed(shown([], {}, [record("a")]))[0] == "No finding."


ONE = [layer("a", 3)]
SEEN = observations(["a"], [0], 3)
BAD = {
    "no layers": (lambda: heat_map([]), (ValueError, "records", "at least one", "none", "")),
    "quantity": (
        lambda: heat_map(ONE, "gap"),
        (ValueError, "quantity", "['log_var_ratio', 'mean_gap']", "'gap'", ""),
    ),
    "no records": (lambda: distributions([]), (ValueError, "records", "at least", "none", "")),
    "layer": (lambda: distributions(SEEN, "b"), (ValueError, "layer", "['a']", "'b'", "")),
    "channel": (
        lambda: distributions(SEEN, channel=3),
        (ValueError, "channel", "[0, 3)", "[3]", ""),
    ),
    "no rows": (lambda: table([]), (ValueError, "records", "at least one", "none", "")),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    check_message(*BAD[case])


@pytest.mark.parametrize(
    "module, call", [("matplotlib", lambda: heat_map(ONE)), ("rich", lambda: table(SEEN))]
)
def test_extra_is_named(monkeypatch, module, call):
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'bnjax\[reports\]'"):
        call()


def test_report_is_printed_by_rich():
    x = jnp.arange(12.0).reshape(6, 2)
    report = diagnostics.report(lambda v, x: bnjax.bn_apply(*v, x, False), bnjax.bn_init(2), x)
    console = rich.console.Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "never-updated" in text and "output difference" in text and "mean gap" in text
