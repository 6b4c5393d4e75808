"""train_mlp.py, and what it shares with train_cnn.py: results, kill and resume, bad options."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from example_runs import (
    PATIENCE,
    POSIX,
    LongRun,
    contents,
    data,
    evaluations,
    refused,
    rows_of,
    run_folder,
    script,
    start,
    train_mlp,
    trainer,
    training,
)

main = train_mlp.main
SMALL = ["--hidden", "8", "--batch-size", "20", "--eval-every", "4"]  # compiles and runs fast


# --- results ---------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 300 steps on the digits, with all other settings at their defaults."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    argv = ["--steps", "300", "--run-dir", str(folder)]
    assert main(argv) == 0
    return folder, argv


def test_batch_norm_learns_where_the_plain_network_has_barely_begun(finished):
    last = {row["network"]: row for row in rows_of(finished[0])}
    assert last["bn"]["step"] == last["no-bn"]["step"] == "300"
    assert float(last["bn"]["test_accuracy"]) > 0.94
    assert float(last["no-bn"]["test_accuracy"]) < float(last["bn"]["test_accuracy"])
    assert float(last["bn"]["train_loss"]) < 0.2


def test_run_folder_holds_metrics_curves_and_settings(finished):
    folder, _ = finished
    assert [row["step"] for row in rows_of(folder)] == ["100", "100", "200", "200", "300", "300"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "settings.json").read_text())["settings"]["--steps"] == 300


def test_finished_run_prints_its_table_again(finished, capsys):
    folder, argv = finished
    before = (folder / "metrics.csv").read_bytes()
    assert main([*argv, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "After 300 steps" in output and "not reached" in output and "examples/s" in output
    assert (folder / "metrics.csv").read_bytes() == before


def test_no_bn_trains_only_the_plain_network_to_the_same_numbers(finished, tmp_path):
    argv = ["--no-bn", "--steps", "100", "--run-dir", str(tmp_path / "run")]
    assert main(argv) == 0
    (row,) = rows_of(tmp_path / "run")
    assert row == rows_of(finished[0])[1]


def test_bfloat16_computes_in_bfloat16_and_learns(finished, tmp_path):
    argv = ["--dtype", "bfloat16", "--steps", "300", "--run-dir", str(tmp_path / "run")]
    assert main(argv) == 0
    rows = rows_of(tmp_path / "run")
    assert float(rows[-2]["test_accuracy"]) > 0.94
    assert rows[-2]["train_loss"] != rows_of(finished[0])[-2]["train_loss"]

    trained = trainer(train_mlp.SCRIPT, dtype="bfloat16")
    state = trained.states["bn"]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype("float32")}
    x = trained.train_data[0][:8]
    program = str(jax.make_jaxpr(lambda x: state.apply_fn(variables, x, train=False))(x))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 4
    assert all("bf16" in line.split("=")[0] for line in products)


def test_seed_and_activation_matter():
    losses = set()
    for extra in ({}, {"seed": 1}, {"activation": "relu"}):
        short = trainer(train_mlp.SCRIPT, hidden=(8,), steps=4, bn=False, **extra)
        short.advance()
        losses.add(short.log["metrics"][0]["train_loss"])
    assert len(losses) == 3


def test_both_networks_start_with_equal_kernels():
    states = trainer(train_mlp.SCRIPT).states
    for layer, params in states["no-bn"].params.items():
        np.testing.assert_array_equal(params["kernel"], states["bn"].params[layer]["kernel"])


@pytest.mark.parametrize("steps", [2, 7])
def test_every_epoch_sees_every_example_once_in_a_new_order(steps):
    count, batch_size, total = 7, 3, 14
    cut = jax.jit(partial(training.batch_indices, count=count, steps=steps, batch_size=batch_size))
    batches = []
    for first in range(0, total, steps):
        epoch, offset = divmod(first * batch_size, count)
        batches.append(cut(jax.random.key(0), epoch=epoch, offset=offset))
    epochs = np.concatenate(batches).reshape(-1, count)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(count), (6, 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 1


# --- killed, stopped, resumed ----------------------------------------------


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    options = {"hidden": (8,), "batch_size": 20, "eval_every": 4, "steps": 200}
    run = LongRun(train_mlp.SCRIPT, options, tmp_path_factory.mktemp("whole") / "run")
    run.complete()
    return run


@POSIX
def test_killed_run_resumes_to_the_same_bits(long_run, tmp_path):
    moments = [
        lambda folder: (folder / "settings.json").exists(),  # before the first checkpoint or so
        lambda folder: evaluations(folder) >= 10,
    ]
    long_run.kill_at(moments, tmp_path)


@pytest.mark.slow  # of train_multihost.py, by the same code, in every run of the tests
@POSIX
def test_ctrl_c_stops_and_names_the_command_that_resumes(long_run, tmp_path):
    long_run.stop_after_two(tmp_path, "runs/mlp-001")


def small_run(folder, *extra):
    return [*SMALL, "--steps", "8", "--run-dir", str(folder), *extra]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run of 8 steps: its folder, which no test may change."""
    folder = tmp_path_factory.mktemp("small") / "run"
    assert main(small_run(folder)) == 0
    return folder


