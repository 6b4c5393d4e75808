"""Moments of a batch, of a mask, across devices; merging.

One pass over the data takes the sums of x - shift and (x - shift)**2, with a shift
per channel that is near the mean: the running mean in training, 0 for `moments`.
The mean of x - shift is the offset, and mean = shift + offset is the mean to about
twice the precision. Where the offset is large beside the deviation the variance
cancels; then, and only then, another pass is made, with the mean just found.
"""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _checks, _placement, _reduce
from bnjax._reduce import Reduction

# A variance errs by about (1 + offset**2/var) roundings. At an offset of three
# deviations that measured at most a third of the bound in tests/tolerances.py.
_WELL_CONDITIONED = 9.0
# One to come back from a shift that is of no use, one about the mean then found.
_MORE_PASSES = 2


class Moments(NamedTuple):
    """Mean, biased variance and number of the entries they were taken over.

    mean = sum(x) / count, var = sum((x - mean)**2) / count. `mean` and `var`
    have the shape of the feature axes, [C]; `count` broadcasts to it. All are
    floating, of one dtype: promote(x.dtype, float32).
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose


class BatchMoments(NamedTuple):
    """Moments with the mean in two parts, shift + offset."""

    shift: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose


def moments(
    x: jax.Array,
    *,
    axis: int | tuple[int, ...] = -1,
    mask: jax.Array | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
) -> Moments:
    """Mean and biased variance per channel, accurate at any mean.

    mean = sum(x) / n and var = sum((x - mean)**2) / n, over all axes but the
    feature axes, over the entries where `mask` is True, and over all devices of
    `axis_name`. One pass over `x` where that is accurate, two otherwise.
    Differentiable in every mode.

    Args:
      x: floating array of any shape.
      axis: feature axis or axes; the others are reduced.
      mask: booleans of the rank of `x` that broadcast to it; False entries
        count nowhere, whatever they hold. None: all count.
      axis_name: mapped axis or axes (pmap, vmap, shard_map) to reduce over too.
      axis_index_groups: groups of indices of `axis_name` that are reduced apart.

    Returns:
      `Moments(mean, var, count)` with the sizes of the feature axes, in
      promote(x.dtype, float32). A channel without entries has mean 0, var 0.

    Raises:
      TypeError, ValueError: wrong dtype, axis or mask; an unbound `axis_name`.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.array([[1.0, 10001.0], [3.0, 10003.0]])
      >>> m = bnjax.moments(x)
      >>> print(m.mean, m.var, m.count)
      [2.0000e+00 1.0002e+04] [1. 1.] [2. 2.]

    Source: Ioffe & Szegedy (2015), Algorithm 1.
    """
    x = _checks.float_array("x", x)
    feature_axes = _checks.feature_axes(axis, x.shape)
    mask = _checks.mask(mask, x.shape)
    axes = tuple(a for a in range(x.ndim) if a not in feature_axes)
    r = _reduce.reduction(axes, axis_name, axis_index_groups)
    return _reduce.compiled(_about_zero, axis_name is not None)(r, x, mask)


def _about_zero(r: Reduction, x: jax.Array, mask: jax.Array | None) -> Moments:
    near = lax.full(
        [s for a, s in enumerate(x.shape) if a not in r.axes], 0, _checks.compute_dtype(x.dtype)
    )
    near = _placement.as_features(near, x, r.axes)
    m = batch_moments(r, x, _placement.as_entries(mask, x), near)
    return Moments(m.shift + m.offset, m.var, _placement.broadcast(m.count, m.var))


def merge(*parts: Moments) -> Moments:
    """Moments of the union of disjoint parts.

    n = sum(n_i), mean = sum(n_i * mean_i) / n,
    var = sum(n_i * (var_i + (mean_i - mean)**2)) / n: the variance of the means
    counts too. Parts without entries (count 0) change nothing.

    Args:
      *parts: one or more `Moments` of equal shapes, of batches, microbatches,
        devices or files.

    Returns:
      `Moments`, in the dtype of the parts.

    Raises:
      ValueError: no parts, or parts of different shapes. TypeError: other types.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
      >>> m = bnjax.merge(bnjax.moments(x[:2]), bnjax.moments(x[2:]))
      >>> print(m.mean, m.var, m.count)
      [4.] [5.] [4.]

    Source: Chan, Golub & LeVeque (1983), "Algorithms for computing the sample
    variance".
    """
    if not parts:
        raise ValueError("`merge` needs at least one `Moments`, got none.")
    for part in parts:
        if not isinstance(part, Moments):
            raise TypeError(
                f"`merge` takes Moments, got {type(part).__name__}. Fix: merge(*parts), of "
                "what moments(x) returns."
            )
    shapes = {jnp.shape(leaf) for part in parts for leaf in (part.mean, part.var)}
    if len(shapes) > 1:
        raise ValueError(f"`merge` needs parts of one shape, got {sorted(shapes)}.")
    return functools.reduce(_merge_two, parts)


def _merge_two(a: Moments, b: Moments) -> Moments:
    # A part without entries may hold anything, also for the derivative.
    a, b = _without_garbage(a, b), _without_garbage(b, a)
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    delta = b.mean - a.mean
    mean = a.mean + share * delta
    var = a.var + share * (b.var - a.var) + share * (1 - share) * delta * delta
    return Moments(mean, var, count)


def _without_garbage(part: Moments, other: Moments) -> Moments:
    """The part; where it has no entries, with the moments of the other."""
    empty = part.count == 0
    return Moments(
        jnp.where(empty, other.mean, part.mean), jnp.where(empty, other.var, part.var), part.count
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def batch_moments(
    r: Reduction, x: jax.Array, mask: jax.Array | None, near: jax.Array
) -> BatchMoments:
    """The one implementation of moments; `moments` is its public face.

    `near` guesses the mean, as the running mean does. It saves a pass, and has no
    influence on the result beyond rounding, hence no derivative.
    """
    near = _reduce.where(lax.is_finite(near), near, 0)
    # The same function twice: traced once.
    a_pass = _reduce.compiled(_pass, r.axis_name is not None)

    def more(carry: tuple[jax.Array, BatchMoments]) -> jax.Array:
        i, m = carry
        # Written so that NaN and overflow count as ill-conditioned; in lax, since to
        # trace the operators of jnp takes several times as long.
        enough = lax.full_like(m.var, _WELL_CONDITIONED) * m.var
        ill = lax.bitwise_not(lax.le(m.offset * m.offset, enough))
        any_ill = lax.reduce_or(ill, axes=tuple(range(ill.ndim)))
        return lax.bitwise_and(lax.lt(i, jnp.int32(_MORE_PASSES)), any_ill)

    def again(carry: tuple[jax.Array, BatchMoments]) -> tuple[jax.Array, BatchMoments]:
        i, m = carry
        mean = m.shift + m.offset
        # From a shift a thousand times the mean little but rounding is left of it.
        limit = lax.full_like(mean, 1024) * lax.abs(mean)
        sound = lax.bitwise_and(lax.is_finite(mean), lax.le(lax.abs(m.shift), limit))
        return i + 1, a_pass(r, x, mask, _reduce.where(sound, mean, 0))

    first = a_pass(r, x, mask, _reduce.shared(r, x, near))
    return lax.while_loop(more, again, (jnp.int32(0), first))[1]


@batch_moments.defjvp
def _batch_moments_jvp(
    r: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[BatchMoments, BatchMoments]:
    x, mask, near = primals
    out = batch_moments(r, x, mask, near)
    tangent = jax.checkpoint(functools.partial(_moments_tangent, r), prevent_cse=False)
    return out, tangent(x, mask, out, tangents[0])


def _pass(r: Reduction, x: jax.Array, mask: jax.Array | None, near: jax.Array) -> BatchMoments:
    """Moments from the sums of x - shift and (x - shift)**2, for a shift near `near`."""
    shift, _ = split(near, near, bits_less=1)
    first = _reduce.deviation(r, x, mask, shift)
    other, ahead = split(near, shift - near, bits_less=2)
    second = _reduce.deviation(r, x, mask, other)
    sums = [_reduce.sum_over(first, r), _reduce.sum_over(second * second, r)]
    count, (total, square) = _reduce.synchronise(r, x.shape, mask, sums)
    n = _reduce.at_least_one(count, total.dtype)
    offset = total / n
    apart = offset + ahead
    var = square / n - apart * apart
    var = lax.max(var, lax.full_like(var, 0))
    return BatchMoments(shift, offset, var, jnp.asarray(count, total.dtype))


def _moments_tangent(
    r: Reduction, x: jax.Array, mask: jax.Array | None, m: BatchMoments, dx: jax.Array
) -> BatchMoments:
    dx = _reduce.promoted(dx)
    return centred_tangent(r, x, mask, m, dx, recentre(r, dx, mask))[0]


def centred_tangent(
    r: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    m: BatchMoments,
    dx: jax.Array,
    centred: jax.Array,
) -> tuple[BatchMoments, jax.Array]:
    """dmean = mean(dx), dvar = 2 * mean((x - mean) * centred), and mean(centred)."""
    dx, centred = _reduce.kept(dx, mask), _reduce.kept(centred, mask)
    n = _reduce.at_least_one(m.count, dx.dtype)
    shift, offset = split(m.shift, m.offset, bits_less=2)
    deviation = _reduce.deviation(r, x, mask, shift)
    sums = [
        _reduce.sum_over(dx, r),
        _reduce.sum_over(centred, r),
        _reduce.sum_over(deviation * centred, r),
    ]
    dmean, residue, product = (total / n for total in _reduce.psum(r, sums))
    dvar = 2 * (product - offset * residue)
    # The mean's two parts have one tangent; the count has none.
    tangent = BatchMoments(dmean, lax.full_like(dmean, 0), dvar, lax.full_like(m.count, 0))
    return tangent, residue


def recentre(r: Reduction, dx: jax.Array, mask: jax.Array | None) -> jax.Array:
    """dx - c per channel, nearly mean(dx), whose transpose is taken as the identity.

    Forward mode needs centred tangents: where `dx` has a large mean, as along
    dx = x, sums and differences of it cancel. But subtracting any c per channel
    changes nothing in the layer's tangent, as only dx - dmean enters, and as
    deviations from the mean sum to zero. So what flows back into c is zero in
    exact arithmetic: left out, it saves the backward pass a sum over the array.

    `custom_linear_solve`, here of the identity, is the one public way to give a
    linear map a transpose of its own that works under vmap and to second order. It
    loses track of how arrays vary that it closes over, so with a mask under
    shard_map's check_vma c is 0: the same tangent, less accurate forward.
    """
    if mask is not None and _reduce.varying((dx, mask)):
        return dx

    def solve(_: Any, dx: jax.Array) -> jax.Array:
        sums = [_reduce.sum_over(_reduce.kept(dx, mask), r)]
        n, (total,) = _reduce.synchronise(r, dx.shape, mask, sums)
        c, _ = split(total / _reduce.at_least_one(n, total.dtype), total, bits_less=1)
        return dx - _reduce.spread(c, r.axes)

    return lax.custom_linear_solve(lambda v: v, dx, solve=solve, transpose_solve=lambda _, ct: ct)


def split(mean: jax.Array, rest: jax.Array, bits_less: int) -> tuple[jax.Array, jax.Array]:
    """(shift, offset) with shift + offset = mean + rest; the shift has a few bits less.

    What is subtracted from `x` must be the same number in every use. A compiler may
    evaluate x - total / n with one rounding, in some uses and not in others: at a
    mean of 1e4 deviations they then differ by 5e-4 deviations. A shift of explicit
    precision is one number. And uses with shifts of their own share no x - shift,
    which XLA would write out in float32, to be read in the next sum or pass.
    """
    info = jnp.finfo(mean.dtype)
    shift = lax.reduce_precision(mean, info.nexp, info.nmant - bits_less)
    return shift, rest + (mean - shift)
