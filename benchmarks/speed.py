"""Time of flax.linen's layer divided by bnjax's, in training.

    python benchmarks/speed.py

Writes results/speed.csv. One compiled loop of calls for each layer, the two timed
in turns, and the median of their ratios, with the quartiles: the machine's load
then cancels. y is fed back as the next x and dx as the next dy. Absolute times
are not reported.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from flax import linen

import bnjax

SHAPES = ((32, 56, 56, 64), (32, 28, 28, 256), (8192, 1024), (60, 100))
REPEATS = 11
CASES = [(shape, dtype, 0.5, 0.5) for dtype in (jnp.float32, jnp.bfloat16) for shape in SHAPES]
# Where the mean is large flax's variance is wrong. bnjax makes one pass once the running mean
# is near, and two before.
CASES += [(shape, jnp.float32, 10.0, running) for shape in SHAPES[:3] for running in (10.0, 0.0)]

Statistics = tuple[jax.Array, jax.Array]
Layer = Callable[..., tuple[jax.Array, Statistics]]


def of_flax(x: jax.Array, scale: jax.Array, bias: jax.Array, running: Statistics) -> Any:
    layer = linen.BatchNorm(use_running_average=False, dtype=x.dtype)
    statistics = {"mean": running[0], "var": running[1]}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
    y, new = layer.apply(variables, x, mutable=["batch_stats"])
    return y, (new["batch_stats"]["mean"], new["batch_stats"]["var"])


def of_bnjax(x: jax.Array, scale: jax.Array, bias: jax.Array, running: Statistics) -> Any:
    state = bnjax.BNState(*running, jnp.zeros(scale.shape, jnp.int32))
    y, state = bnjax.bn_apply(bnjax.BNParams(scale, bias), state, x, True)
    return y, (state.mean, state.var)


def program(layer: Layer, calls: int, backward: bool) -> Callable[..., Any]:
    """`calls` calls in one compiled loop."""

    def body(_: Any, carry: Any) -> Any:
        x, dy, scale, bias, sums, running = carry
        if not backward:
            y, running = layer(x, scale, bias, running)
            return y, dy, scale, bias, sums, running
        y, vjp, running = jax.vjp(
            lambda x, s, b: layer(x, s, b, running), x, scale, bias, has_aux=True
        )
        dx, *grads = vjp(dy)
        return y, dx, scale, bias, [s + g for s, g in zip(sums, grads, strict=True)], running

    return jax.jit(lambda carry: jax.lax.fori_loop(0, calls, body, carry))


def ratios(
    shape: tuple[int, ...], dtype: Any, mean: float, running: float, backward: bool
) -> np.ndarray:
    rng, channels = np.random.default_rng(0), shape[-1]
    x = jnp.asarray(rng.standard_normal(shape) + mean, dtype)
    dy = jnp.asarray(rng.standard_normal(shape), dtype)
    vectors = [jnp.full(channels, value) for value in (1.0, mean, 0.0, 0.0, running, 1.0)]
    carry = (x, dy, *vectors[:2], vectors[2:4], tuple(vectors[4:]))
    calls = max(5, min(2000, 40_000_000 // x.size))
    programs = [program(layer, calls, backward) for layer in (of_flax, of_bnjax)]
    times: list[list[float]] = []
    for _ in range(REPEATS + 1):
        row = []
        for run in programs:
            began = time.perf_counter()
            jax.block_until_ready(run(carry))
            row.append(time.perf_counter() - began)
        times.append(row)
    measured = np.array(times[1:])  # the first call compiles
    return measured[:, 0] / measured[:, 1]


def cell(values: np.ndarray) -> str:
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    rows = []
    for shape, dtype, mean, running in CASES:
        row = {
            "shape": "x".join(map(str, shape)),
            "dtype": jnp.dtype(dtype).name,
            "mean / deviation": f"{mean:g}",
            "running mean": f"{running:g}",
            "forward": cell(ratios(shape, dtype, mean, running, backward=False)),
            "forward + backward": cell(ratios(shape, dtype, mean, running, backward=True)),
        }
        print(*row.values(), flush=True)
        rows.append(row)
    results.write("speed", rows)


if __name__ == "__main__":
    main()
