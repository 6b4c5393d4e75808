"""Layers of Flax, linen and nnx: trees of variables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnjax import _checks
from bnjax._interop import common
from bnjax._interop.common import Layer

_PARAMS = ("scale", "bias")
_STATISTICS = ("mean", "var")
_COLLECTIONS = ("params", "batch_stats")


def names(variables: Any) -> list[str]:
    """Batch norms of a tree of variables."""
    return _source(variables).names()


def from_flax(
    variables: Mapping[str, Any],
    prefix: str = "",
    *,
    axis: int | tuple[int, ...] = -1,
    momentum: float | _checks.Schedule = 0.99,
    epsilon: float = 1e-5,
    unbiased: bool = False,
) -> Layer:
    """A batch norm of Flax, linen or nnx, or of bnjax's modules, from a tree of variables.

    The conventions are bnjax's: running = momentum * running + (1 - momentum) * batch.

    Args:
      variables: of linen, `{"params": ..., "batch_stats": ...}`, other collections
        are left aside; of nnx, a State or the nested mapping of its values.
        `mean` and `var`, [C], and where there are, `scale`, `bias` and `count`.
      prefix: path of the layer, as "Block_0/BatchNorm_0"; "" for its own variables.
      axis, momentum, epsilon, unbiased: of the layer; they are not in its variables.

    Returns:
      `Layer`, with copies of the arrays; count 0 where the tree has none.

    Raises:
      TypeError, ValueError: names that are missing or unknown, shapes that do not
      fit each other or `axis`, no `count` where momentum is a schedule.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bnjax import interop, linen
      >>> variables = linen.BatchNorm(False).init(jax.random.key(0), jnp.ones((4, 2)))
      >>> layer = interop.from_flax(variables, momentum=0.9)
      >>> print(layer.state.var, layer.options["momentum"])
      [1. 1.] 0.9

    Source: flax.linen.BatchNorm, flax.nnx.BatchNorm.
    """
    optional = (*_PARAMS, "count")
    found = common.entries(_source(variables), prefix, _STATISTICS, optional)
    if callable(momentum) and "count" not in found:
        raise ValueError(
            f"`count` must be in the variables for a schedule as `momentum`, got {sorted(found)}. "
            "Fix: add the number of updates that the statistics have seen, int32 of shape [C]."
        )
    weight = momentum if callable(momentum) else common.number("momentum", momentum)
    options = {
        "axis": axis,
        "momentum": weight,
        "epsilon": common.number("epsilon", epsilon, high=float("inf")),
        "unbiased": _checks.static_flag("unbiased", unbiased),
    }
    rank = len(axis) if isinstance(axis, Sequence) else 1
    count = found.pop("count", 0)
    return common.convert(found, count, options, rank=rank)


def to_flax(layer: Layer | Mapping[str, Layer], *, nnx: bool = False) -> dict[str, Any]:
    """The tree of variables of one batch norm, or of several by path, for Flax.

    The inverse of `from_flax`. The layers take `layer.options` as they are:
    `bnjax.linen.BatchNorm(**layer.options)`.

    Args:
      layer: a `Layer`, or several by path: "Block_0/BatchNorm_0" -> Layer.
      nnx: True for one tree with scale, bias, mean and var together, and numbers
        in the path as integers: `nnx.replace_by_pure_dict(state, tree)`.

    Returns:
      `{"params": ..., "batch_stats": ...}`, or for nnx one nested mapping. `count`
      is there where momentum is a schedule.

    Raises:
      TypeError, ValueError: parts of a layer that do not fit each other.

    Example:
      >>> import bnjax
      >>> from bnjax import interop
      >>> layer = interop.Layer(*bnjax.bn_init(2), {})
      >>> tree = interop.to_flax({"Block_0/BatchNorm_0": layer})
      >>> print(tree["batch_stats"])
      {'Block_0': {'BatchNorm_0': {'mean': array([0., 0.], dtype=float32), \
'var': array([1., 1.], dtype=float32)}}}

    Source: flax.linen.BatchNorm, flax.nnx.BatchNorm.
    """
    layers = layer if isinstance(layer, Mapping) else {"": layer}
    tree: dict[str, Any] = {}
    for name, value in layers.items():
        own = common.located(name, common.checked, value)
        path: list[Any] = [part for part in name.split("/") if part]
        if nnx:
            path = [int(part) if part.isdigit() else part for part in path]
        statistics = own.state._asdict()
        if not callable(own.options["momentum"]):
            del statistics["count"]
        params = {k: v for k, v in own.params._asdict().items() if v is not None}
        for collection, arrays in zip(_COLLECTIONS, (params, statistics), strict=True):
            _put(tree, path if nnx else [collection, *path], arrays)
    return tree


def _put(tree: dict[str, Any], path: list[Any], arrays: dict[str, np.ndarray]) -> None:
    if arrays:
        for part in path:
            tree = tree.setdefault(part, {})
        tree.update(arrays)


def _source(variables: Any) -> common.Source:
    tree = common.source(variables, "/", (), "variables").arrays
    parts = [tree[name] for name in _COLLECTIONS if name in tree] or [tree]
    flat: dict[str, Any] = {}
    for part in parts:
        _flatten(part, "", flat)
    return common.Source(flat, "/", _STATISTICS)


def _flatten(tree: Any, name: str, flat: dict[str, Any]) -> None:
    if not isinstance(tree, Mapping):
        flat[name] = tree
        return
    for key, value in tree.items():
        _flatten(value, f"{name}/{key}" if name else str(key), flat)
