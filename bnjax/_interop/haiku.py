"""Layers of haiku: trees of parameters and of state."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax._interop import common
from bnjax._interop.common import Entry, Layer
from bnjax._momentum import debiased

_EMA = ("mean_ema", "var_ema")
_AVERAGES = tuple(f"{ema}.average" for ema in _EMA)
_STATE = tuple(f"{ema}.{name}" for ema in _EMA for name in ("average", "hidden", "counter"))
_PARAMS = ("scale", "offset")


def names(params: Any, state: Any) -> list[str]:
    """Batch norms of haiku's trees."""
    return _source(params, state).names()


def from_haiku(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
    prefix: str = "batch_norm",
    *,
    decay_rate: float,
    eps: float = 1e-5,
    data_format: str = "channels_last",
) -> Layer:
    """A batch norm of haiku from the trees of parameters and of state.

    haiku: hidden = decay_rate * hidden + (1 - decay_rate) * batch, and average =
    hidden / (1 - decay_rate**counter), with the biased variance: the zero-debiased
    average that `bnjax.debiased(decay_rate)` computes.

    Args:
      params: module -> name -> array: `scale` and `offset` where there are.
      state: module -> name -> array: `average`, `hidden` and `counter` of
        `{prefix}/~/mean_ema` and `{prefix}/~/var_ema`. Arrays have the rank of the
        inputs, and size 1 on all axes but that of the features.
      prefix: name of the module, as "resnet/~/batch_norm".
      decay_rate, eps, data_format: of the haiku module; they are not in its trees.

    Returns:
      `Layer`, with copies of the arrays, of shape [C]. `test_local_stats=True` of
      haiku is train=True here, with the new state dropped.

    Raises:
      TypeError, ValueError: names that are missing or unknown, shapes that do not
      fit each other or `data_format`, a `decay_rate` that is not the one that the
      state was made with, options out of range.

    Example:
      >>> import numpy as np
      >>> from bnjax import interop
      >>> ema = {"average": np.full((1, 2), 4.0), "hidden": np.full((1, 2), 0.4),
      ...        "counter": np.array(1)}
      >>> params = {"bn": {"scale": np.ones((1, 2)), "offset": np.zeros((1, 2))}}
      >>> state = {"bn/~/mean_ema": ema, "bn/~/var_ema": ema}
      >>> layer = interop.from_haiku(params, state, "bn", decay_rate=0.9)
      >>> print(layer.state.mean, layer.state.count, layer.options["axis"])
      [4. 4.] [1 1] -1

    Source: haiku.BatchNorm, haiku.ExponentialMovingAverage.
    """
    axis = _axis(data_format)
    found = common.entries(_source(params, state), prefix, _STATE, _PARAMS)
    decay_rate = common.number("decay_rate", decay_rate)
    counters = [found[f"{ema}.counter"] for ema in _EMA]
    if not np.array_equal(counters[0].value, counters[1].value):
        raise ValueError(
            f"`{counters[0].name}` and `{counters[1].name}` must be equal, got "
            f"{counters[0].value} and {counters[1].value}."
        )
    vectors = {
        name: _vector(entry, axis, data_format)
        for name, entry in found.items()
        if not name.endswith("counter")
    }
    options = {
        "axis": axis,
        "momentum": debiased(decay_rate),
        "epsilon": common.number("eps", eps, high=float("inf")),
        "unbiased": False,
    }
    roles = (*_PARAMS, *_AVERAGES)
    layer = common.convert(
        {
            role: vectors.get(name)
            for role, name in zip(("scale", "bias", "mean", "var"), roles, strict=True)
        },
        counters[0],
        options,
    )
    for ema in _EMA:
        _check_decay(vectors, ema, counters[0].value, decay_rate)
    return layer


def _axis(data_format: Any) -> int:
    if not isinstance(data_format, str):
        raise TypeError(f"`data_format` must be a str, got {data_format!r}.")
    if data_format == "channels_first" or data_format[1:2] == "C":
        return 1
    if data_format == "channels_last" or data_format[-1:] == "C":
        return -1
    raise ValueError(
        "`data_format` must be 'channels_last', 'channels_first', or letters with C as the "
        f"last or the second, got {data_format!r}."
    )


def _vector(entry: Entry, axis: int, data_format: str) -> Entry:
    """haiku keeps all axes, of size 1 but for the features."""
    shape = entry.value.shape
    if len(shape) < 2 or shape[axis] != entry.value.size:
        kept = "(1, C, 1, ...)" if axis == 1 else "(1, ..., 1, C)"
        raise ValueError(
            f"`{entry.name}` must have shape {kept} for data_format={data_format!r}, got "
            f"{shape}. Fix: data_format as in the haiku module."
        )
    return Entry(entry.name, entry.value.reshape(-1))


def _check_decay(vectors: dict[str, Entry], ema: str, counter: Any, decay: float) -> None:
    """hidden = average * (1 - decay**counter) tells a wrong decay rate, as far as rounding lets."""
    average, hidden = (vectors[f"{ema}.{name}"] for name in ("average", "hidden"))
    if average.value.shape != hidden.value.shape:
        raise ValueError(
            f"`{hidden.name}` and `{average.name}` must have one size, got "
            f"{hidden.value.size} and {average.value.size}."
        )
    rounding = float(jnp.finfo(average.value.dtype).eps) / (1 - decay)
    with np.errstate(all="ignore"):
        expected = np.asarray(average.value, np.float64) * (1 - decay ** int(counter))
        error = np.max(np.abs(np.asarray(hidden.value, np.float64) - expected))
        wrong = error > (1e-2 + 8 * rounding) * np.max(np.abs(expected))
    if wrong:
        raise ValueError(
            f"`decay_rate` must be that of `{average.name}` and `{hidden.name}`, whose ratio "
            f"is 1 - decay_rate**{int(counter)}, got {decay}."
        )


def _source(params: Any, state: Any) -> common.Source:
    flat: dict[str, Any] = {}
    for tree_name, tree in (("params", params), ("state", state)):
        for module, arrays in common.mapping(tree_name, tree).items():
            owner, _, ema = module.rpartition("/~/")
            start = f"{owner}/{ema}." if ema in _EMA else f"{module}/"
            flat |= {start + name: value for name, value in arrays.items()}
    return common.Source(flat, "/", common.owners(flat, "/", _STATE))
