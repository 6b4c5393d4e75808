"""Time of each layer divided by bnjax's, beside the error of its variance.

    python benchmarks/speed.py                20 to 40 minutes; writes results/speed.csv
    python benchmarks/speed.py --quick        minutes: two shapes; prints only
    python benchmarks/speed.py --flax         beside flax.linen only; writes results/speed-flax.csv
    python benchmarks/speed.py --disturbed    again what the results have with a wide spread

timing.py says how. Forward is training without a backward pass; forward + backward has the
gradients of x, scale and bias; evaluation is that with the running statistics. y has the
dtype of x. Running statistics are those of the batch, or those of a new layer ("0").

equinox is in its mode "batch": its default normalizes with the running averages, which is other
work.

torch runs eagerly, in turns with the others, on as many threads as there are cores; the
tensors are made before, and what it allocates is memory that the process keeps.

The variance is the running variance that one batch leaves in a new layer when the old value
has weight 0; its error is the largest relative one, against float64 on the same numbers.
Where a mean is large beside the deviation, a wrong variance is not a result, however fast.

What something else on the machine disturbed is measured again: see disturbed.py.
"""

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import disturbed
import jax
import jax.numpy as jnp
import numpy as np
import programs
import results
import speed_tables
import timing
from jax import lax
from layers import Bnjax, Equinox, EquinoxBatch, Layer, Linen, available
from other_layers import LAYERS, Torch
from results import Rows
from speed_tables import EVALUATION, FORWARD, TRAINING, WORK

CHANNELS_LAST = ((60, 100), (1024, 1024), (8192, 1024), (32, 56, 56, 64), (32, 28, 28, 256),
                 (32, 14, 14, 1024), (32, 7, 7, 2048))  # fmt: skip
CHANNELS_FIRST = ((32, 64, 56, 56), (32, 256, 28, 28))
QUICK = ((1024, 1024), (32, 28, 28, 256))
# Reads and writes of arrays as large as x that streaming kernels cannot do without: forward
# reads x twice and writes y, backward reads x and dy twice and writes dx.
SIZES = {FORWARD: 3, TRAINING: 8, EVALUATION: 2}
PAIR: list[type[Layer]] = [Bnjax, Linen]
MEANS = (10, 1000)  # in deviations, for the error of the variance
COARSEST = 0.1  # distance of two numbers, in deviations


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int
    dtype: Any
    mean: float = 0.5
    near: bool = True  # the running mean to the batch's

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    def batch(self, mean: float, seed: int = 0) -> jax.Array:
        noise = np.random.default_rng(seed).standard_normal(self.shape, np.float32)
        return jnp.asarray(noise + mean, self.dtype)

    def layer(self, kind: type[Layer], momentum: float) -> Layer:
        # equinox takes no bfloat16 beside float32.
        param_dtype = self.dtype if issubclass(kind, Equinox) else jnp.float32
        return kind(
            self.channels,
            momentum=momentum,
            dtype=self.dtype,
            param_dtype=param_dtype,
            axis=self.axis,
        )


