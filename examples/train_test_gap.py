"""Produce each failure of the gap between training and evaluation, diagnose it, mend it.

Small networks are trained on scikit-learn's digits, each with one failure planted: see
scenarios.py. For each: the test accuracy with the moments of test batches (training
mode) and with the running statistics (evaluation), what bnjax.diagnostics.report says,
and the accuracies after a remedy. Results go to a run folder (runs/gap-001 and so on):
gaps.csv with a row for each remedy of each network, summary.csv with their means.
A run that was stopped or killed continues with --resume.
"""

import collections
import contextlib
import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import data
import numpy as np
import options
import run_folder
from gap_training import evaluate
from options import SettingsError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scenarios import SCENARIOS, Case

from bnjax import diagnostics

GAPS, SUMMARY = "gaps.csv", "summary.csv"
NOTHING = "none"
MODES = ("training mode", "evaluation")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    """Which failures; healthy is none."""
    seeds: int = 5
    """Networks of each, which differ in initial weights and the order of the examples."""
    healthy_seeds: int = 20
    """The same of healthy ones."""
    run_dir: Path | None = None
    """Run folder. Default: the next free runs/gap-NNN; with --resume, the newest one."""
    resume: bool = False
    """Continue the run in the run folder: networks that it has are left out."""


def check(settings: Settings) -> None:
    options.check_names("--scenarios", settings.scenarios, SCENARIOS)
    for name in ("seeds", "healthy_seeds"):
        if not 1 <= getattr(settings, name) < 2**31:
            raise SettingsError(
                f"{options.flag(name)}: must be at least 1, got {getattr(settings, name)}."
            )


def diagnosed(case: Case) -> diagnostics.Report:
    return diagnostics.report(
        case.model,
        case.variables,
        case.test.images,
        train_batches=case.train_batches,
        labels=case.test.labels,
        call=evaluate,
    )


def measured(name: str, seed: int, case: Case, report: diagnostics.Report) -> list[Row]:
    """A row for each remedy; one where there is nothing to mend."""
    before = case.test.accuracy(case.model, case.variables)
    row = {
        "scenario": name,
        "seed": seed,
        "planted": SCENARIOS[name].cause or NOTHING,
        "first finding": report.findings[0].cause if report.findings else NOTHING,
        "findings": len(report.findings),
        **_rounded(before, ""),
    }
    nothing = {"remedy": "", **dict.fromkeys((f"{mode} after" for mode in MODES), "")}
    after = ({"remedy": k, **_rounded(mend(), " after")} for k, mend in case.remedies.items())
    return [row | other for other in after] or [row | nothing]


def _rounded(accuracy: tuple[float, ...], suffix: str) -> Row:
    return {mode + suffix: round(a, 4) for mode, a in zip(MODES, accuracy, strict=True)}


def summary(rows: list[Row]) -> list[dict[str, str]]:
    """Means over the seeds; a scenario's further remedies come in rows of their own."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["scenario"], row["remedy"]), []).append(row)
    found, shown = [], set()
    for (scenario, remedy), group in groups.items():
        causes = collections.Counter(row["first finding"] for row in group)
        named = ", ".join(f"{c}: {n} of {len(group)}" for c, n in causes.most_common())
        first = {"scenario": scenario, **_means(group, MODES), "first finding": named}
        if scenario in shown:
            first = dict.fromkeys(first, "")
        shown.add(scenario)
        after = _means(group, tuple(f"{mode} after" for mode in MODES))
        found.append(first | {"remedy": remedy} | after)
    return found


def _means(rows: list[Row], columns: tuple[str, ...]) -> dict[str, str]:
    return {
        c: "" if rows[0][c] == "" else f"{np.mean([row[c] for row in rows]):.1%}" for c in columns
    }


def printed(rows: list[dict[str, str]]) -> Table:
    """Narrower than the file: both modes in one column."""
    table = Table(title="Test accuracy, means over the seeds", title_justify="left")
    after = [f"{mode} after" for mode in MODES]
    table.add_column("scenario", no_wrap=True)
    table.add_column("training mode,\nevaluation", justify="right")
    table.add_column("first finding")
    table.add_column("remedy")
    table.add_column("after it", justify="right")
    for row in rows:
        before, mended = ("\n".join(row[c] for c in columns) for columns in (MODES, after))
        table.add_row(row["scenario"], before, row["first finding"], row["remedy"], mended)
    return table


def networks(settings: Settings) -> list[tuple[str, int]]:
    return [
        (name, seed)
        for name in settings.scenarios
        for seed in range(settings.healthy_seeds if name == "healthy" else settings.seeds)
    ]


def recorded(path: Path) -> list[Row]:
    """The networks of a run that was stopped or killed."""
    if not path.exists():
        return []
    words = ("scenario", "planted", "first finding", "remedy")
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for name in row.keys() - set(words):
            kind = int if name in ("seed", "findings") else float
            row[name] = kind(row[name]) if row[name] else ""
    return rows


def experiment(
    settings: Settings, dataset: data.Dataset, folder: run_folder.RunFolder, console: Console
) -> None:
    rows = recorded(folder.path / GAPS)
    done = {(row["scenario"], row["seed"]) for row in rows}
    with Progress(console=console) as progress:
        bar = progress.add_task("compiling", total=len(networks(settings)))
        for name, seed in networks(settings):
            progress.update(bar, advance=1, description=name)
            if (name, seed) in done:
                continue
            case = SCENARIOS[name].build(dataset, seed)
            report = diagnosed(case)
            if seed == 0:
                console.print(f"{name}\n{report}\n", markup=False, highlight=False)
            rows += measured(name, seed, case, report)
            folder.write_table(GAPS, rows)
    folder.write_table(SUMMARY, summary(rows))
    console.print(printed(summary(rows)))
    print(f"Each network: {folder.path / GAPS}\nMeans: {folder.path / SUMMARY}")


def run(settings: Settings) -> None:
    check(settings)
    dataset = data.load("digits")
    decisive = dataclasses.asdict(settings)
    del decisive["run_dir"], decisive["resume"]
    find = run_folder.newest if settings.resume else run_folder.next_free
    folder = run_folder.RunFolder(
        settings.run_dir or find("gap"),
        settings={options.flag(name): value for name, value in decisive.items()},
        made_with=run_folder.made_with(),
        resume=settings.resume,
    )
    with contextlib.closing(folder):
        print(f"Run folder: {folder.path}", flush=True)
        experiment(settings, dataset, folder, Console())


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; returns the exit status."""
    return command.run(run, Settings, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
