"""Time to initialise, trace, lower and compile a training step, bnjax's divided by Flax's.

    python benchmarks/tracing.py

Writes results/tracing.csv. Processor time, the two in turns and JAX's caches cleared before
each, medians. The models are in nets.py. dispatch.py does this for a single layer.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import nets
import results
import timing

REPEATS = 15
CASES: dict[str, tuple[Callable[..., nets.Net], Any, dict[str, Any], tuple[int, ...]]] = {
    "MLP, linen": (nets.of_linen, nets.MLP, nets.LINEN, (60, 784)),
    "MLP, nnx": (nets.of_nnx, nets.NNXMLP, nets.NNX, (60, 784)),
    "ResNet-18, linen": (nets.of_linen, nets.ResNet, nets.LINEN, (8, 32, 32, 3)),
}


def phases(make: Callable[[], nets.Net], x: jax.ShapeDtypeStruct) -> dict[str, float]:
    """Processor seconds by phase."""
    clock = timing.Clock()
    jax.clear_caches()
    variables = []

    def init() -> None:
        net = make()
        variables[:] = net, jax.eval_shape(net.init, x)

    clock("initialise", init)
    net, (trained, carried) = variables
    jax.clear_caches()
    clock.compile(jax.jit(nets.gradients(net)), trained, carried, x)
    return clock.seconds


def measured(name: str, repeats: int) -> dict[str, str]:
    of, model, layers, shape = CASES[name]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    runs: list[dict[str, dict[str, float]]] = []
    for _ in range(repeats + 1):  # the first one fills what clear_caches leaves
        made = {key: functools.partial(of, model, layer) for key, layer in layers.items()}
        runs.append({key: phases(make, x) for key, make in made.items()})
    row = {"bnjax / Flax": name}
    for phase in runs[0]["bnjax"]:
        values = [run["bnjax"][phase] / run["flax"][phase] for run in runs[1:]]
        row[phase] = f"{statistics.median(values):.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    repeats = 3 if parser.parse_args().quick else REPEATS
    rows = []
    for name in CASES:
        rows.append(measured(name, repeats))
        print(*rows[-1].values(), flush=True)
    results.write("tracing", rows)


if __name__ == "__main__":
    main()
