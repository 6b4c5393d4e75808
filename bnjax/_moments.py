"""Moments of a batch, of a mask, across devices.

One pass over the data takes the sums of x - shift and (x - shift)**2, with a shift
per channel that is near the mean: the running mean in training, 0 for `moments`, or
what `_sums` knows to be as good.
The mean of x - shift is the offset, and mean = shift + offset is the mean to about
twice the precision. Where the offset is large beside the deviation the variance
cancels; then, and only then, another pass is made, with the mean just found. Where the
program may not branch, the shift is the mean of a part of the data.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _checks, _placement, _reduce, _sums
from bnjax._reduce import Reduction
from bnjax._types import Moments

# One to come back from a shift that is of no use, one about the mean then found.
_MORE_PASSES = 2


class BatchMoments(NamedTuple):
    """Moments with the mean in two parts, shift + offset."""

    shift: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose

    def plain(self) -> Moments:
        return Moments(lax.add(self.shift, self.offset), self.var, self.count)


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
    return m.plain()._replace(count=_placement.broadcast(m.count, m.var))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def batch_moments(
    r: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    near: jax.Array,
    spread: jax.Array | None = None,
) -> BatchMoments:
    """The one implementation of moments; `moments` is its public face.

    `near` guesses the mean, as the running mean does, and `spread` the variance. They save
    time, and have no influence on the result beyond rounding, hence no derivative.
    """
    if _sums.are_few(r, x, mask):
        return _pass(r, x, None, _sums.between_entries(r, x))
    near = _reduce.finite_or_zero(near)
    # The same function twice: traced once.
    a_pass = functools.partial(_reduce.compiled(_pass, r.axis_name is not None), r)
    if r.branches:
        near = _reduce.shared(r, x, near)
        if spread is not None:
            spread = _reduce.shared(r, x, spread)
        first = a_pass(x, mask, near, None, spread)
        return refined(functools.partial(a_pass, x, mask), first)
    sample = _sample(r, x) if mask is None else x
    m = a_pass(sample, mask, lax.full_like(near, 0))
    return a_pass(x, mask, _reduce.finite_or_zero(lax.add(m.shift, m.offset)))


def refined(
    a_pass: Callable[[jax.Array, jax.Array | None], BatchMoments], first: BatchMoments
) -> BatchMoments:
    """The first pass; again about the mean it found, where that was far from its shift.

    Further passes are given the count, which takes no collective a second time.
    """

    def more(carry: tuple[jax.Array, BatchMoments]) -> jax.Array:
        i, m = carry
        # Written so that NaN and overflow count as ill-conditioned; in lax, since to
        # trace the operators of jnp takes several times as long.
        enough = lax.mul(m.var, np.asarray(_sums.WELL_CONDITIONED, m.var.dtype))
        ill = lax.bitwise_not(lax.le(lax.mul(m.offset, m.offset), enough))
        any_ill = lax.reduce_or(ill, axes=tuple(range(ill.ndim)))
        return lax.bitwise_and(lax.lt(i, np.int32(_MORE_PASSES)), any_ill)

    def again(carry: tuple[jax.Array, BatchMoments]) -> tuple[jax.Array, BatchMoments]:
        i, m = carry
        mean = lax.add(m.shift, m.offset)
        # From a shift a thousand times the mean little but rounding is left of it.
        limit = lax.mul(lax.abs(mean), np.asarray(1024, mean.dtype))
        sound = lax.bitwise_and(lax.is_finite(mean), lax.le(lax.abs(m.shift), limit))
        return lax.add(i, np.int32(1)), a_pass(_reduce.where(sound, mean, 0), m.count)

    steps = _placement.as_features(jnp.int32(0), first.shift, ())
    return lax.while_loop(more, again, (steps, first))[1]


def _sample(r: Reduction, x: jax.Array) -> jax.Array:
    """A contiguous eighth of `x`, at least.

    If m is the mean of a fraction f of the entries, (mean - m)**2 <= var * (1 - f) / f, as the
    variance holds that of the means of both parts: about m no variance cancels, whatever `x`.
    """
    axis = max(r.axes, key=lambda a: x.shape[a])
    return lax.slice_in_dim(x, 0, -(-x.shape[axis] // 8), axis=axis)


@batch_moments.defjvp
def _batch_moments_jvp(
    r: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[BatchMoments, BatchMoments]:
    x, mask, near, *spread = primals
    out = batch_moments(r, x, mask, near, *spread)
    tangent = jax.checkpoint(functools.partial(_moments_tangent, r), prevent_cse=False)
    return out, tangent(x, mask, out, tangents[0])


def _pass(
    r: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    near: jax.Array,
    known: jax.Array | None = None,
    spread: jax.Array | None = None,
) -> BatchMoments:
    """Moments from the sums of x - shift and (x - shift)**2, for a shift near `near`.

    `known`: the count, if it is. `spread`: a guess of the variance.
    """
    shift, other, sums = _sums.about(r, x, mask, near, spread)
    count, (total, square) = _reduce.synchronise(r, x.shape, mask, sums, known)
    share = _reduce.share(count, total.dtype)
    offset = lax.mul(total, share)
    away = offset if other is shift else lax.add(offset, lax.sub(shift, other))
    var = lax.sub(lax.mul(square, share), lax.mul(away, away))
    var = lax.max(var, np.asarray(0, var.dtype))
    count = _placement.as_features(jnp.asarray(count, total.dtype), total, ())
    return BatchMoments(shift, offset, var, count)


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
    share = _reduce.share(m.count, dx.dtype)
    shift, offset = _sums.another(x, m.shift, m.offset, bits_less=2)
    deviation = _reduce.deviation(r, x, mask, shift)
    sums = [
        _reduce.sum_over(dx, r),
        _reduce.sum_over(centred, r),
        _reduce.sum_over(lax.mul(deviation, centred), r),
    ]
    total, residue, product = _reduce.psum(r, sums)
    residue = _sums.once_per_channel(x, residue, m.var)
    twice = lax.mul(share, np.asarray(2, share.dtype))
    dvar = lax.mul(lax.sub(product, lax.mul(offset, residue)), twice)
    dmean, residue = lax.mul(total, share), lax.mul(residue, share)
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
        c, _ = _sums.split(total / _reduce.at_least_one(n, total.dtype), total, bits_less=1)
        return lax.sub(dx, _reduce.spread(c, r.axes))

    return lax.custom_linear_solve(lambda v: v, dx, solve=solve, transpose_solve=lambda _, ct: ct)
