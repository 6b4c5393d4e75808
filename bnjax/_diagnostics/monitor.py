"""What layers see over training, recorded inside the compiled step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _checks, _placement
from bnjax._models import common, kinds
from bnjax._models.common import Layer, Program, Subject
from bnjax._observe import Mode, Seen

# What is recorded of each channel, in the order of a row of the log.
QUANTITIES = ("low", "median", "high", "mean_gap", "log_var_ratio")


class MonitorLog(NamedTuple):
    """What a `Monitor` has recorded: arrays only, of sizes that do not change.

    step: updates so far. interval: of them between records. slot: the row that the next
    record overwrites. order: of the layers' calls, [layers]. steps: that each row is of,
    [capacity], -1 where it is empty. rows: [capacity, quantities * channels of all layers],
    float32.
    """

    step: jax.Array
    interval: jax.Array
    slot: jax.Array
    order: jax.Array
    steps: jax.Array
    rows: jax.Array


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one layer saw in one step. `per_channel`: arrays by name, of its statistics' shape.

    low, median, high: 15th, 50th and 85th percentile of y, the activation's input.
    mean_gap: |batch mean - running mean| / sqrt(running var + epsilon).
    log_var_ratio: log((batch var + epsilon) / (running var + epsilon)).
    All are NaN in channels that saw no entry, or one that is not finite.
    """

    step: int
    layer: str
    per_channel: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def row(self) -> dict[str, Any]:
        """Numbers for a table: medians over channels; of `mean_gap` the root mean square."""
        numbers: dict[str, Any] = {"step": self.step, "layer": self.layer}
        for name, values in self.per_channel.items():
            root = name == "mean_gap"
            numbers[name] = float(np.sqrt(np.mean(values**2)) if root else np.median(values))
        return numbers


