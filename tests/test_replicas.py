"""merge_states: replicas that were trained without synchronization, merged into one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import linen as nn
from flax import nnx
from messages import check_message

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import BNState, merge_states

C = 3
RNG = np.random.default_rng(0)
# Replicas that saw other data, of other means.
SEEN = [RNG.normal(RNG.normal(5, 4, C), RNG.uniform(1, 3, C), (n, C)) for n in (10, 40, 20)]


def learned(x):
    """A state that holds the moments of what was seen."""
    params, state = bnjax.bn_init(C)
    return bnjax.bn_apply(params, state, jnp.asarray(x, jnp.float32), True, momentum=0.0)[1]


STATES = [learned(x) for x in SEEN]


def test_weighted_by_examples_it_is_the_whole():
    merged = merge_states(STATES, weights=[len(x) for x in SEEN])
    whole = np.concatenate(SEEN)
    expected = BNState(whole.mean(0), whole.var(0), np.full(C, 3))
    tolerances.assert_close(merged, expected, jnp.float32, len(whole))
    assert merged.count.dtype == jnp.int32


def test_equal_weights_include_the_variance_of_the_means():
    merged = merge_states(STATES)
    mean, var = (np.stack([np.asarray(s[i], np.float64) for s in STATES]) for i in (0, 1))
    expected = (mean.mean(0), var.mean(0) + mean.var(0))
    tolerances.assert_close((merged.mean, merged.var), expected, jnp.float32, 3)
    # More than the average of the variances, which peers take.
    assert (np.asarray(merged.var) > 1.01 * var.mean(0)).all()


def test_untrained_channels_and_replicas_of_no_weight_take_no_part():
    one, other, last = STATES
    untrained = other._replace(count=jnp.array([0, 1, 0]))
    merged = merge_states(
        [one, untrained, last._replace(count=jnp.zeros(C, int))], weights=[1, 1, 2]
    )
    both = merge_states([one, other])
    np.testing.assert_allclose(merged.mean, [one.mean[0], both.mean[1], one.mean[2]], rtol=1e-6)
    np.testing.assert_array_equal(merged.count, [1, 2, 1])
    garbage = jax.tree.map(lambda v: jnp.full_like(v, 7), other)._replace(mean=jnp.full(C, jnp.nan))
    found = merge_states([one, garbage], weights=[1, 0])
    np.testing.assert_allclose(found.mean, one.mean)
    np.testing.assert_array_equal(found.count, one.count)
    # Nothing tells which are trained where no counts are kept.
    uncounted = [s._replace(count=jnp.zeros(C, int)) for s in STATES]
    np.testing.assert_array_equal(merge_states(uncounted).var, merge_states(STATES).var)


def test_what_pmap_returns_in_flax(devices):
    """linen's batch_stats and an nnx state, with a leading axis of replicas."""
    x = (
        RNG.normal(size=(len(devices), 16, C)).astype(np.float32)
        + np.arange(8.0, dtype="f")[:, None, None]
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.0)(x)
            return bnjax.linen.BatchNorm(use_running_average=False, momentum=bnjax.cumulative())(x)

    net = Net()
    variables = net.init(jax.random.key(0), x[0])
    stats = jax.pmap(lambda x: net.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"])(
        x
    )
    merged = merge_states(stats)
    assert jax.tree.structure(merged) == jax.tree.structure(variables["batch_stats"])
    whole = x.reshape(-1, C).astype(np.float64)
    first = merged["BatchNorm_0"]
    tolerances.assert_close(
        (first["mean"], first["var"]), (whole.mean(0), whole.var(0)), jnp.float32, 128
    )
    np.testing.assert_array_equal(merged["BatchNorm_1"]["count"], np.full(C, 8))
    assert np.isfinite(net.apply({**variables, "batch_stats": merged}, x[0], mutable=True)[0]).all()

    layer = bnjax.nnx.BatchNorm(C, momentum=0.0, rngs=nnx.Rngs(0))
    states = []
    for part in x:
        layer(part)
        states.append(jax.tree.map(jnp.copy, nnx.state(layer, nnx.BatchStat)))
    nnx.update(layer, jax.jit(merge_states)(states))
    np.testing.assert_allclose(layer.var[...], first["var"], rtol=1e-6)


def test_extreme_weights_and_counts():
    """Large and small weights count by their ratios, and sums of counts do not overflow."""
    expected = merge_states(STATES, weights=[1, 2, 1])
    for unit in (1e300, 1e-300):
        found = merge_states(STATES, weights=[unit, 2 * unit, unit])
        tolerances.assert_close(found, expected, jnp.float32, 3)
    much = np.full(C, 2**31 - 2, np.int32)
    found = merge_states([s._replace(count=jnp.asarray(much)) for s in STATES])
    np.testing.assert_array_equal(found.count, 2**31 - 1)


