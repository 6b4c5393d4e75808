"""The pictures of benchmarks/README.md, from results/speed.csv and results/memory-*.csv.

    python benchmarks/figures.py

Writes figures/speed.png, figures/speed-accuracy.png and figures/memory.png.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib as mpl
import memory_tables
import results
import speed_tables
from results import Rows
from speed_tables import ERRORS, FORWARD, TRAINING, US

mpl.use("Agg")

import matplotlib.pyplot as plt

Point = tuple[float, float]

FOLDER = results.HERE / "figures"
MARKERS = "osD^vP*X"
# Names of points that are nearer, in units of the axes, share a place.
NEAR = 0.06
# Smaller ones would be lost at the edge of a logarithmic axis; exact is among them.
LEAST_ERROR = 1e-8


def styles(rows: Rows) -> dict[str, dict[str, Any]]:
    """Color and marker of each layer, the same in all pictures."""
    names = speed_tables.layers_of(rows)
    return {n: {"color": f"C{i}", "marker": MARKERS[i % 8]} for i, n in enumerate(names)}


def speed(rows: Rows) -> Any:
    """A panel for each dtype and for forward and training; dots are medians, lines quartiles."""
    rows = [row for row in speed_tables.ordinary(rows) if row["ratio"]]
    style = styles(rows)
    dtypes, works = distinct(rows, "dtype"), (FORWARD, TRAINING)
    shapes = list(dict.fromkeys(map(speed_tables.shape_of, rows)))
    peers = [name for name in style if name != US]
    figure, panels = plt.subplots(
        len(works), len(dtypes), figsize=(9.5, 1.2 + 0.75 * len(shapes)), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, work in zip(panels, works, strict=True):
        for panel, dtype in zip(line, dtypes, strict=True):
            for number, name in enumerate(peers):
                chosen = [
                    row for row in rows
                    if (row["layer"], row["work"], row["dtype"]) == (name, work, dtype)
                ]  # fmt: skip
                apart = 0.8 * ((number + 0.5) / len(peers) - 0.5)
                places = [shapes.index(speed_tables.shape_of(row)) + apart for row in chosen]
                low, median, high = (
                    [float(row[column]) for row in chosen] for column in ("low", "ratio", "high")
                )
                panel.hlines(places, low, high, color=style[name]["color"], linewidth=1)
                panel.plot(median, places, linestyle="", markersize=4, label=name, **style[name])
            for place in range(1, len(shapes), 2):
                panel.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.05, linewidth=0)
            logarithmic(panel)
            panel.set_title(f"{work}, {dtype}", fontsize=10)
            panel.grid(axis="x", alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_yticks(range(len(shapes)), shapes, fontsize=8)
    panels[0, 0].set_ylim(len(shapes) - 0.5, -0.5)
    figure.supxlabel("time divided by bnjax's (right of 1: bnjax is faster)", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(peers), fontsize=8)
    return figure


def speed_accuracy(rows: Rows) -> Any:
    """Geometric mean of the training times, and the largest error of the variance."""
    style = styles(rows)
    table = speed_tables.means(rows)
    dtypes = distinct(table, "dtype")
    figure, panels = plt.subplots(
        1,
        len(dtypes),
        figsize=(9.5, 3.8),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        column = largest_mean(row for row in table if row["dtype"] == dtype)
        for row in table:
            if row["dtype"] == dtype and row[TRAINING]:
                error = max(float(row[column]), LEAST_ERROR)
                point = float(row[TRAINING]), error
                panel.plot(*point, linestyle="", label=row["layer"], **style[row["layer"]])
        logarithmic(panel)
        panel.set_yscale("log")
        mean = column.removeprefix("variance error at ")
        panel.set_title(f"{dtype}, a mean of {mean} deviations", fontsize=10)
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("relative error of the variance", fontsize=9)
    figure.supxlabel(f"time of {TRAINING} divided by bnjax's, geometric mean", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def largest_mean(rows: Iterable[dict[str, str]]) -> str:
    """The column of errors at the largest mean that the dtype has room for."""
    (row,) = (row for row in rows if row["layer"] == US)
    return [column for column in ERRORS if row[column] != "n/a"][-1]


def memory(panels_of: dict[str, Rows]) -> Any:
    """A panel for each network: what is moved, and the memory, of flax.linen's."""
    lines = -(-len(panels_of) // 2)
    figure, grid = plt.subplots(
        lines, 2, figsize=(9.5, 3.6 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in grid.flat[len(panels_of) :]:
        panel.remove()
    panels = list(grid.flat[: len(panels_of)])
    for panel, (title, rows) in zip(panels, panels_of.items(), strict=True):
        for number, layer in enumerate(distinct(rows, "layer")):
            points = named_points([row for row in rows if row["layer"] == layer])
            places = [place for place, _ in points]
            panel.plot(*zip(*places, strict=True), marker=MARKERS[number], label=layer, alpha=0.8)
            for place, names in labels(points).items():
                panel.annotate(
                    "\n".join(names),
                    place,
                    (-8, -2) if number else (8, 0),
                    textcoords="offset points",
                    ha="right" if number else "left",
                    va="top" if number else "bottom",
                    fontsize=7,
                    color=f"C{number}",
                )
        panel.axhline(0.65, color="black", linewidth=0.6, linestyle=":")
        panel.axvline(1.25, color="black", linewidth=0.6, linestyle=":")
        panel.set_xlim(0.2, 1.5)
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.45)
    panels[0].legend(fontsize=8, loc="lower left")
    figure.supylabel("temporary memory, divided by flax.linen's", fontsize=10)
    figure.supxlabel("bytes moved, divided by flax.linen's", fontsize=10)
    return figure


def named_points(rows: Rows) -> list[tuple[Point, str]]:
    """Where each way is, and its name, from the least to the most that is moved."""
    found = []
    for row in sorted(rows, key=lambda row: float(row["moved / flax"])):
        together = f", {row['together']}" if row["together"] != "0" else ""
        place = float(row["moved / flax"]), float(row["temporary / flax"])
        found.append((place, row["kept"] + together))
    return found


def labels(points: list[tuple[Point, str]]) -> dict[Point, list[str]]:
    """Names, in one place where theirs are too near for two."""
    found: dict[Point, list[str]] = {}
    for place, name in points:
        near = next((p for p in found if math.dist(p, place) < NEAR), place)
        found.setdefault(near, []).append(name)
    return found


def logarithmic(panel: Any) -> None:
    """The axis of ratios, with a line at 1."""
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(mpl.ticker.LogLocator(subs=(0.7, 1.5, 3)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("{x:g}")
    panel.tick_params(axis="x", which="both", labelsize=8)


def distinct(rows: Iterable[dict[str, str]], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def networks() -> dict[str, Rows]:
    """Rows of memory.py by title."""
    return {
        f"{title}: {name}": rows
        for platform, title in memory_tables.PLATFORMS.items()
        for name, rows in memory_tables.networks(results.read(f"memory-{platform}")[0]).items()
    }


FIGURES: dict[str, Callable[[], Any]] = {
    "speed": lambda: speed(results.read("speed")[0]),
    "speed-accuracy": lambda: speed_accuracy(results.read("speed")[0]),
    "memory": lambda: memory(networks()),
}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        try:
            figure = draw()
        except results.TableError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        # No date and no version within, so that the same results make the same file.
        figure.savefig(FOLDER / f"{name}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        print(f"Written: benchmarks/figures/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
