"""The sums that a pass over the data takes, and the shifts they are about.

Of x - shift and of its square, everywhere. Which shift, and how the sums are written, depends on
the size of the array, and on CPUs on what running statistics say: there it decides on their time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _placement, _reduce
from bnjax._reduce import Reduction

# A variance errs by about (1 + offset**2/var) roundings. At an offset of three
# deviations that measured at most a third of the bound in tests/tolerances.py.
WELL_CONDITIONED = 9.0
# About the middle of two of n entries the offset is at most sqrt(n / 2 - 1) deviations: for few,
# 32 roundings at most.
_FEW = 64
# Sizes of arrays: below the first it costs less to write x - shift out than to make it anew for
# each sum, and from the second on it pays to branch between two kinds of sums.
_SMALL, _LARGE = 1 << 15, 1 << 16

Sums = tuple[jax.Array, jax.Array, list[jax.Array]]


def about(
    r: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    near: jax.Array,
    spread: jax.Array | None,
) -> Sums:
    """Two shifts near `near`, the sum of x - shift, and that of (x - other)**2.

    `spread`: a guess of the variance. Where 0 is by it a shift as good, it is taken on CPUs,
    whose sums of x and x**2 take half the time.
    """
    if _is_small(x):
        # What lies between entries is made without rounding that a compiler could leave out.
        bits = 0 if are_few(r, x, mask) else 1
        return _shifted(r, (bits, bits), x, mask, near)
    on_cpu = functools.partial(_shifted, r, (1, 2))
    if spread is not None and _is_large(x):
        on_cpu = functools.partial(_about_zero_or_shifted, r)
    default = functools.partial(_shifted, r, (1, 1))
    found: Sums = lax.platform_dependent(x, mask, near, spread, cpu=on_cpu, default=default)
    return found


def _shifted(
    r: Reduction,
    bits_less: tuple[int, int],
    x: jax.Array,
    mask: jax.Array | None,
    near: jax.Array,
    _: jax.Array | None = None,
) -> Sums:
    """About `near`, with so many bits less in either sum.

    Where they differ, the sums share no x - shift, which XLA's CPU backend would write out.
    """
    made = {bits: split(near, near, bits)[0] if bits else near for bits in bits_less}
    shift, other = (made[bits] for bits in bits_less)
    return shift, other, _shifted_sums(r, x, mask, shift, other)


def _shifted_sums(
    r: Reduction, x: jax.Array, mask: jax.Array | None, shift: jax.Array, other: jax.Array
) -> list[jax.Array]:
    first = second = _reduce.deviation(r, x, mask, shift)
    if other is not shift:
        second = _reduce.deviation(r, x, mask, other)
    return [_reduce.sum_over(first, r), _reduce.sum_over(lax.mul(second, second), r)]


def _about_zero_or_shifted(
    r: Reduction, x: jax.Array, mask: jax.Array | None, near: jax.Array, spread: jax.Array
) -> Sums:
    """About 0 where no channel is ill-conditioned there.

    Under `vmap` over running statistics both kinds of sums are taken, and one is chosen.
    """
    bound = lax.mul(spread, np.asarray(WELL_CONDITIONED, spread.dtype))
    at_zero = lax.reduce_and(lax.le(lax.mul(near, near), bound), axes=tuple(range(near.ndim)))
    near = _reduce.where(lax.bitwise_not(at_zero), near, 0)
    shift, other = (split(near, near, bits_less=bits)[0] for bits in (1, 2))

    def plain(x: jax.Array, mask: jax.Array | None, *shifts: jax.Array) -> list[jax.Array]:
        once = _reduce.apart(x)
        uses = once, _reduce.apart(once)
        first, second = (_reduce.kept(_reduce.promoted(v), mask) for v in uses)
        sums = [_reduce.sum_over(first, r), _reduce.sum_over(lax.mul(second, second), r)]
        # Shifts may vary over mesh axes where x does not, and then so do the other sums.
        return [_reduce.vary(total, _reduce.varying(shifts)) for total in sums]

    shifted = functools.partial(_shifted_sums, r)
    return shift, other, lax.cond(at_zero, plain, shifted, x, mask, shift, other)


def are_few(r: Reduction, x: jax.Array, mask: jax.Array | None) -> bool:
    """Whether two entries give a shift as good as the mean, and are at hand."""
    if mask is not None or r.axis_name is not None or not r.axes:
        return False
    if any(_placement.shards(x, a) > 1 for a in r.axes):
        return False
    count = _reduce.static_count(r, x.shape)
    return isinstance(count, int) and 0 < count < _FEW


def between_entries(r: Reduction, x: jax.Array) -> jax.Array:
    """Halfway between two neighbours: at half the square distance of the worse of them.

    Halves are exact, so that all uses see the same bits however they are compiled.
    """
    widest = max(r.axes, key=lambda a: x.shape[a])

    def half(place: int) -> jax.Array:
        entry = x
        for axis in r.axes:
            start = min(place, x.shape[axis] - 1) if axis == widest else 0
            entry = lax.slice_in_dim(entry, start, start + 1, axis=axis)
        entry = _reduce.promoted(lax.squeeze(entry, r.axes))
        return lax.mul(entry, np.asarray(0.5, entry.dtype))

    return lax.add(half(0), half(1))


def _is_large(x: jax.Array) -> bool:
    return isinstance(x.size, int) and x.size >= _LARGE


def _is_small(x: jax.Array) -> bool:
    return isinstance(x.size, int) and x.size < _SMALL


def another(
    x: jax.Array, shift: jax.Array, offset: jax.Array, bits_less: int
) -> tuple[jax.Array, jax.Array]:
    """A shift for another use of `x`, and its offset: the same for a small array."""
    return (shift, offset) if _is_small(x) else split(shift, offset, bits_less)


def once_per_channel(x: jax.Array, v: jax.Array, var: jax.Array) -> jax.Array:
    """`v`, whose cotangent XLA's CPU backend makes once, not for each entry of a small `x`.

    It does so with quotients, and makes those by constants products. So this divides by what is
    always 1, and XLA does not know it. A narrow `x` gains nothing by it.
    """
    if not _is_small(x) or x.dtype != v.dtype:
        return v
    return lax.div(v, lax.max(lax.sign(var), lax.full_like(var, 1)))


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
    return shift, lax.add(rest, lax.sub(mean, shift))
