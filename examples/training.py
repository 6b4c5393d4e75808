"""The two networks of train_mlp.py, and the compiled programs that train them."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from data import Dataset
from flax.training import train_state

from bnjax.linen import BatchNorm

ACTIVATIONS = {"sigmoid": nn.sigmoid, "tanh": nn.tanh, "relu": nn.relu, "gelu": nn.gelu}


class MLP(nn.Module):
    """Dense, BatchNorm (optional) and activation for each hidden size; then Dense.

    The layer's bias would be removed again by the batch mean, so it is left out
    where batch normalization follows.
    """

    hidden: tuple[int, ...]
    classes: int
    activation: Callable[[jax.Array], jax.Array]
    batch_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(0.1))
        for units in self.hidden:
            x = dense(units, use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                x = BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
            x = self.activation(x)
        return dense(self.classes)(x).astype(jnp.float32)


class TrainState(train_state.TrainState):
    """Flax's training state with running statistics and the key of the data order."""

    batch_stats: Any
    key: jax.Array


def create_states(
    settings: Any, dataset: Dataset, networks: dict[str, bool]
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
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One step of SGD on one batch; returns the batch's mean cross-entropy as well."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updates.get("batch_stats", state.batch_stats)

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(  # type: ignore[no-untyped-call]
        grads=grads, batch_stats=batch_stats
    )
    return state, loss


def batch_indices(
    key: jax.Array, count: int, epoch: jax.Array, offset: jax.Array, *, steps: int, batch_size: int
) -> jax.Array:
    """Which examples make up the next batches: integers of shape [steps, batch_size].

    Batches are cut from one endless row of permutations of the examples, the
    next of them starting `offset` places into permutation number `epoch`. So
    no example is dropped at the end of an epoch, and the order is a function
    of seed and step alone.
    """
    epochs = -(-(count - 1 + steps * batch_size) // count)  # enough for every offset < count
    order = jax.lax.map(
        lambda e: jax.random.permutation(jax.random.fold_in(key, e), count),
        epoch + jnp.arange(epochs),
    )
    rows = jax.lax.dynamic_slice(order.ravel(), (offset,), (steps * batch_size,))
    return rows.reshape(steps, batch_size)


def train_chunk(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    epoch: jax.Array,
    offset: jax.Array,
    *,
    steps: int,
    batch_size: int,
) -> tuple[TrainState, jax.Array]:
    """Many training steps as one program; returns the mean of their losses as well."""
    batches = batch_indices(
        state.key, len(labels), epoch, offset, steps=steps, batch_size=batch_size
    )

    def body(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        return train_step(state, images[batch], labels[batch])

    state, losses = jax.lax.scan(body, state, batches)
    return state, losses.mean()


def evaluate(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy and number of right answers, with the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).sum()


class Trainer:
    """Both networks' states, the metrics so far, and the compiled programs that advance them."""

    def __init__(self, settings: Any, dataset: Dataset) -> None:
        self.settings = settings
        self.train_data = jax.device_put((dataset.train_images, dataset.train_labels))
        self.test_data = jax.device_put((dataset.test_images, dataset.test_labels))
        networks = {"bn": True, "no-bn": False} if settings.bn else {"no-bn": False}
        self.states = create_states(settings, dataset, networks)
        self.log: dict[str, Any] = {
            "step": 0,
            "metrics": [],
            "seconds": dict.fromkeys(networks, 0.0),
        }
        self._programs: dict[Any, Callable[..., Any]] = {}

    def advance(self) -> None:
        """Train each network up to the next evaluation, and evaluate it."""
        start, batch_size = self.log["step"], self.settings.batch_size
        steps = min(self.settings.eval_every, self.settings.steps - start)
        # Positions are counted in Python's integers, which do not overflow.
        epoch, offset = divmod(start * batch_size, len(self.train_data[1]))
        for name, state in self.states.items():
            run = self._compiled(
                (name, steps),
                partial(train_chunk, steps=steps, batch_size=batch_size),
                (state, *self.train_data, epoch, offset),
                donate=True,
            )
            began = time.perf_counter()
            state, train_loss = jax.block_until_ready(run(state, *self.train_data, epoch, offset))
            self.log["seconds"][name] += time.perf_counter() - began
            self.states[name] = state
            test = self._compiled((name, "test"), evaluate, (state, *self.test_data))
            test_loss, right = test(state, *self.test_data)
            self.log["metrics"].append(
                {
                    "step": start + steps,
                    "network": name,
                    "train_loss": float(train_loss),
                    "test_loss": float(test_loss),
                    "test_accuracy": int(right) / len(self.test_data[1]),
                }
            )
        self.log["step"] = start + steps

    def examples_per_second(self) -> dict[str, float]:
        examples = self.log["step"] * self.settings.batch_size
        return {name: examples / seconds for name, seconds in self.log["seconds"].items()}

    def _compiled(
        self, name: Any, function: Callable[..., Any], args: tuple[Any, ...], donate: bool = False
    ) -> Callable[..., Any]:
        """Compile ahead of the call, which keeps compilation out of the timings."""
        if name not in self._programs:
            jitted = jax.jit(function, donate_argnums=(0,) if donate else ())
            # On a GPU, XLA may pick other kernels in the resumed process, and sums in any order.
            options: dict[str, str | bool] = {
                "xla_gpu_deterministic_ops": True,
                "xla_gpu_autotune_level": "0",
            }
            is_gpu = jax.default_backend() == "gpu"
            self._programs[name] = jitted.lower(*args).compile(options if is_gpu else None)
        return self._programs[name]
