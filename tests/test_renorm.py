"""Batch renormalization: r and d, their limits, and all that bn_apply claims besides."""

import functools
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tolerances
from benchmark_scripts import results, ways
from flax import nnx
from messages import check_message

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import BNParams, BNState

N, C = ways.N, ways.C
RNG = np.random.default_rng(0)
# Batch means 3 and deviations 2 beside running ones on both sides of them, near and far.
MEAN = np.float32([3, 2.9, -20, 40, 2, 4.5])
VAR = np.float32([4, 3.6, 0.04, 400, 1.5, 9])
X = RNG.normal(3, 2, (N, C)).astype(np.float32)
W = RNG.normal(size=(N, C)).astype(np.float32)
PARAMS = BNParams(*RNG.uniform(0.5, 1.5, (2, C)).astype(np.float32))
STATE = BNState(MEAN, VAR, np.full(C, 7, np.int32))
MASK = RNG.random((N, C)) < 0.6
MASK[:, 1] = False  # a channel without entries
LIMITS = {
    "default": (3.0, 5.0),
    "narrow": (1.1, 0.2),
    "none": (np.inf, np.inf),
    "per channel": (np.linspace(1, 2, C, dtype="f"), np.linspace(1, 0, C, dtype="f")),
}
INPUTS = reference.Inputs(X, *PARAMS, *STATE[:2], 1e-5)


def limited(r_max, d_max=5.0, **options):
    return bnjax.renorm(r_max=r_max, d_max=d_max, **options)


def correction(inputs, r_max, d_max, mask=None, count=7):
    """r and d in float64, of real numbers: constants for the complex steps of the oracle."""
    x, mean, var = (np.real(v).astype(np.float64) for v in (inputs.x, inputs.mean, inputs.var))
    batch = reference.moments(x, mask=mask)
    sigma = np.sqrt(var + 1e-5)
    r = np.clip(np.sqrt(batch.var + 1e-5) / sigma, 1 / np.asarray(r_max), r_max)
    d = np.clip((batch.mean - mean) / sigma, -np.asarray(d_max), d_max)
    used = (batch.count > 0) & (np.asarray(count) > 0)
    return np.where(used, r, 1), np.where(used, d, 0)


def oracle(inputs, limits, *, mask=None, count=7, **options):
    """y and the new state in float64."""
    r, d = correction(inputs, *limits, mask, count)
    plain = inputs._replace(scale=None, bias=None)
    normal, *state = reference.forward(plain, mask=mask, count=count, **options)
    return (normal * r + d) * inputs.scale + inputs.bias, *state


def assert_bits(found, expected):
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("limits, masked", [*((name, True) for name in LIMITS), ("narrow", False)])
def test_values(limits, masked):
    mask = MASK if masked else None
    norm = limited(*LIMITS[limits], momentum=0.7, unbiased=True)
    y, new = norm.apply(PARAMS, STATE, X, True, mask=mask)
    expected = oracle(INPUTS, LIMITS[limits], mask=mask, momentum=0.7, unbiased=True)
    tolerances.assert_close((y, *new), expected, jnp.float32, N)


def test_without_scale_and_bias():
    y, _ = bnjax.renorm(r_max=1.1, d_max=0.2).apply(BNParams(None, None), STATE, X, True)
    expected = oracle(INPUTS._replace(scale=1.0, bias=0.0), (1.1, 0.2))[0]
    tolerances.assert_close(y, expected, jnp.float32, N)


def test_within_the_limits_it_is_inference():
    norm = bnjax.renorm(r_max=np.inf, d_max=np.inf)
    args = (PARAMS, STATE, X)
    tolerances.assert_close(norm.apply(*args, True)[0], norm.apply(*args, False)[0], jnp.float32, N)


@pytest.mark.parametrize(
    "params, dtype, mask",
    [
        (PARAMS, jnp.bfloat16, MASK),
        (BNParams(None, None), jnp.float32, None),
    ],
)
def test_without_correction_it_is_bn_apply(params, dtype, mask):
    """Bit for bit, derivatives included, and whatever the running statistics hold."""
    x = jnp.asarray(X, dtype)
    state = STATE._replace(mean=MEAN.copy(), var=VAR.copy())
    state.mean[2], state.var[3] = np.nan, np.inf

    @functools.partial(jax.jit, static_argnums=0)
    def both(apply, params, x):
        def loss(params, x):
            y, new = apply(params, state, x, True, mask=mask)
            return jnp.sum(W * y.astype(jnp.float32) ** 2), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    assert_bits(
        both(bnjax.renorm(r_max=1, d_max=0).apply, params, x), both(bnjax.bn_apply, params, x)
    )


