"""What the conversions share: a converted layer, arrays found by name, their checks."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _checks
from bnjax._functional import bn_apply
from bnjax._types import BNParams, BNState

_OPTIONS = ("axis", "momentum", "epsilon", "unbiased")
_LISTED = 12


class Layer(NamedTuple):
    """A layer of another framework as bnjax takes it; arrays are NumPy's.

    ``y, state = bn_apply(layer.params, layer.state, x, train, **layer.options)``

    Attributes:
      params: `BNParams`, [C], in the dtypes that came.
      state: `BNState`, [C], promoted to float32 or above as by `bn_init`.
      options: axis, momentum, epsilon, unbiased: keyword arguments of `bn_apply`,
        `batch_norm` and the Flax modules.

    Example:
      >>> import numpy as np, bnjax
      >>> from bnjax import interop
      >>> params, state = bnjax.bn_init(2)
      >>> layer = interop.Layer(params, state, {"momentum": 0.9})
      >>> y, state = bnjax.bn_apply(
      ...     layer.params, layer.state, np.ones((4, 2), "f"), True, **layer.options)
      >>> print(state.mean)
      [0.1 0.1]
    """

    params: BNParams
    state: BNState
    options: dict[str, Any]


class Entry(NamedTuple):
    """An array and the name that messages give it."""

    name: str
    value: np.ndarray


class Source(NamedTuple):
    """The arrays of a model by full name, and the batch norms there, at least in part."""

    arrays: Mapping[str, Any]
    separator: str
    norms: set[str]

    def names(self) -> list[str]:
        """The batch norms in alphabetical order."""
        return sorted(self.norms)


def mapping(name: str, value: Any, fix: str = "") -> Mapping[str, Any]:
    """The value, which must be a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must map names to arrays, got {type(value).__name__}.{fix}")
    return value


def owners(names: Iterable[str], separator: str, marks: tuple[str, ...]) -> set[str]:
    """What comes before the last part of those names that end in one of the marks."""
    parts = (name.rpartition(separator) for name in names)
    return {owner for owner, _, last in parts if last in marks}


