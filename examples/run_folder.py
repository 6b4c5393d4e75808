"""A run folder: settings, metrics and checkpoints of one training run.

    settings.json   what determines the results; written first
    checkpoints/    orbax checkpoints: all training states and all metrics so far
    metrics.csv     the metrics as a table, written anew after each checkpoint
    curves.png      their plot
    folded.csv      the folded network beside the unfolded one (train_cnn.py)
    gaps.csv, summary.csv    networks with a planted failure (train_test_gap.py)
    claims.csv      verdicts; a folder for each experiment, with further tables (paper_mnist.py)

Every file is replaced atomically, and the checkpoint is the only thing that a
resumed run reads, so the process may be killed at any moment. Of several
processes, the first one checks and writes; all of them read the checkpoints.
"""

import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import processes
from flax import serialization

import bnjax

try:
    import fcntl
except ImportError:  # Windows: two processes in one run folder are not noticed there
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
LOCK, SETTINGS, CHECKPOINTS, METRICS = ".lock", "settings.json", "checkpoints", "metrics.csv"
PATIENCE = 10  # seconds in which a new run folder must be seen by all processes


class RunFolderError(ValueError):
    """The run folder cannot be used; the message says why and what to do."""


def next_free(name: str) -> Path:
    """runs/NAME-001, or the first number above those in use."""
    return RUNS / f"{name}-{max(_numbered(name), default=0) + 1:03d}"


def newest(name: str) -> Path:
    """The numbered run folder of that name with the highest number."""
    numbered = _numbered(name)
    if not numbered:
        raise RunFolderError(
            f"--resume: there is no run {RUNS / name}-NNN to continue. Leave --resume out to "
            "start one, or name a run folder with --run-dir."
        )
    return numbered[max(numbered)]


def _numbered(name: str) -> dict[int, Path]:
    found = {path.name.removeprefix(f"{name}-"): path for path in RUNS.glob(f"{name}-*")}
    return {int(number): path for number, path in found.items() if number.isdecimal()}


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def check(path: Path, *, settings: dict[str, Any], made_with: dict[str, str], resume: bool) -> str:
    """Refuse a folder where a run would lose or mix results; changes nothing.

    Arguments, errors: see RunFolder. Returns a note for the user, or nothing.
    """
    _check_contents(path, resume)
    return _compare(path, settings, made_with)


