"""The one place for tolerances: from the dtype and from the length of the reduction.

Rounding errors of sums grow with the square root of their length. Comparisons of
arrays are normwise: the largest error beside the largest entry expected.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Directions in which the truth is small: errors are compared with what a plain
# centred two-pass formulation makes of the same numbers.
TIMES_TWO_PASS = 3.0
TWO_PASS_FLOOR = 4e-6


def unit(dtype) -> float:
    """Half the spacing of numbers at 1: 6e-8 for float32."""
    return float(jnp.finfo(dtype).eps) / 2


def variance(dtype, n: int, mean: float = 0.0) -> float:
    """Relative error of a variance of n entries at a mean of so many deviations.

    For float32 1e-5 + 4 u sqrt(n) up to a mean of 1e3 and 1e-4 at 1e4.
    """
    u = unit(dtype)
    if mean > 1e3:
        return 1e-4 * (u / unit(jnp.float32))
    return 1e-5 * (u / unit(jnp.float32)) + 4 * u * n**0.5


def mean(dtype, n: int) -> float:
    """Error of a mean of n entries, beside the largest of them."""
    return unit(dtype) * (4 + n**0.5)


def values(dtype, n: int) -> float:
    """Normwise error of outputs and derivatives, of reductions of length n, in the
    dtype that they are computed in."""
    return unit(dtype) * (32 + 8 * n**0.5)


def two_pass(error: float) -> float:
    """What bnjax may err where the centred two-pass formulation errs by `error`."""
    return max(TIMES_TWO_PASS * error, TWO_PASS_FLOOR)


def error(actual, expected, scale=None) -> float:
    """The largest error, beside the largest entry expected or `scale`."""
    actual, expected = (np.asarray(v, np.float64) for v in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.size == 0:
        return 0.0
    if scale is None:
        scale = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / (scale or 1.0))


def assert_close(actual, expected, dtype, n: int, rounded_to=None, scale=None) -> None:
    """Trees agree normwise, each leaf at `values(dtype, n)`.

    `rounded_to`: the dtype that results are stored in, where that is a narrower one.
    """
    bound = values(dtype, n) + (0 if rounded_to is None else unit(rounded_to))
    leaves, tree = jax.tree.flatten_with_path(actual)
    others, other_tree = jax.tree.flatten(expected)
    assert len(leaves) == len(others), (tree, other_tree)
    for (path, leaf), other in zip(leaves, others, strict=True):
        found = error(leaf, other, scale)
        name = jax.tree_util.keystr(path)
        assert found <= bound, f"{name}: error {found:.2g}, bound {bound:.2g}"
