"""Collectives and memory traffic of a compiled program, from its text."""

import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterator
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
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
# What a loop runs at least once, and what may not run at all.
PLACES = {"condition": "condition"} | dict.fromkeys(
    ("body", "true_computation", "false_computation", "branch_computations"), "branch"
)
# What moves nothing, or passes arrays on; of custom calls, by their target.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
FREE |= {"optimization-barrier", "partition-id", "replica-id", "async-done", "async-update"}
FREE_TARGETS = ("ConcatBitcast", "AllocateBuffer")
# What runs other computations, whose kernels are counted in place of it.
CALLS = {"while", "call", "async-start"}
SLICES = ("slice", "dynamic-slice", "gather")
UPDATE = "dynamic-update-slice"

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
# `-done` is the other half of `-start`.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_ATTRIBUTE = re.compile(r"(\w+)=(\{[^{}]*\}|%?[\w.-]+)")
_NAME = re.compile(r"[\w.-]+")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_OPERAND = re.compile(r"%([\w.-]+)")
_END_OF_OPERANDS = re.compile(r"\)(?:, \w+=|$)")

Computations = dict[str, list[str]]


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its result
    place: str  # "always", or within a "condition" of a loop or a "branch" of its own


class Kernel(NamedTuple):
    """What runs as one: a fusion, a custom call, an operation that was left alone."""

    kind: str  # its operation: "fusion", "custom-call", "copy" ...
    read: int  # bytes of main memory
    written: int
    place: str  # as of a Collective; bytes in a loop are those of one round


class Instruction(NamedTuple):
    root: bool
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    line: str


def collectives(text: str) -> list[Collective]:
    """Those of the entry computation and of all that it calls, in the order of the text."""
    entry, computations = computations_of(text)
    return _walk(entry, computations, "always")


def computations_of(text: str) -> tuple[str, Computations]:
    """Name of the entry, and the lines of each computation."""
    entry, computations = "", Computations()
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


def _walk(name: str, computations: Computations, place: str) -> list[Collective]:
    found = []
    for line in computations[name]:
        match = _COLLECTIVE.search(line)
        if match:
            found.append(Collective(match[2], bytes_of(match[1]), place))
        if " conditional(" in line:
            branches = [callee for callee, _ in _callees(line, computations, place)]
            found += _of_all_branches([_walk(b, computations, place) for b in branches])
        else:
            for callee, inner in _callees(line, computations, place):
                found += _walk(callee, computations, inner)
    return found


def _of_all_branches(branches: list[list[Collective]]) -> list[Collective]:
    """What each of them has runs whichever is taken; the rest is of a branch."""
    common = functools.reduce(operator.and_, map(Counter, branches))
    others = (c for branch in branches for c in (Counter(branch) - common).elements())
    return [*common.elements(), *(c._replace(place="branch") for c in others)]


def _callees(line: str, computations: Computations, place: str) -> Iterator[tuple[str, str]]:
    """The computations that an instruction names, and the places in which they run."""
    for attribute, value in _ATTRIBUTE.findall(line):
        inner = place if place == "branch" else PLACES.get(attribute, place)
        for callee in computations.keys() & set(_NAME.findall(value)):
            yield callee, inner


def bytes_of(shape: str, memory: bool = False) -> int:
    """Of an array or a tuple; `memory`: of those that lie in main memory only.

    The others have a memory space in their layout, as S(1), the memory on the chip of a TPU.
    What tiles add to an array is not counted.
    """
    return sum(
        BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims, layout in _SHAPE.findall(shape)
        if kind != "token" and not (memory and "S(" in layout)
    )


# --- kernels ---------------------------------------------------------------------------


def kernels(text: str) -> list[Kernel]:
    """All that move data, with the bytes that they read from main memory and write to it.

    A kernel reads each of its operands once, and writes its results; of an operand that it
    only takes slices of it reads those, and of a result that it updates in place it writes
    the update. A `-start` and its `-done` are one. Of the branches of a conditional the one that
    moves least counts, and the others, as one kernel each, with what they move beyond it.
    """
    entry, computations = computations_of(text)
    return list(_kernels(entry, computations, "always"))


