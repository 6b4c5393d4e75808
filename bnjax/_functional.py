"""The pure function: parameters, running statistics, initialisation, application."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from bnjax import _checks, _layer, _normalize, _observe
from bnjax._types import BNParams, BNState, Norm


def bn_init(
    features: int | tuple[int, ...],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: Any = jnp.float32,
) -> tuple[BNParams, BNState]:
    """Parameters and running statistics of a new layer.

    scale = 1, bias = 0; mean = 0, var = 1, count = 0.

    Args:
      features: size of the feature axis, or the sizes of the feature axes in
        ascending order of axis.
      use_scale, use_bias: whether there is a scale, a bias; None otherwise.
      param_dtype: floating dtype of scale and bias. Running statistics have
        promote(param_dtype, float32).

    Returns:
      `(BNParams, BNState)`, all of shape [C].

    Raises:
      TypeError, ValueError: sizes that are no positive integers, a dtype that is
      not floating.

    Example:
      >>> import bnjax
      >>> params, state = bnjax.bn_init(3)
      >>> print(params.scale, state.var, state.count)
      [1. 1. 1.] [1. 1. 1.] [0 0 0]

    Source: Ioffe & Szegedy (2015), Algorithm 1.
    """
    shape = _checks.features(features)
    dtype = _checks.float_dtype("param_dtype", param_dtype)
    use_scale = _checks.static_flag("use_scale", use_scale)
    use_bias = _checks.static_flag("use_bias", use_bias)
    statistics = _checks.compute_dtype(dtype)
    params = BNParams(
        jnp.ones(shape, dtype) if use_scale else None,
        jnp.zeros(shape, dtype) if use_bias else None,
    )
    state = BNState(
        jnp.zeros(shape, statistics), jnp.ones(shape, statistics), jnp.zeros(shape, jnp.int32)
    )
    return params, state


def bn_apply(
    params: BNParams,
    state: BNState,
    x: jax.Array,
    train: bool | jax.Array,
    *,
    axis: int | tuple[int, ...] = -1,
    momentum: float | jax.Array | _checks.Schedule = 0.99,
    epsilon: float | jax.Array = 1e-5,
    unbiased: bool = False,
    mask: jax.Array | None = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
    dtype: Any = None,
) -> tuple[jax.Array, BNState]:
    """Batch normalization, and the updated running statistics.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, per channel. Training
    takes mean and var (biased) of the batch, and updates
    running = momentum * running + (1 - momentum) * batch; inference takes the
    running ones and returns `state` unchanged. Moments are computed in
    promote(x.dtype, float32). A channel learns only from moments that are
    finite and of two entries or more; one without entries is normalized with
    its running statistics.

    Args:
      params: `BNParams` of shape [C], the sizes of the feature axes.
      state: `BNState` of shape [C].
      x: floating array, 1 to 6 dimensions and more.
      train: True for training. May be a traced boolean, equal on all devices.
      axis: feature axis or axes; all others are reduced.
      momentum: weight of the old value in [0, 1], or a schedule: count -> weight.
      epsilon: added to the variance; in units of x squared, at least 0.
      unbiased: the running variance takes var * n / (n - 1), as the paper and
        torch do; y always takes the biased one.
      mask: booleans of the rank of `x` that broadcast to it. False entries count
        nowhere, whatever they hold; they are normalized like the others.
      axis_name: mapped axis or axes (pmap, vmap, shard_map) to synchronise over,
        in training only. A batch sharded under jit needs none.
      axis_index_groups: groups of indices of `axis_name` to synchronise within.
      dtype: of `y`; by default that of `x`.

    Returns:
      `(y, state)`: `y` of the shape of `x`; a `BNState` with exactly the shapes
      and dtypes of the given one.

    Raises:
      TypeError, ValueError: while tracing, for a wrong dtype, shape, axis, range
      or option. NotImplementedError: groups where JAX has none.

    Note:
      Inside pmap, and shard_map with check_vma=False, gradients of the parameters
      are local, of the summed loss, as of any JAX function:
      ``grads = jax.lax.psum(grads, "i")`` for a loss that is a sum over devices,
      ``grads = jax.lax.pmean(grads, "i")`` for one that is a mean.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> params, state = bnjax.bn_init(2)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, state = bnjax.bn_apply(params, state, x, True, momentum=0.9)
      >>> print(y.round(3), state.mean, state.count)
      [[-1. -1.]
       [ 1.  1.]] [0.2 2. ] [1 1]

    Source: Ioffe & Szegedy (2015), https://arxiv.org/abs/1502.03167
    """
    options: dict[str, Any] = {
        "axis": axis,
        "momentum": momentum,
        "epsilon": epsilon,
        "unbiased": unbiased,
        "mask": mask,
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
        "dtype": dtype,
    }
    if isinstance(state, _observe.Observed):
        return _observe.observe(bn_apply, params, state, x, options)
    call = _layer.prepare(params, state, x, train, **options)
    return _layer.run(compute, call.static, call)


def compute(
    static: _layer.Static, inputs: _normalize.Inputs, state: BNState, weight: jax.Array | None
) -> tuple[jax.Array, BNState | None]:
    """y, and the new state; None for the one given."""
    inputs = _normalize.placed(inputs, static.plan.reduction.axes)
    y, batch = _normalize.normalize(static.plan, inputs)
    if batch is None:
        return y, None
    return y, _layer.update(static, inputs, state, batch.plain(), weight)


def batch_norm(**options: Any) -> Norm:
    """`bn_init` and `bn_apply` as a `Norm`, with options bound.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, as in `bn_apply`.

    Args:
      **options: keyword arguments of `bn_apply`. An option that is bound here
        cannot be given another value in the call.

    Returns:
      `Norm(init, apply, needs_count)`.

    Raises:
      TypeError: an option that `bn_apply` does not have; in the call, one that is
      bound to another value.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> norm = bnjax.batch_norm(momentum=bnjax.cumulative(), epsilon=1e-3)
      >>> params, state = norm.init(2)
      >>> y, state = norm.apply(params, state, jnp.ones((4, 2)), train=True)
      >>> print(state.mean, norm.needs_count)
      [1. 1.] True

    Source: the form is that of optax.GradientTransformation.
    """
    return variant("batch_norm", bn_apply, options)


def variant(
    maker: str, function: Callable[..., tuple[jax.Array, Any]], options: dict[str, Any]
) -> Norm:
    """A `Norm` that applies `function`, with options of `bn_apply` bound.

    A call gives the others, and cannot give other values to those.
    """
    defaults = bn_apply.__kwdefaults__ or {}

    def check(names: Any) -> None:
        unknown = sorted(set(names) - set(defaults))
        if unknown:
            raise TypeError(
                f"`{maker}` takes the options of `bn_apply`, {sorted(defaults)}, got {unknown}."
            )

    def apply(
        params: BNParams, state: Any, x: jax.Array, train: bool | jax.Array, **call: Any
    ) -> tuple[jax.Array, Any]:
        check(call)
        for name in sorted(options.keys() & call.keys()):
            if not _checks.same(call[name], options[name]):
                raise TypeError(
                    f"`{name}` is bound to {options[name]!r} by {maker}(...), got "
                    f"{call[name]!r} in the call. Fix: give it in one place, and to a module "
                    f"as BatchNorm({name}=...)."
                )
        given = {**defaults, **options, **call}
        if isinstance(state, _observe.Observed):
            return _observe.observe(function, params, state, x, given)
        return function(params, state, x, train, **given)

    check(options)
    return Norm(bn_init, apply, callable(options.get("momentum")))
