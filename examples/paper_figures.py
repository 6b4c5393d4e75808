"""The figures of paper_mnist.py, from its tables."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import paper_tables as tables
import report
from data import Dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)
from paper_tables import Networks, Row

NETWORKS = ("with", "without")
STYLES = {"with": report.STYLES["bn"], "without": report.STYLES["no-bn"]}
TITLES = {"with": "with batch normalization", "without": "without it"}
ACCURACIES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99)


def title(name: str, dataset: Dataset, rows: list[Row]) -> str:
    """Data, number of seeds, and what the bands are."""
    seeds = len({row["seed"] for row in rows})
    bands = "bars" if name == "regularize" else "bands"
    count = f"{seeds} seed{'s' if seeds > 1 else ''}, {bands} from least to largest"
    return f"{dataset.name}, {WORDS[name]}: mean of {count}"


WORDS = {
    "rates": "test accuracy over learning rates",
    "depth": "30 hidden layers",
    "curves": "3 hidden layers of 100 sigmoid units",
    "low_rate": "3 hidden layers of 100 sigmoid units",
    "regularize": "1,000 training examples",
}


def canvas(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, pil_kwargs={"optimize": True})
    return content.getvalue()


def band(axes: Any, x: Any, series: list[list[float]], style: dict[str, Any]) -> None:
    """Mean over the seeds, and all that lies between the least and the largest."""
    y = np.array(series)
    axes.plot(x, y.mean(0), linewidth=1.6, **style)
    axes.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.2, linewidth=0)


def accuracy_axis(axes: Any) -> None:
    """The logit scale shows both the first steps and the last tenths of a percent."""
    axes.set_yscale("logit", nonpositive="clip")
    axes.set(ylim=(0.05, 0.992))
    axes.yaxis.set_major_locator(FixedLocator(ACCURACIES))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    axes.yaxis.set_minor_locator(NullLocator())


def plain(axes: Any, **settings: Any) -> None:
    axes.set(**settings)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def steps_axis(axes: Any, last: float) -> None:
    axes.set(xlabel="training steps", xlim=(0, last))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def activations(found: Networks) -> list[str]:
    return list(dict.fromkeys(key[0] for key in found))


def finals(seeds: dict[int, list[Row]], column: str = "test_accuracy") -> list[float]:
    return [rows[-1][column] for rows in seeds.values()]


def over_steps(axes: Any, seeds: dict[int, list[Row]], network: str) -> None:
    """Test accuracy."""
    series = list(seeds.values())
    steps = [row["step"] for row in series[0]]
    accuracies = [[row["test_accuracy"] for row in rows] for rows in series]
    band(axes, steps, accuracies, {"label": TITLES[network], **STYLES[network]})
    steps_axis(axes, steps[-1])


def rates(rows: list[Row], gradients: list[Row], summary: list[Row], title: str) -> Figure:
    """Last test accuracy over learning rates; crosses where networks diverged."""
    found = tables.networks(rows)
    figure = canvas(9, 4, title)
    panels = figure.subplots(1, len(activations(found)), sharey=True, squeeze=False)[0]
    for axes, activation in zip(panels, activations(found), strict=True):
        for network in NETWORKS:
            points = {
                float(label): seeds
                for (a, n, label), seeds in found.items()
                if (a, n) == (activation, network)
            }
            series = np.array([finals(seeds) for seeds in points.values()]).T.tolist()
            style = {"label": TITLES[network], "marker": "o", "markersize": 4, **STYLES[network]}
            band(axes, list(points), series, style)
            _crosses(axes, points, network)
        axes.set_xscale("log")
        accuracy_axis(axes)
        plain(axes, xlabel="learning rate", title=f"{activation}, 3 hidden layers")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panels[0].set_ylabel("test accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _crosses(axes: Any, points: dict[float, dict[int, list[Row]]], network: str) -> None:
    lost = [
        (rate, rows[-1]["test_accuracy"])
        for rate, seeds in points.items()
        for rows in seeds.values()
        if tables.diverged(rows)
    ]
    x, y = zip(*lost, strict=True) if lost else ((), ())
    style = {"color": STYLES[network]["color"], "marker": "x", "s": 40, "zorder": 3}
    axes.scatter(x, y, label=f"diverged, {network}", **style)


def depth(rows: list[Row], gradients: list[Row], summary: list[Row], title: str) -> Figure:
    """Each network at its best rate: gradients by layer, before and after; accuracy."""
    found, norms = tables.networks(rows), tables.networks(gradients)
    figure = canvas(9, 6.5, title)
    panels = figure.subplots(len(activations(found)), 2, squeeze=False)
    for (left, right), activation in zip(panels, activations(found), strict=True):
        chosen = []
        for network in NETWORKS:
            row = tables.best(summary, activation=activation, network=network)
            key = activation, network, row["rate"]
            chosen.append(f"{network} {row['rate']}")
            _gradients(left, norms[key], network)
            over_steps(right, found[key], network)
        left.set_yscale("log")
        count = len([k for k in gradients[0] if k.startswith("layer ")])
        plain(left, xlabel="hidden layer (1 is next to the input)", xlim=(1, count))
        left.set(ylabel="norm of the gradient (nats)", title=f"{count} {activation} layers")
        left.legend(fontsize=8)
        accuracy_axis(right)
        plain(right, ylabel="test accuracy", title=f"learning rates: {', '.join(chosen)}")
        right.legend(fontsize=8, loc="lower right")
    return figure


def _gradients(axes: Any, seeds: dict[int, list[Row]], network: str) -> None:
    for index, (when, marker) in enumerate((("before training", ""), ("after", "."))):
        series = [
            [v or math.nan for k, v in rows[index].items() if k.startswith("layer ")]
            for rows in seeds.values()
        ]
        look: dict[str, Any] = {"marker": marker, "alpha": 1 - 0.4 * index, **STYLES[network]}
        style = {"label": f"{network}, {when}", **look}
        band(axes, range(1, len(series[0]) + 1), series, style)


def curves(rows: list[Row], gradients: list[Row], summary: list[Row], title: str) -> Figure:
    """Accuracy at each rate; percentiles of a sigmoid's inputs, each at its best rate."""
    found = tables.networks(rows)
    figure = canvas(9, 7.5, title)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    upper, lower = halves
    labels = list(dict.fromkeys(key[2] for key in found))
    best = {n: tables.best(summary, activation="sigmoid", network=n)["rate"] for n in NETWORKS}
    panels = upper.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for axes, rate in zip(panels, labels, strict=True):
        for network in NETWORKS:
            over_steps(axes, found["sigmoid", network, rate], network)
        accuracy_axis(axes)
        axes.set_ylim(0.9, 0.992)
        marks = [network for network in NETWORKS if best[network] == rate]
        note = f" (best {' and '.join(marks)})" if marks and len(labels) > 1 else ""
        plain(axes, title=f"learning rate {rate}{note}")
    panels[0].set_ylabel("test accuracy")
    panels[-1].legend(fontsize=8, loc="lower right")
    for axes, network in zip(lower.subplots(1, 2, sharey=True), reversed(NETWORKS), strict=True):
        seeds = found["sigmoid", network, best[network]]
        _percentiles(axes, seeds[min(seeds)], network)
        axes.set_title(f"{TITLES[network]}, learning rate {best[network]}")
    return figure


