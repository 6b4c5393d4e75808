"""The paper's network as pure functions: what it computes, its derivative, one step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from training import cross_entropy

import bnjax

UNITS = 100
SHORT = 3  # up to here a loop over the layers is slower than their code one after the other
DEVIATION = 0.1  # of the initial weights: small and Gaussian, as in the paper
MOMENTUM = bnjax.debiased(0.99)
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}
KERNELS = ("first", "others", "last")


class Architecture(NamedTuple):
    """What decides about a program: hidden layers of UNITS units, with or without it.

    `regularized` networks take dropout and penalties from their `Choice`.
    """

    activation: str
    batch_norm: bool
    depth: int = 3
    regularized: bool = False


class Choice(NamedTuple):
    """Numbers in which the networks of one program may differ.

    `dropout` is the share of units left out, after each activation; `l2` and `l1`
    weigh sum(w^2) / 2 and sum(|w|) of all kernels beside the loss.
    """

    rate: Any
    dropout: Any = 0.0
    l2: Any = 0.0
    l1: Any = 0.0


class State(NamedTuple):
    """Kernels, biases or BNParams, and BNState, of all hidden layers in one array."""

    params: dict[str, Any]
    statistics: Any


def create(architecture: Architecture, key: jax.Array, features: int, classes: int) -> State:
    """One network before training; its kernels are those of any architecture of its depth."""
    depth = architecture.depth
    shapes = (features, UNITS), (depth - 1, UNITS, UNITS), (UNITS, classes)
    params: dict[str, Any] = {
        name: DEVIATION * jax.random.normal(k, shape)
        for name, k, shape in zip(KERNELS, jax.random.split(key, 3), shapes, strict=True)
    }
    params["last bias"] = jnp.zeros(classes)
    # Before the normalization a bias would be removed again by the batch mean.
    params["hidden"], statistics = (
        jax.tree.map(lambda v: jnp.stack([v] * depth), bnjax.bn_init(UNITS))
        if architecture.batch_norm
        else (jnp.zeros((depth, UNITS)), ())
    )
    return State(params, statistics)


def forward(
    architecture: Architecture,
    state: State,
    images: jax.Array,
    *,
    train: bool,
    key: jax.Array | None = None,
    dropout: Any = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Logits, the inputs of the last hidden layer's activation, and the new statistics."""
    params, statistics = state
    keys = None if key is None else jax.random.split(key, architecture.depth)
    short = architecture.depth <= SHORT

    def normalized(z: jax.Array, hidden: Any, statistics: Any) -> tuple[jax.Array, Any]:
        if not architecture.batch_norm:
            return z + hidden[None], ()
        options: dict[str, Any] = {"momentum": MOMENTUM, "unbiased": True}
        return bnjax.bn_apply(hidden, statistics, z, train, **options)

    def active(z: jax.Array, key: jax.Array | None) -> jax.Array:
        h = ACTIVATIONS[architecture.activation](z)
        if key is None:
            return h
        kept = jax.random.bernoulli(key, 1 - dropout, h.shape)
        return jnp.where(kept, h / (1 - dropout), 0)

    def layer(z: jax.Array, its: Any) -> tuple[jax.Array, Any]:
        kernel, hidden, statistics, key = its
        return normalized(active(z, key) @ kernel, hidden, statistics)

    first, others = (
        jax.tree.map(lambda v, i=i: v[i], (params["hidden"], statistics))
        for i in (0, slice(1, None))
    )
    z, new = normalized(images @ params["first"], *first)
    before, last = (None, None) if keys is None else (keys[:-1], keys[-1])
    z, news = jax.lax.scan(layer, z, (params["others"], *others, before), unroll=short)
    logits = active(z, last) @ params["last"] + params["last bias"][None]
    statistics = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), new, news)
    return logits, z, statistics


def gradients(
    architecture: Architecture,
    state: State,
    images: jax.Array,
    labels: jax.Array,
    **noise: Any,
) -> tuple[jax.Array, Any, dict[str, Any]]:
    """The loss of a batch in training, the statistics after it, and the derivative."""

    def loss(params: dict[str, Any]) -> tuple[jax.Array, Any]:
        given = state._replace(params=params)
        logits, _, statistics = forward(architecture, given, images, train=True, **noise)
        return cross_entropy(logits, labels), statistics

    (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return value, statistics, grads


def optimizer(architecture: Architecture, choice: Choice) -> optax.GradientTransformation:
    """SGD; penalties concern the kernels alone."""
    sgd = optax.sgd(choice.rate)
    if not architecture.regularized:
        return sgd
    l1 = optax.stateless(
        lambda grads, params: jax.tree.map(lambda g, p: g + choice.l1 * jnp.sign(p), grads, params)
    )

    def kernels(params: dict[str, Any]) -> dict[str, Any]:
        return {name: name in KERNELS for name in params}

    l2 = optax.add_decayed_weights(choice.l2)
    return optax.chain(optax.masked(optax.chain(l2, l1), kernels), sgd)


def step(
    architecture: Architecture,
    state: State,
    choice: Choice,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[State, jax.Array]:
    noise = {"key": key, "dropout": choice.dropout} if architecture.regularized else {}
    loss, statistics, grads = gradients(architecture, state, images, labels, **noise)
    descent = optimizer(architecture, choice)
    # Plain SGD has nothing to remember.
    updates, _ = descent.update(grads, descent.init(state.params), state.params)
    return State(optax.apply_updates(state.params, updates), statistics), loss
