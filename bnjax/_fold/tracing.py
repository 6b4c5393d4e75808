"""A model's calls of layers and normalizations, recorded while its data flow is traced; no Flax."""

import dataclasses
import enum
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from bnjax._fold import models
from bnjax._fold.flow import Flow, mark, trace_of
from bnjax._fold.models import Layer

_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
# Values that can hold no array of the trace.
_PLAIN = (str, bytes, bool, int, float, complex, np.generic, np.dtype, type, enum.Enum)


@dataclasses.dataclass
class Call:
    """One call of a layer or a normalization while the model was traced."""

    path: str
    layer: Layer | None  # None for a normalization
    why: str | None = None  # it cannot be folded
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)  # shapes and dtypes
    dtype: Any = None
    numerics: Any = None  # of a normalization


def layer_call(module: Any, base: type, path: str, kind: models.Kind) -> Call:
    """A call of a Dense or convolution; base: flax's class of it."""
    return Call(path, models.layer(module, kind), models.layer_refusal(module, base, path))


def norm_call(
    module: Any, why: str | None, path: str, x: Any, rest: Any, named: Mapping[str, Any], fix: str
) -> Call:
    """A call of a normalization, which must be evaluation; why: it has a method of its own."""
    if why is None:
        models.require_inference(module, repr(path), rest, named, fix)
        why = models.norm_refusal(module, path, np.shape(x), named.get("mask"))
    return Call(path, None, why, numerics=(module.epsilon, models.norm_of(module)))


def difference(call: Call, other: Call) -> str | None:
    """What two calls of one path differ in, of what folding depends on."""
    if call.parameters.keys() != other.parameters.keys():
        return f"set of variables, {sorted(call.parameters)}, not {sorted(other.parameters)}"
    if call.layer is None or other.layer is None:
        same = models.same_numerics(call.numerics, other.numerics, call.parameters)
        return None if same else "epsilon or norm"
    # What a layer does at borders is asked of each call where it matters.
    layout, before = (
        c.layout._replace(padding=None, input_dilation=1) for c in (call.layer, other.layer)
    )
    return None if layout == before else "layout of its kernel"


class Recorder:
    """Marks calls while a model is traced."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(
        self, call: Call, parameters: Mapping[str, Any], function: Callable[[Any], Any], x: Any
    ) -> jax.Array:
        """`function(x)`, with marks at the parameters it reads, at its input and its output."""
        number = len(self.calls)
        self.calls.append(call)
        for name, value in parameters.items():
            marked = mark(value, number, name)
            call.parameters[name] = jax.ShapeDtypeStruct(marked.shape, marked.dtype)
        y = mark(function(mark(x, number, "in")), number, "out")
        call.dtype = y.dtype
        return y


def trace(function: Callable[..., Any], variables: Any, *rest: Any) -> tuple[Flow, Any, Any]:
    """The data flow of `function(variables, *rest)`; its variables and results as values of it.

    Arrays are traced; anything else is as it comes, and None among the values.
    """
    leaves, tree = jax.tree.flatten((variables, *rest))
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _ARRAYS)]
    results: list[Any] = []

    def call(*arrays: Any) -> Any:
        values = dict(enumerate(leaves)) | dict(zip(traced, arrays, strict=True))
        results[:] = jax.tree.flatten(function(*jax.tree.unflatten(tree, values.values())))
        return [leaf for leaf in results[0] if _is_array(leaf)]

    with trace_of(object()):
        flow = Flow(call, [leaves[i] for i in traced])
    ids = dict.fromkeys(range(len(leaves))) | dict(zip(traced, flow.arguments, strict=True))
    returned = iter(flow.results)
    numbers = [next(returned) if _is_array(leaf) else None for leaf in results[0]]
    return (
        flow,
        jax.tree.unflatten(tree, ids.values())[0],
        jax.tree.unflatten(results[1], numbers),
    )


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return True
    if isinstance(leaf, _PLAIN) or (isinstance(leaf, np.ndarray) and leaf.dtype != object):
        return False
    raise TypeError(
        "a model to be folded must return arrays, in containers that jax.tree knows, so that its "
        f"outputs can be seen, got {type(leaf).__name__}. Fix: register it as a pytree, or fold "
        "by a method that returns its arrays."
    )


def shapes(tree: Any) -> Any:
    """The tree with shapes and dtypes in place of arrays."""
    return jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, _ARRAYS) else v, tree
    )


def signature(tree: Any) -> Hashable | None:
    """What a trace depends on: shapes and dtypes of arrays, other values; None if unhashable."""
    leaves, structure = jax.tree.flatten(tree)
    key = (structure, *map(_described, leaves))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _described(leaf: Any) -> Any:
    if isinstance(leaf, _ARRAYS):
        return leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False)
    return type(leaf), leaf
