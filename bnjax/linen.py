"""`BatchNorm` for flax.linen: it owns the variables and calls a `Norm`."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from bnjax import _checks, _modules, _switch
from bnjax._switch import Source
from bnjax._types import BNParams, Norm

_STATS = "batch_stats"


class BatchNorm(nn.Module):
    """Batch normalization, a drop-in for `flax.linen.BatchNorm`.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, per channel; the moments
    are the batch's in training, the running ones at inference. Same fields in the
    same order, same call, same variables (`params/{scale,bias}` and
    `batch_stats/{mean,var}`), so that checkpoints load both ways. Fields that
    flax does not have come last.

    Attributes:
      use_running_average: True for inference; may be given in the call instead.
      axis: feature axis or axes of the input.
      momentum: weight of the old value in the running average, in [0, 1], or a
        schedule: count -> weight, which adds `batch_stats/count`.
      epsilon: added to the variance.
      dtype: of the output; by default that to which input and parameters promote.
      param_dtype: of scale and bias.
      use_bias, use_scale: whether there is a bias, a scale.
      bias_init, scale_init: initializers, by default zeros and ones.
      axis_name: mapped axis or axes (pmap, vmap, shard_map) to synchronise over.
      axis_index_groups: groups of indices of `axis_name` to synchronise within.
      use_fast_variance: accepted and without effect: the variance here is
        accurate and takes one pass where one pass is accurate.
      force_float32_reductions: accepted: reductions are never below float32. If
        False, new running statistics have promote(param_dtype, float32).
      unbiased: the running variance takes var * n / (n - 1).
      norm: the `Norm` to compute with, by default `bnjax.batch_norm`. Its
        numerics (momentum, epsilon, unbiased) are bound in it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bnjax.linen import BatchNorm
      >>> layer = BatchNorm(momentum=0.9)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(updates["batch_stats"]["mean"])
      [0.2 2. ]

    Source: Ioffe & Szegedy (2015); the contract is flax.linen.BatchNorm's.
    """

    use_running_average: bool | None = None
    axis: int | tuple[int, ...] = -1
    momentum: float | _checks.Schedule = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = nn.initializers.zeros
    scale_init: Callable[..., Any] = nn.initializers.ones
    axis_name: Hashable | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    unbiased: bool = False
    norm: Norm | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and updates `batch_stats` in training.

        Initialisation computes an output but updates nothing and needs no mapped
        axis; with a `norm`, the output is that of inference.

        Args:
          x: array of any shape; integers are cast to the output's dtype.
          use_running_average: True for inference; overrides nothing: the field
            or the argument gives it, not both. May be a traced boolean.
          mask: booleans that broadcast to `x`; False entries count nowhere.

        Returns:
          The normalized array, of the shape of `x`.

        Raises:
          ValueError, TypeError: as `bnjax.bn_apply`, and for running statistics
          that are missing.
        """
        return _call(self, _norm_of(self), x, use_running_average, mask)


@contextlib.contextmanager
def convert() -> Iterator[None]:
    """Within it, every `flax.linen.BatchNorm` is computed by bnjax.

    Same variables, same fields; y and running statistics as of
    `bnjax.linen.BatchNorm`. The model's source stays as it is, and outside of the
    context so does its behaviour: functions under `jax.jit` are traced anew, on
    entering it and on leaving it. Layers that derive from flax's are included
    where they call its `__call__`.

    Returns:
      A context manager, for this thread.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, bnjax.linen
      >>> model = nn.BatchNorm(use_running_average=False)
      >>> x = 3e4 + jnp.arange(8.0)[:, None]
      >>> variables = model.init(jax.random.key(0), x)
      >>> @jax.jit
      ... def var(x):
      ...     return model.apply(variables, x, mutable=["batch_stats"])[0].var()
      >>> with bnjax.linen.convert():
      ...     print(jnp.isclose(var(x), 1, rtol=1e-3))
      True
      >>> print(jnp.isclose(var(x), 1, rtol=1e-3))  # flax's variance cancels
      False

    Source: flax.linen.intercept_methods.
    """
    with transformed(lambda norm: norm, "convert", (nn.BatchNorm,)):
        yield


@contextlib.contextmanager
def switch(*, moments: Source | None = None, learn: bool | None = None) -> Iterator[None]:
    """Within it, `BatchNorm` layers, bnjax's and flax's, are switched as by `bnjax.switch`.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias with the moments asked for, and
    running statistics that learn or not, whatever `use_running_average` says. Of several
    contexts the innermost that gives a switch counts, before them a `norm` of the layer's
    own. Functions under `jax.jit` are traced anew, on entering it and on leaving it.

    Args:
      moments: "batch", "running", or None for what the call says.
      learn: whether the running statistics are updated in every call, in none, or None for
        what the call says. Where they are, "batch_stats" must be mutable; else it need not be.

    Returns:
      A context manager, for this thread.

    Raises:
      TypeError, ValueError: as `bnjax.switch`.

    Example:
      >>> import jax, jax.numpy as jnp, bnjax.linen
      >>> layer = bnjax.linen.BatchNorm(use_running_average=True)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x)
      >>> with bnjax.linen.switch(moments="batch", learn=False):
      ...     print(layer.apply(variables, x)[:, 0].round(3))
      [-1.  1.]

    Source: flax.linen.intercept_methods.
    """
    switches = _switch.checked(moments, learn)
    with transformed(switches.of, switches):
        yield


