"""A call of a layer: its arguments checked, and the rule of the running average.

What all norms share, apart from which entries are normalized together.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _checks, _normalize, _placement, _reduce
from bnjax._types import BNParams, BNState, Moments


class Static(NamedTuple):
    """What the program depends on. A number as weight keeps 1 - w exact, as in Flax."""

    plan: _normalize.Plan
    unbiased: bool
    weight: float | None


class Call(NamedTuple):
    """Arguments of a layer, checked. `weight`: of the old statistics, where it is no number."""

    static: Static
    inputs: _normalize.Inputs
    state: Any  # of the norm
    weight: jax.Array | None


def prepare(
    params: BNParams,
    state: BNState,
    x: jax.Array,
    train: bool | jax.Array,
    *,
    axis: int | tuple[int, ...],
    momentum: float | jax.Array | _checks.Schedule,
    epsilon: float | jax.Array,
    unbiased: bool,
    mask: jax.Array | None,
    axis_name: Hashable | None,
    axis_index_groups: Any,
    dtype: Any,
) -> Call:
    """The arguments of `bn_apply`, checked while tracing."""
    x = _checks.float_array("x", x)
    feature_axes = _checks.feature_axes(axis, x.shape)
    shape = tuple(x.shape[a] for a in feature_axes)
    axes = tuple(a for a in range(x.ndim) if a not in feature_axes)
    state = _check_state(state, shape, feature_axes)
    train = _checks.flag("train", train)
    unbiased = _checks.static_flag("unbiased", unbiased)
    fix = "cumulative(), with the parentheses"
    weight = scheduled("momentum", momentum, 0.0, 1.0, state.count, what="weights", fix=fix)
    plan = _normalize.Plan(
        _reduce.reduction(axes, axis_name, axis_index_groups),
        x.dtype if dtype is None else _checks.float_dtype("dtype", dtype),
        train if isinstance(train, bool) else None,
    )
    inputs = _inputs(params, state, x, train, mask, epsilon, feature_axes)
    if isinstance(weight, (int, float)):
        return Call(Static(plan, unbiased, float(weight)), inputs, state, None)
    return Call(Static(plan, unbiased, None), inputs, state, jnp.asarray(weight))


def run(
    compute: Callable[..., tuple[jax.Array, Any]], static: Any, call: Call
) -> tuple[jax.Array, Any]:
    """compute(static, inputs, state, weight), as one program; no new state is the old one."""
    program = _reduce.compiled(compute, _normalize.is_mapped(call.static.plan))
    y, new = program(static, *call[1:])
    return y, call.state if new is None else new


def update(
    static: Static,
    inputs: _normalize.Inputs,
    given: BNState,
    batch: Moments,
    weight: jax.Array | None,
    when: jax.Array | None = None,
) -> BNState:
    """running = weight * running + (1 - weight) * batch, where the batch can be learned from.

    `when`: further conditions, per channel.
    """
    axes = static.plan.reduction.axes
    state, weight = _placement.as_features((given, weight), inputs.x, axes)
    mean, var = batch.mean, batch.var
    # In lax: the operators of jnp take several times as long to trace.
    learns = lax.bitwise_and(lax.is_finite(mean), lax.is_finite(var))
    learns = lax.bitwise_and(learns, lax.ge(batch.count, np.asarray(2, batch.count.dtype)))
    if inputs.train is not None:
        learns = learns & inputs.train
    if when is not None:
        learns = learns & when
    if static.unbiased:
        var = var * (batch.count / jnp.maximum(batch.count - 1, 1))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        wide = _reduce.promoted(old)
        w, rest = _weights(static.weight, weight, wide.dtype)
        updated = lax.add(lax.mul(w, wide), lax.mul(rest, new.astype(wide.dtype)))
        return _reduce.where(learns, updated.astype(old.dtype), old)

    # A count at the end of its range stays there rather than turn negative.
    room = lax.lt(state.count, lax.full_like(state.count, jnp.iinfo(state.count.dtype).max))
    count = lax.add(state.count, lax.bitwise_and(learns, room).astype(state.count.dtype))
    new = BNState(average(state.mean, mean), average(state.var, var), count)
    return _placement.as_given(new, given)


def _weights(number: float | None, weight: jax.Array | None, dtype: Any) -> tuple[Any, Any]:
    """w and 1 - w, of a number, if there is one."""
    if number is not None:
        return np.asarray(number, dtype), np.asarray(1 - number, dtype)
    w = jnp.asarray(weight, dtype)
    return w, 1 - w


def _check_state(state: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> BNState:
    if not isinstance(state, BNState):
        raise TypeError(
            f"`state` must be a BNState(mean, var, count), got {type(state).__name__}. "
            "Fix: params, state = bn_init(features)."
        )
    return BNState(
        _checks.vector("state.mean", state.mean, shape, axes),
        _checks.vector("state.var", state.var, shape, axes),
        _checks.counter("state.count", state.count, shape),
    )


def _inputs(
    params: Any,
    state: BNState,
    x: jax.Array,
    train: bool | jax.Array,
    mask: Any,
    epsilon: Any,
    axes: tuple[int, ...],
) -> _normalize.Inputs:
    if not isinstance(params, BNParams):
        raise TypeError(
            f"`params` must be a BNParams(scale, bias), got {type(params).__name__}. "
            "Fix: params, state = bn_init(features)."
        )
    shape = state.mean.shape
    dtype = _checks.compute_dtype(x.dtype)
    scale, bias = (
        None
        if value is None
        else _checks.vector(f"params.{name}", value, shape, axes).astype(dtype)
        for name, value in zip(params._fields, params, strict=True)
    )
    limit = float(jnp.finfo(dtype).max)
    epsilon = jnp.asarray(_checks.number("epsilon", epsilon, 0.0, limit, shape), dtype)
    return _normalize.Inputs(
        x=x,
        mask=_checks.mask(mask, x.shape),
        train=None if isinstance(train, bool) else jnp.asarray(train),
        scale=scale,
        bias=bias,
        mean=state.mean.astype(dtype),
        var=state.var.astype(dtype),
        epsilon=epsilon,
    )


def scheduled(
    name: str, value: Any, low: float, high: float, count: jax.Array, *, what: str, fix: str
) -> Any:
    """A number in [low, high]: as given, or what the schedule says of the counts.

    `what`: it says, `fix`: a schedule, for those who gave something else.
    """
    if not callable(value):
        return _checks.number(name, value, low, high, count.shape)
    try:
        found = value(count)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be a number or a schedule: array of counts -> {what}, got {value!r}, "
            f"which failed: {error} Fix: {name}={fix}."
        ) from error
    return _checks.number(f"{name}(state.count)", found, low, high, count.shape)
