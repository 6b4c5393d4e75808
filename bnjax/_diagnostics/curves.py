"""Distributions over training, as a `Monitor` recorded them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnjax._diagnostics.monitor import Observation
from bnjax._diagnostics.plots import figure_of, shortened

_PANEL = (2.5, 1.7)  # inches
# They stay apart for colour-blind readers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def distributions(
    records: Sequence[Observation],
    layer: str | Sequence[str] | None = None,
    channel: int | Sequence[int] | None = None,
) -> Any:
    """The distribution of activations' inputs over training, a panel for each layer.

    Lines: the 15th, 50th and 85th percentile of y. Without `channel`, of each the median
    over channels, and a band around them from the 10th percentile over channels of the
    lowest to the 90th of the highest.

    Args:
      records: of `Monitor.records`.
      layer: one or several names; default: all.
      channel: one or several numbers of channels.

    Returns:
      matplotlib.figure.Figure.

    Raises:
      ImportError: without matplotlib. ValueError: no records, no such layer or channel.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> from bnjax.diagnostics import Monitor, distributions
      >>> monitor = Monitor(lambda variables, x: bnjax.bn_apply(*variables, x, train=True))
      >>> variables = bnjax.bn_init(3)
      >>> log = monitor.update(monitor.init(variables), variables, jnp.eye(8, 3))
      >>> figure = distributions(monitor.records(log, variables), channel=0)

    Source: Ioffe & Szegedy (2015), Figure 1 (b) and (c).
    """
    if not records:
        raise ValueError("`records` must hold at least one record, got none.")
    known = list(dict.fromkeys(record.layer for record in records))
    layers = known if layer is None else [layer] if isinstance(layer, str) else list(layer)
    if not layers or not set(layers) <= set(known):
        raise ValueError(f"`layer` must be of {known}, got {layer!r}.")
    channels = [channel] if isinstance(channel, int) else channel
    across = min(len(layers), 2 if len(layers) <= 4 else 5)
    down = -(-len(layers) // across)
    wide, high = (4.5, 3.0) if len(layers) <= 4 else _PANEL
    figure = figure_of(wide * across, high * down + 0.8)
    panels = figure.subplots(down, across, sharex=True, squeeze=False).reshape(-1)
    for axes, name in zip(panels, layers, strict=False):
        _panel(axes, [r for r in records if r.layer == name], channels)
        axes.set_title(shortened(name), fontsize=9 if across <= 2 else 7)
    for axes in panels[len(layers) :]:
        axes.remove()
    for axes in panels[max(len(layers) - across, 0) : len(layers)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step", fontsize=8)
    figure.supylabel("input of the activation", fontsize=9)
    handles = {
        label: handle
        for axes in panels[: len(layers)]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=max(1, int(wide * across // 1.9)),
        fontsize=8,
    )
    return figure


def _panel(axes: Any, records: list[Observation], channels: Sequence[int] | None) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps = np.array([record.step for record in records])
    low, median, high = (
        np.stack([record.per_channel[name].reshape(-1) for record in records])
        for name in ("low", "median", "high")
    )
    if channels is None:
        _over_channels(axes, steps, low, median, high)
        lost = ~np.isfinite(median).all(1)
    else:
        _check_channels(channels, median.shape[1], records[0].layer)
        for i, c in enumerate(channels):
            _lines(axes, steps, low[:, c], median[:, c], high[:, c], i, c)
        lost = ~np.isfinite(median[:, list(channels)]).all(1)
    if lost.any():
        axes.plot(
            steps[lost],
            np.zeros(lost.sum()),
            "x",
            color="black",
            markersize=4,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label="not finite",
        )
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if len(steps) == 1:
        axes.set_xticks(steps)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=7)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _over_channels(
    axes: Any, steps: np.ndarray, low: np.ndarray, median: np.ndarray, high: np.ndarray
) -> None:
    def over(values: np.ndarray, q: float) -> np.ndarray:
        """Of the channels that are finite."""
        finite = [row[np.isfinite(row)] for row in values]
        return np.array([np.percentile(row, q) if row.size else np.nan for row in finite])

    band = {"color": _COLOURS[0], "alpha": 0.15, "linewidth": 0}
    axes.fill_between(steps, over(low, 10), over(high, 90), label="80 % of channels", **band)
    _lines(axes, steps, over(low, 50), over(median, 50), over(high, 50), 0, None)


def _lines(
    axes: Any,
    steps: np.ndarray,
    low: np.ndarray,
    median: np.ndarray,
    high: np.ndarray,
    i: int,
    channel: int | None,
) -> None:
    """Three lines in one colour, each of its own style."""
    of = "" if channel is None else f", channel {channel}"
    marker = "o" if len(steps) == 1 else None  # a single point draws no line
    lines = (
        ("85th percentile", high, "--"),
        ("median", median, "-"),
        ("15th percentile", low, ":"),
    )
    for name, values, style in lines:
        axes.plot(
            steps,
            values,
            linestyle=style,
            linewidth=1.6 if style == "-" else 1.1,
            color=_COLOURS[i % len(_COLOURS)],
            marker=marker,
            markersize=3,
            label=name + of,
        )


def _check_channels(channels: Sequence[int], width: int, layer: str) -> None:
    if not channels or not all(0 <= c < width for c in channels):
        raise ValueError(
            f"`channel` must be in [0, {width}) for the layer {layer}, got {list(channels)}."
        )
