"""Where a kernel has its channels, what its layer sees at the borders, and the checks of both."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from bnjax import _checks

Side = Literal["input", "output"]


class Affine(NamedTuple):
    """y = x * scale + shift per channel; both of shape [C].

    float64 NumPy arrays, so that a kernel is rounded once; JAX arrays where the
    statistics were traced.
    """

    scale: Any
    shift: Any


class Layout(NamedTuple):
    """The axes of a kernel, and the geometry of its layer; names as in `into_next`."""

    output_axis: int = -1
    input_axis: int = -2
    groups: int = 1
    padding: Any = None
    input_dilation: Any = 1
    transposed: bool = False


def channels(shape: tuple[int, ...], layout: Layout, side: Side) -> int:
    """How many channels the layer has on that side."""
    size = shape[_axis_of(layout, side)]
    return size * layout.groups if side == _split(layout) else size


def along(v: Any, shape: tuple[int, ...], layout: Layout, side: Side) -> Any:
    """One factor per channel of a side, in a shape that broadcasts to the kernel."""
    axis, other = _axis_of(layout, side), _axis_of(layout, _other(side))
    to = [1] * len(shape)
    to[axis] = shape[axis]
    if layout.groups == 1 or side != _split(layout):
        return v.reshape(to)
    # This axis has the channels of one group; which group, the other axis tells.
    to[other] = shape[other]
    rows = v.reshape(layout.groups, -1).repeat(shape[other] // layout.groups, axis=0)
    return (rows if other < axis else rows.T).reshape(to)


def borders(layout: Layout, shape: tuple[int, ...], a: Affine) -> str | None:
    """Why a shift before this convolution is no bias after it, or None.

    It is one where every output sees the whole kernel. The rule holds for inputs
    of any size, so "SAME" counts as padding with zeros even where none are added.
    """
    axes = [_axis_of(layout, side) % len(shape) for side in ("input", "output")]
    sizes = [size for i, size in enumerate(shape) if i not in axes]
    if not sizes or (isinstance(a.shift, np.ndarray) and not a.shift.any()):
        return None
    if any(d != 1 for d in _numbers(layout.input_dilation)):
        return (
            f"its input is dilated by {layout.input_dilation} (in a transposed convolution: its "
            "strides), so that outputs see different parts of the kernel"
        )
    padding = layout.padding
    if padding is None:
        return "`padding` is not given, and it must add no zeros, as 'VALID' does not"
    if isinstance(padding, str):
        names = ["CIRCULAR", "REFLECT"] + ([] if layout.transposed else ["VALID"])
        exact = padding.upper() in names or all(size == 1 for size in sizes)
    else:
        exact = all(pad <= 0 for pad in _numbers(padding))
    if exact:
        return None
    kind = "transposed convolution" if layout.transposed else "convolution"
    return (
        f"a {kind} with padding={padding!r} sees zeros outside of its input, where the "
        "normalization would give its shift"
    )


def check(kernel: Any, bias: Any, layout: Layout) -> tuple[jax.Array, Any, Layout]:
    """Kernel and bias as arrays that fit each other, and the layout with axes from 0."""
    kernel = _checks.float_array("kernel", kernel)
    shape, groups = kernel.shape, layout.groups
    if kernel.ndim < 2:
        raise ValueError(f"`kernel` must have two axes or more, got shape {shape}.")
    out = _axis("output_axis", layout.output_axis, shape)
    inp = _axis("input_axis", layout.input_axis, shape)
    if out == inp:
        raise ValueError(
            f"`output_axis` and `input_axis` must differ, got {layout.output_axis} and "
            f"{layout.input_axis} for `kernel` of shape {shape}."
        )
    _checks.static_flag("transposed", layout.transposed)
    whole = inp if layout.transposed else out
    if type(groups) is not int or groups < 1 or shape[whole] % groups:
        raise ValueError(
            f"`groups` must be a positive int that divides the {shape[whole]} channels on axis "
            f"{whole} of `kernel` of shape {shape}, got {groups!r}."
        )
    layout = layout._replace(output_axis=out, input_axis=inp)
    if bias is not None:
        bias = _checks.float_array("bias", bias)
        count = channels(shape, layout, "output")
        if bias.shape != (count,):
            raise ValueError(
                f"`bias` must have one entry per output channel, shape {(count,)} with `kernel` "
                f"of shape {shape} and groups={groups}, got shape {bias.shape}."
            )
    return kernel, bias, layout


def check_affine(a: Any, side: Side, shape: tuple[int, ...], layout: Layout) -> None:
    """The map has one entry per channel of that side of the kernel."""
    if not isinstance(a, Affine):
        raise TypeError(
            f"`affine` must be an Affine(scale, shift), got {type(a).__name__}. Fix: "
            "fold.affine(params, state, epsilon=...)."
        )
    if np.ndim(a.scale) != 1 or np.shape(a.scale) != np.shape(a.shift):
        raise ValueError(
            "`affine` must have one scale and one shift per channel, of shape [C], got shapes "
            f"{np.shape(a.scale)} and {np.shape(a.shift)}. A normalization with several feature "
            "axes cannot be folded."
        )
    count = channels(shape, layout, side)
    if np.shape(a.scale)[0] != count:
        raise ValueError(
            f"the normalization has {np.shape(a.scale)[0]} channels, but `kernel` of shape "
            f"{shape} has {count} {side} channels, by {side}_axis={_axis_of(layout, side)} and "
            f"groups={layout.groups}."
        )


def _axis_of(layout: Layout, side: Side) -> int:
    return layout.input_axis if side == "input" else layout.output_axis


def _other(side: Side) -> Side:
    return "output" if side == "input" else "input"


def _split(layout: Layout) -> Side:
    """The side whose axis has the channels of one group only."""
    return "output" if layout.transposed else "input"


def _numbers(value: Any) -> list[int]:
    if isinstance(value, Sequence):
        return [number for part in value for number in _numbers(part)]
    return [1 if value is None else int(value)]


def _axis(name: str, axis: Any, shape: tuple[int, ...]) -> int:
    rank = len(shape)
    if type(axis) is not int or not -rank <= axis < rank:
        raise ValueError(
            f"`{name}` must be an int in [{-rank}, {rank}) for `kernel` of shape {shape}, "
            f"got {axis!r}."
        )
    return axis % rank
