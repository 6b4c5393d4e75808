"""The results as CSV files, and the tables of both pages named README.md from them.

    python benchmarks/tables.py            write the tables anew
    python benchmarks/tables.py --check    exit with status 1 if they differ

A page marks a table by the lines `<!-- table: NAME -->` and `<!-- end -->`.
"""

import argparse
import csv
import itertools
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import claims

HERE = Path(__file__).parent
RESULTS = HERE / "results"
EXAMPLES = HERE.parent / "examples" / "results"
PAGES = tuple(HERE.parent / folder / "README.md" for folder in (".", "benchmarks", "examples"))
REGION = re.compile(r"<!-- table: ([\w-]+) -->\n(?:(?!<!-- table:).)*?<!-- end -->", re.DOTALL)
OPENING = "<!-- table:"

Rows = list[dict[str, str]]

# Rows of peers.csv that README.md shows, by their column "key".
PEERS = (
    "variance-1e3",
    "gradient-1e4",
    "mask-devices",
    "mask-nan",
    "mask-nan-gradient",
    "nan-batch",
    "batch-statistics",
    "residuals",
)


class TableError(ValueError):
    """A page or a CSV file cannot be used; the message says which and why."""


def environment() -> str:
    """Versions and kind of hardware; nothing that names a machine."""
    import jax
    import layers

    device = jax.devices()[0]
    kind = f"CPU, {os.cpu_count()} cores"
    if device.platform != "cpu":
        kind = device.device_kind
    return f"Python {platform.python_version()}, {layers.versions()}; {kind}"


def write(name: str, rows: list[dict[str, Any]], also: str = "") -> None:
    """results/NAME.csv, after a line of comment that says what it was measured with, and `also`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {environment()}{also and f'; {also}'}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(markdown([{k: str(v) for k, v in row.items()} for row in rows]))
    print(f"Written: benchmarks/results/{path.name}\n")


def read(name: str) -> tuple[Rows, str]:
    """Rows, and the line about what they were measured with."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        raise TableError(f"benchmarks/results/{path.name}: missing. Run the script that makes it.")
    with path.open(newline="", encoding="utf-8") as file:
        comment = file.readline().removeprefix("#").strip()
        return list(csv.DictReader(file)), comment


def markdown(rows: Rows) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _with_note(rows: Rows, comment: str) -> str:
    return f"{markdown(rows)}\n\nMeasured with {comment}."


def derivatives() -> str:
    rows, comment = read("derivatives")
    shown = [row for row in rows if row["mean"] in ("0", "10000")]
    return _with_note([_renamed(row, "mean", "mean / deviation") for row in shown], comment)


def peers() -> str:
    rows, comment = read("peers")
    by_key = {row.pop("key"): row for row in rows}
    missing = [key for key in PEERS if key not in by_key]
    if missing:
        raise TableError(f"benchmarks/results/peers.csv: has no rows {missing}. Run peers.py.")
    shown = [by_key[key] for key in PEERS]
    notes = ["Numbers are right (yes) within 0.1 %."]
    other = "equinox, mode='batch'"
    if other in shown[0]:
        differ = [row for row in shown if row[other] != row["equinox"]]
        changes = "; ".join(f"{row['']}: {row[other]}" for row in differ) or "nothing"
        notes.append(f"equinox is in its default mode; mode='batch' changes {changes}.")
    compact = [{k: v for k, v in row.items() if k != other} for row in shown]
    return f"{markdown(compact)}\n\n{' '.join(notes)} Measured with {comment}."


def devices() -> str:
    rows, comment = read("devices")
    shown = []
    for (way, mask), group in _grouped(rows, "way", "mask"):
        layouts = list(group[0])[3:]
        cells = {layout: ", ".join(row[layout] for row in group) for layout in layouts}
        shown.append({"way": way, "mask": mask, **cells})
    return _with_note(shown, comment)


def allreduces() -> str:
    """Number of all-reduces of each way, and what they carry."""
    rows, comment = read("allreduces")
    shown = []
    for way, group in _grouped(rows, "way"):
        cells = {
            f"{part}, {row['mask']}": f"{row[part]} ({_floats(row[f'{part}_bytes'], row)})"
            for part in ("forward", "backward")
            for row in group
        }
        shown.append({"way": way, **cells})
    return _with_note(shown, comment)


def _floats(size: str, row: dict[str, str]) -> str:
    """In halves of C, the channels of the layer, since they may be sharded in two."""
    floats, channels = int(size) // 4, int(row["channels"])
    halves, others = divmod(2 * floats, channels)
    return f"{halves / 2:g} C" + (f" + {others // 2}" if others else "")


def collectives() -> str:
    """Bytes forward + backward, by channels and devices."""
    rows, comment = read("collectives")
    shown = []
    for (way, mask, channels), group in _grouped(rows, "way", "mask", "channels"):
        cells = {
            f"{row['devices']} devices": f"{row['forward_bytes']} + {row['backward_bytes']}"
            for row in group
        }
        shown.append({"way": way, "mask": mask, "C": channels, **cells})
    return _with_note(shown, comment)


