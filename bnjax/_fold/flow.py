"""Which layer feeds which: the data flow of a traced model, from marks in its jaxpr.

A mark is an identity with a name (`jax.ad_checkpoint.checkpoint_name`), put around
the calls of layers while the model is traced. Names of variables and modules say
nothing of who else reads a value; the jaxpr does.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

# Of each only the body is of interest, and it runs once.
_INLINED = ("jit", "remat2", "custom_jvp_call", "custom_vjp_call")
_TRANSPARENT = ("name", "sharding_constraint")
# Part of the key of JAX's caches: each trace is of its own, whatever has been compiled before.
# Made on `import bnjax`, as all that was compiled before a context is made is compiled anew.
trace_of = jax.make_user_context(None)
_MARK = re.compile(r"bnjax\.fold (\d+) (\w+)")


class Mark(NamedTuple):
    """One occurrence of a mark: its step, the value read, the value made."""

    step: int
    read: int
    made: int


def mark(x: Any, call: int, side: str) -> jax.Array:
    """`x`, marked as the `side` of a numbered call."""
    return checkpoint_name(x, f"bnjax.fold {call} {side}")


class Flow:
    """Values and steps of a jaxpr with calls inlined, numbered in order."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Traces `function(*arguments)`, of arrays."""
        closed = jax.make_jaxpr(function)(*arguments)
        self.values = 0
        self.names: list[str] = []
        self.maker: dict[int, int] = {}
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.reads: list[list[int]] = []
        self.makes: list[list[int]] = []
        self.marks: dict[tuple[int, str], list[Mark]] = defaultdict(list)
        self.marked: dict[int, tuple[int, str]] = {}
        self.arguments = [self._new() for _ in closed.jaxpr.invars]
        self.results = self._walk(closed.jaxpr, self.arguments)

    def _new(self) -> int:
        self.values += 1
        return self.values

    def _walk(self, jaxpr: Any, arguments: Sequence[int]) -> list[int]:
        ids = dict(zip(jaxpr.invars, arguments, strict=True))
        ids.update((var, self._new()) for var in jaxpr.constvars)

        def value(atom: Any) -> int:
            # A literal is no variable, and has no maker.
            return self._new() if hasattr(atom, "val") else ids[atom]

        for eqn in jaxpr.eqns:
            reads = [value(atom) for atom in eqn.invars]
            body = _body(eqn)
            if body is not None:
                made = self._walk(body, reads)
            elif eqn.primitive.name in _TRANSPARENT and not _mark_of(eqn):
                made = reads
            else:
                made = self._step(eqn, reads)
            ids.update(zip(eqn.outvars, made, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, reads: list[int]) -> list[int]:
        step = len(self.names)
        self.names.append(eqn.primitive.name)
        made = [self._new() for _ in eqn.outvars]
        self.reads.append(reads)
        self.makes.append(made)
        for read in reads:
            self.readers[read].append(step)
        self.maker.update(dict.fromkeys(made, step))
        found = _mark_of(eqn)
        if found:
            self.marks[found].append(Mark(step, reads[0], made[0]))
            self.marked[step] = found
        return made


def _body(eqn: Any) -> Any:
    if eqn.primitive.name not in _INLINED:
        return None
    body = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    return getattr(body, "jaxpr", body)


def _mark_of(eqn: Any) -> tuple[int, str] | None:
    if eqn.primitive.name != "name":
        return None
    found = _MARK.fullmatch(eqn.params["name"])
    return None if found is None else (int(found[1]), found[2])
