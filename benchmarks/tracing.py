"""Time to initialise, trace, lower and compile a training step, bnjax's divided by Flax's.

    python benchmarks/tracing.py

Writes results/tracing.csv. Processor time, the two in turns and JAX's caches cleared before
each, medians. The models are written once, the layer is what differs.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import results
from flax import nnx

import bnjax.linen
import bnjax.nnx

REPEATS = 15


class MLP(nn.Module):
    layer: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for size in (100, 100, 100):
            x = nn.Dense(size, use_bias=False)(x)
            x = nn.sigmoid(self.layer(use_running_average=not train)(x))
        return nn.Dense(10)(x)


class Block(nn.Module):
    layer: Any
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(self.layer()(conv((3, 3), self.strides)(x)))
        y = self.layer()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = self.layer()(conv((1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    layer: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layer = functools.partial(self.layer, use_running_average=not train)
        x = nn.relu(layer()(nn.Conv(64, (3, 3), use_bias=False)(x)))
        for stage, block in itertools.product(range(4), range(2)):
            x = Block(layer, 64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class NNXMLP(nnx.Module):
    def __init__(self, layer: Any) -> None:
        rngs = nnx.Rngs(0)
        sizes = (784, 100, 100, 100)
        pairs = list(itertools.pairwise(sizes))
        self.dense = nnx.List([nnx.Linear(a, b, use_bias=False, rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([layer(b, rngs=rngs) for _, b in pairs])
        self.last = nnx.Linear(sizes[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = nnx.sigmoid(norm(dense(x)))
        return self.last(x)


def linen_phases(model: type, x: jax.ShapeDtypeStruct, layer: Any) -> dict[str, float]:
    net = model(layer)
    clock = Clock()
    init = functools.partial(net.init, train=False)
    variables = clock("initialise", lambda: jax.eval_shape(init, jax.random.key(0), x))

    def loss(params: Any, stats: Any, x: jax.Array) -> Any:
        y, new = net.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(y * y), new

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    args = variables["params"], variables["batch_stats"], x
    return clock.rest(lambda: step.trace(*args))


def nnx_phases(model: type, x: jax.ShapeDtypeStruct, layer: Any) -> dict[str, float]:
    clock = Clock()
    net = clock("initialise", lambda: model(layer))
    graph, *states = nnx.split(net, nnx.Param, ...)
    params, stats = map(nnx.to_pure_dict, states)

    def loss(params: Any, stats: Any, x: jax.Array) -> Any:
        net = nnx.merge(graph, *map(nnx.State, (params, stats)))
        y = net(x)
        return jnp.mean(y * y), nnx.state(net, nnx.BatchStat)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return clock.rest(lambda: step.trace(params, stats, x))


class Clock:
    """Processor seconds by phase, each from empty caches."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str, run: Callable[[], Any], *, clear: bool = True) -> Any:
        if clear:
            jax.clear_caches()
        began = time.process_time()
        result = run()
        self.seconds[phase] = time.process_time() - began
        return result

    def rest(self, trace: Callable[[], Any]) -> dict[str, float]:
        traced = self("trace", trace)
        lowered = self("lower", traced.lower, clear=False)
        self("compile", lowered.compile, clear=False)
        return self.seconds


LINEN = (bnjax.linen.BatchNorm, nn.BatchNorm)
NNX = (bnjax.nnx.BatchNorm, nnx.BatchNorm)
CASES = {
    "MLP, linen": (linen_phases, MLP, (60, 784), LINEN),
    "MLP, nnx": (nnx_phases, NNXMLP, (60, 784), NNX),
    "ResNet-18, linen": (linen_phases, ResNet18, (8, 32, 32, 3), LINEN),
}


def main() -> None:
    rows = []
    for name, (phases, model, shape, layers) in CASES.items():
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        runs = [[phases(model, x, layer) for layer in layers] for _ in range(REPEATS + 1)]
        row = {"bnjax / Flax": name}
        for phase in runs[0][0]:
            ratios = [ours[phase] / flax[phase] for ours, flax in runs[1:]]
            row[phase] = f"{statistics.median(ratios):.2f}"
        print(*row.values(), flush=True)
        rows.append(row)
    results.write("tracing", rows)


if __name__ == "__main__":
    main()
