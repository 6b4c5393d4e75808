"""Temporary memory of residual networks against the bytes that their training steps move.

    python benchmarks/memory.py [--time]
    python benchmarks/memory.py --platform tpu     # needs libtpu, no TPU
    python benchmarks/memory.py --platform cuda    # needs JAX's CUDA plugin, no GPU

Compiles steps of ResNets with the layers of bnjax and of flax.linen, as they come and with
`nn.remat` and several policies. Writes results/memory-PLATFORM.csv; results/memory-cpu-merged.csv
with a version of jax whose CPU backend merges what is recomputed with its first computation. On
the CPU `--time` also runs the steps in turns, from weights as they are drawn and running statistics
of a few batches, and adds the medians of their ratios to flax's.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import hlo
import jax
import jax.numpy as jnp
import programs
import results
import timing
from residual_nets import STAGES, Recompute, ResNet

import bnjax
import bnjax.linen

PLATFORMS = ("cpu", "tpu", "cuda")
# From this version of jax on the barriers of `jax.checkpoint` outlive XLA's passes for the CPU.
NOT_MERGED = (0, 11, 1)
ROUNDS, SECONDS = 9, 1.0
# Then a running mean of this momentum is near to the batch's.
MOMENTUM, STEPS_BEFORE = 0.9, 30


class Problem(NamedTuple):
    network: str  # of residual_nets.STAGES
    batch: int
    size: int  # of images
    dtype: str


PROBLEMS = {
    "cpu": [Problem("ResNet-18", 16, 32, "float32")],
    "tpu": [Problem("ResNet-10", 256, 32, "bfloat16")],
    "cuda": [Problem("ResNet-18", 512, 32, "bfloat16"), Problem("ResNet-50", 64, 224, "bfloat16")],
}
# What is kept for the backward pass, by the layer, and of how many blocks together.
WAYS: tuple[tuple[str, str, int], ...] = (
    ("flax.linen", "all", 0),
    ("bnjax", "all", 0),
    ("flax.linen", "dots_saveable", 2),
    ("bnjax", "save_inputs", 1),
    ("bnjax", "save_inputs", 2),
    ("bnjax", "save_inputs", 3),
    ("flax.linen", "nothing", 1),
    ("bnjax", "save_moments", 1),
)


POLICIES = {
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "nothing": None,
    "save_inputs": bnjax.save_inputs,
    "save_moments": bnjax.save_moments,
}


class Step(NamedTuple):
    """A loss with its gradients, compiled, and how its arguments are made."""

    program: Any
    init: Callable[..., Any]


def network(problem: Problem, layer: str, kept: str, blocks: int) -> Any:
    kind = {"flax.linen": nn.BatchNorm, "bnjax": bnjax.linen.BatchNorm}[layer]
    kind = functools.partial(kind, momentum=MOMENTUM)
    recompute = None if kept == "all" else Recompute(POLICIES[kept], blocks)
    return ResNet(kind, problem.network, jnp.dtype(problem.dtype), recompute)


def images(problem: Problem) -> Any:
    shape = (problem.batch, problem.size, problem.size, 3)
    return jax.random.normal(jax.random.key(1), shape, jnp.dtype(problem.dtype))


def compiled(platform: str, problem: Problem, *way: Any) -> Step:
    net = network(problem, *way)

    def loss(params: Any, carried: Any, x: jax.Array) -> Any:
        given = {"params": params, "batch_stats": carried}
        y, new = net.apply(given, x, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y.astype(jnp.float32))), new["batch_stats"]

    def init() -> tuple[Any, Any, jax.Array]:
        x = images(problem)
        variables = net.init(jax.random.key(0), x)
        return variables["params"], variables["batch_stats"], x

    sharding = jax.sharding.SingleDeviceSharding(programs.devices(platform)[0])
    arguments = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), jax.eval_shape(init)
    )
    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return Step(function.lower(*arguments).compile(), init)


def counts(program: Any) -> dict[str, int]:
    """Bytes of temporary memory, and moved in all; in branches and loops apart."""
    always, apart = 0, 0
    for kernel in hlo.kernels(program.as_text()):
        moved = kernel.read + kernel.written
        always, apart = (
            (always + moved, apart) if kernel.place == "always" else (always, apart + moved)
        )
    temporary = program.memory_analysis().temp_size_in_bytes
    return {"temporary": temporary, "moved": always, "apart": apart}


def name(platform: str) -> str:
    """Of the results."""
    merged = platform == "cpu" and jax.__version_info__ < NOT_MERGED
    return f"memory-{platform}-merged" if merged else f"memory-{platform}"


def times(steps: list[Step]) -> list[float]:
    """Of each program: the median ratio of its time to that of the first, in turns."""
    calls = {str(i): _call(step) for i, step in enumerate(steps)}
    taken = timing.in_turns(calls, rounds=ROUNDS, seconds=SECONDS)
    return [timing.ratios(taken[name], taken["0"]).median for name in calls]


def _call(step: Step) -> timing.Program:
    """With the running statistics of batches as they come, not those of a new network."""
    params, carried, x = jax.jit(step.init)()
    for _ in range(STEPS_BEFORE):
        (_, carried), _ = step.program(params, carried, x)
    return timing.Calls(lambda: jax.block_until_ready(step.program(params, carried, x)))


def ways(problem: Problem) -> list[tuple[str, str, int]]:
    """Those that differ in networks of so many blocks."""
    most = max(1, *STAGES[problem.network])
    return list(dict.fromkeys((layer, kept, min(blocks, most)) for layer, kept, blocks in WAYS))


def rows(platform: str, problem: Problem, timed: bool, say: Callable[[str], None]) -> Any:
    made, found = [], []
    for way in ways(problem):
        made.append(compiled(platform, problem, *way))
        layer, kept, blocks = way
        counted = counts(made[-1].program)
        first = counted if not found else found[0]
        ratios = {f"{k} / flax": f"{counted[k] / first[k]:.3f}" for k in ("temporary", "moved")}
        row = {**problem._asdict(), "layer": layer, "kept": kept}
        found.append({**row, "together": blocks, **counted, **ratios})
        say(" ".join(map(str, found[-1].values())))
    if timed:
        for row, ratio in zip(found, times(made), strict=True):
            row["time / flax"] = f"{ratio:.2f}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=PLATFORMS, default="cpu")
    parser.add_argument("--time", action="store_true", help="run the steps too, on the CPU")
    arguments = parser.parse_args()
    platform = arguments.platform
    version = programs.version(platform)
    if version is None:
        install = programs.PLATFORMS[platform].install
        print(f"{platform}: skipped, nothing that compiles for it is installed: {install}")
        return
    programs.prepare(platform)
    say = functools.partial(print, flush=True)
    timed = arguments.time and platform == "cpu"
    found = []
    for problem in PROBLEMS[platform]:
        found += rows(platform, problem, timed, say)
        results.write(name(platform), found, also=f"compiled {version}")


if __name__ == "__main__":
    main()