def test_inference_is_bn_apply():
    norm, x = bnjax.renorm(), X.copy()
    x[0, 0] = np.nan
    assert_bits(norm.apply(PARAMS, STATE, x, False), bnjax.bn_apply(PARAMS, STATE, x, False))
    y, new = norm.apply(PARAMS, STATE, X[:0], True)
    assert y.shape == (0, C)
    assert_bits(new, STATE)


def test_statistics_that_are_none_correct_nothing():
    """Channels that were never trained, that are not finite, or whose deviation is 0."""
    count = np.int32([0, 7, 7, 7, 7, 0])
    state = BNState(MEAN.copy(), VAR.copy(), count)
    state.mean[1], state.var[2], state.mean[3], state.var[4] = np.nan, np.inf, -np.inf, 0
    y, _ = bnjax.renorm(epsilon=0.0).apply(PARAMS, state, X, True)
    plain, _ = bnjax.bn_apply(PARAMS, state, X, True, epsilon=0.0)
    assert_bits(y, plain)
    state.mean[1] = 3
    y, _ = bnjax.renorm(epsilon=0.0).apply(PARAMS, state, X, True)
    changed = (np.asarray(y) != np.asarray(plain)).any(0)
    np.testing.assert_array_equal(changed, [False, True, False, False, False, False])


@pytest.mark.parametrize("n", [1, 2])
def test_batches_of_one_and_two(n):
    """Of one example bn_apply makes y = bias; here it is as at inference, within the limits."""
    norm = bnjax.renorm(r_max=np.inf, d_max=5.0)
    y, new = norm.apply(PARAMS, STATE, X[:n], True)
    expected = oracle(INPUTS._replace(x=X[:n]), (np.inf, 5.0))
    tolerances.assert_close((y, *new), expected, jnp.float32, N)


def test_limits_may_be_traced_and_have_no_derivative():
    def f(r_max, d_max):
        return jnp.sum(W * bnjax.renorm(r_max=r_max, d_max=d_max).apply(PARAMS, STATE, X, True)[0])

    limits = (jnp.float32(1.1), jnp.full(C, 0.2))
    found, gradients = jax.jit(jax.value_and_grad(f, (0, 1)))(*limits)
    np.testing.assert_allclose(found, np.sum(W * oracle(INPUTS, (1.1, 0.2))[0]), rtol=1e-5)
    assert_bits(gradients, (0.0, np.zeros(C)))


def test_schedules_of_each_channel():
    r_max = optax.linear_schedule(1.0, 2.1, 10)  # which rounds to below 1 at 0
    d_max = optax.linear_schedule(0.0, 1.0, 10)
    state = STATE._replace(count=np.int32([0, 1, 5, 10, 11, 100]))
    opened = np.minimum(state.count / 10, 1)
    y, _ = bnjax.renorm(r_max=r_max, d_max=d_max).apply(PARAMS, state, X, True)
    expected = oracle(INPUTS, (1 + 1.1 * opened, opened))[0]
    tolerances.assert_close(y, expected, jnp.float32, N)


SCHEDULED = limited(
    optax.linear_schedule(1.0, 3.0, 3), optax.linear_schedule(0.0, 5.0, 3), momentum=0.5
)


@pytest.mark.parametrize("norm", [SCHEDULED, bnjax.renorm()])
def test_modules_are_the_function(norm):
    """Over several updates, by a count that they store."""
    assert norm.needs_count
    layer = bnjax.linen.BatchNorm(norm=norm)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    other = bnjax.nnx.BatchNorm(C, norm=norm, rngs=nnx.Rngs(0))
    params, state = norm.init(C)
    for x in (X, X + 1, 2 * X, -X):
        expected, state = norm.apply(params, state, jnp.asarray(x), True)
        y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **new}
        for found in (y, other(x)):
            np.testing.assert_array_equal(found, expected)
    for name in BNState._fields:
        np.testing.assert_array_equal(new["batch_stats"][name], getattr(state, name))
        np.testing.assert_array_equal(getattr(other, name)[...], getattr(state, name))


