"""Monitor: against NumPy on the same examples, over steps however they are run, and its cost."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from benchmark_scripts import monitor as script
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from messages import check_message

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax._diagnostics.monitor import QUANTITIES
from bnjax.diagnostics import Monitor

BATCH, CHANNELS, EPSILON = 100, 3, 1e-3
RNG = np.random.default_rng(0)
X = RNG.normal([1, -20, 300], [1, 4, 0.5], (BATCH, CHANNELS)).astype(np.float32)
SCALE, BIAS = np.float32([1, 2, -0.5]), np.float32([0, 1, 3])
MEAN, VAR = np.float32([0.5, -18, 0]), np.float32([1, 9, 2])
options = {"epsilon": EPSILON, "momentum": 0.9}


def functional():
    params = bnjax.BNParams(jnp.asarray(SCALE), jnp.asarray(BIAS))
    state = bnjax.BNState(jnp.asarray(MEAN), jnp.asarray(VAR), jnp.ones(CHANNELS, jnp.int32))

    def model(variables, x):
        return bnjax.bn_apply(*variables, x, True, epsilon=EPSILON)

    return model, (params, state)


def of_linen(layer):
    def make():
        variables = {
            "params": {"scale": SCALE, "bias": BIAS},
            "batch_stats": {"mean": MEAN, "var": VAR},
        }
        return layer(use_running_average=True, **options), jax.tree.map(jnp.asarray, variables)

    return make


def of_nnx(layer):
    def make():
        module = layer(CHANNELS, **options, rngs=nnx.Rngs(0))
        for name, value in (("scale", SCALE), ("bias", BIAS), ("mean", MEAN), ("var", VAR)):
            getattr(module, name)[...] = jnp.asarray(value)
        return None, module

    return make


KINDS = {
    "functional": functional,
    "bnjax.linen": of_linen(bnjax.linen.BatchNorm),
    "flax.linen": of_linen(nn.BatchNorm),
    "bnjax.nnx": of_nnx(bnjax.nnx.BatchNorm),
    "flax.nnx": of_nnx(nnx.BatchNorm),
}


def oracle(x):
    """What a layer with the numbers above sees, float64."""
    x = x.astype(np.float64)
    mean, var = x.mean(0), x.var(0)
    y = (x - mean) / np.sqrt(var + EPSILON) * SCALE + BIAS
    found = dict(zip(QUANTITIES, np.percentile(y, [15, 50, 85], axis=0), strict=False))
    found["mean_gap"] = np.abs(mean - MEAN) / np.sqrt(VAR + np.float64(EPSILON))
    found["log_var_ratio"] = np.log((var + EPSILON) / (VAR + EPSILON))
    return found


@pytest.mark.parametrize(
    "kind, examples, rows",
    [*((kind, 16, slice(None, None, 7)) for kind in KINDS), ("functional", None, slice(None))],
)
def test_quantities(kind, examples, rows):
    model, variables = KINDS[kind]()
    monitor = Monitor(model, examples=examples)
    before = jax.tree.map(jnp.copy, nnx.state(variables) if model is None else variables)
    jit = nnx.jit if model is None else jax.jit
    log = jit(monitor.update)(monitor.init(variables), variables, X)
    (record,) = monitor.records(log, variables)
    assert record.step == 0
    expected = oracle(X[rows])
    # The rounding of entries 600 deviations away from 0, of the last channel.
    n = len(X[rows]) * 600
    for name in QUANTITIES:
        tolerances.assert_close(record.per_channel[name], expected[name], jnp.float32, n)
    after = nnx.state(variables) if model is None else variables
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), before, after)))


def batches(number):
    shape = (number, 8, CHANNELS)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape) * 2 + 1, jnp.float32)


def one_step(monitor):
    model, _ = functional()

    def step(carry, x):
        (params, state), log = carry
        y, state = model((params, state), x)
        return ((params, state), monitor.update(log, (params, state), x)), y.mean()

    return step


def test_scan_equals_steps():
    """Compiled as one loop, and not compiled."""
    model, variables = functional()
    monitor = Monitor(model, every=2, capacity=3)
    step = one_step(monitor)
    start = variables, monitor.init(variables)
    scanned, _ = jax.lax.scan(step, start, batches(7))
    stepped = start
    for x in batches(7):
        stepped, _ = step(stepped, x)
    assert [r.step for r in monitor.records(scanned[1], variables)] == [0, 4]
    assert jax.tree.structure(scanned) == jax.tree.structure(stepped)
    np.testing.assert_array_equal(scanned[1].steps, stepped[1].steps)
    rows = [jnp.nan_to_num(carry[1].rows) for carry in (scanned, stepped)]
    tolerances.assert_close(*rows, jnp.float32, 8)


def test_full_log_keeps_every_second_record():
    """After any number of steps: what a log without limit has, at multiples of the interval."""
    model, variables = functional()
    every, small = 2, (2, 3, 4)
    monitors = {
        capacity: Monitor(model, every=every, capacity=capacity) for capacity in (*small, 64)
    }
    logs = {capacity: m.init(variables) for capacity, m in monitors.items()}
    update = {capacity: jax.jit(m.update) for capacity, m in monitors.items()}
    for i, x in enumerate(batches(40)):
        logs = {c: update[c](log, variables, x) for c, log in logs.items()}
        found = {c: m.records(logs[c], variables) for c, m in monitors.items()}
        everything = {r.step: r for r in found[64]}
        assert list(everything) == list(range(0, i + 1, every))
        for capacity in small:
            interval = every
            while i // interval + 1 >= capacity:
                interval *= 2
            assert [r.step for r in found[capacity]] == list(range(0, i + 1, interval))
            for record in found[capacity]:
                expected = everything[record.step].per_channel
                for name, value in record.per_channel.items():
                    np.testing.assert_array_equal(value, expected[name])


class Reversed(nn.Module):
    """Layers whose names are not in the order of their calls; one that is left out."""

    @nn.compact
    def __call__(self, x, all_layers=False):
        first = bnjax.linen.BatchNorm(use_running_average=True, name="z")
        x = bnjax.linen.BatchNorm(use_running_average=True, name="a")(first(x))
        rest = bnjax.linen.BatchNorm(use_running_average=True, name="b")
        return rest(x) if all_layers else x


def test_order_of_calls_and_what_is_not_finite():
    net = Reversed()
    variables = net.init(jax.random.key(0), X, all_layers=True)
    monitor = Monitor(net, call=lambda apply, batch: apply(batch["x"]))
    x = X.copy()
    x[13, 1] = np.inf
    first = monitor.init(variables)
    log = monitor.update(first, variables, {"x": x, "labels": np.arange(BATCH)})
    assert np.isfinite(monitor.records(log, variables)[0].per_channel["low"]).all()  # not looked at
    log = monitor.update(first, variables, {"x": np.roll(x, 1, 0), "labels": np.arange(BATCH)})
    records = monitor.records(log, variables)
    assert [r.layer for r in records] == ["z", "a", "b"]
    by_name = {r.layer: r for r in records}
    for name in QUANTITIES:
        assert np.isfinite(by_name["z"].per_channel[name]).tolist() == [True, False, True]
        assert not np.isfinite(by_name["b"].per_channel[name]).any()
    row = monitor.records(log, variables)[0].row()
    assert list(row) == ["step", "layer", *QUANTITIES] and np.isnan(row["low"])


def test_sharded_batch(devices):
    model, variables = functional()
    monitor = Monitor(model, examples=8)
    log = monitor.init(variables)
    placed = NamedSharding(Mesh(np.array(devices), "i"), PartitionSpec("i"))
    x = X[:96]
    sharded = jax.jit(monitor.update)(log, variables, jax.device_put(x, placed))
    (record,) = monitor.records(sharded, variables)
    (whole,) = monitor.records(monitor.update(log, variables, x), variables)
    for name in QUANTITIES:
        n = 8 * 600
        tolerances.assert_close(record.per_channel[name], whole.per_channel[name], jnp.float32, n)


def test_checkpoint_and_derivative():
    """The log is restored as any tuple of arrays; a loss may carry it."""
    model, variables = functional()
    monitor = Monitor(model, every=2, capacity=4)
    log = monitor.init(variables)

    def loss(params, log):
        y, _ = model((params, variables[1]), X)
        return (y**3).mean(), monitor.update(log, (params, variables[1]), X)

    (_, log), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables[0], log)
    plain = jax.grad(lambda params: (model((params, variables[1]), X)[0] ** 3).mean())
    tolerances.assert_close(grads, plain(variables[0]), jnp.float32, BATCH)
    saved = flax.serialization.to_bytes(log)
    restored = flax.serialization.from_bytes(monitor.init(variables), saved)
    for one, other in zip(restored, log, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", [n for n in script.MODELS if "MNIST" not in n])
def test_bytes_accessed(name):
    """At most 2 % more on average, and nothing where no record is due; counted as XLA does."""
    net, shape = script.MODELS[name]
    monitor = Monitor(net, every=script.EVERY, call=script.in_evaluation)
    plain, recorded = (script.compiled(net, shape, m) for m in (None, monitor))
    counts = [script.accessed(program.as_text()) for program in (plain, recorded)]
    for program, count in zip((plain, recorded), counts, strict=True):
        assert sum(count) == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.01)
    idle = counts[1].always - counts[0].always
    assert 0 <= idle <= 200  # the counter
    # Not counted as nothing: a record is a pass forward over a part of the batch.
    assert counts[1].recording > 0.1 * counts[0].always
    assert idle + counts[1].recording / script.EVERY <= 0.02 * counts[0].always


MODEL, VARIABLES = functional()
LOG = Monitor(MODEL).init(VARIABLES)
OTHER = bnjax.bn_init(5)
BAD = {
    "model, nnx": (
        lambda: Monitor(KINDS["bnjax.nnx"]()[1]),
        (TypeError, "model", "None for nnx", "BatchNorm", "Monitor()"),
    ),
    "every": (lambda: Monitor(MODEL, every=0), (ValueError, "every", "at least 1", "0", "")),
    "examples": (
        lambda: Monitor(MODEL, examples=2.5),
        (TypeError, "examples", "an int", "2.5", ""),
    ),
    "capacity": (
        lambda: Monitor(MODEL, capacity=1),
        (ValueError, "capacity", "at least 2", "1", "capacity=256"),
    ),
    "no model": (
        lambda: Monitor().init(VARIABLES),
        (TypeError, "variables", "the nnx module", "tuple", "Monitor(model)"),
    ),
    "log": (
        lambda: Monitor(MODEL).update((), VARIABLES, X),
        (TypeError, "log", "a MonitorLog", "tuple", "monitor.init(variables)"),
    ),
    "log of another": (
        lambda: Monitor(MODEL).update(LOG, OTHER, X),
        (ValueError, "log", "[capacity, 25]", "(256, 15)", "monitor.init(variables)"),
    ),
    "batch": (
        lambda: Monitor(MODEL).update(LOG, VARIABLES, (X, X[:3])),
        (ValueError, "batch", "one leading axis", "(3, 3)", "examples=None"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    check_message(*BAD[case])


def test_debug_nans():
    """Channels of which nothing can be said are NaN in the records, and in no program."""
    model, (params, state) = functional()
    x = np.array(X)
    x[0, 1] = np.inf
    monitor = Monitor(model, examples=None)
    with jax.debug_nans(True):
        log = jax.jit(monitor.update)(monitor.init((params, state)), (params, state), x)
        (record,) = monitor.records(log, (params, state))
    assert np.isnan(record.per_channel["mean_gap"]).tolist() == [False, True, False]
