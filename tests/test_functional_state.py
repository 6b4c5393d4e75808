"""bn_apply's state: when a channel learns; that it can be carried."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close, error

import bnjax

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (16, 3)).astype(np.float32)
INT_MAX = np.iinfo(np.int32).max
close = functools.partial(assert_close, dtype=np.float32, n=100)
jitted = jax.jit(bnjax.bn_apply, static_argnames=("train", "unbiased", "axis"))


def layer(dtype=jnp.float32):
    mean, var = jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([1.0, 2.0, 3.0], dtype)
    params = bnjax.BNParams(jnp.array([2.0, 3.0, 4.0]), jnp.array([0.5, 0.6, 0.7]))
    return params, bnjax.BNState(mean, var, jnp.array([0, 5, 7], jnp.int32))


def assert_learned(old, new, learned):
    """Channels that learned have new mean, var and count; the others keep all three."""
    learned = np.array(learned)
    np.testing.assert_array_equal(new.count, old.count + learned)
    for a, b in zip(new[:2], old[:2], strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_array_equal(a != b, learned)


# --- which channels learn ----------------------------------------------------


def test_update_formula():
    params, state = layer()
    _, new = jitted(params, state, X, True, momentum=0.9)
    close(new.mean, 0.9 * state.mean + 0.1 * X.mean(0))
    close(new.var, 0.9 * state.var + 0.1 * X.var(0))
    np.testing.assert_array_equal(new.count, [1, 6, 8])


def test_masked_channels():
    """Channels of 0, 1 and 2 entries: the last learns; the first uses the running statistics."""
    params, state = layer()
    mask = np.zeros(X.shape, bool)
    mask[4, 1] = mask[2, 2] = mask[9, 2] = True
    y, new = jitted(params, state, X, True, mask=mask, momentum=0.5)
    assert_learned(state, new, [False, False, True])
    close(new.mean[2], (2 + X[[2, 9], 2].mean()) / 2)
    close(new.var[2], (3 + X[[2, 9], 2].var()) / 2)
    evaluated, _ = jitted(params, state, X, False)
    chex.assert_trees_all_equal(y[:, 0], evaluated[:, 0])
    assert y[4, 1] == params.bias[1]


@pytest.mark.parametrize("train", [True, "traced"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_one_example(train, unbiased):
    """One entry has no variance: y is the bias, nothing is learned (torch raises)."""
    params, state = layer()
    run = functools.partial(bnjax.bn_apply, unbiased=unbiased)
    train = jnp.array(True) if train == "traced" else train
    y, new = run(params, state, X[:1], train)
    chex.assert_trees_all_equal(y, params.bias[None])
    chex.assert_trees_all_equal(new, state)


@pytest.mark.parametrize("mask", [None, np.zeros((0, 3), bool), np.zeros((0, 1), bool)])
@pytest.mark.parametrize("train", [True, False])
def test_empty_batch(train, mask):
    params, state = layer()
    x = jnp.zeros((0, 3))

    def loss(params, x, state):
        y, new = bnjax.bn_apply(params, state, x, train, mask=mask, unbiased=True)
        return jnp.sum(y) + jnp.sum(new.mean + new.var), (y, new)

    (_, (y, new)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True, allow_int=True)(
        params, x, state
    )
    chex.assert_shape(y, (0, 3))
    chex.assert_trees_all_equal(new, state)
    chex.assert_trees_all_equal(grads[0], jax.tree.map(jnp.zeros_like, params))
    chex.assert_shape(grads[1], (0, 3))
    chex.assert_trees_all_equal(grads[2][:2], (jnp.ones(3), jnp.ones(3)))


def test_empty_channel_of_images():
    """No entries along a spatial axis, with channels first."""
    params, state = layer()
    y, new = bnjax.bn_apply(params, state, jnp.zeros((2, 3, 0)), True, axis=1)
    chex.assert_shape(y, (2, 3, 0))
    chex.assert_trees_all_equal(new, state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_bad_batch_does_not_poison(bad, dtype, masked):
    """The channel keeps its state and shows NaN, Inf or 0 in y; the others learn on."""
    params, state = layer()
    x = jnp.asarray(X, dtype).at[5, 1].set(bad).at[6, 1].set(-bad)
    mask = np.arange(16)[:, None] < 12 if masked else None
    y, new = jitted(params, state, x, True, mask=mask)
    assert_learned(state, new, [True, False, True])
    assert np.all(np.isfinite(y[:, [0, 2]]))
    if not np.isfinite(bad):
        assert np.all(np.isnan(y[:, 1]))
    y, again = jitted(params, new, X, True)
    assert_learned(new, again, [True, True, True])
    assert np.all(np.isfinite(y))


def test_each_channel_bad_in_its_own_way():
    params, state = layer()
    x = X.copy()
    x[0, 0], x[3, 1], x[3, 2] = np.inf, np.nan, -np.inf
    _, new = jitted(params, state, x, True)
    chex.assert_trees_all_equal(new, state)


def test_count_saturates():
    params, state = layer()
    state = state._replace(count=jnp.array([INT_MAX - 1, INT_MAX, 0], jnp.int32))
    _, new = jitted(params, state, X, True)
    np.testing.assert_array_equal(new.count, [INT_MAX, INT_MAX, 1])
    _, new = jitted(params, new, X, True)
    np.testing.assert_array_equal(new.count, [INT_MAX, INT_MAX, 2])
    assert np.all(new.mean != state.mean)


def test_schedule_sees_the_count_of_each_channel():
    params, state = layer()
    weights = jnp.linspace(0, 1, 11)
    _, new = bnjax.bn_apply(params, state, X, True, momentum=lambda count: weights[count])
    m = np.array([0.0, 0.5, 0.7])
    close(new.mean, m * state.mean + (1 - m) * X.mean(0))
    close(new.var, m * state.var + (1 - m) * X.var(0))


# --- dtypes and carrying ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize(
    "momentum", [0.9, np.float64(0.9), bnjax.cumulative()], ids=["float", "numpy", "schedule"]
)
def test_state_can_be_carried(x64, dtype, x_dtype, momentum):
    """Shapes, dtypes and strong types of the given state, also under strict promotion."""
    params, state = layer(dtype)
    x = jnp.asarray(X, x_dtype)
    for promotion in ("strict", "standard"):
        with jax.numpy_dtype_promotion(promotion):
            for train in (True, False, jnp.array(True)):
                step = functools.partial(bnjax.bn_apply, train=train, momentum=momentum)
                _, new = jax.eval_shape(step, params, state, x)
                for given, returned in zip(state, new, strict=True):
                    assert (returned.shape, returned.dtype) == (given.shape, given.dtype)
                    assert not returned.weak_type
    _, new = jax.jit(functools.partial(bnjax.bn_apply, momentum=momentum, train=True))(
        params, state, x
    )
    m = momentum(np.asarray(state.count)) if callable(momentum) else momentum
    old = [np.asarray(s, np.float64) for s in state]
    x = np.asarray(x, np.float64)
    rounded = {"dtype": np.float32, "n": 100, "rounded_to": dtype}
    assert_close(new.mean, m * old[0] + (1 - m) * x.mean(0), **rounded)
    assert_close(new.var, m * old[1] + (1 - m) * x.var(0), **rounded)


@pytest.mark.parametrize("momentum", [0.99, bnjax.cumulative()], ids=["float", "schedule"])
def test_narrow_state_is_averaged_in_float32(momentum):
    """And rounded once: in bfloat16 0.99 and 0.01 add up to 0.998."""
    params, wide = layer()
    wide = wide._replace(count=jnp.full(3, 99, jnp.int32))
    narrow = bnjax.BNState(*(s.astype(jnp.bfloat16) for s in wide[:2]), wide.count)
    _, expected = bnjax.bn_apply(params, wide, X, True, momentum=momentum)
    _, new = bnjax.bn_apply(params, narrow, X, True, momentum=momentum)
    chex.assert_trees_all_equal(new[:2], tuple(s.astype(jnp.bfloat16) for s in expected[:2]))


def test_scan():
    params, state = layer()
    xs = jnp.asarray(RNG.normal(1, 2, (5, 16, 3)), jnp.float32)

    def step(state, x):
        y, state = bnjax.bn_apply(params, state, x, True, momentum=0.8)
        return state, y

    carried, ys = jax.lax.scan(step, state, xs)
    for x, y in zip(xs, ys, strict=True):
        expected, state = jitted(params, state, x, True, momentum=0.8)
        close(y, expected)
    close(carried[:2], state[:2])
    np.testing.assert_array_equal(carried.count, state.count)


def test_weak_types():
    """A state made of Python numbers can be carried as well; x keeps its dtype."""
    weak = jnp.broadcast_to(jnp.asarray(1.0), (3,))
    assert jax.typeof(weak).weak_type
    params, state = bnjax.BNParams(weak, weak), layer()[1]._replace(mean=weak, var=weak)
    step = lambda state, x: bnjax.bn_apply(params, state, x, True)[::-1]  # noqa: E731
    new, y = jax.lax.scan(step, state, jnp.asarray(X, jnp.bfloat16)[None])
    chex.assert_type([y, new.mean], [jnp.bfloat16, jnp.float32])
    assert error(new.mean, 0.99 + 0.01 * X.mean(0)) < 1e-3


def test_donated_state():
    params, state = layer()
    step = jax.jit(lambda state, x: bnjax.bn_apply(params, state, x, True), donate_argnums=0)
    expected = jitted(params, state, X, True)
    given = jax.tree.map(jnp.copy, state)
    close(step(given, X), expected)
    assert all(leaf.is_deleted() for leaf in given)
