"""What the summaries of paper_mnist.py say about each claim: a sentence, parts, a verdict.

A claim holds if all its parts do, and fails if none does. Two means differ clearly if
they are further apart than the sum of their standard deviations over the seeds; a
deviation that one seed does not have counts as 0.
"""

import math
from collections.abc import Callable

from paper_tables import GOAL, STEPS_TO_GOAL, TRAINED, Row, best

HOLDS, PARTLY, FAILS = "holds", "holds partly", "fails"
YES, NO, OPPOSITE, UNCLEAR = "yes", "no", "the opposite", "not clear"
NETWORKS = ("with", "without")
VANISHING = 0.9  # factor of the gradient per layer

Rows = list[Row]
Parts = dict[str, str]
Found = tuple[str, Parts]


def verdict(parts: Parts) -> str:
    held = [found == YES for found in parts.values()]
    if all(held):
        return HOLDS
    return PARTLY if any(held) else FAILS


def answer(held: bool) -> str:
    return YES if held else NO


def larger(a: Row, b: Row, column: str) -> str:
    """Whether the mean of `a` is clearly larger, or clearly smaller."""
    deviations = [row[f"{column}_sd"] for row in (a, b)]
    difference = a[column] - b[column]
    if not abs(difference) > sum(d for d in deviations if not math.isnan(d)):
        return UNCLEAR
    return YES if difference > 0 else OPPOSITE


def percent(row: Row, column: str = "test_accuracy") -> str:
    return _with_sd(row, column, 100, ".2f") + " %"


def number(row: Row, column: str, form: str = ".3g") -> str:
    return _with_sd(row, column, 1, form)


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


def larger_rates(rows: Rows) -> Found:
    """It trains at higher rates, and above its limit the network without it diverges."""
    words: list[str] = []
    parts: Parts = {}
    for activation in activations(rows):
        its = {
            n: [r for r in rows if (r["activation"], r["network"]) == (activation, n)]
            for n in NETWORKS
        }
        limits = {network: highest_rate(found) for network, found in its.items()}
        beyond = [r for r in its["without"] if float(r["rate"]) > limits["without"]]
        lost, trained, all_of = (
            int(sum(r[k] for r in beyond)) for k in ("diverged", "trained", "seeds")
        )
        parts[f"{activation}: all seeds train at higher rates with it"] = answer(
            limits["with"] > limits["without"]
        )
        parts[f"{activation}: above its limit all networks without it diverge"] = answer(
            bool(beyond) and lost == all_of
        )
        tops = {network: best(found) for network, found in its.items()}
        accuracies = ", ".join(f"{percent(r)} {n} ({r['rate']})" for n, r in tops.items())
        words.append(
            f"{activation}: all seeds reach {TRAINED:.0%} up to rate {limits['with']:g} with, "
            f"{limits['without']:g} without; above that, {lost} of {all_of} networks without "
            f"diverged, {trained} reached it; at the best rate {accuracies}"
        )
    return f"{'. '.join(words)} ({of_seeds(rows)})", parts


def deep(rows: Rows) -> Found:
    """All seeds of both activations train with it, and none without, where gradients vanish."""
    words: list[str] = []
    parts: Parts = {}
    for activation in activations(rows):
        tops = {n: best(rows, activation=activation, network=n) for n in NETWORKS}
        trained = {n: row["trained"] for n, row in tops.items()}
        parts[f"{activation}: all seeds train with it"] = answer(
            trained["with"] == rows[0]["seeds"]
        )
        parts[f"{activation}: none trains without it"] = answer(trained["without"] == 0)
        parts[f"{activation}: without it gradients vanish, by 0.9 per layer or more"] = answer(
            tops["without"]["factor_per_layer_before"] <= VANISHING
        )
        each = [
            f"{percent(row)} {network}, gradient times {number(row, 'factor_per_layer_before')} "
            f"per layer before training (layer 2 to the last: {row['gradient_ratio_before']:.1g})"
            for network, row in tops.items()
        ]
        words.append(f"{activation}: {'; '.join(each)}")
    note = f"each at the best of its rates; {VANISHING} per layer would be {VANISHING**28:.2f}"
    return f"{'. '.join(words)} ({of_seeds(rows)}, {note})", parts


MOVES = {
    "drift": "the median moves less from record to record",
    "drift_per_spread": "beside the spread it moves less",
    "early_drift_per_spread": "beside the spread it moves less in the first fifth",
}


