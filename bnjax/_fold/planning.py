"""Which normalization goes into which layer of a model, and why not; no Flax."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bnjax import _checks
from bnjax._fold import layouts, models
from bnjax._fold.flow import Flow, Mark, mark
from bnjax._fold.layouts import Affine
from bnjax._fold.models import Layer

Pairs = Mapping[str, str] | Iterable[tuple[str, str]]


class Fold(NamedTuple):
    """A normalization, the layer it goes into, and whether it comes before that."""

    layer: str
    norm: str
    before: bool


@dataclasses.dataclass
class Call:
    """One call of a layer or a normalization while the model was traced."""

    path: str
    layer: Layer | None  # None for a normalization
    why: str | None = None  # it cannot be folded
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    dtype: Any = None


def layer_call(module: Any, path: str, kind: models.Kind) -> Call:
    """A call of a Dense or convolution."""
    return Call(path, models.layer(module, kind), models.layer_refusal(module, path))


def norm_call(
    module: Any, path: str, x: Any, rest: Any, named: Mapping[str, Any], plain: bool, fix: str
) -> Call:
    """A call of a normalization, which must be evaluation; plain: as its library wrote it."""
    if not plain:
        return Call(path, None, f"{path} is a {type(module).__name__} with a call of its own")
    models.require_inference(module, repr(path), rest, named, fix)
    return Call(path, None, models.norm_refusal(module, path, np.shape(x), named.get("mask")))


class Recorder:
    """Marks calls while a model is traced."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(
        self, call: Call, parameters: Mapping[str, Any], function: Callable[[Any], Any], x: Any
    ) -> jax.Array:
        """`function(x)`, with marks at the parameters it reads, at its input and its output."""
        index = len(self.calls)
        self.calls.append(call)
        for name, value in parameters.items():
            call.shapes[name] = mark(value, index, name).shape
        y = mark(function(mark(x, index, "in")), index, "out")
        call.dtype = y.dtype
        return y


class Model(NamedTuple):
    """What a trace found: the data flow, the calls, and where variables are stored."""

    flow: Flow
    calls: list[Call]
    stored: dict[tuple[str, str], tuple[int, tuple[int, ...]]]  # (path, name): value, shape
    affines: dict[str, Affine | str]  # or why there is none

    def paths(self, *, norms: bool) -> list[str]:
        """Paths of the normalizations, or of the other layers, in order of calls."""
        return list(dict.fromkeys(c.path for c in self.calls if (c.layer is None) == norms))

    def marks(self, path: str, side: str) -> list[Mark]:
        """Where calls of `path` are marked."""
        found = (self.flow.marks[i, side] for i, c in enumerate(self.calls) if c.path == path)
        return [m for marks in found for m in marks]


def trace(function: Callable[..., Any], variables: Any, *rest: Any) -> tuple[Flow, Any]:
    """The data flow of `function(variables, *rest)`, and its variables as values of the flow.

    Arrays are traced; anything else is as it comes.
    """
    leaves, tree = jax.tree.flatten((variables, *rest))
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def call(*arrays: Any) -> Any:
        values = dict(enumerate(leaves)) | dict(zip(traced, arrays, strict=True))
        return function(*jax.tree.unflatten(tree, values.values()))

    flow = Flow(call, [leaves[i] for i in traced])
    ids = dict.fromkeys(range(len(leaves))) | dict(zip(traced, flow.arguments, strict=True))
    return flow, jax.tree.unflatten(tree, ids.values())[0]


def by_layer(
    model: Model, folds: Iterable[Fold]
) -> dict[str, tuple[Layer, list[tuple[Affine, bool]]]]:
    """For each layer that changes, its geometry, and the maps with True for those before it."""
    result: dict[str, tuple[Layer, list[tuple[Affine, bool]]]] = {}
    for fold in folds:
        layer = next(c.layer for c in model.calls if c.path == fold.layer)
        a = model.affines[fold.norm]
        assert layer is not None and isinstance(a, Affine)
        result.setdefault(fold.layer, (layer, []))[1].append((a, fold.before))
    return result


def plan(model: Model, pairs: Pairs | None) -> tuple[list[Fold], dict[str, str]]:
    """The folds, and for each normalization that is kept the reason."""
    norms = model.paths(norms=True)
    if not norms:
        raise ValueError(
            "there must be a BatchNorm of bnjax or flax to fold, and the model called none with "
            f"these inputs. It called {model.paths(norms=False)}."
        )
    if pairs is not None:
        folds = [_given(model, pair) for pair in _listed(model, pairs)]
        done = {fold.norm for fold in folds}
        if len(done) < len(folds):
            raise ValueError(f"`pairs` must name each BatchNorm once, got {pairs!r}.")
        return folds, {norm: "not in `pairs`" for norm in norms if norm not in done}
    folds, kept = [], {}
    for norm in norms:
        found = _search(model, norm)
        if isinstance(found, Fold):
            folds.append(found)
        else:
            kept[norm] = found
    if not folds:
        reasons = "".join(f"\n  {norm}: {why}" for norm, why in kept.items())
        raise ValueError(f"no BatchNorm can be folded:{reasons}")
    return folds, kept


