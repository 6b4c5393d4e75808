"""A small MLP, trained on batches of the caller's making, and its accuracy in both modes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import Dataset
from training import batch_indices, cross_entropy

import bnjax
from bnjax.linen import BatchNorm

BATCH_SIZE, STEPS, RATE = 64, 300, 0.05
AVERAGED_FROM = 50  # the step from which on parameters are averaged

Optimizer = Callable[[Any], optax.GradientTransformation]


class MLP(nn.Module):
    """Dense, BatchNorm and relu, three times; then Dense."""

    momentum: float = 0.9
    norm: bnjax.Norm | None = None
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = self.norm or bnjax.batch_norm(momentum=self.momentum)
        for _ in range(3):
            x = nn.Dense(100, use_bias=False)(x)
            x = nn.relu(BatchNorm(use_running_average=not train, norm=norm)(x))
        return nn.Dense(self.classes)(x)


def evaluate(apply: Callable[..., jax.Array], images: jax.Array) -> jax.Array:
    """How bnjax's tools are to call the network."""
    return apply(images, train=False)


class Batches(NamedTuple):
    """Images [batches, size, features], labels [batches, size]."""

    images: np.ndarray
    labels: np.ndarray


class Accuracy(NamedTuple):
    """Of test images normalized with the moments of their batches, and with the running ones."""

    training_mode: float
    evaluation: float


class Evaluation(NamedTuple):
    """Images to evaluate, and the same cut into batches like those of training."""

    images: np.ndarray
    labels: np.ndarray
    batches: Batches

    def accuracy(self, model: MLP, variables: Any) -> Accuracy:
        return Accuracy(*map(float, _accuracy(model, variables, self)))


class Trained(NamedTuple):
    """`averaged`: the mean of the parameters since step AVERAGED_FROM."""

    variables: Any
    averaged: Any


@functools.partial(jax.jit, static_argnames="model")
def _accuracy(model: MLP, variables: Any, test: Evaluation) -> tuple[jax.Array, jax.Array]:
    def in_training_mode(images: jax.Array) -> jax.Array:
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits.argmax(-1)

    answers = jax.lax.map(in_training_mode, test.batches.images)
    logits: Any = model.apply(variables, test.images, train=False)
    return (
        (answers == test.batches.labels).mean(),
        (logits.argmax(-1) == test.labels).mean(),
    )


@functools.partial(jax.jit, static_argnames=("model", "optimizer"))
def _train(
    model: MLP, optimizer: Optimizer, rate: float, key: jax.Array, batches: Batches
) -> Trained:
    variables = model.init(key, batches.images[0], train=False)
    start = optimizer(rate).init(variables["params"])

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        variables, state, averaged = carry
        (images, labels), number = batch

        def loss(params: Any) -> tuple[jax.Array, Any]:
            given = variables | {"params": params}
            logits, updates = model.apply(given, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, labels), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer(rate).update(grads, state, variables["params"])
        params = optax.apply_updates(variables["params"], changes)
        share = 1 / jnp.maximum(number - AVERAGED_FROM + 1, 1)
        averaged = jax.tree.map(lambda a, p: a + (p - a) * share, averaged, params)
        return (updates | {"params": params}, state, averaged), None

    numbers = jnp.arange(len(batches.labels))
    carry = (variables, start, variables["params"])
    (variables, _, averaged), _ = jax.lax.scan(step, carry, (batches, numbers))
    return Trained(variables, averaged)


def momentum_sgd(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def train(
    seed: int,
    batches: Batches,
    *,
    model: MLP | None = None,
    optimizer: Optimizer = momentum_sgd,
    rate: float = RATE,
) -> Trained:
    """One step on each batch."""
    return _train(model or MLP(), optimizer, rate, jax.random.key(seed), batches)


def shuffled(dataset: Dataset, seed: int, steps: int = STEPS, size: int = BATCH_SIZE) -> Batches:
    """Training batches as they should be."""
    key, count = jax.random.key(seed), len(dataset.train_labels)
    indices = np.asarray(_indices(key, count, 0, 0, steps=steps, batch_size=size))
    return Batches(dataset.train_images[indices], dataset.train_labels[indices])


_indices = jax.jit(batch_indices, static_argnames=("count", "steps", "batch_size"))


def of_one_class(
    images: np.ndarray, labels: np.ndarray, seed: int, steps: int, size: int
) -> Batches:
    """Batches of one class each, as read from one folder after the other; all in turn."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    rounds = -(-steps // len(members))
    order = np.concatenate([rng.permutation(len(members)) for _ in range(rounds)])[:steps]
    indices = np.stack([rng.choice(members[c], size, replace=False) for c in order])
    return Batches(images[indices], labels[indices])


def cut(images: np.ndarray, labels: np.ndarray, size: int = BATCH_SIZE) -> Batches:
    """All in batches, in random order, less what is left over."""
    number = len(labels) // size
    order = np.random.default_rng(0).permutation(len(labels))[: number * size]
    indices = order.reshape(number, size)
    return Batches(images[indices], labels[indices])


def evaluation_of(dataset: Dataset, size: int = BATCH_SIZE) -> Evaluation:
    images, labels = dataset.test_images, dataset.test_labels
    return Evaluation(images, labels, cut(images, labels, size))