class RunFolder:
    """Opens a run folder for one run; refuses it where that would lose or mix results.

    Args:
      path: the folder; created if missing.
      settings: option name -> value, for all that determines the results.
      made_with: versions and device, compared only to tell the user.
      resume: continue the run in the folder; otherwise the folder must be empty.

    Raises:
      RunFolderError: with a message for the user.
    """

    def __init__(
        self, path: Path, *, settings: dict[str, Any], made_with: dict[str, str], resume: bool
    ) -> None:
        self.path = path
        with contextlib.ExitStack() as stack:
            claim = partial(self._claim, stack, settings, made_with, resume)
            self.note: str = processes.on_first(claim)
            processes.together(self._see)
            self._manager = self._open(stack)
            self.close = stack.pop_all().close

    def _claim(
        self,
        stack: contextlib.ExitStack,
        settings: dict[str, Any],
        made_with: dict[str, str],
        resume: bool,
    ) -> str:
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            _check_contents(self.path, resume)
            stack.enter_context(_take_lock(self.path))
            note = _compare(self.path, settings, made_with)
            if not (self.path / SETTINGS).exists():
                content = json.dumps({"settings": settings, "made_with": made_with}, indent=2)
                write_atomically(self.path / SETTINGS, f"{content}\n".encode())
            return note

    def _see(self) -> None:
        # Network file systems may show a new file some seconds later.
        deadline = time.monotonic() + PATIENCE
        while not (self.path / SETTINGS).exists():
            if time.monotonic() > deadline:
                raise RunFolderError(
                    f"--run-dir {self.path}: is another folder here than in the first process. "
                    "Name one on a file system that all processes share."
                )
            time.sleep(0.1)

    def _open(self, stack: contextlib.ExitStack) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        with _writing(self.path):
            manager = ocp.CheckpointManager((self.path / CHECKPOINTS).resolve(), options=options)
        stack.callback(manager.close)
        return manager

    def restore(self, states: Any) -> tuple[Any, dict[str, Any]] | None:
        """The states and the log of the last checkpoint, or None before the first.

        `states` is a tree of the same structure, which tells shapes and devices.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        template = serialization.to_state_dict(states)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    states=ocp.args.StandardRestore(template), log=ocp.args.JsonRestore()
                ),
            )
            if restored["log"]["step"] != step:
                raise ValueError(f"it is of step {restored['log']['step']}")
            return serialization.from_state_dict(states, restored["states"]), restored["log"]
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            if _is_loss(error):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            folder = self.path / CHECKPOINTS / str(step)
            raise RunFolderError(
                f"{folder}: the checkpoint is damaged ({reason[0][:200]}). Delete this folder to "
                "continue from the checkpoint before it, or start anew with another --run-dir."
            ) from None

    def save(self, states: Any, log: dict[str, Any]) -> None:
        """Write a checkpoint of step log["step"], then the metrics in log["metrics"]."""
        try:
            saved = self._manager.save(
                log["step"],
                args=ocp.args.Composite(
                    states=ocp.args.StandardSave(serialization.to_state_dict(states)),
                    log=ocp.args.JsonSave(log),
                ),
            )
            if not saved:
                raise ValueError("orbax declined the checkpoint")
            self.write_table(METRICS, log["metrics"])
        except Exception as error:  # a full disk reaches us as one of many kinds
            if _is_loss(error):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RunFolderError(
                f"--run-dir {self.path}: step {log['step']} could not be saved "
                f"({reason[0][:200]}). Make room or mend the folder, then repeat the command with "
                "--resume."
            ) from None

    def write_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """A CSV file in the folder."""
        if not processes.first():
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / name, table.getvalue().encode())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"--run-dir {path}: cannot be written ({error.strerror or error}). "
            "Choose another folder with --run-dir."
        ) from None


def _check_contents(folder: Path, resume: bool) -> None:
    """A run starts in an empty folder and resumes in a run's folder; nothing else goes."""
    # A run killed before it wrote its settings leaves at most these.
    names = {p.name for p in folder.iterdir()} - {LOCK, f".{SETTINGS}.tmp"}
    if names and not resume:
        raise RunFolderError(
            f"--run-dir {folder}: is not empty. Add --resume to continue the run in it, "
            "or choose another folder with --run-dir."
        )
    if names and SETTINGS not in names:
        raise RunFolderError(
            f"--run-dir {folder}: is not a run folder: it has files, but no {SETTINGS}. "
            "Choose another folder with --run-dir."
        )


@contextlib.contextmanager
def _take_lock(folder: Path) -> Iterator[None]:
    # The system gives the lock back when a process ends, however it ends.
    with open(folder / LOCK, "w") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"--run-dir {folder}: another process is training in it. Wait for it to "
                "end, or choose another folder with --run-dir."
            ) from None
        except OSError:
            pass  # some network file systems have no locks; a run needs none
        yield


def _compare(folder: Path, settings: dict[str, Any], made_with: dict[str, str]) -> str:
    """Refuse other settings than the folder's, if it has any; note other versions."""
    path = folder / SETTINGS
    if not path.exists():
        return ""
    try:
        stored = json.loads(path.read_bytes())
        old, old_made_with = dict(stored["settings"]), dict(stored["made_with"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path}: is damaged ({type(error).__name__}: {error}). Start anew with another "
            "--run-dir."
        ) from None
    new = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    differing = differences(old, new, "run folder", "command line")
    if differing:
        raise RunFolderError(
            f"--run-dir {folder}: belongs to a run with other settings: {differing}. Repeat its "
            "settings, or choose another --run-dir."
        )
    if old_made_with == made_with:
        return ""
    return (
        f"The run was started with {_words(old_made_with)}, and continues with "
        f"{_words(made_with)}: the results may differ in their last bits."
    )


def differences(old: dict[str, Any], new: dict[str, Any], whose: str, other: str) -> str:
    """Which settings differ, and what either side has; nothing where they agree."""
    return "; ".join(
        f"{name}: {whose} has {_show(old, name)}, {other} has {_show(new, name)}"
        for name in {**new, **old}
        if name not in old or name not in new or old[name] != new[name]
    )


def _is_loss(error: Exception) -> bool:
    """Whether another process was lost, as far as can be told; the folder is not to blame."""
    return processes.count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)


def _show(settings: dict[str, Any], name: str) -> str:
    value = settings.get(name, "no such setting")
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _words(made_with: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in made_with.items())


def made_with() -> dict[str, str]:
    """What, besides the settings, decides about the last bits."""
    return {
        "bnjax": bnjax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
