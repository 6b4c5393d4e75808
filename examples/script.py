"""From a command line to a finished run: what the training scripts have in common."""

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import command
import data
import jax
import options
import processes
import report
import run_folder
from options import Settings, SettingsError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import Network, Trainer


def _nothing(*args: Any) -> None:
    pass


def _device_words(settings: Settings) -> str:
    device = jax.devices()[0]
    return f"Device: {device.platform} ({device.device_kind}), {settings.dtype}"


def _made_with(settings: Settings) -> dict[str, str]:
    return run_folder.made_with()


def _say_stopped(command: str) -> None:
    print(f"Stopped. To continue:\n  {command}", file=sys.stderr)


class Script(NamedTuple):
    """What one script adds: settings, networks, and words about them.

    `check` looks at the settings alone, `check_data` at the data beside them;
    both raise SettingsError. `begin` comes between them: it meets the other
    processes of the run, or returns an exit status where nothing is left to do.
    `conclude` comes after the table at the end, `stopped` with the command that
    continues the run where it did not come so far, `failed_elsewhere` with what
    another process says.
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
    begin: Callable[[Any, Sequence[str]], int | None] = _nothing
    trainer: Callable[[Any, data.Dataset, dict[str, Network]], Trainer] = Trainer
    side_by_side: bool = True
    device_words: Callable[[Any], str] = _device_words
    made_with: Callable[[Any], dict[str, str]] = _made_with
    conclude: Callable[[Trainer, data.Dataset, run_folder.RunFolder, Console], None] = _nothing
    stopped: Callable[[str], None] = _say_stopped
    failed_elsewhere: Callable[[str], None] = _nothing


def load(script: Script, settings: Settings) -> data.Dataset:
    """The data, which the settings fit."""
    dataset = data.load(settings.data, settings.data_dir)
    options.check_batch(settings, dataset)
    script.check_data(settings, dataset)
    return dataset


def trainer(script: Script, settings: Settings, dataset: data.Dataset) -> Trainer:
    """All networks before training."""
    return script.trainer(settings, dataset, script.networks(settings, dataset))


def run_path(script: Script, settings: Settings) -> Path:
    find = run_folder.newest if settings.resume else run_folder.next_free
    return settings.run_dir or find(script.name)


def open_run(script: Script, settings: Settings, dataset: data.Dataset) -> run_folder.RunFolder:
    decisive, made_with = options.decisive(settings, dataset), script.made_with(settings)
    processes.together(partial(require_same, processes.everyones({**decisive, **made_with})))
    return run_folder.RunFolder(
        Path(processes.on_first(lambda: str(run_path(script, settings)))),
        settings=decisive,
        made_with=made_with,
        resume=settings.resume,
    )


def require_same(settings: list[dict[str, Any]]) -> None:
    """Refuse processes whose runs would not be the same."""
    for index, others in enumerate(settings):
        differing = run_folder.differences(settings[0], others, "process 0", f"process {index}")
        if differing:
            raise SettingsError(
                f"the processes of a run need the same settings, got {differing}. Start all of "
                "them with one command line."
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


def progress_bar(console: Console) -> Progress:
    """Of steps."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def train(trainer: Trainer, folder: run_folder.RunFolder, console: Console) -> bool:
    """Train to the end, with a checkpoint at each evaluation; False if Ctrl-C came first."""
    total, log = trainer.settings.steps, trainer.log
    with stop_requests() as stop, progress_bar(console) as progress:
        bar = progress.add_task("compiling", total=total, completed=log["step"])
        while log["step"] < total and not processes.any_of(stop.is_set()):
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
    examples = dataset.train_images
    with_bn = "with and without" if script.side_by_side else "with"
    lines = [
        script.device_words(settings),
        f"Data: {dataset.name}, {len(examples)} training and {len(dataset.test_images)} test "
        f"examples of {examples.shape[1]} features, {dataset.classes} classes",
        f"Network: {script.network_words(settings)}; "
        f"{with_bn if settings.bn else 'without'} batch normalization",
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
    status = script.begin(settings, argv)
    if status is not None:
        return status
    dataset = processes.together(partial(load, script, settings))
    speaks = processes.first()
    console = Console(quiet=not speaks)
    folder = open_run(script, settings, dataset)
    with contextlib.closing(folder):
        if speaks:
            describe(script, settings, dataset, folder)
        trained = trainer(script, settings, dataset)
        restored = folder.restore(trained.states)
        if restored is not None:
            trained.states, trained.log = restored
            console.print(f"Continuing from step {trained.log['step']}", highlight=False)
        try:
            done = train(trained, folder, console)
            if done:
                end = partial(finish, script, trained, dataset, folder, console)
                processes.together(end if speaks else _nothing)
        except KeyboardInterrupt as error:  # the second Ctrl-C; the last checkpoint is whole
            done = False
            if not processes.shared(error):
                processes.leave_at_once(130)
        if not done and speaks:
            script.stopped(resume_command(script, argv, folder.path))
    return 0 if done else 130


def main(script: Script, argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    settings = command.parse(script.settings, script.description, argv)
    try:
        return run(script, settings, argv)
    except command.ERRORS as error:
        print(f"Error: {error}", file=sys.stderr)
        if not processes.shared(error):
            processes.leave_at_once(2)
        return 2
    except processes.ElsewhereError as error:
        script.failed_elsewhere(str(error))
        return 2
    except KeyboardInterrupt as error:
        print("Stopped before training began.", file=sys.stderr)
        if not processes.shared(error):
            processes.leave_at_once(130)
        return 130
