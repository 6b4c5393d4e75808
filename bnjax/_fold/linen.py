"""Folding a flax.linen model: its source still calls BatchNorm, which interceptors pass by."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, FrozenDict, freeze
from flax.core.scope import union_filters
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import linen
from bnjax._fold import models, planning, tracing

_NORMS = (linen.BatchNorm, nn.BatchNorm)
_LAYERS: dict[Any, models.Kind] = {
    nn.Dense: "dense",
    nn.Conv: "conv",
    nn.ConvTranspose: "transposed",
}
_STATISTICS = ("count", "mean", "var")
_NUMBERS = itertools.count()

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


def _intercepted(
    intercept: Callable[..., Any],
    model: nn.Module,
    variables: Any,
    args: Any,
    kwargs: Mapping[str, Any],
) -> Any:
    """`model.apply(variables, *args, **kwargs)` with calls of layers intercepted."""
    if any(t.key != "convert" for t in linen.transforms.value):
        raise ValueError(
            "a model that is folded, or to be folded, takes running statistics, got a call within "
            "bnjax.linen.switch, or the like. Fix: leave that context first."
        )
    with linen.transforms(()), nn.intercept_methods(intercept):
        return model.apply(variables, *args, **kwargs)


def _with(mutable: Any, name: str) -> Any:
    """A filter of collections that lets one more through, or where it lets all, not that one."""
    if mutable is True:
        return DenyList(name)
    if isinstance(mutable, DenyList):
        return DenyList(union_filters(mutable.deny, name))
    return union_filters(mutable, name)


def fold(
    model: nn.Module,
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pairs: planning.Pairs | None,
) -> LinenFold:
    """See `bnjax.fold.linen`."""
    found, norms = _trace(model, variables, args, kwargs)
    flat = flatten_dict(variables, keep_empty_nodes=True)

    def value(path: str, name: str) -> Any:
        return _array(flat[_key(path, name)])

    maps = {}
    for path, norm in norms.items():
        names = {name for call in found.calls if call.path == path for name in call.parameters}
        maps[path] = models.norm_map(norm, {name: value(path, name) for name in names})
    found = found._replace(maps=maps)
    folds, kept = planning.plan(found, pairs)
    for path, (call, affines) in planning.by_layer(found, folds).items():
        assert call.layer is not None
        old = {name: value(path, name) for name in call.parameters}
        new = models.fold_parameters(path, call.layer, old["kernel"], old.get("bias"), affines)
        for name, array in zip(("kernel", "bias"), new, strict=True):
            key = _key(path, name)
            flat[key] = _replaced(flat[key] if name in old else None, array)
    gone = {_key(f.norm, name)[:-1] for f in folds for name in ("mean", "scale")}
    tree = unflatten_dict({key: box for key, box in flat.items() if key[:-1] not in gone})
    apply = _apply(
        model, variables, found, folds, tracing.signature((args, kwargs, _others(variables)))
    )
    layers = {f.norm: f.layer for f in folds}
    return LinenFold(apply, freeze(tree) if isinstance(variables, FrozenDict) else tree,
                     layers, kept)  # fmt: skip


def _others(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Collections that are not folded, and may differ from call to call."""
    return {k: v for k, v in variables.items() if k not in ("params", "batch_stats")}


def _collection(name: str) -> str:
    return "batch_stats" if name in _STATISTICS else "params"


def _key(path: str, name: str) -> tuple[str, ...]:
    """Of a variable in the flat tree."""
    return (_collection(name), *filter(None, path.split("/")), name)


def _names(module: Any, kind: str) -> list[str]:
    """The variables that a layer reads, of which the tree may hold more."""
    if kind != "norm":
        return ["kernel"] + ["bias"] * module.use_bias
    names = [*_STATISTICS, *["scale"] * module.use_scale, *["bias"] * module.use_bias]
    return names if module.has_variable("batch_stats", "count") else names[1:]


def _array(box: Any) -> Any:
    """A variable without its box of metadata, which is a tree of one leaf."""
    return None if box is None else jax.tree.leaves(box)[0]


def _replaced(box: Any, value: jax.Array) -> Any:
    return value if box is None else jax.tree.map(lambda _: value, box)


