"""Mesh axes of explicit sharding: vectors go where the channels of `x` are.

There, JAX refuses to choose between arrays, and to carry arrays through a loop, that are
placed differently. Everywhere else nothing here does anything.
"""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def as_features(tree: Tree, x: jax.Array, axes: tuple[int, ...]) -> Tree:
    """Vectors per channel, as the channels of `x` are: all but `axes`; scalars on its mesh."""
    spec = _spec(x)
    if spec is None:
        return tree
    features = _features(spec, axes)
    # Scalars, as JAX wants what enters loops and checkpoints under vmap over a mesh axis.
    return jax.tree.map(lambda v: _place(v, x, features if v.ndim else ()), tree)


def as_entries(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """An array that broadcasts to `x`, as the entries of `x` are."""
    spec = _spec(x)
    if spec is None or mask is None:
        return mask
    return _place(mask, x, tuple(None if mask.shape[a] == 1 else spec[a] for a in range(x.ndim)))


def as_given(tree: Tree, given: Tree) -> Tree:
    """Arrays as others of the same shapes are."""

    def place(new: jax.Array, old: jax.Array) -> jax.Array:
        spec = _spec(old)
        return new if spec is None else _place(new, old, spec)

    return jax.tree.map(place, tree, given)


def broadcast(value: jax.Array, like: jax.Array) -> jax.Array:
    """The value in the shape of another array, and placed as it is."""
    return as_given(jnp.broadcast_to(value, like.shape), like)


def shards(x: jax.Array, axis: int) -> int:
    """How many devices share an axis of an array, on a mesh of explicit axes; 1 elsewhere."""
    spec = _spec(x)
    names = () if spec is None or spec[axis] is None else spec[axis]
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[n] for n in (names if isinstance(names, tuple) else (names,)))


def cut(x: jax.Array, axis: int, number: int, size: int) -> jax.Array:
    """The array with an axis cut in two, of `number` groups of `size` entries."""
    shape = (*x.shape[:axis], number, size, *x.shape[axis + 1 :])
    spec = _spec(x)
    if spec is None:
        return lax.reshape(x, shape)
    return lax.reshape(
        x, shape, out_sharding=_sharding(x, (*spec[: axis + 1], None, *spec[axis + 1 :]))
    )


def repeated(
    v: jax.Array, axis: int, number: int, x: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """A vector so many times along a new axis, placed as the features of `x` are: all but `axes`.

    At once, since what is placed afterwards is gathered when it is transposed.
    """
    shape = (*v.shape[:axis], number, *v.shape[axis:])
    kept = tuple(a for a in range(len(shape)) if a != axis)
    spec = _spec(x)
    features = None if spec is None else _sharding(x, _features(spec, axes))
    return lax.broadcast_in_dim(v, shape, kept, out_sharding=features)


def join(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """The inverse of `cut`; placed as another array is."""
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    spec = _spec(like)
    return lax.reshape(x, shape, out_sharding=None if spec is None else _sharding(like, spec))


def _features(spec: tuple[Any, ...], axes: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(entry for a, entry in enumerate(spec) if a not in axes)


def _spec(x: jax.Array) -> tuple[Any, ...] | None:
    """Mesh axes of each axis of `x`; None where no mesh axis is explicit."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))


def _place(v: jax.Array, x: jax.Array, spec: tuple[Any, ...]) -> jax.Array:
    sharding = _sharding(x, spec)
    return v if jax.typeof(v).sharding == sharding else jax.sharding.reshard(v, sharding)


def _sharding(x: jax.Array, spec: tuple[Any, ...]) -> NamedSharding:
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
