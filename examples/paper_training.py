"""One program that trains, evaluates or measures many networks at once.

Networks of one architecture differ in seed and in the numbers of `Choice`. All is
mapped over both: arrays of a `State` begin with the axes [seeds, choices].
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from paper_network import Architecture, Choice, State, create, forward, gradients, step
from training import batch_indices, cross_entropy, permutation

BATCH_SIZE = 60


class Keys(NamedTuple):
    """What the seed decides: initial weights, which examples, their order, dropout."""

    weights: Any
    members: Any
    order: Any
    noise: Any


def keys_of(seeds: int) -> Keys:
    """Those of seeds 0, 1 and so on: arrays of shape [seeds]."""
    return Keys(*jax.vmap(lambda s: jax.random.split(jax.random.key(s), 4))(jnp.arange(seeds)).T)


def members(keys: Keys, count: int, examples: int | None) -> jax.Array:
    """The examples that a seed trains on, drawn from all."""
    return permutation(keys.members, 0, count)[:examples]


def create_all(
    keys: Keys, *, architecture: Architecture, choices: int, features: int, classes: int
) -> State:
    """Networks [seeds, choices]; those of one seed start equal."""
    one = jax.vmap(lambda key: create(architecture, key, features, classes))(keys.weights)
    return jax.tree.map(lambda v: jnp.repeat(v[:, None], choices, 1), one)


def train_chunk(
    states: State,
    choices: Choice,
    keys: Keys,
    images: jax.Array,
    labels: jax.Array,
    start: jax.Array,
    epoch: jax.Array,
    offset: jax.Array,
    *,
    architecture: Architecture,
    steps: int,
    examples: int | None,
) -> tuple[State, jax.Array]:
    """Many steps of all networks; returns the means of their losses as well.

    Networks of one seed see the same batches, which are gathered once.
    """
    count = examples or len(labels)

    def of_seed(states: State, keys: Keys) -> tuple[State, jax.Array]:
        batches = batch_indices(
            keys.order, count, epoch, offset, steps=steps, batch_size=BATCH_SIZE
        )
        if examples is not None:
            batches = members(keys, len(labels), examples)[batches]
        train = jax.vmap(functools.partial(step, architecture), in_axes=(0, 0, None, None, None))

        def body(states: State, now: Any) -> tuple[State, jax.Array]:
            batch, number = now
            key = jax.random.fold_in(keys.noise, number)
            return train(states, choices, images[batch], labels[batch], key)

        states, losses = jax.lax.scan(body, states, (batches, start + jnp.arange(steps)))
        return states, losses.mean(0)

    return jax.vmap(of_seed)(states, keys)


class Evaluated(NamedTuple):
    """Of each network: mean cross-entropy, share of right answers."""

    loss: jax.Array
    accuracy: jax.Array


def evaluate(
    states: State,
    keys: Keys,
    images: jax.Array,
    labels: jax.Array,
    *,
    architecture: Architecture,
    examples: int | None = None,
    inputs: bool = False,
) -> tuple[Evaluated, Any]:
    """With the running statistics, on all data or on the examples that each seed trains on.

    With `inputs`, those of the last hidden layer's activation as well: [..., images, UNITS].
    """

    def one(state: State, images: jax.Array, labels: jax.Array) -> tuple[Evaluated, Any]:
        logits, z, _ = forward(architecture, state, images, train=False)
        right = (logits.argmax(-1) == labels).mean()
        return Evaluated(cross_entropy(logits, labels), right), z if inputs else ()

    def of_seed(its: tuple[State, Keys]) -> tuple[Evaluated, Any]:
        states, keys = its
        which: Any = slice(None)
        if examples is not None:
            which = members(keys, len(labels), examples)
        return jax.vmap(one, in_axes=(0, None, None))(states, images[which], labels[which])

    # One seed after the other, as the activations of all together would be large.
    return jax.lax.map(of_seed, (states, keys))


def gradient_norms(
    states: State,
    keys: Keys,
    images: jax.Array,
    labels: jax.Array,
    *,
    architecture: Architecture,
    batches: int = 20,
) -> jax.Array:
    """Norm of the loss's derivative by each hidden layer's kernel: [seeds, choices, depth].

    In training mode; the mean of the norms of so many batches.
    """

    def one(state: State, images: jax.Array, labels: jax.Array) -> jax.Array:
        grads = gradients(architecture, state, images, labels)[2]
        return jnp.concatenate([norm(grads["first"])[None], jax.vmap(norm)(grads["others"])])

    def of_seed(its: tuple[State, Keys]) -> jax.Array:
        states, keys = its
        start, count = jnp.int32(0), len(labels)
        indices = batch_indices(
            keys.order, count, start, start, steps=batches, batch_size=BATCH_SIZE
        )
        each = jax.vmap(one, in_axes=(0, None, None))
        norms = jax.lax.map(lambda batch: each(states, images[batch], labels[batch]), indices)
        return norms.mean(0)

    return jax.lax.map(of_seed, (states, keys))


def norm(v: jax.Array) -> jax.Array:
    """sqrt(sum(v^2)) of numbers whose squares may be too small for float32."""
    largest = jnp.abs(v).max()
    safe = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.square(v / safe).sum())
