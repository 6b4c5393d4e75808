"""Bytes that a training step accesses, with and without `bnjax.diagnostics.Monitor`.

    python benchmarks/monitor.py

Writes results/monitor.csv, from the compiled programs alone: nothing is timed.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import hlo
import jax
import jax.numpy as jnp
import optax
import results
from nets import MLP

from bnjax._diagnostics.monitor import Monitor
from bnjax.linen import BatchNorm

EVERY = 100

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLEES = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# These move nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


class Bytes(NamedTuple):
    """Of one step: those always accessed, and those of the branch that records."""

    always: int
    recording: int


class Instruction(NamedTuple):
    name: str
    size: int
    kind: str
    operands: list[str]
    line: str


def in_evaluation(apply: Callable[..., Any], x: jax.Array) -> Any:
    return apply(x, train=False)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for strides, features in ((1, 16), (2, 32)):
            x = nn.Conv(features, (3, 3), strides, use_bias=False)(x)
            x = nn.relu(BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def accessed(text: str) -> Bytes:
    """Operands and results of all instructions of a compiled program, as XLA counts them.

    Of a conditional it counts the branch that accesses most, so that what is rarely done
    looks like what every step does; here the others' is separate.
    """
    entry, computations = hlo.computations_of(text)
    parsed = {name: _parsed(lines) for name, lines in computations.items()}
    always = _count(entry, parsed, min)
    return Bytes(always, _count(entry, parsed, max) - always)


def _parsed(lines: list[str]) -> list[Instruction]:
    found = []
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match:
            name, shape, kind, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
            found.append(Instruction(name, hlo.bytes_of(shape), kind, operands, line))
    return found


def _count(name: str, parsed: dict[str, list[Instruction]], choose: Callable[..., int]) -> int:
    sizes = {i.name: i.size for i in parsed[name]}
    total = 0
    for i in parsed[name]:
        if i.kind in ("while", "call"):
            total += sum(_count(c, parsed, choose) for c in _CALLEES.findall(i.line))
        elif i.kind == "conditional":
            names = re.findall(r"[\w.-]+", _BRANCHES.search(i.line)[1])  # type: ignore[index]
            total += choose(_count(c, parsed, choose) for c in names)
        elif i.kind == "fusion":
            total += _fused(i, sizes, parsed[_CALLEES.findall(i.line)[0]])
        elif i.kind not in _FREE:
            total += i.size + sum(sizes[o] for o in i.operands)
    return total


def _fused(fusion: Instruction, sizes: dict[str, int], inner: list[Instruction]) -> int:
    """Operands and result; where they are only sliced, or updated in place, the slices."""
    total = fusion.size
    own = {i.name: i for i in inner}
    parameters = [i for i in inner if i.kind == "parameter"]
    for parameter in parameters:
        index = int(parameter.line.partition(" parameter(")[2].partition(")")[0])
        parts = [_slice(i, parameter.name, own) for i in inner if parameter.name in i.operands]
        if parts and None not in parts:
            total += sum(part for part in parts if part is not None)
        else:
            total += sizes[fusion.operands[index]]
    return total


def _slice(reader: Instruction, name: str, own: dict[str, Instruction]) -> int | None:
    """What is read of an array by one that takes, or updates, a part of it."""
    if reader.kind in ("slice", "dynamic-slice"):
        return reader.size
    if reader.kind == "dynamic-update-slice" and reader.operands[0] == name:
        return 2 * own[reader.operands[1]].size - reader.size  # the result is no new array
    return None


def step(net: nn.Module, monitor: Monitor | None) -> Callable[..., Any]:
    """A step of training, with the monitor at its end."""
    optimizer = optax.sgd(0.1)

    def run(variables: Any, state: Any, log: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss_fn(params: Any) -> Any:
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, new = net.apply(given, x, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new["batch_stats"]

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(variables["params"], updates)
        variables = {"params": params, "batch_stats": statistics}
        if monitor is not None:
            log = monitor.update(log, variables, x)
        return variables, state, log, loss

    return run


def compiled(net: nn.Module, shape: tuple[int, ...], monitor: Monitor | None) -> Any:
    """The program of a step, for a batch of this shape, that overwrites what it is given."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), False))
    state = jax.eval_shape(optax.sgd(0.1).init, variables["params"])
    log = None if monitor is None else jax.eval_shape(monitor.init, variables)
    program = jax.jit(step(net, monitor), donate_argnums=(0, 1, 2))
    return program.lower(variables, state, log, x, labels).compile()


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "MLP 3 x 100, digits, batch 60": (MLP(BatchNorm), (60, 64)),
    "MLP 3 x 100, MNIST, batch 60": (MLP(BatchNorm), (60, 784)),
    "CNN 16-32, 28 x 28, batch 128": (CNN(), (128, 28, 28, 1)),
}


def row(name: str) -> dict[str, Any]:
    """Bytes of a step of one model, and what the monitor adds, as share of the plain step."""
    net, shape = MODELS[name]
    plain = accessed(compiled(net, shape, None).as_text()).always
    with_monitor = accessed(
        compiled(net, shape, Monitor(net, every=EVERY, call=in_evaluation)).as_text()
    )
    idle = with_monitor.always - plain
    added = (idle + with_monitor.recording / EVERY) / plain
    return {
        "model": name,
        "step": plain,
        "added to each step": idle,
        "added by a record": with_monitor.recording,
        f"on average, every={EVERY}": f"{added:.2%}",
    }


def main() -> None:
    results.write("monitor", [row(name) for name in MODELS])


if __name__ == "__main__":
    main()
