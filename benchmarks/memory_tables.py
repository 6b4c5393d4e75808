"""Tables of what memory.py found: memory of residual networks against what they move."""

from collections.abc import Callable

from results import Rows, TableError, markdown, read

PLATFORMS = {"cuda": "H100", "tpu": "TPU v5e", "cpu": "CPU"}
# The platforms, and the CPU again where XLA merges what is recomputed.
RESULTS = (*PLATFORMS, "cpu-merged")
KEPT = {
    "all": "all",
    "nothing": "nothing",
    "dots_saveable": "`dots_saveable`",
    "save_inputs": "`bnjax.save_inputs`",
    "save_moments": "`bnjax.save_moments`",
}


def network(row: dict[str, str]) -> str:
    return f"{row['network']}, {row['dtype']} {row['batch']}x{row['size']}x{row['size']}x3"


def with_branches(row: dict[str, str], first: dict[str, str]) -> str:
    """What moves if each branch and loop that is seldom needed runs once, of flax's."""
    return f"{(int(row['moved']) + int(row['apart'])) / int(first['moved']):.2f}"


def memory(name: str) -> Callable[[], str]:
    """A row for each way: all divided by that of flax.linen as it comes."""

    def table() -> str:
        rows, comment = read(f"memory-{name}")
        shown = []
        for group in networks(rows).values():
            first = group[0]
            if (first["layer"], first["kept"]) != ("flax.linen", "all"):
                raise TableError(f"memory-{name}.csv: must begin with flax.linen, all.")
            for row in group:
                cells = {
                    "network": network(row) if row is first else "",
                    "layer": row["layer"],
                    "kept": KEPT[row["kept"]],
                    "blocks": row["together"] if row["together"] != "0" else "",
                    "memory": f"{float(row['temporary / flax']):.2f}",
                    "moved": f"{float(row['moved / flax']):.2f}",
                    "with branches": with_branches(row, first),
                }
                if row.get("time / flax"):
                    cells["time"] = row["time / flax"]
                shown.append(cells)
        return f"{markdown(shown)}\n\nMeasured with {comment}."

    return table


def networks(rows: Rows) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(network(row), []).append(row)
    return groups


TABLES: dict[str, Callable[[], str]] = {f"memory-{name}": memory(name) for name in RESULTS}
