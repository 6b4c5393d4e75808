"""The table of laws: what every normalization obeys. A new variant is one row of NORMS."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax

SHAPE = (64, 5, 3)
COUNT = 320


class Row(NamedTuple):
    """A variant, and the laws that it does not claim."""

    norm: bnjax.Norm
    but: tuple[str, ...] = ()


NORMS = {
    "batch_norm": Row(bnjax.batch_norm()),
    "cumulative, unbiased": Row(bnjax.batch_norm(momentum=bnjax.cumulative(), unbiased=True)),
    "debiased": Row(bnjax.batch_norm(momentum=bnjax.debiased(0.9))),
    # What is normalized together depends on the place in the batch.
    "ghost": Row(bnjax.ghost(16), but=("mask_is_deletion", "order_of_the_batch", "float64")),
    "microbatches": Row(bnjax.microbatches(1)),
    # Within its limits it normalizes with the running statistics.
    "renorm": Row(
        bnjax.renorm(),
        but=("shift_invariance", "scale_invariance", "output_has_the_moments_of_its_parameters"),
    ),
    # Invariant to one scale for all channels of a group, which are whitened together; and
    # products of matrices round otherwise in smaller batches.
    "whiten": Row(
        bnjax.whiten(3),
        but=("gradient_is_orthogonal", "float64", "inference_is_for_each_entry"),
    ),
}


def law(test):
    """Run for every norm that claims the law."""
    name = test.__name__.removeprefix("test_")
    rows = [pytest.param(row.norm, id=key) for key, row in NORMS.items() if name not in row.but]
    return pytest.mark.parametrize("norm", rows)(test)


@functools.cache
def start(norm, mean=3.0):
    """Parameters that are not the initial ones, a state after one update, a batch."""
    rng = np.random.default_rng(0)
    params, state = norm.init(SHAPE[-1])
    params = params._replace(
        scale=jnp.asarray(rng.uniform(0.5, 1.5, 3), jnp.float32),
        bias=jnp.asarray(rng.normal(size=3), jnp.float32),
    )
    first, x = rng.normal(mean, 2, (2, *SHAPE)).astype(np.float32)
    return params, compiled(norm)(params, state, first, train=True)[1], jnp.asarray(x)


@functools.cache
def compiled(norm, **options):
    return jax.jit(functools.partial(norm.apply, **options), static_argnames="train")


@functools.cache
def traced(norm):
    return jax.jit(norm.apply)


def close(found, expected, n=COUNT, **options):
    tolerances.assert_close(found, expected, jnp.float32, n, **options)


@law
def test_eager_is_jit(norm):
    args = start(norm)
    for train in (True, False):
        close(norm.apply(*args, train), compiled(norm)(*args, train=train))


@law
def test_shift_invariance(norm):
    """y(x + b) = y(x); the batch's mean moves by b, its variance stays."""
    params, state, x = start(norm)
    f = compiled(norm)
    shift = jnp.float32([64.0, -128.0, 1024.0])
    x = jnp.round(x * 256) / 256  # so that x + shift is exact
    (y, new), (moved, new_moved) = (
        f(params, state, v, train=True) for v in (x, x + shift[None, None])
    )
    close(moved, y)
    close(new_moved.var, new.var)
    # The weight of the new value, as a batch of ones and one of zeros show it.
    ones, zeros = (f(params, state, jnp.full_like(x, v), train=True)[1].mean for v in (1, 0))
    close(new_moved.mean - new.mean, (ones - zeros) * shift, scale=1024.0)


@law
def test_scale_invariance(norm):
    """y(a x) = y(x) but for epsilon."""
    params, state, x = start(norm)
    f = compiled(norm, epsilon=0.0)
    y = f(params, state, x, train=True)[0]
    for a in (2.0**-20, 1000.0, 2.0**20):
        close(f(params, state, a * x, train=True)[0], y)
    mirrored = f(params, state, -3 * x, train=True)[0]
    bias = params.bias[None, None]
    close(mirrored - bias, bias - y)


@law
def test_output_has_the_moments_of_its_parameters(norm):
    params, state, x = start(norm)
    y = compiled(norm, epsilon=0.0)(params, state, x, train=True)[0]
    close(jnp.mean(y, (0, 1)), params.bias, scale=1.0)
    close(jnp.std(y, (0, 1)), params.scale)


@law
@pytest.mark.parametrize("train", [True, False])
def test_shards_are_the_whole(norm, train, devices):
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    params, state, x = start(norm)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    f = compiled(norm)
    found = f(params, state, sharded, train=train)
    assert len(found[0].sharding.device_set) == len(devices)
    close(found, f(params, state, x, train=train))


@law
def test_mask_is_deletion(norm):
    """Masked rows may as well not be there, whatever they hold."""
    params, state, x = start(norm)
    rows = np.random.default_rng(1).random(SHAPE[0]) < 0.6
    bad = jnp.where(rows[:, None, None], x, jnp.nan)
    f = compiled(norm)
    y, new = f(params, state, bad, train=True, mask=rows[:, None, None])
    y_fewer, new_fewer = f(params, state, x[rows], train=True)
    close((y[rows], new), (y_fewer, new_fewer))


