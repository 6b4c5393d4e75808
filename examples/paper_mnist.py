"""The claims about batch normalization that need long training, measured with many seeds.

Experiments on fully connected networks of the kind in Ioffe and Szegedy (2015):

    rates        test accuracy over learning rates from 0.01 to 100
    depth        30 sigmoid or tanh layers, and the norm of each layer's gradient
    curves       50,000 steps of the paper's network; percentiles of a sigmoid's inputs
    low_rate     the same at a learning rate that is too low without it
    regularize   1,000 training examples; with dropout, L2 and L1

One compiled program trains all seeds and all learning rates of a network. Results go to
a run folder (runs/paper-001 and so on), a folder for each experiment: metrics.csv,
summary.csv, figure.png and checkpoints; claims.csv has what they say about each claim. A
run that was stopped or killed at any moment continues with --resume, to the same bits.
"""

import contextlib
import dataclasses
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import command
import data
import paper_claims
import paper_figures
import paper_tables
import paper_training
import run_folder
import script
from options import SettingsError, check_names
from paper_experiments import EXPERIMENTS
from paper_trainer import Trainer
from rich.console import Console

GRADIENTS, SUMMARY, FIGURE = "gradients.csv", "summary.csv", "figure.png"
CLAIMS, MADE_WITH = "claims.csv", "made_with.txt"


@dataclasses.dataclass(frozen=True)
class Settings:
    experiments: tuple[str, ...] = tuple(EXPERIMENTS)
    """Which of rates, depth, curves, low_rate, regularize."""
    data: str = "digits"
    """digits (comes with scikit-learn), or mnist (with --data-dir)."""
    data_dir: Path | None = None
    """Folder of MNIST's four gzipped IDX files."""
    seeds: int = 5
    """Networks of each kind, which differ in initial weights and the order of the examples."""
    scale: float = 1.0
    """Factor on the steps of all experiments, for a trial: 0.01 takes a hundredth of them."""
    run_dir: Path | None = None
    """Run folder. Default: the next free runs/paper-NNN; with --resume, the newest one."""
    resume: bool = False
    """Continue the run in the run folder, with the same settings; experiments that it does not
    have yet are begun."""


def check(settings: Settings) -> None:
    """Refuse values that cannot work, before anything is read or written."""
    check_names("--experiments", settings.experiments, EXPERIMENTS)
    if settings.data not in ("digits", "mnist"):
        raise SettingsError(f"--data: must be digits or mnist, got {settings.data}.")
    if not 1 <= settings.seeds < 2**31:
        raise SettingsError(f"--seeds: must be at least 1, got {settings.seeds}.")
    if not 0 < settings.scale <= 1:
        raise SettingsError(
            f"--scale: must be above 0 and at most 1, got {settings.scale:g}. Write for example "
            "--scale 0.01."
        )


def check_data(settings: Settings, dataset: data.Dataset) -> None:
    count = len(dataset.train_labels)
    needed = [
        EXPERIMENTS[name].examples or paper_training.BATCH_SIZE for name in settings.experiments
    ]
    if count < max(needed):
        raise SettingsError(
            f"--data: {dataset.name} has {count} training examples, and {max(needed)} are needed. "
            "Use --data digits."
        )


def open_folder(
    settings: Settings, dataset: data.Dataset, name: str, parent: Path
) -> run_folder.RunFolder:
    """That of one experiment, which may run beside the others in a process of its own."""
    decisive = {
        "--data": settings.data,
        "--seeds": settings.seeds,
        "--scale": settings.scale,
        **EXPERIMENTS[name].scaled(settings.scale).decisive(),
        "contents of the data (SHA-256)": dataset.fingerprint(),
    }
    return run_folder.RunFolder(
        parent / name, settings=decisive, made_with=run_folder.made_with(), resume=settings.resume
    )


def made_with(settings: Settings, name: str) -> str:
    """The command, versions and kind of hardware; nothing that names a machine or a folder."""
    command = ["python", "examples/paper_mnist.py", "--experiments", name]
    command += ["--data", settings.data, *(["--data-dir", "DIR"] if settings.data_dir else [])]
    for option, value in (("seeds", settings.seeds), ("scale", settings.scale)):
        if value != Settings.__dataclass_fields__[option].default:
            command += [f"--{option}", f"{value:g}"]
    packages = ", ".join(f"{p} {metadata.version(p)}" for p in ("jaxlib", "numpy", "optax"))
    own = ", ".join(f"{key} {value}" for key, value in run_folder.made_with().items())
    hardware = f"{platform.machine()}, {os.cpu_count()} cores"
    return (
        f"{shlex.join(command)}\n"
        f"Python {platform.python_version()}, {own}; {packages}\n{hardware}\n"
    )