def _trace(
    model: nn.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[planning.Model, dict[str, nn.Module]]:
    """What a call does, of arrays or their shapes; and the normalizations by path."""
    recorder = tracing.Recorder()
    norms: dict[str, nn.Module] = {}

    def intercept(proceed: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, kind = context.module, _kind(context)
        if kind is None:
            return proceed(*args, **kwargs)
        path = "/".join(module.path)
        x, rest, named = models.split(args, kwargs)
        if kind[0] == "norm":
            norms[path] = module
            why = models.own_method(type(module), kind[1], path)
            call = tracing.norm_call(module, why, path, x, rest, named, _FIX)
        else:
            call = tracing.layer_call(module, kind[1], path, kind[0])
        parameters = {
            name: nn.meta.unbox(module.get_variable(_collection(name), name))
            for name in _names(module, kind[0])
            if module.has_variable(_collection(name), name)
        }
        return recorder.run(call, parameters, lambda x: proceed(x, *rest, **named), x)

    flow, ids, results = tracing.trace(
        lambda variables, args, kwargs: _intercepted(intercept, model, variables, args, kwargs),
        variables, args, kwargs,
    )  # fmt: skip
    shapes = flatten_dict(variables)
    stored = {}
    for keys, number in flatten_dict(ids).items():
        path, name = "/".join(keys[1:-1]), keys[-1]
        if _key(path, name) == keys and len(jax.tree.leaves(number)) == 1:
            stored[path, name] = planning.Stored(_array(number), _array(shapes[keys]).shape)
    outputs = frozenset(jax.tree.leaves(results))
    return planning.Model(flow, outputs, recorder.calls, stored, {}), norms


def _kind(context: Any) -> tuple[Any, type] | None:
    """Norm or the kind of a layer whose call is flax's own, and the class; None for others."""
    if context.method_name != "__call__":
        return None
    norm, base = (models.base_of(context.module, classes) for classes in (_NORMS, _LAYERS))
    if norm is not None:
        return "norm", norm
    if base is not None and type(context.module).__call__ is base.__call__:
        return _LAYERS[base], base
    return None


def _apply(
    model: nn.Module, variables: Any, found: planning.Model, folds: list[planning.Fold], key: Any
) -> Callable[..., Any]:
    """The folded model, whose calls must have the data flow that was found, or one as good."""
    maps, gone = found.maps, {f.norm for f in folds}
    name = f"bnjax.fold {next(_NUMBERS)}"
    biases = {f.layer for f in folds if "bias" not in found.call(f.layer).parameters}
    unfolded = tracing.shapes({k: v for k, v in variables.items() if k not in _others(variables)})
    checked = {key: _dtypes(found)}

    def check(others: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        key = tracing.signature((args, kwargs, others))
        if key is None or key not in checked:
            shapes = {**unfolded, **tracing.shapes(others)}
            this = _trace(model, shapes, args, kwargs)[0]._replace(maps=maps)
            planning.check(this, found, folds)
            checked[key] = _dtypes(this)
        return checked[key]

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        dtypes = check(_others(variables), args, kwargs)
        for key in flatten_dict(variables).keys() & {_key(norm, "mean") for norm in gone}:
            raise ValueError(
                "`variables` must be those of the folded model, got some with "
                f"{'/'.join(key)!r}. Fix: folded.apply(folded.variables, ...)."
            )

        def intercept(proceed: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if _kind(context) is None:
                return proceed(*args, **kwargs)
            path = "/".join(context.module.path)
            if path in gone:
                return jnp.asarray(models.split(args, kwargs)[0]).astype(dtypes[path])
            y = proceed(*args, **kwargs)
            if path not in biases:
                return y
            bias = nn.meta.unbox(context.module.get_variable("params", "bias"))
            return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

        mutable = kwargs.get("mutable", False)
        kwargs = {**kwargs, "mutable": _with(mutable, name)}
        y, state = _intercepted(intercept, model, variables, args, kwargs)
        both = mutable is not False or kwargs.get("capture_intermediates", False)
        return (y, state) if both else y

    return apply


def _dtypes(found: planning.Model) -> dict[str, Any]:
    """Of the outputs of the normalizations."""
    return {call.path: call.dtype for call in found.calls if call.layer is None}
