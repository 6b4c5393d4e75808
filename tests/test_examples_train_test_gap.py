"""train_test_gap.py: failures that are real, found and mended; its tables; bad options."""

import collections
import shutil

import example_runs
import jax
import numpy as np
import pytest
import scenarios
import train_test_gap
from example_runs import contents, refused, rows_of

main = train_test_gap.main
COMMITTED = example_runs.ROOT / "examples" / "results" / "train_test_gap"
CHOSEN = ["--scenarios", "healthy", "poisoned", "--seeds", "1", "--healthy-seeds", "1"]
# Where evaluation is not the worse mode: both fail, or training mode fails even more.
NO_GAP = ("healthy", "inverted-images", "batch-of-2")
NO_REMEDY = {
    ("single-class", "recalibrate"),
    ("inverted-images", "recalibrate on the new domain"),
    ("batch-of-2", "recalibrate"),
}


@pytest.fixture(scope="module")
def digits():
    return example_runs.data.load("digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two scenarios, one network each: the folder, which no test may change."""
    folder = tmp_path_factory.mktemp("runs") / "gap"
    assert main([*CHOSEN, "--run-dir", str(folder)]) == 0
    return folder


def assert_found_and_mended(rows):
    """What the README's table claims, of every network."""
    for row in rows:
        assert row["first finding"] == row["planted"], row
        before, after = (
            [float(row[mode + suffix] or "nan") for mode in train_test_gap.MODES]
            for suffix in ("", " after")
        )
        if row["scenario"] not in NO_GAP:
            assert before[0] - before[1] > 0.03, row
        if row["remedy"] and (row["scenario"], row["remedy"]) not in NO_REMEDY:
            assert after[0] - after[1] < 0.01, row
            assert after[1] > before[1] + 0.02, row


def test_planted_failure_is_found_and_mended(finished):
    rows = rows_of(finished, "gaps.csv")
    assert [(row["scenario"], row["remedy"]) for row in rows] == [
        ("healthy", ""),
        ("poisoned", "recalibrate"),
    ]
    assert rows[0]["findings"] == "0" and float(rows[0]["evaluation"]) > 0.95
    assert float(rows[1]["training mode"]) - float(rows[1]["evaluation"]) > 0.2
    assert_found_and_mended(rows)


def test_summary_has_means_and_counts():
    before = {"scenario": "lagging", "training mode": 0.9, "first finding": "lagging"}
    after = {"remedy": "recalibrate", "training mode after": 0.9, "evaluation after": 0.92}
    rows = [
        before | after | {"evaluation": 0.5},
        before | after | {"evaluation": 0.7, "first finding": "stale"},
        before | after | {"evaluation": 0.7, "remedy": "train anew"},
    ]
    first, second = train_test_gap.summary(rows)
    assert list(first.values()) == [
        "lagging", "90.0%", "60.0%", "lagging: 1 of 2, stale: 1 of 2",
        "recalibrate", "90.0%", "92.0%",
    ]  # fmt: skip
    assert list(second.values()) == ["", "", "", "", "train anew", "90.0%", "92.0%"]


def test_committed_results_are_found_and_mended():
    rows = rows_of(COMMITTED, "gaps.csv")
    seeds = collections.defaultdict(set)
    for row in rows:
        seeds[row["scenario"]].add(row["seed"])
    assert list(seeds) == list(scenarios.SCENARIOS)
    assert len(seeds.pop("healthy")) >= 20
    assert min(map(len, seeds.values())) >= 5
    assert_found_and_mended(rows)


@pytest.mark.slow  # the same by the committed results, in every run of the tests
def test_every_planted_failure_is_found_and_mended(tmp_path):
    assert main(["--seeds", "1", "--healthy-seeds", "1", "--run-dir", str(tmp_path / "run")]) == 0
    assert_found_and_mended(rows_of(tmp_path / "run", "gaps.csv"))


def test_batches_of_one_class_are_that(digits):
    images, labels = digits[1:3]
    batches = scenarios.of_one_class(images, labels, 0, steps=20, size=40)
    assert (batches.labels == batches.labels[:, :1]).all()
    for half in (batches.labels[:10, 0], batches.labels[10:, 0]):
        np.testing.assert_array_equal(np.sort(half), np.arange(10))
    assert len(np.unique(batches.images[0], axis=0)) == 40


def test_accuracies_are_those_of_either_mode(digits):
    """Against float64, of a network whose statistics are wrong."""
    case = scenarios.SCENARIOS["poisoned"].build(digits, 0)
    variables = jax.tree.map(np.float64, case.variables)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def right(images, labels, statistics):
        h = images
        for i in range(3):
            h = h @ params[f"Dense_{i}"]["kernel"]
            mean, var = statistics(h, i)
            layer = params[f"BatchNorm_{i}"]
            h = np.maximum((h - mean) / np.sqrt(var + 1e-5) * layer["scale"] + layer["bias"], 0)
        logits = h @ params["Dense_3"]["kernel"] + params["Dense_3"]["bias"]
        return logits.argmax(-1) == labels

    def running(h, i):
        return batch_stats[f"BatchNorm_{i}"]["mean"], batch_stats[f"BatchNorm_{i}"]["var"]

    of_batches = [
        right(*batch, lambda h, i: (h.mean(0), h.var(0)))
        for batch in zip(*case.test.batches, strict=True)
    ]
    evaluated = right(case.test.images, case.test.labels, running)
    found = case.test.accuracy(case.model, case.variables)
    np.testing.assert_allclose(found, [np.mean(of_batches), evaluated.mean()], atol=1 / 448)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--scenarios", "poisned"], ["--scenarios", "poisoned", "got poisned"]),
        (["--scenarios", "healthy", "healthy"], ["--scenarios", "only once"]),
        (["--seeds", "0"], ["--seeds", "at least 1"]),
        (["--healthy-seeds", "0"], ["--healthy-seeds", "at least 1"]),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, argv, words
):
    monkeypatch.chdir(tmp_path)
    message = refused(main, capsys, argv)
    assert all(word in message for word in words)
    assert not contents(tmp_path)


def test_existing_run_is_not_overwritten(finished, capsys):
    before = contents(finished)
    assert "is not empty" in refused(main, capsys, ["--run-dir", finished])
    assert contents(finished) == before


def test_killed_run_resumes(finished, tmp_path, monkeypatch):
    """To the same tables; what is recorded is not trained again."""
    folder = tmp_path / "gap"
    shutil.copytree(finished, folder)
    *kept, _ = (folder / "gaps.csv").read_text().splitlines(keepends=True)
    (folder / "gaps.csv").write_text("".join(kept))
    (folder / "summary.csv").unlink()
    healthy = scenarios.SCENARIOS["healthy"]._replace(build=None)
    monkeypatch.setitem(scenarios.SCENARIOS, "healthy", healthy)
    assert main([*CHOSEN, "--run-dir", str(folder), "--resume"]) == 0
    for name in ("gaps.csv", "summary.csv"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
