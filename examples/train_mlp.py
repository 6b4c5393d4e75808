"""Train a small MLP with and without batch normalization, side by side.

The defaults are the first experiment of Ioffe and Szegedy (2015), "Batch
Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", in small: three sigmoid layers of 100 units, small Gaussian
initial weights, batches of 60, plain SGD. Both networks start from the same
weights and see the same batches. Results go to a run folder (runs/mlp-001 and
so on): metrics.csv, curves.png and checkpoints. A run that was stopped or
killed at any moment continues with --resume, to the same bits.
"""

import contextlib
import dataclasses
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import absl.logging
import data
import jax
import report
import run_folder
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import Trainer

# They choose where and how a run is carried out, and leave its results alone. Of the data, the
# contents count, not their place.
NOT_RESULTS = {"data_dir", "run_dir", "resume", "target"}


class SettingsError(ValueError):
    """An option has a value that cannot work; the message names it and the fix."""


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str = "digits"
    """digits (comes with scikit-learn), mnist (with --data-dir), or openml:NAME (downloads)."""
    data_dir: Path | None = None
    """Folder of MNIST's four gzipped IDX files; for openml, the folder that caches downloads."""
    hidden: tuple[int, ...] = (100, 100, 100)
    """Units of each hidden layer."""
    activation: Literal["sigmoid", "tanh", "relu", "gelu"] = "sigmoid"
    """Nonlinearity of the hidden layers."""
    learning_rate: float = 0.5
    """Step size of plain SGD."""
    batch_size: int = 60
    """Examples in each step."""
    steps: int = 2000
    """Training steps of each network."""
    bn: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """With --no-bn, only the network without batch normalization is trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the layers compute in; parameters and running statistics are always float32."""
    seed: int = 0
    """Decides the initial weights and the order of the examples."""
    eval_every: int = 100
    """Steps between evaluations; a checkpoint is written at each, and they run as one call."""
    target: float = 0.97
    """Test accuracy for the column "steps to" of the table, as a fraction."""
    run_dir: Path | None = None
    """Run folder. Default: the next free runs/mlp-NNN, with --resume the newest of them."""
    resume: bool = False
    """Continue the run in the run folder, with the same settings."""


def check(settings: Settings) -> None:
    """Refuse values that cannot work, before anything is read or written."""
    at_least = {"--batch-size": 1, "--steps": 1, "--eval-every": 1, "--seed": 0}
    for option, low in at_least.items():
        value = getattr(settings, option[2:].replace("-", "_"))
        if not low <= value < 2**31:
            raise SettingsError(
                f"{option}: must be at least {low} and below 2**31, got {value}. Change {option}."
            )
    if not settings.hidden or min(settings.hidden) < 1:
        got = " ".join(map(str, settings.hidden)) or "nothing"
        raise SettingsError(
            f"--hidden: needs one or more sizes of at least 1, got {got}. "
            "Write for example --hidden 100 100."
        )
    if not 0 < settings.learning_rate < float("inf"):
        raise SettingsError(
            f"--learning-rate: must be positive and finite, got {settings.learning_rate}. "
            "Write for example --learning-rate 0.1."
        )
    if not 0 < settings.target <= 1:
        raise SettingsError(
            f"--target: must be a fraction above 0 and at most 1, got {settings.target}. "
            "Write for example --target 0.97."
        )
    if settings.bn and settings.batch_size < 2:
        raise SettingsError(
            "--batch-size: batch normalization needs at least 2 examples, got 1. "
            "Raise --batch-size, or train without it (--no-bn)."
        )


def check_batch(settings: Settings, dataset: data.Dataset) -> None:
    count = len(dataset.train_labels)
    if settings.batch_size > count:
        raise SettingsError(
            f"--batch-size: {settings.batch_size} is more than the {count} training examples of "
            f"{dataset.name}. Use at most {count}."
        )


