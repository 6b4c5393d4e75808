"""Temporary memory of residual networks against the bytes that their training steps move.

    python benchmarks/memory.py [--platform cpu tpu cuda] [--time]

Compiles steps of ResNets with the layers of bnjax and of flax.linen, as they come and with
`nn.remat` and several policies, for the CPU, a TPU v5e and an H100 (none is needed; what is not
installed is skipped with a message). Writes results/memory-PLATFORM.csv. On the CPU `--time`
also runs the steps in turns, and adds the medians of their ratios to flax's.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import hlo
import programs

PLATFORMS = ("cpu", "tpu", "cuda")
ROUNDS = 7


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


def policies() -> dict[str, Any]:
    import jax

    import bnjax

    return {
        "dots_saveable": jax.checkpoint_policies.dots_saveable,
        "nothing": None,
        "save_inputs": bnjax.save_inputs,
        "save_moments": bnjax.save_moments,
    }


def step(problem: Problem, layer: str, kept: str, blocks: int) -> tuple[Any, Any]:
    """A loss with its gradients, and the shapes of its arguments."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from residual_nets import Recompute, ResNet

    import bnjax.linen

    kind = {"flax.linen": nn.BatchNorm, "bnjax": bnjax.linen.BatchNorm}[layer]
    recompute = None if kept == "all" else Recompute(policies()[kept], blocks)
    dtype = jnp.dtype(problem.dtype)
    net = ResNet(kind, problem.network, dtype, recompute)
    x = jax.ShapeDtypeStruct((problem.batch, problem.size, problem.size, 3), dtype)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def loss(params: Any, carried: Any, x: jax.Array) -> Any:
        given = {"params": params, "batch_stats": carried}
        y, new = net.apply(given, x, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y.astype(jnp.float32))), new

    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return function, (variables["params"], variables["batch_stats"], x)


def compiled(platform: str, problem: Problem, *way: Any) -> tuple[Any, Any]:
    """The program, and the shapes of its arguments."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(programs.devices(platform)[0])
    function, shapes = step(problem, *way)
    arguments = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )
    return function.lower(*arguments).compile(), arguments


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


def times(made: list[tuple[Any, Any]]) -> list[float]:
    """Of each program: the median ratio of its time to that of the first, in turns."""
    import jax
    import jax.numpy as jnp

    ratios: list[list[float]] = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        row = []
        for program, shapes in made:
            arguments = jax.block_until_ready(
                jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)
            )
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            row.append(time.perf_counter() - began)
        ratios.append([value / row[0] for value in row])
    return [statistics.median(column) for column in zip(*ratios[1:], strict=True)]


def ways(problem: Problem) -> list[tuple[str, str, int]]:
    """Those that differ in networks of so many blocks."""
    from residual_nets import STAGES

    most = max(1, *STAGES[problem.network])
    return list(dict.fromkeys((layer, kept, min(blocks, most)) for layer, kept, blocks in WAYS))


def rows(platform: str, problem: Problem, timed: bool, say: Callable[[str], None]) -> Any:
    made, found = [], []
    for way in ways(problem):
        program, shapes = compiled(platform, problem, *way)
        layer, kept, blocks = way
        counted = counts(program)
        first = counted if not found else found[0]
        ratios = {f"{k} / flax": f"{counted[k] / first[k]:.3f}" for k in ("temporary", "moved")}
        row = {**problem._asdict(), "layer": layer, "kept": kept}
        found.append({**row, "together": blocks, **counted, **ratios})
        made.append((program, shapes))
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
    import results

    say = functools.partial(print, flush=True)
    timed = arguments.time and platform == "cpu"
    found = []
    for problem in PROBLEMS[platform]:
        found += rows(platform, problem, timed, say)
        results.write(f"memory-{platform}", found, also=f"compiled for {version}")


if __name__ == "__main__":
    main()
