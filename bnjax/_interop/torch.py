"""Layers of torch: their state dict."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax import _checks
from bnjax._interop import common
from bnjax._interop.common import Layer
from bnjax._momentum import cumulative

_STATISTICS = ("running_mean", "running_var")
_PARAMS = ("weight", "bias")
_COUNT = "num_batches_tracked"


def names(state_dict: Any) -> list[str]:
    """Batch norms of a state dict."""
    return _source(state_dict).names()


def from_torch(
    state_dict: Mapping[str, Any],
    prefix: str = "",
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    track_running_stats: bool = True,
) -> Layer:
    """A batch norm of torch from its entries in a state dict.

    torch: running = (1 - momentum) * running + momentum * batch, with the
    variance var * n / (n - 1); bnjax's momentum is the weight of the old value.

    Args:
      state_dict: name -> tensor or array. `{prefix}.running_mean` and
        `{prefix}.running_var`, [C], and where there are, `weight`, `bias`, [C],
        and the scalar `num_batches_tracked` (0 where an old checkpoint lacks it).
      prefix: name of the layer, as "layer1.0.bn1"; "" for its own state dict.
      momentum, eps: of the torch layer; they are not in its state dict. None is
        the cumulative average.
      axis: feature axis of the inputs here; -1 for a model whose inputs now have
        the channels last.
      track_running_stats: False for a layer without running statistics: it has
        to run with train=True always, and what it learns may be dropped.

    Returns:
      `Layer`, with copies of the arrays.

    Raises:
      TypeError, ValueError: names that are missing or unknown, shapes that do not
      fit each other, options out of range.

    Example:
      >>> import numpy as np, bnjax
      >>> from bnjax import interop
      >>> layer = interop.from_torch({
      ...     "bn1.weight": np.ones(2, "f"), "bn1.bias": np.zeros(2, "f"),
      ...     "bn1.running_mean": np.array([1, 2], "f"), "bn1.running_var": np.ones(2, "f"),
      ...     "bn1.num_batches_tracked": np.array(7)}, "bn1")
      >>> print(layer.state.mean, layer.state.count)
      [1. 2.] [7 7]
      >>> print(layer.options)
      {'axis': 1, 'momentum': 0.9, 'epsilon': 1e-05, 'unbiased': True}

    Source: torch.nn.BatchNorm2d.
    """
    tracked = _checks.static_flag("track_running_stats", track_running_stats)
    found = common.entries(
        _source(state_dict),
        prefix,
        _STATISTICS if tracked else ("weight",),
        (*_PARAMS, _COUNT) if tracked else ("bias",),
        ""
        if not tracked
        else " A layer made with track_running_stats=False has none of them, and no "
        f"{_COUNT}: pass that here too.",
    )
    if not tracked:
        found |= {
            name: common.Entry(name, fill(found["weight"].value))
            for name, fill in zip(_STATISTICS, (np.zeros_like, np.ones_like), strict=True)
        }
    if momentum is None and tracked and _COUNT not in found:
        raise ValueError(
            f"`{_COUNT}` must be there for momentum=None, which averages over all batches, got "
            f"{sorted(found)}. Fix: add {_COUNT}, the number of batches seen."
        )
    old = None if momentum is None else 1 - common.number("momentum", momentum)
    return common.convert(
        {
            "scale": found.get("weight"),
            "bias": found.get("bias"),
            "mean": found["running_mean"],
            "var": found["running_var"],
        },
        found.get(_COUNT, 0),
        {
            "axis": axis,
            "momentum": cumulative() if old is None else old,
            "epsilon": common.number("eps", eps, high=float("inf")),
            "unbiased": True,
        },
    )


def to_torch(
    layer: Layer | Mapping[str, Layer], prefix: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """State dict and constructor's arguments of a batch norm for torch.

    The inverse of `from_torch`, exact for parameters, statistics and counter.
    torch's feature axis is the second, whatever `axis` is here.

    Args:
      layer: a `Layer`, or several by name: name -> Layer.
      prefix: name of the layer in the state dict, or what comes before all names.

    Returns:
      `(state_dict, kwargs)`: writable arrays that `torch.from_numpy` takes, in the
      dtypes that are here; bfloat16, which it does not take, as float32. And
      `torch.nn.BatchNorm2d(**kwargs)`; for several layers name -> kwargs.

    Raises:
      TypeError, ValueError: what torch does not have: a schedule other than
      `cumulative()`, unbiased=False, several feature axes, a bias without scale,
      and with `cumulative()` counts that differ between channels. Otherwise the
      largest count is taken.

    Example:
      >>> import bnjax
      >>> from bnjax import interop
      >>> params, state = bnjax.bn_init(2)
      >>> layer = interop.Layer(params, state, {"momentum": 0.9, "unbiased": True})
      >>> state_dict, kwargs = interop.to_torch(layer, "bn1")
      >>> print(list(state_dict)[-1], state_dict["bn1.running_var"], kwargs["momentum"])
      bn1.num_batches_tracked [1. 1.] 0.1

    Source: torch.nn.BatchNorm2d.
    """
    return common.export(_export, layer, prefix, ".")


def _export(layer: Layer, start: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    (scale, bias), (mean, var, count), options = layer
    if not options["unbiased"]:
        raise ValueError(
            "`unbiased` must be True for torch, whose running variance has n/(n-1), got "
            f"{options['unbiased']!r}. Fix: layer._replace(options={{**layer.options, "
            "'unbiased': True}), if the variance may be learned so from now on."
        )
    common.one_axis(layer, "torch")
    if scale is None and bias is not None:
        raise ValueError(
            "`params.scale` must be an array where there is a bias: torch has no bias without "
            "weight, got None. Fix: scale=np.ones_like(bias)."
        )
    momentum = _momentum(layer)
    if momentum is None and np.any(np.asarray(count) != np.max(count)):
        raise ValueError(
            "`state.count` must be equal for all channels with cumulative(): torch has one "
            f"counter, got {count}. Fix: a momentum that is a number."
        )
    arrays = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
    state_dict = {start + k: _for_torch(v) for k, v in arrays.items() if v is not None}
    state_dict[start + _COUNT] = np.array(np.max(count), np.int64)
    kwargs = {
        "num_features": mean.size,
        "eps": options["epsilon"],
        "momentum": momentum,
        "affine": scale is not None,
    }
    return state_dict, kwargs if (scale is None) == (bias is None) else {**kwargs, "bias": False}


def _momentum(layer: Layer) -> float | None:
    """The weight of the new value; None for the cumulative average."""
    # By identity: values at some counts say nothing of the others.
    if layer.options["momentum"] is cumulative():
        return None
    old = common.constant(layer, "torch (but for `cumulative()`)")
    # 1 - 0.9 is not 0.1: the shortest number that comes back as this one.
    return next((new for d in range(17) if 1 - (new := round(1 - old, d)) == old), 1 - old)


def _for_torch(value: Any) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == jnp.bfloat16 else value


def _source(state_dict: Any) -> common.Source:
    arrays = common.mapping("state_dict", state_dict, " Fix: module.state_dict().")
    # A counter alone is of a layer that has lost its statistics.
    return common.Source(arrays, ".", common.owners(arrays, ".", (*_STATISTICS, _COUNT)))
