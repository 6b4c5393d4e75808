"""Which parameters belong to a normalization: masks and labels for optax.

Scale and bias of a normalization are usually spared weight decay: the layer
before it is free to change size, so decaying them changes only the function,
and a bias has nothing to decay towards. Both functions here take any tree of
parameters (linen's, an nnx.State, BNParams, containers of them) and return a
tree of the same structure, which is what optax calls a mask and labels.
"""

from typing import Any

import jax

from bnjax import _trees

_NAMES = {"scale", "bias"}


def decay_mask(params: Any, *, batch_stats: Any = None, missing_ok: bool = False) -> Any:
    """True where weight decay applies: everywhere but at scale and bias of a normalization.

    mask = (labels(params) == "other"), leaf by leaf

    The biases of other layers (Dense, Conv) are decayed.

    Args:
      params, batch_stats, missing_ok: as in `labels`.

    Returns:
      A tree of booleans of the structure of `params`.

    Raises:
      ValueError: as `labels`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bnjax.optim import decay_mask
      >>> layer = {"scale": jnp.ones(2), "bias": jnp.ones(2)}
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2))}, "BatchNorm_0": layer}
      >>> print(decay_mask(params))
      {'BatchNorm_0': {'bias': False, 'scale': False}, 'Dense_0': {'kernel': True}}
      >>> optimizer = optax.adamw(1e-3, weight_decay=1e-4, mask=decay_mask)

    Source: He et al. (2019), "Bag of Tricks", section 3.1, "No bias decay".
    """
    found = labels(params, batch_stats=batch_stats, missing_ok=missing_ok)
    return jax.tree.map(lambda label: label == "other", found)


def labels(params: Any, *, batch_stats: Any = None, missing_ok: bool = False) -> Any:
    """Label "norm" for scale and bias of a normalization, "other" for all other parameters.

    A module is taken for a normalization if its own parameters are named scale
    or bias, all of them, and it holds no further modules. So LayerNorm and its
    like are recognised too, and so is a module with nothing but a bias. To take
    batch normalization only, give its statistics: then those modules count that
    have a mean and a var there, whatever else they hold.

    Args:
      params: the parameters: a linen tree, an nnx.State of Params as nnx.Optimizer
        passes it, BNParams, or dicts, lists and tuples of these.
      batch_stats: the tree of running statistics, with modules at the same places
        as in `params`: variables["batch_stats"], nnx.state(model, nnx.BatchStat),
        or BNStates.
      missing_ok: True accepts parameters without any normalization.

    Returns:
      A tree of strings of the structure of `params`.

    Raises:
      ValueError: no normalization was found, and not `missing_ok`.

    Example:
      >>> import bnjax, optax
      >>> from bnjax.optim import labels
      >>> params, state = bnjax.bn_init(2)
      >>> print(labels((params,), batch_stats=(state,)))
      (BNParams(scale='norm', bias='norm'),)
      >>> optimizer = optax.multi_transform(
      ...     {"norm": optax.sgd(0.01), "other": optax.sgd(0.1)}, labels)

    Source: optax.multi_transform.
    """
    norms = _norms(params) if batch_stats is None else _with_statistics(batch_stats)

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        module, name = _trees.place(path)
        return "norm" if name in _NAMES and module in norms else "other"

    result = jax.tree_util.tree_map_with_path(label, params)
    if "norm" not in jax.tree.leaves(result) and not missing_ok:
        raise ValueError(_nothing_found(params, batch_stats))
    return result


def _norms(params: Any) -> set[tuple[str, ...]]:
    """Places of the modules that look like a normalization."""
    names = _names(params)
    parents = {module[:n] for module in names for n in range(len(module))}
    return {module for module, own in names.items() if own <= _NAMES and module not in parents}


def _with_statistics(batch_stats: Any) -> set[tuple[str, ...]]:
    """Places of the modules that have running statistics."""
    return {module for module, own in _names(batch_stats).items() if {"mean", "var"} <= own}


def _names(tree: Any) -> dict[tuple[str, ...], set[str]]:
    """Place of each module -> names of its own leaves."""
    # Places that optax.masked or None left empty count: Dense without its kernel is no norm.
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
    names: dict[tuple[str, ...], set[str]] = {}
    for path, _ in leaves:
        module, name = _trees.place(path)
        names.setdefault(module, set()).add(name)
    return names


def _is_empty(node: Any) -> bool:
    return not jax.tree.leaves(node)


def _nothing_found(params: Any, batch_stats: Any) -> str:
    def shown(tree: Any) -> str:
        found = [".".join((*module, *sorted(own)[:1])) for module, own in _names(tree).items()]
        return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "") or "nothing"

    if batch_stats is None:
        return (
            "`params` must hold a normalization, a module with no other parameters than scale "
            f"and bias, got {shown(params)}. Fix: missing_ok=True if the model has none."
        )
    return (
        "`batch_stats` must hold mean and var at the place of a module of `params` that has scale "
        f"or bias, got batch_stats of {shown(batch_stats)}, params of {shown(params)}. "
        'Fix: batch_stats=variables["batch_stats"].'
    )