def _percentiles(axes: Any, rows: list[Row], network: str) -> None:
    steps = [row["step"] for row in rows]
    for column, style in (("p15", ":"), ("p50", "-"), ("p85", ":")):
        values = [row[column] for row in rows]
        label = {"p15": "15th and 85th percentile", "p50": "median"}.get(column)
        axes.plot(steps, values, style, color=STYLES[network]["color"], label=label)
    plain(axes, ylabel="input of unit 1 of layer 3 (seed 0)")
    steps_axis(axes, steps[-1])
    axes.legend(fontsize=8)


def regularize(rows: list[Row], gradients: list[Row], summary: list[Row], title: str) -> Figure:
    """Gap and test accuracy of each regularization, at its best rate."""
    found = tables.networks(rows)
    figure = canvas(9, 6.5, title)
    count = len(activations(found))
    panels = figure.subplots(count, 2, sharey=True, squeeze=False)
    names = list(dict.fromkeys(row["regularization"] for row in rows))
    for pair, activation in zip(panels, activations(found), strict=True):
        for network, shift in zip(NETWORKS, (-0.15, 0.15), strict=True):
            for place, name in enumerate(names):
                words = {"activation": activation, "network": network, "regularization": name}
                rate = tables.best(summary, **words)["rate"]
                last = [its[-1] for its in found[activation, network, name, rate].values()]
                tests = np.array([100 * row["test_accuracy"] for row in last])
                gaps = np.array([100 * row["train_accuracy"] for row in last]) - tests
                for axes, values in zip(pair, (gaps, tests), strict=True):
                    _dot(axes, values, place + shift, network, name == names[0])
                pair[1].annotate(
                    rate,
                    (tests.max(), place + shift),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
        pair[0].set_ylabel(activation)
    for axes in panels.flat:
        plain(axes, yticks=range(len(names)), yticklabels=names)
    panels[0, 0].invert_yaxis()
    panels[-1, 0].set_xlabel("gap: training less test accuracy (points)")
    panels[-1, 1].set_xlabel("test accuracy (%), and its learning rate")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _dot(axes: Any, values: np.ndarray, y: float, network: str, named: bool) -> None:
    mean = values.mean()
    ends = [[mean - values.min()], [values.max() - mean]]
    style = {"color": STYLES[network]["color"], "capsize": 2}
    marker = "o" if network == "with" else "s"
    label = TITLES[network] if named else None
    axes.errorbar(mean, y, xerr=ends, fmt=marker, markersize=5, label=label, **style)


FIGURES: dict[str, Callable[[list[Row], list[Row], list[Row], str], Figure]] = {
    "rates": rates,
    "depth": depth,
    "curves": curves,
    "low_rate": curves,
    "regularize": regularize,
}
