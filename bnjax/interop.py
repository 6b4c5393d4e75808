"""Layers of torch, keras, haiku, equinox and flax <-> bnjax; NumPy in and out.

None of these packages is imported: a layer comes as its arrays by name, and as the
options that are not among them, in that framework's terms and with its defaults.
"""

import fnmatch
from collections.abc import Callable
from typing import Any

from bnjax._interop import common, equinox, flax, haiku, keras, torch
from bnjax._interop.common import Layer
from bnjax._interop.equinox import from_equinox
from bnjax._interop.flax import from_flax, to_flax
from bnjax._interop.haiku import from_haiku
from bnjax._interop.keras import from_keras, to_keras
from bnjax._interop.torch import from_torch, to_torch

__all__ = [
    "Layer",
    "each",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_torch",
    "to_flax",
    "to_keras",
    "to_torch",
]

_NAMES: dict[Callable[..., Layer], Callable[..., list[str]]] = {
    from_equinox: equinox.names,
    from_flax: flax.names,
    from_haiku: haiku.names,
    from_keras: keras.names,
    from_torch: torch.names,
}


def each(
    convert: Callable[..., Layer], *source: Any, pattern: str = "*", **options: Any
) -> dict[str, Layer]:
    """Converts all batch norms of a model whose names match a pattern.

    A batch norm is known by its running statistics, even one of them: then `convert`
    says what is missing. One that has lost them all is known in torch by its counter,
    and in linen by its count or where it is named BatchNorm_0, BatchNorm_1, ...

    Args:
      convert: one of `from_torch`, `from_keras`, `from_haiku`, `from_equinox`,
        `from_flax`.
      *source: what `convert` takes before `prefix`, of the whole model.
      pattern: of names, where * stands for anything (dots and slashes too), ? for
        one character and [ab] for one of them.
      **options: of `convert`, the same for all these layers.

    Returns:
      name -> `Layer`, in alphabetical order; the form that `to_torch`, `to_keras`
      and `to_flax` take.

    Raises:
      ValueError: a pattern that matches none; it lists those that are there. And
      what `convert` raises, with a note that names the layer. TypeError: another
      function.

    Example:
      >>> import numpy as np
      >>> from bnjax import interop
      >>> state_dict = {
      ...     f"layer1.{i}.bn.running_{name}": np.ones(2, "f")
      ...     for i in range(2) for name in ("mean", "var")}
      >>> layers = interop.each(interop.from_torch, state_dict, pattern="layer*.bn")
      >>> print(list(layers))
      ['layer1.0.bn', 'layer1.1.bn']

    Source: patterns are those of Python's fnmatch.
    """
    if convert not in _NAMES:
        raise TypeError(
            f"`convert` must be one of {[f.__name__ for f in _NAMES]}, got {convert!r}. Options "
            "go to `each`, as in each(from_torch, state_dict, momentum=0.01)."
        )
    names = _NAMES[convert](*source)
    matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matched:
        raise ValueError(
            f"`pattern` must match a batch norm, one of {common.listed(names)}, got {pattern!r}."
        )
    return {
        name: common.located(name, lambda at: convert(*source, at, **options), name)
        for name in matched
    }
