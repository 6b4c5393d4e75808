"""What the Flax layers share: all but the variables."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bnjax import _checks
from bnjax._functional import batch_norm
from bnjax._types import BNParams, Norm

# The numerics that a layer has as fields, and that a norm has bound.
DEFAULTS = {"momentum": 0.99, "epsilon": 1e-5, "unbiased": False}


def choose_norm(norm: Norm | None, **options: Any) -> Norm:
    """The norm that was given, or `batch_norm` with the layer's options."""
    if norm is None:
        return batch_norm(**options)
    if not isinstance(norm, Norm):
        raise TypeError(
            f"`norm` must be a Norm, got {norm!r}. Fix: norm=bnjax.batch_norm(), "
            "with the parentheses."
        )
    for name, value in options.items():
        if not _checks.same(value, DEFAULTS[name]):
            raise ValueError(
                f"`{name}` must be bound in `norm` when a norm is given, got "
                f"{name}={value!r} beside it. Fix: norm=batch_norm({name}={value!r})."
            )
    return norm


def check_param_dtype(dtype: Any) -> None:
    """Parameters are real: flax would make complex ones, which promote the output."""
    if not jnp.issubdtype(dtype, jnp.floating):
        _checks.float_dtype("param_dtype", dtype)


def stored(norm: Norm) -> tuple[str, ...]:
    """Names of the running statistics that a layer keeps: `count` where it is needed."""
    return tuple(name for name in norm.state._fields if name != "count" or norm.needs_count)


def initial(norm: Norm, shape: tuple[int, ...], dtype: Any) -> dict[str, Callable[[], jax.Array]]:
    """Makers of the running statistics of a new layer, by name."""
    makers: dict[str, Callable[[], jax.Array]] = {
        "mean": lambda: jnp.zeros(shape, dtype),
        "var": lambda: jnp.ones(shape, dtype),
        "count": lambda: jnp.zeros(shape, jnp.int32),
    }

    def further(name: str) -> jax.Array:
        options = {"use_scale": False, "use_bias": False, "param_dtype": dtype}
        return getattr(norm.init(shape, **options)[1], name)

    return {name: makers.get(name, partial(further, name)) for name in stored(norm)}


def apply(
    norm: Norm,
    params: BNParams,
    statistics: Mapping[str, jax.Array],
    x: jax.Array,
    inference: bool | jax.Array,
    *,
    mask: Any,
    **options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Applies the norm to a layer's variables: y, and those of `statistics` anew."""
    zeros = jnp.zeros(statistics["mean"].shape, jnp.int32)
    state = norm.state(**{"count": zeros, **statistics})
    train = not inference if isinstance(inference, bool) else jnp.logical_not(inference)
    y, new = norm.apply(params, state, x, train, mask=_as_flax(mask, x.ndim), **options)
    return y, {name: getattr(new, name) for name in statistics}


def _as_flax(mask: Any, rank: int) -> jax.Array | None:
    """The mask cast to booleans, with axes of size 1 added in front."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, bool)
    return jnp.expand_dims(mask, tuple(range(max(0, rank - mask.ndim))))


def missing_count(where: str) -> str:
    """The fix for statistics without the count that a schedule needs."""
    return (
        f"for `count`, which the norm or a schedule as `momentum` reads, supply {where}, or the "
        "number of updates that the statistics have seen"
    )
