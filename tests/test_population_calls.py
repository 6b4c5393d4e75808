"""bnjax.recalibrate: when it stops, what it costs, its options and messages."""

import functools
import sys
import threading

import chex
import jax
import numpy as np
import pytest
from messages import check_message

import bnjax
from bnjax import recalibrate

C = 4
BATCHES = [np.random.default_rng(0).normal(1, 2, (5, C)).astype(np.float32)]


def layer(variables, x):
    return bnjax.bn_apply(*variables, x, False)


def consumed(batches, **options):
    """How many batches are taken from a generator, and the state."""
    count = 0

    def generator():
        nonlocal count
        for x in batches:
            count += 1
            yield x

    state = recalibrate(layer, bnjax.bn_init(C), generator(), **options)[1]
    return count, state


@pytest.mark.parametrize("method", ["pooled", "average"])
def test_tolerance(method):
    """Once both halves agree it stops, with the statistics of what was seen."""
    x = list(np.random.default_rng(1).normal(3, 2, (300, 16, C)).astype(np.float32))
    run = functools.partial(consumed, method=method)
    assert run(x[:40])[0] == 40
    assert run(x, tolerance=1.0)[0] == 8
    count, state = run(x, tolerance=0.12)
    assert 16 <= count <= 256 and count & (count - 1) == 0
    halves = [np.concatenate(v) for v in (x[: count // 2], x[count // 2 : count])]
    assert np.all(np.abs(halves[0].mean(0) - halves[1].mean(0)) < 0.12 * 2.2)
    chex.assert_trees_all_close(state, run(x[:count])[1], rtol=1e-5)
    assert run(x[:100], tolerance=0.0)[0] == 100


@pytest.mark.parametrize("change", [
    lambda i: i // 5,  # of another class from the fifth on
    lambda i: 0.2 * i,
], ids=["sorted", "drifting"])  # fmt: skip
def test_tolerance_sees_that_data_are_not_shuffled(change):
    x = [
        x + change(i)
        for i, x in enumerate(np.random.default_rng(2).normal(0, 1, (64, 64, C)).astype(np.float32))
    ]
    assert consumed([v.astype(np.float32) for v in x], tolerance=0.3)[0] == 64


def test_tolerance_of_channels_without_news():
    """Constant, empty and dead ones never stand in the way, and stop nothing by themselves."""
    x = np.random.default_rng(3).normal(0, 1, (40, 64, C)).astype(np.float32)
    x[..., 1], x[..., 2], x[..., 3] = 0.1, 0, np.nan
    x[4:, :, 1] = np.nextafter(x[4:, :, 1], np.float32(1))  # constant but for rounding
    assert consumed(list(x), tolerance=0.5)[0] == 8
    with pytest.warns(UserWarning, match="too few"):
        assert consumed([np.full((5, 3, C), np.nan, np.float32)] * 40, tolerance=0.5)[0] == 40


def test_memory_and_traces():
    """One program per shape of batches; no array is left behind, and the generator is not ahead."""
    traced, live = [], []

    def model(variables, x):
        traced.append(x.shape)
        return bnjax.bn_apply(*variables, x, False)

    def generator():
        for i in range(12):
            yield np.ones((5 if i % 3 else 7, C), np.float32) * i
            live.append(sum(v.nbytes for v in jax.live_arrays()))

    for _ in range(2):
        recalibrate(model, bnjax.bn_init(C), generator())
    assert traced == [(7, C), (5, C)]
    assert len(set(live[4:12])) == 1


def test_progress(capsys):
    recalibrate(layer, bnjax.bn_init(C), iter(BATCHES), progress=True)
    assert "statistics" in capsys.readouterr().out
    recalibrate(layer, bnjax.bn_init(C), BATCHES * 3, passes=2, progress=True)
    shown = capsys.readouterr().out
    assert "pass 1 of 2" in shown and "pass 2 of 2" in shown and "100%" in shown
    for _ in range(2):  # a bar that failed is not in the way of the next one
        try:
            recalibrate(layer, bnjax.bn_init(C), [np.ones(3)], progress=True)
        except ValueError:
            assert not any("Track" in type(t).__name__ for t in threading.enumerate())
            state = recalibrate(layer, bnjax.bn_init(C), BATCHES, progress=True)[1]
    assert np.all(state.count == 1)


def test_progress_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"needs rich. Fix: pip install 'bnjax\[reports\]'"):
        recalibrate(layer, bnjax.bn_init(C), BATCHES, progress=True)


# fmt: off
ERRORS = {
    "method": ({"method": "mean"}, ValueError, "method", "'pooled', 'average'", "'mean'", ""),
    "passes": ({"passes": 0}, ValueError, "passes", "at least 1", "0", ""),
    "passes type": ({"passes": 1.0}, TypeError, "passes", "an int", "1.0", ""),
    "tolerance": ({"tolerance": -1.0}, ValueError, "tolerance", "[0, inf]", "-1.0", ""),
    "nan": ({"tolerance": np.nan}, ValueError, "tolerance", "[0, inf]", "nan", ""),
    "iterator": ({"batches": iter(BATCHES), "passes": 2}, ValueError, "batches", "start anew",
                 "an iterator", "a list, or passes=1"),
    "array": ({"batches": BATCHES[0]}, TypeError, "batches", "iterable of batches", "ndarray",
              "[batch]"),
    "dict": ({"batches": {"x": BATCHES[0]}}, TypeError, "batches", "iterable", "dict", "[batch]"),
    "number": ({"batches": 3}, TypeError, "batches", "iterable", "int", "[batch]"),
    "none": ({"batches": iter([])}, ValueError, "batches", "at least one", "none", "make it anew"),
    "call": ({"call": layer}, ValueError, "call", "must be None for a functional", "<function",
             "model=lambda variables, batch:"),
    "model": ({"model": 3}, TypeError, "model", "must be a function", "int", ""),
}
# fmt: on


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    options, *expected = ERRORS[name]
    given = {"model": layer, "variables": bnjax.bn_init(C), "batches": BATCHES, **options}
    check_message(lambda: recalibrate(**given), expected)


@pytest.mark.parametrize("model, variables, kind, words", [
    (layer, bnjax.bn_init(C)[0], ValueError, "must have batch normalization layers.*BNState.*Fix"),
    (lambda v, x: layer(v, x)[0], bnjax.bn_init(C), TypeError, r"return \(output, state\).*Fix"),
    (lambda v, x: (x, v[0]), bnjax.bn_init(C), TypeError, r"return \(output, state\).*Fix"),
], ids=["no state", "no state returned", "another returned"])  # fmt: skip
def test_models_that_do_not_fit(model, variables, kind, words):
    with pytest.raises(kind, match=words):
        recalibrate(model, variables, BATCHES)


def test_not_within_jit():
    with pytest.raises(TypeError, match=r"`recalibrate` needs values, got .* Fix: call it outside"):
        jax.jit(lambda variables: recalibrate(layer, variables, BATCHES))(bnjax.bn_init(C))
