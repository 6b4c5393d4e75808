"""Replicas that were trained without synchronization, merged into one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _checks, _merge, _reduce, _trees
from bnjax._types import BNState, Moments


def merge_states(states: Any, *, weights: Sequence[float] | jax.Array | None = None) -> Any:
    """Running statistics of replicas that were trained without synchronization, merged.

    mean = sum(w_i * mean_i), var = sum(w_i * (var_i + (mean_i - mean)**2)), with
    sum(w_i) = 1: the moments of all that the replicas have seen. An average of the
    variances lacks the variance of the means. count = sum(count_i). A channel that a
    replica never trained (count 0, where counts are kept) takes no part, unless none
    has trained it.

    Args:
      states: a list of the replicas' states, or one state whose arrays have a leading
        axis of replicas, as pmap and vmap return it. A state is a `BNState`, or a tree
        with running statistics named mean, var and perhaps count, as linen's batch_stats
        and nnx.state(model, nnx.BatchStat) are.
      weights: one number per replica, at least 0, as the number of examples that it
        saw; equal by default.

    Returns:
      One state, of the structure, shapes and dtypes of a replica's.

    Raises:
      TypeError, ValueError: replicas of different structure or shape, none at all,
      weights that do not fit, leaves that are no running statistics.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> one, other = (bnjax.BNState(jnp.array([m]), jnp.array([1.0]), jnp.array([9]))
      ...               for m in (1.0, 5.0))
      >>> print(bnjax.merge_states([one, other]).var)
      [5.]

    Source: Chan, Golub & LeVeque (1983).
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(_stacked(states))
    layers: dict[tuple[str, ...], dict[str, tuple[int, jax.Array]]] = {}
    for i, (path, leaf) in enumerate(leaves):
        layer, name = _trees.place(path)
        layers.setdefault(layer, {})[name] = i, leaf
    replicas = {jnp.shape(leaf)[:1] for _, leaf in leaves}
    if len(replicas) != 1 or replicas & {(), (0,)}:
        raise ValueError(
            "`states` must have a leading axis of replicas, of one length, in all arrays, got "
            f"{sorted(replicas)}. Fix: merge_states([state, ...]) for replicas that are apart."
        )
    shares = _shares(weights, *replicas.pop())
    merged: dict[int, jax.Array] = {}
    for layer, own in layers.items():
        _check_layer("/".join(layer), own)
        state = _merge_layer(shares, **{name: leaf for name, (_, leaf) in own.items()})
        merged |= {i: getattr(state, name) for name, (i, _) in own.items()}
    return jax.tree.unflatten(structure, [merged[i] for i in range(len(leaves))])


def _stacked(states: Any) -> Any:
    """One tree with a leading axis of replicas."""
    if type(states) not in (list, tuple):
        return states
    if not states:
        raise ValueError("`states` must hold at least one replica, got none.")
    structures = list(map(jax.tree.structure, states))
    for other in structures[1:]:
        if str(other) != str(structures[0]):
            raise ValueError(f"`states` must be of one structure, got {structures[0]} and {other}.")
    for path, *leaves in zip(
        (path for path, _ in jax.tree_util.tree_leaves_with_path(states[0])),
        *map(jax.tree.leaves, states),
        strict=True,
    ):
        kinds = {(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves}
        if len(kinds) > 1:
            raise ValueError(
                f"`states{jax.tree_util.keystr(path)}` must have one shape and dtype in all "
                f"replicas, got {sorted(map(str, kinds))}."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _shares(weights: Any, replicas: int) -> jax.Array:
    """Weights that sum to 1, [replicas]."""
    shares = jnp.ones(replicas) if weights is None else jnp.asarray(weights, float)
    if shares.shape != (replicas,):
        raise ValueError(
            f"`weights` must be one number for each of the {replicas} replicas, got shape "
            f"{shares.shape}."
        )
    if _checks.is_concrete(shares):
        values = np.asarray(shares)
        if not np.all((values >= 0) & np.isfinite(values)) or not np.any(values):
            raise ValueError(f"`weights` must be at least 0, and not all 0, got {weights}.")
    return shares / shares.sum()


def _check_layer(layer: str, own: Any) -> None:
    names, needed = set(own), {"mean", "var"}
    if not needed <= names <= needed | {"count"}:
        raise ValueError(
            "`states` must hold running statistics, mean, var and perhaps count for each layer, "
            f"got {sorted(names)} at {layer or 'its top'!r}. Fix: give batch_stats, or "
            "nnx.state(model, nnx.BatchStat), alone."
        )


def _merge_layer(
    shares: jax.Array, mean: jax.Array, var: jax.Array, count: jax.Array | None = None
) -> BNState:
    """The statistics of one layer; [replicas, C] to [C]."""
    share = jnp.broadcast_to(jnp.expand_dims(shares, tuple(range(1, mean.ndim))), mean.shape)
    if count is None:
        count = jnp.zeros(mean.shape, jnp.int32)
    counted = share > 0
    taught = counted & (count > 0)
    share = jnp.where(taught | ~taught.any(0, keepdims=True), share, 0)
    wide, spread, weight = (_reduce.promoted(v) for v in (mean, var, share))
    parts = [Moments(*part) for part in zip(wide, spread, weight, strict=True)]
    whole = _merge.merge(*parts)
    updates = jnp.where(counted, count, 0).sum(0, dtype=count.dtype)
    return BNState(whole.mean.astype(mean.dtype), whole.var.astype(var.dtype), updates)
