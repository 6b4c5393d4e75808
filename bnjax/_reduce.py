"""Sums over array axes and over devices: the only collectives."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _checks, _placement


class Reduction(NamedTuple):
    """What is reduced: axes of the array, then mapped axes. Static, hashable.

    `branches`: whether the program may branch on values, which those of arrays that jit has
    sharded take a collective to decide.
    """

    axes: tuple[int, ...]
    axis_name: Any = None
    axis_index_groups: Any = None
    branches: bool = True


def reduction(axes: tuple[int, ...], axis_name: Any, axis_index_groups: Any) -> Reduction:
    """A `Reduction` from what a caller gave: lists become tuples."""
    _checks.names(axis_name, axis_index_groups)
    groups = axis_index_groups
    if groups is not None:
        groups = tuple(tuple(group) for group in groups)
    return Reduction(axes, axis_name, groups)


def compiled(function: Callable[..., Any], mapped: bool) -> Callable[..., Any]:
    """The function as one program, for calls outside of jit; its first argument is static.

    Not over mapped axes: they imply tracing, and errors of collectives come while it lasts.
    """
    return function if mapped else _jitted(function)


@functools.cache
def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    jitted = jax.jit(function, static_argnums=0)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        # Derivatives are traced with the empty mesh where calls have none, and JAX's caches
        # tell the two apart: without this all is traced twice.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return jitted(*args)

    return call


def synchronise(
    r: Reduction,
    shape: tuple[int, ...],
    mask: jax.Array | None,
    sums: list[jax.Array],
    known: jax.Array | None = None,
) -> tuple[Any, list[jax.Array]]:
    """Count, unless it is known, and sums over all devices, in one all-reduce.

    A static count is an int.
    """
    if mask is None:
        return static_count(r, shape), psum(r, sums)
    if known is not None:
        return known, psum(r, sums)
    kept = _mask_count(r, shape, mask, sums[0].dtype)
    *sums, count = psum(r, [*sums, _placement.broadcast(kept, sums[0])])
    return count, sums


def static_count(r: Reduction, shape: tuple[int, ...]) -> int:
    """Entries per channel over all devices, without a mask."""
    local = math.prod(shape[a] for a in r.axes)
    return local if r.axis_name is None else local * _collective(r, 1)


def _mask_count(r: Reduction, shape: tuple[int, ...], mask: jax.Array, dtype: Any) -> jax.Array:
    repeats = math.prod(shape[a] for a in r.axes if mask.shape[a] == 1)
    return jnp.sum(mask, r.axes, dtype=dtype) * repeats


def psum(r: Reduction, sums: list[jax.Array]) -> list[jax.Array]:
    """The sums over all devices, in one all-reduce."""
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


def sum_over(x: jax.Array, r: Reduction) -> jax.Array:
    """Over the axes of one device."""
    return lax.reduce_sum(x, axes=r.axes)


def kept(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """0 where masked, whatever was there."""
    return x if mask is None else jnp.where(mask, x, 0)


def promoted(x: jax.Array) -> jax.Array:
    """In promote(x.dtype, float32)."""
    return x.astype(_checks.compute_dtype(x.dtype))


def deviation(r: Reduction, x: jax.Array, mask: jax.Array | None, shift: jax.Array) -> jax.Array:
    """x - shift, promoted, 0 where masked."""
    return kept(lax.sub(promoted(apart(x, shift)), spread(shift, r.axes)), mask)


def apart(x: jax.Array, *others: jax.Array, on: tuple[str, ...] = ("cpu",)) -> jax.Array:
    """`x`, for one use that shares no upcast with another; `others` tell the uses apart.

    XLA's CPU backend reads a narrow array in a sum as fast as a wide one, but writes an upcast
    that two sums share out in full, and takes that of a loop out of the loop.
    """
    if x.dtype == _checks.compute_dtype(x.dtype):
        return x
    barriers = dict.fromkeys(on, _behind_barrier)
    return lax.platform_dependent(x, *others, **barriers, default=_first)


def _behind_barrier(*arrays: jax.Array) -> jax.Array:
    first: jax.Array = lax.optimization_barrier(arrays)[0]
    return first


def _first(x: jax.Array, *_: jax.Array) -> jax.Array:
    return x


def shared(r: Reduction, x: jax.Array, v: jax.Array) -> jax.Array:
    """`v` where it is surely the same on all devices of the mapped axes, else 0.

    Under pmap, vmap and shard_map without check_vma nothing tells. It varies as sums of `x` do
    then, as loops demand.
    """
    if r.axis_name is None:
        return vary(v, varying(x))
    names = frozenset(r.axis_name if isinstance(r.axis_name, tuple) else (r.axis_name,))
    same = names <= varying(x) and not names & varying(v)
    return vary(v if same else jnp.zeros_like(v), varying(x) - names)


def at_least_one(count: Any, dtype: Any) -> Any:
    """The divisor of a mean, safe for channels without entries."""
    if isinstance(count, int):
        return jnp.asarray(max(count, 1), dtype)
    return lax.max(count, lax.full_like(count, 1))


def share(count: Any, dtype: Any) -> Any:
    """1 / count, the weight of an entry in a mean; of a static count it is a constant."""
    if isinstance(count, int):
        return np.asarray(1 / max(count, 1), dtype)
    return 1 / at_least_one(count, dtype)


def where(condition: jax.Array, new: jax.Array, old: jax.Array | float) -> jax.Array:
    """`jnp.where` for vectors of one shape and dtype, traced in a tenth of its time."""
    return lax.select(condition, new, old if hasattr(old, "shape") else lax.full_like(new, old))


def finite_or_zero(v: jax.Array) -> jax.Array:
    return where(lax.is_finite(v), v, 0)


def spread(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A vector per channel, with axes of size 1 where `x` is reduced."""
    return lax.expand_dims(v, axes)


def varying(tree: Any) -> frozenset[Any]:
    """Mesh axes over which arrays differ, as shard_map's check_vma tracks them."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
    # The attribute is `vma` in some versions of jax, `manual_axis_type.varying` in others.
    tracked = [getattr(t, "manual_axis_type", None) for t in types]
    return frozenset[Any]().union(
        *(t.vma if m is None else m.varying for t, m in zip(types, tracked, strict=True))
    )


def vary(v: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """The array as one that differs over these mesh axes too."""
    missing = axes - varying(v)
    return lax.pcast(v, tuple(sorted(missing)), to="varying") if missing else v