def _grouped(rows: Rows, *names: str) -> list[tuple[Any, Rows]]:
    """Rows that agree in these columns, wherever they are, by what they agree in."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return list(groups.items())


def mnist() -> str:
    """From the run of examples/train_mlp.py that made the README's picture."""
    metrics = _example("mnist", "metrics.csv")
    rows = []
    for network, label in (("bn", "with"), ("no-bn", "without")):
        steps = {
            int(row["step"]): float(row["test_accuracy"])
            for row in metrics
            if row["network"] == network
        }
        passed = [step for step, accuracy in steps.items() if accuracy > 0.97]
        rows.append(
            {
                "batch normalization": label,
                **{f"test accuracy at {step}": f"{steps[step]:.1%}" for step in (100, 500, 2000)},
                f"at {max(steps)}": f"{steps[max(steps)]:.2%}",
                "above 97 % at step": str(min(passed, default="never")),
            }
        )
    return markdown(rows)


def cnn() -> str:
    """From the runs of examples/train_cnn.py: with, without, and folded away."""
    rows = []
    # The folders are named by data and learning rate.
    for name in itertools.product(("digits", "mnist", "cifar10"), ("0.02", "0.1")):
        folder = "-".join(("cnn", *name))
        last = {row["network"]: row for row in _example(folder, "metrics.csv")}
        (folded,) = _example(folder, "folded.csv")
        difference = float(folded["difference"]) / float(folded["largest_logit"])
        rows.append(
            {
                "data": folded["data"],
                "training images": f"{int(folded['training_images']):,}",
                "steps": last["bn"]["step"],
                "learning rate": name[1],
                "test accuracy without": f"{float(last['no-bn']['test_accuracy']):.2%}",
                "with": f"{float(last['bn']['test_accuracy']):.2%}",
                "folded": f"{float(folded['folded_accuracy']):.2%}",
                "largest difference / largest logit": f"{difference:.1e}",
                "time unfolded / folded": f"{float(folded['time_ratio']):.2f}",
            }
        )
    return markdown(rows)


def gaps() -> str:
    """examples/train_test_gap.py in one row; remedies are the first of each failure."""
    rows = _example("train_test_gap", "gaps.csv")
    first = {(row["scenario"], row["seed"]): row for row in reversed(rows)}.values()
    planted = [row for row in first if row["remedy"]]
    healthy = [row for row in first if not row["remedy"]]
    named = sum(row["first finding"] == row["planted"] for row in planted)
    spoken = sum(row["findings"] != "0" for row in healthy)
    behind = max(
        float(row["training mode after"]) - float(row["evaluation after"]) for row in planted
    )
    shown = {
        "failures": f"{len({row['scenario'] for row in planted})}",
        "cause named first": f"{named} of {len(planted)} networks",
        "healthy networks with a finding": f"{spoken} of {len(healthy)}",
        "evaluation behind training mode after the remedy": f"at most {100 * behind:.1f} points",
    }
    return markdown([shown])


def _gap_rows() -> Rows:
    """All remedies, with both modes after each in one column."""
    rows = _example("train_test_gap", "summary.csv")
    for row in rows:
        after = [row.pop(f"{mode} after") for mode in ("training mode", "evaluation")]
        row["after it"] = ", ".join(value for value in after if value)
    return rows


def _example(folder: str, name: str) -> Rows:
    """A table of a run of an example."""
    path = EXAMPLES / folder / name
    if not path.exists():
        raise TableError(f"examples/results/{folder}/{name}: missing. Run the example.")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verdicts() -> str:
    """What the notebooks found, and examples/paper_mnist.py."""
    try:
        return markdown(claims.rows(_example("paper_mnist", "claims.csv")))
    except claims.ClaimError as error:
        raise TableError(str(error)) from None


def paper() -> str:
    """What examples/paper_mnist.py found."""
    rows = _example("paper_mnist", "claims.csv")
    for row in rows:
        row["claim"] += f". {row.pop('text')}"
        answers = [part.rsplit(": ", 1)[1] for part in row.pop("parts").split("; ")]
        row["verdict"] += f" ({answers.count('yes')} of {len(answers)} parts)"
    return markdown(rows)


def plain(name: str) -> Callable[[], str]:
    return lambda: _with_note(*read(name))


def _renamed(row: dict[str, str], old: str, new: str) -> dict[str, str]:
    return {new if key == old else key: value for key, value in row.items()}


TABLES: dict[str, Callable[[], str]] = {
    "allreduces": allreduces,
    "claims": verdicts,
    "cnn": cnn,
    "collectives": collectives,
    "corrections": plain("corrections"),
    "derivatives": derivatives,
    "devices": devices,
    "gaps": gaps,
    "gaps-all": lambda: markdown(_gap_rows()),
    "mnist": mnist,
    "monitor": plain("monitor"),
    "output": plain("output"),
    "paper": paper,
    "peers": peers,
    "peers-all": plain("peers"),
    "small-batches": plain("small-batches"),
    "speed": plain("speed"),
    "tracing": plain("tracing"),
    "variance": plain("variance"),
}


def injected(text: str) -> str:
    """The text with every marked table written anew."""

    def region(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise TableError(f"table: {name} is unknown. There are {', '.join(TABLES)}.")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    result, count = REGION.subn(region, text)
    if count != text.count(OPENING):
        raise TableError(f"{text.count(OPENING)} tables begin, but {count} end with <!-- end -->.")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare only")
    parser.add_argument("--page", type=Path, action="append", help="instead of all pages")
    arguments = parser.parse_args()
    differ = False
    for page in arguments.page or PAGES:
        try:
            old = page.read_text(encoding="utf-8")
            new = injected(old)
        except (OSError, TableError) as error:
            print(f"Error: {page}: {error}", file=sys.stderr)
            return 2
        if not arguments.check:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            differ = True
            print(f"{page} differs: run benchmarks/tables.py.", file=sys.stderr)
        print(f"{page}: {old.count(OPENING)} tables")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