class Subject:
    """A layer in a case: with the running statistics that the case asks for."""

    def __init__(self, kind: type[Layer], case: Case) -> None:
        self.case, self.layer = case, case.layer(kind, 0.9)
        self.fresh = case.layer(kind, 0.0)
        self.step = jax.jit(functools.partial(self.fresh.apply, train=True))
        self.variables = self.layer.variables
        if case.near:
            leaves = jax.tree.leaves(self.after(case.batch(case.mean)))
            # In a tree of its own, since that of equinox holds the momentum.
            self.variables = jax.tree.unflatten(jax.tree.structure(self.variables), leaves)
            if isinstance(self.layer, Torch):
                self.layer.layer.load_state_dict(self.fresh.layer.state_dict())

    def after(self, x: jax.Array) -> Any:
        """The variables of a new layer after one batch, where the old value has weight 0."""
        if isinstance(self.fresh, Torch):
            self.fresh.layer.reset_running_stats()
            self.fresh.step(np.asarray(x))
            return None
        return self.step(self.fresh.variables, x)[1]

    def error(self, mean: float) -> float | None:
        """Largest relative one of the variance, at a mean of so many deviations.

        None where numbers of the dtype are too far apart there to have that deviation.
        """
        if mean * float(jnp.finfo(self.case.dtype).eps) > COARSEST:
            return None
        x = self.case.batch(mean)
        var = self.fresh.running(self.after(x))[1].astype(np.float64)
        n = x.size // self.case.channels
        if self.layer.unbiased:
            var = var * (n - 1) / n
        axes = tuple(a for a in range(x.ndim) if a != self.case.axis % x.ndim)
        return float(np.abs(var / np.asarray(x, np.float64).var(axes) - 1).max())

    def program(self, work: str, x: jax.Array, dy: jax.Array) -> timing.Program:
        if isinstance(self.layer, Torch):
            return timing.Calls(of_torch(self.layer, work, np.asarray(x), np.asarray(dy)))
        arrays = (*self.variables, x, *([dy] if work == TRAINING else []))
        function = functools.partial(programs.PROGRAMS[work], self.layer)
        return timing.Loop(lambda given: function(*given), arrays)


def of_torch(layer: Torch, work: str, x: np.ndarray, dy: np.ndarray) -> Callable[[], Any]:
    torch = layer.torch
    x, dy = layer.tensor(x), layer.tensor(dy)
    inputs = [x, *layer.layer.parameters()]

    def forward() -> Any:
        with torch.no_grad():
            return layer.apply(None, x, work != EVALUATION)[0]

    def both() -> Any:
        y, _ = layer.apply(None, x, True)
        return torch.autograd.grad(y, inputs, dy)

    x.requires_grad_(work == TRAINING)
    return both if work == TRAINING else forward


def copied(x: jax.Array) -> jax.Array:
    """A pass that reads x and writes as much, of bits, so that no dtype is slower.

    Not quite a copy: that XLA would leave out.
    """
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return lax.bitwise_not(bits)


class Settings(NamedTuple):
    rounds: int
    seconds: float  # of a turn


def measured(
    case: Case, kinds: Sequence[type[Layer]], works: Sequence[str], settings: Settings
) -> Iterator[dict[str, str]]:
    """A row for each layer and work."""
    notes: dict[str, str] = {}
    subjects = {kind.name: attempt(kind, notes, lambda k=kind: Subject(k, case)) for kind in kinds}
    errors = {
        kind.name: attempt(kind, notes, lambda s=subjects[kind.name]: [*map(s.error, MEANS)])
        for kind in kinds
    }
    x, dy = case.batch(case.mean), case.batch(0, seed=1)
    for work in works:
        timed: dict[str, timing.Program] = {"copy": timing.Loop(copied, x)}
        for kind in kinds:
            subject = subjects[kind.name]
            program = attempt(kind, notes, lambda s=subject, w=work: s.program(w, x, dy))
            timed |= {} if program is None else {kind.name: program}
        times = timing.in_turns(timed, rounds=settings.rounds, seconds=settings.seconds)
        for name in subjects:
            row = labels(case, work, name) | {"note": notes.get(name, "")}
            if name in times:
                row |= cells(case, work, timed[name], times[name], times)
            for mean, error in zip(MEANS, errors[name] or (), strict=False):
                row[f"variance error at {mean}"] = "" if error is None else f"{error:.1e}"
            yield row


def attempt(kind: type[Layer], notes: dict[str, str], run: Callable[[], Any]) -> Any:
    """What `run` returns; None, and a note, where a peer refuses."""
    if kind.name in notes:
        return None
    try:
        return run()
    except Exception as error:  # peers raise what they like
        if kind is Bnjax:
            raise
        notes[kind.name] = f"error ({type(error).__name__})"
        return None


