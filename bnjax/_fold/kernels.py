"""Statistics and parameters as one affine map, and the map in a neighbouring kernel."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _checks
from bnjax._fold import layouts
from bnjax._fold.layouts import Affine, Layout
from bnjax._types import BNParams, BNState


def affine(params: BNParams, state: BNState, *, epsilon: float | jax.Array = 1e-5) -> Affine:
    """Batch normalization at inference as one affine map.

    scale = gamma / sqrt(var + epsilon), shift = beta - mean * scale, with gamma
    and beta `params.scale` and `params.bias`; None stands for 1 and 0.

    Args:
      params: `BNParams` of shape [C].
      state: `BNState` of shape [C]; its count plays no part.
      epsilon: that of the layer.

    Returns:
      `Affine(scale, shift)`, computed in float64 with NumPy; from traced arrays in
      promote(dtype, float32).

    Raises:
      TypeError, ValueError: shapes that differ; statistics that are not finite, or
      var + epsilon not above 0.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> from bnjax import fold
      >>> state = bnjax.BNState(jnp.array([3.0]), jnp.array([4.0]), jnp.array([9]))
      >>> a = fold.affine(bnjax.BNParams(None, None), state, epsilon=0.0)
      >>> print(a.scale, a.shift)
      [0.5] [-1.5]

    Source: Ioffe & Szegedy (2015), Algorithm 2, steps 8 to 12.
    """
    if not (isinstance(params, BNParams) and isinstance(state, BNState)):
        raise TypeError(
            "`affine` takes a BNParams and a BNState, got "
            f"{type(params).__name__} and {type(state).__name__}."
        )
    shape = np.shape(state.mean)
    named = {"state.var": state.var, "params.scale": params.scale, "params.bias": params.bias}
    for name, value in named.items():
        if value is not None and np.shape(value) != shape:
            raise ValueError(
                f"`{name}` must have the shape of `state.mean`, {shape}, got {np.shape(value)}."
            )
    epsilon = _checks.number("epsilon", epsilon, 0.0, math.inf, shape)
    gamma, beta, mean, var, eps = widened(params.scale, params.bias, state.mean, state.var, epsilon)
    width = var + eps
    if _checks.is_concrete(width) and not (np.all(width > 0) and np.all(np.isfinite(width + mean))):
        bad = np.flatnonzero(~((width > 0) & np.isfinite(width + mean)))
        raise ValueError(
            "running statistics must be finite with var + epsilon above 0 to be folded, which "
            f"they are not in channels {bad.tolist()[:8]}"
        )
    scale = width**-0.5 if gamma is None else gamma * width**-0.5
    return Affine(scale, -mean * scale if beta is None else beta - mean * scale)


def into_previous(
    kernel: jax.Array,
    bias: jax.Array | None,
    affine: Affine,
    *,
    output_axis: int = -1,
    input_axis: int = -2,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Folds the map into the Dense or convolution that it follows.

    (conv(x, kernel) + bias) * scale + shift = conv(x, kernel') + bias', with
    kernel' = kernel * scale over output channels, bias' = bias * scale + shift.

    Exact for any dimension, stride, dilation and padding. Layouts: Flax's Dense
    and Conv, also depthwise, are the default; torch's Linear and Conv (OIHW) are
    `output_axis=0, input_axis=1`; Flax's ConvTranspose with transpose_kernel=True is
    `output_axis=-2, input_axis=-1`; torch's ConvTranspose is
    `output_axis=1, input_axis=0, transposed=True`.

    Args:
      kernel: floating, of rank 2 or more.
      bias: of one entry per output channel, or None.
      affine: `Affine` of one entry per output channel.
      output_axis, input_axis: axes of the kernel.
      groups: of channels. The input axis has the channels of one group, the output
        axis those of all, group by group; if `transposed` (torch) the reverse.
      transposed: whether this is a transposed convolution.

    Returns:
      `(kernel', bias')`, computed in float64 (traced: at least float32) and stored
      in the dtypes of `kernel` and `bias`; without a bias, in the kernel's.

    Raises:
      TypeError, ValueError: a mismatch of channels; a result beyond the dtype.

    Note:
      As accurate as the layer itself at any mean: where the inputs make outputs of
      r deviations, the convolution errs by about u * r, folded or not. A mean that
      comes from `bias` cancels in float64 here, and costs nothing.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from bnjax import fold
      >>> a = fold.Affine(np.array([2.0, 3.0]), np.array([0.0, 1.0]))
      >>> kernel, bias = fold.into_previous(jnp.ones((1, 2)), None, a)
      >>> print(kernel, bias)
      [[2. 3.]] [0. 1.]

    Source: Jacob et al. (2018), https://arxiv.org/abs/1712.05877, section 3.2.
    """
    layout = Layout(output_axis, input_axis, groups, transposed=transposed)
    kernel, bias, layout = layouts.check(kernel, bias, layout)
    layouts.check_affine(affine, "output", kernel.shape, layout)
    wide, wide_bias, scale, shift = widened(kernel, bias, *affine)
    new, new_bias = previous(wide, wide_bias, Affine(scale, shift), layout)
    return stored("kernel", new, kernel), stored(
        "bias", new_bias, bias, kernel if bias is None else bias
    )


