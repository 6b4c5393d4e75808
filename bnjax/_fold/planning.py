"""Which normalization goes into which layer of a model, and why not; no Flax."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax import _checks
from bnjax._fold import layouts
from bnjax._fold.flow import Flow, Mark
from bnjax._fold.layouts import Affine
from bnjax._fold.models import Map
from bnjax._fold.tracing import Call, difference

# The layer after a normalization gets inputs that are not centred, and errs by 0.6 times their
# means in deviations more. Up to this a float32 result stays within what its sums may err.
_DEVIATIONS = 10
# What a layer computes with; norms may keep more, of other dtypes.
_VALUES = ("kernel", "bias", "mean", "var", "scale")

Pairs = Mapping[str, str] | Iterable[tuple[str, str]]


class Fold(NamedTuple):
    """A normalization, the layer it goes into, and whether it comes before that."""

    layer: str
    norm: str
    before: bool


class Stored(NamedTuple):
    """A variable of a model: its value in the flow, its shape, and who else holds it."""

    value: int
    shape: tuple[int, ...]
    holder: str | None = None


class Model(NamedTuple):
    """What a trace found: the data flow, the calls, and where variables are stored."""

    flow: Flow
    outputs: frozenset[int]
    calls: list[Call]
    stored: dict[tuple[str, str], Stored]  # by path and name
    maps: Mapping[str, Map | str]  # or why there is none

    def paths(self, *, norms: bool) -> list[str]:
        """Paths of the normalizations, or of the other layers, in order of calls."""
        return list(dict.fromkeys(c.path for c in self.calls if (c.layer is None) == norms))

    def call(self, path: str) -> Call:
        """The first call of a layer."""
        return next(c for c in self.calls if c.path == path)

    def marks(self, path: str, side: str) -> list[Mark]:
        """Where calls of `path` are marked."""
        found = (self.flow.marks[i, side] for i, c in enumerate(self.calls) if c.path == path)
        return [m for marks in found for m in marks]


def by_layer(
    model: Model, folds: Iterable[Fold]
) -> dict[str, tuple[Call, list[tuple[Affine, bool]]]]:
    """For each layer that changes, a call of it, and the maps with True for those before it."""
    result: dict[str, tuple[Call, list[tuple[Affine, bool]]]] = {}
    for fold in folds:
        found = model.maps[fold.norm]
        assert isinstance(found, Map)
        affines = result.setdefault(fold.layer, (model.call(fold.layer), []))[1]
        affines.append((found.affine, fold.before))
    return result


def check(model: Model, found: Model, folds: Iterable[Fold]) -> None:
    """Raises ValueError where a call of a folded model is not what its folds are for.

    `model` is of this call, `found` of that of folding.
    """
    called = {call.path for call in model.calls}
    for fold in folds:
        pair = (fold.layer, fold.norm)
        there = [path for path in pair if path in called]
        if not there:
            continue
        if len(there) == 1:
            other = pair[pair.index(there[0]) - 1]
            why: str | None = f"{there[0]!r} is called without {other!r}"
        else:
            why = _refusal(model, fold) or _changed(model, found, fold)
        if why is not None:
            raise ValueError(
                f"{fold.norm!r} is folded into {fold.layer!r}, which does not fit this call: "
                f"{why}. Fix: fold with the arguments of this call."
            )


def _changed(model: Model, found: Model, fold: Fold) -> str | None:
    """What a call sets otherwise than the one of folding did."""
    for path in (fold.layer, fold.norm):
        what = difference(model.call(path), found.call(path))
        if what is not None:
            return f"{path} has another {what}"
    masks = [m.call(fold.layer).layer for m in (model, found)] if fold.before else []
    if masks and not np.array_equal(*(layer.mask for layer in masks if layer is not None)):
        return f"{fold.layer} has another mask"
    return None


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
            if reason is None and before:
                reason = _inaccurate(model, norm)
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
    call, found = model.call(layer), model.maps[norm]
    assert call.layer is not None and isinstance(found, Map)
    if not _checks.is_concrete(call.layer.mask):
        return f"the mask of {layer} is computed in the model"
    return layouts.borders(call.layer.layout, call.parameters["kernel"].shape, found.affine)


def _inaccurate(model: Model, norm: str) -> str | None:
    """Why the layer after it should not take a normalization in unless it is told to."""
    found = model.maps[norm]
    assert isinstance(found, Map)
    if found.deviations is None:
        what = "its statistics are traced, and unknown means may"
    elif found.deviations > _DEVIATIONS:
        what = f"its means of up to {found.deviations:.3g} deviations would"
    else:
        return None
    return f"{what} cost accuracy there, unless `pairs` name it"


def _own(model: Model, path: str) -> str | None:
    """Why a layer cannot be folded whatever is beside it."""
    calls = {i: c for i, c in enumerate(model.calls) if c.path == path}
    for number, call in calls.items():
        if call.why is not None:
            return call.why
        if not model.flow.marks[number, "out"]:
            return f"{path} is called inside a loop, a branch or another transformation"
        values = [v for name, v in call.parameters.items() if name in _VALUES]
        for dtype in (call.dtype, *(v.dtype for v in values)):
            if not jnp.issubdtype(dtype, jnp.floating):
                return f"{path} computes in {dtype}"
    why = _several(model, path, calls)
    if why is not None:
        return why
    for name in model.call(path).parameters:
        why = _variable(model, path, name, calls)
        if why is not None:
            return why
    found = model.maps.get(path)
    return found if isinstance(found, str) else None


def _several(model: Model, path: str, calls: dict[int, Call]) -> str | None:
    """How calls of one path differ, so that no one fold is right for all."""
    if len({(c.layer is None, *c.parameters) for c in calls.values()}) > 1:
        return f"{path} shares its scope with another layer"
    if len({call.dtype for call in calls.values()}) > 1:
        return f"{path} is called with several dtypes"
    differences = (difference(call, model.call(path)) for call in calls.values())
    what = next((d for d in differences if d is not None), None)
    return None if what is None else f"{path} is called again with another {what}"


def _variable(model: Model, path: str, name: str, calls: dict[int, Call]) -> str | None:
    """Whether calls read the stored variable, and no one else does."""
    stored = model.stored.get((path, name))
    marks = [m for number in calls for m in model.flow.marks[number, name]]
    if (
        stored is None
        or any(m.read != stored.value for m in marks)
        or any(c.parameters[name].shape != stored.shape for c in calls.values())
    ):
        return f"`{name}` of {path} is shared, stacked or computed, not its own stored variable"
    if stored.holder is not None:
        return f"`{name}` of {path} is also held by {stored.holder}"
    spans = [
        (a.step, b.step)
        for i in calls
        for a, b in zip(model.flow.marks[i, "in"], model.flow.marks[i, "out"], strict=True)
    ]
    own = {m.step for m in marks}
    for step in model.flow.readers[stored.value]:
        if step not in own and not any(a < step < b for a, b in spans):
            return f"`{name}` of {path} is also read by {_text(model, step)}"
    return f"`{name}` of {path} is also returned" if stored.value in model.outputs else None


def _apart(model: Model, first: str, second: str) -> str | None:
    """Why the output of the first is not all that the second gets, and only its."""
    flow = model.flow
    outs, ins = model.marks(first, "out"), model.marks(second, "in")
    made, steps = {m.made for m in outs}, {m.step for m in ins}
    for m in ins:
        if m.read not in made:
            return f"the input of {second} comes from {_text(model, flow.maker.get(m.read))}"
    for value in made:
        if value in model.outputs:
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
