"""Reports printed: findings, overall numbers, and a table of the layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bnjax._diagnostics.plots import shortened

_ALARM = "bold red"
# Characters of a name, of 100 in a line.
_NAME = 28


class _Column(NamedTuple):
    """`name`: in the rows. `alarm`: whether a value calls for attention."""

    name: str
    heading: str
    form: Callable[[Any], str]
    alarm: Callable[[Any], bool]


def _never(value: Any) -> bool:
    return False


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0e}"


def _signed(value: float) -> str:
    return _number(value) if not math.isfinite(value) else f"{value:+.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def _share(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else str(value)


def _beyond(limit: float) -> Callable[[float], bool]:
    """Also of what is not finite."""
    return lambda value: not abs(value) <= limit


_COLUMNS = (
    _Column("step", "step", "{:,}".format, _never),
    _Column("layer", "layer", lambda name: shortened(name, _NAME), _never),
    _Column("channels", "chan-\nnels", _count, _never),
    _Column("entries", "entries\n/chann.", _count, lambda n: not n >= 8),
    _Column("low", "y, 15th\npercentile", _signed, _never),
    _Column("median", "y,\nmedian", _signed, _never),
    _Column("high", "y, 85th\npercentile", _signed, _never),
    _Column("mean_gap", "mean gap\n(dev.)", _number, _beyond(0.5)),
    _Column("log_var_ratio", "log var\nratio", _signed, _beyond(math.log(2))),
    _Column("output_difference", "output\n(dev.)", _number, _beyond(0.5)),
    _Column("distance", "dis-\ntance", _number, _beyond(0.3)),
    _Column("saturated", "satu-\nrated", _share, _never),
    _Column("updates", "up-\ndates", _count, lambda n: n == 0),
)
# Below the table, where there are any.
_TROUBLES = {
    "dead": "{:,} dead",
    "exploding": "{:,} exploding",
    "not_finite": "{:,} inputs not finite",
    "bad_statistics": "{:,} statistics not finite",
    "untrained": "{:.0%} untrained",
}
# More saturated than half is alarming, but half of the inputs of relu are negative.
_SATURATED = {"sigmoid": 0.5, "tanh": 0.5, "relu": 0.9}


def table(records: Sequence[Any]) -> Any:
    """The numbers of all layers as a table for the terminal, 100 columns wide.

    cell = a number of `record.row()`, with its unit in the heading; alarming ones are red
    and have an exclamation mark. Columns without any number are left out.

    Args:
      records: of `report`, or of a `Monitor`.

    Returns:
      rich.table.Table: `rich.print(table(records))`.

    Raises:
      ImportError: without rich. ValueError: no records.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> from bnjax.diagnostics import Monitor, table
      >>> monitor = Monitor(lambda variables, x: bnjax.bn_apply(*variables, x, train=True))
      >>> variables = bnjax.bn_init(3)
      >>> log = monitor.update(monitor.init(variables), variables, jnp.eye(8, 3))
      >>> table(monitor.records(log, variables)).row_count
      1

    Source: `bnjax.diagnostics.report` defines the numbers.
    """
    if not records:
        raise ValueError("`records` must hold at least one layer, got none.")
    rich_table = _imported("table")
    rows = [record.row() for record in records]
    columns = [c for c in _COLUMNS if any(row.get(c.name) is not None for row in rows)]
    result = rich_table.Table(box=_imported("box").SIMPLE_HEAD, show_edge=False, padding=0)
    for column in columns:
        left = column.name == "layer"
        result.add_column(column.heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        result.add_row(*(_cell(column, row) for column in columns))
    result.caption, result.caption_justify = _caption(rows), "left"
    return result


def shown(findings: Sequence[Any], overall: Mapping[str, float], records: Sequence[Any]) -> Any:
    """A report for the terminal: findings first, then the model's numbers, then the layers.

    Args:
      findings: with `cause`, `sentence` and `remedy`, the likeliest first.
      overall: numbers by name.
      records: as for `table`.

    Returns:
      rich.console.Group: `rich.print(shown(...))`.

    Raises:
      ImportError: without rich. ValueError: no records.
    """
    text, padding = _imported("text").Text, _imported("padding").Padding
    parts: list[Any] = []
    if not findings:
        parts.append(text("No finding.", style="bold green"))
    for i, finding in enumerate(findings, 1):
        parts.append(text.assemble((f"{i}. {finding.cause}", _ALARM), f": {finding.sentence}"))
        code = finding.remedy.replace("  # ", "\n# ")  # so that a line can be copied
        parts.append(padding(text(code, style="cyan"), (0, 0, 1, 4)))
    numbers = _imported("table").Table.grid(padding=(0, 2))
    numbers.add_column()
    numbers.add_column(justify="right")
    for name, value in overall.items():
        numbers.add_row(name.replace("_", " "), _overall(name, value))
    return _imported("console").Group(*parts, numbers, table(records))


def _overall(name: str, value: float) -> str:
    if name.startswith("accuracy") and math.isfinite(value):
        return f"{value:.1%}"
    return f"{value:.4g}"


def _cell(column: _Column, row: Mapping[str, Any]) -> Any:
    text = _imported("text").Text
    value = row.get(column.name)
    if value is None:
        return text("-", style="dim")
    shown, alarm = column.form(value), column.alarm(value)
    if column.name == "saturated":
        shown = f"{shown} {row.get('activation', '')}".rstrip()
        alarm = not value <= _SATURATED.get(row.get("activation", ""), 0.5)
    if column.name == "layer":
        alarm = bool(_troubles(row))
    return text(f"{shown} !", style=_ALARM) if alarm else text(shown)


def _troubles(row: Mapping[str, Any]) -> str:
    """What there should be none of."""
    return ", ".join(form.format(row[name]) for name, form in _TROUBLES.items() if row.get(name))


def _caption(rows: list[dict[str, Any]]) -> Any:
    """Layers in trouble, each on a line of its own; the momentum; what is abbreviated."""
    text = _imported("text").Text
    lines = [text(f"{row['layer']}: {_troubles(row)}", _ALARM) for row in rows if _troubles(row)]
    momenta = sorted({row["momentum"] for row in rows if "momentum" in row})
    notes = ["(dev.): in deviations; log: natural; !: look here"]
    if momenta:
        span = " to ".join(f"{m:g}" for m in dict.fromkeys((momenta[0], momenta[-1])))
        notes.insert(0, f"momentum {span}")
    return text("\n").join([*lines, text("; ".join(notes), "dim")])


def _imported(name: str) -> Any:
    try:
        import importlib

        return importlib.import_module(f"rich.{name}")
    except ImportError as error:
        raise ImportError("printed tables need rich. Fix: pip install 'bnjax[reports]'.") from error
