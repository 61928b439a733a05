"""Results as a table to read and as JSON to keep."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
_PIPE_WIDTH = 200


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: Key of the value in a row.
        header: Heading, with the unit.
        format: Turns a value into text. A value that is missing or None is shown as a dash.
    """

    key: str
    header: str
    format: Callable[[Any], str] = str


def decimals(digits: int) -> Callable[[float], str]:
    """Return a format with so many decimals and thousands separated: 1,234.5."""
    return lambda value: f"{value:,.{digits}f}"


def percent(digits: int) -> Callable[[float], str]:
    """Return a format that shows a share in [0, 1] as a percentage: 0.45 %."""
    return lambda value: f"{100 * value:.{digits}f} %"


def megabytes(n_bytes: float) -> str:
    """Show bytes in MB (10^6 bytes)."""
    return f"{n_bytes / 1e6:,.1f}"


def table(rows: Sequence[Row], columns: Sequence[Column], title: str | None = None) -> Table:
    """Lay rows out as a table for `rich.print`: text to the left, numbers to the right.

    Columns of which no row has a value are left out.
    """
    result = Table(title=title)
    shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    for column in shown:
        is_text = any(isinstance(row.get(column.key), str) for row in rows)
        # Names are what a reader must see whole; a number cut off would be a wrong number.
        result.add_column(
            column.header,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
        )
    for row in rows:
        values = [row.get(column.key) for column in shown]
        result.add_row(
            *(
                "-" if value is None else column.format(value)
                for column, value in zip(shown, values, strict=True)
            )
        )
    return result


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Lay rows out as a Markdown table, with the columns that `table` shows."""
    shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    texts = {column: any(isinstance(row.get(column.key), str) for row in rows) for column in shown}
    lines = [
        [column.header for column in shown],
        ["---" if texts[column] else "---:" for column in shown],
    ]
    for row in rows:
        values = [(column, row.get(column.key)) for column in shown]
        lines.append(["-" if value is None else column.format(value) for column, value in values])
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def console() -> Console:
    """Return a console on standard output; into a pipe or a file lines may be long.

    What is in brackets is text, not markup: names of models and modules are the user's.
    """
    result = Console(markup=False)
    if not result.is_terminal:
        result.width = _PIPE_WIDTH
    return result


def print_table(rows: Sequence[Row], columns: Sequence[Column], title: str | None = None) -> None:
    """Print a table on standard output."""
    console().print(table(rows, columns, title))


def write_json(path: str | os.PathLike[str], rows: Sequence[Row], **context: Any) -> None:
    """Write `{**context, "rows": [...]}`; numbers that are not finite become null.

    Written to a temporary name and renamed, so that a file is whole or not there.
    """
    content = _finite({**context, "rows": [dict(row) for row in rows]})
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
