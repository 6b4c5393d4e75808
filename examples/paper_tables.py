"""Rows of networks as summaries over the seeds: mean, standard deviation, how many diverged."""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GUESSING = math.log(10)  # the loss of a guess among ten classes
TRAINED = 0.9  # test accuracy of a network that counts as trained
GOAL = 0.97  # test accuracy for "steps to"
STEPS_TO_GOAL = "steps_to_goal"
FIFTH = 0.2  # of the records: early, networks without it have not converged yet
LAST = 0.1  # share of the records over which the last accuracy is averaged

Row = dict[str, Any]
Key = tuple[str, ...]
Networks = dict[Key, dict[int, list[Row]]]

WORDS = ("activation", "network", "regularization", "rate")  # what tells networks apart


def read(path: Path) -> list[Row]:
    """A CSV file of a run; all columns but those of words are numbers, NaN where empty."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {k: v if k in WORDS else float(v or "nan") for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def text(rows: list[Row]) -> str:
    """A CSV file's content."""
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def networks(rows: list[Row]) -> Networks:
    """Those of WORDS that the rows have -> seed -> rows in the order of their steps."""
    found: Networks = {}
    for row in rows:
        key = tuple(row[word] for word in WORDS if word in row)
        found.setdefault(key, {}).setdefault(int(row["seed"]), []).append(row)
    return found


def diverged(rows: list[Row]) -> bool:
    """A loss that was not finite, or in the end more than twice that of guessing."""
    losses = [row["train_loss"] for row in rows]
    return not np.isfinite(losses).all() or losses[-1] > 2 * GUESSING


def not_finite(rows: list[Row]) -> bool:
    return not all(math.isfinite(row["train_loss"]) for row in rows)


def summary(name: str, rows: list[Row], gradients: list[Row]) -> list[Row]:
    """A row for each kind of network, with means and deviations over the seeds.

    Accuracies count all seeds, those that diverged with the accuracy that they have;
    other means leave out numbers that are not finite, but there are no steps to a goal
    that one of the seeds did not reach.
    """
    found = []
    words = [word for word in WORDS if word in rows[0]]
    norms = networks(gradients)
    for key, seeds in networks(rows).items():
        values = [
            VALUES[name](series, norms.get(key, {}).get(seed, [])) for seed, series in seeds.items()
        ]
        series = list(seeds.values())
        counts = {
            "steps": int(series[0][-1]["step"]),
            "seeds": len(series),
            "trained": sum(s[-1]["test_accuracy"] >= TRAINED for s in series),
            "diverged": sum(map(diverged, series)),
            "not_finite": sum(map(not_finite, series)),
        }
        means = {k: v for column in values[0] for k, v in mean_and_sd(column, values).items()}
        found.append(dict(zip(words, key, strict=True)))
        found[-1] |= counts | means
    return found


def mean_and_sd(column: str, values: list[dict[str, float]]) -> Row:
    """Empty where no seed has a number; no deviation of one seed."""
    numbers = np.array([v[column] for v in values if math.isfinite(v[column])])
    if column == STEPS_TO_GOAL and len(numbers) < len(values):
        numbers = numbers[:0]
    mean = f"{numbers.mean():.4g}" if len(numbers) else ""
    sd = f"{numbers.std(ddof=1):.2g}" if len(numbers) > 1 else ""
    return {column: mean, f"{column}_sd": sd}


def of_rates(rows: list[Row], gradients: list[Row]) -> dict[str, float]:
    return {"test_accuracy": rows[-1]["test_accuracy"]}


def of_depth(rows: list[Row], gradients: list[Row]) -> dict[str, float]:
    """Norm of layer 2's gradient beside the last one's, which has the same shape; per layer."""
    found = of_rates(rows, gradients)
    for row, when in zip(gradients, ("before", "after"), strict=True):
        norms = [v for k, v in row.items() if k.startswith("layer ")]
        ratio = norms[1] / norms[-1] if norms[-1] else math.nan
        found[f"gradient_ratio_{when}"] = ratio
        found[f"factor_per_layer_{when}"] = ratio ** (1 / (len(norms) - 2))
    return found


def of_curves(rows: list[Row], gradients: list[Row]) -> dict[str, float]:
    """Drift is that of a record from the one before, so the first record has none.

    Shift is that of the shown unit's median from the first fifth of the records to the last.
    """
    last = rows[-max(1, round(LAST * len(rows))) :]
    reached = [row["step"] for row in rows if row["test_accuracy"] >= GOAL]
    fifth = max(1, round(FIFTH * len(rows)))
    ends = [np.mean([row["p50"] for row in part]) for part in (rows[:fifth], rows[-fifth:])]
    return {
        "test_accuracy": float(np.mean([row["test_accuracy"] for row in last])),
        STEPS_TO_GOAL: min(reached, default=math.nan),
        **_moves(rows[1:], ""),
        **_moves(rows[1 : 1 + fifth], "early_"),
        "shift": float(abs(ends[1] - ends[0])),
    }


def _moves(rows: list[Row], prefix: str) -> dict[str, float]:
    drift, spread = np.array([(row["drift"], row["spread"]) for row in rows]).T
    with np.errstate(divide="ignore", invalid="ignore"):  # of diverged networks
        relative = drift / spread
    return {
        f"{prefix}drift": float(drift.mean()),
        f"{prefix}drift_per_spread": float(relative.mean()),
    }


def of_regularize(rows: list[Row], gradients: list[Row]) -> dict[str, float]:
    row = rows[-1]
    names = "train_accuracy", "test_accuracy", "eval_train_loss", "test_loss", "small_weights"
    return {
        **{name: row[name] for name in names},
        "accuracy_gap": row["train_accuracy"] - row["test_accuracy"],
        "loss_gap": row["test_loss"] - row["eval_train_loss"],
    }


VALUES: dict[str, Callable[[list[Row], list[Row]], dict[str, float]]] = {
    "rates": of_rates,
    "depth": of_depth,
    "curves": of_curves,
    "low_rate": of_curves,
    "regularize": of_regularize,
}


def best(rows: list[Row], **fixed: str) -> Row:
    """Of the rows with these words, the one with the highest mean test accuracy."""
    found = [row for row in rows if all(row[k] == v for k, v in fixed.items())]
    return max(found, key=lambda row: row["test_accuracy"])
