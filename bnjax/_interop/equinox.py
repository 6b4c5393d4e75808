"""Layers of equinox: the module, which knows its options, and the state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax._interop import common
from bnjax._interop.common import Entry, Layer
from bnjax._momentum import debiased

_MARKS = ("batch_counter", "batch_state_index", "ema_first_time_index", "ema_state_index")


def names(model: Any, state: Any) -> list[str]:
    """Batch norms of an equinox model."""
    del state
    return sorted(_layers(model))


def from_equinox(
    model: Any, state: Any, prefix: str = "", *, axis: int = 1, mode: str | None = None
) -> Layer:
    """A batch norm of equinox from its module and the model's state.

    In mode "batch" equinox keeps hidden = momentum * hidden + (1 - momentum) * batch
    and evaluates with hidden / (1 - momentum**counter), the variance biased: the
    zero-debiased average that `bnjax.debiased(momentum)` computes. In mode "ema"
    the first batch replaces the running statistics.

    Args:
      model: the `equinox.nn.BatchNorm`, or a model that has it at `prefix`.
      state: the `equinox.nn.State` of the model.
      prefix: path of the layer, as "layers/0/bn"; "" if `model` is the layer.
      axis: feature axis of a whole batch: equinox runs on one example at a time
        with the features first, so it is 1. Inside of the same vmap it is 0, and
        `axis_name` goes to `bn_apply`.
      mode: "batch" to convert a layer of mode "ema", which normalizes training
        batches with running statistics, as bnjax does not: it evaluates as before,
        and its running statistics are updated as before, but training y differ.

    Returns:
      `Layer`, with copies of the arrays. From a layer of mode "batch" that was
      never trained (counter 0), training starts with an average of batches only;
      equinox's keeps part of the initial variance 1.

    Raises:
      TypeError, ValueError: no batch norm at `prefix`, mode "ema" unless asked
      for, shapes that do not fit each other.

    Example:
      >>> import numpy as np
      >>> from types import SimpleNamespace
      >>> from bnjax import interop
      >>> module = SimpleNamespace(  # as equinox.nn.BatchNorm(2, "batch", mode="batch")
      ...     weight=np.ones(2), bias=np.zeros(2), eps=1e-5, momentum=0.5, mode="batch",
      ...     batch_counter="n", batch_state_index="stats",
      ...     ema_first_time_index=None, ema_state_index=None)
      >>> state = {"n": np.array(1), "stats": (np.full(2, 3.0), np.full(2, 0.5))}
      >>> layer = interop.from_equinox(module, state)
      >>> print(layer.state.mean, layer.state.var, layer.state.count)
      [6. 6.] [1. 1.] [1 1]

    Source: equinox.nn.BatchNorm.
    """
    module = _module(model, prefix)
    start = prefix and f"{prefix}/"
    if mode not in (None, "batch"):
        raise ValueError(f"`mode` must be 'batch' or None, got {mode!r}.")
    if module.mode == "ema" and mode is None:
        raise ValueError(
            f"`mode` must be 'batch' for the layer {prefix!r}, got 'ema', which normalizes "
            "training batches with running statistics. Fix: mode='batch' for a layer that "
            "evaluates the same and trains with batch statistics."
        )
    momentum = common.number("momentum", module.momentum)
    read = _batch if module.mode == "batch" else _ema
    mean, var, count, weight = read(module, state, start, momentum)
    params = {
        role: _parameter(module, start, name)
        for role, name in (("scale", "weight"), ("bias", "bias"))
    }
    options = {
        "axis": axis,
        "momentum": weight,
        "epsilon": common.number("eps", module.eps, high=float("inf")),
        "unbiased": False,
    }
    return common.convert({**params, "mean": mean, "var": var}, count, options)


def _batch(module: Any, state: Any, start: str, momentum: float) -> tuple[Entry, Entry, Any, Any]:
    mean, var = _statistics(module, state, start, "batch_state_index")
    count = _scalar(module, state, start, "batch_counter")
    # Before the first batch there is nothing to divide by.
    share = 1.0 if count.value == 0 else 1 - momentum ** int(count.value)
    mean, var = (_scaled(entry, share) for entry in (mean, var))
    return mean, var, count, debiased(momentum)


def _ema(module: Any, state: Any, start: str, momentum: float) -> tuple[Entry, Entry, Any, Any]:
    mean, var = _statistics(module, state, start, "ema_state_index")
    if not _scalar(module, state, start, "ema_first_time_index").value:
        return mean, var, 1, momentum
    # Until then the arrays hold no numbers.
    mean, var = (
        Entry(entry.name, np.full_like(entry.value, v)) for entry, v in ((mean, 0), (var, 1))
    )

    def schedule(count: jax.Array) -> jax.Array:
        return jnp.where(count == 0, 0.0, momentum)

    return mean, var, 0, schedule


def _statistics(module: Any, state: Any, start: str, index: str) -> list[Entry]:
    arrays = _get(module, state, start, index)
    named = [(f"{start}{index}[{i}]", value) for i, value in enumerate(arrays)]
    return [Entry(name, common.array(name, value)) for name, value in named]


def _scalar(module: Any, state: Any, start: str, index: str) -> Entry:
    name = start + index
    entry = Entry(name, common.array(name, _get(module, state, start, index)))
    if entry.value.shape != ():
        raise ValueError(
            f"`{name}` must be one number, got shape {entry.value.shape}, as of layers stacked by "
            "filter_vmap. Fix: one layer at a time, model, state = jax.tree.map(lambda a: a[0] if "
            "equinox.is_array(a) else a, (model, state))."
        )
    return entry


def _parameter(module: Any, start: str, name: str) -> Entry | None:
    value = getattr(module, name)
    if value is not None:
        return Entry(start + name, common.array(start + name, value))
    if getattr(module, "channelwise_affine", False):
        raise ValueError(
            f"`{start}{name}` must be an array where channelwise_affine is True, got None. Fix: "
            "equinox.combine, where equinox.partition took the arrays out of the model."
        )
    return None


def _get(module: Any, state: Any, start: str, index: str) -> Any:
    fix = "Fix: model, state = equinox.nn.make_with_state(Model)(...)."
    if not callable(getattr(state, "get", None)):
        raise TypeError(
            f"`state` must be the equinox.nn.State of the model, got {type(state).__name__}. {fix}"
        )
    try:
        return state.get(getattr(module, index))
    except KeyError:
        raise ValueError(
            "`state` must be the equinox.nn.State of this model, with all its layers, got one "
            f"without {start}{index}. {fix}"
        ) from None


def _scaled(entry: Entry, share: float) -> Entry:
    value = np.asarray(entry.value, np.float64) / share
    return Entry(entry.name, value.astype(entry.value.dtype))


def _module(model: Any, prefix: str) -> Any:
    found = _layers(model)
    if prefix not in found:
        raise ValueError(
            f"`prefix` must name a batch norm of the model, of {common.listed(sorted(found))}, "
            f"got {prefix!r}."
        )
    return found[prefix]


def _layers(model: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_batch_norm)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
        if _is_batch_norm(leaf)
    }


def _is_batch_norm(value: Any) -> bool:
    return all(hasattr(value, mark) for mark in _MARKS)