def test_accurate_at_a_large_mean():
    x = (np.concatenate(SEEN) + 1e4).astype(np.float32)
    states = [learned(v) for v in x.reshape(2, 35, C)]
    np.testing.assert_allclose(merge_states(states).var, x.var(0, dtype=np.float64), rtol=1e-4)


def test_unfinished_microbatches():
    """Of replicas in the middle of a step of gradient accumulation."""
    norm = bnjax.microbatches(2, momentum=0.0)
    params, start = norm.init(C)
    x = np.stack([SEEN[0], SEEN[1][:10]]).astype(np.float32)
    states = [norm.apply(params, start, part, True)[1] for part in x]
    merged = merge_states(states)
    np.testing.assert_array_equal(merged.part_steps, 1)
    np.testing.assert_array_equal(merged.part_count, 20)
    _, after = norm.apply(params, merged, x[0], True)
    seen = np.concatenate([x[0], x[1], x[0]])
    tolerances.assert_close((after.mean, after.var), (seen.mean(0), seen.var(0)), jnp.float32, 30)


@pytest.mark.usefixtures("x64")
def test_dtypes():
    """Of the given states, whatever else is in use; NumPy arrays too."""
    states = [jax.tree.map(np.asarray, s) for s in STATES]
    with jax.numpy_dtype_promotion("strict"):
        found = merge_states(states, weights=[1, 1, 1])
    assert [v.dtype for v in found] == [jnp.float32, jnp.float32, jnp.int32]
    wide = [
        s._replace(mean=s.mean.astype(np.float64), var=s.var.astype(np.float64)) for s in states
    ]
    assert merge_states(wide).mean.dtype == jnp.float64


STACKED = jax.tree.map(lambda *v: jnp.stack(v), *STATES)
REFUSED = {
    "none": (lambda: merge_states([]), (ValueError, "states", "at least one", "none", "")),
    "structure": (
        lambda: merge_states([STATES[0], STATES[1]._asdict()]),
        (ValueError, "states", "one structure", "PyTreeDef", ""),
    ),
    "shape": (
        lambda: merge_states([STATES[0], STATES[1]._replace(var=jnp.ones(2))]),
        (ValueError, "states.var", "one shape and dtype", "(2,)", ""),
    ),
    "one that is not stacked": (
        lambda: merge_states(STATES[0]),
        (ValueError, "states", "leading axis", "(3,)", "merge_states([state, ...])"),
    ),
    "lengths": (
        lambda: merge_states(STACKED._replace(mean=STACKED.mean[:2])),
        (ValueError, "states", "of one length", "(2, 3)", "merge_states([state, ...])"),
    ),
    "shapes": (
        lambda: merge_states([{"mean": jnp.ones(3), "var": jnp.ones(2)}]),
        (ValueError, "var", "shape of mean", "(1, 2)", ""),
    ),
    "integers": (
        lambda: merge_states([{"mean": jnp.ones(3, int), "var": jnp.ones(3)}]),
        (TypeError, "mean", "floating", "int32", ""),
    ),
    "count": (
        lambda: merge_states([STATES[0]._replace(count=jnp.ones(3))]),
        (TypeError, "count", "signed integers", "float32", ""),
    ),
    "parameters": (
        lambda: merge_states([{"params": {"scale": jnp.ones(2)}, "batch_stats": {}}]),
        (ValueError, "states", "mean, var and perhaps count", "'scale'", "give batch_stats"),
    ),
    "number of weights": (
        lambda: merge_states(STATES, weights=[1, 2]),
        (ValueError, "weights", "each of the 3 replicas", "(2,)", ""),
    ),
    "negative weight": (
        lambda: merge_states(STATES, weights=[1, 2, -1]),
        (ValueError, "weights", "in [0, inf]", "-1", ""),
    ),
    "kind of weights": (
        lambda: merge_states(STATES, weights="123"),
        (TypeError, "weights", "a list or an array", "'123'", ""),
    ),
    "kind of a weight": (
        lambda: merge_states(STATES, weights=["1", "2", "3"]),
        (TypeError, "weights", "a real number", "'1'", ""),
    ),
    "infinite weight": (
        lambda: merge_states(STATES, weights=[1, 2, np.inf]),
        (ValueError, "weights", "finite", "inf", ""),
    ),
    "no weight": (
        lambda: merge_states(STATES, weights=[0, 0, 0]),
        (ValueError, "weights", "not all 0", "[0, 0, 0]", ""),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    check_message(*REFUSED[name])