def _kernels(name: str, computations: Computations, place: str) -> Iterator[Kernel]:
    known = {i.name: i for i in _instructions(computations[name])}
    for i in known.values():
        if i.operation == "conditional":
            branches = [callee for callee, _ in _callees(i.line, computations, place)]
            yield from _least([list(_kernels(b, computations, place)) for b in branches], place)
        elif i.operation in CALLS:
            for callee, inner in _callees(i.line, computations, place):
                yield from _kernels(callee, computations, inner)
        elif i.operation.endswith("-done") and i.operation not in FREE:
            start = known[i.operands[0]]
            read = _read(start, known, computations)
            if start.operation.startswith(SLICES) and read:
                read = bytes_of(i.shape)
            yield Kernel(start.operation.removesuffix("-start"), read, _memory(i), place)
        elif not (i.operation in FREE or i.operation.endswith("-start") or _is_free_call(i)):
            read, written = _read(i, known, computations), _written(i, known, computations)
            yield Kernel(i.operation, read, written, place)


def _least(branches: list[list[Kernel]], place: str) -> Iterator[Kernel]:
    """Those of the branch that moves least, then what each other one moves beyond it."""
    totals = []
    for branch in branches:
        alike = [k for k in branch if k.place == place]
        totals.append((sum(k.read for k in alike), sum(k.written for k in alike)))
    least = min(range(len(branches)), key=lambda i: sum(totals[i]))
    yield from branches[least]
    for i, branch in enumerate(branches):
        if i != least:
            more = (max(0, a - b) for a, b in zip(totals[i], totals[least], strict=True))
            yield Kernel("branch", *more, "branch")
            yield from (k for k in branch if k.place != place)


def _instructions(lines: list[str]) -> Iterator[Instruction]:
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match:
            root, name, shape, operation, rest = match.groups()
            operands = _OPERAND.findall(_END_OF_OPERANDS.split(rest)[0])
            yield Instruction(bool(root), name, shape, operation, tuple(operands), line)


def _is_free_call(i: Instruction) -> bool:
    return any(f'custom_call_target="{target}"' in i.line for target in FREE_TARGETS)


def _memory(i: Instruction) -> int:
    return bytes_of(i.shape, memory=True)


def _read(i: Instruction, known: dict[str, Instruction], computations: Computations) -> int:
    """Operands are counted once, whether or not they are used twice."""
    total = 0
    fused = _fused(i, computations)
    for operand in dict.fromkeys(i.operands):
        size, index = _memory(known[operand]), i.operands.index(operand)
        if index == 0 and i.operation in SLICES:
            size = min(size, bytes_of(i.shape))
        elif index == 0 and i.operation == UPDATE:
            size = 0
        elif fused:
            size = min(size, _used(fused, index))
        total += size
    return total


def _written(i: Instruction, known: dict[str, Instruction], computations: Computations) -> int:
    total, results = _memory(i), [i]
    fused = {f.name: f for f in _fused(i, computations)}
    if fused:
        known, root = fused, next(f for f in fused.values() if f.root)
        results = [fused[name] for name in root.operands] if root.operation == "tuple" else [root]
    for result in results:
        if result.operation == UPDATE:
            total += bytes_of(known[result.operands[1]].shape) - bytes_of(result.shape)
    return max(total, 0)


def _fused(i: Instruction, computations: Computations) -> list[Instruction]:
    """What a fusion consists of."""
    if i.operation != "fusion":
        return []
    called = re.search(r"calls=%?([\w.-]+)", i.line)
    return list(_instructions(computations[called[1]])) if called else []


def _used(fused: list[Instruction], index: int) -> int:
    """Bytes that a fusion takes at most of its operand of this number."""
    parameter = next(f for f in fused if f" parameter({index})" in f.line)
    total = 0
    for user in fused:
        places = [k for k, name in enumerate(user.operands) if name == parameter.name]
        if places == [0] and user.operation in SLICES:
            total += bytes_of(user.shape)
        elif places and not (places == [0] and user.operation == UPDATE):
            return bytes_of(parameter.shape)
    return total
