"""Replicas that were trained without synchronization, merged into one."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _checks, _covariance, _merge, _reduce, _trees
from bnjax._microbatches import MicrobatchState
from bnjax._moments import BatchMoments

_PARTS = MicrobatchState._fields[3:]


def merge_states(states: Any, *, weights: Sequence[float] | jax.Array | None = None) -> Any:
    """Running statistics of replicas that were trained without synchronization, merged.

    mean = sum(w_i * mean_i), var = sum(w_i * (var_i + (mean_i - mean)**2)), with
    sum(w_i) = 1: the moments of all that the replicas have seen. An average of the
    variances lacks the variance of the means. count = sum(count_i). A channel that a
    replica never trained (count 0, where counts are kept) takes no part, unless none
    has trained it. Of `microbatches`, those of unfinished steps are merged by their
    counts; of `whiten`, covariances as variances.

    Args:
      states: a list of the replicas' states, or one state whose arrays have a leading
        axis of replicas, as pmap and vmap return it. A state is a `BNState`, a
        `MicrobatchState`, a `WhitenState`, or a tree with statistics of their names, as linen's
        batch_stats and nnx.state(model, nnx.BatchStat) are.
      weights: one number per replica, at least 0, as the number of examples that it
        saw, in a list or array; equal by default.

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
    replicas = {jnp.shape(leaf)[:1] for _, leaf in leaves}
    if len(replicas) != 1 or any(jnp.ndim(leaf) < 2 or not len(leaf) for _, leaf in leaves):
        raise ValueError(
            "`states` must have a leading axis of replicas, of one length, before the channels, in "
            f"all arrays, got {sorted({jnp.shape(leaf) for _, leaf in leaves})}. "
            "Fix: merge_states([state, ...]) for replicas that are apart."
        )
    shares = _shares(weights, *replicas.pop())
    layers: dict[tuple[str, ...], dict[str, tuple[int, Any]]] = {}
    for i, (path, leaf) in enumerate(leaves):
        layer, name = _trees.place(path)
        layers.setdefault(layer, {})[name] = i, leaf
    merged: dict[int, jax.Array] = {}
    for layer, own in layers.items():
        values = {name: leaf for name, (_, leaf) in own.items()}
        found = _merge_layer(shares, **_checked("/".join(layer), values))
        merged |= {i: found[name] for name, (i, _) in own.items()}
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
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(states[0])]
    for path, *leaves in zip(paths, *map(jax.tree.leaves, states), strict=True):
        kinds = {(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves}
        if len(kinds) > 1:
            raise ValueError(
                f"`states{jax.tree_util.keystr(path)}` must have one shape and dtype in all "
                f"replicas, got {sorted(map(str, kinds))}."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _shares(weights: Any, replicas: int) -> Any:
    """Weights that sum to 1, [replicas]."""
    if weights is None:
        return np.full(replicas, 1 / replicas)
    if not isinstance(weights, (list, tuple, jax.Array, np.ndarray)):
        raise TypeError(f"`weights` must be a list or an array of numbers, got {weights!r}.")
    shape = (len(weights),) if isinstance(weights, (list, tuple)) else weights.shape
    if shape != (replicas,):
        raise ValueError(
            f"`weights` must be one number for each of the {replicas} replicas, got shape {shape}."
        )
    for weight in weights:
        _checks.number("weights", weight, 0.0, np.inf, ())
    if any(not _checks.is_concrete(weight) for weight in weights):
        traced = jnp.asarray(weights, jnp.float32)
        return traced / traced.sum()
    values = np.asarray(weights, np.float64)
    if not np.isfinite(values).all() or not values.any():
        raise ValueError(f"`weights` must be finite, and not all 0, got {weights}.")
    values = values / values.max()
    return values / values.sum()


def _checked(layer: str, own: dict[str, Any]) -> dict[str, jax.Array]:
    """The statistics of one layer as arrays, with a count."""
    names, needed = set(own), {"mean", "var"}
    if not needed <= names or names - needed - {"count"} not in (set(), {"cov"}, {*_PARTS}):
        raise ValueError(
            "`states` must hold running statistics, mean, var and perhaps count for each layer, "
            f"got {sorted(names)} at {layer or 'its top'!r}. Fix: give batch_stats, or "
            "nnx.state(model, nnx.BatchStat), alone."
        )
    shape = np.shape(own["mean"])
    found = {"count": jnp.zeros(shape, jnp.int32)}
    for name, value in own.items():
        label = f"{layer}/{name}" if layer else name
        counts = name in ("count", "part_steps")
        array = (
            _checks.counter(label, value, shape) if counts else _checks.float_array(label, value)
        )
        if name == "cov":
            _check_cov(label, array.shape, shape)
        elif array.shape != shape:
            raise ValueError(f"`{label}` must have the shape of mean, {shape}, got {array.shape}.")
        found[name] = array
    return found


def _check_cov(label: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    size = found[-1]
    if (
        found[:1] != shape[:1]
        or found[-2:] != (size, size)
        or math.prod(found) != size * math.prod(shape)
    ):
        raise ValueError(
            f"`{label}` must have a matrix for each group of the channels of mean, {shape}, got "
            f"{found}."
        )


def _merge_layer(
    shares: Any,
    *,
    mean: jax.Array,
    var: jax.Array,
    count: jax.Array,
    cov: jax.Array | None = None,
    **parts: jax.Array,
) -> dict[str, jax.Array]:
    """The statistics of one layer; [replicas, C] to [C]."""
    wide, spread = _reduce.promoted(mean), _reduce.promoted(var)
    share = jnp.asarray(shares, wide.dtype).reshape(-1, *[1] * (mean.ndim - 1))
    share = jnp.broadcast_to(share, mean.shape)
    counted = share > 0
    taught = counted & (count > 0)
    share = jnp.where(taught | ~taught.any(0, keepdims=True), share, 0)
    every = BatchMoments(wide, jnp.zeros_like(wide), spread, share)
    whole = _merge.union(every).plain()
    merged = {
        "mean": whole.mean.astype(mean.dtype),
        "var": whole.var.astype(var.dtype),
        "count": _total(jnp.where(counted, count, 0)),
    }
    if cov is not None:
        of_channels = _reduce.promoted(cov).reshape(*mean.shape, cov.shape[-1])
        found = _covariance.merged(every, of_channels)
        merged["cov"] = found.astype(cov.dtype).reshape(cov.shape[1:])
    if parts:
        *moments, steps = (parts[name] for name in _PARTS)
        merged |= zip(_PARTS, (*_merge.union(BatchMoments(*moments)), steps.max(0)), strict=True)
    return merged


def _total(counts: jax.Array) -> jax.Array:
    """Their sum, which stays at the end of its range rather than turn negative."""
    limit = jnp.iinfo(counts.dtype).max
    fits = counts.astype(jnp.float32).sum(0) < limit
    return jnp.where(fits, counts.sum(0, dtype=counts.dtype), limit)