def keras_layer(limits, momentum, state):
    """Trained from given statistics; keras averages deviations, bnjax variances."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    r_max, d_max = limits
    layer = keras.layers.BatchNormalization(
        epsilon=1e-3,
        momentum=momentum,
        renorm=True,
        renorm_clipping={"rmax": r_max, "rmin": 1 / r_max, "dmax": d_max},
        renorm_momentum=momentum,
    )
    layer.build((None, C))
    sigma = np.sqrt(state.var + np.float32(1e-3))
    given = {
        "gamma": PARAMS.scale,
        "beta": PARAMS.bias,
        "moving_mean": state.mean,
        "moving_variance": state.var,
        "moving_stddev": sigma,
        "renorm_mean": state.mean,
        "renorm_stddev": sigma,
    }
    for name, value in given.items():
        getattr(layer, name).assign(value)
    return layer


def test_keras():
    """y, its gradients and the new mean, from the same statistics."""
    limits, momentum = (1.3, 1.0), 0.9  # some channels are at their limits
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        layer = keras_layer(limits, momentum, STATE)
        fixed = [v.value for v in layer.non_trainable_variables]

        @jax.jit
        def theirs(trained, x):
            def loss(trained, x):
                y, new = layer.stateless_call(trained, fixed, x, training=True)
                return jnp.sum(W * y**2), (y, new)

            return jax.grad(loss, (0, 1), has_aux=True)(trained, x)

        trained = [v.value for v in layer.trainable_variables]
        ((scale, bias), dx), (y, new) = theirs(trained, X)
    names = [v.name for v in layer.non_trainable_variables]
    new = dict(zip(names, new, strict=True))

    def ours(params, x):
        norm = limited(*limits, momentum=momentum, epsilon=1e-3)
        y, new = norm.apply(params, STATE, x, True)
        return jnp.sum(W * y**2), (y, new)

    (params, dx_ours), (y_ours, state) = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(PARAMS, X)
    found = (y_ours, dx_ours, *params, state.mean)
    tolerances.assert_close(found, (y, dx, scale, bias, new["moving_mean"]), jnp.float32, N)
    # The square of an average of deviations is less than the average of squares.
    assert (np.asarray(state.var) > np.asarray(new["moving_variance"])).all()


def bad_schedule(count):
    raise TypeError("no")


def apply_with(*limits):
    return lambda: limited(*limits).apply(PARAMS, STATE, X, True)


REFUSED = {
    "r_max": (lambda: bnjax.renorm(r_max=0.5), (ValueError, "r_max", "in [1, inf]", "0.5", "")),
    "d_max": (lambda: bnjax.renorm(d_max=-1), (ValueError, "d_max", "in [0, inf]", "-1", "")),
    "nan": (lambda: bnjax.renorm(r_max=np.nan), (ValueError, "r_max", "in [1, inf]", "nan", "")),
    "none": (lambda: bnjax.renorm(r_max=None), (TypeError, "r_max", "a real number", "None", "")),
    "shape": (
        apply_with(np.ones(2)), (ValueError, "r_max", "one entry per channel", "(2,)", "")),
    "option": (
        lambda: bnjax.renorm(rmax=3),
        (TypeError, "renorm", "options of `bn_apply`", "rmax", ""),
    ),
    "bound": (
        lambda: bnjax.renorm(momentum=0.5).apply(PARAMS, STATE, X, True, momentum=0.9),
        (TypeError, "momentum", "bound to 0.5 by renorm", "0.9", "in one place"),
    ),
    "schedule": (
        apply_with(bad_schedule),
        (TypeError, "r_max", "a schedule", "bad_schedule", "optax.linear_schedule(1.0, 3.0"),
    ),
    "range of a schedule": (
        apply_with(2, lambda count: -count),
        (ValueError, "d_max(state.count)", "in [0, inf]", "-7", ""),
    ),
    "shape of a schedule": (
        apply_with(lambda count: jnp.ones(4)),
        (ValueError, "r_max(state.count)", "one entry per channel", "(4,)", ""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    check_message(*REFUSED[name])


def test_jax_is_strict():
    """Strict promotion, no NaN on the way."""
    x = jnp.asarray(X, jnp.bfloat16)
    state = jax.tree.map(jnp.asarray, STATE._replace(count=np.int32([0, 1, 2, 3, 4, 5])))
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        f = jax.jit(lambda x: bnjax.renorm().apply(PARAMS, state, x, True, mask=MASK)[0])
        dx = jax.grad(lambda x: f(x).astype(jnp.float32).sum())(x)
    assert dx.dtype == jnp.bfloat16


def test_small_batches():
    """The experiment in short, and its table: better than bn_apply, above all by classes."""
    import small_batches

    # With bn_apply as with chance: 0.1.
    found = small_batches.accuracies("renorm()", small_batches.KINDS[1], steps=300, seeds=2)
    assert found.min() > 0.2, found
    table = {row["batches of 4"]: row for row in results.read("small-batches")[0]}
    assert list(table) == list(small_batches.WAYS)
    for kind in small_batches.KINDS:
        plain, corrected = (
            float(table[way][kind].partition("%")[0]) for way in ("bn_apply", "renorm()")
        )
        assert corrected > plain + 1