@dataclasses.dataclass(frozen=True)
class _Transform:
    """How layers of some classes are computed instead."""

    key: Hashable
    classes: tuple[type[nn.Module], ...]
    function: Callable[[Norm], Norm] = dataclasses.field(compare=False)

    def concerns(self, body: Any) -> bool:
        return any(body is inspect.unwrap(cls.__call__) for cls in self.classes)


# All that are in force, the innermost last. Part of the key of JAX's caches, so that no
# function compiled outside of them is used inside.
transforms = jax.make_user_context(())


@contextlib.contextmanager
def transformed(
    function: Callable[[Norm], Norm],
    key: Hashable,
    classes: tuple[type[nn.Module], ...] = (BatchNorm, nn.BatchNorm),
) -> Iterator[None]:
    """Within it, bnjax computes layers of these classes by `function(norm)`.

    `key` names the function, equal ones by equal keys.
    """
    inside = (*transforms.value, _Transform(key, classes, function))
    with transforms(inside), nn.intercept_methods(_transform):
        yield


def _transform(
    method: Callable[..., Any], args: Any, kwargs: Any, at: nn.module.InterceptorContext
) -> Any:
    body = getattr(at.orig_method, "func", None)
    # Folding leaves the contexts, and looks for layers itself.
    applied = [t.function for t in reversed(transforms.value) if t.concerns(body)]
    if not applied:
        return method(*args, **kwargs)
    norm = _norm_of(at.module)
    for function in applied:
        norm = function(norm)
    return _call(at.module, norm, *_arguments(*args, **kwargs))


def _norm_of(layer: Any) -> Norm:
    """What a layer computes with; flax's have no `norm`."""
    return _modules.choose_norm(
        getattr(layer, "norm", None),
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        unbiased=getattr(layer, "unbiased", False),
    )


def _arguments(x: Any, use_running_average: Any = None, *, mask: Any = None) -> tuple[Any, ...]:
    return x, use_running_average, mask


def _call(layer: Any, norm: Norm, x: Any, use_running_average: Any, mask: Any) -> jax.Array:
    """The call of a layer with flax's fields, in whose compact method it runs."""
    inference = _checks.flag(
        "use_running_average",
        nn.merge_param("use_running_average", layer.use_running_average, use_running_average),
    )
    _modules.check_param_dtype(layer.param_dtype)
    x = jnp.asarray(x)
    shape = tuple(x.shape[a] for a in _checks.feature_axes(layer.axis, x.shape))
    statistics = _statistics(layer, shape, norm, inference)
    params = BNParams(
        layer.param("scale", layer.scale_init, shape, layer.param_dtype)
        if layer.use_scale
        else None,
        layer.param("bias", layer.bias_init, shape, layer.param_dtype) if layer.use_bias else None,
    )
    dtype = dtypes.canonicalize_dtype(x, params.scale, params.bias, dtype=layer.dtype)
    mapped = not layer.is_initializing()
    # A first batch may be any, also one that a norm of groups cannot cut.
    evaluated = inference if mapped or getattr(layer, "norm", None) is None else True
    given = {name: variable.value for name, variable in statistics.items()}
    y, new = _modules.apply(
        norm,
        params,
        given,
        x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype),
        evaluated,
        mask=mask,
        axis=layer.axis,
        axis_name=layer.axis_name if mapped else None,
        axis_index_groups=layer.axis_index_groups if mapped else None,
        dtype=dtype,
    )
    if (inference is not True or norm.always_updates) and not layer.is_initializing():
        for name, value in new.items():
            if value is not given[name]:  # so that what never learns need not be mutable
                statistics[name].value = value
    return y


def _statistics(
    layer: Any, shape: tuple[int, ...], norm: Norm, inference: Any
) -> dict[str, nn.Variable[jax.Array]]:
    dtype = jnp.dtype(jnp.float32)
    if not layer.force_float32_reductions:
        dtype = _checks.compute_dtype(_checks.float_dtype("param_dtype", layer.param_dtype))
    initial = _modules.initial(norm, shape, dtype)
    if not layer.is_initializing():
        _require(layer, initial, inference)
    variables = {name: layer.variable(_STATS, name, init) for name, init in initial.items()}
    for name, variable in variables.items():
        if (found := jnp.shape(variable.value)) == shape:
            continue
        expected = jax.eval_shape(initial[name]).shape  # a norm may have more than vectors
        if found != expected:
            raise ValueError(
                f"`{'/'.join((_STATS, *layer.path, name))}` must have the shape of the feature "
                f"axes of `x`, {expected}, got {found}. Fix: the variables of "
                f"this layer, or the right `axis`, which is {layer.axis}."
            )
    return variables


def _require(layer: Any, names: Any, inference: Any) -> None:
    present = [name for name in names if layer.has_variable(_STATS, name)]
    missing = [name for name in names if name not in present]
    # As in flax, training may begin without statistics where they are mutable.
    if not missing or (not present and inference is False):
        return
    where = "/".join((_STATS, *layer.path, ""))
    fix = (
        "supply those that init returned or training updated: "
        "apply({'params': ..., 'batch_stats': ...}, x)"
    )
    if "count" in missing:
        fix = f"{_modules.missing_count('jnp.zeros(shape, jnp.int32)')}; otherwise {fix}"
    raise ValueError(
        f"running statistics must hold {sorted(names)}, got none for "
        f"{[where + name for name in sorted(missing)]}. Fix: {fix}."
    )
