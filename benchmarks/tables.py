"""The tables of the pages named README.md, from the results.

    python benchmarks/tables.py            write the tables anew
    python benchmarks/tables.py --check    exit with status 1 if they differ

A page marks a table by the lines `<!-- table: NAME -->` and `<!-- end -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import count_tables
import example_tables
import memory_tables
import speed_tables
from results import Rows, TableError, markdown, read

HERE = Path(__file__).parent
PAGES = tuple(HERE.parent / folder / "README.md" for folder in (".", "benchmarks", "examples"))
REGION = re.compile(r"<!-- table: ([\w-]+) -->\n(?:(?!<!-- table:).)*?<!-- end -->", re.DOTALL)
OPENING = "<!-- table:"

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


def plain(name: str) -> Callable[[], str]:
    return lambda: _with_note(*read(name))


def _renamed(row: dict[str, str], old: str, new: str) -> dict[str, str]:
    return {new if key == old else key: value for key, value in row.items()}


TABLES: dict[str, Callable[[], str]] = {
    **count_tables.TABLES,
    **memory_tables.TABLES,
    **speed_tables.TABLES,
    "allreduces": allreduces,
    "claims": example_tables.verdicts,
    "cnn": example_tables.cnn,
    "collectives": collectives,
    "corrections": plain("corrections"),
    "derivatives": derivatives,
    "devices": devices,
    "gaps": example_tables.gaps,
    "gaps-all": example_tables.all_gaps,
    "mnist": example_tables.mnist,
    "monitor": plain("monitor"),
    "output": plain("output"),
    "paper": example_tables.paper,
    "peers": peers,
    "peers-all": plain("peers"),
    "small-batches": plain("small-batches"),
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
