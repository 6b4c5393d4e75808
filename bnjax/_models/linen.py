"""flax.linen models, with bnjax's BatchNorm layers and flax's."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from bnjax import _observe, _trees
from bnjax._models import common
from bnjax._models.common import Call, Layer, Program, Static, Subject
from bnjax._observe import PREFIX, Mode, Seen
from bnjax.linen import transformed

_STATS = "batch_stats"


def subject(model: nn.Module, variables: Any, call: Call | None) -> Subject:
    """A model and its variables, with "batch_stats" among them."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            "`variables` must be those of the model, {'params': ..., 'batch_stats': ...}, got "
            f"{type(variables).__name__}."
        )
    layers = _layers(variables.get(_STATS, {}))
    common.require_layers(
        layers, "with mean and var in `variables['batch_stats']`", "Fix: variables of model.init."
    )

    def replaced(statistics: Mapping[str, Layer]) -> Any:
        def replace(path: Any, leaf: Any) -> Any:
            collection, *rest = path
            place, name = _trees.place(tuple(rest))
            layer = statistics.get("/".join(place))
            if collection.key != _STATS or layer is None:
                return leaf
            return common.fields(layer).get(name, leaf)

        return jax.tree_util.tree_map_with_path(replace, variables)

    return Subject("linen", Program(_run, Static(model), call), variables, layers, replaced)


def _run(
    model: Static, call: Call | None, mode: Mode, variables: Any, batch: Any
) -> tuple[Any, dict[str, Seen]]:
    statistics = _prepared(variables[_STATS], mode)

    def apply(*args: Any, **kwargs: Any) -> Any:
        nonlocal statistics
        given = {**variables, _STATS: statistics}
        y, new = model.value.apply(given, *args, mutable=[_STATS], **kwargs)
        statistics = new[_STATS]
        return y

    with transformed(lambda norm: _observe.observing(norm, mode), mode):
        y = apply(batch) if call is None else call(apply, batch)
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in traverse_util.flatten_dict(statistics).items():
        name = path[-1]
        if name.startswith(PREFIX):
            (array,) = jax.tree.leaves(leaf)
            found.setdefault("/".join(path[:-1]), {})[name.removeprefix(PREFIX)] = array
    return y, {path: Seen(**own) for path, own in found.items()}


def _prepared(statistics: Any, mode: Mode) -> Any:
    """The collection with room for what is seen, like the mean of each layer."""
    flat = dict(traverse_util.flatten_dict(statistics))
    for path, leaf in list(flat.items()):
        if path[-1] == "mean" and (*path[:-1], "var") in flat:
            cov = jax.tree.leaves(flat.get((*path[:-1], "cov")) if mode.cov else None)
            for name in Seen.names(bool(cov)):
                flat[*path[:-1], PREFIX + name] = jax.tree.map(
                    lambda v, name=name, cov=cov: getattr(_observe.nothing(v, *cov), name), leaf
                )
    return traverse_util.unflatten_dict(flat)


def _layers(statistics: Any) -> dict[str, Layer]:
    return {
        path: Layer(v["mean"], v["var"], v.get("count"), v.get("cov"))
        for path, v in _trees.by_layer(statistics).items()
        if {"mean", "var"} <= v.keys()
    }
