"""Whole flax.nnx models: bnjax's layers in the place of flax's, and switches."""

from typing import Any

from flax import nnx

from bnjax import _switch
from bnjax._nnx.layer import BatchNorm
from bnjax._switch import Source


def convert(model: Any) -> tuple[tuple[Any, ...], ...]:
    """Turns every `flax.nnx.BatchNorm` of a model into a `bnjax.nnx.BatchNorm`, in place.

    The same objects with the same variables, so that parameters and statistics
    are kept, shared layers stay shared, and optimizers and other references stay
    valid. `revert` undoes it.

    Args:
      model: an nnx module; its source stays as it is.

    Returns:
      The paths of the layers.

    Raises:
      ValueError: no such layer. TypeError: a layer of a class derived from
      flax's, whose own code would be lost.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
      ...                        nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> bnjax.nnx.convert(model)
      (('layers', 1),)
      >>> y = model(jnp.ones((4, 2)))
      >>> bnjax.nnx.revert(model)
      (('layers', 1),)

    Source: the layers as a flax.nnx.Module holds them.
    """
    layers = _layers(model, nnx.BatchNorm)
    for layer in layers.values():
        # First what JAX may refuse, where the layer is of another trace.
        layer.unbiased, layer.norm = False, None
        object.__setattr__(layer, "__class__", BatchNorm)
    return tuple(layers)


def revert(model: Any) -> tuple[tuple[Any, ...], ...]:
    """Turns every `bnjax.nnx.BatchNorm` of a model into flax's, in place: undoes `convert`.

    Args:
      model: an nnx module.

    Returns:
      The paths of the layers.

    Raises:
      ValueError: no such layer, or one that flax has no counterpart of: with a
      schedule as momentum, `unbiased`, a `norm`, several axes. TypeError: a layer
      of a derived class. Nothing is changed then.

    Example: see `convert`.
    """
    layers = _layers(model, BatchNorm)
    for path, layer in layers.items():
        ours = {"unbiased": layer.unbiased, "norm": layer.norm, "switch": layer.switched}
        if callable(layer.momentum):
            ours["momentum"] = layer.momentum
        if not isinstance(layer.axis, int):
            ours["axis"] = layer.axis
        ours = {name: value for name, value in ours.items() if value}
        if ours:
            raise ValueError(
                f"`revert` needs layers that flax.nnx.BatchNorm can be, got {ours} at {path}. "
                "Fix: set them to flax's values first."
            )
    for layer in layers.values():
        statistics = [n for n, v in vars(layer).items() if isinstance(v, nnx.BatchStat)]
        extra = {"unbiased", "norm", "switched", *statistics} - {"mean", "var"}
        for name in extra & vars(layer).keys():
            delattr(layer, name)
        object.__setattr__(layer, "__class__", nnx.BatchNorm)
    return tuple(layers)


def switch(
    model: Any, *, moments: Source | None = None, learn: bool | None = None
) -> tuple[tuple[Any, ...], ...]:
    """Switches the `bnjax.nnx.BatchNorm` layers of a model, in place, as `bnjax.switch` does.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias with the moments asked for, and
    running statistics that learn or not, whatever `model.train()` and `model.eval()` say.
    A layer whose `norm` is switched keeps to that. With both None the layers are as they
    were before.

    Args:
      model: an nnx module, or one of its parts, or a layer; flax's layers by `convert`.
      moments: "batch", "running", or None for what the layer's mode says.
      learn: whether the running statistics are updated in every call, in none, or None for
        what the layer's mode says.

    Returns:
      The paths of the layers.

    Raises:
      TypeError, ValueError: as `bnjax.switch`; no such layer, or one of flax's.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> layer = bnjax.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> bnjax.nnx.switch(layer, moments="running", learn=False)
      ((),)
      >>> layer.train()
      >>> y = layer(jnp.array([[1.0], [3.0]]))
      >>> print(layer.mean[...])
      [0.]

    Source: `bnjax.switch`.
    """
    switched = None
    if moments is not None or learn is not None:
        switched = _switch.checked(moments, learn)
    layers = {path: m for path, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)}
    others = [path for path, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    if others:
        raise ValueError(
            f"layers must be bnjax's to be switched, got flax.nnx.BatchNorm at {others}. Fix: "
            "bnjax.nnx.convert(model)."
        )
    if not layers:
        raise ValueError(
            f"the model must have a bnjax.nnx.BatchNorm layer, got none in {type(model)}."
        )
    for layer in layers.values():
        if switched is not None:
            layer.switched = switched
        elif "switched" in vars(layer):
            del layer.switched
    return tuple(layers)


def _layers(model: Any, kind: type) -> dict[tuple[Any, ...], Any]:
    """The layers of exactly this class, by path."""
    found = {path: m for path, m in nnx.iter_modules(model) if isinstance(m, kind)}
    derived = {path: type(m).__name__ for path, m in found.items() if type(m) is not kind}
    name = f"{kind.__module__.split('.')[0]}.nnx.BatchNorm"
    if derived:
        raise TypeError(
            f"layers must be of the class {name} itself, got derived ones at {derived}. "
            "Fix: change what they derive from."
        )
    if not found:
        raise ValueError(f"the model must have a {name} layer, got none in {type(model)}.")
    return found
