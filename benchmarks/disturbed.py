"""Measurements that something else on the machine disturbed: found by their spread, made anew.

What is looked at is how far apart the quartiles of the ratios are, never the ratios: of two
measurements of the same thing the steadier one counts, whatever it says.
"""

import statistics
from collections.abc import Callable, Iterable

from results import Rows

# Upper quartile divided by lower one, as most layers of the group have it.
MOST = 1.4
TIMES = 2
GROUP = ("shape", "channels", "dtype", "mean", "running mean", "work")

Group = tuple[str, ...]


def spread(rows: Rows) -> float:
    """Median over layers of upper quartile / lower quartile; 1 where there are none."""
    found = [float(row["high"]) / float(row["low"]) for row in rows if row["ratio"]]
    return statistics.median([value for value in found if value > 1] or [1.0])


def grouped(rows: Iterable[dict[str, str]]) -> dict[Group, Rows]:
    """Rows of the same rounds."""
    groups: dict[Group, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    return groups


def steadier(rows: Rows, measure: Callable[[Group], Rows]) -> Rows:
    """The rows, with those of disturbed groups measured again, a few times at most."""
    groups = grouped(rows)
    for group, found in groups.items():
        for _ in range(TIMES):
            if spread(groups[group]) <= MOST:
                break
            again = measure(group)
            spreads = f"{spread(groups[group]):.2f}, then {spread(again):.2f}"
            print(f"Measured again: {', '.join(group)}: spread {spreads}", flush=True)
            groups[group] = min(groups[group], again, key=spread)
        if len(groups[group]) != len(found):
            raise ValueError(f"{group}: {len(found)} layers, then {len(groups[group])}.")
    return [row for group in groups.values() for row in group]
