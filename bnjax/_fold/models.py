"""What folding reads off layers of linen and nnx, by the attributes that both have."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _checks
from bnjax._fold import kernels, layouts
from bnjax._fold.layouts import Affine, Layout
from bnjax._types import BNParams, BNState, Norm

Kind = Literal["dense", "conv", "transposed"]


class Layer(NamedTuple):
    """Geometry of a Dense or convolution, and the mask of its kernel."""

    layout: Layout
    mask: Any = None


def layer(module: Any, kind: Kind) -> Layer:
    """The geometry of a layer."""
    if kind == "dense":
        return Layer(Layout())
    if kind == "conv":
        layout = Layout(
            groups=module.feature_group_count,
            padding=module.padding,
            input_dilation=module.input_dilation,
        )
        return Layer(layout, module.mask)
    axes = (-2, -1) if module.transpose_kernel else (-1, -2)
    dilation = 1 if module.strides is None else module.strides
    return Layer(Layout(*axes, 1, module.padding, dilation, True), module.mask)


def base_of(module: Any, bases: Iterable[type]) -> type | None:
    """That class of a library which a layer is or derives from."""
    return next((base for base in bases if isinstance(module, base)), None)


def own_method(cls: type, base: type, path: str) -> str | None:
    """Layers that derive from those of a library, and do something else in its place."""
    fields = getattr(base, "__dataclass_fields__", {})
    derived = cls.__mro__[: cls.__mro__.index(base)]
    for name, value in (item for c in derived for item in vars(c).items()):
        special = name.startswith("__") and name not in ("__call__", "__getattribute__")
        replaces = hasattr(base, name) and name not in fields and not special
        if replaces and (callable(value) or isinstance(value, property)):
            return f"{path} is a {cls.__name__} with a `{name}` of its own"
    return None


def layer_refusal(module: Any, base: type, path: str) -> str | None:
    """Layers that may compute something else than a product with their kernel."""
    plain = (None, lax.dot_general, lax.conv_general_dilated)
    for name in (
        "dot_general",
        "dot_general_cls",
        "conv_general_dilated",
        "conv_general_dilated_cls",
    ):
        if not any(getattr(module, name, None) is value for value in plain):
            return f"{path} has a `{name}` of its own"
    promote = getattr(module, "promote_dtype", None)
    if promote is not None and not getattr(promote, "__module__", "").startswith("flax."):
        return f"{path} has a `promote_dtype` of its own"
    return own_method(type(module), base, path)


def norm_refusal(module: Any, path: str, shape: tuple[int, ...], mask: Any) -> str | None:
    """Calls of a normalization that are no map of the last axis."""
    if mask is not None:
        return f"{path} is called with a mask"
    axes = _checks.feature_axes(module.axis, shape)
    if axes != (len(shape) - 1,):
        return f"{path} has the feature axes {axes} of an input of shape {shape}, not the last"
    return None


def split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The input of a layer's call apart from the other arguments."""
    if args:
        return args[0], args[1:], dict(kwargs)
    named = dict(kwargs)
    return named.pop("x" if "x" in named else "inputs"), (), named


def require_inference(
    module: Any, name: str, rest: Any, named: Mapping[str, Any], fix: str
) -> None:
    """Folding is for evaluation, decided while tracing; arguments are those after the input."""
    flag = rest[0] if rest else named.get("use_running_average")
    flag = module.use_running_average if flag is None else flag
    if not isinstance(flag, (bool, np.bool_)) or not flag:
        raise ValueError(
            f"{name} must be called with use_running_average=True where it is folded, got "
            f"{flag!r}. Fix: {fix}."
        )


class Map(NamedTuple):
    """A normalization at inference, and its largest mean in deviations; None if traced."""

    affine: Affine
    deviations: float | None


def norm_of(module: Any) -> Norm | None:
    """The norm of a layer that has one of its own, or switches."""
    if getattr(module, "switched", None) is not None:
        return module._norm()
    return getattr(module, "norm", None)


def norm_map(module: Any, variables: Mapping[str, Any]) -> Map | str:
    """The map of a layer, from its variables by name; or why there is none."""
    params = BNParams(variables.get("scale"), variables.get("bias"))
    mean = jnp.asarray(variables["mean"])
    count = variables.get("count", jnp.zeros(mean.shape, jnp.int32))
    state = BNState(mean, jnp.asarray(variables["var"]), count)
    norm = norm_of(module)
    if norm is not None and norm.always_updates:
        return "its running statistics learn at inference, and would be lost"
    if norm is not None and _mixes(norm, mean.shape):
        return "its `norm` whitens groups of channels, which no scale and shift per channel do"
    try:
        if norm is None:
            affine = kernels.affine(params, state, epsilon=module.epsilon)
        else:
            affine = _probe(norm, params, state)
    except ValueError as error:
        return str(error)
    return Map(affine, _deviations(affine, params, mean))


