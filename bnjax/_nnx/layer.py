"""The layer for flax.nnx: it owns the variables and calls a `Norm`."""

from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from bnjax import _checks, _modules, _switch
from bnjax._types import BNParams, Norm

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class BatchNorm(nnx.Module):
    """Batch normalization, a drop-in for `flax.nnx.BatchNorm`.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, per channel; the moments
    are the batch's in training, the running ones at inference. Same arguments,
    attributes and calls, same variables (`nnx.Param` scale and bias,
    `nnx.BatchStat` mean and var), so that states and checkpoints load both ways.

    Args:
      num_features: size of the feature axis, or the sizes of the feature axes in
        ascending order of axis.
      use_running_average: True for inference; `model.train()` and `model.eval()`
        set it, `nnx.view` in a copy, and the argument of a call goes first.
      axis: feature axis or axes of the input.
      momentum: weight of the old value in the running average, in [0, 1], or a
        schedule: count -> weight, which adds an `nnx.BatchStat` count.
      epsilon: added to the variance.
      dtype: of the output; by default that to which input, statistics and
        parameters promote.
      param_dtype: of scale and bias; the statistics are float32.
      use_bias, use_scale: whether there is a bias, a scale; None otherwise.
      bias_init, scale_init: initializers, by default zeros and ones.
      axis_name: mapped axis or axes (pmap, vmap, shard_map) to synchronise over.
      axis_index_groups: groups of indices of `axis_name` to synchronise within.
      use_fast_variance: accepted and without effect: the variance here is
        accurate and takes one pass where one pass is accurate.
      promote_dtype: flax's own decides the dtype of y, and nothing is rounded
        before. Another takes `(x, mean, var, scale, bias)` and `dtype`, and returns
        the five promoted, of which x, scale and bias are used; the running
        statistics are never rounded.
      rngs: key for the initializers.
      bias_metadata, scale_metadata: metadata of the parameters.
      statistics_metadata: metadata of mean, var and count, such as
        `{"out_sharding": ("model",)}`.
      unbiased: the running variance takes var * n / (n - 1).
      norm: the `Norm` to compute with, by default `bnjax.batch_norm`. Its
        numerics (momentum, epsilon, unbiased) are bound in it.

    Raises:
      TypeError, ValueError: sizes that are no positive integers; options beside a
      `norm` that has them bound.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from bnjax.nnx import BatchNorm
      >>> layer = BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
      >>> print(layer.mean[...])
      [0.2 2. ]
      >>> layer.eval()
      >>> z = layer(jnp.ones((1, 2)))

    Source: Ioffe & Szegedy (2015); the contract is flax.nnx.BatchNorm's.
    """

    # Set by `switch`.
    switched: _switch.Switch | None = None

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        axis: int | tuple[int, ...] = -1,
        momentum: float | _checks.Schedule = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., Any] = nnx.initializers.zeros_init(),  # noqa: B008, as in flax
        scale_init: Callable[..., Any] = nnx.initializers.ones_init(),  # noqa: B008
        axis_name: Hashable | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NOTHING,
        scale_metadata: Mapping[str, Any] = _NOTHING,
        statistics_metadata: Mapping[str, Any] = _NOTHING,
        unbiased: bool = False,
        norm: Norm | None = None,
    ) -> None:
        """A layer as the class describes it."""
        shape = _checks.features(num_features, "num_features", "BatchNorm")
        _modules.check_param_dtype(param_dtype)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.unbiased = unbiased
        self.norm = norm
        self.mean: nnx.BatchStat[jax.Array]
        self.var: nnx.BatchStat[jax.Array]
        for name, maker in _modules.initial(self._norm(), shape, jnp.float32).items():
            setattr(self, name, nnx.BatchStat(maker(), **statistics_metadata))
        self.scale: nnx.Param[jax.Array] | None = nnx.data(None)
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        # In flax's order, as each draws a key.
        if use_scale:
            value = scale_init(rngs.params(), shape, param_dtype)
            self.scale = nnx.Param(value, **scale_metadata)
        if use_bias:
            value = bias_init(rngs.params(), shape, param_dtype)
            self.bias = nnx.Param(value, **bias_metadata)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and updates the running statistics in training.

        Args:
          x: array of any shape; integers are cast to the output's dtype.
          use_running_average: True for inference; goes before the attribute. May
            be a traced boolean.
          mask: booleans that broadcast to `x`; False entries count nowhere.

        Returns:
          The normalized array, of the shape of `x`. As in flax, no derivative
          flows through the new running statistics.

        Raises:
          ValueError, TypeError: as `bnjax.bn_apply`, and for a layer that is
          neither in training nor in inference.
        """
        inference = self._inference(use_running_average)
        norm = self._norm()
        statistics = self._statistics(norm)
        x, params, dtype = self._promoted(x)
        given = {name: variable[...] for name, variable in statistics.items()}
        y, new = _modules.apply(
            norm,
            params,
            given,
            x,
            inference,
            mask=mask,
            axis=self.axis,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=dtype,
        )
        if inference is not True or norm.always_updates:
            for name, value in new.items():
                if value is not given[name]:  # so that what never learns may be of another trace
                    statistics[name][...] = jax.lax.stop_gradient(value)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` sets.

        Args:
          use_running_average: True for inference, False for training.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _norm(self) -> Norm:
        norm = _modules.choose_norm(
            self.norm, momentum=self.momentum, epsilon=self.epsilon, unbiased=self.unbiased
        )
        return norm if self.switched is None else self.switched.of(norm)

    def _inference(self, call: Any) -> Any:
        value = self.use_running_average if call is None else call
        if value is None:
            raise ValueError(
                "`use_running_average` must be given, to the constructor, the call or nnx.view, "
                "got None. Fix: model.train() or model.eval(), which set it in all layers."
            )
        return _checks.flag("use_running_average", value)

    def _statistics(self, norm: Norm) -> dict[str, nnx.Variable[jax.Array]]:
        names = _modules.stored(norm)
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            fix = "make the layer with this norm"
            if missing == ["count"]:
                fix = _modules.missing_count(
                    "layer.count = nnx.BatchStat(jnp.zeros(shape, jnp.int32))"
                )
            raise ValueError(
                f"the running statistics must hold {list(names)}, got none for {missing}: the "
                f"momentum, or the norm, changed after the layer was made. Fix: {fix}."
            )
        return {name: getattr(self, name) for name in names}

    def _promoted(self, x: Any) -> tuple[jax.Array, BNParams, Any]:
        """x and parameters as `promote_dtype` has them, and the dtype of y."""
        x = jnp.asarray(x)
        sizes = tuple(x.shape[a] for a in _checks.feature_axes(self.axis, x.shape))
        if sizes != self.mean.shape:
            raise ValueError(
                f"`x` must have num_features={self.num_features} along axis {self.axis}, got "
                f"shape {x.shape}. Fix: BatchNorm({', '.join(map(str, sizes))}, ...), or the "
                "right `axis`."
            )
        given = (self.mean, self.var, self.scale, self.bias)
        values = tuple(None if variable is None else variable[...] for variable in given)
        wide, _, _, scale, bias = self.promote_dtype((x, *values), dtype=self.dtype)
        dtype = dtypes.canonicalize_dtype(wide, scale, bias, dtype=self.dtype)
        plain = self.promote_dtype is dtypes.promote_dtype and jnp.issubdtype(x.dtype, jnp.floating)
        if plain and jnp.finfo(wide.dtype).bits <= max(32, jnp.finfo(x.dtype).bits):
            # The norm promotes at least so. What `dtype` would round stays as it came.
            return x, BNParams(*values[2:]), dtype
        return wide, BNParams(scale, bias), dtype