def array(name: str, value: Any) -> np.ndarray:
    """A copy in NumPy of what frameworks hold: arrays, tensors, variables, boxes."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return np.array(value)
    if hasattr(value, "detach"):  # a tensor of torch, which knows no NumPy for bfloat16
        narrow = str(value.dtype) == "torch.bfloat16"
        value = value.detach().cpu()
        result = np.array((value.float() if narrow else value).numpy())
        return result.astype(jnp.bfloat16) if narrow else result
    for method in ("get_value", "numpy"):  # variables of flax.nnx; of keras
        if callable(getattr(value, method, None)):
            return array(name, getattr(value, method)())
    if hasattr(value, "value"):  # boxes of flax.linen
        return array(name, value.value)
    result = np.array(value)
    if not jnp.issubdtype(result.dtype, jnp.number):
        raise TypeError(f"`{name}` must be an array of numbers, got {type(value).__name__}.")
    return result


def entries(
    found: Source,
    prefix: str,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    fix: str = "",
) -> dict[str, Entry]:
    """The arrays under a prefix, by last name: all that is required, none that is unknown."""
    if not isinstance(prefix, str):
        raise TypeError(f"`prefix` must be the name of a layer, got {type(prefix).__name__}.")
    prefix = prefix.removesuffix(found.separator)
    start = prefix and prefix + found.separator
    own = {k.removeprefix(start): v for k, v in found.arrays.items() if k.startswith(start)}
    if not own:
        raise ValueError(
            f"`prefix` must name a batch norm, got {prefix!r}.{_near(prefix, found.names())}"
        )
    missing = [name for name in required if name not in own]
    unknown = sorted(set(own).difference(required, optional))
    if missing or unknown:
        at = f"`{prefix}`" if prefix else "Without a `prefix`, the mapping"
        wrong = [f"missing {missing}"] * bool(missing) + [f"unknown {listed(unknown)}"] * bool(
            unknown
        )
        raise ValueError(
            f"{at} must hold {list(required)}, and nothing else but {list(optional)}; got "
            f"{listed(sorted(own))}: {', '.join(wrong)}.{fix}{_near(prefix, found.names())}"
        )
    return {
        name: Entry(start + name, array(start + name, own[name]))
        for name in (*required, *optional)
        if name in own
    }


def convert(
    roles: Mapping[str, Entry | None], count: Any, options: dict[str, Any], *, rank: int = 1
) -> Layer:
    """A checked `Layer` from entries for scale, bias, mean and var."""
    present = {role: entry for role, entry in roles.items() if entry is not None}
    first = present["mean"]
    for entry in (first, *present.values()):
        _floating(entry)
        if entry.value.ndim != rank or entry.value.size == 0:
            want = "[C]" if rank == 1 else f"of the {rank} feature axes"
            fix = f" Fix: {entry.name}.reshape(-1)." if rank == 1 and _is_keepdims(entry) else ""
            raise ValueError(
                f"`{entry.name}` must have shape {want}, got {entry.value.shape}.{fix}"
            )
        if entry.value.shape != first.value.shape:
            raise ValueError(
                f"`{entry.name}` and `{first.name}` must have one shape, got "
                f"{entry.value.shape} and {first.value.shape}."
            )
    values: dict[str, Any] = {role: entry.value for role, entry in present.items()}
    mean, var = (
        values[name].astype(_checks.compute_dtype(values[name].dtype)) for name in ("mean", "var")
    )
    params = BNParams(values.get("scale"), values.get("bias"))
    return Layer(params, BNState(mean, var, _counts(count, mean.shape)), options)


def checked(layer: Any) -> Layer:
    """The layer with NumPy arrays and all options, its parts fitting each other."""
    if not isinstance(layer, Layer):
        raise TypeError(
            f"`layer` must be an interop.Layer, got {type(layer).__name__}. "
            "Fix: interop.Layer(params, state, options)."
        )
    if len(layer.state) != 3:
        raise TypeError(
            f"`layer.state` must be a BNState(mean, var, count), got {type(layer.state).__name__}, "
            "which other frameworks have no layer for. Fix: BNState(*state[:3]), where the rest "
            "may be lost."
        )
    (scale, bias), (mean, var, count), options = layer
    unknown = sorted(set(options).difference(_OPTIONS))
    if unknown:
        raise ValueError(
            f"`options` must be of {list(_OPTIONS)} for a conversion, got {unknown} too. Fix: "
            "leave them out, and give them to the converted layer in its framework's terms."
        )
    defaults = bn_apply.__kwdefaults__ or {}
    options = {name: options.get(name, defaults[name]) for name in _OPTIONS}
    options["epsilon"] = number("epsilon", options["epsilon"], high=float("inf"))
    if not callable(options["momentum"]):
        options["momentum"] = number("momentum", options["momentum"])
    named = {"params.scale": scale, "params.bias": bias, "state.mean": mean, "state.var": var}
    roles = {
        name.rpartition(".")[2]: None if value is None else Entry(name, array(name, value))
        for name, value in named.items()
    }
    axis = options["axis"]
    rank = len(axis) if isinstance(axis, (tuple, list)) else 1
    return convert(roles, Entry("state.count", array("state.count", count)), options, rank=rank)


def constant(layer: Layer, framework: str) -> float:
    """Momentum as a number, for frameworks that have no schedules."""
    momentum = layer.options["momentum"]
    if callable(momentum):
        raise ValueError(
            f"`momentum` must be a number for {framework}, which has no schedules, got "
            f"{momentum!r}. Fix: layer._replace(options={{**layer.options, 'momentum': 0.99}})."
        )
    return float(momentum)


def one_axis(layer: Layer, framework: str) -> int:
    """The feature axis, for frameworks that have one."""
    axis = layer.options["axis"]
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if len(axes) != 1 or not isinstance(axes[0], (int, np.integer)):
        raise ValueError(
            f"`axis` must be one axis for {framework}, got {axis!r}. Fix: x, params and state "
            "with these axes reshaped to one."
        )
    return int(axes[0])


def export(
    one: Callable[[Layer, str], tuple[dict[str, np.ndarray], dict[str, Any]]],
    layer: Layer | Mapping[str, Layer],
    prefix: str,
    separator: str,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and keyword arguments of one layer, or of several by name."""
    start = prefix and prefix.removesuffix(separator) + separator
    if not isinstance(layer, Mapping):
        return one(checked(layer), start)
    arrays: dict[str, np.ndarray] = {}
    kwargs: dict[str, Any] = {}
    for name, value in layer.items():
        with_name = start + (name and name + separator)
        found, kwargs[name] = located(name, lambda v, at: one(checked(v), at), value, with_name)
        arrays.update(found)
    return arrays, kwargs


def located(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function; its errors say which layer they are about."""
    try:
        return function(*args)
    except (TypeError, ValueError) as error:
        error.add_note(f"Layer: {name!r}.")
        raise


def number(name: str, value: Any, low: float = 0.0, high: float = 1.0) -> float:
    """A Python number in [low, high]."""
    return float(_checks.number(name, value, low, high, ()))


def listed(names: list[str]) -> str:
    """Names for a message, the first dozen."""
    more = len(names) - _LISTED
    return f"{names[:_LISTED]}" + (f" and {more} more" if more > 0 else "")


def _near(prefix: str, names: list[str]) -> str:
    if not names:
        return " No batch norm with running statistics is there."
    close = difflib.get_close_matches(prefix, names, n=3)
    return f" Batch norms there: {listed(close + [name for name in names if name not in close])}."


def _floating(entry: Entry) -> None:
    if not jnp.issubdtype(entry.value.dtype, jnp.floating):
        raise TypeError(
            f"`{entry.name}` must have a real floating dtype, got {entry.value.dtype} of shape "
            f"{entry.value.shape}."
        )


def _is_keepdims(entry: Entry) -> bool:
    return entry.value.size > 0 and entry.value.size == max(entry.value.shape, default=0)


def _counts(count: Entry | int, shape: tuple[int, ...]) -> Any:
    """int32 per channel, from one counter or from one per channel."""
    name, value = count if isinstance(count, Entry) else ("count", np.array(count))
    if not jnp.issubdtype(value.dtype, jnp.integer) or value.shape not in ((), shape):
        raise ValueError(
            f"`{name}` must be an integer, or one per channel of shape {shape}, got "
            f"{value.dtype} of shape {value.shape}."
        )
    limit = np.iinfo(np.int32).max
    if np.any((value < 0) | (value > limit)):
        raise ValueError(f"`{name}` must be in [0, {limit}], got {value}.")
    return np.broadcast_to(value, shape).astype(np.int32)
