"""Train a small MLP with and without batch normalization, side by side.

The defaults are the first experiment of Ioffe and Szegedy (2015), "Batch
Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", in small: three sigmoid layers of 100 units, small Gaussian
initial weights, batches of 60, plain SGD. Both networks start from the same
weights and see the same batches. Results go to a run folder (runs/mlp-001 and
so on): metrics.csv, curves.png and checkpoints. A run that was stopped or
killed at any moment continues with --resume, to the same bits.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import options
import script
from data import Dataset
from flax.training import train_state
from training import Network, cross_entropy, over_devices

from bnjax.linen import BatchNorm

ACTIVATIONS = {"sigmoid": nn.sigmoid, "tanh": nn.tanh, "relu": nn.relu, "gelu": nn.gelu}


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    hidden: tuple[int, ...] = (100, 100, 100)
    """Units of each hidden layer."""
    activation: Literal["sigmoid", "tanh", "relu", "gelu"] = "sigmoid"
    """Nonlinearity of the hidden layers."""
    learning_rate: float = 0.5
    batch_size: int = 60
    steps: int = 2000


class MLP(nn.Module):
    """Dense, BatchNorm (optional) and activation for each hidden size; then Dense.

    The layer's bias would be removed again by the batch mean, so it is left out
    where batch normalization follows. `mask` says which examples count in
    training: a boolean for each.
    """

    hidden: tuple[int, ...]
    classes: int
    activation: Callable[[jax.Array], jax.Array]
    batch_norm: bool
    dtype: Any
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        rows = None if mask is None else mask[:, None]
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(0.1))
        for units in self.hidden:
            x = dense(units, use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                x = norm()(x, mask=rows)
            x = self.activation(x)
        return dense(self.classes)(x).astype(jnp.float32)


class TrainState(train_state.TrainState):
    """Flax's training state with running statistics and the key of the data order."""

    batch_stats: Any
    key: jax.Array


def create_states(
    settings: Settings,
    dataset: Dataset,
    networks: dict[str, bool],
    axis_name: str | None = None,
) -> dict[str, TrainState]:
    """States before training, by network name; `networks` says which have batch normalization.

    All networks start with equal kernels, and share the order of the examples.
    """
    models = {
        name: MLP(
            settings.hidden,
            dataset.classes,
            ACTIVATIONS[settings.activation],
            batch_norm,
            jnp.dtype(settings.dtype),
            axis_name,
        )
        for name, batch_norm in networks.items()
    }
    init_key, order_key = jax.random.split(jax.random.key(settings.seed))
    images = dataset.train_images[:1]
    # In one program, which draws and compiles the common kernels only once.
    variables = jax.jit(
        lambda key: {name: model.init(key, images, train=False) for name, model in models.items()}
    )(init_key)
    states = {
        name: TrainState.create(  # type: ignore[no-untyped-call]
            apply_fn=model.apply,
            params=variables[name]["params"],
            tx=optax.sgd(settings.learning_rate),
            batch_stats=variables[name].get("batch_stats", {}),
            key=jnp.copy(order_key),  # each state is donated, with all of its buffers
        )
        for name, model in models.items()
    }
    return {name: state.replace(step=jnp.zeros((), jnp.int32)) for name, state in states.items()}


def train_step(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[TrainState, jax.Array]:
    """One step of SGD on one batch; returns the batch's mean cross-entropy as well."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(
            variables, images, train=True, mask=mask, mutable=["batch_stats"]
        )
        loss = cross_entropy(logits, labels, mask, axis_name)
        return loss, updates.get("batch_stats", state.batch_stats)

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    loss, grads = over_devices((loss, grads), axis_name)
    state = state.apply_gradients(  # type: ignore[no-untyped-call]
        grads=grads, batch_stats=batch_stats
    )
    return state, loss


def logits(state: TrainState, images: jax.Array) -> jax.Array:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, images, train=False)


def networks(
    settings: Settings, dataset: Dataset, axis_name: str | None = None
) -> dict[str, Network]:
    asked = {"bn": True, "no-bn": False} if settings.bn else {"no-bn": False}
    states = create_states(settings, dataset, asked, axis_name)
    step = partial(train_step, axis_name=axis_name)
    return {name: Network(state, step, logits) for name, state in states.items()}


SCRIPT = script.Script(
    name="mlp",
    file=Path(__file__),
    description=__doc__,
    settings=Settings,
    networks=networks,
    check=lambda settings: options.check_sizes("--hidden", settings.hidden),
    title=lambda s: f"MLP {'-'.join(map(str, s.hidden))}, {s.activation}",
    network_words=lambda s: f"hidden layers {' '.join(map(str, s.hidden))}, {s.activation}",
    optimizer_words=lambda s: f"SGD with learning rate {s.learning_rate:g}",
)
main = partial(script.main, SCRIPT)

if __name__ == "__main__":
    sys.exit(main())
