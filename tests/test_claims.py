"""What is claimed of batch normalization and follows from its formula: float64, to rounding.

The numbers of the claims are those of notebooks/1_batch_norm.ipynb. References are NumPy:
tests/reference.py and, for the backward pass, the paper's equations one by one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tolerances import assert_close, unit, values

import bnjax

RNG = np.random.default_rng(0)
U, W, B = RNG.normal(size=(32, 16)), RNG.normal(size=(16, 6)), RNG.normal(0, 3, 6)
DY = RNG.normal(size=(32, 6))
SCALE, BIAS = RNG.normal(size=(2, 6))
EPSILONS = [0.0, 1e-5, 1.0]
close = functools.partial(assert_close, dtype=np.float64, n=32)

pytestmark = pytest.mark.usefixtures("x64")


@functools.partial(jax.jit, static_argnums=6)
def apply(x, scale, bias, mean, var, epsilon, train=True):
    """y alone."""
    state = bnjax.BNState(mean, var, jnp.zeros(mean.shape, jnp.int32))
    params = bnjax.BNParams(scale, bias)
    return bnjax.bn_apply(params, state, x, train, epsilon=epsilon)[0]


def layer(x, epsilon, scale=SCALE, bias=BIAS):
    """In training, where the running statistics are of no effect."""
    unused = jnp.full(x.shape[-1], 7.0)
    return apply(x, scale, bias, unused, unused, epsilon)


def expected(x, epsilon, dy=DY, scale=SCALE, bias=BIAS):
    """The reference's y and its derivatives."""
    inputs = reference.Inputs(x, scale, bias, 7.0, 7.0, epsilon)
    return reference.forward(inputs).y, reference.backward(inputs, (dy, 0, 0))


@pytest.mark.parametrize("a", [2.0**-10, 0.3, 1e3, -3.0])
def test_claim_2_the_scale_of_the_weights_cancels(a):
    y, pull = jax.vjp(lambda u, w: layer(u @ w, 0.0), U, a * W)
    du, dw = pull(jnp.asarray(DY))
    sign = np.sign(a)  # the root is positive, so that a negative factor flips normalized x
    wanted, d = expected(U @ W, 0.0, scale=sign * SCALE)
    close((y, du, a * dw), (wanted, d.x @ W.T, U.T @ d.x))


@pytest.mark.parametrize("a", [0.01, 30.0])
@pytest.mark.parametrize("epsilon", EPSILONS[1:])
def test_claim_2_epsilon_is_divided_by_the_square(a, epsilon):
    close(layer(U @ (a * W), epsilon), expected(U @ W, epsilon / a**2)[0])
    assert np.abs(layer(U @ (a * W), epsilon) - layer(U @ W, epsilon)).max() > 1e-7


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_claim_3_a_bias_before_it_is_useless(epsilon):
    y, pull = jax.vjp(lambda b: layer(U @ W + b[None], epsilon), B)
    close(y, expected(U @ W, epsilon)[0])
    # Terms that cancel: each is rounded, at most at the size of the bias in deviations.
    x = U @ W + B
    terms = np.abs(DY * SCALE).sum(0) / np.sqrt(x.var(0) + epsilon)
    (db,) = pull(jnp.asarray(DY))
    assert np.all(np.abs(db) <= values(np.float64, 32) * terms * (1 + np.abs(B) / x.std(0)))


def test_claim_3_with_running_statistics_it_is_not():
    mean, var = jnp.asarray(B), jnp.asarray(B**2)
    y, pull = jax.vjp(lambda b: apply(U @ W + b[None], SCALE, BIAS, mean, var, 1e-5, False), B)
    close(y, (U @ W) / np.sqrt(B**2 + 1e-5) * SCALE + BIAS)
    close(pull(jnp.asarray(DY))[0], (DY * SCALE).sum(0) / np.sqrt(B**2 + 1e-5))