def _mixes(norm: Norm, shape: tuple[int, ...]) -> bool:
    """Whether channels have covariances with others."""
    cov = getattr(jax.eval_shape(lambda: norm.init(shape)[1]), "cov", None)
    return cov is not None and cov.shape[-1] > 1


def _deviations(a: Affine, params: BNParams, mean: Any) -> float | None:
    if not all(_checks.is_concrete(v) for v in (a.scale, params.scale, mean)):
        return None
    # scale = gamma / deviation; a channel of gamma 0 is constant, and its mean costs nothing.
    gamma = np.ones(()) if params.scale is None else np.abs(np.asarray(params.scale, np.float64))
    inverse = np.divide(np.abs(a.scale), gamma, out=np.zeros_like(a.scale), where=gamma > 0)
    return float(np.max(np.abs(np.asarray(mean, np.float64)) * inverse, initial=0.0))


def same_numerics(one: tuple[Any, Any], other: tuple[Any, Any], shapes: Mapping[str, Any]) -> bool:
    """Whether normalizations with these (epsilon, norm) are one map of their variables."""
    if one == other:
        return True
    if one[1] is None or other[1] is None:
        return False
    # Norms are closures, often made anew in each call: only what they do tells.
    rng = np.random.default_rng(0)
    v = {name: rng.uniform(0.5, 2, s.shape).astype(s.dtype) for name, s in shapes.items()}
    state = BNState(v["mean"], v["var"], v.get("count", np.ones(v["mean"].shape, np.int32)))
    params = BNParams(v.get("scale"), v.get("bias"))
    with jax.ensure_compile_time_eval():
        maps = [_probe(norm, params, state) for _, norm in (one, other)]
    return all(np.array_equal(a, b) for a, b in zip(*maps, strict=True))


def _probe(norm: Norm, params: BNParams, known: BNState) -> Affine:
    """The map of any `Norm`, whose epsilon only its function knows, in float64."""
    with jax.enable_x64(True):
        state = norm.init(known.mean.shape)[1]._replace(**known._asdict())

        def wide(v: Any) -> jax.Array:
            floating = jnp.issubdtype(v.dtype, jnp.floating)
            return jnp.asarray(np.asarray(v), jnp.float64 if floating else v.dtype)

        params, state = jax.tree.map(wide, (params, state))

        # Beside others, as a norm that takes moments of the batch is no such map.
        others = np.random.default_rng(1).normal(size=(2, *state.mean.shape))

        def evaluate(x: jax.Array) -> jax.Array:
            return norm.apply(params, state, jnp.stack([x, *others]), False)[0][0]

        zero = jnp.zeros(state.mean.shape)
        shift, scale = jax.jvp(evaluate, (zero,), (zero + 1,))
        # A map that mixes channels or bends fails at a point in general position.
        point = np.random.default_rng(0).normal(size=zero.shape)
        expected = np.asarray(scale) * point + np.asarray(shift)
        got = np.asarray(evaluate(jnp.asarray(point)))
    if not np.all(np.abs(got - expected) <= 1e-4 * (1 + np.abs(expected))):
        raise ValueError("its `norm` is not one finite scale and shift per channel at inference")
    return Affine(np.asarray(scale, np.float64), np.asarray(shift, np.float64))


def fold_parameters(
    path: str,
    described: Layer,
    kernel: jax.Array,
    bias: jax.Array | None,
    affines: list[tuple[Affine, bool]],
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias with normalizations folded in, rounded once; True: the norm is before."""
    try:
        return _fold_parameters(described, kernel, bias, affines)
    except ValueError as error:
        raise ValueError(f"folding into {path!r}: {error}") from error


def _fold_parameters(
    described: Layer, kernel: Any, bias: Any, affines: list[tuple[Affine, bool]]
) -> tuple[jax.Array, jax.Array]:
    kernel, bias, layout = layouts.check(kernel, bias, described.layout)
    wide, wide_bias = kernels.widened(kernel, bias)
    for a, before in affines:
        layouts.check_affine(a, "input" if before else "output", kernel.shape, layout)
        if not before:
            wide, wide_bias = kernels.previous(wide, wide_bias, a, layout)
            continue
        # The layer masks its kernel itself; the new bias must see what the layer sees.
        seen = wide if described.mask is None else wide * np.asarray(described.mask)
        wide_bias = kernels.following(a, seen, wide_bias, layout)[1]
        wide = kernels.following(a, wide, None, layout)[0]
    like = kernel if bias is None else bias
    return kernels.stored("kernel", wide, kernel), kernels.stored("bias", wide_bias, bias, like)
