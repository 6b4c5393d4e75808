"""Tables of what counts.py found in compiled programs."""

from collections.abc import Callable

from results import Rows, TableError, markdown, read

PLATFORMS = {"cpu": "CPU", "tpu": "TPU v5e", "cuda": "H100"}
# Sizes of x that streaming kernels move at least. Forward, x is read for the sums, and again for
# y; backward, x and dy for the sums, and again for dx.
LIMITS = {"forward + backward": 8, "forward": 3, "evaluation": 2}
OURS = "bnjax"
CASE = ("shape", "axis", "dtype", "depth")


def moved(platform: str) -> Callable[[], str]:
    """Sizes of x that the programs of each layer move, beside the limit."""

    def table() -> str:
        rows, comment = read(f"counts-{platform}")
        shown = []
        for program, limit in LIMITS.items():
            for group in _cases(rows, program, devices="1").values():
                cells = {row["layer"]: _moved(row) for row in group}
                where = {"program": program, "x": _x(group[0]), "limit": str(limit)}
                ours = next(row for row in group if row["layer"] == OURS)
                far = {f"{OURS} / limit": f"{_always(ours) / limit:.2f}"}
                shown.append(where | far | cells)
        return _written(shown, [comment])

    return table


def stacks() -> str:
    """Of one layer of a stack: sizes moved, temporary memory, and sizes by XLA's own analysis."""
    shown, comments = [], []
    for platform, title in PLATFORMS.items():
        rows, comment = read(f"counts-{platform}")
        comments.append(comment)
        for group in _cases(rows, "stack").values():
            cells = {"platform": title, "layers": group[0]["depth"], "x": _x(group[0])}
            cells |= {f"{row['layer']}, moved": _moved(row) for row in group}
            cells |= {f"{row['layer']}, temporary": row["temporary"] for row in group}
            cells |= {f"{row['layer']}, by XLA": _by_xla(row) for row in group}
            shown.append(cells)
    return _written(shown, comments)


def residuals() -> str:
    """Arrays of the size of x that the backward pass keeps, and their bytes per entry."""
    rows, comment = read("counts-cpu")
    shown = []
    for case in _cases(rows, "evaluation"):
        group = _cases(rows, "forward + backward", devices="1")[case]
        found = {row["layer"]: _kept(row) for row in group}
        shown.append({"x": group[0]["dtype"]} | found)
    return _written(shown, [comment])


def others() -> str:
    """Of the shape that is counted on several devices too: forward, and with backward."""
    shown, comments = [], []
    for platform, title in PLATFORMS.items():
        rows, comment = read(f"counts-{platform}")
        comments.append(comment)
        several = [row for row in rows if row["devices"] != "1"]
        if not several:
            raise TableError(f"benchmarks/results/counts-{platform}.csv: no rows of devices.")
        count = several[0]["devices"]
        alone = [r for r in rows if r["devices"] == "1" and _case(r) == _case(several[0])]
        for name, column, source in (
            ("kernels", "kernels", alone),
            ("temporary, sizes of x", "temporary", alone),
            (f"all-reduces, {count} devices", "all_reduces", several),
            ("bytes of these", "all_reduce_bytes", several),
        ):
            found = {(row["program"], row["layer"]): row[column] for row in source}
            cells = {
                layer: f"{cell}, {found['forward + backward', layer]}"
                for (program, layer), cell in found.items()
                if program == "forward"
            }
            shown.append({"platform": title, "forward, with backward": name} | cells)
    return _written(shown, comments)


def _case(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in CASE)


def _cases(rows: Rows, program: str, **others: str) -> dict[tuple[str, ...], Rows]:
    """Rows of a program, by shape and dtype."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        if all(row[name] == value for name, value in {"program": program, **others}.items()):
            groups.setdefault(_case(row), []).append(row)
    return groups


def _x(row: dict[str, str]) -> str:
    last = "" if row["axis"] == "-1" else ", channels first"
    return f"{row['shape']} {row['dtype']}{last}"


def _always(row: dict[str, str]) -> float:
    return float(row["read"]) + float(row["written"])


def _moved(row: dict[str, str]) -> str:
    """What moves in any case, and what one more round of a loop or a branch would."""
    return _and_more(_always(row), float(row["branches"]))


def _by_xla(row: dict[str, str]) -> str:
    """As `_moved`: XLA counts a round of a loop or a branch with the rest."""
    if not row["xla"]:
        return "n/a"
    always = float(row["xla_always"])
    return _and_more(always, float(row["xla"]) - always)


def _and_more(always: float, more: float) -> str:
    return f"{always:.1f}" + (f" (+{more:.1f})" if more >= 0.05 else "")


def _kept(row: dict[str, str]) -> str:
    arrays = "1 array" if row["residuals"] == "1" else f"{row['residuals']} arrays"
    return f"{arrays}, {row['residual_bytes']} bytes"


def _written(shown: Rows, comments: list[str]) -> str:
    """With the columns of all rows in each; a layer that was not installed has no count."""
    names = dict.fromkeys(name for row in shown for name in row)
    rows = [{name: row.get(name, "n/a") for name in names} for row in shown]
    return f"{markdown(rows)}\n\nMeasured with {'; '.join(comments)}."


TABLES: dict[str, Callable[[], str]] = {
    **{f"counts-{platform}": moved(platform) for platform in PLATFORMS},
    "counts-others": others,
    "counts-residuals": residuals,
    "counts-stacks": stacks,
}
