"""Times of several programs in turns, as ratios.

A program is a compiled loop of calls of one function `work(given)`. What it avoids:

- Copies. A loop that feeds y back as x makes XLA copy, and more for one layer than for
  another. Here `given` (x, dy, the layer's variables) is passed through the loop unchanged,
  and the results of a call replace those of the call before it, which nobody reads: XLA
  writes them where the old ones were. Full-size copies in the compiled loop are counted;
  those that are made without the loop too are the layer's own.
- Hoisting. Given the same x in each iteration, XLA would take its sums once, before the
  loop. `given` goes through an optimization barrier together with the loop's counter, so
  that it may be another one in each iteration; the barrier costs nothing. What XLA still
  takes out of the loop is counted.
- Drift. Each call gets the same x, dy and variables, so that their sizes stay ordinary, and
  a running mean stays as far away as it was.
- Allocation and first touch. The results' memory is donated from one run of the loop to the
  next. What the loop itself needs, and what torch allocates in each call, comes from memory
  that the process keeps (`keep_memory`).
- Caches. All programs of a case have arrays of the same sizes, and each of its own for its
  results. A case says how large x is: with x, dy, y and dx within the last-level cache it is
  another measurement than with arrays beyond it.

The number of calls is an argument of the loop, chosen so that each turn takes about the same
time. In each round every program has one turn, first another one in each round, and the
ratios are those of times of the same round, so that the machine's load cancels. One round
comes before those that count; of these, all count.
"""

import ctypes
import gc
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import hlo
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST_TURN = 1_000_000  # calls
# What may stand outside of the loop, in the entry computation.
PLUMBING = ("parameter", "constant", "tuple", "get-tuple-element", "while", "bitcast")

_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_DIMENSIONS = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")


class Program(Protocol):
    def __call__(self, calls: int) -> float:
        """Seconds for so many calls."""
        ...


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def keep_memory() -> bool:
    """Tells glibc's malloc never to give memory back; False where there is none.

    Otherwise an array of 32 MB or more is new memory in each call, and to touch it first
    costs more than a layer.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    options = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1))
    done = [mallopt(*option) for option in options]
    return all(done)


class Loop:
    """`work(given)`, any number of times, compiled."""

    def __init__(self, work: Callable[[Any], Any], given: Any) -> None:
        arrays, tree = jax.tree.flatten(given)

        def once(arrays: list[jax.Array]) -> list[jax.Array]:
            results = jax.tree.leaves(work(jax.tree.unflatten(tree, arrays)))
            return [jnp.asarray(leaf) for leaf in results]

        def run(calls: Any, arrays: list[jax.Array], results: list[jax.Array]) -> Any:
            def body(i: Any, _: Any) -> Any:
                return once(lax.optimization_barrier((arrays, i))[0])

            return lax.fori_loop(0, calls, body, results)

        shapes = jax.eval_shape(once, arrays)
        self.results = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        self.arrays = arrays
        lowered = jax.jit(run, donate_argnums=2).lower(np.int32(1), arrays, self.results)
        self.compiled = lowered.compile()
        self.once = once

    def __call__(self, calls: int) -> float:
        number = np.int32(calls)
        began = time.perf_counter()
        self.results = jax.block_until_ready(self.compiled(number, self.arrays, self.results))
        return time.perf_counter() - began

    def copies(self, entries: int) -> int:
        """Copies of at least so many entries in each iteration that the loop is to blame for."""
        inside = copies(self.compiled.as_text(), entries, entry=False)
        if not inside:
            return 0
        alone = jax.jit(self.once).lower(self.arrays).compile().as_text()
        return max(0, inside - copies(alone, entries, entry=True))

    def outside(self) -> list[str]:
        """Operations that XLA took out of the loop."""
        return outside(self.compiled.as_text())


class Calls:
    """`work()`, called from Python."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work

    def __call__(self, calls: int) -> float:
        work = self.work
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - began


class Clock:
    """Processor seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str, run: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = run()
        self.seconds[phase] = time.process_time() - began
        return result

    def compile(self, jitted: Any, *args: Any) -> Any:
        traced = self("trace", lambda: jitted.trace(*args))
        lowered = self("lower", traced.lower)
        return self("compile", lowered.compile)


def in_turns(
    programs: Mapping[str, Program], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds for a call of each program in each round, with turns of about `seconds`."""
    names = list(programs)
    calls = {name: _calls(programs[name], seconds) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                taken = programs[name](calls[name]) / calls[name]
                if number:
                    times[name].append(taken)
    finally:
        if enabled:
            gc.enable()
    return times


def _calls(program: Program, seconds: float) -> int:
    """How many take about so long; at least one."""
    program(1)  # whatever happens only once
    calls = 1
    while calls < LARGEST_TURN:
        taken = min(program(calls), program(calls))  # a pause must not end this too early
        if taken >= seconds / 3:
            return max(1, round(calls * seconds / taken))
        calls = min(LARGEST_TURN, calls * max(2, min(10, int(seconds / max(taken, 1e-9)))))
    return calls


def ratios(times: Sequence[float], others: Sequence[float]) -> Spread:
    """Of times divided by others of the same rounds."""
    if not times or len(times) != len(others):
        sizes = f"{len(times)} and {len(others)}"
        raise ValueError(f"`times` and `others` must be of the same rounds, got {sizes}.")
    return spread([a / b for a, b in zip(times, others, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(np.asarray(values, float), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def operation(line: str) -> tuple[str, int]:
    """Name of an operation in a compiled program, and the entries of its largest result."""
    match = _OPERATION.match(line)
    if not match:
        return "constant", 0  # goes on from the line before
    sizes = (dims.split(",") for dims in _DIMENSIONS.findall(match[1]))
    return match[2], max((math.prod(int(d) for d in dims if d) for dims in sizes), default=0)


def copies(text: str, entries: int, entry: bool) -> int:
    """Those of so many entries or more in a compiled program, with its entry or without."""
    main, computations = hlo.computations_of(text)
    chosen = [lines for name, lines in computations.items() if entry or name != main]
    found = [operation(line) for lines in chosen for line in lines]
    return sum(name in ("copy", "copy-start") and size >= entries for name, size in found)


def outside(text: str) -> list[str]:
    """What the entry of a compiled program does beside running a loop; not to copy a number."""
    main, computations = hlo.computations_of(text)
    found = [operation(line) for line in computations[main]]
    return [name for name, size in found if name not in PLUMBING and (name, size) != ("copy", 1)]
