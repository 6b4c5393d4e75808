"""From a command line to a finished run: what the training scripts have in common."""

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import data
import jax
import options
import report
import run_folder
import tyro
from options import Settings, SettingsError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import Network, Trainer


def _nothing(*args: Any) -> None:
    pass


class Script(NamedTuple):
    """What one script adds: settings, networks, and words about them.

    `check` looks at the settings alone, `check_data` at the data beside them;
    both raise SettingsError. `conclude` comes after the table at the end.
    """

    name: str
    file: Path
    description: str | None
    settings: Callable[..., Settings]
    networks: Callable[[Any, data.Dataset], dict[str, Network]]
    check: Callable[[Any], None]
    title: Callable[[Any], str]
    network_words: Callable[[Any], str]
    optimizer_words: Callable[[Any], str]
    check_data: Callable[[Any, data.Dataset], None] = _nothing
    conclude: Callable[[Trainer, data.Dataset, run_folder.RunFolder, Console], None] = _nothing


def trainer(script: Script, settings: Settings, dataset: data.Dataset) -> Trainer:
    """All networks before training."""
    return Trainer(settings, dataset, script.networks(settings, dataset))


def open_run(script: Script, settings: Settings, dataset: data.Dataset) -> run_folder.RunFolder:
    find = run_folder.newest if settings.resume else run_folder.next_free
    return run_folder.RunFolder(
        settings.run_dir or find(script.name),
        settings=options.decisive(settings, dataset),
        made_with=run_folder.made_with(),
        resume=settings.resume,
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
    script: Script,
    trainer: Trainer,
    dataset: data.Dataset,
    folder: run_folder.RunFolder,
    console: Console,
) -> None:
    settings, rows = trainer.settings, trainer.log["metrics"]
    title = (
        f"{dataset.name}: {script.title(settings)}, batch {settings.batch_size}, "
        f"learning rate {settings.learning_rate:g}"
    )
    if settings.dtype != "float32":
        title += f", {settings.dtype}"
    folder.write_table(run_folder.METRICS, rows)
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
    script.conclude(trainer, dataset, folder, console)


def resume_command(script: Script, argv: Sequence[str], folder: Path) -> str:
    """The command line that continues this run."""
    file = script.file
    with contextlib.suppress(ValueError):
        file = file.relative_to(Path.cwd())
    arguments = [*argv]
    if not any(arg.replace("_", "-").startswith("--run-dir") for arg in argv):
        arguments += ["--run-dir", str(folder)]
    if "--resume" not in argv:
        arguments += ["--resume"]
    return shlex.join([sys.executable, str(file), *arguments])


def describe(
    script: Script, settings: Settings, dataset: data.Dataset, folder: run_folder.RunFolder
) -> None:
    device, examples = jax.devices()[0], dataset.train_images
    lines = [
        f"Device: {device.platform} ({device.device_kind}), {settings.dtype}",
        f"Data: {dataset.name}, {len(examples)} training and {len(dataset.test_images)} test "
        f"examples of {examples.shape[1]} features, {dataset.classes} classes",
        f"Network: {script.network_words(settings)}; "
        f"{'with and without' if settings.bn else 'without'} batch normalization",
        f"Training: {settings.steps} steps of batch {settings.batch_size}, "
        f"{script.optimizer_words(settings)}, seed {settings.seed}",
        f"Run folder: {folder.path}",
    ]
    if folder.note:
        lines.append(f"Note: {folder.note}")
    # At once, so that the run folder is known even if the process is killed.
    print("\n".join(lines), flush=True)


def run(script: Script, settings: Settings, argv: Sequence[str]) -> int:
    script.check(settings)
    options.check(settings)
    dataset = data.load(settings.data, settings.data_dir)
    options.check_batch(settings, dataset)
    script.check_data(settings, dataset)
    console = Console()
    folder = open_run(script, settings, dataset)
    with contextlib.closing(folder):
        describe(script, settings, dataset, folder)
        trained = trainer(script, settings, dataset)
        restored = folder.restore(trained.states)
        if restored is not None:
            trained.states, trained.log = restored
            print(f"Continuing from step {trained.log['step']}")
        try:
            done = train(trained, folder, console)
            if done:
                finish(script, trained, dataset, folder, console)
        except KeyboardInterrupt:  # the second Ctrl-C; the last checkpoint is whole
            done = False
        if not done:
            print("Stopped. To continue:", file=sys.stderr)
            print(f"  {resume_command(script, argv, folder.path)}", file=sys.stderr)
    return 0 if done else 130


def main(script: Script, argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax reports each file that it writes
    config = (tyro.conf.FlagCreatePairsOff,)
    settings = tyro.cli(
        script.settings, args=list(argv), description=script.description, config=config
    )
    try:
        return run(script, settings, argv)
    except (SettingsError, data.DataError, run_folder.RunFolderError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped before training began.", file=sys.stderr)
        return 130