def _listed(model: Model, pairs: Pairs) -> list[tuple[str, str]]:
    """Pairs as (layer, norm), with every path known."""
    listed = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    layers, norms = model.paths(norms=False), model.paths(norms=True)
    result = []
    for pair in listed:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"`pairs` must hold pairs of paths, got {pair!r}.")
        for path in pair:
            if path not in (*layers, *norms):
                raise ValueError(
                    f"`pairs` must name layers that the model calls, got {path!r}. Known are the "
                    f"layers {layers} and the normalizations {norms}."
                )
        found = [p for p in pair if p in layers], [p for p in pair if p in norms]
        if not (found[0] and found[1]):
            raise ValueError(f"a pair must be one layer and one BatchNorm, got {pair!r}.")
        result.append((found[0][0], found[1][0]))
    if not result:
        raise ValueError("`pairs` must name one pair at least, or be None, got none.")
    return result


def _given(model: Model, pair: tuple[str, str]) -> Fold:
    why = {before: _refusal(model, Fold(*pair, before)) for before in (False, True)}
    for before, reason in why.items():
        if reason is None:
            return Fold(*pair, before)
    layer, norm = pair
    raise ValueError(
        f"{norm!r} cannot be folded into {layer!r}: before it, {why[False]}; after it, {why[True]}."
        if why[False] != why[True]
        else f"{norm!r} cannot be folded into {layer!r}: {why[False]}."
    )


def _search(model: Model, norm: str) -> Fold | str:
    """The layer before it, which keeps large means exact, else the one after it."""
    why = _own(model, norm)
    if why is not None:
        return why
    flow = model.flow
    reasons = []
    read = model.marks(norm, "in")[0].read
    readers = flow.readers[model.marks(norm, "out")[0].made]
    for before, step in ((False, flow.maker.get(read)), (True, readers[0] if readers else None)):
        what = _text(model, step, "the model's output" if before else "the model's input")
        if what in model.paths(norms=False):
            reason = _refusal(model, Fold(what, norm, before))
            if reason is None:
                return Fold(what, norm, before)
        else:
            reason = f"its output goes to {what}" if before else f"its input comes from {what}"
        reasons.append(reason)
    return f"into a layer before it: {reasons[0]}; into one after it: {reasons[1]}"


def _refusal(model: Model, fold: Fold) -> str | None:
    layer, norm, before = fold
    first, second = (norm, layer) if before else (layer, norm)
    why = _own(model, norm) or _own(model, layer) or _apart(model, first, second)
    if why is not None or not before:
        return why
    call = next(c for c in model.calls if c.path == layer)
    a = model.affines[norm]
    assert call.layer is not None and isinstance(a, Affine)
    if not _checks.is_concrete(call.layer.mask):
        return f"the mask of {layer} is computed in the model"
    return layouts.borders(call.layer.layout, call.shapes["kernel"], a)


def _own(model: Model, path: str) -> str | None:
    """Why a layer cannot be folded whatever is beside it."""
    calls = [(i, c) for i, c in enumerate(model.calls) if c.path == path]
    for index, call in calls:
        if call.why is not None:
            return call.why
        if not model.flow.marks[index, "out"]:
            return f"{path} is called inside a loop, a branch or another transformation"
    if len({call.dtype for _, call in calls}) > 1:
        return f"{path} is called with several dtypes"
    for name in calls[0][1].shapes:
        why = _variable(model, path, name, calls)
        if why is not None:
            return why
    found = model.affines.get(path)
    return found if isinstance(found, str) else None


def _variable(model: Model, path: str, name: str, calls: list[tuple[int, Call]]) -> str | None:
    """Whether calls read the stored variable, and no one else does."""
    value, shape = model.stored.get((path, name), (None, ()))
    marks = [m for index, _ in calls for m in model.flow.marks[index, name]]
    if any(m.read != value for m in marks) or any(c.shapes[name] != shape for _, c in calls):
        return f"`{name}` of {path} is shared, stacked or computed, not its own stored variable"
    assert value is not None
    spans = [
        (a.step, b.step)
        for i, _ in calls
        for a, b in zip(model.flow.marks[i, "in"], model.flow.marks[i, "out"], strict=True)
    ]
    own = {m.step for m in marks}
    for step in model.flow.readers[value]:
        if step not in own and not any(a < step < b for a, b in spans):
            return f"`{name}` of {path} is also read by {_text(model, step)}"
    return f"`{name}` of {path} is also returned" if value in model.flow.outputs else None


def _apart(model: Model, first: str, second: str) -> str | None:
    """Why the output of the first is not all that the second gets, and only its."""
    flow = model.flow
    outs, ins = model.marks(first, "out"), model.marks(second, "in")
    made, steps = {m.made for m in outs}, {m.step for m in ins}
    for m in ins:
        if m.read not in made:
            return f"the input of {second} comes from {_text(model, flow.maker.get(m.read))}"
    for value in made:
        if value in flow.outputs:
            return f"the output of {first} is also an output of the model"
        for step in flow.readers[value]:
            if step not in steps:
                return f"the output of {first} also goes to {_text(model, step)}"
    return None


def _text(model: Model, step: int | None, end: str = "the model's input") -> str:
    if step is None:
        return end
    found = model.flow.marked.get(step)
    return f"`{model.flow.names[step]}`" if found is None else model.calls[found[0]].path
