"""Residual networks of flax.linen, for measurements of memory: the layer and what is
recomputed in the backward pass are what differs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

STAGES = {
    "ResNet-10": (1, 1, 1, 1),
    "ResNet-18": (2, 2, 2, 2),
    "ResNet-50": (3, 4, 6, 3),
}
BOTTLENECKS = ("ResNet-50",)


class Recompute(NamedTuple):
    """What `nn.remat` is given, and of how many blocks together, at most those of a stage."""

    policy: Callable[..., bool] | None = None
    blocks: int = 1


class Block(nn.Module):
    """Two convolutions of 3 x 3, or one between two of 1 x 1, around which the input goes."""

    layer: Any
    features: int
    strides: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def normalized(y: jax.Array, features: int, size: int, strides: int = 1) -> jax.Array:
            kernel = (size, size)
            conv = nn.Conv(features, kernel, strides, use_bias=False, dtype=self.dtype)
            return self.layer(dtype=self.dtype)(conv(y))

        if self.bottleneck:
            y = nn.relu(normalized(x, self.features, 1))
            y = nn.relu(normalized(y, self.features, 3, self.strides))
            y = normalized(y, 4 * self.features, 1)
        else:
            y = nn.relu(normalized(x, self.features, 3, self.strides))
            y = normalized(y, self.features, 3)
        if x.shape != y.shape:
            x = normalized(x, y.shape[-1], 1, self.strides)
        return nn.relu(x + y)


class Blocks(nn.Module):
    """Blocks in turn: a part of the network that is recomputed as one."""

    layer: Any
    blocks: tuple[tuple[int, int], ...]  # features and strides
    bottleneck: bool
    dtype: Any
    stem: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.stem:
            size, strides = (7, 2) if self.bottleneck else (3, 1)
            conv = nn.Conv(64, (size, size), strides, use_bias=False, dtype=self.dtype)
            x = nn.relu(self.layer(dtype=self.dtype)(conv(x)))
            if self.bottleneck:
                x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for features, strides in self.blocks:
            x = Block(self.layer, features, strides, self.bottleneck, self.dtype)(x)
        return x


class ResNet(nn.Module):
    """Of basic blocks, for small images; ResNet-50 of bottlenecks."""

    layer: Any
    network: str  # in STAGES
    dtype: Any
    recompute: Recompute | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = functools.partial(self.layer, use_running_average=False)
        part = Blocks if self.recompute is None else nn.remat(Blocks, policy=self.recompute.policy)
        bottleneck = self.network in BOTTLENECKS
        x = part(layer, (), bottleneck, self.dtype, stem=True)(x)
        for stage, number in enumerate(STAGES[self.network]):
            blocks = [(64 * 2**stage, 2 if stage and not i else 1) for i in range(number)]
            size = self.recompute.blocks if self.recompute else number
            for first in range(0, number, size):
                x = part(layer, tuple(blocks[first : first + size]), bottleneck, self.dtype)(x)
        return nn.Dense(1000, dtype=self.dtype)(x.mean((1, 2)))