COLUMNS = (
    *("shape", "channels", "dtype", "MB", "mean", "running mean", "work", "layer"),
    *("ratio", "low", "high", "times the limit", "copies", "hoisted"),
    *(f"variance error at {mean}" for mean in MEANS),
    "note",
)


def labels(case: Case, work: str, name: str) -> dict[str, str]:
    values = (
        "x".join(map(str, case.shape)),
        "first" if case.axis == 1 and len(case.shape) > 2 else "last",
        jnp.dtype(case.dtype).name,
        f"{math.prod(case.shape) * jnp.dtype(case.dtype).itemsize / 2**20:.3g}",
        f"{case.mean:g}",
        f"{case.mean:g}" if case.near else "0",
        work,
        name,
    )
    return dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, values, strict=False))


def cells(
    case: Case, work: str, program: timing.Program, own: list[float], times: dict[str, list[float]]
) -> dict[str, str]:
    ratio = timing.ratios(own, times[Bnjax.name])
    passes = timing.ratios(own, times["copy"]).median  # of two sizes each
    row = {
        "ratio": f"{ratio.median:.3f}",
        "low": f"{ratio.low:.3f}",
        "high": f"{ratio.high:.3f}",
        "times the limit": f"{2 * passes / SIZES[work]:.2f}",
    }
    if isinstance(program, timing.Loop):
        row["copies"] = str(program.copies(math.prod(case.shape)))
        row["hoisted"] = str(len(program.outside()))
    return row


def cases(quick: bool) -> Iterator[tuple[Case, bool]]:
    """With whether all peers take part, and in all work."""
    shapes = [(shape, -1) for shape in (QUICK if quick else CHANNELS_LAST)]
    shapes += [] if quick else [(shape, 1) for shape in CHANNELS_FIRST]
    for dtype in (jnp.float32, jnp.bfloat16):
        for shape, axis in shapes:
            yield Case(shape, axis, dtype), True
    # At a large mean flax's variance is wrong, and bnjax makes one pass or more.
    for shape in QUICK[1:] if quick else CHANNELS_LAST[2:5]:
        for near in (True, False):
            yield Case(shape, -1, jnp.float32, 10.0, near), False


def works(everything: bool) -> Sequence[str]:
    return WORK if everything else WORK[:2]


def again(kinds: Sequence[type[Layer]], settings: Settings, group: disturbed.Group) -> Rows:
    """The rows of a group, measured anew."""
    for case, everything in cases(False):
        for work in works(everything):
            if next(iter(disturbed.grouped([labels(case, work, "")]))) == group:
                return list(measured(case, kinds if everything else PAIR, [work], settings))
    raise ValueError(f"No case is {group}.")


def available_layers() -> list[type[Layer]]:
    kinds = list(available([k for k in LAYERS if k is not Equinox] + [EquinoxBatch]))
    if Torch in kinds:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="two shapes, fewer rounds; prints only")
    which.add_argument("--disturbed", action="store_true", help="only what has a wide spread")
    parser.add_argument("--flax", action="store_true", help="beside flax.linen only")
    arguments = parser.parse_args()
    settings = Settings(7, 0.04) if arguments.quick else Settings(15, 0.1)
    name, kinds = ("speed-flax", PAIR) if arguments.flax else ("speed", available_layers())
    timing.keep_memory()
    rows = results.read(name)[0] if arguments.disturbed else []
    for case, everything in [] if arguments.disturbed else cases(arguments.quick):
        for row in measured(case, kinds if everything else PAIR, works(everything), settings):
            print(*row.values(), sep="  ", flush=True)
            rows.append(row)
    if arguments.quick:
        speed_tables.show(rows)
        return
    results.write(name, rows, results.last_level_cache())  # what follows may be stopped
    rows = disturbed.steadier(rows, functools.partial(again, kinds, settings))
    results.write(name, rows, results.last_level_cache())


if __name__ == "__main__":
    main()
