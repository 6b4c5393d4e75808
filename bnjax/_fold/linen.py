"""Folding a flax.linen model: its source still calls BatchNorm, which interceptors pass by."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax._fold import models, planning
from bnjax.linen import BatchNorm

_NORMS = (BatchNorm, nn.BatchNorm)
_LAYERS: dict[Any, models.Kind] = {
    nn.Dense: "dense",
    nn.Conv: "conv",
    nn.ConvTranspose: "transposed",
}


_FIX = "evaluate, as with train=False in the call"


class LinenFold(NamedTuple):
    """A folded model: `apply(variables, *args, **kwargs)` is that of the model.

    `folded`: path of each normalization that is gone -> path of the layer that it
    went into. `kept`: path of each of the others -> the reason.
    """

    apply: Callable[..., Any]
    variables: Any
    folded: dict[str, str]
    kept: dict[str, str]


class _Sites(NamedTuple):
    """What differs in the folded model, by path."""

    biases: frozenset[str]  # layers that had no bias
    layers: dict[str, str]  # of each norm that is gone
    dtypes: dict[str, Any]  # of its output


def fold(
    model: nn.Module,
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pairs: planning.Pairs | None,
) -> LinenFold:
    """See `bnjax.fold.linen`."""
    found = _trace(model, variables, args, kwargs)
    folds, kept = planning.plan(found, pairs)
    flat = flatten_dict(variables, keep_empty_nodes=True)
    biases = set()
    for path, (layer, affines) in planning.by_layer(found, folds).items():
        keys = [("params", *path.split("/"), name) for name in ("kernel", "bias")]
        old = [flat.get(key) for key in keys]
        kernel, bias = map(_array, old)
        new = models.fold_parameters(path, layer, kernel, bias, affines)
        flat.update((key, _replaced(o, n)) for key, o, n in zip(keys, old, new, strict=True))
        if old[1] is None:
            biases.add(path)
    layers = {f.norm: f.layer for f in folds}
    gone = tuple(tuple(path.split("/")) for path in layers)
    tree = unflatten_dict(
        {k: v for k, v in flat.items() if not any(k[1 : 1 + len(g)] == g for g in gone)}
    )
    dtypes = {call.path: call.dtype for call in found.calls if call.path in layers}
    apply = _apply(model, _Sites(frozenset(biases), layers, dtypes))
    return LinenFold(apply, freeze(tree) if isinstance(variables, FrozenDict) else tree,
                     layers, kept)  # fmt: skip


def _array(box: Any) -> Any:
    """A variable without its box of metadata, which is a tree of one leaf."""
    return None if box is None else jax.tree.leaves(box)[0]


def _replaced(box: Any, value: jax.Array) -> Any:
    return value if box is None else jax.tree.map(lambda _: value, box)


def _trace(
    model: nn.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> planning.Model:
    recorder = planning.Recorder()
    norms: dict[str, nn.Module] = {}

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, kind = context.module, _kind(context)
        if kind is None:
            return run(*args, **kwargs)
        path = "/".join(module.path)
        x, rest, named = models.split(args, kwargs)
        if kind == "norm":
            norms[path] = module
            plain = any(type(module).__call__ is cls.__call__ for cls in _NORMS)
            call = planning.norm_call(module, path, x, rest, named, plain, _FIX)
            names = [("batch_stats", n) for n in ("mean", "var", "count")]
            names += [("params", n) for n in ("scale", "bias")]
        else:
            call = planning.layer_call(module, path, kind)
            names = [("params", n) for n in ("kernel", "bias")]
        parameters = {
            name: nn.meta.unbox(module.get_variable(collection, name))
            for collection, name in names
            if module.has_variable(collection, name)
        }
        return recorder.run(call, parameters, lambda x: run(x, *rest, **named), x)

    def evaluate(variables: Any, args: Any, kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return model.apply(variables, *args, **kwargs)

    flow, ids = planning.trace(evaluate, variables, args, kwargs)
    stored, values = {}, {}
    numbered = flatten_dict(ids)
    for keys, box in flatten_dict(variables).items():
        if keys[0] in ("params", "batch_stats") and len(jax.tree.leaves(box)) == 1:
            key = "/".join(keys[1:-1]), keys[-1]
            values[key] = _array(box)
            stored[key] = _array(numbered[keys]), values[key].shape
    affines = {
        path: models.norm_affine(module, {n: v for (p, n), v in values.items() if p == path})
        for path, module in norms.items()
    }
    return planning.Model(flow, recorder.calls, stored, affines)


def _kind(context: Any) -> models.Kind | Literal["norm"] | None:
    """Norm, or the kind of a layer whose call is flax's own; None for anything else."""
    if context.method_name != "__call__":
        return None
    if isinstance(context.module, _NORMS):
        return "norm"
    for cls, kind in _LAYERS.items():
        if isinstance(context.module, cls) and type(context.module).__call__ is cls.__call__:
            return kind
    return None


def _apply(model: nn.Module, sites: _Sites) -> Callable[..., Any]:
    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        called = set()

        def intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            path = "/".join(context.module.path)
            if _kind(context) is None:
                return run(*args, **kwargs)
            called.add(path)
            if path in sites.layers:
                return _pass(context.module, path, sites.dtypes[path], args, kwargs)
            y = run(*args, **kwargs)
            if path not in sites.biases:
                return y
            bias = nn.meta.unbox(context.module.get_variable("params", "bias"))
            return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

        with nn.intercept_methods(intercept):
            y = model.apply(variables, *args, **kwargs)
        for norm in sites.layers.keys() & called:
            if sites.layers[norm] not in called:
                raise ValueError(
                    f"{norm!r} is folded into {sites.layers[norm]!r}, and must be called with it; "
                    "this call reached only the first. Fix: fold with the inputs of this call."
                )
        return y

    return apply


def _pass(module: Any, path: str, dtype: Any, args: Any, kwargs: dict[str, Any]) -> jax.Array:
    """A normalization that is folded: its input, in the dtype that its output had."""
    x, rest, named = models.split(args, kwargs)
    models.require_inference(module, repr(path), rest, named, _FIX)
    if named.get("mask") is not None:
        raise ValueError(f"{path!r} is folded, and takes no mask.")
    return jnp.asarray(x).astype(dtype)
