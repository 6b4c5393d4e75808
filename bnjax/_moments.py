"""Moments of a batch, of a mask, across devices; merging; the only collectives.

One pass over the data takes the sums of x and x*x. Where a channel's mean is
large beside its deviation their difference cancels; then, and only then, a
second pass takes the sums of x - shift and (x - shift)**2, where the shift is the
mean as one pass gives it. The mean of x - shift, the offset, is what that lost:
shift + offset is the mean to about twice the precision.
"""

import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _checks

# One-pass variances err by about (1 + mean**2/var) roundings. At a mean of three
# deviations that measured at most a quarter of the bound in tests/tolerances.py.
_WELL_CONDITIONED = 9.0


class Moments(NamedTuple):
    """Mean, biased variance and number of the entries they were taken over.

    mean = sum(x) / count, var = sum((x - mean)**2) / count. `mean` and `var`
    have the shape of the feature axes, [C]; `count` broadcasts to it. All are
    floating, of one dtype: promote(x.dtype, float32).
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


class Reduction(NamedTuple):
    """What is reduced: axes of the array, then mapped axes. Static, hashable."""

    axes: tuple[int, ...]
    axis_name: Any = None
    axis_index_groups: Any = None


class BatchMoments(NamedTuple):
    """Moments with the mean in two parts, shift + offset."""

    shift: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array


def reduction(axes: tuple[int, ...], axis_name: Any, axis_index_groups: Any) -> Reduction:
    """A `Reduction` from what a caller gave: lists become tuples."""
    _checks.names(axis_name, axis_index_groups)
    groups = axis_index_groups
    if groups is not None:
        groups = tuple(tuple(group) for group in groups)
    return Reduction(axes, axis_name, groups)


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
    result = batch_moments(reduction(axes, axis_name, axis_index_groups), x, mask)
    count = jnp.broadcast_to(result.count, result.var.shape)
    return Moments(result.shift + result.offset, result.var, count)


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
      ValueError: no parts, or parts of different shapes.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.arange(6.0).reshape(6, 1)
      >>> m = bnjax.merge(bnjax.moments(x[:1]), bnjax.moments(x[1:]))
      >>> print(m.mean, m.var, m.count)
      [2.5] [2.9166667] [6.]

    Source: Chan, Golub & LeVeque (1983), "Algorithms for computing the sample
    variance".
    """
    if not parts:
        raise ValueError("`merge` needs at least one `Moments`, got none.")
    shapes = {jnp.shape(leaf) for part in parts for leaf in (part.mean, part.var)}
    if len(shapes) > 1:
        raise ValueError(f"`merge` needs parts of one shape, got {sorted(shapes)}.")
    return functools.reduce(_merge_two, parts)


def _merge_two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    delta = b.mean - a.mean
    mean = a.mean + share * delta
    var = a.var + share * (b.var - a.var) + share * (1 - share) * delta * delta
    # A part without entries may hold anything, so it is not even added.
    empty_a, empty_b = a.count == 0, b.count == 0
    mean = jnp.where(empty_b, a.mean, jnp.where(empty_a, b.mean, mean))
    var = jnp.where(empty_b, a.var, jnp.where(empty_a, b.var, var))
    return Moments(mean, var, count)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def batch_moments(r: Reduction, x: jax.Array, mask: jax.Array | None) -> BatchMoments:
    """The one implementation of moments; `moments` is its public face."""
    dtype = _checks.compute_dtype(x.dtype)
    first, second = (_kept(_up(x), mask) for _ in range(2))
    # Two reductions of plain operands: each takes XLA's fast path on the CPU.
    sums = [_sum(first, r), _sum(second * second, r)]
    count, (total, square) = _synchronise(r, x.shape, mask, sums)
    n = at_least_one(count, dtype)
    mean = total / n
    shift = _rounded(mean)
    var = jnp.maximum(square / n - mean * mean, 0)
    # Written so that NaN and overflow count as ill-conditioned.
    ill = jnp.any(~(mean * mean <= _WELL_CONDITIONED * var))
    offset, var = lax.cond(
        ill,
        lambda x, mask, shift, one_pass: _second_pass(r, x, mask, shift, n),
        lambda x, mask, shift, one_pass: one_pass,
        *(x, mask, shift, (mean - shift, var)),
    )
    return BatchMoments(shift, offset, var, jnp.asarray(count, dtype))


