"""A ResNet-18 and an MLP as users of flax write them, for flax.linen and for flax.nnx.

`with_bnjax` is this source with the two imports of BatchNorm changed, and nothing else.
"""

import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import linen as nn
from flax import nnx
from flax.linen import BatchNorm as LinenBatchNorm
from flax.nnx import BatchNorm as NNXBatchNorm


class LinenBlock(nn.Module):
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(LinenBatchNorm, use_running_average=not train, momentum=0.9)
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), strides=self.strides)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm(name="norm_skip")(conv((1, 1), strides=self.strides, name="conv_skip")(x))
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    """He et al. (2016), of 18 layers; with the stem for images of 32 x 32 and smaller."""

    width: int = 64
    classes: int = 10

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(LinenBatchNorm(use_running_average=not train, momentum=0.9)(x))
        for stage, strides in enumerate((1, 2, 2, 2)):
            x = LinenBlock(self.width * 2**stage, strides)(x, train)
            x = LinenBlock(self.width * 2**stage)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class LinenMLP(nn.Module):
    hidden: tuple[int, ...] = (64, 64)
    classes: int = 10

    def setup(self):
        self.layers = [nn.Dense(width) for width in self.hidden]
        self.norms = [LinenBatchNorm(momentum=0.9) for _ in self.hidden]
        self.out = nn.Dense(self.classes)

    def __call__(self, x, train):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nn.relu(norm(layer(x), use_running_average=not train))
        return self.out(x)


class NNXBlock(nnx.Module):
    def __init__(self, inputs, features, strides=1, *, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(NNXBatchNorm, features, momentum=0.9, rngs=rngs)
        self.conv1, self.norm1 = conv(inputs, features, (3, 3), strides=strides), norm()
        self.conv2, self.norm2 = conv(features, features, (3, 3)), norm()
        same = strides == 1 and inputs == features
        skip = () if same else (conv(inputs, features, (1, 1), strides=strides), norm())
        self.skip = nnx.Sequential(*skip)

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + self.skip(x))


class NNXResNet(nnx.Module):
    """As LinenResNet."""

    def __init__(self, width=64, classes=10, *, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = NNXBatchNorm(width, momentum=0.9, rngs=rngs)
        blocks, inputs = [], width
        for stage, strides in enumerate((1, 2, 2, 2)):
            features = width * 2**stage
            blocks.append(NNXBlock(inputs, features, strides, rngs=rngs))
            blocks.append(NNXBlock(features, features, rngs=rngs))
            inputs = features
        self.blocks = nnx.Sequential(*blocks)
        self.out = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x):
        x = self.blocks(nnx.relu(self.norm(self.conv(x))))
        return self.out(x.mean((1, 2)))


class NNXMLP(nnx.Module):
    def __init__(self, inputs, hidden=(64, 64), classes=10, *, rngs):
        layers = []
        for features in hidden:
            layers.append(nnx.Linear(inputs, features, rngs=rngs))
            layers.append(NNXBatchNorm(features, momentum=0.9, rngs=rngs))
            layers.append(nnx.relu)
            inputs = features
        self.layers = nnx.Sequential(*layers, nnx.Linear(inputs, classes, rngs=rngs))

    def __call__(self, x):
        return self.layers(x)


class Pure(NamedTuple):
    """A model as functions of its variables, {"params": ..., "batch_stats": ...}."""

    init: Callable  # key -> variables
    apply: Callable  # variables, x, train -> y, batch_stats
    x_shape: tuple[int, ...]


def pure_linen(model, x_shape):
    def init(key):
        return model.init(key, jax.numpy.ones(x_shape), True)

    def apply(variables, x, train):
        y, new = model.apply(variables, x, train, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return Pure(init, apply, x_shape)


def pure_nnx(make, x_shape):
    graph, *_ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def init(key):
        # Fails if there are other variables.
        _, *states = nnx.split(make(rngs=nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return dict(zip(("params", "batch_stats"), states, strict=True))

    def apply(variables, x, train):
        model = nnx.merge(graph, variables["params"], variables["batch_stats"], copy=True)
        (model.train if train else model.eval)()
        return model(x), nnx.state(model, nnx.BatchStat)

    return Pure(init, apply, x_shape)


ALL = {
    "linen MLP": lambda: pure_linen(LinenMLP(), (64, 20)),
    "linen ResNet-18": lambda: pure_linen(LinenResNet(width=8), (4, 16, 16, 3)),
    "nnx MLP": lambda: pure_nnx(functools.partial(NNXMLP, 20), (64, 20)),
    "nnx ResNet-18": lambda: pure_nnx(functools.partial(NNXResNet, width=8), (4, 16, 16, 3)),
}


@functools.cache
def with_bnjax():
    """This module with the imports changed."""
    path = pathlib.Path(__file__)
    source = path.read_text()
    for api in ("linen", "nnx"):
        before, after = (f"from {package}.{api} import Batch" for package in ("flax", "bnjax"))
        assert source.count(before) == 1
        source = source.replace(before, after)
    spec = importlib.util.spec_from_loader("models_with_bnjax", loader=None, origin=str(path))
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, which linen's modules are, look their module up.
    sys.modules[spec.name] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
