"""The example scripts: results, kill and resume, and messages for bad input."""

import csv
import gzip
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
from functools import partial
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

pytest.importorskip("tyro", reason="the examples' dependencies are an extra")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_mlp.py"
sys.path.insert(0, str(SCRIPT.parent))

import data  # noqa: E402
import run_folder  # noqa: E402
import train_mlp  # noqa: E402
from training import Trainer, batch_indices  # noqa: E402

PATIENCE = 300  # seconds; only a hang takes longer, even on a busy machine
SMALL = ["--hidden", "8", "--batch-size", "20", "--eval-every", "4"]  # compiles and runs fast


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def refused(capsys, argv):
    """The message with which the script refuses a command line."""
    try:
        status = train_mlp.main([str(arg) for arg in argv])
    except SystemExit as end:  # tyro's own errors
        status = end.code
    output = capsys.readouterr()
    assert status == 2, output
    assert "Traceback" not in output.err
    return " ".join(output.err.replace("│", " ").split())


# --- results ---------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 300 steps on the digits, with all other settings at their defaults."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    argv = ["--steps", "300", "--run-dir", str(folder)]
    assert train_mlp.main(argv) == 0
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
    assert train_mlp.main([*argv, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "After 300 steps" in output and "not reached" in output and "examples/s" in output
    assert (folder / "metrics.csv").read_bytes() == before


def test_no_bn_trains_only_the_plain_network_to_the_same_numbers(finished, tmp_path):
    argv = ["--no-bn", "--steps", "100", "--run-dir", str(tmp_path / "run")]
    assert train_mlp.main(argv) == 0
    (row,) = rows_of(tmp_path / "run")
    assert row == rows_of(finished[0])[1]


def test_bfloat16_computes_in_bfloat16_and_learns(finished, tmp_path):
    argv = ["--dtype", "bfloat16", "--steps", "300", "--run-dir", str(tmp_path / "run")]
    assert train_mlp.main(argv) == 0
    rows = rows_of(tmp_path / "run")
    assert float(rows[-2]["test_accuracy"]) > 0.94
    assert rows[-2]["train_loss"] != rows_of(finished[0])[-2]["train_loss"]

    trainer = Trainer(train_mlp.Settings(dtype="bfloat16"), data.load("digits"))
    state = trainer.states["bn"]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype("float32")}
    x = trainer.train_data[0][:8]
    program = str(jax.make_jaxpr(lambda x: state.apply_fn(variables, x, train=False))(x))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 4
    assert all("bf16" in line.split("=")[0] for line in products)


def test_seed_and_activation_matter():
    losses = set()
    for extra in ({}, {"seed": 1}, {"activation": "relu"}):
        settings = train_mlp.Settings(hidden=(8,), steps=4, bn=False, **extra)
        trainer = Trainer(settings, data.load("digits"))
        trainer.advance()
        losses.add(trainer.log["metrics"][0]["train_loss"])
    assert len(losses) == 3


def test_both_networks_start_with_equal_kernels():
    states = Trainer(train_mlp.Settings(), data.load("digits")).states
    for layer, params in states["no-bn"].params.items():
        np.testing.assert_array_equal(params["kernel"], states["bn"].params[layer]["kernel"])


@pytest.mark.parametrize("steps", [2, 7])
def test_every_epoch_sees_every_example_once_in_a_new_order(steps):
    count, batch_size, total = 7, 3, 14
    cut = jax.jit(partial(batch_indices, count=count, steps=steps, batch_size=batch_size))
    batches = []
    for start in range(0, total, steps):
        epoch, offset = divmod(start * batch_size, count)
        batches.append(cut(jax.random.key(0), epoch=epoch, offset=offset))
    epochs = np.concatenate(batches).reshape(-1, count)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(count), (6, 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 1


# --- killed, stopped, resumed ----------------------------------------------


def start(argv, cwd):
    """The script in a process of its own, which sees no more devices than a user's."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = [env["PYTHONPATH"]] if env.get("PYTHONPATH") else []
    env["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT)])
    command = [sys.executable, "-W", "error", str(SCRIPT), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=cwd, **pipes)


def wait_until(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def evaluations(folder):
    return len(rows_of(folder)) if (folder / "metrics.csv").exists() else 0


def finish(process):
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert errors == ""
    return output


# Long enough for each kill to come in time, short enough for the whole.
LONG = [*SMALL, "--steps", "200"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    finish(start([*LONG, "--run-dir", "run"], cwd))
    return cwd / "run"


def states_of(folder):
    """The final training states, and the log apart from times."""
    settings = train_mlp.Settings(
        hidden=(8,), batch_size=20, eval_every=4, steps=200, run_dir=folder, resume=True
    )
    dataset = data.load("digits")
    opened = train_mlp.open_run(settings, dataset)
    states, log = opened.restore(Trainer(settings, dataset).states)
    opened.close()
    del log["seconds"]
    return states, log


def assert_same_run(folder, reference):
    assert (folder / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()
    states, log = states_of(folder)
    reference_states, reference_log = states_of(reference)
    assert log == reference_log
    assert log["step"] == 200
    for name, state in states.items():
        assert state.step == 200
        chex.assert_trees_all_equal(state.params, reference_states[name].params)
        chex.assert_trees_all_equal(state.batch_stats, reference_states[name].batch_stats)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    moments = [
        lambda: (folder / "settings.json").exists(),  # before the first checkpoint, or about then
        lambda: evaluations(folder) >= 10,
    ]
    argv = [*LONG, "--run-dir", "run"]
    for moment in moments:
        process = start(argv, tmp_path)
        wait_until(moment, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert evaluations(folder) < 100  # rows: two for each of 50 evaluations
        argv = [*LONG, "--run-dir", "run", "--resume"]
    assert "Continuing from step" in finish(start(argv, tmp_path))
    assert_same_run(folder, uninterrupted)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_stops_and_names_the_command_that_resumes(uninterrupted, tmp_path):
    process = start(LONG, tmp_path)
    folder = tmp_path / "runs" / "mlp-001"
    wait_until(lambda: evaluations(folder) >= 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in errors
    said, command = errors.splitlines()
    assert said == "Stopped. To continue:"
    python, script, *argv = shlex.split(command)
    assert (python, script) == (sys.executable, str(SCRIPT))
    assert argv == [*LONG, "--run-dir", "runs/mlp-001", "--resume"]
    assert "Continuing from step" in finish(start(argv, tmp_path))
    assert_same_run(folder, uninterrupted)


def small_run(folder, *extra):
    return [*SMALL, "--steps", "8", "--run-dir", str(folder), *extra]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run of 8 steps: its folder, which no test may change."""
    folder = tmp_path_factory.mktemp("small") / "run"
    assert train_mlp.main(small_run(folder)) == 0
    return folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
    assert difference in refused(capsys, small_run(small, "--resume", *extra))
    assert contents(small) == before


def test_existing_run_is_not_overwritten(small, capsys):
    before = contents(small)
    message = refused(capsys, small_run(small))
    assert "--run-dir" in message and "--resume" in message
    assert contents(small) == before


def test_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "settings.json" in refused(capsys, small_run(tmp_path, "--resume"))
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


def test_default_run_folders_are_numbered_and_resume_takes_the_newest(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert "there is no run" in refused(capsys, [*SMALL, "--resume"])
    argv = [*SMALL, "--no-bn", "--steps", "4"]
    (tmp_path / "runs" / "mlp-001").mkdir(parents=True)
    assert train_mlp.main(argv) == 0
    assert train_mlp.main([*argv, "--resume"]) == 0
    assert "Run folder: runs/mlp-002\nContinuing from step 4" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["mlp-001", "mlp-002"]


def test_damaged_settings_are_named(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text('{"settings": ')
    assert "settings.json: is damaged" in refused(capsys, small_run(folder, "--resume"))


def test_damaged_checkpoint_is_named_and_the_one_before_it_serves(small, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    last = folder / "checkpoints" / "8"
    for path in (last / "states").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refused(capsys, small_run(folder, "--resume"))
    assert str(last) in message and "Delete this folder" in message
    shutil.rmtree(last)
    assert train_mlp.main(small_run(folder, "--resume")) == 0
    assert "Continuing from step 4" in capsys.readouterr().out
    assert (folder / "metrics.csv").read_bytes() == (small / "metrics.csv").read_bytes()


@pytest.mark.skipif(run_folder.fcntl is None, reason="needs file locks")
def test_second_process_in_a_run_folder_is_refused(small, capsys):
    settings = train_mlp.Settings(
        hidden=(8,), batch_size=20, eval_every=4, steps=8, run_dir=small, resume=True
    )
    opened = train_mlp.open_run(settings, data.load("digits"))
    try:
        assert "another process" in refused(capsys, small_run(small, "--resume"))
    finally:
        opened.close()


def test_other_versions_are_reported(small, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    stored = json.loads((folder / "settings.json").read_text())
    stored["made_with"]["jax"] = "0.0.1"
    (folder / "settings.json").write_text(json.dumps(stored))
    assert train_mlp.main(small_run(folder, "--resume")) == 0
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
    message = refused(capsys, argv)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_run_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        message = refused(capsys, small_run(folder))
        assert f"--run-dir {folder}: cannot be written" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_checkpoint_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.ocp.CheckpointManager, "save", full)
    message = refused(capsys, small_run(tmp_path / "run"))
    assert f"--run-dir {tmp_path / 'run'}" in message and "No space left" in message


def test_bad_option_in_a_process_of_its_own(tmp_path):
    process = start(["--data", "mnist", "--data-dir", "nowhere"], tmp_path)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith(f"Error: {Path('nowhere') / 'train-images-idx3-ubyte.gz'}: no such")
    assert len(errors.splitlines()) == 1


# --- data ------------------------------------------------------------------

FILES = [
    f"{part}-{what}-ubyte.gz"
    for part in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
]


def idx(values, magic=None):
    """An IDX file of unsigned bytes, gzipped; `magic` overrides the right first number."""
    values = np.asarray(values, np.uint8)
    header = struct.pack(f">{values.ndim + 1}I", magic or 0x800 + values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes())


@pytest.fixture
def tiny_mnist(tmp_path):
    """Four small files in MNIST's format: 40 training and 20 test images of 5 x 4."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 5, 4))
        images[0, 0, :2] = 0, 255
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    return folder


def test_mnist_files_are_read(tiny_mnist):
    dataset = data.load("mnist", tiny_mnist)
    assert dataset.train_images.shape == (40, 20) and dataset.test_images.shape == (20, 20)
    assert dataset.train_images.dtype == np.float32 and dataset.train_labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train_images[0, :2], [0, 1])
    np.testing.assert_array_equal(dataset.test_labels, np.arange(20) % 10)
    assert dataset.classes == 10


def test_mnist_trains_and_its_contents_count_not_its_place(tiny_mnist, tmp_path, capsys):
    argv = [*SMALL, "--steps", "4", "--data", "mnist", "--run-dir", str(tmp_path / "run")]
    assert train_mlp.main([*argv, "--data-dir", str(tiny_mnist)]) == 0
    moved = tiny_mnist.rename(tmp_path / "moved")
    argv = [*argv, "--data-dir", str(moved), "--resume"]
    assert train_mlp.main(argv) == 0
    (moved / FILES[3]).write_bytes(idx(np.zeros(20)))
    assert "contents of the data" in refused(capsys, argv)


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def flip(name):
    def damage(folder):
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        (folder / name).write_bytes(raw)

    return damage


def to_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


BAD_FILES = {
    "missing": (FILES[2], lambda folder: (folder / FILES[2]).unlink(), "no such file"),
    "folder": (FILES[0], to_folder(FILES[0]), "cannot be read"),
    "truncated": (FILES[0], truncate(FILES[0]), "truncated"),
    "empty": (FILES[1], replace(FILES[1], b""), "ends within its header"),
    "not gzip": (FILES[1], replace(FILES[1], b"<html>not found</html>"), "not a valid gzip file"),
    "flipped": (FILES[0], flip(FILES[0]), "gzip"),
    "swapped": (FILES[0], replace(FILES[0], idx(np.zeros(40))), "must begin with"),
    "wrong magic": (FILES[1], replace(FILES[1], idx(np.zeros(40), 2052)), "found 2052"),
    "short header": (FILES[0], replace(FILES[0], gzip.compress(b"\0\0\x08\x03")), "header"),
    "no images": (FILES[0], replace(FILES[0], idx(np.zeros((0, 5, 4)))), "holds no images"),
    "short": (
        FILES[0],
        replace(FILES[0], gzip.compress(struct.pack(">4I", 2051, 40, 5, 4) + bytes(799))),
        "promises 800 bytes",
    ),
    "long": (
        FILES[1],
        replace(FILES[1], gzip.compress(struct.pack(">2I", 2049, 40) + bytes(41))),
        "found 41",
    ),
    "counts": (FILES[1], replace(FILES[1], idx(np.zeros(39))), "39 labels"),
    "labels": (FILES[3], replace(FILES[3], idx(np.full(20, 10))), "0 to 9"),
    "sizes": (FILES[2], replace(FILES[2], idx(np.zeros((20, 4, 4)))), "4 x 4"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_file_is_named_and_leaves_nothing(tiny_mnist, tmp_path, capsys, kind):
    name, damage, words = BAD_FILES[kind]
    damage(tiny_mnist)
    argv = small_run(tmp_path / "run", "--data", "mnist", "--data-dir", str(tiny_mnist))
    message = refused(capsys, argv)
    assert str(tiny_mnist / name) in message
    assert words in message
    assert not (tmp_path / "run").exists()


def test_digits_are_split_the_same_way_each_time():
    first, second = data.load("digits"), data.load("digits")
    assert first.fingerprint() == second.fingerprint()
    assert len(first.train_images) == 1347 and len(first.test_images) == 450
    assert first.train_images.min() == 0 and first.train_images.max() == 1
    share = np.bincount(first.test_labels) / len(first.test_labels)
    np.testing.assert_allclose(share, 0.1, atol=0.005)


class FakeBunch:
    """What scikit-learn's fetch_openml returns."""

    details = {"version": "3"}

    def __init__(self, features, target):
        self.data, self.target = features, target


def openml(monkeypatch, answer):
    def fetch(name, **options):
        assert name == "flowers"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(data.datasets, "fetch_openml", fetch)


def test_openml_features_are_scaled_and_classes_numbered(monkeypatch):
    features = np.stack([np.linspace(-5, 20, 40), np.full(40, 7.0)], 1)
    openml(monkeypatch, FakeBunch(features, np.array(["rose", "iris"] * 20, object)))
    dataset = data.load("openml:flowers")
    assert dataset.name == "openml:flowers version 3"
    assert dataset.classes == 2
    assert dataset.train_images.dtype == np.float32
    np.testing.assert_array_equal(dataset.train_images.min(0), [0, 0])
    np.testing.assert_array_equal(dataset.train_images.max(0), [1, 0])
    assert set(dataset.test_labels) == {0, 1}


NAMES = np.array(["rose", "iris"] * 20, object)
OPENML_ERRORS = {
    "no network": (urllib.error.URLError("Name or service not known"), "Check the network"),
    "no such set": (ValueError("No known data set"), "Check the name"),
    "gone": (urllib.error.HTTPError("", 412, "Precondition", None, None), "Check the name"),
    "text": (FakeBunch(np.full((40, 2), "red", object), NAMES), "not dense numbers"),
    "missing": (FakeBunch(np.full((40, 2), np.nan), NAMES), "missing values"),
    "regression": (FakeBunch(np.zeros((40, 2)), np.arange(40.0)), "no classification problem"),
    "no target": (FakeBunch(np.zeros((40, 2)), None), "no single target"),
    "rare": (FakeBunch(np.zeros((41, 2)), np.append(NAMES, "oak")), "cannot be split"),
}


@pytest.mark.parametrize("kind", OPENML_ERRORS)
def test_openml_data_that_cannot_be_used_is_named(monkeypatch, capsys, tmp_path, kind):
    answer, words = OPENML_ERRORS[kind]
    openml(monkeypatch, answer)
    message = refused(capsys, small_run(tmp_path / "run", "--data", "openml:flowers"))
    assert "--data openml:flowers" in message and words in message
