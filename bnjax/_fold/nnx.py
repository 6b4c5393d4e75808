"""Folding a flax.nnx model: a copy, whose normalizations become identities."""

from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bnjax._fold import models, planning, tracing
from bnjax.nnx import BatchNorm

_NORMS = (BatchNorm, nnx.BatchNorm)
_LAYERS: dict[Any, models.Kind] = {
    nnx.Linear: "dense",
    nnx.Conv: "conv",
    nnx.ConvTranspose: "transposed",
}
_FIX = "model.eval()"


class NNXFold(NamedTuple):
    """A folded copy of a model.

    `folded`: path of each normalization that is gone -> path of the layer that it
    went into. `kept`: path of each of the others -> the reason.
    """

    model: Any
    folded: dict[str, str]
    kept: dict[str, str]


class Folded(nnx.Module):
    """Stands where a normalization was: its input, in the dtype that its output had."""

    def __init__(self, dtype: Any) -> None:
        """An identity that casts to `dtype`."""
        self.dtype = dtype
        # model.train() and nnx.view set it; the call refuses what it cannot do.
        self.use_running_average = True

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        """`x`; raises ValueError in training and with a mask."""
        rest, named = (use_running_average,), {"mask": mask}
        models.require_inference(self, "a folded BatchNorm", rest, named, _FIX)
        if mask is not None:
            raise ValueError("a BatchNorm that is folded takes no mask.")
        return jnp.asarray(x).astype(self.dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """For `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def fold(
    model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: planning.Pairs | None
) -> NNXFold:
    """See `bnjax.fold.nnx`."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` must be an nnx.Module, got {type(model).__name__}.")
    found = _trace(model, args, kwargs)
    folds, kept = planning.plan(found, pairs)
    copy = nnx.clone(model)
    modules = _modules(copy)
    for path, (call, affines) in planning.by_layer(found, folds).items():
        assert call.layer is not None
        layer: Any = modules[path]
        values = _values(layer)
        kernel, bias = models.fold_parameters(
            path, call.layer, values["kernel"], values.get("bias"), affines
        )
        # By set_value: [...] would write into a NumPy array that the given model shares.
        layer.kernel.set_value(kernel)
        if "bias" in values:
            layer.bias.set_value(bias)
        else:
            layer.bias, layer.use_bias = nnx.Param(bias), True
    for f in folds:
        _become(modules[f.norm], Folded(found.call(f.norm).dtype))
    return NNXFold(copy, {f.norm: f.layer for f in folds}, kept)


def _become(module: nnx.Module, other: nnx.Module) -> None:
    """Makes an object of a copy another module, for all who hold it, in whatever container."""
    vars(module).clear()
    vars(module).update(vars(other))
    object.__setattr__(module, "__class__", type(other))


def _trace(model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> planning.Model:
    recorder, copy = tracing.Recorder(), nnx.clone(model)
    modules = _modules(model)
    for path, module in _modules(copy).items():
        marked = _marked(modules[path], path, recorder)
        if marked is not None:
            object.__setattr__(module, "__class__", marked)
    graph, state = nnx.split(copy)

    def evaluate(state: Any, args: Any, kwargs: Any) -> Any:
        merged: Any = nnx.merge(graph, state)
        return merged(*args, **kwargs), dict(nnx.to_flat_state(nnx.state(merged)))

    flow, ids, (y, after) = tracing.trace(evaluate, state, args, kwargs)
    before = dict(nnx.to_flat_state(ids))
    # All that the call stores is an output, too, as far as it was not there before.
    changed = [
        leaf
        for path, value in after.items()
        for leaf in set(jax.tree.leaves(value)) - set(jax.tree.leaves(before.get(path)))
    ]
    holders = _holders(model)
    stored = {}
    for keys, variable in nnx.to_flat_state(state):
        key = "/".join(map(str, keys[:-1])), str(keys[-1])
        for number, array in zip(*map(jax.tree.leaves, (before[keys], variable)), strict=True):
            stored[key] = planning.Stored(number, jnp.shape(array), holders.get(key))
    norms = dict.fromkeys(call.path for call in recorder.calls if call.layer is None)
    maps = {path: models.norm_map(modules[path], _values(modules[path])) for path in norms}
    outputs = frozenset([*jax.tree.leaves(y), *changed])
    return planning.Model(flow, outputs, recorder.calls, stored, maps)


def _marked(original: Any, path: str, recorder: tracing.Recorder) -> type | None:
    """A class like that of the original whose calls are recorded; None for what is no layer."""
    cls: Any = type(original)
    norm, base = (models.base_of(original, classes) for classes in (_NORMS, _LAYERS))
    if norm is None and (base is None or cls.__call__ is not base.__call__):
        return None

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, rest, named = models.split(args, kwargs)
        if norm is not None:
            why = models.own_method(cls, norm, path)
            seen = tracing.norm_call(self, why, path, x, rest, named, _FIX)
        else:
            assert base is not None
            # The original has constants, such as the mask, where this one is traced.
            seen = tracing.layer_call(original, base, path, _LAYERS[base])
        return recorder.run(seen, _values(self), lambda x: cls.__call__(self, x, *rest, **named), x)

    return type(cls.__name__, (cls,), {"__call__": call})


def _modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Modules by path; one that is shared by its first."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Module)
    }


def _holders(model: nnx.Module) -> dict[tuple[str, str], str]:
    """For variables that several modules hold, by path and name, another one of these."""
    held: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for path, module in _modules(model).items():
        for name, value in vars(module).items():
            leaves = jax.tree.leaves(
                value, is_leaf=lambda v: isinstance(v, (nnx.Variable, nnx.Module))
            )
            for leaf in leaves:
                if isinstance(leaf, nnx.Variable):
                    held[id(leaf)].append((path, name))
    return {
        key: next(other for other in keys if other != key)[0] or "the model"
        for keys in held.values()
        for key in keys
        if len(set(keys)) > 1
    }


def _values(module: Any) -> dict[str, jax.Array]:
    """The arrays of a layer's variables, by name."""
    return {k: v[...] for k, v in vars(module).items() if isinstance(v, nnx.Variable)}
