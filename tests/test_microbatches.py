"""Gradient accumulation: running statistics learn once per step, from all microbatches."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tolerances
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from messages import check_message

import bnjax
import bnjax.nnx
from bnjax import BNState, MicrobatchState
from bnjax.linen import BatchNorm

N, C, STEPS = 48, 4, 3
RNG = np.random.default_rng(0)
# Microbatches that differ, so that the variance of their means counts.
X = (RNG.normal(3, 2, (N, C)) + np.repeat(RNG.normal(0, 3, (STEPS, C)), N // STEPS, 0)).astype("f")
MASK = RNG.random((N, C)) < np.linspace(0.05, 1, N)[:, None]
MASK[: N // STEPS, 0] = False  # a microbatch without entries in a channel
PARTS = (STEPS, N // STEPS, C)


def in_parts(v):
    return v.reshape(*PARTS)


def after(norm, mask=None, times=1, x=X):
    """The state after so many steps of gradient accumulation, in a scan."""
    params, state = norm.init(C)
    mask = np.ones((N, C), bool) if mask is None else mask

    def body(state, batch):
        y, state = norm.apply(params, state, batch[0], True, mask=batch[1])
        return state, y

    xs = jax.tree.map(lambda v: np.concatenate([in_parts(v)] * times), (x, mask))
    return jax.jit(lambda state, xs: jax.lax.scan(body, state, xs))(state, xs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.5}, {"momentum": bnjax.cumulative(), "unbiased": True}],
    ids=["momentum", "cumulative, unbiased"],
)
def test_one_update_from_all_microbatches(options, masked):
    mask = MASK if masked else None
    state, y = after(bnjax.microbatches(STEPS, **options), mask)
    fresh = reference.Inputs(X, 1, 0, 0, 1, 1e-5)
    tolerances.assert_close(
        tuple(state[:3]), reference.forward(fresh, mask=mask, **options)[1:], jnp.float32, N
    )
    parts = [
        reference.forward(fresh._replace(x=x), mask=None if mask is None else m).y
        for x, m in zip(in_parts(X), in_parts(MASK), strict=True)
    ]
    tolerances.assert_close(y, np.stack(parts), jnp.float32, N)
    assert not any(np.any(v) for v in state[3:])


def test_state_in_between_and_over_steps():
    norm = bnjax.microbatches(STEPS, momentum=0.5)
    params, start = norm.init(C)
    state = start
    for part in in_parts(X)[:2]:
        _, state = norm.apply(params, state, part, True)
        assert state[:3] == jax.tree.map(lambda v: pytest.approx(np.asarray(v)), start[:3])
        y, same = norm.apply(params, state, part, False)
        np.testing.assert_array_equal(
            y, bnjax.bn_apply(params, BNState(*start[:3]), part, False)[0]
        )
        assert same is state
    np.testing.assert_array_equal(state.part_steps, 2)
    np.testing.assert_array_equal(state.part_count, 2 * N / STEPS)
    mean, var = X[: 2 * N // STEPS].mean(0), X[: 2 * N // STEPS].var(0)
    found = (state.part_shift + state.part_offset, state.part_var)
    tolerances.assert_close(found, (mean, var), jnp.float32, N)
    twice, _ = after(norm, times=2)
    np.testing.assert_array_equal(twice.count, 2)
    tolerances.assert_close(twice.mean, 0.75 * X.mean(0, dtype=np.float64), jnp.float32, N)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("n, steps", [(8, 4), (2, 16), (4096, 2)])
def test_accurate_at_any_mean(n, steps, mean):
    """Though the means of few entries differ much, and are large beside that."""
    x = (np.random.default_rng(0).normal(size=(steps, n, C)) + mean).astype(np.float32)
    norm = bnjax.microbatches(steps, momentum=0.0)
    params, state = norm.init(C)
    state, _ = jax.jit(
        lambda s, x: jax.lax.scan(lambda s, x: norm.apply(params, s, x, True)[::-1], s, x)
    )(state, x)
    bound = tolerances.variance(jnp.float32, n * steps, mean)
    np.testing.assert_allclose(state.var, x.var((0, 1), dtype=np.float64), rtol=bound)


def test_nan_costs_its_channel_one_step():
    norm, x = bnjax.microbatches(STEPS, momentum=0.5), X.copy()
    x[0, 0] = np.nan
    state, _ = after(norm, x=x)
    np.testing.assert_array_equal(state.count, [0, 1, 1, 1])
    assert state.mean[0] == 0 and state.var[0] == 1 and np.isfinite(state.part_shift).all()
    params, _ = norm.init(C)
    for part in in_parts(X):
        _, state = norm.apply(params, state, part, True)
    np.testing.assert_array_equal(state.count, [1, 2, 2, 2])


def test_traced_train():
    norm = bnjax.microbatches(2)
    params, state = norm.init(C)
    step = jax.jit(norm.apply)
    _, seen = step(params, state, X, True)
    _, same = step(params, seen, X + 1, jnp.array(False))
    np.testing.assert_array_equal(same, seen)


class Net(nn.Module):
    norm: bnjax.Norm

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, use_bias=False)(x)
        x = nn.relu(BatchNorm(use_running_average=False, norm=self.norm)(x))
        return nn.Dense(2)(x)


def gradients(net, variables, x, labels):
    def loss(params):
        logits, new = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


def test_beside_multi_steps():
    """Two steps of three microbatches are two steps of ghost batches, parameters included."""
    micro, whole = Net(bnjax.microbatches(STEPS, momentum=0.5)), Net(bnjax.ghost(16, momentum=0.5))
    labels = RNG.integers(0, 2, (2, N))
    batches = np.stack([X, X[::-1] * 0.5])

    def train(net, optimizer, batches, labels):
        variables = net.init(jax.random.key(0), X)
        opt = optimizer.init(variables["params"])

        def body(carry, batch):
            variables, opt = carry
            grads, stats = gradients(net, variables, *batch)
            updates, opt = optimizer.update(grads, opt, variables["params"])
            params = optax.apply_updates(variables["params"], updates)
            return ({"params": params, "batch_stats": stats}, opt), None

        carry, _ = jax.jit(lambda c, b: jax.lax.scan(body, c, b))(
            (variables, opt), (batches, labels)
        )
        return carry[0]

    optimizer = optax.sgd(0.1)
    found = train(
        micro,
        optax.MultiSteps(optimizer, every_k_schedule=STEPS),
        batches.reshape(2 * STEPS, N // STEPS, C),
        labels.reshape(2 * STEPS, N // STEPS),
    )
    expected = train(whole, optimizer, batches, labels)
    stats = found["batch_stats"]["BatchNorm_0"]
    found["batch_stats"]["BatchNorm_0"] = {name: stats[name] for name in ("mean", "var")}
    tolerances.assert_close(found, expected, jnp.float32, N)


def test_nnx_is_the_function():
    norm = bnjax.microbatches(STEPS, momentum=0.5)
    layer = bnjax.nnx.BatchNorm(C, norm=norm, rngs=nnx.Rngs(0))
    for part in in_parts(X)[:2]:
        layer(part)
    params, state = norm.init(C)
    for part in in_parts(X)[:2]:
        _, state = norm.apply(params, state, part, True)
    for name in MicrobatchState._fields:
        if name != "count":
            np.testing.assert_array_equal(getattr(layer, name)[...], getattr(state, name))
    reverted = nnx.clone(layer)
    reverted.norm = None
    bnjax.nnx.revert(reverted)
    assert set(nnx.state(reverted, nnx.BatchStat)) == {"mean", "var"}
    layer.norm = bnjax.microbatches(2, momentum=bnjax.cumulative())
    with pytest.raises(ValueError, match=r"must hold .*got none for \['count'\]"):
        layer(X)
    plain = bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    plain.norm = norm
    with pytest.raises(ValueError, match=r"'part_shift'.*make the layer with this norm"):
        plain(X)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_sharded(types, devices):
    mesh = jax.make_mesh((len(devices),), ("i",), axis_types=(types,))
    norm = bnjax.microbatches(1, momentum=0.5)
    params, state = norm.init(C)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, PartitionSpec("i")))
        _, new = jax.jit(functools.partial(norm.apply, train=True))(params, state, x)
        # A choice by a traced scalar, of channels that are sharded.
        columns = jax.device_put(np.tile(X, 2), jax.NamedSharding(mesh, PartitionSpec(None, "i")))
        params, state = norm.init(2 * C)
        _, same = jax.jit(norm.apply)(params, state, columns, jnp.array(False))
    chex.assert_trees_all_equal(same, state)
    moments = reference.moments(X)
    tolerances.assert_close(new.mean, 0.5 * moments.mean, jnp.float32, N)
    tolerances.assert_close(new.var, 0.5 + 0.5 * moments.var, jnp.float32, N)


NORM = bnjax.microbatches(2)
PARAMS, STATE = NORM.init(C)
REFUSED = {
    "zero": (lambda: bnjax.microbatches(0), (ValueError, "steps", "at least 1", "0", "")),
    "float": (lambda: bnjax.microbatches(2.0), (TypeError, "steps", "an int", "2.0", "")),
    "option": (
        lambda: bnjax.microbatches(2, steps_=1),
        (TypeError, "microbatches", "options of `bn_apply`", "steps_", ""),
    ),
    "state": (
        lambda: NORM.apply(PARAMS, BNState(*STATE[:3]), X, True),
        (TypeError, "state", "a MicrobatchState", "BNState", "microbatches(2).init"),
    ),
    "shape": (
        lambda: NORM.apply(PARAMS, STATE._replace(part_var=jnp.ones(1)), X, True),
        (ValueError, "state.part_var", "shape (4,)", "(1,)", "microbatches(steps).init"),
    ),
    "list": (
        lambda: NORM.apply(PARAMS, STATE._replace(part_var=[0.0] * 4), X, True),
        (TypeError, "state.part_var", "array", "list", ""),
    ),
    "many": (lambda: bnjax.microbatches(2**32), (ValueError, "steps", "below 2**31", "4294", "")),
    "dtype": (
        lambda: NORM.apply(PARAMS, STATE._replace(part_shift=jnp.ones(4, int)), X, True),
        (TypeError, "state.part_shift", "floating", "int32", ""),
    ),
    "steps": (
        lambda: NORM.apply(PARAMS, STATE._replace(part_steps=jnp.ones(4)), X, True),
        (TypeError, "state.part_steps", "signed integers", "float32", ""),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    check_message(*REFUSED[name])
