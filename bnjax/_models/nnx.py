"""flax.nnx models, with bnjax's BatchNorm layers and flax's."""

import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from bnjax import _observe
from bnjax._models import common
from bnjax._models.common import Call, Layer, Program, Static, Subject
from bnjax._observe import PREFIX, Mode, Seen
from bnjax._types import Norm
from bnjax.nnx import BatchNorm, convert


def subject(model: nnx.Module, variables: Any, call: Call | None) -> Subject:
    """A model, which holds its variables itself."""
    if variables is not None:
        raise ValueError(
            "`variables` must be None for an nnx module, which holds its own, got "
            f"{type(variables).__name__}."
        )
    layers = {
        path: Layer(m.mean[...], m.var[...], _value(m, "count"), _value(m, "cov"))
        for path, m in _layers(model).items()
    }
    common.require_layers(layers, f"in {type(model).__name__}", "Fix: bnjax.nnx.BatchNorm.")
    copy = nnx.clone(model)
    copy.eval()
    if any(isinstance(m, nnx.BatchNorm) for m in _layers(copy).values()):
        convert(copy)
    graph, state = nnx.split(copy)

    def replaced(statistics: Mapping[str, Layer]) -> Any:
        for path, layer in _layers(model).items():
            for name, value in common.fields(statistics.get(path, layers[path])).items():
                getattr(layer, name)[...] = value
        return model

    return Subject("nnx", Program(_run, Static(graph), call), state, layers, replaced)


def _run(
    graph: Static, call: Call | None, mode: Mode, variables: Any, batch: Any
) -> tuple[Any, dict[str, Seen]]:
    model: Any = nnx.merge(graph.value, variables)
    layers = _layers(model)
    for layer in layers.values():
        room = _observe.nothing(layer.mean[...], _value(layer, "cov") if mode.cov else None)
        for name, value in room._asdict().items():
            if value is not None:
                setattr(layer, PREFIX + name, nnx.BatchStat(value))
        cls: Any = type(layer)
        object.__setattr__(layer, "__class__", _observing(cls, mode))
    y = model(batch) if call is None else call(model, batch)
    return y, {
        path: Seen(*(_value(layer, PREFIX + name) for name in Seen._fields))
        for path, layer in layers.items()
    }


@functools.cache
def _observing(cls: Any, mode: Mode) -> Any:
    """The class of a layer whose norm is observed."""

    def norm(self: Any) -> Norm:
        return _observe.observing(cls._norm(self), mode)

    return type(cls.__name__, (cls,), {"_norm": norm})


def _value(layer: Any, name: str) -> Any:
    """Of a variable; None where there is none."""
    return getattr(layer, name)[...] if hasattr(layer, name) else None


def _layers(model: nnx.Module) -> dict[str, Any]:
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, (BatchNorm, nnx.BatchNorm))
    }
