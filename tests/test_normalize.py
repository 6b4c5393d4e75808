"""The normalization: values, masks, bad entries, residuals, jax's strict modes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances

import bnjax
from bnjax import BNParams, BNState

SHAPE = (64, 3)


def arrays(mean=1.0, shape=SHAPE, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 2, shape).astype(dtype)
    scale, bias, old_mean, old_var = rng.uniform(0.5, 1.5, (4, shape[-1])).astype(np.float32)
    return reference.Inputs(x, scale, bias, old_mean, old_var, np.float32(1e-3))


def call(inputs, train=True, **options):
    state = BNState(inputs.mean, inputs.var, jnp.zeros(inputs.mean.shape, jnp.int32))
    params = BNParams(inputs.scale, inputs.bias)
    return bnjax.bn_apply(params, state, inputs.x, train, epsilon=inputs.epsilon, **options)


@jax.jit
def both(inputs, mask, cotangents):
    """Outputs and gradients of a masked training step."""

    def f(inputs):
        y, state = call(inputs, mask=mask, momentum=0.9)
        return (y, state.mean, state.var), state.count

    out, pullback, count = jax.vjp(f, inputs, has_aux=True)
    return out, count, pullback(cotangents)[0]


def oracle(inputs, mask, cotangents):
    y, mean, var, count = reference.forward(inputs, mask=mask, momentum=0.9)
    return (y, mean, var), count, reference.backward(inputs, cotangents, mask=mask, momentum=0.9)


def some_cotangents():
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=s).astype(np.float32) for s in (SHAPE, SHAPE[-1:], SHAPE[-1:]))


def masks():
    rng = np.random.default_rng(2)
    mask = rng.random(SHAPE) < 0.5
    yield "random", mask
    empty = mask.copy()
    empty[:, 1] = False
    yield "an empty channel", empty
    single = empty.copy()
    single[9, 1] = True
    yield "one entry in a channel", single
    yield "all", np.ones(SHAPE, bool)
    yield "none", np.zeros(SHAPE, bool)


@pytest.mark.parametrize("mask", [pytest.param(m, id=name) for name, m in masks()])
def test_masks_against_the_oracle(mask):
    """Cotangents of masked outputs flow to scale, bias and the moments as any other."""
    inputs, cotangents = arrays(), some_cotangents()
    found, expected = both(inputs, mask, cotangents), oracle(inputs, mask, cotangents)
    tolerances.assert_close(found, expected, jnp.float32, 64)
    # Masked entries receive the direct derivative only.
    m = reference.moments(inputs.x, mask=mask)
    var = np.where(m.count > 0, m.var, inputs.var)
    direct = inputs.scale * (var + inputs.epsilon) ** -0.5 * cotangents[0]
    gradient = np.asarray(found[2].x)
    tolerances.assert_close(gradient[~mask], direct[~mask], jnp.float32, 64)
    if not mask.all() and mask.any():
        assert tolerances.error(gradient[mask], direct[mask]) > 0.01


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mean", [1.0, 1e3])
def test_bad_masked_entries_count_as_zeros(garbage, mean):
    inputs, cotangents = arrays(mean), some_cotangents()
    mask = next(masks())[1]
    bad, zero = (
        both(inputs._replace(x=np.where(mask, inputs.x, np.float32(v))), mask, cotangents)
        for v in (garbage, 0)
    )
    chex.assert_trees_all_equal(bad[:2], zero[:2])
    chex.assert_trees_all_equal(bad[2]._replace(x=None), zero[2]._replace(x=None))
    np.testing.assert_array_equal(bad[2].x[mask], zero[2].x[mask])
    np.testing.assert_array_equal(bad[2].x[~mask], 0)


def test_what_finite_masked_entries_hold_changes_nothing_elsewhere():
    inputs, mask = arrays(), next(masks())[1]
    dy, dmean, dvar = some_cotangents()
    one, other = (
        both(inputs._replace(x=np.where(mask, inputs.x, v)), mask, (dy * mask, dmean, dvar))
        for v in (inputs.x, np.float32(1e30))
    )
    np.testing.assert_array_equal(one[0][0][mask], other[0][0][mask])
    chex.assert_trees_all_equal(one[0][1:], other[0][1:])
    chex.assert_trees_all_equal(one[2], other[2])


def test_bad_masked_entries_in_forward_mode():
    inputs, mask = arrays(), next(masks())[1]
    x = np.where(mask, inputs.x, np.float32(np.nan))

    def f(x, dx):
        return jax.jvp(lambda x: call(inputs._replace(x=x), mask=mask), (x,), (dx,))[1][0]

    dx = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    for direction in (dx, np.where(mask, dx, np.float32(np.nan))):
        found, expected = f(x, direction), f(np.where(mask, x, 0), np.where(mask, dx, 0))
        tolerances.assert_close(found, expected, jnp.float32, 64)


@pytest.mark.parametrize("train", [True, "traced"])
def test_a_channel_without_entries_is_that_of_inference(train):
    inputs, mask = arrays(), np.ones(SHAPE, bool)
    mask[:, 1] = False
    cotangent = some_cotangents()[0]

    def step(inputs, train):
        return jax.vjp(lambda inputs: call(inputs, train, mask=mask)[0], inputs)

    y, pullback = step(inputs, jnp.array(True) if train == "traced" else True)
    y_inference, pullback_inference = step(inputs, False)
    np.testing.assert_array_equal(y[:, 1], y_inference[:, 1])
    gradient, expected = pullback(cotangent)[0], pullback_inference(cotangent)[0]
    for name in ("x", "scale", "bias", "mean", "var"):
        pair = (np.asarray(getattr(g, name))[..., 1] for g in (gradient, expected))
        tolerances.assert_close(*pair, jnp.float32, 64)
    np.testing.assert_array_equal(np.asarray(gradient.mean)[[0, 2]], 0)
    np.testing.assert_array_equal(np.asarray(gradient.var)[[0, 2]], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_a_bad_entry_is_seen_and_not_learned(bad, masked):
    inputs = arrays()
    mask = np.ones(SHAPE, bool) if masked else None
    x = inputs.x.copy()
    x[3, 1] = bad
    y, state = jax.jit(lambda x: call(inputs._replace(x=x), mask=mask))(x)
    assert np.isnan(y[:, 1]).all()
    expected = reference.forward(inputs)
    others = np.array([0, 2])
    tolerances.assert_close(y[:, others], expected.y[:, others], jnp.float32, 64)
    tolerances.assert_close(state.mean[others], expected.mean[others], jnp.float32, 64)
    assert (state.mean[1], state.var[1]) == (inputs.mean[1], inputs.var[1])
    np.testing.assert_array_equal(state.count, [1, 0, 1])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_an_empty_batch_leaves_the_state(shape):
    inputs = arrays(shape=shape)
    y, state = call(inputs)
    assert y.shape == shape
    chex.assert_trees_all_equal(tuple(state), (inputs.mean, inputs.var, np.zeros(3, np.int32)))
    gradient = jax.grad(lambda i: call(i)[0].sum() + call(i)[1].mean.sum())(inputs)
    np.testing.assert_allclose(gradient.mean, np.ones(3))


def test_epsilon_for_each_channel():
    inputs = arrays()
    epsilon = np.float32([0, 1e-3, 10])
    y = call(inputs._replace(epsilon=epsilon))[0]
    expected = reference.forward(inputs._replace(epsilon=epsilon)).y
    tolerances.assert_close(y, expected, jnp.float32, 64)


@jax.jit
def trained(inputs):
    return call(inputs)


@pytest.mark.parametrize("old", [0.0, 1.0, -1e4, 1e15, 1e30, -3e38, np.inf, np.nan])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_training_does_not_depend_on_the_running_mean(old, mean):
    inputs = arrays(2 * mean)
    y, _ = trained(inputs._replace(mean=np.full(3, old, np.float32)))
    tolerances.assert_close(y, reference.forward(inputs).y, jnp.float32, 64)


TRAINS = {"static": True, "traced": jnp.array(True), "inference": False}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("masked", [False, True])
def test_reverse_mode_keeps_x_alone(dtype, train, masked):
    """In its own dtype, with the mask, and vectors."""
    inputs = jax.tree.map(jnp.asarray, arrays(shape=(512, 3)))
    inputs = inputs._replace(x=inputs.x.astype(dtype))
    mask = jnp.ones((512, 3), bool) if masked else None

    def pullback(inputs, mask):
        return jax.vjp(lambda i: call(i, TRAINS[train], mask=mask)[0], inputs)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, inputs, mask))
    large = sorted(str(v.dtype) for v in kept if v.size >= inputs.x.size)
    assert large.count(str(jnp.dtype(dtype))) == 1
    assert len(large) <= 1 + masked and set(large) <= {str(jnp.dtype(dtype)), "bool"}


@pytest.mark.parametrize("train", ["static", "traced"])
def test_compiled_steps_hold_no_copy(train):
    """XLA shares no x - mean between forward and backward, and so sets nothing large aside."""
    inputs = jax.tree.map(jnp.asarray, arrays(shape=(4096, 64)))

    def step(inputs, w):
        y, pullback = jax.vjp(lambda i: call(i, TRAINS[train])[0], inputs)
        return y, pullback(w)[0]

    compiled = jax.jit(step).lower(inputs, inputs.x).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    assert held < inputs.x.size / 8, f"{held / inputs.x.size:.2g} bytes for each entry"


@pytest.mark.parametrize("train", [True, False])
def test_debug_nans(train):
    inputs, mask = jax.tree.map(jnp.asarray, arrays()), jnp.asarray(next(masks())[1])
    with jax.debug_nans(True):
        y, _ = call(inputs, train, mask=mask)
        jax.grad(lambda i: call(i, train, mask=mask)[0].sum())(inputs)
        jax.jit(jax.grad(lambda i: call(i, train, mask=mask)[0].sum()))(inputs)
        with pytest.raises(FloatingPointError):
            call(inputs._replace(x=inputs.x.at[0, 0].set(jnp.nan)), train)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("train", TRAINS)
def test_strict_promotion(dtype, train):
    inputs, mask = jax.tree.map(jnp.asarray, arrays()), jnp.asarray(next(masks())[1])
    x = inputs.x.astype(dtype)

    @jax.jit
    def f(x):
        y, state = call(inputs._replace(x=x), TRAINS[train], mask=mask, unbiased=True)
        return y.astype(jnp.float32).sum() + state.var.sum(), y

    with jax.numpy_dtype_promotion("strict"):
        gradient, y = jax.grad(f, has_aux=True)(x)
    assert y.dtype == gradient.dtype == dtype
    wide = inputs._replace(x=np.asarray(x, np.float32))
    expected = reference.forward(wide, train=bool(TRAINS[train]), mask=mask).y
    tolerances.assert_close(y, expected, jnp.float32, 64, rounded_to=dtype)


def test_no_tracer_leaks():
    inputs, mask = jax.tree.map(jnp.asarray, arrays()), jnp.asarray(next(masks())[1])
    with jax.checking_leaks():

        @jax.jit
        def f(inputs, train):
            y, state = call(inputs, train, mask=mask)
            return jnp.sum(y**2) + state.mean.sum()

        assert np.isfinite(f(inputs, jnp.array(True)))
        gradient = jax.grad(f)(inputs, jnp.array(True))
    assert np.isfinite(gradient.x).all()


def test_no_deviation_is_written_out():
    """Sizes of x that the compiled step accesses: 10 on the CPU, and 2 in a further pass.

    Were x - shift shared between two uses, XLA would write it out: 18.
    """
    shape = (32, 28, 28, 64)
    params, state = bnjax.bn_init(shape[-1])

    def step(x, dy, params):
        y, vjp, state_ = jax.vjp(
            lambda x, p: bnjax.bn_apply(p, state, x, True), x, params, has_aux=True
        )
        return y, vjp(dy), state_

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = jax.jit(step).lower(x, x, params).compile()
    size = 4 * np.prod(shape)
    assert compiled.cost_analysis()["bytes accessed"] < 12.1 * size
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * size
