"""What the summaries of paper_mnist.py say about each claim, in a sentence and a verdict.

Two means differ clearly if they are further apart than the sum of their standard
deviations over the seeds; a deviation that one seed does not have counts as 0.
"""

import math
from collections.abc import Callable

from paper_tables import GOAL, TRAINED, Row, best

HOLDS, PARTLY, FAILS = "holds", "holds partly", "fails"
NETWORKS = ("with", "without")

Rows = list[Row]


def verdict(parts: list[bool]) -> str:
    if all(parts):
        return HOLDS
    return PARTLY if any(parts) else FAILS


def above(a: Row, b: Row, column: str) -> bool:
    """Whether the mean of `a` is clearly larger."""
    deviations = [row[f"{column}_sd"] for row in (a, b)]
    return a[column] - b[column] > sum(d for d in deviations if not math.isnan(d))


def percent(row: Row, column: str = "test_accuracy") -> str:
    return _with_sd(row, column, 100, ".2f") + " %"


def number(row: Row, column: str) -> str:
    return _with_sd(row, column, 1, ".3g")


def _with_sd(row: Row, column: str, factor: float, form: str) -> str:
    mean, sd = factor * row[column], factor * row[f"{column}_sd"]
    if math.isnan(mean):
        return "none"
    return f"{mean:{form}}" + ("" if math.isnan(sd) else f" ± {sd:.2g}")


def activations(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["activation"] for row in rows))


def of_seeds(rows: Rows) -> str:
    return f"{rows[0]['seeds']:g} seeds, {rows[0]['steps']:,.0f} steps"


def highest_rate(rows: Rows) -> float:
    """The highest learning rate at which all seeds trained, 0 if there is none."""
    return max((float(r["rate"]) for r in rows if r["trained"] == r["seeds"]), default=0)


def larger_rates(rows: Rows) -> tuple[str, str]:
    """It trains at higher rates, and above its limit the network without it diverges."""
    words, parts = [], []
    for activation in activations(rows):
        its = {
            n: [r for r in rows if (r["activation"], r["network"]) == (activation, n)]
            for n in NETWORKS
        }
        limits = {network: highest_rate(found) for network, found in its.items()}
        beyond = [r for r in its["without"] if float(r["rate"]) > limits["without"]]
        lost, all_of = (int(sum(r[k] for r in beyond)) for k in ("diverged", "seeds"))
        parts += [limits["with"] > limits["without"], bool(beyond) and lost == all_of]
        tops = {network: best(found) for network, found in its.items()}
        accuracies = ", ".join(f"{percent(r)} {n} ({r['rate']})" for n, r in tops.items())
        words.append(
            f"{activation}: all seeds reach {TRAINED:.0%} up to rate {limits['with']:g} with, "
            f"{limits['without']:g} without; above that, {lost} of {all_of} networks without "
            f"diverged, the others stayed below; at the best rate {accuracies}"
        )
    return f"{'. '.join(words)} ({of_seeds(rows)})", verdict(parts)


def deep(rows: Rows) -> tuple[str, str]:
    """All seeds of both activations train with it, and none without."""
    words, parts = [], []
    for activation in activations(rows):
        tops = {n: best(rows, activation=activation, network=n) for n in NETWORKS}
        parts += [tops["with"]["trained"] == rows[0]["seeds"], tops["without"]["trained"] == 0]
        each = [
            f"{percent(row)} {network}, gradient times {number(row, 'factor_per_layer_before')} "
            f"per layer before training (layer 2 to the last: {row['gradient_ratio_before']:.1g})"
            for network, row in tops.items()
        ]
        words.append(f"{activation}: {'; '.join(each)}")
    note = f"{of_seeds(rows)}, each at its best rate; 0.9 per layer would be {0.9**28:.2f}"
    return f"{'. '.join(words)} ({note})", verdict(parts)


def drift(rows: Rows) -> tuple[str, str]:
    """Medians move less with it: by themselves; beside the spread, in all and early; in the end."""
    words, parts = [], []
    columns = "drift", "drift_per_spread", "early_drift_per_spread", "shift"
    for title, a, b in _pairs(rows):
        own, relative, early, shift = (above(b, a, column) for column in columns)
        parts += [own, relative and early, shift]
        both = [f"{number(a, column)} and {number(b, column)}" for column in columns]
        words.append(
            f"{title}: {both[0]}, beside the spread {both[1]} (first fifth {both[2]}); from the "
            f"first fifth to the last, unit 1 shifts by {both[3]}"
        )
    what = "Moves of the median from record to record, with and without, mean of all units, at"
    return f"{what} {'. '.join(words)} ({of_seeds(rows)})", verdict(parts)


