"""Covariances of groups of channels.

Where channels are cut into groups, arrays of entries have two feature axes, [groups, g];
vectors are [groups, g], matrices [groups, g, g]. The covariance is taken as the variance is
in `_moments`: one pass of sums about a shift near the mean, another where that was far off.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bnjax import _merge, _moments, _placement, _reduce, _sums
from bnjax._moments import BatchMoments
from bnjax._reduce import Reduction

# Accelerators multiply matrices in bfloat16 or TF32 unless told otherwise.
EXACT = lax.Precision.HIGHEST


class Groups(NamedTuple):
    """How channels fall into groups: the feature axes, in order, become two."""

    axes: tuple[int, ...]  # of the features
    number: int
    size: int

    def cut(self, x: jax.Array) -> jax.Array:
        """x, or a mask, with its feature axes cut, at the place of the first."""
        first = self.axes[0]
        if len(self.axes) > 1:
            sizes = tuple(x.shape[a] for a in self.axes)
            x = lax.transpose(x, self._order(x.ndim))
            rest = x.shape[first + len(sizes) :]
            x = lax.reshape(x, (*x.shape[:first], math.prod(sizes), *rest))
        if x.shape[first] != self.number * self.size:  # one for all: a mask
            return jnp.expand_dims(x, first)
        return _placement.cut(x, first, self.number, self.size)

    def cut_mask(self, mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
        """The mask of an array that is cut: one for all channels, or one for each."""
        if mask is None:
            return None
        if any(mask.shape[a] > 1 for a in self.axes):
            sizes = (x.shape[a] if a in self.axes else s for a, s in enumerate(mask.shape))
            mask = jnp.broadcast_to(mask, tuple(sizes))
        return self.cut(mask)

    def join(self, y: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of `cut`, in the shape of another array."""
        if len(self.axes) == 1:
            return _placement.join(y, self.axes[0], like)
        order = self._order(like.ndim)
        y = lax.reshape(y, tuple(like.shape[a] for a in order))
        return lax.transpose(y, tuple(order.index(a) for a in range(like.ndim)))

    def vectors(self) -> "Groups":
        """For vectors per channel, which have the feature axes only."""
        return self._replace(axes=tuple(range(len(self.axes))))

    def reduced(self, rank: int) -> tuple[int, ...]:
        """The axes that are reduced, once an array of this rank is cut."""
        first = self.axes[0]
        return tuple(a for a in range(rank - len(self.axes) + 2) if a not in (first, first + 1))

    def _order(self, rank: int) -> tuple[int, ...]:
        """Axes with those of the features together, at the place of the first."""
        rest = [a for a in range(rank) if a not in self.axes]
        return (*rest[: self.axes[0]], *self.axes, *rest[self.axes[0] :])


def groups(rank: int, reduced: tuple[int, ...], cov: tuple[int, ...]) -> Groups:
    """Those of an array, of which these axes are reduced, by the shape of its covariances."""
    return Groups(tuple(a for a in range(rank) if a not in reduced), *cov[:2])


class Covariances(NamedTuple):
    """Moments of groups, with the mean in two parts, shift + offset; `var` is cov's diagonal."""

    shift: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose
    cov: jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def covariances(r: Reduction, x: jax.Array, mask: jax.Array | None, near: jax.Array) -> Covariances:
    """cov = sum((x - mean) (x - mean)^T) / n of each group; `near` guesses the mean."""
    near = _reduce.shared(r, x, _reduce.finite_or_zero(near))
    a_pass: Any = functools.partial(_reduce.compiled(_pass, r.axis_name is not None), r, x, mask)
    found: Any = _moments.refined(a_pass, a_pass(near, None))
    return found


@covariances.defjvp
def _covariances_jvp(
    r: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Covariances, Covariances]:
    x, mask, near = primals
    out = covariances(r, x, mask, near)

    def tangent(x: jax.Array, mask: Any, m: Covariances, dx: jax.Array) -> Covariances:
        dx = _reduce.promoted(dx)
        return centred_tangent(r, x, mask, m, dx, _moments.recentre(r, dx, mask))[0]

    return out, jax.checkpoint(tangent, prevent_cse=False)(x, mask, out, tangents[0])


def _pass(
    r: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    near: jax.Array,
    known: jax.Array | None = None,
) -> Covariances:
    shift, _ = _sums.split(near, near, bits_less=1)
    apart = _reduce.deviation(r, x, mask, shift)
    vectors = [_reduce.sum_over(apart, r)]
    if known is None and mask is not None:
        own = r._replace(axis_name=None, axis_index_groups=None)
        vectors.append(_reduce.synchronise(own, x.shape, mask, vectors)[0])
    square, (total, *count) = _summed(r, _gram(r, apart, apart), vectors)
    if known is None:
        known = count[0] if count else jnp.asarray(_reduce.static_count(r, x.shape), total.dtype)
        known = _placement.broadcast(known, total)
    n = _reduce.at_least_one(known, total.dtype)
    offset = total / n
    cov = square / n[..., None] - offset[..., None] * offset[..., None, :]
    var = lax.max(diagonal(cov), lax.full_like(offset, 0))
    return Covariances(shift, offset, var, known, with_diagonal(cov, var))


