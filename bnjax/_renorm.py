"""Batch renormalization: training that normalizes as inference does, for small batches."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _checks, _functional, _layer, _normalize, _placement, _reduce
from bnjax._normalize import Inputs
from bnjax._types import BNParams, BNState, Norm

# A schedule from 1 to r_max may round its first value: (1 - r_max) + r_max.
_ABOUT_ONE = 1 - 4e-7


def renorm(
    *,
    r_max: float | jax.Array | _checks.Schedule = 3.0,
    d_max: float | jax.Array | _checks.Schedule = 5.0,
    **options: Any,
) -> Norm:
    """Batch normalization corrected towards the running statistics, within limits.

    Training normalizes with the batch's moments, then corrects:

        y = ((x - mean_B) / sigma_B * r + d) * scale + bias
        r = clip(sigma_B / sigma, 1 / r_max, r_max)
        d = clip((mean_B - mean) / sigma, -d_max, d_max)

    with sigma_B = sqrt(var_B + epsilon) of the batch and sigma = sqrt(var + epsilon) of
    the running statistics before their update. r and d are constants for the derivative.
    Within the limits y = (x - mean) / sigma * scale + bias, as at inference; with r_max = 1
    and d_max = 0 it is that of `bn_apply`. Inference and the update are those of
    `bn_apply`.

    r = 1 and d = 0 where the running statistics are none: in a channel that was never
    trained (count 0), whose 0 and 1 tell nothing, and where they are not finite. So the
    Flax modules store the count; for a checkpoint without one give the number of updates,
    or zeros. With a number as momentum 0 and 1 weigh on the first 1 / (1 - momentum)
    updates: take `momentum=debiased(0.99)`, or limits that open after them.

    Args:
      r_max: largest correction of the deviation, at least 1; `jnp.inf` for no limit. It
        may be a number, one per channel, or a schedule, an elementwise function of
        `state.count`.
      d_max: largest correction of the mean, in running deviations, at least 0; likewise.
      **options: keyword arguments of `bn_apply`, bound as by `batch_norm`.

    Returns:
      `Norm(init, apply, needs_count=True)`; `apply` takes and returns what `bn_apply` does.

    Raises:
      TypeError, ValueError: limits that are no numbers or out of range, unknown options; in
      the call, as `bn_apply`, and for a schedule that fails or leaves the range.

    Example: the limits of the paper, which open from 1 and 0 after 5000 steps.
      >>> import jax.numpy as jnp, optax, bnjax
      >>> r_max = optax.linear_schedule(1.0, 3.0, 35_000, transition_begin=5_000)
      >>> d_max = optax.linear_schedule(0.0, 5.0, 20_000, transition_begin=5_000)
      >>> norm = bnjax.renorm(r_max=r_max, d_max=d_max)
      >>> params, state = norm.init(1)
      >>> state = state._replace(count=jnp.array([17_000]))
      >>> x = jnp.array([[3.0], [5.0]])  # mean 4, deviation 1
      >>> y, state = norm.apply(params, state, x, train=True)
      >>> print(d_max(17_000), y[:, 0].round())
      3.0 [2. 4.]

    Source: Ioffe (2017), "Batch Renormalization", https://arxiv.org/abs/1702.03275
    """
    for name, value, low in (("r_max", r_max, 1.0), ("d_max", d_max, 0.0)):
        if not callable(value):
            _checks.number(name, value, low, math.inf, np.shape(value))

    def apply(
        params: BNParams, state: BNState, x: jax.Array, train: bool | jax.Array, **call: Any
    ) -> tuple[jax.Array, BNState]:
        prepared = _layer.prepare(params, state, x, train, **call)
        static, inputs = prepared.static, prepared.inputs
        if static.plan.train is False:
            return _layer.run(_functional.compute, static, prepared)
        limit = partial(_limit, count=prepared.state.count, dtype=inputs.var.dtype)
        inputs = inputs._replace(r_max=limit("r_max", r_max, 1.0), d_max=limit("d_max", d_max, 0.0))
        return _layer.run(_compute, static, prepared._replace(inputs=inputs))

    return _functional.variant("renorm", apply, options)._replace(needs_count=True)


def _limit(name: str, value: Any, low: float, *, count: jax.Array, dtype: Any) -> jax.Array:
    """A limit: as given, or what the schedule says."""
    least = _ABOUT_ONE if low == 1 and callable(value) else low
    fix = f"optax.linear_schedule({low}, {low + 2}, 10_000)"
    limit = _layer.scheduled(name, value, least, math.inf, count, what="limits", fix=fix)
    limit = jnp.asarray(limit, dtype)
    return lax.max(limit, jnp.asarray(low, dtype)) if callable(value) else limit


def _compute(
    static: _layer.Static, inputs: Inputs, given: BNState, weight: jax.Array | None
) -> tuple[jax.Array, BNState | None]:
    axes = static.plan.reduction.axes
    inputs = _normalize.placed(inputs, axes)
    trained = _placement.as_features(given.count, inputs.x, axes) > 0

    def where_trained(limit: jax.Array | None, otherwise: float) -> jax.Array:
        assert limit is not None  # as this is renormalization
        return _reduce.where(trained, _placement.broadcast(limit, inputs.var), otherwise)

    # Limits of 1 and 0 are no correction.
    inputs = inputs._replace(
        r_max=where_trained(inputs.r_max, 1),
        d_max=where_trained(inputs.d_max, 0),
        scale=lax.full_like(inputs.var, 1) if inputs.scale is None else inputs.scale,
    )
    return _functional.compute(static, inputs, given, weight)
