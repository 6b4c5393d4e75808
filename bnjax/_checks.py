"""Canonical axes, and the static checks of arguments with their messages.

Every check runs while tracing. A message states the rule, what came, and the
fix where one is obvious.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[jax.Array], Any]


def is_concrete(value: Any) -> bool:
    """True where the value can be looked at while tracing."""
    return not isinstance(value, jax.core.Tracer)


def compute_dtype(dtype: Any) -> Any:
    """promote(dtype, float32), for floating dtypes, also under strict promotion."""
    dtype = jnp.dtype(dtype)
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def float_array(name: str, x: Any) -> jax.Array:
    """`x` as an array, which must be of a real floating dtype."""
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(
            f"`{name}` must be a JAX or NumPy array, got {type(x).__name__}. "
            f"Fix: jnp.asarray({name}, jnp.float32)."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must have a real floating dtype, got {x.dtype} of shape "
            f"{x.shape}. Fix: {name}.astype(jnp.float32)."
        )
    return jnp.asarray(x)


def float_dtype(name: str, dtype: Any) -> Any:
    """The canonical form of a floating dtype that the caller asked for."""
    try:
        if dtype is None:  # which NumPy reads as float64
            raise TypeError("no dtype")
        result = jnp.zeros((), dtype).dtype  # warns, as JAX does, of float64 without x64
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be a floating dtype, got {dtype!r}. Fix: {name}=jnp.float32."
        ) from error
    if not jnp.issubdtype(result, jnp.floating):
        raise TypeError(
            f"`{name}` must be a floating dtype, got {result}. Fix: {name}=jnp.float32."
        )
    return result


def features(value: Any, name: str = "features", maker: str = "bn_init") -> tuple[int, ...]:
    """The shape of the parameters: positive sizes of the feature axes."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    if isinstance(value, str) or not all(_is_int(size) for size in sizes):
        raise TypeError(
            f"`{name}` must be an int or a tuple of ints, got {value!r}. Fix: {maker}(x.shape[-1])."
        )
    if any(size < 1 for size in sizes):
        raise ValueError(f"`{name}` must be positive, got {value!r}.")
    return tuple(operator.index(size) for size in sizes)


def feature_axes(axis: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Feature axes as sorted, distinct, non-negative integers."""
    rank = len(shape)
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if isinstance(axis, str) or not all(_is_int(a) for a in axes):
        raise TypeError(f"`axis` must be an int or a tuple of ints, got {axis!r}.")
    if rank == 0:
        raise ValueError(
            "`x` must have at least one axis, that of the features, got a scalar. "
            "Fix: x[None, None] for one example of one feature."
        )
    for a in axes:
        if not -rank <= a < rank:
            raise ValueError(
                f"`axis` must be in [{-rank}, {rank}) for `x` of shape {shape}, got {a}."
            )
    result = sorted({operator.index(a) % rank for a in axes})
    if len(result) != len(axes):
        raise ValueError(
            f"`axis` must name distinct axes, got {axis!r}, which for `x` of "
            f"shape {shape} names one twice."
        )
    return tuple(result)


def flag(name: str, value: Any) -> Any:
    """A Python bool, or a boolean scalar array when traced."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if (
        isinstance(value, (jax.Array, np.ndarray))
        and value.dtype == jnp.bool_
        and value.shape == ()
    ):
        return value
    if isinstance(value, (jax.Array, np.ndarray)):
        got = f"an array of dtype {value.dtype} and shape {value.shape}"
    else:
        got = repr(value)
    raise TypeError(
        f"`{name}` must be a bool or a boolean scalar array, got {got}. "
        f"Fix: {name}=True or {name}=False."
    )


