"""Whole models for the measurements, written once: the normalization layer is what differs.

`Net` puts one behind an interface for linen and nnx alike: variables as two pytrees, what is
trained and what is carried, and pure functions of them.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import bnjax.linen
import bnjax.nnx

LINEN = {"bnjax": bnjax.linen.BatchNorm, "flax": nn.BatchNorm}
NNX = {"bnjax": bnjax.nnx.BatchNorm, "flax": nnx.BatchNorm}
CLASSES = 10


class MLP(nn.Module):
    layer: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for size in (100, 100, 100):
            x = nn.Dense(size, use_bias=False)(x)
            x = nn.sigmoid(self.layer(use_running_average=not train)(x))
        return nn.Dense(CLASSES)(x)


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


class ResNet(nn.Module):
    """ResNet-18, with 3 x 3 convolutions first, unless told otherwise."""

    layer: Any
    stages: tuple[int, ...] = (64, 128, 256, 512)  # features
    blocks: int = 2  # of a stage

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layer = functools.partial(self.layer, use_running_average=not train)
        x = nn.relu(layer()(nn.Conv(self.stages[0], (3, 3), use_bias=False)(x)))
        for stage, block in itertools.product(range(len(self.stages)), range(self.blocks)):
            x = Block(layer, self.stages[stage], 2 if stage and not block else 1)(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


# As those of CIFAR-10, with 8 layers.
SmallResNet = functools.partial(ResNet, stages=(16, 32, 64), blocks=1)


class NNXMLP(nnx.Module):
    def __init__(self, layer: Any) -> None:
        rngs = nnx.Rngs(0)
        sizes = (784, 100, 100, 100)
        pairs = list(itertools.pairwise(sizes))
        self.dense = nnx.List([nnx.Linear(a, b, use_bias=False, rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([layer(b, rngs=rngs) for _, b in pairs])
        self.last = nnx.Linear(sizes[-1], CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = nnx.sigmoid(norm(dense(x)))
        return self.last(x)


class NNXConvNet(nnx.Module):
    """Four 3 x 3 convolutions, each normalized."""

    def __init__(self, layer: Any) -> None:
        rngs = nnx.Rngs(0)
        pairs = list(itertools.pairwise((3, 16, 16, 32, 32)))
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), use_bias=False, rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([layer(b, rngs=rngs) for _, b in pairs])
        self.last = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.last(x.mean((1, 2)))


class Net(NamedTuple):
    init: Callable[[jax.Array], tuple[Any, Any]]  # of x, whose shape counts
    apply: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]  # trained, carried, x


def of_linen(model: Callable[[Any], nn.Module], layer: Any) -> Net:
    net = model(layer)

    def init(x: jax.Array) -> tuple[Any, Any]:
        variables = net.init(jax.random.key(0), x, train=False)
        return variables["params"], variables["batch_stats"]

    def apply(trained: Any, carried: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": trained, "batch_stats": carried}
        y, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return Net(init, apply)


def of_nnx(model: Callable[[Any], nnx.Module], layer: Any) -> Net:
    graphs = []

    def init(x: jax.Array) -> tuple[Any, Any]:
        graph, *states = nnx.split(model(layer), nnx.Param, ...)
        graphs[:] = [graph]
        trained, carried = map(nnx.to_pure_dict, states)
        return trained, carried

    def apply(trained: Any, carried: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        net = nnx.merge(graphs[0], nnx.State(trained), nnx.State(carried))
        y = net(x)
        return y, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

    return Net(init, apply)


def gradients(net: Net) -> Callable[..., Any]:
    """Of a loss that needs no labels: `((loss, new carried), gradients)`."""

    def loss(trained: Any, carried: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, carried = net.apply(trained, carried, x)
        return jnp.mean(y * y), carried

    return jax.value_and_grad(loss, has_aux=True)


def step(net: Net, rate: float = 0.1) -> Callable[..., Any]:
    """Of gradient descent on cross entropy: `(new trained, new carried, loss)`."""

    def loss(trained: Any, carried: Any, x: jax.Array, labels: jax.Array) -> Any:
        y, carried = net.apply(trained, carried, x)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(y), labels[:, None], axis=1)
        return -chosen.mean(), carried

    def update(trained: Any, carried: Any, x: jax.Array, labels: jax.Array) -> Any:
        (value, carried), grads = jax.value_and_grad(loss, has_aux=True)(
            trained, carried, x, labels
        )
        trained = jax.tree.map(lambda p, g: p - rate * g, trained, grads)
        return trained, carried, value

    return update
