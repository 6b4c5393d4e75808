"""Data-parallel training: every device has the whole state, and a part of each batch.

The three styles of jax differ in who sees what; all compute the same numbers:

    jit        one program over whole arrays, which XLA splits over the devices
    shard_map  a program for one device, over whole arrays that are split for it
    pmap       a program for one device, over a stack of its process's parts

Parts have equal sizes, so a batch is padded to a multiple of the devices; masked
examples count nowhere, neither in losses nor in statistics. What is averaged is
divided by the count of all devices: parts may be of any size, and empty.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import training
from data import Dataset
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from options import Settings
from training import Network

AXIS = "data"
TEST_ROWS = 1000  # test examples that are evaluated at once, which bounds the memory


class Batch(NamedTuple):
    """Examples [rows, features], labels [rows], and which of them are none: mask False."""

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


class Jit:
    """Whole arrays; in the program there is no axis to name."""

    axis_name: str | None = None

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.devices = list(devices)
        self.mesh = Mesh(np.asarray(self.devices), (AXIS,))
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.split = NamedSharding(self.mesh, PartitionSpec(AXIS))

    def padded(self, count: int) -> int:
        return -(-count // len(self.devices)) * len(self.devices)

    def batch(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, size: int) -> Batch:
        """The examples `rows`, padded to `size`; only what this process's devices need is read."""
        indices = np.concatenate([rows, np.zeros(size - len(rows), rows.dtype)])
        mask = np.arange(size) < len(rows)
        return Batch(
            self.spread(size, lambda part: images[indices[part]]),
            self.spread(size, lambda part: labels[indices[part]]),
            self.spread(size, lambda part: mask[part]),
        )

    def spread(self, size: int, read: Callable[[slice], np.ndarray]) -> jax.Array:
        """An array of `size` rows; `read` is asked for those of one device at a time."""
        shape = (size, *read(slice(0, 0)).shape[1:])
        return jax.make_array_from_callback(shape, self.split, lambda index: read(_rows(index)))

    def enter(self, state: Any) -> Any:
        """A state as the programs take it."""
        return state

    def leave(self, state: Any) -> Any:
        """A state as checkpoints have it: whole arrays, on every device."""
        return state

    def compiled(
        self, function: Callable[..., Any], args: tuple[Any, ...], donate: bool
    ) -> Callable[..., Any]:
        """The program for a state and a batch like these; its results are the same everywhere."""
        return training.compiled(function, args, donate=donate, out_shardings=self.everywhere)


class ShardMap(Jit):
    """A part for each device."""

    axis_name = AXIS

    def compiled(
        self, function: Callable[..., Any], args: tuple[Any, ...], donate: bool
    ) -> Callable[..., Any]:
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(),
            check_vma=False,  # gradients are local, as under pmap, and added by the step
        )
        return training.compiled(mapped, args, donate=donate)


class Pmap(Jit):
    """A stack of the parts of this process's devices."""

    axis_name = AXIS

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        super().__init__(devices)
        self.own = [
            device for device in self.devices if device.process_index == jax.process_index()
        ]
        mesh = Mesh(np.asarray(self.own), (AXIS,))
        self.stacked = NamedSharding(mesh, PartitionSpec(AXIS))
        self.on_own = NamedSharding(mesh, PartitionSpec())

    def spread(self, size: int, read: Callable[[slice], np.ndarray]) -> jax.Array:
        places = self.split.addressable_devices_indices_map((size,))
        parts = [read(_rows(places[device])) for device in self.own]
        return jax.device_put(np.stack(parts), self.stacked)

    def enter(self, state: Any) -> Any:
        return replicated(state, self.on_own)

    def leave(self, state: Any) -> Any:
        return replicated(state, self.everywhere)

    def compiled(
        self, function: Callable[..., Any], args: tuple[Any, ...], donate: bool
    ) -> Callable[..., Any]:
        program: Callable[..., Any] = jax.pmap(
            function, axis_name=AXIS, devices=self.devices, in_axes=(None, 0), out_axes=None
        )
        # With several processes there is no compiling ahead, so a call is thrown away.
        jax.block_until_ready(program(*args))
        return program


