"""How often more than one pass over the data runs while networks train.

    python benchmarks/corrections.py
    python benchmarks/corrections.py --data mnist --data-dir DIR
    python benchmarks/corrections.py --data cifar10 --data-dir DIR

Trains the network of examples/train_mlp.py with its default settings, and the ResNet
with 8 layers of nets.py, in batches of 128 (a batch of fewer than 64 entries never
needs another pass), and makes the first pass over the input of each BatchNorm at each
step once more: another pass runs where it leaves a channel ill-conditioned. Beside it,
what would be if the sums were taken about 0 instead of the running mean, as on a CPU
they are where no channel is ill-conditioned there. Writes results/corrections.csv, in
which the rows of other data sets stay.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import results

import bnjax.linen
from bnjax import _moments, _sums
from bnjax._reduce import Reduction

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import data
from train_mlp import Settings, create_states, train_step
from training import batch_indices

BATCH = 128
RESNET_STEPS = 400
RESNET_RATE = 0.1

# Of each BatchNorm: the conditions of its channels about running mean and 0.
Conditions = list[tuple[jax.Array, jax.Array]]
Step = Callable[[Any, jax.Array, jax.Array], tuple[Any, Conditions]]


class Training(NamedTuple):
    state: Any  # before the first step
    step: Step
    steps: int


def condition(x: jax.Array, near: jax.Array) -> jax.Array:
    """offset**2 / var of each channel, as the first pass finds them."""
    r = Reduction(tuple(range(x.ndim - 1)))
    if _sums.are_few(r, x, None):
        raise ValueError(f"Batches of {len(x)} are summed in another way.")
    first = _moments._pass(r, x, None, near)
    return first.offset**2 / first.var


def conditions(apply: Callable[[], Any]) -> Conditions:
    """Of the layers that the call of a model applies, in order."""
    found: Conditions = []

    def look(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, bnjax.linen.BatchNorm) and context.method_name == "__call__":
            running = layer.get_variable("batch_stats", "mean")
            found.append((condition(args[0], running), condition(args[0], running * 0)))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        apply()
    return found


def mlp(dataset: data.Dataset, settings: Settings) -> Training:
    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Conditions]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        found = conditions(
            lambda: state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        )
        return train_step(state, images, labels)[0], found

    return Training(create_states(settings, dataset, {"bn": True})["bn"], step, settings.steps)


def resnet(dataset: data.Dataset, settings: Settings) -> Training:
    shape = dataset.shape
    if shape is None:
        raise data.DataError(
            f"--data {settings.data}: its features have no image shape, which convolutions need. "
            "Use digits, mnist or cifar10."
        )
    net = nets.of_linen(nets.SmallResNet, bnjax.linen.BatchNorm)
    train = nets.step(net, RESNET_RATE)

    def images_of(flat: jax.Array) -> jax.Array:
        return flat.reshape(len(flat), *shape)

    def step(variables: Any, flat: jax.Array, labels: jax.Array) -> tuple[Any, Conditions]:
        images = images_of(flat)
        found = conditions(lambda: net.apply(*variables, images))
        return train(*variables, images, labels)[:2], found

    variables = net.init(images_of(jnp.asarray(dataset.train_images[:1])))
    return Training(variables, step, RESNET_STEPS)


NETWORKS = {"MLP": mlp, "ResNet-8": resnet}


def observe(name: str, dataset: data.Dataset, settings: Settings) -> Iterator[np.ndarray]:
    """For each layer both conditions of all channels at all steps, [2, steps, C]."""
    state, step, steps = NETWORKS[name](dataset, settings)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    batches = batch_indices(
        jax.random.key(settings.seed),
        len(labels),
        jnp.int32(0),
        jnp.int32(0),
        steps=steps,
        batch_size=settings.batch_size,
    )
    # Called from Python: in a loop XLA's convolutions for the CPU take far longer.
    one = jax.jit(lambda state, batch: step(state, images[batch], labels[batch]))
    found = []
    for batch in batches:
        state, of_layers = one(state, batch)
        found.append(of_layers)
    for layer in zip(*found, strict=True):
        yield np.array([np.stack(about) for about in zip(*layer, strict=True)])


def row(of: np.ndarray) -> dict[str, Any]:
    near, zero = of
    more, about_zero = (~(c <= _sums.WELL_CONDITIONED) for c in (near, zero))
    return {
        "steps": len(near),
        "steps with another pass": f"{more.any(1).mean():.1%}",
        "after the first tenth": f"{more[len(more) // 10 :].any(1).mean():.1%}",
        "steps, if about 0": f"{about_zero.any(1).mean():.1%}",
        "largest mean / deviation": f"{np.sqrt(zero.max()):.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    settings = Settings(data=arguments.data, data_dir=arguments.data_dir, batch_size=BATCH)
    dataset = data.load(settings.data, settings.data_dir)
    rows: list[dict[str, Any]] = []
    if (results.RESULTS / "corrections.csv").exists():
        rows = [row for row in results.read("corrections")[0] if row["data"] != settings.data]
    for name in NETWORKS:
        for number, of in enumerate(observe(name, dataset, settings), start=1):
            rows.append({"network": name, "data": settings.data, "layer": number} | row(of))
            print(*rows[-1].values(), sep="  ", flush=True)
    results.write("corrections", rows)


if __name__ == "__main__":
    main()
