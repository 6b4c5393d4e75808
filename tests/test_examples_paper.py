"""paper_mnist.py: what a run leaves, diverged networks, resuming, bad options, figures."""

import contextlib
import threading
from pathlib import Path

import example_runs
import jax
import numpy as np
import paper_experiments
import paper_figures
import paper_mnist
import paper_runs
import paper_tables
import paper_trainer
import pytest
import run_folder
from example_runs import contents, refused, rows_of
from paper_runs import CHUNK, FULL, RATES, RECORDS, REGULARIZED, SEEDS, TOO_HIGH

main = paper_mnist.main


@pytest.fixture(scope="module", autouse=True)
def small():
    with paper_runs.small():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all experiments: the folder, which no test may change."""
    folder = tmp_path_factory.mktemp("runs") / "paper"
    assert main(["--seeds", str(SEEDS), "--run-dir", str(folder)]) == 0
    return folder


def test_every_experiment_leaves_its_files(finished):
    for name, experiment in paper_experiments.EXPERIMENTS.items():
        folder = finished / name
        rows = rows_of(folder)
        assert len(rows) == RECORDS * SEEDS * sum(len(g.choices) for g in experiment.groups)
        assert len(rows_of(folder, "summary.csv")) == 6
        assert (folder / "gradients.csv").exists() == (name == "depth")
        assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
        command, versions, _ = (folder / "made_with.txt").read_text().splitlines()
        assert command == (
            f"python examples/paper_mnist.py --experiments {name} --data digits --seeds {SEEDS}"
        )
        assert f"jax {jax.__version__}" in versions
    claims = rows_of(finished, "claims.csv")
    assert list(claims[0]) == ["claim", "text", "measured", "parts", "verdict"]
    assert [row["claim"] for row in claims] == ["1", "5", "6", "7", "8"]
    assert {row["verdict"] for row in claims} <= {"holds", "holds partly", "fails"}
    assert all(f"{SEEDS} seeds, 20 steps" in row["measured"] for row in claims)


def test_diverged_networks_are_reported_and_stop_no_other(finished):
    for row in rows_of(finished / "rates", "summary.csv"):
        lost = SEEDS if row["rate"] == TOO_HIGH else 0
        assert (row["seeds"], row["not_finite"]) == (str(SEEDS), str(lost))
        assert row["diverged"] == str(lost)
    for row in rows_of(finished / "rates"):
        assert np.isfinite(float(row["train_loss"])) == (row["rate"] != TOO_HIGH)
    (claim, *_) = rows_of(finished, "claims.csv")
    assert f"{SEEDS} of {3 * SEEDS} networks without diverged" in claim["measured"]


def test_killed_run_resumes_to_the_same_bytes(finished, tmp_path, monkeypatch, capsys):
    """Each experiment loses its second chunk: trained, but not yet saved."""
    advance = paper_trainer.Trainer.advance

    def killed(trainer):
        advance(trainer)
        trainer.chunks = getattr(trainer, "chunks", 0) + 1
        if trainer.chunks == RECORDS:
            raise KeyboardInterrupt

    monkeypatch.setattr(paper_trainer.Trainer, "advance", killed)
    argv = ["--seeds", str(SEEDS), "--run-dir", str(tmp_path / "paper")]
    assert main(argv) == 130
    for _ in range(len(FULL) - 1):
        assert main([*argv, "--resume"]) == 130
    assert main([*argv, "--resume"]) == 0
    assert capsys.readouterr().out.count(f"continuing from step {CHUNK}\n") == len(FULL)
    files = [path for path in contents(finished) if "checkpoints" not in path.parts]
    assert len([path for path in files if path.suffix == ".csv"]) == 2 * len(FULL) + 2
    for path in files:
        assert (tmp_path / "paper" / path).read_bytes() == (finished / path).read_bytes(), path


def test_ctrl_c_ends_at_a_checkpoint(tmp_path, monkeypatch, capsys):
    event = threading.Event()
    event.set()
    monkeypatch.setattr(example_runs.script, "stop_requests", lambda: contextlib.nullcontext(event))
    folder = str(tmp_path / "paper")
    assert main(["--experiments", "rates", "--seeds", "2", "--run-dir", folder]) == 130
    assert f"--run-dir {folder} --resume" in capsys.readouterr().err


def test_recorded_command_names_no_folder():
    settings = paper_mnist.Settings(data="mnist", data_dir=Path("/data/mine"), scale=0.5)
    command, *_ = paper_mnist.made_with(settings, "depth").splitlines()
    assert command == (
        "python examples/paper_mnist.py --experiments depth --data mnist --data-dir DIR --scale 0.5"
    )


def test_finished_run_is_not_overwritten_nor_mixed(finished, capsys):
    before = contents(finished)
    again = ["--seeds", str(SEEDS), "--run-dir", finished]
    assert "is not empty" in refused(main, capsys, again)
    message = refused(main, capsys, ["--seeds", "3", "--run-dir", finished, "--resume"])
    assert "run folder has 2, command line has 3" in message
    assert contents(finished) == before


def test_tables_of_another_version_are_not_judged(finished, tmp_path):
    summary = (finished / "rates" / "summary.csv").read_text()
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates" / "summary.csv").write_text(summary.replace("trained", "won"))
    with pytest.raises(run_folder.RunFolderError, match=r"no column 'trained', .* Run all .* anew"):
        paper_mnist.judge(tmp_path, console=None)
    assert not (tmp_path / "claims.csv").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--experiments", "rate"], ["--experiments", "rates", "got rate"]),
        (["--experiments", "rates", "rates"], ["--experiments", "only once"]),
        (["--seeds", "0"], ["--seeds", "at least 1"]),
        (["--scale", "0"], ["--scale", "above 0"]),
        (["--scale", "1.5"], ["--scale", "at most 1"]),
        (["--scale", "nan"], ["--scale", "above 0"]),
        (["--data", "cifar10"], ["--data", "digits or mnist"]),
        (["--data", "mnist"], ["--data-dir"]),
        (["--data", "mnist", "--data-dir", "missing"], ["missing", "no such file"]),
        (["--data-dir", "missing"], ["--data-dir", "--data mnist"]),
        (["--resume"], ["--resume", "no run"]),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, argv, words
):
    monkeypatch.chdir(tmp_path)
    message = refused(main, capsys, argv)
    assert all(word in message for word in words), message
    assert not contents(tmp_path)


@pytest.mark.parametrize("name", FULL)
def test_scale_shortens(name):
    full = FULL[name]
    assert full.scaled(1.0) == full
    short = full.scaled(0.01)
    assert 0.005 * full.steps < short.steps < 0.02 * full.steps
    assert short.steps % short.records == 0 and 2 <= short.records < full.records
    assert full.scaled(1e-6).steps == 2


def expected_lines(name, rows, gradients, summary):
    """What the figure must show of the networks with batch normalization, from the tables."""
    of = [row for row in rows if row["network"] == "with"]
    last = [row for row in of if row["step"] == RECORDS * CHUNK]
    steps = sorted({row["step"] for row in rows})
    top = max(
        (row for row in summary if row["network"] == "with"), key=lambda row: row["test_accuracy"]
    )

    def accuracies(rate):
        at = [
            [r["test_accuracy"] for r in of if (r["rate"], r["step"]) == (rate, s)] for s in steps
        ]
        return np.mean(at, 1)

    if name == "rates":
        of_rate = [[r["test_accuracy"] for r in last if r["rate"] == rate] for rate in RATES]
        return [([float(rate) for rate in RATES], np.mean(of_rate, 1))]
    if name == "depth":
        norms = [
            np.mean(
                [
                    [r[f"layer {i}"] for i in (1, 2, 3)]
                    for r in gradients
                    if (r["network"], r["rate"], r["step"]) == ("with", top["rate"], step)
                ],
                0,
            )
            for step in (0, RECORDS * CHUNK)
        ]
        return [((1, 2, 3), norm) for norm in norms] + [(steps, accuracies(top["rate"]))]
    if name in ("curves", "low_rate"):
        shown = [r for r in of if (r["rate"], r["seed"]) == (top["rate"], 0)]
        inputs = [(steps, [r[p] for r in shown]) for p in ("p15", "p50", "p85")]
        return inputs + [(steps, accuracies(rate)) for rate in RATES]
    tests = [100 * np.mean([r["test_accuracy"] for r in last if r["regularization"] == k])
             for k, _ in REGULARIZED]  # fmt: skip
    return [([test], [place - 0.15]) for place, test in enumerate(tests)]


@pytest.mark.parametrize("name", FULL)
def test_figure_shows_the_numbers_of_the_tables(finished, name):
    paths = [finished / name / f for f in ("metrics.csv", "gradients.csv", "summary.csv")]
    tables = [paper_tables.read(path) if path.exists() else [] for path in paths]
    figure = paper_figures.FIGURES[name](*tables, "a title")
    shown = [np.array(line.get_xydata()) for axes in figure.axes for line in axes.lines]
    for line in expected_lines(name, *tables):
        wanted = np.transpose(line)
        assert any(np.shape(s) == wanted.shape and np.allclose(s, wanted) for s in shown), line
    assert all(axes.get_title() or axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)
