"""Batches of 4: batch normalization, renormalization and neither, on digits.

    python benchmarks/small_batches.py

Trains one small network in each way, from the same weights, on the same batches and with
the same optimizer, for several seeds at once. Batches are drawn at random, or all examples
of one batch from one class. Writes results/small-batches.csv: test accuracy in evaluation
mode, mean and standard deviation over the seeds.
"""

import functools
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import data

import bnjax
from bnjax import Norm

HIDDEN = (64, 64)
STEPS, SEEDS = 2000, 10
LEARNING_RATE = 1e-3  # of Adam
# Limits that open as in the paper: not at first, d further than r.
OPENING = (
    optax.linear_schedule(1.0, 3.0, STEPS // 2, transition_begin=STEPS // 10),
    optax.linear_schedule(0.0, 5.0, STEPS // 4, transition_begin=STEPS // 10),
)


class Way(NamedTuple):
    norm: Norm | None
    batch_size: int = 4


WAYS = {
    "no normalization": Way(None),
    "bn_apply": Way(bnjax.batch_norm()),
    "renorm()": Way(bnjax.renorm()),
    "renorm, limits that open": Way(bnjax.renorm(r_max=OPENING[0], d_max=OPENING[1])),
    "bn_apply in batches of 32": Way(bnjax.batch_norm(), 32),
}
KINDS = ("random batches", "batches of one class")


class State(NamedTuple):
    params: Any
    statistics: Any
    optimizer: Any


def batches(labels: np.ndarray, kind: str, size: int, steps: int, seed: int) -> np.ndarray:
    """Which examples make up each batch, [steps, size]."""
    rng = np.random.default_rng(seed)
    if kind == "random batches":
        return rng.integers(len(labels), size=(steps, size))
    of_class = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    classes = rng.integers(len(of_class), size=steps)
    return np.stack([rng.choice(of_class[c], size) for c in classes])


def kernels(dataset: data.Dataset, seed: int) -> list[np.ndarray]:
    widths = (dataset.train_images.shape[1], *HIDDEN, dataset.classes)
    rng = np.random.default_rng(seed)
    return [
        rng.normal(0, (2 / n) ** 0.5, (n, m)).astype(np.float32)
        for n, m in itertools.pairwise(widths)
    ]


def init(norm: Norm | None, kernels: list[jax.Array]) -> tuple[Any, Any]:
    """Parameters and running statistics."""
    layers = [(jnp.zeros(n), None) if norm is None else norm.init(n) for n in HIDDEN]
    params = {
        "kernels": kernels,
        "layers": [params for params, _ in layers],
        "bias": jnp.zeros(kernels[-1].shape[1]),
    }
    return params, [statistics for _, statistics in layers]


def logits(
    norm: Norm | None, params: Any, statistics: Any, x: jax.Array, train: bool
) -> tuple[jax.Array, Any]:
    *kernels, last = params["kernels"]
    new = []
    for kernel, layer, old in zip(kernels, params["layers"], statistics, strict=True):
        x = x @ kernel
        if norm is None:
            x, state = x + layer[None], old
        else:
            x, state = norm.apply(layer, old, x, train)
        x = jax.nn.relu(x)
        new.append(state)
    return x @ last + params["bias"][None], new


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, None, None, 0))
def trained(
    way: str, kernels: list[jax.Array], images: jax.Array, labels: jax.Array, batches: jax.Array
) -> State:
    """The network after a step on each of the batches."""
    norm, optimizer = WAYS[way].norm, optax.adam(LEARNING_RATE)

    def step(state: State, chosen: jax.Array) -> tuple[State, None]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            y, new = logits(norm, params, state.statistics, images[chosen], True)
            losses = optax.softmax_cross_entropy_with_integer_labels(y, labels[chosen])
            return losses.mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(state.params)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), new, moments), None

    params, statistics = init(norm, kernels)
    return jax.lax.scan(step, State(params, statistics, optimizer.init(params)), batches)[0]


def accuracies(way: str, kind: str, steps: int = STEPS, seeds: int = SEEDS) -> np.ndarray:
    """On the test images, in evaluation mode; of each seed."""
    dataset = data.load("digits")
    images, labels = dataset.train_images, dataset.train_labels
    norm, size = WAYS[way]
    chosen = [batches(labels, kind, size, steps, seed) for seed in range(seeds)]
    start = jax.tree.map(lambda *v: np.stack(v), *(kernels(dataset, s) for s in range(seeds)))
    end = trained(way, start, images, labels, np.stack(chosen))
    evaluate = jax.vmap(lambda s: logits(norm, s.params, s.statistics, dataset.test_images, False))
    classes = np.asarray(evaluate(end)[0]).argmax(-1)
    return np.mean(classes == dataset.test_labels, 1)


def rows() -> list[dict[str, Any]]:
    found = []
    for way in WAYS:
        row = {"batches of 4": way}
        for kind in KINDS:
            measured = accuracies(way, kind)
            row[kind] = f"{measured.mean():.1%} ± {measured.std(ddof=1):.1%}"
        found.append(row)
    return found


def main() -> None:
    results.write(
        "small-batches", rows(), f"{STEPS} steps of Adam at {LEARNING_RATE}, {SEEDS} seeds"
    )


if __name__ == "__main__":
    main()
