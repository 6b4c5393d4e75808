"""What was measured, as CSV files: those of the benchmarks, and those of runs of the examples."""

import csv
import os
import platform
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
EXAMPLES = HERE.parent / "examples" / "results"

Rows = list[dict[str, str]]


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


def last_level_cache() -> str:
    """As Linux tells it."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(size[:-1]) for size in (f.read_text().strip() for f in files) if size[-1] == "K"]
    return f"last-level cache {max(sizes) / 1024:g} MB" if sizes else ""


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


def example(folder: str, name: str) -> Rows:
    """A table of a run of an example."""
    path = EXAMPLES / folder / name
    if not path.exists():
        raise TableError(f"examples/results/{folder}/{name}: missing. Run the example.")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
