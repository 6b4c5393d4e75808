"""bn_apply under transformations and with traced choices; `Norm`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

import bnjax

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (16, 3)).astype(np.float32)
close = functools.partial(assert_close, dtype=np.float32, n=100)
jitted = jax.jit(bnjax.bn_apply, static_argnames=("train", "unbiased", "axis"))


def layer():
    mean, var = jnp.array([1.0, -1.0, 2.0]), jnp.array([1.0, 2.0, 3.0])
    params = bnjax.BNParams(jnp.array([2.0, 3.0, 4.0]), jnp.array([0.5, 0.6, 0.7]))
    return params, bnjax.BNState(mean, var, jnp.array([0, 5, 7], jnp.int32))


# --- traced choices -------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, RNG.random((16, 3)) < 0.5])
def test_traced_train(mask):
    """One program for both; the numbers of the static ones."""
    params, state = layer()

    traces = []

    @jax.jit
    def step(train):
        traces.append(train)
        return bnjax.bn_apply(params, state, X, train, mask=mask, unbiased=True, momentum=0.7)

    for train in (True, False):
        options = {"mask": mask, "unbiased": True, "momentum": 0.7}
        y, new = jitted(params, state, X, train, **options)
        y_traced, new_traced = step(train)
        close((y_traced, new_traced), (y, new))
        np.testing.assert_array_equal(new_traced.count, state.count + train)
    chex.assert_trees_all_equal(step(np.False_)[1], state)
    assert len(traces) == 1


def test_traced_train_needs_the_mapped_axis():
    """Whether it is used is not known while tracing."""
    params, state = layer()
    step = jax.jit(lambda train: bnjax.bn_apply(params, state, X, train, axis_name="i"))
    with pytest.raises(ValueError, match="`axis_name` must name an axis mapped"):
        step(False)


def test_traced_numbers_are_not_checked_and_are_differentiable():
    params, state = layer()

    @jax.jit
    def step(momentum, epsilon):
        return bnjax.bn_apply(params, state, X, True, momentum=momentum, epsilon=epsilon)

    for momentum, epsilon in ((0.5, 1e-3), (1.5, -0.1)):
        y, new = step(momentum, epsilon)
        close(new.mean, momentum * state.mean + (1 - momentum) * X.mean(0))
        normal = (X - X.mean(0)) / np.sqrt(X.var(0) + epsilon)
        close(y, normal * np.asarray(params.scale) + np.asarray(params.bias))
    slope = jax.jacfwd(lambda m: step(m, 1e-3)[1].mean)(0.5)
    close(slope, state.mean - X.mean(0))
    slope = jax.jacrev(lambda e: step(0.5, e)[0])(0.25)
    factor = -0.5 * np.asarray(params.scale) * (X.var(0) + 0.25) ** -1.5
    close(slope, (X - X.mean(0)) * factor)


# --- inputs and transformations ---------------------------------------------------


def test_numpy_inputs():
    params, state = jax.tree.map(np.asarray, layer())
    y, new = bnjax.bn_apply(params, state, X, np.True_)
    assert all(isinstance(leaf, jax.Array) for leaf in (y, *new))
    close((y, new), jitted(*layer(), X, True))
    y, new = bnjax.bn_apply(params, state, X, np.array(False))
    assert all(isinstance(leaf, jax.Array) for leaf in (y, *new))
    chex.assert_trees_all_equal(new, state)
    close(y, jitted(*layer(), X, False)[0])


def test_ensemble():
    """vmap over models: parameters, statistics, options and the mode of each."""
    rng = np.random.default_rng(1)
    params, state = jax.tree.map(
        lambda v: jnp.asarray(rng.uniform(1, 4, (4, *v.shape)), v.dtype), layer()
    )
    x = rng.normal(3, 2, (4, 16, 3)).astype(np.float32)
    momentum, train = np.linspace(0, 1, 4, dtype=np.float32), np.array([True, False, True, False])
    step = jax.vmap(lambda p, s, x, t, m: bnjax.bn_apply(p, s, x, t, momentum=m))
    y, new = jax.jit(step)(params, state, x, train, momentum)
    for i in range(4):
        one = jax.tree.map(lambda v: v[i], (params, state, x))  # noqa: B023
        expected = jitted(*one, bool(train[i]), momentum=momentum[i])
        close((y[i], jax.tree.map(lambda v: v[i], new)), expected)  # noqa: B023


def test_debugging_tools():
    """No NaN on the way, no leaked tracer, where masks and empty channels divide by zero."""
    params, state = layer()
    mask = np.zeros(X.shape, bool)
    mask[:1, 1] = mask[:, 2] = True
    x = X.copy()
    x[3, 0] = np.nan  # masked

    def loss(params, x, train):
        y, new = bnjax.bn_apply(params, state, x, train, mask=mask, unbiased=True)
        return jnp.sum(y * y) + jnp.sum(new.var)

    with jax.debug_nans(True), jax.checking_leaks():
        for train in (True, False):
            jax.jit(jax.grad(loss, (0, 1)))(params, x, train)


# --- Norm --------------------------------------------------------------------------

BOUND = {
    "axis": 0,
    "momentum": 0.3,
    "epsilon": 0.7,
    "unbiased": True,
    "mask": np.arange(16)[None] < 9,
    "dtype": jnp.bfloat16,
}


@pytest.mark.parametrize("name", BOUND)
def test_norm_binds(name):
    norm = bnjax.batch_norm(**{name: BOUND[name]})
    x = X if name == "axis" else X.T.copy()  # the mask is for [3, 16]
    params, state = norm.init(x.shape[0 if name == "axis" else 1])
    expected = bnjax.bn_apply(params, state, x, True, **{name: BOUND[name]})
    chex.assert_trees_all_equal(norm.apply(params, state, x, True), expected)


def test_norm_binds_axis_name():
    norm = bnjax.batch_norm(axis_name="i")
    params, state = norm.init(3)
    step = jax.vmap(lambda x: norm.apply(params, state, x, True), axis_name="i")
    y, _ = jax.jit(step)(X[:, None])
    close(y[:, 0], jitted(params, state, X, True)[0])


def test_norm_is_a_pair():
    norm = bnjax.batch_norm(momentum=0.5)
    init, apply, needs_count, state_type, always_updates = norm
    params, state = init(3, use_bias=False, param_dtype=jnp.bfloat16)
    assert params.bias is None and params.scale.dtype == jnp.bfloat16
    expected = bnjax.bn_apply(params, state, X, True, momentum=0.5, epsilon=0.1)
    given = apply(params, state, X, train=True, momentum=0.5, epsilon=0.1)
    chex.assert_trees_all_equal(given, expected)
    assert needs_count is False and state_type is type(state) and always_updates is False


@pytest.mark.parametrize(
    "momentum, needed",
    [(0.9, False), (jnp.array(0.9), False), (bnjax.cumulative(), True), (len, True)],
)
def test_needs_count(momentum, needed):
    assert bnjax.batch_norm(momentum=momentum).needs_count is needed
    assert bnjax.batch_norm().needs_count is False