def faster(rows: Rows) -> tuple[str, str]:
    """It is sooner at GOAL and ends higher, at equal rates and each at its best one."""
    words, parts = [], []
    for title, a, b in [*_pairs(rows), *_best_pair(rows)]:
        steps = a["steps_to_goal"], b["steps_to_goal"]
        # A network that never reaches the goal has no steps to it.
        sooner = above(b, a, "steps_to_goal") or (math.isnan(steps[1]) > math.isnan(steps[0]))
        parts += [sooner, above(a, b, "test_accuracy")]
        ends = [f"{s:,.0f}" if not math.isnan(s) else "never" for s in steps]
        words.append(
            f"{title}: {GOAL:.0%} at step {ends[0]} with, {ends[1]} without; in the end "
            f"{percent(a)} and {percent(b)}"
        )
    return f"{'. '.join(words)} ({of_seeds(rows)})", verdict(parts)


def _pairs(rows: Rows) -> list[tuple[str, Row, Row]]:
    """With and without, at equal rates."""
    labels = sorted({row["rate"] for row in rows}, key=float)
    at = {(row["network"], row["rate"]): row for row in rows}
    return [(f"rate {label}", at["with", label], at["without", label]) for label in labels]


def _best_pair(rows: Rows) -> list[tuple[str, Row, Row]]:
    """With and without, each at its best rate, if these differ."""
    a, b = (best(rows, network=network) for network in NETWORKS)
    title = f"each at its best rate ({a['rate']} with, {b['rate']} without)"
    return [(title, a, b)] if a["rate"] != b["rate"] else []


def regularizes(rows: Rows) -> tuple[str, str]:
    """Smaller gaps, higher test accuracy than without; and nothing is gained by other means."""
    words, parts = [], []
    for activation in activations(rows):
        plain = [row for row in rows if row["regularization"].startswith("none")]
        none = {n: best(plain, activation=activation, network=n) for n in NETWORKS}
        tops = {n: best(rows, activation=activation, network=n) for n in NETWORKS}
        parts += [
            above(none["without"], none["with"], "accuracy_gap"),
            above(none["without"], none["with"], "loss_gap"),
            above(none["with"], none["without"], "test_accuracy"),
            not above(tops["with"], none["with"], "test_accuracy"),
        ]
        gaps = " and ".join(percent(none[n], "accuracy_gap") for n in NETWORKS)
        losses = " and ".join(number(none[n], "loss_gap") for n in NETWORKS)
        tests = " and ".join(percent(none[n]) for n in NETWORKS)
        most = ", ".join(f"{percent(r)} {n} ({r['regularization']})" for n, r in tops.items())
        words.append(
            f"{activation}: alone, each at the best of three rates, gap {gaps} with and without, "
            f"in the loss {losses} nats; test accuracy {tests}; best of all "
            f"{most}"
        )
    return f"{'. '.join(words)} ({of_seeds(rows)})", verdict(parts)


# claim -> the experiments, the claim in words, what judges it
CLAIMS: dict[int, tuple[tuple[str, ...], str, Callable[[Rows], tuple[str, str]]]] = {
    1: (
        ("rates",),
        "With it, larger learning rates train; without it they diverge",
        larger_rates,
    ),
    5: (
        ("depth",),
        "30 layers of saturating units train with it; without it the gradient vanishes",
        deep,
    ),
    6: (
        ("curves", "low_rate"),
        "The distribution of a sigmoid's inputs moves less over training with it",
        drift,
    ),
    7: (
        ("curves", "low_rate"),
        "The paper's MNIST network trains faster with it, and to a higher accuracy",
        faster,
    ),
    8: (
        ("regularize",),
        "It regularizes: the gap is smaller, and other regularization is not needed",
        regularizes,
    ),
}


def claims(summaries: dict[str, Rows]) -> list[dict[str, str]]:
    """The table of those claims whose experiments there are."""
    found = []
    for claim, (experiments, text, judge) in CLAIMS.items():
        rows = [row for name in experiments for row in summaries.get(name, [])]
        if rows:
            measured, its_verdict = judge(rows)
            row = {"claim": str(claim), "text": text, "measured": measured, "verdict": its_verdict}
            found.append(row)
    return found