@law
def test_order_of_the_batch(norm):
    params, state, x = start(norm)
    order = np.random.default_rng(1).permutation(SHAPE[0])
    f = compiled(norm)
    (y, new), (other, new_other) = (f(params, state, v, train=True) for v in (x, x[order]))
    close((other, new_other), (y[order], new))


@law
@pytest.mark.parametrize("train", [False, "traced"])
def test_inference_leaves_the_state(norm, train):
    params, state, x = start(norm)
    x = x.at[0, 0, 0].set(jnp.nan)
    if train == "traced":
        new = traced(norm)(params, state, x, jnp.array(False))[1]
    else:
        new = compiled(norm)(params, state, x, train=False)[1]
    chex.assert_trees_all_equal(new, state)


@law
def test_inference_is_for_each_entry(norm):
    """y of one entry does not depend on the others."""
    params, state, x = start(norm)
    f = compiled(norm)
    whole = f(params, state, x, train=False)[0]
    np.testing.assert_array_equal(f(params, state, x[:8], train=False)[0], whole[:8])


@law
def test_training_learns(norm):
    params, state, x = start(norm)
    new = compiled(norm)(params, state, x + 5, train=True)[1]
    assert (np.asarray(new.mean) > np.asarray(state.mean)).all()
    np.testing.assert_array_equal(new.count, state.count + 1)


@law
def test_traced_train_is_static_train(norm):
    args = start(norm)
    for train in (True, False):
        close(traced(norm)(*args, jnp.array(train)), compiled(norm)(*args, train=train))


@law
def test_traced_once(norm):
    params, state, x = start(norm)
    step = jax.jit(chex.assert_max_traces(norm.apply, n=1))
    for train in (True, False, True):
        _, state = step(params, state, x, jnp.array(train))
    np.testing.assert_array_equal(state.count, [3, 3, 3])
    chex.clear_trace_counter()


@law
def test_state_keeps_its_types(norm):
    """Shapes, dtypes and strong types, whatever the input's and the parameters'."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params, state = norm.init(SHAPE[-1], param_dtype=dtype)
        for x in (start(norm)[2], start(norm)[2].astype(jnp.bfloat16)):
            for train in (True, False, jnp.array(True)):
                new = jax.eval_shape(lambda *args, t=train: norm.apply(*args, t), params, state, x)[
                    1
                ]
                for before, after in zip(state, new, strict=True):
                    assert (before.shape, before.dtype) == (after.shape, after.dtype)
                    assert not after.weak_type


@law
@pytest.mark.usefixtures("x64")
def test_state_stays_narrower_than_the_input(norm):
    params, state = norm.init(SHAPE[-1])
    new = norm.apply(params, state, jnp.ones(SHAPE, jnp.float64), True)[1]
    assert new.mean.dtype == new.var.dtype == jnp.float32


@law
def test_state_is_carried_by_scan(norm):
    params, state = norm.init(SHAPE[-1])
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(4, *SHAPE)), jnp.float32)
    carried, ys = jax.lax.scan(lambda s, x: norm.apply(params, s, x, True)[::-1], state, xs)
    looped = state
    for x, y in zip(xs, ys, strict=True):
        expected, looped = compiled(norm)(params, looped, x, train=True)
        close(y, expected)
    close(carried, looped)


@law
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_dtype(norm, train, dtype):
    params, state, x = start(norm)
    x = x.astype(dtype)
    y, new = compiled(norm)(params, state, x, train=train)
    wide, new_wide = compiled(norm)(params, state, x.astype(jnp.float32), train=train)
    assert y.dtype == dtype
    close(y, wide, rounded_to=dtype)
    close(new, new_wide)


@law
@pytest.mark.usefixtures("x64")
def test_float64(norm):
    params, state = norm.init(SHAPE[-1], param_dtype=jnp.float64)
    x = np.random.default_rng(0).normal(3, 2, SHAPE)
    y, new = compiled(norm, epsilon=0.0)(params, state, x, train=True)
    assert y.dtype == new.mean.dtype == new.var.dtype == jnp.float64
    expected = (x - x.mean((0, 1))) / x.std((0, 1))
    tolerances.assert_close(y, expected, jnp.float64, COUNT)


@law
def test_gradient_is_orthogonal(norm):
    """What shift and scale invariance leave of the gradient: sum(dx) = 0, sum(dx * x) = 0."""
    params, state, x = start(norm)
    w = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)

    def loss(x):
        return jnp.vdot(w, norm.apply(params, state, x, True, epsilon=0.0)[0])

    dx = jax.jit(jax.grad(loss))(x)
    size = float(jnp.sum(jnp.abs(dx * x)))
    close(jnp.sum(dx, (0, 1)), np.zeros(3), scale=size)
    close(jnp.sum(dx * x, (0, 1)), np.zeros(3), scale=size)
