"""The pure function: parameters, running statistics, initialisation, application."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _checks, _normalize, _placement, _reduce


class BNParams(NamedTuple):
    """Trainable: scale (gamma) and bias (beta), of shape [C]; None where unused."""

    scale: jax.Array | None
    bias: jax.Array | None


class BNState(NamedTuple):
    """Carried, never trained: running statistics, three arrays of shape [C].

    `mean` and `var` are floating; `count` (int32) is the number of updates that
    each channel has accepted, 0 for one that was never trained.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose


class Norm(NamedTuple):
    """A normalization: a pair of pure functions, as in optax.

    `init(features, **options) -> (params, state)` and
    `apply(params, state, x, train, **options) -> (y, state)`, with the options
    of `bn_init` and `bn_apply`. `needs_count` tells modules that the running
    average depends on `state.count`, so that it must be stored.
    """

    init: Callable[..., tuple[BNParams, BNState]]
    apply: Callable[..., tuple[jax.Array, BNState]]
    needs_count: bool = False


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
    x = _checks.float_array("x", x)
    feature_axes = _checks.feature_axes(axis, x.shape)
    shape = tuple(x.shape[a] for a in feature_axes)
    axes = tuple(a for a in range(x.ndim) if a not in feature_axes)
    state = _check_state(state, shape, feature_axes)
    train = _checks.flag("train", train)
    unbiased = _checks.static_flag("unbiased", unbiased)
    weight = _weight(momentum, state.count)
    plan = _normalize.Plan(
        _reduce.reduction(axes, axis_name, axis_index_groups),
        x.dtype if dtype is None else _checks.float_dtype("dtype", dtype),
        train if isinstance(train, bool) else None,
    )
    inputs = _inputs(params, state, x, train, mask, epsilon, feature_axes)
    number = isinstance(weight, (int, float))
    compute = _reduce.compiled(_compute, _normalize.is_mapped(plan))
    y, new = compute(
        _Static(plan, unbiased, float(weight) if number else None),
        inputs,
        state,
        None if number else jnp.asarray(weight),
    )
    return y, state if new is None else new


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
    known = set(bn_apply.__kwdefaults__ or ())
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            f"`batch_norm` takes the options of `bn_apply`, {sorted(known)}, got {unknown}."
        )

    def apply(
        params: BNParams, state: BNState, x: jax.Array, train: bool | jax.Array, **call: Any
    ) -> tuple[jax.Array, BNState]:
        for name in sorted(options.keys() & call.keys()):
            if not _checks.same(call[name], options[name]):
                raise TypeError(
                    f"`{name}` is bound to {options[name]!r} by batch_norm(...), got "
                    f"{call[name]!r} in the call. Fix: give it in one place, and to a module "
                    f"as BatchNorm({name}=...)."
                )
        return bn_apply(params, state, x, train, **{**options, **call})

    return Norm(bn_init, apply, callable(options.get("momentum")))


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


def _weight(momentum: Any, count: jax.Array) -> Any:
    """Weight of the old value: as given, or what the schedule says."""
    if not callable(momentum):
        return _checks.number("momentum", momentum, 0.0, 1.0, count.shape)
    try:
        weight = momentum(count)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`momentum` must be a number or a schedule: array of counts -> weights, got "
            f"{momentum!r}, which failed: {error} Fix: momentum=cumulative(), with the "
            "parentheses."
        ) from error
    return _checks.number("momentum(state.count)", weight, 0.0, 1.0, count.shape)


class _Static(NamedTuple):
    """What the program depends on. A number as weight keeps 1 - w exact, as in Flax."""

    plan: _normalize.Plan
    unbiased: bool
    weight: float | None


def _compute(
    static: _Static, inputs: _normalize.Inputs, given: BNState, weight: jax.Array | None
) -> tuple[jax.Array, BNState | None]:
    axes = static.plan.reduction.axes
    inputs = _normalize.placed(inputs, axes)
    state, weight = _placement.as_features((given, weight), inputs.x, axes)
    y, batch = _normalize.normalize(static.plan, inputs)
    if batch is None:
        return y, None
    mean, var = batch.shift + batch.offset, batch.var
    learns = (batch.count >= 2) & lax.is_finite(mean) & lax.is_finite(var)
    if inputs.train is not None:
        learns = learns & inputs.train
    if static.unbiased:
        var = var * (batch.count / jnp.maximum(batch.count - 1, 1))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        wide = _reduce.promoted(old)
        w = jnp.asarray(weight, wide.dtype) if static.weight is None else static.weight
        updated = w * wide + (1 - w) * new.astype(wide.dtype)
        return _reduce.where(learns, updated.astype(old.dtype), old)

    # A count at the end of its range stays there rather than turn negative.
    room = lax.lt(state.count, lax.full_like(state.count, jnp.iinfo(state.count.dtype).max))
    count = state.count + lax.bitwise_and(learns, room).astype(state.count.dtype)
    new = BNState(average(state.mean, mean), average(state.var, var), count)
    return y, _placement.as_given(new, given)
