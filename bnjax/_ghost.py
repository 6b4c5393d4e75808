"""Ghost batch normalization: statistics per group of the batch."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _checks, _functional, _layer, _merge, _normalize, _placement
from bnjax._normalize import Inputs
from bnjax._reduce import Reduction
from bnjax._types import BNState, Norm


def ghost(size: int, *, uneven: bool = False, **options: Any) -> Norm:
    """Batch normalization of groups of the batch, each by its own moments.

    y = (x - mean_g) / sqrt(var_g + epsilon) * scale + bias for the examples of group
    g, `size` consecutive ones along the first axis that is reduced. The running
    statistics learn once per call, from the merged moments of all groups,
    mean = sum(n_g * mean_g) / n, var = sum(n_g * (var_g + (mean_g - mean)**2)) / n.
    Inference is that of `bn_apply`. A group without unmasked entries in a channel is
    normalized with the running statistics there.

    `axis_name` merges the groups of all devices, for the running statistics only. Of
    a batch that is sharded under jit, groups that lie on one device each are
    normalized without communication: with size = examples per device, that turns
    synchronization off. (Groups across devices communicate; on a mesh of explicit axes
    they are an error.)

    Args:
      size: examples in a group, at least 1; divides the batch.
      uneven: whether the last group may be smaller.
      **options: keyword arguments of `bn_apply`, bound as by `batch_norm`.

    Returns:
      `Norm(init, apply, needs_count)`; `apply` takes and returns what `bn_apply` does.

    Raises:
      TypeError, ValueError: a size that is no positive integer, unknown options; in the
      call, as `bn_apply`, and for a batch that `size` does not divide.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> norm = bnjax.ghost(2, momentum=0.0)
      >>> params, state = norm.init(1)
      >>> x = jnp.array([[1.0], [3.0], [11.0], [13.0]])
      >>> y, state = norm.apply(params, state, x, train=True)
      >>> print(y[:, 0].round(3), state.mean, state.var)
      [-1.  1. -1.  1.] [7.] [26.]

    Source: Hoffer, Hubara & Soudry (2017), "Train longer, generalize better",
    Algorithm 1; there the running statistics learn from each group in turn.
    """
    size = _checks.positive("size", size)
    uneven = _checks.static_flag("uneven", uneven)

    def apply(
        params: Any, state: BNState, x: jax.Array, train: bool | jax.Array, **call: Any
    ) -> tuple[jax.Array, BNState]:
        prepared = _layer.prepare(params, state, x, train, **call)
        static = prepared.static
        if static.plan.train is False:
            return _layer.run(_functional.compute, static, prepared)
        groups = _groups(prepared.inputs.x, static.plan.reduction.axes, size, uneven)
        return _layer.run(_compute, (static, groups), prepared)

    return _functional.variant("ghost", apply, options)


class _Groups(NamedTuple):
    """How a batch falls into groups: an axis is cut in two, groups before examples."""

    axis: int
    size: int
    number: int
    examples: int  # of the batch; the last group lacks the rest

    def cut(self, x: jax.Array) -> jax.Array:
        """x, or a mask, with an axis of groups; filled up with 0, that is False."""
        if x.shape[self.axis] != self.examples:  # one for all: a mask
            return jnp.expand_dims(x, self.axis)
        missing = self.number * self.size - self.examples
        if missing:
            widths = [(0, missing if a == self.axis else 0, 0) for a in range(x.ndim)]
            x = lax.pad(x, jnp.zeros((), x.dtype), widths)
        return _placement.cut(x, self.axis, self.number, self.size)

    def join(self, y: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        y = _placement.join(y, self.axis, like)
        return lax.slice_in_dim(y, 0, self.examples, axis=self.axis)


def _groups(x: jax.Array, axes: tuple[int, ...], size: int, uneven: bool) -> _Groups:
    if not axes:
        raise ValueError(
            f"`x` must have an axis of examples for ghost({size}), got shape {x.shape}, of "
            "feature axes only. Fix: x[None] for one example."
        )
    examples = x.shape[axes[0]]
    if examples % size and not uneven:
        if not isinstance(examples, int):  # of jax.export
            raise ValueError(
                f"`size` must divide the examples along axis {axes[0]} of `x`, got {size} and the "
                f"symbolic number {examples}. Fix: jax.export.symbolic_shape('{size}*groups'), or "
                f"ghost({size}, uneven=True), whose last group is smaller."
            )
        fits = math.gcd(examples, size)
        raise ValueError(
            f"`size` must divide the {examples} examples along axis {axes[0]} of `x`, got {size}. "
            f"Fix: ghost({fits}), or ghost({size}, uneven=True), whose last group is smaller."
        )
    groups = _Groups(axes[0], size, -(-examples // size), examples)
    shards = _placement.shards(x, axes[0])
    if groups.number % shards or (shards > 1 and examples % size):
        raise ValueError(
            f"`size` must cut the {examples} examples along axis {axes[0]} of `x` into groups of "
            f"equal size that divide evenly over its {shards} shards, on a mesh of explicit axes, "
            f"got {groups.number} groups of {size}. Fix: a size that divides {examples // shards}."
        )
    return groups


def _compute(
    static: tuple[_layer.Static, _Groups],
    inputs: Inputs,
    given: BNState,
    weight: jax.Array | None,
) -> tuple[jax.Array, BNState]:
    layer, groups = static
    r = layer.plan.reduction
    inputs = _normalize.placed(inputs, r.axes)
    # Groups become a feature axis, where it is cut out of the batch.
    shifted = tuple(a + (a >= groups.axis) for a in r.axes)
    across = sum(a not in r.axes for a in range(groups.axis))
    grouped = _grouped(inputs, groups, across, shifted)
    plan = layer.plan._replace(reduction=Reduction(shifted, branches=False))
    y, batch = _normalize.normalize(plan, grouped)
    assert batch is not None  # as this is training
    parts = batch._replace(count=_placement.broadcast(batch.count, batch.var))
    whole = _merge.merge_over(r._replace(axes=(across,)), parts, inputs.mean)
    return groups.join(y, inputs.x), _layer.update(layer, inputs, given, whole.plain(), weight)


def _grouped(inputs: Inputs, groups: _Groups, across: int, axes: tuple[int, ...]) -> Inputs:
    """The inputs for a batch with an axis of groups, and vectors with one at `across`."""
    x, mask, train, *vectors = inputs
    if groups.number * groups.size != groups.examples:
        shape = tuple(groups.examples if a == groups.axis else 1 for a in range(x.ndim))
        real = jnp.ones(shape, bool)
        mask = real if mask is None else mask & real
    mask = None if mask is None else groups.cut(mask)
    x = groups.cut(x)

    def repeated(v: jax.Array | None) -> jax.Array | None:
        if v is None or not v.ndim:
            return v
        return _placement.repeated(v, across, groups.number, x, axes)

    return Inputs._make((x, mask, train, *map(repeated, vectors)))
