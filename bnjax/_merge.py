"""Merging: the moments of a union, from those of its parts (Chan, Golub & LeVeque).

What devices, groups, microbatches and replicas have in common.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _moments, _placement, _reduce, _sums
from bnjax._moments import BatchMoments
from bnjax._reduce import Reduction
from bnjax._types import Moments


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
    means, variances, counts = (
        jnp.stack([jnp.broadcast_to(v, *shapes) for v in values])
        for values in zip(*parts, strict=True)
    )
    return union(BatchMoments(means, jnp.zeros_like(means), variances, counts)).plain()


def union(parts: BatchMoments) -> BatchMoments:
    """Moments of the union of parts along the first axis; counts may be any weights."""
    # A part without entries may hold anything, also for the derivative.
    some = parts.count > 0
    shift, offset, var = (jnp.where(some, v, 0) for v in parts[:3])
    count = parts.count.sum(0)
    share = parts.count / _reduce.spread(jnp.where(count == 0, 1, count), (0,))
    # Without influence on the result beyond rounding, hence without derivative.
    mean = lax.stop_gradient((share * (shift + offset)).sum(0))
    near, _ = _sums.split(mean, mean, bits_less=1)
    apart = shift - _reduce.spread(near, (0,)) + offset
    rest = (share * apart).sum(0)
    apart = apart - _reduce.spread(rest, (0,))
    return BatchMoments(near, rest, (share * (var + apart * apart)).sum(0), count)


def with_batch(part: BatchMoments, batch: BatchMoments) -> BatchMoments:
    """The moments so far, and those of one more microbatch; in the dtype of the former."""
    dtype = part.shift.dtype
    shift = batch.shift.astype(dtype)
    offset = batch.offset + (batch.shift - shift.astype(batch.shift.dtype))
    count = _placement.broadcast(batch.count, batch.var)
    new = BatchMoments(shift, offset.astype(dtype), batch.var.astype(dtype), count.astype(dtype))
    return union(BatchMoments(*map(jnp.stack, zip(part, new, strict=True))))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def merge_over(r: Reduction, parts: BatchMoments, near: jax.Array) -> BatchMoments:
    """Moments of the union of parts along array axes, and over the devices of mapped axes.

    In one all-reduce, as sums about `near`, a guess of the mean without influence on the
    result beyond rounding; another about the mean found, only where the guess was far off.
    """
    near = _reduce.shared(r, parts.offset, _reduce.finite_or_zero(near))
    a_pass = functools.partial(_pass, r, parts)
    return _moments.refined(a_pass, a_pass(near, None))


@merge_over.defjvp
def _merge_over_jvp(
    r: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[BatchMoments, BatchMoments]:
    """dmean = sum(s_i dmean_i), dvar = sum(s_i (dvar_i + 2 (mean_i - mean) dmean_i)).

    The shares are s_i = n_i / n.
    """
    parts, near = primals
    d = tangents[0]
    out = merge_over(r, parts, near)
    share = parts.count / _reduce.spread(_reduce.at_least_one(out.count, out.var.dtype), r.axes)
    apart = _apart(r, parts, out.shift) - _reduce.spread(out.offset, r.axes)
    of_mean = d.shift + d.offset
    sums = [share * of_mean, share * (d.var + 2 * apart * of_mean)]
    dmean, dvar = _reduce.psum(r, [_reduce.sum_over(v, r) for v in sums])
    zero = jnp.zeros_like(dmean)
    return out, BatchMoments(dmean, zero, dvar, zero)


def _apart(r: Reduction, parts: BatchMoments, mean: jax.Array) -> jax.Array:
    """mean_i - mean: first the difference of what is large."""
    return parts.shift - _reduce.spread(mean, r.axes) + parts.offset


def _pass(
    r: Reduction, parts: BatchMoments, near: jax.Array, known: jax.Array | None
) -> BatchMoments:
    apart = _apart(r, parts, near)
    sums = [parts.count * apart, parts.count * (parts.var + apart * apart)]
    sums += [parts.count] if known is None else []
    total, square, *count = _reduce.psum(r, [_reduce.sum_over(v, r) for v in sums])
    whole = count[0] if known is None else known
    n = _reduce.at_least_one(whole, total.dtype)
    offset = total / n
    var = square / n - offset * offset
    return BatchMoments(near, offset, jnp.maximum(var, 0), whole)
