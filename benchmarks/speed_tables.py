"""Tables of times, from the results of speed.py, steps.py and dispatch.py."""

import statistics
from collections.abc import Callable

from results import Rows, TableError, markdown, read

US, FLAX = "bnjax", "flax.linen"
FORWARD, TRAINING, EVALUATION = WORK = ("forward", "forward + backward", "evaluation")
ERRORS = ("variance error at 10", "variance error at 1000")
DEFAULT_MEAN = "0.5"
DISTORTED = "*"


def speed(name: str) -> Callable[[], str]:
    def table() -> str:
        rows, comment = read(name)
        return f"{markdown(means(rows))}\n\nMeasured with {comment}."

    return table


def sentence() -> str:
    """Of Flax's layer: the geometric means, and the extremes at large means."""
    rows, _ = read("speed")
    found = {row["dtype"]: row for row in means(rows) if row["layer"] == FLAX}
    parts = [
        f"{row[TRAINING]} in {dtype} ({row[FORWARD]} forward alone)" for dtype, row in found.items()
    ]
    shapes = len({shape_of(row) for row in ordinary(rows)})
    far, *others = {row["mean"] for row in rows} - {DEFAULT_MEAN}
    if others:
        raise TableError(f"speed.csv: means of {far}, {others}; the sentence is of one.")
    both, alone = (_extremes(rows, far, work) for work in (TRAINING, FORWARD))
    return (
        f"On a CPU the time of {FLAX} divided by {US}'s is {' and '.join(parts)}, "
        f"forward and backward, in the geometric mean over {shapes} shapes with means of "
        f"{DEFAULT_MEAN} deviations; with means of {far} it is {both} in float32 ({alone})."
    )


def _extremes(rows: Rows, mean: str, work: str) -> str:
    """Least and largest ratio of Flax's layer at a mean that the running one is near to."""
    found = [
        float(row["ratio"])
        for row in rows
        if (row["layer"], row["work"], row["mean"], row["running mean"]) == (FLAX, work, mean, mean)
    ]
    return f"{min(found):.2f} to {max(found):.2f}"


def without_the_smallest() -> str:
    """Geometric means, forward and backward, of the shapes but the smallest."""
    rows, _ = read("speed")
    smallest = min(rows, key=lambda row: float(row["MB"]))["shape"]
    rest = means([row for row in rows if row["shape"] != smallest])
    found = [f"{r['layer']} {r[TRAINING]} ({r['dtype']})" for r in rest if r["layer"] != US]
    return f"Without {smallest}, forward and backward: {'; '.join(found)}."


def by_shape(work: str) -> Callable[[], str]:
    def table() -> str:
        rows, comment = read("speed")
        return f"{markdown(shapes(rows, work))}\n\nMeasured with {comment}."

    return table


def limits() -> str:
    rows, comment = read("speed")
    return f"{markdown(limited(rows))}\n\nMeasured with {comment}."


def large_means() -> str:
    rows, comment = read("speed")
    return f"{markdown(at_large_means(rows))}\n\nMeasured with {comment}."


def show(rows: Rows) -> None:
    """All of them, of rows that are not in a file."""
    tables = {"Geometric means": means(rows), "Beside a copy": limited(rows)}
    tables |= {work: shapes(rows, work) for work in WORK}
    tables |= {"Large means": at_large_means(rows)}
    for title, table in tables.items():
        if table:
            print(f"\n{title}\n\n{markdown(table)}")
    for row in rows:
        if is_distorted(row):
            print(f"\nThe loop distorts this: {row}")


def is_distorted(row: dict[str, str]) -> bool:
    """Whether XLA made copies for the loop, or took work out of it."""
    return any(row[column] not in ("", "0") for column in ("copies", "hoisted"))


def layers_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["layer"] for row in rows))


def ordinary(rows: Rows) -> Rows:
    return [row for row in rows if row["mean"] == DEFAULT_MEAN]