def train(trainer: Trainer, name: str, folder: run_folder.RunFolder, console: Console) -> bool:
    """Train to the end, with a checkpoint at each record; False if Ctrl-C came first."""
    total, log = trainer.experiment.steps, trainer.log
    with script.stop_requests() as stop, script.progress_bar(console) as progress:
        bar = progress.add_task(name, total=total, completed=log["step"])
        while log["step"] < total and not stop.is_set():
            trainer.advance()
            folder.save((trainer.states, trainer.medians), log)
            progress.update(bar, completed=log["step"])
    return log["step"] == total


def conclude(
    name: str, dataset: data.Dataset, log: dict[str, Any], folder: run_folder.RunFolder
) -> None:
    """The tables, and the figure from the numbers in them."""
    folder.write_table(run_folder.METRICS, log["metrics"])
    rows, gradients = paper_tables.read(folder.path / run_folder.METRICS), []
    if log["gradients"]:
        folder.write_table(GRADIENTS, log["gradients"])
        gradients = paper_tables.read(folder.path / GRADIENTS)
    folder.write_table(SUMMARY, paper_tables.summary(name, rows, gradients))
    summary = paper_tables.read(folder.path / SUMMARY)
    title = paper_figures.title(name, dataset, rows)
    figure = paper_figures.FIGURES[name](rows, gradients, summary, title)
    run_folder.write_atomically(folder.path / FIGURE, paper_figures.png(figure))


def judge(parent: Path, console: Console) -> None:
    """claims.csv from the summaries of all experiments in the run folder."""
    paths = {name: parent / name / SUMMARY for name in EXPERIMENTS}
    summaries = {name: paper_tables.read(path) for name, path in paths.items() if path.exists()}
    try:
        rows = paper_claims.claims(summaries)
    except KeyError as error:
        raise run_folder.RunFolderError(
            f"{parent}: a {SUMMARY} has no column {error}, so it was made by another version of "
            f"this script. Run all experiments anew, in another folder."
        ) from None
    run_folder.write_atomically(parent / CLAIMS, paper_tables.text(rows).encode())
    for row in rows:
        words = f"{row['claim']}. {row['text']}: {row['verdict']}\n{row['measured']}\n"
        console.print(words, markup=False, highlight=False)
    print(f"Claims: {parent / CLAIMS}")


def experiment(
    settings: Settings, dataset: data.Dataset, name: str, parent: Path, console: Console
) -> bool:
    """Run one; False if it was stopped."""
    folder = open_folder(settings, dataset, name, parent)
    with contextlib.closing(folder):
        if folder.note:
            print(f"Note: {folder.note}")
        trainer = Trainer(EXPERIMENTS[name].scaled(settings.scale), dataset, settings.seeds)
        restored = folder.restore((trainer.states, trainer.medians))
        if restored is not None:
            (trainer.states, trainer.medians), trainer.log = restored
            print(f"{name}: continuing from step {trainer.log['step']}", flush=True)
        else:
            note = made_with(settings, name)
            run_folder.write_atomically(folder.path / MADE_WITH, note.encode())
        if not train(trainer, name, folder, console):
            return False
        conclude(name, dataset, trainer.log, folder)
    return True


def run(settings: Settings) -> int:
    check(settings)
    dataset = data.load(settings.data, settings.data_dir)
    check_data(settings, dataset)
    find = run_folder.newest if settings.resume else run_folder.next_free
    parent = settings.run_dir or find("paper")
    console = Console()
    print(f"Run folder: {parent}", flush=True)
    for name in settings.experiments:
        if not experiment(settings, dataset, name, parent, console):
            print("Stopped. To continue, add to the command:", file=sys.stderr)
            print(f"  {shlex.join(['--run-dir', str(parent), '--resume'])}", file=sys.stderr)
            return 130
    judge(parent, console)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; returns the exit status."""
    stopped = "Stopped. What has a checkpoint continues with --resume."
    return command.run(run, Settings, __doc__, argv, stopped)


if __name__ == "__main__":
    sys.exit(main())