@pytest.mark.parametrize("epsilon", [*EPSILONS, 1e3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_claim_4_the_input_is_given_back(epsilon, size):
    x = size * (U @ W + B)
    scale, bias = np.sqrt(x.var(0) + epsilon), x.mean(0)
    unused = np.full(6, 7.0)
    y = apply(x, scale, bias, unused, unused, epsilon)
    close(y, x)
    other = apply(2 * x, scale, bias, bias, x.var(0), epsilon, False)  # evaluation: of any batch
    close(other, 2 * x)


# By hand: mean 5, variance 4; averages of dy and dy * y are 1 and 2; dx = (dy - 1 - 2 y) / 2.
EIGHT = np.array([2.0, 4, 4, 4, 5, 5, 7, 9])[:, None]
Y_EIGHT = np.array([-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2])[:, None]
DY_EIGHT = np.array([0.0, 0, 0, 0, 0, 0, 0, 8])[:, None]
DX_EIGHT = np.array([1.0, 0, 0, 0, -0.5, -0.5, -1.5, 1.5])[:, None]


def test_claim_21_a_batch_of_eight_by_hand():
    y, pull = jax.vjp(lambda *a: layer(a[0], 0.0, *a[1:]), EIGHT, np.ones(1), np.zeros(1))
    dx, dscale, dbias = pull(jnp.asarray(DY_EIGHT))
    np.testing.assert_array_equal(y, Y_EIGHT)
    np.testing.assert_array_equal(dx, DX_EIGHT)
    assert (dscale[0], dbias[0]) == (16, 8)


def paper(x, scale, epsilon, dy):
    """Ioffe & Szegedy (2015), section 3, in its order; m entries of a channel in the batch."""
    over, m = tuple(range(x.ndim - 1)), x[..., 0].size
    mean, var = x.mean(over), x.var(over)
    normal = (x - mean) / np.sqrt(var + epsilon)
    dnormal = dy * scale
    dvar = (dnormal * (x - mean)).sum(over) * -0.5 * (var + epsilon) ** -1.5
    dmean = -dnormal.sum(over) / np.sqrt(var + epsilon) + dvar * (-2 * (x - mean)).sum(over) / m
    dx = dnormal / np.sqrt(var + epsilon) + dvar * 2 * (x - mean) / m + dmean / m
    return dnormal, dvar, dmean, dx, (dy * normal).sum(over), dy.sum(over)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("shape", [(8, 6), (5, 4, 3, 6)], ids=str)
def test_claim_21_the_papers_equations_one_by_one(shape, epsilon):
    x, dy = RNG.normal(3.0, 2.0, (2, *shape))
    over = tuple(range(x.ndim - 1))
    dx, dscale, dbias = jax.vjp(lambda *a: layer(a[0], epsilon, *a[1:]), x, SCALE, BIAS)[1](dy)

    def evaluated(x, mean, var):
        return apply(x, SCALE, BIAS, mean, var, epsilon, False)

    # In evaluation mean and variance are inputs; with 0 and 1 - epsilon, x is the normalized one.
    _, dmean, dvar = jax.vjp(evaluated, x, x.mean(over), x.var(over))[1](dy)
    dnormal, _, _ = jax.vjp(evaluated, x, np.zeros(6), np.full(6, 1 - epsilon))[1](dy)
    close(
        (dnormal, dvar, dmean, dx, dscale, dbias), paper(x, SCALE, epsilon, dy), n=dy[..., 0].size
    )


# Symmetric, so that the mean is exactly 0; DZ changes neither the mean nor the variance.
HALF = RNG.normal(size=(16, 1))
Z, DZ = (np.concatenate([HALF, sign * HALF]) for sign in (-1, 1))
Z /= np.sqrt((Z**2).mean())
DZ -= DZ.mean()
VAR = np.array([0.0, 1e-30, 1e-12, 1e-5, 1e-3, 1.0, 1e3])
ONE, ZERO = np.ones(VAR.size), np.zeros(VAR.size)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-5, 1e-3])
def test_claim_19_deviation_and_gain(epsilon):
    y, pull = jax.vjp(lambda x: layer(x, epsilon, ONE, ZERO), Z * np.sqrt(VAR))
    close(y, Z * np.sqrt(VAR / (VAR + epsilon)))
    (gain,) = pull(jnp.asarray(DZ * ONE))
    close(gain, DZ / np.sqrt(VAR + epsilon))
    assert np.abs(gain).max() <= (1 + 64 * unit(np.float64)) * np.abs(DZ).max() / epsilon**0.5


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
def test_claim_19_a_constant_channel(constant, epsilon):
    x = np.full((32, 6), constant)
    y, pull = jax.vjp(lambda x: layer(x, epsilon), x)
    np.testing.assert_array_equal(y, np.broadcast_to(BIAS, x.shape))
    close(pull(jnp.asarray(DY))[0], (DY - DY.mean(0)) * SCALE / np.sqrt(epsilon))
    assert np.isnan(layer(x, 0.0)).all()  # 0 / 0


def test_claim_19_training_is_bounded_and_evaluation_is_not():
    x = np.zeros((32, VAR.size))
    x[0] = 1e3  # one entry differs: the largest normalized value that n entries can have
    close(layer(x, 0.0, ONE, ZERO)[0], np.full(VAR.size, 31**0.5))
    y = apply(x, ONE, ZERO, ZERO, VAR, 1e-5, False)
    close(y[0], 1e3 / np.sqrt(VAR + 1e-5))


def test_claim_19_another_epsilon_in_evaluation_is_silent():
    x, moments = Z * np.sqrt(VAR), (ZERO, VAR)
    large, small = (np.asarray(apply(x, ONE, ZERO, *moments, e, False)) for e in (1e-3, 1e-5))
    close(small, large * np.sqrt((VAR + 1e-3) / (VAR + 1e-5)))


def by_hand(x, epsilon):
    """Epsilon added to the deviation, not to the variance."""
    return (x - x.mean(0, keepdims=True)) / (jnp.sqrt(x.var(0, keepdims=True)) + epsilon)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3, 0.1])
def test_claim_26_epsilon_added_to_the_deviation(epsilon):
    x = Z * np.sqrt(VAR)
    ratio = np.sqrt(VAR + epsilon) / (np.sqrt(VAR) + epsilon)
    close(by_hand(x, epsilon), np.asarray(layer(x, epsilon, ONE, ZERO)) * ratio)
    assert ratio.max() > 2 and ratio.min() < 1
    # The two are the same at one deviation only: (1 - epsilon) / 2.
    x = Z * (1 - epsilon) / 2
    close(by_hand(x, epsilon), layer(x, epsilon, np.ones(1), np.zeros(1)))


def test_claim_26_the_derivative_at_variance_zero():
    x = np.full((32, 6), 0.5)
    dx = jax.vjp(lambda x: by_hand(x, 1e-5), x)[1](jnp.asarray(DY))[0]
    assert np.isnan(dx).all()
    dx = jax.vjp(lambda x: layer(x, 1e-5), x)[1](jnp.asarray(DY))[0]
    assert np.isfinite(dx).all()
