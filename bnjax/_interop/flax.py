"""Layers of Flax, linen and nnx: trees of variables."""

import re
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
        are left aside; of nnx, a State or the nested mapping of its values, where
        statistics are not in `batch_stats`, or beside parameters.
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
    flat = _flat(common.mapping("variables", variables))
    if not _is_linen(variables, flat):
        norms = common.owners(flat, "/", _STATISTICS)
        _refuse_nested(norms, common.owners(flat, "/", _PARAMS))
        return common.Source(flat, "/", norms)
    params, statistics = (_flat(variables.get(name, {})) for name in _COLLECTIONS)
    return common.Source(params | statistics, "/", _linen_norms(params, statistics))


def _refuse_nested(norms: set[str], affine: set[str]) -> None:
    """Collections of linen within something else would be read without their parameters."""
    for name in sorted(norms):
        outer, found, inner = f"/{name}/".partition("/batch_stats/")
        if outer and found and f"{outer}/params/{inner}".strip("/") in affine:
            keys = outer.strip("/").split("/")
            raise ValueError(
                "`variables` must hold params and batch_stats at its top, got them in "
                f"{'/'.join(keys)!r}. Fix: variables{''.join(f'[{key!r}]' for key in keys)}."
            )


def _linen_norms(params: dict[str, Any], statistics: dict[str, Any]) -> set[str]:
    """By statistics, and where these are lost by other signs: a LayerNorm has a scale too."""
    affine = common.owners(params, "/", _PARAMS)
    counted = common.owners(statistics, "/", ("count",)) & affine
    named = {name for name in affine if re.search(r"(^|/)BatchNorm_\d+$", name)}
    return common.owners(statistics, "/", _STATISTICS) | counted | named


def _is_linen(variables: Mapping[str, Any], flat: dict[str, Any]) -> bool:
    """Whether the top are collections, not attributes of nnx that have their names."""
    if not any(name in variables for name in _COLLECTIONS):
        return False
    if any(base.__module__.startswith("flax.nnx") for base in type(variables).__mro__):
        return False
    means, variances = (common.owners(flat, "/", (name,)) for name in _STATISTICS)
    mixed = (means | variances) & common.owners(flat, "/", _PARAMS)
    top = {name: name.partition("/")[0] for name in means | variances}
    inside = {name for name in top if top[name] == "batch_stats"}
    if inside:
        return not inside & mixed
    return not any(top[name] != "params" or name in mixed for name in means & variances)


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """path -> leaf."""
    if not isinstance(tree, Mapping):
        return {name: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{name}/{key}" if name else str(key))
    return flat
