"""What a model is here: its layers by path, a program that observes them, new statistics."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax

from bnjax import _checks
from bnjax._fold import flow
from bnjax._observe import Mode, Seen

Call = Callable[[Any, Any], Any]

# Compiled programs that are kept, each with the model it was compiled for.
PROGRAMS = 32


class Program(NamedTuple):
    """What runs a model on a batch. Static, hashable.

    run(model, call, mode, variables, batch) -> (output, what each layer saw, by path).
    """

    run: Callable[..., tuple[Any, dict[str, Seen]]]
    model: Hashable
    call: Call | None


class Layer(NamedTuple):
    """The running statistics of a layer; `count` and `cov` where they are kept."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array | None  # type: ignore[assignment]  # hides tuple.count, on purpose
    cov: jax.Array | None = None


class Subject(NamedTuple):
    """A model with its variables; of the kind "functional", "linen" or "nnx".

    `replaced(statistics)`: the model, or its variables, with new statistics of the
    layers given by path.
    """

    kind: str
    program: Program
    variables: Any
    layers: dict[str, Layer]
    replaced: Callable[[Mapping[str, Layer]], Any]


class Static:
    """A value as a static argument: equal ones are equal, others are told apart by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return False
        return self.value is other.value or (
            self._hash() is not None and self._hash() == other._hash() and self.value == other.value
        )

    def __hash__(self) -> int:
        found = self._hash()
        return id(self.value) if found is None else found

    def _hash(self) -> int | None:
        try:
            return hash(self.value)
        except TypeError:
            return None


def observed(
    program: Program, mode: Mode, variables: Any, batch: Any
) -> tuple[Any, dict[str, Seen]]:
    """The model's output on a batch, and what its layers saw. Pure, to be compiled."""
    # What is jitted in the model is traced anew, as layers are numbered while traced.
    with flow.trace_of(object()):
        return program.run(program.model, program.call, mode, variables, batch)


def require_values(function: str, **arguments: Any) -> None:
    """Refuse what is traced."""
    for name, tree in arguments.items():
        if not all(map(_checks.is_concrete, jax.tree.leaves(tree))):
            raise TypeError(
                f"`{function}` needs values, got a traced `{name}`. Fix: call it outside of jit."
            )


def fields(layer: Layer) -> dict[str, jax.Array]:
    """By name, those that are kept."""
    return {name: value for name, value in layer._asdict().items() if value is not None}


def require_layers(layers: Mapping[str, Any], where: str, fix: str) -> None:
    """Refuse a model without any."""
    if not layers:
        raise ValueError(f"the model must have batch normalization layers, got none {where}. {fix}")
