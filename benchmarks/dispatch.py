"""What one small call costs besides its arithmetic, bnjax's divided by Flax's.

    python benchmarks/dispatch.py            writes results/dispatch.csv
    python benchmarks/dispatch.py --quick    fewer rounds; prints only

The call is that of one layer on float32 of shape 60 x 100. The columns:

- jitted call: the time of one call of the compiled function from Python, with the program's
  run in it.
- eager call: the same without jax.jit, where each operation is one of its own.
- trace, lower, compile: processor time from empty caches.
- together: processor time of the first call from empty caches (trace, lower, compile, run)
  and of 1000 more, added. That is the requirement's number.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs
import results
import timing
from flax import nnx
from layers import EPSILON, Bnjax, Layer, Linen, Nnx, Options
from speed_tables import TRAINING, WORK

import bnjax.linen
import bnjax.nnx

SHAPE = (60, 100)
CALLS = 1000
PHASES = ("trace", "lower", "compile")
TOGETHER = "together"


class BnjaxLinen(Linen):
    name = "bnjax.linen"

    def build(self, o: Options) -> Any:
        variables = super().build(o)
        self.layer = bnjax.linen.BatchNorm(epsilon=EPSILON, momentum=o.momentum)
        return variables


class BnjaxNnx(Nnx):
    name = "bnjax.nnx"

    def build(self, o: Options) -> Any:
        self.nnx = nnx
        layer = bnjax.nnx.BatchNorm(
            o.channels, epsilon=EPSILON, momentum=o.momentum, rngs=nnx.Rngs(0)
        )
        self.graph, *variables = nnx.split(layer, nnx.Param, ...)
        return tuple(variables)


KINDS: tuple[type[Layer], ...] = (Bnjax, BnjaxLinen, BnjaxNnx, Linen, Nnx)
PAIRS = ((Bnjax, Linen), (BnjaxLinen, Linen), (BnjaxNnx, Nnx))


class Call:
    """Of one layer, for one kind of work."""

    def __init__(self, kind: type[Layer], work: str) -> None:
        layer = kind(SHAPE[-1])
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(2)]
        self.arguments = (*layer.variables, *arrays[: 1 + (work == TRAINING)])
        self.eager = functools.partial(programs.PROGRAMS[work], layer)

    def jitted(self) -> Callable[..., Any]:
        """Anew: nothing of it is in a cache."""
        return jax.jit(lambda *arguments: self.eager(*arguments))

    def program(self, function: Callable[..., Any]) -> timing.Calls:
        return timing.Calls(lambda: jax.block_until_ready(function(*self.arguments)))

    def from_empty_caches(self) -> dict[str, float]:
        """Processor seconds of each phase, and of the first call and many more."""
        clock = timing.Clock()
        jax.clear_caches()
        clock.compile(self.jitted(), *self.arguments)
        jax.clear_caches()
        program = self.program(self.jitted())
        clock(TOGETHER, lambda: program(1 + CALLS))
        return clock.seconds


def measured(work: str, rounds: int, seconds: float) -> list[dict[str, str]]:
    """A row for each pair."""
    calls = {kind.name: Call(kind, work) for kind in KINDS}
    columns: dict[str, Mapping[str, list[float]]] = {}
    for column in ("jitted call", "eager call"):
        timed = {
            name: call.program(call.jitted() if column == "jitted call" else call.eager)
            for name, call in calls.items()
        }
        columns[column] = timing.in_turns(timed, rounds=rounds, seconds=seconds)
    compiling = [
        {name: call.from_empty_caches() for name, call in calls.items()} for _ in range(rounds + 1)
    ]
    for phase in (*PHASES, TOGETHER):
        # The first round fills what clear_caches leaves.
        columns[phase] = {name: [run[name][phase] for run in compiling[1:]] for name in calls}
    return [
        {"work": work, "divided": f"{ours.name} / {theirs.name}"}
        | {
            column: str(timing.ratios(times[ours.name], times[theirs.name]))
            for column, times in columns.items()
        }
        for ours, theirs in PAIRS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; prints only")
    quick = parser.parse_args().quick
    rows = []
    for work in WORK:
        for row in measured(work, *((3, 0.05) if quick else (15, 0.2))):
            print(*row.values(), sep="  ", flush=True)
            rows.append(row)
    if not quick:
        results.write("dispatch", rows)


if __name__ == "__main__":
    main()
