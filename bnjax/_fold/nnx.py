"""Folding a flax.nnx model: a copy, whose normalizations become identities."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bnjax._fold import models, planning
from bnjax.nnx import BatchNorm

_NORMS = (BatchNorm, nnx.BatchNorm)
_LAYERS: dict[Any, models.Kind] = {
    nnx.Linear: "dense",
    nnx.Conv: "conv",
    nnx.ConvTranspose: "transposed",
}
_Kind = models.Kind | Literal["norm"]
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
    for path, (described, affines) in planning.by_layer(found, folds).items():
        layer: Any = modules[path]
        values = _values(layer)
        kernel, bias = models.fold_parameters(
            path, described, values["kernel"], values.get("bias"), affines
        )
        layer.kernel[...] = kernel
        if "bias" in values:
            layer.bias[...] = bias
        else:
            layer.bias, layer.use_bias = nnx.Param(bias), True
    for f in folds:
        dtype = next(call.dtype for call in found.calls if call.path == f.norm)
        _become(modules[f.norm], Folded(dtype))
    return NNXFold(copy, {f.norm: f.layer for f in folds}, kept)


def _become(module: nnx.Module, other: nnx.Module) -> None:
    """Makes an object of a copy another module, for all who hold it, in whatever container."""
    vars(module).clear()
    vars(module).update(vars(other))
    object.__setattr__(module, "__class__", type(other))


def _trace(model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> planning.Model:
    recorder, copy = planning.Recorder(), nnx.clone(model)
    modules = _modules(copy)
    for path, module in modules.items():
        kind = _kind(module)
        if kind is not None:
            marked = _marked(type(module), kind, path, recorder)
            object.__setattr__(module, "__class__", marked)
    graph, state = nnx.split(copy)

    def evaluate(state: Any, args: Any, kwargs: Any) -> Any:
        merged: Any = nnx.merge(graph, state)
        y = merged(*args, **kwargs)
        # What the model has sown is an output, too.
        return y, nnx.state(merged, nnx.Intermediate)

    flow, ids = planning.trace(evaluate, state, args, kwargs)
    flat = zip(nnx.to_flat_state(state), nnx.to_flat_state(ids), strict=True)
    stored = {
        ("/".join(map(str, path[:-1])), str(path[-1])): (jax.tree.leaves(number)[0], value.shape)
        for (path, variable), (_, number) in flat
        for value in jax.tree.leaves(variable)[:1]
    }
    affines = {
        path: models.norm_affine(modules[path], _values(modules[path]))
        for path in dict.fromkeys(call.path for call in recorder.calls if call.layer is None)
    }
    return planning.Model(flow, recorder.calls, stored, affines)


def _marked(cls: Any, kind: _Kind, path: str, recorder: planning.Recorder) -> type:
    """A class like `cls` whose calls are recorded."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, rest, named = models.split(args, kwargs)
        if kind == "norm":
            plain = any(cls.__call__ is norm.__call__ for norm in _NORMS)
            seen = planning.norm_call(self, path, x, rest, named, plain, _FIX)
        else:
            seen = planning.layer_call(self, path, kind)
        return recorder.run(seen, _values(self), lambda x: cls.__call__(self, x, *rest, **named), x)

    return type(cls.__name__, (cls,), {"__call__": call})


def _kind(module: Any) -> _Kind | None:
    """Norm, or the kind of a layer whose call is flax's own; None for anything else."""
    if isinstance(module, _NORMS):
        return "norm"
    for cls, kind in _LAYERS.items():
        if isinstance(module, cls) and type(module).__call__ is cls.__call__:
            return kind
    return None


def _modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Modules by path; one that is shared by its first."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Module)
    }


def _values(module: Any) -> dict[str, jax.Array]:
    """The arrays of a layer's variables, by name."""
    return {k: v[...] for k, v in vars(module).items() if isinstance(v, nnx.Variable)}