def open_run(settings: Settings, dataset: data.Dataset) -> run_folder.RunFolder:
    path = settings.run_dir or (run_folder.newest() if settings.resume else run_folder.next_free())
    compared = {
        f"--{name.replace('_', '-')}": value
        for name, value in dataclasses.asdict(settings).items()
        if name not in NOT_RESULTS
    }
    # A command line has --no-bn or nothing.
    compared["--no-bn"] = not compared.pop("--bn")
    compared["contents of the data (SHA-256)"] = dataset.fingerprint()
    return run_folder.RunFolder(
        path, settings=compared, made_with=run_folder.made_with(), resume=settings.resume
    )


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can receive signals
        return

    def handle(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def train(trainer: Trainer, folder: run_folder.RunFolder, console: Console) -> bool:
    """Train to the end, with a checkpoint at each evaluation; False if Ctrl-C came first."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    total, log = trainer.settings.steps, trainer.log
    with stop_requests() as stop, Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=total, completed=log["step"])
        while log["step"] < total and not stop.is_set():
            trainer.advance()
            folder.save(trainer.states, log)
            accuracies = [
                f"{row['network']} {row['test_accuracy']:.1%}"
                for row in log["metrics"][-len(trainer.states) :]
            ]
            progress.update(bar, completed=log["step"], description=" | ".join(accuracies))
    return log["step"] == total


def finish(
    trainer: Trainer, dataset: data.Dataset, folder: run_folder.RunFolder, console: Console
) -> None:
    settings, rows = trainer.settings, trainer.log["metrics"]
    layers = "-".join(map(str, settings.hidden))
    title = (
        f"{dataset.name}: MLP {layers}, {settings.activation}, batch {settings.batch_size}, "
        f"learning rate {settings.learning_rate:g}"
    )
    if settings.dtype != "float32":
        title += f", {settings.dtype}"
    folder.write_metrics(rows)
    picture = folder.path / "curves.png"
    run_folder.write_atomically(picture, report.curves(rows, title=title, target=settings.target))
    rates = trainer.examples_per_second()
    console.print(report.table(rows, target=settings.target, examples_per_second=rates))
    for network, step in report.not_finite(rows).items():
        print(
            f"Note: the loss {report.LABELS[network]} was not finite at step {step}. "
            "Lower --learning-rate."
        )
    print(f"Metrics: {folder.path / run_folder.METRICS}\nCurves: {picture}")


def resume_command(argv: Sequence[str], folder: Path) -> str:
    """The command line that continues this run."""
    script = Path(__file__)
    with contextlib.suppress(ValueError):
        script = script.relative_to(Path.cwd())
    arguments = [*argv]
    if not any(arg.replace("_", "-").startswith("--run-dir") for arg in argv):
        arguments += ["--run-dir", str(folder)]
    if "--resume" not in argv:
        arguments += ["--resume"]
    return shlex.join([sys.executable, str(script), *arguments])


def describe(settings: Settings, dataset: data.Dataset, folder: run_folder.RunFolder) -> None:
    device, examples = jax.devices()[0], dataset.train_images
    lines = [
        f"Device: {device.platform} ({device.device_kind}), {settings.dtype}",
        f"Data: {dataset.name}, {len(examples)} training and {len(dataset.test_images)} test "
        f"examples of {examples.shape[1]} features, {dataset.classes} classes",
        f"Network: hidden layers {' '.join(map(str, settings.hidden))}, {settings.activation}; "
        f"{'with and without' if settings.bn else 'without'} batch normalization",
        f"Training: {settings.steps} steps of batch {settings.batch_size}, SGD with learning "
        f"rate {settings.learning_rate:g}, seed {settings.seed}",
        f"Run folder: {folder.path}",
    ]
    if folder.note:
        lines.append(f"Note: {folder.note}")
    # At once, so that the run folder is known even if the process is killed.
    print("\n".join(lines), flush=True)


def run(settings: Settings, argv: Sequence[str]) -> int:
    check(settings)
    dataset = data.load(settings.data, settings.data_dir)
    check_batch(settings, dataset)
    console = Console()
    folder = open_run(settings, dataset)
    with contextlib.closing(folder):
        describe(settings, dataset, folder)
        trainer = Trainer(settings, dataset)
        restored = folder.restore(trainer.states)
        if restored is not None:
            trainer.states, trainer.log = restored
            print(f"Continuing from step {trainer.log['step']}")
        try:
            done = train(trainer, folder, console)
            if done:
                finish(trainer, dataset, folder, console)
        except KeyboardInterrupt:  # the second Ctrl-C; the last checkpoint is whole
            done = False
        if not done:
            print("Stopped. To continue:", file=sys.stderr)
            print(f"  {resume_command(argv, folder.path)}", file=sys.stderr)
    return 0 if done else 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax reports each file that it writes
    config = (tyro.conf.FlagCreatePairsOff,)
    settings = tyro.cli(Settings, args=list(argv), description=__doc__, config=config)
    try:
        return run(settings, argv)
    except (SettingsError, data.DataError, run_folder.RunFolderError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped before training began.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
