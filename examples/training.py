"""What trains any network: the order of the examples, the compiled programs, the metrics."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from data import Dataset
from options import Settings


class Network(NamedTuple):
    """A network to train: its state before training, and two pure functions of states.

    `step(state, images, labels)` returns the next state and the batch's mean
    loss; `logits(state, images)` are those of evaluation. `state.key` is the key
    of the order of the examples.
    """

    state: Any
    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]
    logits: Callable[[Any, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


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
    state: Any,
    images: jax.Array,
    labels: jax.Array,
    epoch: jax.Array,
    offset: jax.Array,
    *,
    network: Network,
    steps: int,
    batch_size: int,
) -> tuple[Any, jax.Array]:
    """Many training steps as one program; returns the mean of their losses as well."""
    batches = batch_indices(
        state.key, len(labels), epoch, offset, steps=steps, batch_size=batch_size
    )

    def body(state: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        return network.step(state, images[batch], labels[batch])

    state, losses = jax.lax.scan(body, state, batches)
    return state, losses.mean()


def evaluate(
    state: Any, images: jax.Array, labels: jax.Array, *, network: Network
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy and number of right answers, with the running statistics."""
    logits = network.logits(state, images)
    return cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()


class Trainer:
    """All networks' states, the metrics so far, and the compiled programs that advance them."""

    def __init__(self, settings: Settings, dataset: Dataset, networks: dict[str, Network]) -> None:
        self.settings = settings
        self.networks = networks
        self.train_data = jax.device_put((dataset.train_images, dataset.train_labels))
        self.test_data = jax.device_put((dataset.test_images, dataset.test_labels))
        self.states = {name: network.state for name, network in networks.items()}
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
        for name, network in self.networks.items():
            state = self.states[name]
            run = self._compiled(
                (name, steps),
                partial(train_chunk, network=network, steps=steps, batch_size=batch_size),
                (state, *self.train_data, epoch, offset),
                donate=True,
            )
            began = time.perf_counter()
            state, train_loss = jax.block_until_ready(run(state, *self.train_data, epoch, offset))
            self.log["seconds"][name] += time.perf_counter() - began
            self.states[name] = state
            test = self._compiled(
                (name, "test"), partial(evaluate, network=network), (state, *self.test_data)
            )
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
            self._programs[name] = compiled(function, args, donate=donate)
        return self._programs[name]


def compiled(
    function: Callable[..., Any], args: tuple[Any, ...], donate: bool = False
) -> Callable[..., Any]:
    """The program for arguments like these; the first one's buffers may be given away."""
    jitted = jax.jit(function, donate_argnums=(0,) if donate else ())
    # On a GPU, XLA may pick other kernels in the resumed process, and sums in any order.
    options: dict[str, str | bool] = {
        "xla_gpu_deterministic_ops": True,
        "xla_gpu_autotune_level": "0",
    }
    is_gpu = jax.default_backend() == "gpu"
    program: Callable[..., Any] = jitted.lower(*args).compile(options if is_gpu else None)
    return program