def centred_tangent(
    r: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    m: Covariances,
    dx: jax.Array,
    centred: jax.Array,
) -> tuple[Covariances, jax.Array]:
    """dmean = mean(dx), dcov = S + S^T, S = mean((x - mean) centred^T); and mean(centred)."""
    dx, centred = _reduce.kept(dx, mask), _reduce.kept(centred, mask)
    n = _reduce.at_least_one(m.count, dx.dtype)
    shift, offset = _sums.split(m.shift, m.offset, bits_less=2)
    deviation = _reduce.deviation(r, x, mask, shift)
    vectors = [_reduce.sum_over(dx, r), _reduce.sum_over(centred, r)]
    product, vectors = _summed(r, _gram(r, deviation, centred), vectors)
    dmean, residue = (v / n for v in vectors)
    product = product / n[..., None] - offset[..., None] * residue[..., None, :]
    dcov = product + transposed(product)
    zero = lax.full_like(dmean, 0)
    return Covariances(dmean, zero, diagonal(dcov), lax.full_like(m.count, 0), dcov), residue


def _summed(
    r: Reduction, matrices: jax.Array, vectors: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """Sums over all devices, in one all-reduce."""
    if r.axis_name is None:
        return matrices, vectors
    (packed,) = _reduce.psum(r, [pack(matrices, vectors)])
    return unpack(packed)


def pack(matrices: jax.Array, vectors: list[jax.Array]) -> jax.Array:
    """Matrices with vectors as further columns."""
    return lax.concatenate([matrices, *(v[..., None] for v in vectors)], 2)


def unpack(packed: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """The inverse of `pack`."""
    g = packed.shape[1]
    columns = [lax.index_in_dim(packed, i, 2, keepdims=False) for i in range(g, packed.shape[2])]
    return lax.slice_in_dim(packed, 0, g, axis=2), columns


def _gram(r: Reduction, a: jax.Array, b: jax.Array) -> jax.Array:
    """sum(a b^T) over the entries of a device."""
    group = next(i for i in range(a.ndim) if i not in r.axes)
    sharding = _matrices_sharding(a, group)
    numbers = ((r.axes, r.axes), ((group,), (group,)))
    return lax.dot_general(a, b, numbers, precision=EXACT, out_sharding=sharding)


def _matrices_sharding(x: jax.Array, group: int) -> NamedSharding | None:
    """Of one matrix a group, where a mesh of explicit axes has to be told."""
    given = jax.typeof(x).sharding
    if AxisType.Explicit not in given.mesh.axis_types:
        return None
    return NamedSharding(given.mesh, PartitionSpec(given.spec[group], None, None))


def transposed(matrices: jax.Array) -> jax.Array:
    return lax.transpose(matrices, (0, 2, 1))


def diagonal(matrices: jax.Array) -> jax.Array:
    return lax.reduce_sum(_on_diagonal(matrices, matrices), axes=(2,))


def with_diagonal(matrices: jax.Array, vectors: jax.Array) -> jax.Array:
    """The matrices, with these vectors as their diagonals."""
    return _on_diagonal(matrices, _placement.broadcast(vectors[..., None], matrices), matrices)


def _on_diagonal(like: jax.Array, inside: jax.Array, outside: jax.Array | None = None) -> jax.Array:
    g = like.shape[-1]
    eye = _placement.broadcast(jnp.eye(g, dtype=bool)[None], like)
    return lax.select(eye, inside, lax.full_like(like, 0) if outside is None else outside)


def merged(parts: BatchMoments, cov: jax.Array) -> jax.Array:
    """sum(s_i (cov_i + a_i a_i^T)), a_i = mean_i - mean, s_i = n_i / n: cov of the union.

    Of parts along the first axis, whose channels are [*features], and cov rows of g channels,
    [*features, g], where features may be several layers in a stack. A part without entries may
    hold anything.
    """
    whole = _merge.union(parts)
    size = cov.shape[-1]
    some = parts.count > 0
    share = parts.count / jnp.maximum(whole.count, 1e-38)[None]
    apart = parts.shift - whole.shift[None] + parts.offset - whole.offset[None]
    one = jnp.where(some, apart, 0)
    other = one.reshape(*one.shape[:1], -1, 1, size)
    other = jnp.broadcast_to(other, (*other.shape[:2], size, size)).reshape(cov.shape)
    square = jnp.where(some[..., None], cov, 0) + one[..., None] * other
    return (share[..., None] * square).sum(0)


def with_batch(
    part: BatchMoments, cov: jax.Array, batch: BatchMoments, of_batch: jax.Array
) -> jax.Array:
    """`merged`, of what was seen so far and one more batch; in the dtype of the former."""
    batch = batch._replace(count=_placement.broadcast(batch.count, batch.var))
    parts = [jnp.stack([v, new.astype(v.dtype)]) for v, new in zip(part, batch, strict=True)]
    return merged(BatchMoments(*parts), jnp.stack([cov, of_batch.astype(cov.dtype)]))
