"""Layers whose running statistics are still the initial ones."""

from typing import Any

import jax
import numpy as np

from bnjax import _checks, _trees


def untrained(variables: Any) -> tuple[str, ...]:
    """The layers that were never trained, whose evaluation uses no statistics of data.

    Those with count = 0 in any channel; where no count is kept, those with mean = 0 and
    var = 1 in all.

    Args:
      variables: running statistics, in any tree: `BNState`s, variables of linen, an nnx
        module or its state. Arrays with values: not within jit.

    Returns:
      Their paths, parts of which are joined by "/"; "" for the top of the tree.

    Raises:
      ValueError: no running statistics. TypeError: traced ones.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> from bnjax import diagnostics
      >>> params, state = bnjax.bn_init(2)
      >>> print(diagnostics.untrained({"layer": state}))
      ('layer',)
      >>> _, state = bnjax.bn_apply(params, state, jnp.ones((4, 2)), train=True)
      >>> print(diagnostics.untrained({"layer": state}))
      ()

    Source: the counter is that of torch, `num_batches_tracked`.
    """
    # As reports name them: linen's collection is no part of the name.
    layers = {
        path.removeprefix("batch_stats/"): (own["mean"], own["var"], own.get("count"))
        for path, own in _trees.by_layer(variables).items()
        if {"mean", "var"} <= own.keys()
    }
    if not layers:
        raise ValueError(
            "`variables` must hold running statistics, mean and var of each layer, got none in "
            f"{jax.tree.structure(variables)}. Fix: the whole variables, 'batch_stats' included."
        )
    return tuple(path for path, own in layers.items() if _is_untrained(path, *own))


def _is_untrained(path: str, mean: Any, var: Any, count: Any) -> bool:
    if not all(_checks.is_concrete(v) for v in (mean, var, count)):
        raise TypeError(
            f"`untrained` needs values, got traced statistics at {path!r}. Fix: call it outside of "
            "jit."
        )
    if count is not None:
        return bool((np.asarray(count) == 0).any())
    return bool((np.asarray(mean) == 0).all() and (np.asarray(var) == 1).all())