@pytest.mark.parametrize(
    "extra, difference",
    [
        (["--steps", "12"], "--steps: run folder has 8, command line has 12"),
        (["--hidden", "8", "4"], "--hidden: run folder has 8, command line has 8 4"),
        (["--learning-rate", "0.1"], "--learning-rate: run folder has 0.5, command line has 0.1"),
        (["--no-bn"], "--no-bn: run folder has False, command line has True"),
    ],
)
def test_run_of_other_settings_is_refused(small, capsys, extra, difference):
    before = contents(small)
    assert difference in refused(main, capsys, small_run(small, "--resume", *extra))
    assert contents(small) == before


def test_existing_run_is_not_overwritten(small, capsys):
    before = contents(small)
    message = refused(main, capsys, small_run(small))
    assert "--run-dir" in message and "--resume" in message
    assert contents(small) == before


def test_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "settings.json" in refused(main, capsys, small_run(tmp_path, "--resume"))
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


def test_default_run_folders_are_numbered_and_resume_takes_the_newest(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert "there is no run" in refused(main, capsys, [*SMALL, "--resume"])
    argv = [*SMALL, "--no-bn", "--steps", "4"]
    (tmp_path / "runs" / "mlp-001").mkdir(parents=True)
    assert main(argv) == 0
    assert main([*argv, "--resume"]) == 0
    assert "Run folder: runs/mlp-002\nContinuing from step 4" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["mlp-001", "mlp-002"]


def test_damaged_settings_are_named(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text('{"settings": ')
    assert "settings.json: is damaged" in refused(main, capsys, small_run(folder, "--resume"))


def test_damaged_checkpoint_is_named_and_the_one_before_it_serves(small, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    last = folder / "checkpoints" / "8"
    for path in (last / "states").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refused(main, capsys, small_run(folder, "--resume"))
    assert str(last) in message and "Delete this folder" in message
    shutil.rmtree(last)
    assert main(small_run(folder, "--resume")) == 0
    assert "Continuing from step 4" in capsys.readouterr().out
    assert (folder / "metrics.csv").read_bytes() == (small / "metrics.csv").read_bytes()


@pytest.mark.skipif(run_folder.fcntl is None, reason="needs file locks")
def test_second_process_in_a_run_folder_is_refused(small, capsys):
    settings = train_mlp.Settings(
        hidden=(8,), batch_size=20, eval_every=4, steps=8, run_dir=small, resume=True
    )
    opened = script.open_run(train_mlp.SCRIPT, settings, data.load("digits"))
    try:
        assert "another process" in refused(main, capsys, small_run(small, "--resume"))
    finally:
        opened.close()


def test_other_versions_are_reported(small, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    stored = json.loads((folder / "settings.json").read_text())
    stored["made_with"]["jax"] = "0.0.1"
    (folder / "settings.json").write_text(json.dumps(stored))
    assert main(small_run(folder, "--resume")) == 0
    assert "Note: The run was started with" in (out := capsys.readouterr().out)
    assert "jax 0.0.1" in out


# --- bad options -----------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--data", "cifar"], ["--data cifar", "unknown data set", "openml:NAME"]),
        (["--data", "openml:"], ["unknown data set"]),
        (["--data", "mnist"], ["--data-dir"]),
        (["--data-dir", "."], ["--data-dir", "would not be read"]),
        (["--batch-size", "1348"], ["--batch-size", "1347"]),
        (["--batch-size", "1"], ["--batch-size", "--no-bn"]),
        (["--batch-size", "0", "--no-bn"], ["--batch-size"]),
        (["--steps", "0"], ["--steps"]),
        (["--steps", "many"], ["--steps"]),
        (["--eval-every", "0"], ["--eval-every"]),
        (["--seed", "-1"], ["--seed"]),
        (["--hidden"], ["--hidden"]),
        (["--hidden", "10", "0"], ["--hidden", "10 0"]),
        (["--activation", "step"], ["--activation", "sigmoid"]),
        (["--dtype", "float16"], ["--dtype", "bfloat16"]),
        (["--learning-rate", "0"], ["--learning-rate"]),
        (["--learning-rate", "nan"], ["--learning-rate"]),
        (["--target", "97"], ["--target", "fraction"]),
        (["--wings", "2"], ["--wings"]),
    ],
)
def test_bad_option_is_named_and_leaves_nothing(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    message = refused(main, capsys, argv)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_run_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        message = refused(main, capsys, small_run(folder))
        assert f"--run-dir {folder}: cannot be written" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_checkpoint_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.ocp.CheckpointManager, "save", full)
    message = refused(main, capsys, small_run(tmp_path / "run"))
    assert f"--run-dir {tmp_path / 'run'}" in message and "No space left" in message


def test_bad_option_in_a_process_of_its_own(tmp_path):
    process = start(train_mlp.SCRIPT, ["--data", "mnist", "--data-dir", "nowhere"], tmp_path)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith(f"Error: {Path('nowhere') / 'train-images-idx3-ubyte.gz'}: no such")
    assert len(errors.splitlines()) == 1