def into_next(
    affine: Affine,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    output_axis: int = -1,
    input_axis: int = -2,
    groups: int = 1,
    padding: Any = None,
    input_dilation: int | Sequence[int] = 1,
    transposed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Folds the map into the Dense or convolution that follows it.

    conv(x * scale + shift, kernel) + bias = conv(x, kernel') + bias', with
    kernel' = kernel * scale over input channels, and bias' = bias + the sum of
    shift * kernel over input channels and positions.

    That sum is one number per output channel only where every output sees the
    whole kernel: not beside zeros that the convolution pads with, nor between
    those of a dilated input. There, a map with any shift is refused.

    Args:
      affine: `Affine` of one entry per input channel.
      kernel, bias, output_axis, input_axis, groups, transposed: as in
        `into_previous`.
      padding: of the convolution, in the form of Flax and lax: "VALID", "CIRCULAR"
        and "REFLECT" fold, and so do pairs that are nowhere positive, and "SAME"
        with a kernel of size 1. Needed for kernels of rank 3 and more. "VALID"
        of a transposed convolution pads with zeros.
      input_dilation: lhs_dilation; of a transposed convolution, its strides.

    Returns:
      `(kernel', bias')` as in `into_previous`.

    Raises:
      TypeError, ValueError: a mismatch of channels; borders where folding is not
      exact; a result beyond the dtype.

    Note:
      The layer subtracts a mean before the convolution, the folded form after it:
      inputs of r deviations cost an error of about u * r, with u of the dtype that
      the convolution computes in: 2e-5 at r = 100 in float32.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from bnjax import fold
      >>> a = fold.Affine(np.array([2.0, 3.0]), np.array([0.0, 1.0]))
      >>> kernel, bias = fold.into_next(a, jnp.ones((2, 1)), jnp.array([5.0]))
      >>> print(kernel.ravel(), bias)
      [2. 3.] [6.]

    Source: linearity of the convolution.
    """
    layout = Layout(output_axis, input_axis, groups, padding, input_dilation, transposed)
    kernel, bias, layout = layouts.check(kernel, bias, layout)
    layouts.check_affine(affine, "input", kernel.shape, layout)
    why = layouts.borders(layout, kernel.shape, affine)
    if why is not None:
        raise ValueError(
            f"the shift of a normalization cannot be folded into this convolution: {why}. Fix: "
            "fold it into the layer before the normalization, or keep the normalization."
        )
    wide, wide_bias, scale, shift = widened(kernel, bias, *affine)
    new, new_bias = following(Affine(scale, shift), wide, wide_bias, layout)
    return stored("kernel", new, kernel), stored(
        "bias", new_bias, bias, kernel if bias is None else bias
    )


def previous(kernel: Any, bias: Any, a: Affine, layout: Layout) -> tuple[Any, Any]:
    """`into_previous` on widened arrays."""
    factor = layouts.along(a.scale, kernel.shape, layout, "output")
    return kernel * factor, a.shift if bias is None else bias * a.scale + a.shift


def following(a: Affine, kernel: Any, bias: Any, layout: Layout) -> tuple[Any, Any]:
    """`into_next` on widened arrays."""
    scale, shift = (layouts.along(v, kernel.shape, layout, "input") for v in a)
    xp = np if isinstance(kernel, np.ndarray) else jnp
    sums = xp.moveaxis(kernel * shift, (layout.input_axis, layout.output_axis), (-2, -1))
    sums = sums.reshape(-1, *sums.shape[-2:]).sum(0)
    # The input axis of a transposed kernel has all groups, and each has outputs of its own.
    parts = layout.groups if layout.transposed else 1
    sums = sums.reshape(parts, -1, sums.shape[-1]).sum(1).reshape(-1)
    return kernel * scale, sums if bias is None else bias + sums


def widened(*values: Any) -> list[Any]:
    """Values in float64 NumPy where all are concrete, else in promote(dtype, float32)."""
    given = [v for v in values if v is not None]
    if all(_checks.is_concrete(v) for v in given):
        return [None if v is None else np.asarray(v, np.float64) for v in values]
    traced = (_checks.compute_dtype(v.dtype) for v in given if not _checks.is_concrete(v))
    dtype = functools.reduce(np.promote_types, traced)
    return [None if v is None else jnp.asarray(v, dtype) for v in values]


def stored(name: str, value: Any, like: Any, dtype_of: Any = None) -> jax.Array:
    """`value` in the dtype of `like`, and placed where `like` is."""
    dtype = (like if dtype_of is None else dtype_of).dtype
    if not isinstance(value, np.ndarray):
        return value.astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        array = value.astype(dtype)
    if np.all(np.isfinite(value)) and not np.all(np.isfinite(array)):
        raise ValueError(
            f"the folded `{name}` must fit into its dtype, {dtype}, got values up to "
            f"{np.abs(value).max():.3g}. Fix: fold into a float32 copy."
        )
    if isinstance(like, jax.Array) and _checks.is_concrete(like) and like.committed:
        return jax.device_put(array, like.sharding)
    return jnp.asarray(array)
