"""How the tests run the example scripts: in this process, and in one that can be killed."""

import contextlib
import csv
import dataclasses
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import serialization

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

# Here, because only from here on are they found; the tests take them from this module.
import cnn  # noqa: E402
import data  # noqa: E402
import launcher  # noqa: E402
import options  # noqa: E402
import parallel  # noqa: E402
import run_folder  # noqa: E402
import script  # noqa: E402
import train_cnn  # noqa: E402
import train_mlp  # noqa: E402
import train_multihost  # noqa: E402
import training  # noqa: E402

__all__ = [
    "cnn",
    "data",
    "launcher",
    "options",
    "parallel",
    "run_folder",
    "script",
    "train_cnn",
    "train_mlp",
    "train_multihost",
    "training",
]

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
PATIENCE = 300  # seconds; only a hang takes longer, even on a busy machine


def rows_of(folder, name="metrics.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(main, capsys, argv):
    """The message with which a script refuses a command line."""
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as end:  # tyro's own errors
        status = end.code
    output = capsys.readouterr()
    assert status == 2, output
    assert "Traceback" not in output.err
    return " ".join(output.err.replace("│", " ").split())


def trainer(example, **settings):
    """The networks of a script before training, on the digits."""
    return script.trainer(example, example.settings(**settings), data.load("digits"))


# --- in a process of its own -----------------------------------------------


def paths_with_bnjax():
    """PYTHONPATH for processes that import bnjax from here."""
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))


def start(example, argv, cwd):
    """The script in a process of its own, which sees no more devices than a user's."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = paths_with_bnjax()
    command = [sys.executable, "-W", "error", str(example.file), *argv]
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


@dataclasses.dataclass
class LongRun:
    """A run long enough for each kill to come in time, and short enough for the whole.

    `options` are those of the command line, as Settings has them.
    """

    example: script.Script
    options: dict[str, Any]
    reference: Path

    @property
    def argv(self):
        flags = []
        for name, value in self.options.items():
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
        return flags

    def rows(self):
        """How many rows of metrics.csv a finished run has: one for each of two networks."""
        return 2 * self.options["steps"] // self.options["eval_every"]

    def complete(self):
        """Makes the run that is never interrupted."""
        argv = [*self.argv, "--run-dir", self.reference.name]
        finish(start(self.example, argv, self.reference.parent))

    def kill_at(self, moments, cwd):
        """Kills a run at each moment in turn, continuing it in between; then lets it finish."""
        folder = cwd / "run"
        argv = [*self.argv, "--run-dir", "run"]
        for moment in moments:
            process = start(self.example, argv, cwd)
            wait_until(lambda moment=moment: moment(folder), process)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            assert evaluations(folder) < self.rows()
            argv = [*self.argv, "--run-dir", "run", "--resume"]
        assert "Continuing from step" in finish(start(self.example, argv, cwd))
        self.assert_same(folder)

    def stop_after_two(self, cwd, folder):
        """Stops a run without --run-dir by Ctrl-C, and continues it by the command it prints."""
        process = start(self.example, self.argv, cwd)
        wait_until(lambda: evaluations(cwd / folder) >= 2, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert "Traceback" not in errors
        said, command = errors.splitlines()
        assert said == "Stopped. To continue:"
        python, file, *argv = shlex.split(command)
        assert (python, file) == (sys.executable, str(self.example.file))
        assert argv == [*self.argv, "--run-dir", folder, "--resume"]
        assert "Continuing from step" in finish(start(self.example, argv, cwd))
        self.assert_same(cwd / folder)

    def assert_same(self, folder):
        """Its metrics and its last checkpoint are those of the uninterrupted run, to the bits."""
        metrics = (self.reference / "metrics.csv").read_bytes()
        assert (folder / "metrics.csv").read_bytes() == metrics
        states, log = self._last_checkpoint(folder)
        reference, reference_log = self._last_checkpoint(self.reference)
        assert log == reference_log
        assert log["step"] == self.options["steps"]
        chex.assert_trees_all_equal(states, reference)

    def _last_checkpoint(self, folder):
        """All of the training states, and the log apart from times."""
        settings = self.example.settings(**self.options, run_dir=folder, resume=True)
        dataset = data.load("digits")
        opened = script.open_run(self.example, settings, dataset)
        before = script.trainer(self.example, settings, dataset).states
        states, log = opened.restore(before)
        opened.close()
        del log["seconds"]
        # A template that is handed back as it came would compare equal.
        old, new = (serialization.to_state_dict(s) for s in (before, states))
        assert any((_plain(a) != _plain(b)).any() for a, b in _pairs(old, new))
        return jax.tree.map(_plain, new), log


def _plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


# --- several processes ------------------------------------------------------


def at(moment, action):
    """Calls the action in a thread, once the moment has come."""

    def wait():
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if moment():
                action()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def launching():
    """The launcher within this process: what it starts, and what it says."""
    started = []

    class Recorded(launcher.Process):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setenv("PYTHONPATH", paths_with_bnjax())
        patch.setenv("PYTHONWARNINGS", "error")
        patch.setattr(launcher, "Process", Recorded)
        yield started, said
    assert all(process.child.poll() is not None for process in started)
