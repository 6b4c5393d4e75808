"""Collectives of a compiled program, from its text."""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
# What a loop runs at least once, and what may not run at all.
PLACES = {"condition": "condition"} | dict.fromkeys(
    ("body", "true_computation", "false_computation", "branch_computations"), "branch"
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
# `-done` is the other half of `-start`.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_ATTRIBUTE = re.compile(r"(\w+)=(\{[^{}]*\}|%?[\w.-]+)")
_NAME = re.compile(r"[\w.-]+")


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its result
    place: str  # "always", or within a "condition" of a loop or a "branch"


def collectives(text: str) -> list[Collective]:
    """Those of the entry computation and of all that it calls, in the order of the text."""
    entry, computations = computations_of(text)
    return _walk(entry, computations, "always")


def computations_of(text: str) -> tuple[str, dict[str, list[str]]]:
    """Name of the entry, and the lines of each computation."""
    entry, computations = "", dict[str, list[str]]()
    lines: list[str] = []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    if not entry:
        raise ValueError("`text` must be that of a compiled program, got no line with ENTRY.")
    return entry, computations


def _walk(name: str, computations: dict[str, list[str]], place: str) -> list[Collective]:
    found = []
    for line in computations[name]:
        match = _COLLECTIVE.search(line)
        if match:
            found.append(Collective(match[2], bytes_of(match[1]), place))
        for attribute, value in _ATTRIBUTE.findall(line):
            inner = place if place == "branch" else PLACES.get(attribute, place)
            for callee in computations.keys() & set(_NAME.findall(value)):
                found += _walk(callee, computations, inner)
    return found


def bytes_of(shape: str) -> int:
    sizes = ((BYTES[kind], dims.split(",")) for kind, dims in _SHAPE.findall(shape))
    return sum(size * math.prod(int(d) for d in dims if d) for size, dims in sizes)
