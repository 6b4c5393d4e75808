"""`BatchNorm` for flax.linen: it owns the variables and calls a `Norm`."""

from collections.abc import Callable, Hashable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from bnjax import _checks
from bnjax._functional import BNParams, BNState, Norm, batch_norm

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
        axis.

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
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        inference = _checks.flag("use_running_average", inference)
        x = jnp.asarray(x)
        axes = _checks.feature_axes(self.axis, x.shape)
        shape = tuple(x.shape[a] for a in axes)
        norm = self._norm()
        statistics = self._statistics(shape, norm, inference)
        params = BNParams(
            self.param("scale", self.scale_init, shape, self.param_dtype)
            if self.use_scale
            else None,
            self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None,
        )
        dtype = dtypes.canonicalize_dtype(x, params.scale, params.bias, dtype=self.dtype)
        y, new = norm.apply(
            params,
            _state(statistics, shape),
            x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype),
            jnp.logical_not(inference) if not isinstance(inference, bool) else not inference,
            axis=self.axis,
            mask=_broadcast_rank(mask, x.ndim),
            dtype=dtype,
            **self._mapped_axes(),
        )
        if inference is not True and not self.is_initializing():
            for name, variable in statistics.items():
                variable.value = getattr(new, name)
        return y

    def _norm(self) -> Norm:
        options = {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "unbiased": self.unbiased,
        }
        if self.norm is None:
            return batch_norm(**options)
        if not isinstance(self.norm, Norm):
            raise TypeError(
                f"`norm` must be a Norm, got {self.norm!r}. Fix: norm=bnjax.batch_norm(), "
                "with the parentheses."
            )
        for name, value in options.items():
            if not _checks.same(value, type(self).__dataclass_fields__[name].default):
                raise ValueError(
                    f"`{name}` must be bound in `norm` when a norm is given, got "
                    f"{name}={value!r} beside it. Fix: norm=batch_norm({name}={value!r})."
                )
        return self.norm

    def _mapped_axes(self) -> dict[str, Any]:
        if self.is_initializing():
            return {"axis_name": None, "axis_index_groups": None}
        return {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}

    def _statistics(
        self, shape: tuple[int, ...], norm: Norm, inference: Any
    ) -> dict[str, nn.Variable[jax.Array]]:
        dtype = jnp.dtype(jnp.float32)
        if not self.force_float32_reductions:
            dtype = _checks.compute_dtype(_checks.float_dtype("param_dtype", self.param_dtype))
        initial = {
            "mean": lambda: jnp.zeros(shape, dtype),
            "var": lambda: jnp.ones(shape, dtype),
        }
        if norm.needs_count:
            initial["count"] = lambda: jnp.zeros(shape, jnp.int32)
        if not self.is_initializing():
            self._require(initial, inference)
        return {name: self.variable(_STATS, name, init) for name, init in initial.items()}

    def _require(self, names: Any, inference: Any) -> None:
        present = [name for name in names if self.has_variable(_STATS, name)]
        missing = [name for name in names if name not in present]
        # As in flax, training may begin without statistics where they are mutable.
        if not missing or (not present and inference is False):
            return
        where = "/".join((_STATS, *self.path, ""))
        fix = (
            "supply those that init returned or training updated: "
            "apply({'params': ..., 'batch_stats': ...}, x)"
        )
        if "count" in missing:
            fix = (
                "for `count`, which a schedule as `momentum` reads, supply "
                "jnp.zeros(shape, jnp.int32), or the number of updates that the statistics "
                f"have seen; otherwise {fix}"
            )
        raise ValueError(
            f"running statistics must hold {sorted(names)}, got none for "
            f"{[where + name for name in sorted(missing)]}. Fix: {fix}."
        )


def _state(statistics: dict[str, Any], shape: tuple[int, ...]) -> BNState:
    count = statistics["count"].value if "count" in statistics else jnp.zeros(shape, jnp.int32)
    return BNState(statistics["mean"].value, statistics["var"].value, count)


def _broadcast_rank(mask: Any, rank: int) -> jax.Array | None:
    """As flax does: cast to booleans, axes of size 1 added in front."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, bool)
    return jnp.expand_dims(mask, tuple(range(max(0, rank - mask.ndim))))