def drift(rows: Rows) -> Found:
    """Medians move less with it: by themselves, and beside the spread, in all and early."""
    words: list[str] = []
    parts: Parts = {}
    for title, a, b in _pairs(rows):
        parts |= {f"{title}: {part}": larger(b, a, column) for column, part in MOVES.items()}
        both = [f"{number(a, column)} and {number(b, column)}" for column in (*MOVES, "shift")]
        words.append(
            f"{title}: {both[0]}, beside the spread {both[1]} (first fifth {both[2]}); from the "
            f"first fifth to the last, unit 1 alone shifts by {both[3]}"
        )
    what = "Moves of the median from record to record, with and without, mean of all units, at"
    return f"{what} {'. '.join(words)} ({of_seeds(rows)})", parts


def faster(rows: Rows) -> Found:
    """It is sooner at GOAL and ends higher, at equal rates and each at its best one."""
    words: list[str] = []
    parts: Parts = {}
    for title, a, b in [*_pairs(rows), *_best_pair(rows)]:
        parts[f"{title}: sooner at {GOAL:.0%}"] = _sooner(a, b)
        parts[f"{title}: higher in the end"] = larger(a, b, "test_accuracy")
        ends = [
            "not by all" if math.isnan(row[STEPS_TO_GOAL]) else number(row, STEPS_TO_GOAL, ",.0f")
            for row in (a, b)
        ]
        words.append(
            f"{title}: first record of {GOAL:.0%} at step {ends[0]} with, {ends[1]} without; in "
            f"the end {percent(a)} and {percent(b)}"
        )
    return f"{'. '.join(words)} ({of_seeds(rows)})", parts


def _sooner(a: Row, b: Row) -> str:
    """A network of which some seeds never reach the goal is later than one of which all do."""
    missing = [math.isnan(row[STEPS_TO_GOAL]) for row in (a, b)]
    if missing[0] != missing[1]:
        return YES if missing[1] else OPPOSITE
    return larger(b, a, STEPS_TO_GOAL)


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


def regularizes(rows: Rows) -> Found:
    """Smaller gaps, higher test accuracy than without and than by other means, alone as beside."""
    words: list[str] = []
    parts: Parts = {}
    for activation in activations(rows):
        its = {"activation": activation}
        none = {n: best(rows, network=n, regularization="none", **its) for n in NETWORKS}
        tops = {n: best(rows, network=n, **its) for n in NETWORKS}
        parts |= {
            f"{activation}: {part}": found
            for part, found in {
                "smaller gap of the accuracy": larger(
                    none["without"], none["with"], "accuracy_gap"
                ),
                "smaller gap of the loss": larger(none["without"], none["with"], "loss_gap"),
                "higher test accuracy": larger(none["with"], none["without"], "test_accuracy"),
                "higher than with the best of the others instead": larger(
                    none["with"], tops["without"], "test_accuracy"
                ),
                "no other regularization adds to it": _adds_nothing(tops["with"], none["with"]),
            }.items()
        }
        gaps = " and ".join(percent(none[n], "accuracy_gap") for n in NETWORKS)
        losses = " and ".join(number(none[n], "loss_gap") for n in NETWORKS)
        tests = " and ".join(f"{percent(none[n])} ({_rate(none[n], rows)})" for n in NETWORKS)
        most = ", ".join(
            f"{percent(r)} {n} ({r['regularization']}, {_rate(r, rows)})" for n, r in tops.items()
        )
        words.append(
            f"{activation}: alone gap {gaps} with and without, in the loss {losses} nats; test "
            f"accuracy {tests}; best of all {most}"
        )
    note = f"{of_seeds(rows)}, each at its best rate by test accuracy"
    return f"{'. '.join(words)} ({note})", parts


def _adds_nothing(top: Row, alone: Row) -> str:
    """A gain that is too small to be clear does not show that there is none."""
    if top is alone:
        return YES
    return NO if larger(top, alone, "test_accuracy") == YES else UNCLEAR


def _rate(row: Row, rows: Rows) -> str:
    """In words, and whether a higher one may be better."""
    tried = {float(r["rate"]) for r in rows if r["activation"] == row["activation"]}
    highest = len(tried) > 1 and float(row["rate"]) == max(tried)
    return f"rate {row['rate']}" + (", the highest tried" if highest else "")


# claim -> the experiments, the claim in words, what judges it
CLAIMS: dict[int, tuple[tuple[str, ...], str, Callable[[Rows], Found]]] = {
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
            measured, parts = judge(rows)
            listed = "; ".join(f"{part}: {found}" for part, found in parts.items())
            row = {"claim": str(claim), "text": text, "measured": measured, "parts": listed}
            found.append(row | {"verdict": verdict(parts)})
    return found