class Monitor:
    """Records what batch normalization layers see, every so many steps, inside jit.

    Per channel, of a part of the batch in training mode: the 15th, 50th and 85th percentile
    of y = (x - mean) / sqrt(var + epsilon) * scale + bias, the input of the activation; and
    how far the batch's moments are from the running ones. In other steps nothing of this is
    computed. When the log is full, every second record is dropped and the interval doubled,
    so that it covers the whole run, at half the resolution.

    Call `update` at the end of a step, with the variables that the step returns, and donate
    the log (or carry it in lax.scan). Otherwise XLA copies, in every step, the variables
    that the step overwrites, or the log.

    Args:
      model: a flax.linen module or a function, as in `bnjax.recalibrate`; None for flax.nnx
        modules, which hold their variables and are given in their place in each call.
      every: updates between records, at first.
      examples: at most so many rows of the batch a record looks at, evenly spaced; None for
        all. The gaps have the noise of so many.
      capacity: records to keep, at least 2. The log takes 20 bytes per channel of each.
      call: (apply, batch) -> output, as in `bnjax.recalibrate`.

    Raises:
      TypeError, ValueError: options that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> from bnjax.diagnostics import Monitor
      >>> def model(variables, x):
      ...     return bnjax.bn_apply(*variables, x, train=True)
      >>> monitor = Monitor(model, every=2)
      >>> def step(carry, x):
      ...     (params, state), log = carry
      ...     y, state = model((params, state), x)
      ...     log = monitor.update(log, (params, state), x)
      ...     return ((params, state), log), y.mean()
      >>> variables = bnjax.bn_init(1)
      >>> batches = jnp.arange(24.0).reshape(4, 6, 1)
      >>> carry = variables, monitor.init(variables)
      >>> (variables, log), _ = jax.lax.scan(step, carry, batches)
      >>> for record in monitor.records(log, variables):
      ...     print(record.step, record.layer, record.per_channel["low"].round(2))
      0 1 [-1.02]
      2 1 [-1.02]

    Source: Ioffe & Szegedy (2015), Figure 1 (b) and (c).
    """

    def __init__(
        self,
        model: Any = None,
        *,
        every: int = 100,
        examples: int | None = 64,
        capacity: int = 256,
        call: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        """A monitor as the class describes it."""
        if kinds.is_nnx(model):
            raise TypeError(
                "`model` must be None for nnx modules, which are given in each call, got "
                f"{type(model).__name__}. Fix: Monitor(); monitor.update(log, model, batch)."
            )
        self.model, self.call = model, call
        self.every = _checks.positive("every", every)
        self.examples = None if examples is None else _checks.positive("examples", examples)
        self.capacity = _checks.positive("capacity", capacity)
        if self.capacity < 2:
            raise ValueError("`capacity` must be at least 2, got 1. Fix: capacity=256.")

    def init(self, variables: Any) -> MonitorLog:
        """An empty log.

        Args:
          variables: of the model; for nnx the module itself.

        Returns:
          `MonitorLog`, a tuple of arrays: to be carried, donated and checkpointed.

        Raises:
          TypeError, ValueError: a model without BatchNorm layers, or another kind of model.
        """
        layers = self._subject(variables).layers
        return MonitorLog(
            step=jnp.zeros((), jnp.int32),
            interval=jnp.full((), self.every, jnp.int32),
            slot=jnp.zeros((), jnp.int32),
            order=jnp.zeros(len(layers), jnp.float32),
            steps=jnp.full(self.capacity, -1, jnp.int32),
            rows=jnp.zeros((self.capacity, _width(layers)), jnp.float32),
        )

    def update(self, log: MonitorLog, variables: Any, batch: Any) -> MonitorLog:
        """The log one step later, with a record where one is due. Changes no variables.

        Args:
          log: of `init`, or of the last step.
          variables: those that the step returns; for nnx the module itself.
          batch: that the model takes: an array or a tree of arrays, all with the examples as
            leading axis, unless `examples` is None.

        Returns:
          `MonitorLog` of the same shapes. No derivative flows through it.

        Raises:
          TypeError, ValueError: while tracing, a log of another model, a batch whose arrays
          do not agree.
        """
        subject = self._subject(variables)
        _check_log(log, subject.layers)
        given = lax.stop_gradient((subject.variables, subject.layers, log, batch))
        return _update(subject.program, self.examples, *given)

    def records(self, log: MonitorLog, variables: Any) -> list[Observation]:
        """What is in the log, as NumPy arrays: by step, then by layer.

        Args:
          log: of `update`; not of a running trace.
          variables: as in `init`, which name the layers.

        Returns:
          A list of `Observation(step, layer, per_channel)`, with `row()` for a table; layers
          in the order of their calls.

        Raises:
          TypeError, ValueError: a log of another model.
        """
        layers = self._subject(variables).layers
        _check_log(log, layers)
        kept: MonitorLog = jax.device_get(log)
        ends = np.cumsum([len(QUANTITIES) * layer.mean.size for layer in layers.values()])
        current = np.flatnonzero(~_is_free(kept.steps, kept.interval))
        found = []
        for slot in current[np.argsort(kept.steps[current])]:
            row = np.where(np.isinf(kept.rows[slot]), np.nan, kept.rows[slot])
            parts = np.split(row, ends[:-1])
            of_step = [
                Observation(int(kept.steps[slot]), path, _by_name(part, layer.mean.shape))
                for (path, layer), part in zip(layers.items(), parts, strict=True)
            ]
            found += [of_step[i] for i in np.argsort(kept.order, stable=True)]
        return found

    def _subject(self, variables: Any) -> Subject:
        if self.model is not None:
            return kinds.subject(self.model, variables, self.call)
        if not kinds.is_nnx(variables):
            raise TypeError(
                "`variables` must be the nnx module itself where the monitor has no model, got "
                f"{type(variables).__name__}. Fix: Monitor(model), for linen and functions."
            )
        return kinds.subject(variables, None, self.call)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(
    program: Program,
    examples: int | None,
    variables: Any,
    layers: dict[str, Layer],
    log: MonitorLog,
    batch: Any,
) -> MonitorLog:
    """The log goes through the conditional whole, in which it stays where it is."""

    def recorded(variables: Any, layers: dict[str, Layer], log: MonitorLog, batch: Any) -> Any:
        part = _part(batch, examples)
        _, seen = common.observed(program, Mode(train=True, sampled=True), variables, part)
        parts = [_values(layer, seen.get(path)) for path, layer in layers.items()]
        order = jnp.stack([_place(seen.get(path)) for path in layers]).astype(log.order.dtype)
        return _with(log._replace(order=order), jnp.concatenate(parts))

    due = log.step % log.interval == 0
    log = lax.cond(due, recorded, lambda *given: given[2], variables, layers, log, batch)
    return log._replace(step=log.step + 1)


def _part(batch: Any, examples: int | None) -> Any:
    """At most so many examples, evenly spaced: of a sharded batch, of all devices."""
    if examples is None:
        return batch
    leaves = jax.tree.leaves(batch)
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "`batch` must be arrays with one leading axis, that of the examples, got shapes "
            f"{[leaf.shape for leaf in leaves]}. Fix: only what the model takes, such as "
            "batch['image'], or Monitor(examples=None), which looks at the whole batch."
        )
    ((n,),) = sizes
    step = max(1, -(-n // examples))

    def rows(v: jax.Array) -> jax.Array:
        # Whole on each device, as sorting does not cross devices on explicit meshes.
        return _placement.as_features(v[::step], v, tuple(range(v.ndim)))

    return jax.tree.map(rows, batch)


def _with(log: MonitorLog, row: jax.Array) -> MonitorLog:
    """The log with one more row; the interval doubles where no row is free for the next."""
    rows = lax.dynamic_update_index_in_dim(log.rows, row, log.slot, 0)
    steps = lax.dynamic_update_index_in_dim(log.steps, log.step, log.slot, 0)
    full = ~_is_free(steps, log.interval).any()
    interval = jnp.where(full, 2 * log.interval, log.interval)
    slot = jnp.argmax(_is_free(steps, interval)).astype(log.slot.dtype)
    return log._replace(interval=interval, slot=slot, steps=steps, rows=rows)


def _is_free(steps: Any, interval: Any) -> Any:
    """Rows that are empty, or dropped: of steps that are no multiple of the interval."""
    return (steps < 0) | (steps % interval != 0)


def _values(layer: Layer, seen: Seen | None) -> jax.Array:
    """All quantities of all channels, flat; infinite where nothing can be said.

    Not NaN, which `jax_debug_nans` refuses.
    """
    if seen is None:
        return jnp.full(len(QUANTITIES) * layer.mean.size, jnp.inf, jnp.float32)
    mean, running = seen.shift + seen.offset, layer.var + seen.epsilon
    values = (
        seen.low,
        seen.median,
        seen.high,
        jnp.abs(mean - layer.mean) * lax.rsqrt(running),
        jnp.log((seen.var + seen.epsilon) / running),
    )
    sound = (seen.entries > 0) & lax.is_finite(mean + seen.var)
    return jnp.stack([jnp.where(sound, v, jnp.inf).astype(jnp.float32) for v in values]).reshape(-1)


def _place(seen: Seen | None) -> Any:
    """In the order of calls; last where there was none."""
    return jnp.inf if seen is None else jnp.where(seen.calls > 0, seen.order, jnp.inf).min()


def _by_name(values: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return dict(zip(QUANTITIES, values.reshape(len(QUANTITIES), *shape), strict=True))


def _width(layers: Mapping[str, Layer]) -> int:
    return len(QUANTITIES) * sum(layer.mean.size for layer in layers.values())


def _check_log(log: Any, layers: Mapping[str, Layer]) -> None:
    if not isinstance(log, MonitorLog):
        raise TypeError(
            f"`log` must be a MonitorLog, got {type(log).__name__}. Fix: monitor.init(variables)."
        )
    width = _width(layers)
    if jnp.ndim(log.rows) != 2 or log.rows.shape[1] != width:
        raise ValueError(
            f"`log` must be of this model, with rows of shape [capacity, {width}], got "
            f"{jnp.shape(log.rows)}. Fix: monitor.init(variables)."
        )
