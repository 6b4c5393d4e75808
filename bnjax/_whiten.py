"""Decorrelated batch normalization: groups of channels whitened by their covariance."""

import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import (
    _checks,
    _covariance,
    _functional,
    _layer,
    _lean,
    _normalize,
    _placement,
    _whitening,
)
from bnjax._covariance import Covariances, Groups
from bnjax._normalize import Inputs
from bnjax._types import BNParams, BNState, Moments, Norm
from bnjax._whitening import Method, Root


class WhitenState(NamedTuple):
    """Running statistics: `mean`, `var`, `count` as in `BNState`, and covariances.

    `cov`, of shape [groups, g, g], are those within each group of g consecutive channels, of
    the dtype of `var`. What normalization takes as their diagonals is `var`.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose
    cov: jax.Array


def whiten(
    group_size: int,
    *,
    method: Method = "newton-schulz",
    iterations: int | None = None,
    **options: Any,
) -> Norm:
    """Decorrelated batch normalization: removes correlations within groups of channels, too.

    y = W (x - mean) * scale + bias, W = (cov + epsilon I)^(-1/2), for each group of
    `group_size` consecutive channels, where cov = sum((x - mean) (x - mean)^T) / n. Of all
    such roots W is the symmetric one (ZCA), which changes x least. Groups of one channel
    are `bn_apply`.

    The covariance runs as the variance does, running = momentum * running +
    (1 - momentum) * batch, and inference takes the root of the running one, as `bn_apply`
    takes that of the running variance; it is no average of W. A group learns only from
    moments that are finite in all its channels, and of two entries or more. With fewer
    entries than channels W is of the size of 1 / sqrt(epsilon) where there is no data:
    inference then may be far from training.

    newton-schulz: Y <- Y (3 - Z Y) / 2 and Z <- (3 - Z Y) / 2 Z, from Y = cov / |cov| and
    Z = I, where Z goes to W. All in matrix products, which accelerators are made for. Roots
    grow by a factor of 1.5 until they are right: condition numbers up to 2.25^(k - 4) after
    k iterations. Fewer whiten in part, and are differentiated as they are.
    eigh: by eigendecomposition, which takes longer. Its derivative is that of the root,
    which is finite where eigenvalues are equal.
    Either errs by some roundings times the condition number of cov + epsilon I, and in
    float32 takes eigenvalues below 1e-7 of the largest for that.

    Args:
      group_size: channels in a group, at least 1; divides the number of channels, which are
        those of all feature axes, in ascending order of axis.
      method: "newton-schulz" or "eigh".
      iterations: of Newton and Schulz, at least 1; by default 20, in float64 40. More only
        amplify rounding where the covariance is nearly singular.
      **options: keyword arguments of `bn_apply`, bound as by `batch_norm`. A `mask` must have
        size 1 along the feature axes, and `momentum` be one number or a schedule, unless
        `group_size` is 1.

    Returns:
      `Norm(init, apply, needs_count, WhitenState)`; `apply` takes and returns a `WhitenState`
      where `bn_apply` has a `BNState`. The Flax modules store its `cov` beside mean and var.

    Raises:
      TypeError, ValueError: a size that is no positive integer, an unknown method or option;
      in the call, as `bn_apply`, and for channels that the size does not divide.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> norm = bnjax.whiten(2)
      >>> params, state = norm.init(2)
      >>> x = jnp.array([[1.0, 1.0], [3.0, 2.0], [5.0, 6.0], [7.0, 7.0]])
      >>> y, state = norm.apply(params, state, x, train=True)
      >>> print(jnp.abs(y.T @ y / 4).round(3))
      [[1. 0.]
       [0. 1.]]

    Source: Huang et al. (2018), "Decorrelated Batch Normalization",
    https://arxiv.org/abs/1804.08450; Huang et al. (2019), "Iterative Normalization",
    https://arxiv.org/abs/1904.03441; the coupled iteration: Higham (2008), "Functions of
    Matrices", section 6.7.
    """
    group_size = _checks.positive("group_size", group_size)
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {list(get_args(Method))}, got {method!r}.")
    if iterations is not None:
        iterations = _checks.positive("iterations", iterations)
        if method == "eigh":
            raise ValueError(
                f"`iterations` must be None for eigh, which has none, got {iterations}. "
                'Fix: method="newton-schulz".'
            )

    def init(features: int | tuple[int, ...], **options: Any) -> tuple[BNParams, WhitenState]:
        params, state = _functional.bn_init(features, **options)
        groups = _number(group_size, state.mean.size)
        eye = jnp.eye(group_size, dtype=state.var.dtype)
        return params, WhitenState(*state, jnp.tile(eye, (groups, 1, 1)))

    def apply(
        params: BNParams, state: WhitenState, x: jax.Array, train: bool | jax.Array, **call: Any
    ) -> tuple[jax.Array, WhitenState]:
        _checks.state_type(state, WhitenState, f"whiten({group_size})")
        prepared = _layer.prepare(params, BNState(*state[:3]), x, train, **call)
        _check(prepared, group_size, state, call["momentum"])
        static = prepared.static, Root(method, iterations)
        return _layer.run(_compute, static, prepared._replace(state=state))

    return _functional.variant("whiten", apply, options)._replace(init=init, state=WhitenState)


def _number(size: int, channels: int) -> int:
    """Of groups."""
    if channels % size:
        raise ValueError(
            f"`group_size` must divide the number of channels, {channels}, got {size}. "
            f"Fix: whiten({math.gcd(channels, size)})."
        )
    return channels // size


def _check(call: _layer.Call, size: int, state: WhitenState, momentum: Any) -> None:
    """What is checked beside what all norms check."""
    cov = _checks.float_array("state.cov", state.cov)
    shape = (_number(size, state.mean.size), size, size)
    if cov.shape != shape:
        raise ValueError(
            f"`state.cov` must have one matrix per group, shape {shape}, got shape {cov.shape}. "
            f"Fix: params, state = whiten({size}).init(features)."
        )
    if size == 1:
        return
    mask, reduced = call.inputs.mask, call.static.plan.reduction.axes
    if mask is not None and any(s > 1 and a not in reduced for a, s in enumerate(mask.shape)):
        axes = tuple(a for a in range(mask.ndim) if a not in reduced)
        raise ValueError(
            f"`mask` must have size 1 along the feature axes {axes} for whiten({size}), as a group "
            f"has a covariance of whole entries only, got shape {mask.shape}. Fix: "
            f"mask.all({axes}, keepdims=True)."
        )
    if not callable(momentum) and np.ndim(momentum):
        raise ValueError(
            f"`momentum` must be one number for whiten({size}), as a group has one covariance, or "
            f"a schedule, got an array of shape {np.shape(momentum)}. Fix: momentum=0.99."
        )


def _compute(
    static: tuple[_layer.Static, Root],
    inputs: Inputs,
    given: WhitenState,
    weight: jax.Array | None,
) -> tuple[jax.Array, WhitenState | None]:
    layer, how = static
    x, mask, train, *vectors = inputs
    r = layer.plan.reduction
    groups = _covariance.groups(x.ndim, r.axes, given.cov.shape)
    r = r._replace(axes=groups.reduced(x.ndim))
    layer = layer._replace(plan=layer.plan._replace(reduction=r))
    cut = (groups.cut(x), None, train, *(_cut_vector(groups, v) for v in vectors))
    inputs = _normalize.placed(Inputs._make(cut), r.axes)
    running = _placement.as_features(given.cov.astype(inputs.var.dtype), inputs.x, r.axes)
    # Whole, as the derivative keeps it.
    whole = inputs._replace(x=_lean.named_input(x), mask=_placement.as_entries(mask, x))
    y, batch = _whitening.whiten(layer.plan, how, groups, whole, running)
    if batch is None:
        return y, None
    return y, _updated(layer, groups, inputs, given, batch, weight)


def _cut_vector(groups: Groups, v: Any) -> Any:
    """A vector per channel as [groups, g]; a scalar or None as it is."""
    return v if v is None or not v.ndim else groups.vectors().cut(v)


def _updated(
    static: _layer.Static,
    groups: Groups,
    inputs: Inputs,
    given: WhitenState,
    batch: Covariances,
    weight: jax.Array | None,
) -> WhitenState:
    """The rule of the running average, for groups in which all is finite."""
    cov = batch.cov
    mean = batch.shift + batch.offset
    sound = lax.reduce_and(lax.is_finite(cov), axes=(1, 2)) & lax.reduce_and(
        lax.is_finite(mean), axes=(1,)
    )
    old = BNState(*(_cut_vector(groups, v) for v in given[:3]))
    weight = _cut_vector(groups, weight)
    new = _layer.update(
        static,
        inputs,
        old,
        Moments(mean, batch.var, batch.count),
        weight,
        _placement.broadcast(sound[:, None], mean),
    )

    def matrices(v: jax.Array) -> jax.Array:
        return _placement.broadcast(v[:, :1, None], cov)

    # By the same rule, and by the count of a group's first channel, which is that of all.
    of_cov = _layer.update(
        static,
        inputs,
        BNState(given.cov, given.cov, matrices(old.count)),
        Moments(cov, cov, matrices(batch.count)),
        weight if weight is None or not weight.ndim else matrices(weight),
        _placement.broadcast(sound[:, None, None], cov),
    )
    mean, var, count = (groups.vectors().join(v, o) for v, o in zip(new, given[:3], strict=True))
    return WhitenState(mean, var, count, of_cov.var)
