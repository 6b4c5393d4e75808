"""Which activation follows a layer, read off the data flow of the traced model."""

import functools
from typing import Any

import jax

from bnjax._fold.flow import Flow
from bnjax._fold.tracing import signature
from bnjax._models import common
from bnjax._models.common import Program, Subject
from bnjax._observe import Mode

# What reads y before the activation without changing which it is.
_PASSED = (
    *("convert_element_type", "reshape", "copy", "squeeze", "transpose", "broadcast_in_dim"),
    *("reduce_window_max", "reduce_max"),  # of the greatest, which is as well chosen after it
)
# Whose bodies are not looked into.
_OPAQUE = ("scan", "while", "cond", "shard_map")
# The one primitive that reads y, or the pair of them, and the activation it makes.
_KINDS = {"logistic": "sigmoid", "tanh": "tanh", "max": "relu"}


def following(subject: Subject, batch: Any) -> dict[str, str]:
    """Path -> "sigmoid", "tanh" or "relu"; "" for another one, none, or one not found."""
    arguments = jax.tree.map(_shape, (subject.variables, batch))
    key = signature(arguments)
    if key is None:
        return dict.fromkeys(subject.layers, "")
    found = _following(subject.program, _Shapes(arguments, key))
    return {path: found.get(path, "") for path in subject.layers}


class _Shapes:
    """Arguments of a trace, told apart by their signature."""

    def __init__(self, tree: Any, key: Any) -> None:
        self.tree, self.key = tree, key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shapes) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _shape(v: Any) -> Any:
    return jax.ShapeDtypeStruct(jax.numpy.shape(v), jax.numpy.result_type(v))


@functools.lru_cache(64)
def _following(program: Program, shapes: _Shapes) -> dict[str, str]:
    leaves, structure = jax.tree.flatten(shapes.tree)
    paths: list[str] = []

    def run(*arrays: Any) -> list[jax.Array]:
        variables, batch = jax.tree.unflatten(structure, arrays)
        _, seen = common.observed(program, Mode(False, True, marked=True), variables, batch)
        paths[:] = seen
        return [s.relu for s in seen.values()]

    flow = Flow(run, leaves)
    reads = {mark.read: mark for marks in flow.marks.values() for mark in marks}
    found = {}
    for path, result in zip(paths, flow.results, strict=True):
        mark = _mark_behind(flow, result, reads)
        found[path] = "" if mark is None else _reader(flow, mark.made)
    return found


def _mark_behind(flow: Flow, value: int, reads: dict[int, Any]) -> Any:
    """The mark at the nearest value that this one was made from, None for another loop's."""
    seen, queue = {value}, [value]
    while queue:
        current = queue.pop(0)
        if current in reads:
            return reads[current]
        step = flow.maker.get(current)
        if step is None or flow.names[step] in _OPAQUE:
            continue
        new = set(flow.reads[step]) - seen
        seen |= new
        queue += sorted(new)
    return None


def _reader(flow: Flow, value: int) -> str:
    readers = flow.readers.get(value, [])
    names = {flow.names[step] for step in readers}
    if len(names) == 1 and names <= set(_PASSED):
        kinds = {_reader(flow, made) for made in flow.makes[readers[0]]}
        return kinds.pop() if len(readers) == 1 and len(kinds) == 1 else ""
    if names == {"max"} and not all(_beside_constant(flow, step, value) for step in readers):
        return ""
    return _KINDS.get(names.pop(), "") if len(names) == 1 else ""


def _beside_constant(flow: Flow, step: int, value: int) -> bool:
    """Whether all that a step reads besides one value is known without arguments."""
    queue = [other for other in flow.reads[step] if other != value]
    while queue:
        current = queue.pop()
        if current in flow.arguments:
            return False
        queue += flow.reads[flow.maker[current]] if current in flow.maker else []
    return True
