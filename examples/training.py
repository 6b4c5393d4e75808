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

    `step(state, images, labels, mask=None)` returns the next state and the mean
    loss of the batch's examples, or of those that the mask says; `logits(state,
    images)` are those of evaluation. `state.key` is the key of the order of the
    examples.
    """

    state: Any
    step: Callable[..., tuple[Any, jax.Array]]
    logits: Callable[[Any, jax.Array], jax.Array]


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """The mean over all examples, or over those that `mask` says: a boolean for each.

    On a mapped axis, which needs a mask, it is this device's share: its sum,
    divided by the count over all devices. The shares add up to the mean, and
    their gradients to its gradient: see `over_devices`.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if mask is None:
        return losses.mean()
    return jnp.where(mask, losses, 0).sum() / over_devices(mask.sum(), axis_name)


def over_devices(tree: Any, axis_name: str | None) -> Any:
    """The sum over the devices of a mapped axis; without one, what is given."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def permutation(key: jax.Array, epoch: jax.Array | int, count: int) -> jax.Array:
    """The order of the examples in an epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)


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
        lambda e: permutation(key, e, count),
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
    state: Any,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    *,
    network: Network,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy and number of right answers, with the running statistics."""
    logits = network.logits(state, images)
    right = logits.argmax(-1) == labels
    if mask is not None:
        right = right & mask
    loss = cross_entropy(logits, labels, mask, axis_name)
    return over_devices((loss, right.sum()), axis_name)


class Trainer:
    """All networks' states, the metrics so far, and the compiled programs that advance them.

    On one device, which holds all of the data. parallel.Trainer differs in where
    states and data are, and so in `place`, `train` and `test`.
    """

    def __init__(self, settings: Settings, dataset: Dataset, networks: dict[str, Network]) -> None:
        self.settings = settings
        self.networks = networks
        self.states = {name: network.state for name, network in networks.items()}
        self.place(dataset)
        self.log: dict[str, Any] = {
            "step": 0,
            "metrics": [],
            "seconds": dict.fromkeys(networks, 0.0),
        }
        self._programs: dict[Any, Callable[..., Any]] = {}

    def place(self, dataset: Dataset) -> None:
        self.train_data = jax.device_put((dataset.train_images, dataset.train_labels))
        self.test_data = jax.device_put((dataset.test_images, dataset.test_labels))

    def advance(self) -> None:
        """Train each network up to the next evaluation, and evaluate it."""
        start = self.log["step"]
        steps = min(self.settings.eval_every, self.settings.steps - start)
        for name in self.networks:
            train_loss, seconds = self.train(name, start, steps)
            self.log["seconds"][name] += seconds
            test_loss, test_accuracy = self.test(name)
            self.log["metrics"].append(
                {
                    "step": start + steps,
                    "network": name,
                    "train_loss": train_loss,
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                }
            )
        self.log["step"] = start + steps

    def train(self, name: str, start: int, steps: int) -> tuple[float, float]:
        """Train a network from step `start`; mean of the losses, and the time in seconds."""
        # Positions are counted in Python's integers, which do not overflow.
        batch_size = self.settings.batch_size
        epoch, offset = divmod(start * batch_size, len(self.train_data[1]))
        args = (self.states[name], *self.train_data, epoch, offset)
        function = partial(
            train_chunk, network=self.networks[name], steps=steps, batch_size=batch_size
        )
        run = self._compiled((name, steps), function, args, donate=True)
        began = time.perf_counter()
        self.states[name], loss = jax.block_until_ready(run(*args))
        return float(loss), time.perf_counter() - began

    def test(self, name: str) -> tuple[float, float]:
        """Mean loss and accuracy on the test data."""
        args = (self.states[name], *self.test_data)
        function = partial(evaluate, network=self.networks[name])
        loss, right = self._compiled((name, "test"), function, args)(*args)
        return float(loss), int(right) / len(self.test_data[1])

    def examples_per_second(self) -> dict[str, float]:
        examples = self.examples(self.log["step"])
        return {name: examples / seconds for name, seconds in self.log["seconds"].items()}

    def examples(self, steps: int) -> int:
        """How many the first steps see."""
        return steps * self.settings.batch_size

    def _compiled(
        self, name: Any, function: Callable[..., Any], args: tuple[Any, ...], donate: bool = False
    ) -> Callable[..., Any]:
        """Compile ahead of the call, which keeps compilation out of the timings."""
        if name not in self._programs:
            self._programs[name] = self.compiled(function, args, donate=donate)
        return self._programs[name]

    def compiled(
        self, function: Callable[..., Any], args: tuple[Any, ...], donate: bool
    ) -> Callable[..., Any]:
        return compiled(function, args, donate=donate)


def compiled(
    function: Callable[..., Any], args: tuple[Any, ...], donate: bool = False, **options_of_jit: Any
) -> Callable[..., Any]:
    """The program for arguments like these; the first one's buffers may be given away."""
    jitted = jax.jit(function, donate_argnums=(0,) if donate else (), **options_of_jit)
    # On a GPU, XLA may pick other kernels in the resumed process, and sums in any order.
    options: dict[str, str | bool] = {
        "xla_gpu_deterministic_ops": True,
        "xla_gpu_autotune_level": "0",
    }
    is_gpu = jax.default_backend() == "gpu"
    program: Callable[..., Any] = jitted.lower(*args).compile(options if is_gpu else None)
    return program