def _rows(index: tuple[slice, ...] | None) -> slice:
    assert index is not None
    return index[0]


STYLES: dict[str, type[Jit]] = {"jit": Jit, "pmap": Pmap, "shard_map": ShardMap}


def replicated(tree: Any, sharding: NamedSharding) -> Any:
    """The same values on all devices of a sharding; every process gives the same ones."""

    def place(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value)

    return jax.tree.map(place, tree)


def train_step(state: Any, batch: Batch, *, network: Network) -> tuple[Any, jax.Array]:
    return network.step(state, *batch)


def evaluate(state: Any, batch: Batch, **options: Any) -> tuple[jax.Array, jax.Array]:
    return training.evaluate(state, *batch, **options)


class Trainer(training.Trainer):
    """Trains on all devices of all processes, or on those given.

    An epoch has ceil(examples / batch_size) batches, of which the last one may be
    smaller. The order is a function of seed and epoch alone.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        networks: dict[str, Network],
        *,
        style: str,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self.style = STYLES[style](jax.devices() if devices is None else devices)
        super().__init__(settings, dataset, networks)

    def place(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.size = self.style.padded(self.settings.batch_size)
        key = next(iter(self.states.values())).key
        permutation = jax.jit(partial(training.permutation, count=len(dataset.train_labels)))
        self._order = lambda epoch: np.asarray(permutation(key, epoch))
        self._epoch: tuple[int, np.ndarray] | None = None
        self.states = {
            name: replicated(state, self.style.everywhere) for name, state in self.states.items()
        }
        count = len(dataset.test_labels)
        devices = len(self.style.devices)
        size = min(self.style.padded(count), max(TEST_ROWS // devices, 1) * devices)
        self.test_batches = [
            (len(rows), self.style.batch(dataset.test_images, dataset.test_labels, rows, size))
            for rows in np.split(np.arange(count), range(size, count, size))
        ]

    def rows(self, step: int) -> np.ndarray:
        """Which training examples make up the batch of a step, in this order."""
        batch_size = self.settings.batch_size
        epoch, index = divmod(step, -(-len(self.dataset.train_labels) // batch_size))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return self._epoch[1][index * batch_size : (index + 1) * batch_size]

    def train(self, name: str, start: int, steps: int) -> tuple[float, float]:
        state, losses = self.style.enter(self.states[name]), []
        images, labels = self.dataset.train_images, self.dataset.train_labels
        function = partial(train_step, network=self.networks[name])
        for step in range(start, start + steps):
            batch = self.style.batch(images, labels, self.rows(step), self.size)
            if step == start:
                program = self._compiled(name, function, (state, batch), donate=True)
                began = time.perf_counter()
            state, loss = program(state, batch)
            losses.append(loss)
            # One step runs while the next one's batch is read; more would only fill the memory.
            jax.block_until_ready(losses[-2:][0])
        mean = float(np.mean([np.asarray(loss) for loss in losses], dtype=np.float64))
        seconds = time.perf_counter() - began
        self.states[name] = self.style.leave(state)
        return mean, seconds

    def test(self, name: str) -> tuple[float, float]:
        state, count = self.style.enter(self.states[name]), len(self.dataset.test_labels)
        function = partial(evaluate, network=self.networks[name], axis_name=self.style.axis_name)
        program = self._compiled((name, "test"), function, (state, self.test_batches[0][1]))
        loss, right = 0.0, 0
        for examples, batch in self.test_batches:
            mean, correct = program(state, batch)
            loss += float(mean) * examples
            right += int(correct)
        return loss / count, right / count

    def examples(self, steps: int) -> int:
        count, batch_size = len(self.dataset.train_labels), self.settings.batch_size
        epochs, rest = divmod(steps, -(-count // batch_size))
        return epochs * count + rest * batch_size

    def compiled(
        self, function: Callable[..., Any], args: tuple[Any, ...], donate: bool
    ) -> Callable[..., Any]:
        return self.style.compiled(function, args, donate)