def static_flag(name: str, value: Any) -> bool:
    """A Python bool, where the choice changes the program."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def state_type(state: Any, kind: type[tuple[Any, ...]], maker: str) -> None:
    if not isinstance(state, kind):
        raise TypeError(
            f"`state` must be a {kind.__name__}, got {type(state).__name__}. "
            f"Fix: params, state = {maker}.init(features)."
        )


def positive(name: str, value: Any) -> int:
    """A positive Python int."""
    if not _is_int(value):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if not 1 <= value < 2**31:
        raise ValueError(f"`{name}` must be at least 1 and below 2**31, got {value}.")
    return operator.index(value)


def mask(value: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """Booleans of the rank of `x` that broadcast to it, or None."""
    if value is None:
        return None
    if not isinstance(value, (jax.Array, np.ndarray)) or value.dtype != jnp.bool_:
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"`mask` must be an array of booleans, True where an entry counts, "
            f"got {got}. Fix: jnp.asarray(mask, bool)."
        )
    fits = len(value.shape) == len(shape) and all(
        m in (1, s) for m, s in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`mask` must have the rank of `x` and broadcast to its shape {shape}, "
            f"got shape {value.shape}. Fix: give each axis its size in `x` or 1, as in "
            "mask[:, None] for one boolean per example of a matrix."
        )
    return jnp.asarray(value)


def vector(name: str, value: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    """A parameter or a running statistic: floating, of the feature axes' sizes."""
    value = float_array(name, value)
    if value.shape != shape:
        raise ValueError(
            f"`{name}` must have the sizes of the feature axes {axes} of `x`, "
            f"{shape}, got shape {value.shape}. Fix: bn_init({_sizes(shape)}), or "
            "the right `axis`."
        )
    return value


def counter(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """The count of accepted updates: integers, one per channel."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.signedinteger):
        raise TypeError(
            f"`{name}` must be an array of signed integers, got "
            f"{dtype or type(value).__name__}. Fix: jnp.zeros({shape}, jnp.int32)."
        )
    if value.shape != shape:
        raise ValueError(
            f"`{name}` must have one entry per channel, shape {shape}, got shape "
            f"{value.shape}. Fix: jnp.full({shape}, n, jnp.int32)."
        )
    return jnp.asarray(value)


def number(name: str, value: Any, low: float, high: float, shape: tuple[int, ...]) -> Any:
    """A real number in [low, high], or one per channel; range checked when concrete."""
    if isinstance(value, bool) or not (
        isinstance(value, (int, float, jax.Array, np.ndarray, np.generic))
        and jnp.issubdtype(jnp.result_type(value), jnp.number)
        and not jnp.issubdtype(jnp.result_type(value), jnp.complexfloating)
    ):
        raise TypeError(f"`{name}` must be a real number, got {value!r}.")
    if np.shape(value) not in ((), shape):
        raise ValueError(
            f"`{name}` must be a scalar or have one entry per channel, shape "
            f"{shape}, got shape {np.shape(value)}."
        )
    if is_concrete(value):
        # Compared as they came: an integer may be larger than any float.
        concrete = np.asarray(value)
        if not np.all((concrete >= low) & (concrete <= high)):
            raise ValueError(f"`{name}` must be in [{low:g}, {high:g}], got {value}.")
    return value


def names(axis_name: Any, axis_index_groups: Any) -> None:
    """Names of mapped axes are hashable; groups need a name."""
    if axis_index_groups is not None and axis_name is None:
        raise ValueError(
            "`axis_index_groups` needs `axis_name`, the mapped axis that the groups "
            f"divide, got axis_index_groups={axis_index_groups!r} and axis_name=None."
        )
    if axis_index_groups is not None and not _is_groups(axis_index_groups):
        raise TypeError(
            "`axis_index_groups` must be a list of lists of indices, got "
            f"{axis_index_groups!r}. Fix: [[0, 1], [2, 3]] for two groups of two."
        )
    try:
        hash(axis_name)
    except TypeError as error:
        raise TypeError(
            f"`axis_name` must be a name or a tuple of names, got {axis_name!r}."
        ) from error


def same(a: Any, b: Any) -> bool:
    """Whether two options are one; arrays only if they are the same object."""
    arrays = (jax.Array, np.ndarray)
    if a is b or isinstance(a, arrays) or isinstance(b, arrays):
        return a is b
    return bool(a == b)


def _is_groups(value: Any) -> bool:
    def is_list(v: Any) -> bool:
        return isinstance(v, Sequence) and not isinstance(v, str)

    return is_list(value) and all(is_list(g) and all(_is_int(i) for i in g) for g in value)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def _sizes(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else str(shape)
