"""The table and the plot at the end of a run."""

import io
import math
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatter,
    NullLocator,
    StrMethodFormatter,
)
from rich.table import Table

LABELS = {"bn": "with batch normalization", "no-bn": "without batch normalization"}
# Colours that stay apart in greyscale and for colour-blind readers; a line style as well.
STYLES = {
    "bn": {"color": "#0072b2", "linestyle": "-"},
    "no-bn": {"color": "#d55e00", "linestyle": "--"},
}

Rows = list[dict[str, Any]]


def steps_to(rows: Rows, target: float) -> int | None:
    """The first evaluated step with at least the target test accuracy."""
    return next((row["step"] for row in rows if row["test_accuracy"] >= target), None)


def not_finite(rows: Rows) -> dict[str, int]:
    """Network -> the first evaluated step at which its loss was NaN or infinite."""
    bad: dict[str, int] = {}
    for row in rows:
        if not math.isfinite(row["train_loss"]):
            bad.setdefault(row["network"], row["step"])
    return bad


def by_network(rows: Rows) -> dict[str, Rows]:
    return {
        network: [row for row in rows if row["network"] == network]
        for network in LABELS
        if any(row["network"] == network for row in rows)
    }


def table(rows: Rows, *, target: float, examples_per_second: dict[str, float]) -> Table:
    """Final figures of each network, one row a network."""
    result = Table(title=f"After {rows[-1]['step']} steps", title_justify="left")
    result.add_column("batch\nnormalization")
    result.add_column("train loss", justify="right")
    result.add_column("test accuracy", justify="right")
    result.add_column(f"steps to {target:.1%}", justify="right")
    result.add_column("examples/s", justify="right")
    for network, its_rows in by_network(rows).items():
        reached = steps_to(its_rows, target)
        result.add_row(
            LABELS[network].split()[0],
            f"{its_rows[-1]['train_loss']:.4f}",
            f"{its_rows[-1]['test_accuracy']:.2%}",
            "not reached" if reached is None else str(reached),
            f"{examples_per_second[network]:,.0f}",
        )
    return result


def folded_table(row: dict[str, Any]) -> Table:
    """The folded network beside the unfolded one, from the row of folded.csv."""
    result = Table(title="Batch normalization folded away", title_justify="left")
    result.add_column("evaluation")
    result.add_column("test accuracy", justify="right")
    result.add_column("largest difference of logits", justify="right")
    result.add_column("speed", justify="right")
    result.add_row("unfolded", f"{row['accuracy']:.2%}", "", "1")
    result.add_row(
        "folded",
        f"{row['folded_accuracy']:.2%}",
        f"{row['difference']:.1e} of {row['largest_logit']:.3g}",
        f"{row['time_ratio']:.2f} ({row['time_low']:.2f} to {row['time_high']:.2f})",
    )
    return result


def curves(rows: Rows, *, title: str, target: float) -> bytes:
    """A PNG: test accuracy and training loss against steps."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    accuracy, loss = figure.subplots(1, 2)
    for network, its_rows in by_network(rows).items():
        steps = [row["step"] for row in its_rows]
        marker = "o" if len(steps) == 1 else None  # a single point draws no line
        style = {"label": LABELS[network], "marker": marker, "linewidth": 1.6, **STYLES[network]}
        accuracy.plot(steps, [row["test_accuracy"] for row in its_rows], **style)
        loss.plot(steps, [row["train_loss"] for row in its_rows], **style)
    accuracy.axhline(target, color="0.5", linewidth=1, linestyle=":", label=f"{target:.1%}")
    # The logit scale shows both the first steps and the last tenths of a percent.
    accuracy.set_yscale("logit", nonpositive="clip")
    best = max(row["test_accuracy"] for row in rows)
    accuracy.set(ylabel="test accuracy", ylim=(0.05, 0.995 if best < 0.995 else 0.9995))
    accuracy.yaxis.set_major_locator(
        FixedLocator([0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999])
    )
    accuracy.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    accuracy.yaxis.set_minor_locator(NullLocator())
    loss.set(ylabel="training loss (nats)", yscale="log")
    loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    loss.yaxis.set_minor_formatter(LogFormatter())
    for axes in (accuracy, loss):
        axes.set_xlabel("training steps")
        axes.set_xlim(0, rows[-1]["step"])
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