def means(rows: Rows) -> Rows:
    """By layer and dtype: geometric means over shapes of the time divided by bnjax's, the least
    of them in training, and the largest errors."""
    table = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        chosen = [row for row in ordinary(rows) if row["dtype"] == dtype]
        for layer in layers_of(chosen):
            own = [row for row in chosen if row["layer"] == layer]
            line = {"layer": layer, "dtype": dtype}
            ratios = {
                w: [float(r["ratio"]) for r in own if r["work"] == w and r["ratio"]] for w in WORK
            }
            for work in WORK:
                line[work] = _mean(ratios[work])
            line["least of forward + backward"] = _number(min(ratios[TRAINING], default=None))
            for column in ERRORS:
                found = [float(row[column]) for row in own if row[column]]
                line[column] = f"{max(found):.0e}" if found else own[0]["note"] or "n/a"
            table.append(line)
    return table


def shapes(rows: Rows, work: str) -> Rows:
    """A line for a shape and dtype; a cell is the ratio and, in training, the two errors."""
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for row in ordinary(rows):
        if row["work"] == work:
            key = (row["shape"], row["channels"], row["dtype"])
            label = {"shape": shape_of(row), "dtype": row["dtype"], "MB": row["MB"]}
            line = table.setdefault(key, label)
            line[row["layer"]] = _cell(row, work)
    return list(table.values())


def limited(rows: Rows) -> Rows:
    """Times divided by what the bytes take that no program can do without."""
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for row in ordinary(rows):
        if row["layer"] in (US, FLAX):
            key = (row["shape"], row["channels"], row["dtype"])
            label = {"shape": shape_of(row), "dtype": row["dtype"], "MB": row["MB"]}
            table.setdefault(key, label)[f"{row['work']}, {row['layer']}"] = row["times the limit"]
    return [dict(sorted(line.items(), key=_order)) for line in table.values()]


def at_large_means(rows: Rows) -> Rows:
    """flax.linen's time divided by bnjax's at a mean of 10 deviations."""
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if row["mean"] != DEFAULT_MEAN and row["layer"] == FLAX:
            label = {"shape": shape_of(row), "dtype": row["dtype"], "mean / deviation": row["mean"],
                     "running mean": row["running mean"]}  # fmt: skip
            line = table.setdefault(tuple(label.values()), label)
            line[row["work"]] = _quartiles(row)
            line["variance error of flax.linen"] = row[ERRORS[0]]
    return list(table.values())


def _order(item: tuple[str, str]) -> int:
    """Labels first, then bnjax's columns."""
    return ("," in item[0]) + item[0].endswith(FLAX)


def shape_of(row: dict[str, str]) -> str:
    return row["shape"] + (" (channels first)" if row["channels"] == "first" else "")


def _cell(row: dict[str, str], work: str) -> str:
    if row["note"]:
        return row["note"]
    errors = [f"{float(row[column]):.0e}" for column in ERRORS if row[column]]
    mark = DISTORTED if is_distorted(row) else ""
    return ", ".join([_number(row["ratio"]) + mark, *([] if work == EVALUATION else errors)])


def _quartiles(row: dict[str, str]) -> str:
    return f"{_number(row['ratio'])} ({_number(row['low'])} to {_number(row['high'])})"


def _number(value: str | float | None) -> str:
    return "" if value in (None, "") else f"{float(value):.2f}"


def _mean(values: list[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f}" if values else ""


def steps() -> str:
    rows, comment = read("steps")
    table = [
        {"step": row["step"], "images": row["images"], "flax / bnjax": _quartiles(row)}
        for row in rows
    ]
    return f"{markdown(table)}\n\nMeasured with {comment}."


def dispatch() -> str:
    rows, comment = read("dispatch")
    return f"{markdown(rows)}\n\nMeasured with {comment}."


TABLES: dict[str, Callable[[], str]] = {
    "speed-sentence": sentence,
    "speed-without-smallest": without_the_smallest,
    "dispatch": dispatch,
    "speed": speed("speed"),
    "speed-flax": speed("speed-flax"),
    "speed-evaluation": by_shape(EVALUATION),
    "speed-forward": by_shape(FORWARD),
    "speed-large-means": large_means,
    "speed-limits": limits,
    "speed-training": by_shape(TRAINING),
    "steps": steps,
}
