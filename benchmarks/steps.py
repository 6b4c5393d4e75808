"""Time of a whole training step with Flax's layer, divided by that with bnjax's.

    python benchmarks/steps.py            writes results/steps.csv
    python benchmarks/steps.py --quick    fewer rounds; prints only

Forward, backward and gradient descent on cross entropy, compiled, of the models in nets.py;
the layer is what differs. Each step begins with the same weights, images and running
statistics, those of a net that has had 10 such steps: timing.py says why.

Steps of the MLP are in a compiled loop. Those with convolutions are called from Python: in a
loop XLA's convolutions for the CPU took about a hundred times as long, so that nothing else
would be measured.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import results
import timing

# Name, model, layers and shape of the images.
CASES: dict[str, tuple[Callable[..., nets.Net], Any, dict[str, Any], tuple[int, ...]]] = {
    "MLP 784-100-100-100-10, linen": (nets.of_linen, nets.MLP, nets.LINEN, (60, 784)),
    "MLP 784-100-100-100-10, nnx": (nets.of_nnx, nets.NNXMLP, nets.NNX, (60, 784)),
    "ResNet-8, linen": (nets.of_linen, nets.SmallResNet, nets.LINEN, (32, 32, 32, 3)),
    "4 convolutions, nnx": (nets.of_nnx, nets.NNXConvNet, nets.NNX, (32, 32, 32, 3)),
}
STEPS_BEFORE = 10


def data(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random(shape, np.float32))
    return x, jnp.asarray(rng.integers(0, nets.CLASSES, shape[0]))


def program(net: nets.Net, shape: tuple[int, ...]) -> timing.Program:
    """In a compiled loop; called from Python where there are convolutions."""
    x, labels = data(shape)
    step = nets.step(net)
    one = jax.jit(step)
    variables = jax.jit(net.init)(x)
    for _ in range(STEPS_BEFORE):
        variables = one(*variables, x, labels)[:2]
    given = (*variables, x, labels)
    if len(shape) > 2:
        return timing.Calls(lambda: jax.block_until_ready(one(*given)))
    return timing.Loop(lambda given: step(*given), given)


def measured(name: str, rounds: int, seconds: float) -> dict[str, str]:
    of, model, layers, shape = CASES[name]
    programs = {key: program(of(model, layer), shape) for key, layer in layers.items()}
    times = timing.in_turns(programs, rounds=rounds, seconds=seconds)
    ratio = timing.ratios(times["flax"], times["bnjax"])
    return {
        "step": name,
        "images": "x".join(map(str, shape)),
        "ratio": f"{ratio.median:.3f}",
        "low": f"{ratio.low:.3f}",
        "high": f"{ratio.high:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; prints only")
    quick = parser.parse_args().quick
    timing.keep_memory()
    rows = []
    for name in CASES:
        rows.append(measured(name, *((7, 0.2) if quick else (21, 0.5))))
        print(*rows[-1].values(), sep="  ", flush=True)
    if not quick:
        results.write("steps", rows)


if __name__ == "__main__":
    main()
