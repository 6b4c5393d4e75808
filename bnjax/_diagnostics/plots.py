"""The heat map of a report, and what all pictures share."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnjax._diagnostics.monitor import Observation

# Readable at any number of layers, and in greyscale and for colour-blind readers too.
_ROW = 0.2  # inches
_NAME = 34  # characters
_COLUMNS = 400  # of cells that a page can show
_GREY = "0.85"

_LABELS = {
    "mean_gap": "gap of batch and running mean (running deviations)",
    "log_var_ratio": "log(batch variance / running variance)",
    "output_difference": "difference of the output in both modes (deviations)",
    "distance": "Hellinger distance of batch and running statistics",
    "entries": "entries per channel",
    "saturated": "share of saturated inputs of the activation",
    "dead": "dead channels",
    "exploding": "exploding channels",
    "untrained": "channels that were never updated",
    "low": "15th percentile of the activation's input",
    "median": "median of the activation's input",
    "high": "85th percentile of the activation's input",
}
_SIGNED = ("log_var_ratio", "mean", "running_mean", "low", "median", "high")
_SHARES = ("distance", "saturated")


def heat_map(records: Sequence[Any], quantity: str = "mean_gap") -> Any:
    """A quantity of all channels of all layers: a row for each layer, its channels along it.

    color = quantity(layer, channel), from 0 to its 98th percentile, the same on both sides
    of 0 for signed ones. Rows of layers of several widths are stretched to one; where more
    channels than cells are in a row, a cell has the one farthest from 0.

    Args:
      records: of `report`, or those of one step of a `Monitor`.
      quantity: a name in `per_channel` of the records.

    Returns:
      matplotlib.figure.Figure: `.savefig("map.png")`, or as the last line of a notebook.

    Raises:
      ImportError: without matplotlib. ValueError: no records, or none with this quantity.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> from bnjax.diagnostics import Monitor, heat_map
      >>> monitor = Monitor(lambda variables, x: bnjax.bn_apply(*variables, x, train=True))
      >>> variables = bnjax.bn_init(3)
      >>> log = monitor.update(monitor.init(variables), variables, jnp.eye(8, 3))
      >>> figure = heat_map(monitor.records(log, variables), "median")
      >>> print(figure.axes[0].get_xlabel())
      channel

    Source: the quantities are those of `bnjax.diagnostics.report`.
    """
    if not records:
        raise ValueError("`records` must hold at least one layer, got none.")
    known = sorted({name for record in records for name in record.per_channel})
    if quantity not in known:
        raise ValueError(f"`quantity` must be one of {known}, got {quantity!r}.")
    found = [record.per_channel.get(quantity) for record in records]
    values = [None if v is None else np.asarray(v, np.float64).reshape(-1) for v in found]
    widths = [0 if v is None else v.size for v in values]
    columns = min(max(widths), _COLUMNS)
    table = np.stack([_resampled(v, columns) for v in values])
    given = np.array([v is not None for v in values])[:, None]

    figure = figure_of(9, 1.6 + _ROW * len(records))
    axes = figure.subplots()
    axes.set_facecolor(_GREY)
    finite = np.isfinite(table)
    shown = np.ma.array(table, mask=~finite)
    limits, colours = _scale(table[finite], quantity, found)
    image = axes.imshow(
        shown, aspect="auto", interpolation="nearest", cmap=_colour_map(colours), **limits
    )
    missing = np.where(given & ~finite, 1.0, np.nan)
    _legend(axes, missing, bool((~given).any()))
    _name_rows(axes, [record.layer for record in records], widths)
    _name_columns(axes, widths, columns)
    _colour_bar(figure, image, quantity, table[finite], limits)
    steps = {record.step for record in records if isinstance(record, Observation)}
    if len(steps) == 1:
        axes.set_title(f"step {steps.pop():,}", fontsize=10)
    return figure


def figure_of(width: float, height: float) -> Any:
    """A figure of its own, which pyplot knows nothing of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib. Fix: pip install 'bnjax[reports]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _resampled(values: np.ndarray | None, columns: int) -> np.ndarray:
    """A row of so many cells: of several channels the one that is farthest from 0."""
    if values is None or not values.size:
        return np.full(columns, np.nan)
    starts = np.arange(columns) * values.size // columns
    ends = np.maximum(starts + 1, np.append(starts[1:], values.size))
    # What is not finite is farthest.
    size = np.where(np.isfinite(values), np.abs(values), np.inf)
    return np.array([values[a:b][size[a:b].argmax()] for a, b in zip(starts, ends, strict=True)])