@batch_moments.defjvp
def _batch_moments_jvp(
    r: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[BatchMoments, BatchMoments]:
    x, mask = primals
    out = batch_moments(r, x, mask)
    tangent = jax.checkpoint(functools.partial(_moments_tangent, r), prevent_cse=False)
    return out, tangent(x, mask, out, tangents[0])


def _moments_tangent(
    r: Reduction, x: jax.Array, mask: jax.Array | None, m: BatchMoments, dx: jax.Array
) -> BatchMoments:
    dx = _up(dx)
    return centred_tangent(r, x, mask, m, dx, recentre(r, dx, mask, m))[0]


def centred_tangent(
    r: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    m: BatchMoments,
    dx: jax.Array,
    centred: jax.Array,
) -> tuple[BatchMoments, jax.Array]:
    """dmean = mean(dx), dvar = 2 * mean((x - mean) * centred), and mean(centred)."""
    dx, centred = _kept(dx, mask), _kept(centred, mask)
    n = at_least_one(m.count, dx.dtype)
    # A barrier of its own: otherwise XLA shares x - shift with the forward pass
    # and writes it out in float32.
    shift = spread(lax.optimization_barrier(m.shift), r.axes)
    deviation = _kept(_up(x) - shift, mask)
    sums = [_sum(dx, r), _sum(centred, r), _sum(deviation * centred, r)]
    dmean, residue, product = (total / n for total in _psum(r, sums))
    dvar = 2 * (product - m.offset * residue)
    # The mean's two parts have one tangent; the count has none.
    tangent = BatchMoments(dmean, jnp.zeros_like(dmean), dvar, jnp.zeros_like(m.count))
    return tangent, residue


def recentre(
    r: Reduction,
    dx: jax.Array,
    mask: jax.Array | None,
    m: BatchMoments,
    where: bool | jax.Array = True,
) -> jax.Array:
    """dx - mean(dx), nearly, in the channels `where`; its transpose is the identity.

    Forward mode needs centred tangents: where `dx` has a large mean, as along
    dx = x, sums and differences of it cancel. But subtracting any c per channel
    changes nothing in the layer's tangent, as only dx - dmean enters, and as
    deviations from the mean sum to zero. So what flows back into c is zero in
    exact arithmetic: left out, it saves the backward pass a sum over the array.

    `custom_linear_solve`, here of the identity, is the one public way to give a
    linear map a transpose of its own that works under vmap and to second order.
    """
    n = at_least_one(m.count, dx.dtype)

    def solve(_: Any, dx: jax.Array) -> jax.Array:
        (total,) = _psum(r, [_sum(_kept(dx, mask), r)])
        return dx - spread(jnp.where(where, _rounded(total / n), 0), r.axes)

    return lax.custom_linear_solve(
        lambda v: v, dx, solve=solve, transpose_solve=lambda _, ct: ct
    )


def _second_pass(
    r: Reduction, x: jax.Array, mask: jax.Array | None, shift: jax.Array, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The mean of x - shift, and the variance about the mean."""
    deviation = _kept(_up(x) - spread(shift, r.axes), mask)
    sums = [_sum(deviation, r), _sum(deviation * deviation, r)]
    total, square = _psum(r, sums)
    offset = total / n
    return offset, jnp.maximum(square / n - offset * offset, 0)


def _synchronise(
    r: Reduction, shape: tuple[int, ...], mask: jax.Array | None, sums: list[jax.Array]
) -> tuple[Any, list[jax.Array]]:
    """Count and sums over all devices, in one all-reduce. A static count is an int."""
    if mask is None:
        local = math.prod(shape[a] for a in r.axes)
        return local * group_size(r), _psum(r, sums)
    kept = _mask_count(r, shape, mask, sums[0].dtype)
    *sums, count = _psum(r, [*sums, jnp.broadcast_to(kept, sums[0].shape)])
    return count, sums


def _mask_count(r: Reduction, shape: tuple[int, ...], mask: jax.Array, dtype: Any) -> jax.Array:
    features = [a for a in range(len(shape)) if a not in r.axes]
    repeats = math.prod(shape[a] for a in r.axes if mask.shape[a] == 1)
    kept = jnp.sum(mask, r.axes, dtype=dtype) * repeats
    return jnp.broadcast_to(kept, tuple(shape[a] for a in features))


def group_size(r: Reduction) -> int:
    """Number of devices that are reduced together, static."""
    if r.axis_name is None:
        return 1
    return _collective(r, 1)


def _psum(r: Reduction, sums: list[jax.Array]) -> list[jax.Array]:
    if r.axis_name is None:
        return sums
    stacked = _collective(r, jnp.stack(sums))
    return [stacked[i] for i in range(len(sums))]


def _collective(r: Reduction, value: Any) -> Any:
    try:
        return lax.psum(value, r.axis_name, axis_index_groups=r.axis_index_groups)
    except NameError as error:
        raise ValueError(
            f"`axis_name` must name an axis mapped by pmap, vmap or shard_map around "
            f"the call, got {r.axis_name!r}, which is not mapped here. Fix: "
            f"jax.vmap(f, axis_name={r.axis_name!r}), or axis_name=None under jit, "
            "where a sharded batch needs no name."
        ) from error
    except NotImplementedError as error:
        if r.axis_index_groups is None:
            raise
        raise NotImplementedError(
            "`axis_index_groups` must be None here: JAX has no groups under vmap and "
            f"under shard_map with check_vma, got {r.axis_index_groups}. Fix: split "
            f"the axis {r.axis_name!r} in two mapped axes (a mesh of two axes, or two "
            "vmaps) and give `axis_name` the inner one."
        ) from error


def at_least_one(count: Any, dtype: Any) -> jax.Array:
    """The divisor of a mean, safe for channels without entries."""
    return jnp.maximum(jnp.asarray(count, dtype), 1)


def _rounded(mean: jax.Array) -> jax.Array:
    """The mean less one bit, so that every use of it sees the same number.

    A compiler may evaluate x - total / n with one rounding, in some uses and not
    in others: at a mean of 1e4 deviations they then differ by 5e-4 deviations.
    """
    info = jnp.finfo(mean.dtype)
    return lax.reduce_precision(mean, info.nexp, info.nmant - 1)


def spread(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A vector per channel, with axes of size 1 where `x` is reduced."""
    return lax.expand_dims(v, axes)


def _up(x: jax.Array) -> jax.Array:
    return x.astype(_checks.compute_dtype(x.dtype))


def _kept(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, 0)


def _sum(x: jax.Array, r: Reduction) -> jax.Array:
    return jnp.sum(x, r.axes)
