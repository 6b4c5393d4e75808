"""Verdicts of paper_mnist.py from numbers made by hand, and those of the committed runs."""

import example_runs
import paper_claims
import paper_runs
import paper_tables
import pytest
from paper_runs import FULL

COMMITTED = paper_runs.ROOT / "examples" / "results" / "paper_mnist"


def rates_row(network, rate, trained, lost, accuracy=0.97):
    words = {"activation": "relu", "network": network, "rate": rate}
    numbers = {"seeds": 5.0, "steps": 2000.0, "trained": trained, "diverged": lost}
    return words | numbers | {"test_accuracy": accuracy, "test_accuracy_sd": 0.001}


def depth_row(network, trained, factor=0.9):
    found = {"factor_per_layer_before": factor, "factor_per_layer_before_sd": 0.01}
    return rates_row(network, "0.3", trained, 0) | found | {"gradient_ratio_before": factor**28}


def curves_row(network, rate, accuracy, steps, drift):
    found = {"steps_to_goal": steps, "steps_to_goal_sd": 100.0, "drift": drift, "drift_sd": 0.01}
    for name in ("drift_per_spread", "early_drift_per_spread", "shift"):
        found |= {name: drift, f"{name}_sd": 0.01}
    return rates_row(network, rate, 5, 0, accuracy) | found


def regularize_row(network, name, accuracy, gap):
    words = {"activation": "relu", "network": network, "regularization": name, "rate": "0.1"}
    found = {"seeds": 5.0, "steps": 2500.0, "test_accuracy": accuracy, "test_accuracy_sd": 0.001}
    found |= {"accuracy_gap": gap, "accuracy_gap_sd": 0.001}
    return words | found | {"loss_gap": 10 * gap, "loss_gap_sd": 0.01}


NAN = float("nan")
SOON, AS_GOOD = (
    curves_row("with", "1", 0.98, 1000, 0.1),
    curves_row("without", "1", 0.98, 2000, 0.1),
)
CURVES = {
    "better": [SOON, curves_row("without", "1", 0.97, 2000, 1)],
    "as good": [SOON, AS_GOOD],
    "worse": [curves_row("with", "1", 0.97, NAN, 1), AS_GOOD],
}
WITH = [rates_row("with", "1", 5, 0), rates_row("with", "3", 5, 0)]


@pytest.mark.parametrize(
    "claim, rows, verdict, words",
    [
        (1, [*WITH, rates_row("without", "1", 5, 0), rates_row("without", "3", 0, 5)], "holds",
         "up to rate 3 with, 1 without; above that, 5 of 5 networks without diverged, 0 reached"),
        (1, [*WITH, rates_row("without", "1", 5, 0), rates_row("without", "3", 4, 1)],
         "holds partly", "1 of 5 networks without diverged, 4 reached"),
        (1, [*WITH, rates_row("without", "1", 5, 0), rates_row("without", "3", 5, 0)], "fails",
         "3 without"),
        (5, [depth_row("with", 5), depth_row("without", 0)], "holds", "0.9 ± 0.01 per layer"),
        (5, [depth_row("with", 5), depth_row("without", 1)], "holds partly", "0.05"),
        (5, [depth_row("with", 4), depth_row("without", 5, 1.0)], "fails", "97.00 ± 0.1 %"),
        (6, CURVES["better"], "holds", "at rate 1: 0.1 ± 0.01 and 1 ± 0.01, beside"),
        (6, CURVES["as good"], "fails", "0.1 ± 0.01 and 0.1 ± 0.01"),
        (6, CURVES["worse"], "fails", "1 ± 0.01 and 0.1 ± 0.01"),
        (7, CURVES["better"], "holds", "97% at step 1,000 ± 1e+02 with, 2,000 ± 1e+02 without"),
        (7, CURVES["as good"], "holds partly", "98.00 ± 0.1 % and 98.00"),
        (7, CURVES["worse"], "fails", "not by all with"),
        (8, [regularize_row("with", "none", 0.95, 0.05), regularize_row("with", "L2", 0.95, 0.03),
             regularize_row("without", "none", 0.93, 0.07)], "holds",
         "gap 5.00 ± 0.1 % and 7.00 ± 0.1 %"),
        (8, [regularize_row("with", "none", 0.95, 0.05), regularize_row("with", "L2", 0.96, 0.03),
             regularize_row("without", "none", 0.93, 0.07)], "holds partly", "(L2, rate 0.1)"),
        (8, [regularize_row("with", "none", 0.93, 0.07), regularize_row("with", "L2", 0.94, 0.05),
             regularize_row("without", "none", 0.93, 0.07)], "fails", "93.00"),
    ],
)  # fmt: skip
def test_verdict_follows_from_the_numbers(claim, rows, verdict, words):
    summaries = {paper_claims.CLAIMS[claim][0][0]: rows}
    (row,) = (r for r in paper_claims.claims(summaries) if r["claim"] == str(claim))
    assert row["verdict"] == verdict
    assert words in row["measured"]


@pytest.mark.parametrize(
    "rows, said",
    [("better", "yes"), ("as good", "not clear"), ("worse", "the opposite")],
)
def test_parts_tell_the_opposite_from_what_is_not_clear(rows, said):
    (found,) = (r for r in paper_claims.claims({"curves": CURVES[rows]}) if r["claim"] == "6")
    assert found["parts"].split("; ")[0] == (
        f"rate 1: the median moves less from record to record: {said}"
    )


def test_a_goal_that_a_seed_did_not_reach_has_no_steps():
    """The mean of the others would be that of the better half."""
    record = {"activation": "relu", "network": "with", "rate": "1", "train_loss": 1.0}
    record |= {"drift": 1.0, "spread": 1.0, "p50": 0.0}
    rows = [
        record | {"seed": seed, "step": step, "test_accuracy": 0.98 if seed or step > 1 else 0.5}
        for seed in (0, 1)
        for step in (1, 2)
    ]
    (of_both,) = paper_tables.summary("curves", rows, [])
    assert (of_both["steps_to_goal"], of_both["steps_to_goal_sd"]) == ("1.5", "0.71")
    rows[1]["test_accuracy"] = 0.5
    (of_one,) = paper_tables.summary("curves", rows, [])
    assert (of_one["steps_to_goal"], of_one["steps_to_goal_sd"]) == ("", "")


def test_committed_claims_follow_from_the_committed_runs():
    found = {}
    for name, full in FULL.items():
        folder = COMMITTED / name
        paths = [folder / file for file in ("metrics.csv", "gradients.csv")]
        tables = [paper_tables.read(path) if path.exists() else [] for path in paths]
        summary = paper_tables.summary(name, *tables)
        assert (folder / "summary.csv").read_text() == paper_tables.text(summary)
        found[name] = paper_tables.read(folder / "summary.csv")
        assert min(row["seeds"] for row in found[name]) >= 3
        assert {row["steps"] for row in found[name]} == {full.steps}
        keys = {(g.architecture.activation, g.network, *c) for g in full.groups for c in g.choices}
        assert set(paper_tables.networks([row | {"seed": 0} for row in found[name]])) == keys
    committed = (COMMITTED / "claims.csv").read_text()
    assert committed == paper_tables.text(paper_claims.claims(found))


def test_committed_files_are_small_and_name_no_machine():
    for path, content in example_runs.contents(COMMITTED).items():
        assert len(content) < (150_000 if path.suffix == ".png" else 200_000), path
        if path.suffix != ".png":
            assert b"/work" not in content and b"/home" not in content and b"/tmp" not in content