def _scale(values: np.ndarray, quantity: str, found: list[Any]) -> tuple[dict[str, float], str]:
    if quantity in _SHARES or any(v is not None and v.dtype == bool for v in found):
        return {"vmin": 0.0, "vmax": 1.0}, "YlGnBu"
    if quantity in _SIGNED:
        largest = float(np.percentile(np.abs(values), 98)) if values.size else 0.0
        largest = largest or 1.0
        return {"vmin": -largest, "vmax": largest}, "RdBu_r"
    largest = float(np.percentile(values, 98)) if values.size else 0.0
    return {"vmin": 0.0, "vmax": largest or 1.0}, "YlGnBu"


def _colour_map(name: str) -> Any:
    """Without its darkest colours, so that black stays apart."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    ends = (0.08, 0.92) if name == "RdBu_r" else (0.0, 0.85)
    return ListedColormap(colormaps[name](np.linspace(*ends, 256)))


def _legend(axes: Any, missing: np.ndarray, some_unknown: bool) -> None:
    """Black cells where a value is not finite; what grey means."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    patches = []
    if np.isfinite(missing).any():
        axes.imshow(missing, aspect="auto", interpolation="nearest", cmap=ListedColormap(["black"]))
        patches.append(Patch(color="black", label="not finite"))
    if some_unknown:
        patches.append(Patch(color=_GREY, label="no such number"))
    if patches:
        axes.figure.legend(handles=patches, loc="outside upper right", ncols=2, fontsize=8)


def _name_rows(axes: Any, names: list[str], widths: list[int]) -> None:
    size = 8 if len(names) <= 60 else 6
    axes.set_yticks(range(len(names)), [shortened(name) for name in names], fontsize=size)
    if len(set(widths) - {0}) > 1:
        other = axes.twinx()
        other.set_ylim(axes.get_ylim())
        other.set_yticks(range(len(names)), [f"{w:,}" if w else "" for w in widths], fontsize=size)
        other.set_ylabel("channels", fontsize=9)
        other.tick_params(length=0)
        other.spines[:].set_visible(False)


def _name_columns(axes: Any, widths: list[int], columns: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if len(set(widths) - {0}) == 1:
        scale = max(widths) / columns
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x * scale:.0f}"))
        axes.set_xlabel("channel")
    else:
        axes.set_xticks([-0.5, columns - 0.5], ["first", "last"])
        axes.set_xlabel("channels of each layer")


def _colour_bar(
    figure: Any, image: Any, quantity: str, values: np.ndarray, limits: dict[str, float]
) -> None:
    below, above = (values < limits["vmin"]).any(), (values > limits["vmax"]).any()
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = figure.colorbar(
        image, ax=image.axes, location="bottom", extend=extend, fraction=0.05, pad=0.02, aspect=50
    )
    bar.set_label(_LABELS.get(quantity, quantity), fontsize=9)
    bar.ax.tick_params(labelsize=8)


def shortened(name: str, length: int = _NAME) -> str:
    """A long path with its longest parts abbreviated, but for their numbers."""
    parts = name.split("/")
    while len(parts) > 1 and len("/".join(parts)) > length:
        i = max(range(len(parts)), key=lambda i: len(parts[i]))
        start, end = parts[i][:4], re.sub(r"^.*?((?:_?\d+)?)$", r"\1", parts[i])
        if len(start) + 1 + len(end) >= len(parts[i]):
            break
        parts[i] = f"{start}…{end}"
    short = "/".join(parts)
    return (
        short if len(short) <= length else f"{short[: length // 2]}…{short[-(length // 2 - 1) :]}"
    )
