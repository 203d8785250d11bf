"""Tables of results: one list of rows, written as Markdown for people and as JSON.

A row is a dict. A cell is a number, a string, None (shown as a dash), or a mean with its
interval, ``{"mean": m, "interval": [low, high]}``, in which other keys are carried along
in the JSON and not shown.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Cell = Any
Row = Mapping[str, Cell]


class Column(NamedTuple):
    """How one key of the rows is shown."""

    key: str
    title: str
    """With its unit."""
    digits: int = 2
    best: str | None = None
    """``"min"`` or ``"max"``: the best mean is set in bold."""


def format_cell(cell: Cell, digits: int = 2) -> str:
    """A cell as text.

    Example:
        >>> format_cell({"mean": 49.031, "interval": [46.0, 52.25]}, digits=1)
        '49.0 [46.0, 52.2]'
        >>> format_cell(None), format_cell(float("nan")), format_cell(3)
        ('–', 'n/a', '3')
    """
    if cell is None:
        return "–"
    if isinstance(cell, Mapping):
        text = format_cell(cell["mean"], digits)
        if cell.get("interval") is None:
            return text
        low, high = (format_cell(end, digits) for end in cell["interval"])
        return f"{text} [{low}, {high}]"
    if isinstance(cell, bool | str):
        return str(cell).replace("|", "\\|")
    if isinstance(cell, int | np.integer):
        return str(int(cell))
    return f"{float(cell):.{digits}f}" if math.isfinite(cell) else _odd(float(cell))


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A Markdown table, numbers aligned right, lined up in the source too.

    Raises:
        ValueError: if there are no rows, or a row has none of the columns' keys.

    Example:
        >>> rows = [{"method": "fused", "error": 0.1}, {"method": "expert", "error": 0.25}]
        >>> columns = [Column("method", "method"), Column("error", "error", best="min")]
        >>> print(markdown_table(rows, columns))
        | method | error    |
        | :----- | -------: |
        | fused  | **0.10** |
        | expert | 0.25     |
    """
    keys = [column.key for column in columns]
    if not rows:
        raise ValueError(f"a table of {keys} without rows; expected at least one")
    for index, row in enumerate(rows):
        if not set(keys) & set(row):
            raise ValueError(
                f"row {index} has keys {list(row)}; expected some of {keys}"
            )
    texts = [_column_texts(rows, column) for column in columns]
    numeric = [_is_numeric(rows, column.key) for column in columns]
    widths = [
        max(len(column.title), 3, *map(len, text))
        for column, text in zip(columns, texts, strict=True)
    ]
    rule = [
        "-" * (w - 1) + ":" if right else ":" + "-" * (w - 1)
        for w, right in zip(widths, numeric, strict=True)
    ]
    lines = [[column.title for column in columns], rule, *zip(*texts, strict=True)]
    return "\n".join(
        "| " + " | ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write_table(
    stem: str | os.PathLike[str],
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    title: str,
    notes: Sequence[str] = (),
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes ``stem.md`` and ``stem.json``.

    Args:
        stem: path without a suffix; the folder is made.
        rows: all keys reach the JSON, those of ``columns`` the Markdown.
        columns: what is shown, in order.
        title: the Markdown heading.
        notes: lines under the table: units, protocol, what an interval means.

    Returns:
        The two paths.

    Raises:
        ValueError: as `markdown_table`, before anything is written.
    """
    text = f"## {title}\n\n{markdown_table(rows, columns)}\n"
    text += "".join(f"\n{note}\n" for note in notes)
    content = {
        "title": title,
        "columns": [column._asdict() for column in columns],
        "rows": [to_plain(dict(row)) for row in rows],
        "notes": list(notes),
    }
    stem = pathlib.Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = stem.with_name(stem.name + ".md"), stem.with_name(stem.name + ".json")
    for path, body in zip(
        paths,
        (text, json.dumps(content, indent=2, allow_nan=False) + "\n"),
        strict=True,
    ):
        part = path.with_name(f".{path.name}.part")
        part.write_text(body)
        os.replace(part, path)
    return paths


def to_plain(value: Any) -> Any:
    """``value`` as JSON can hold it: arrays as lists, numbers that are none as null.

    Example:
        >>> to_plain({"x": np.array([1.0, np.nan]), "n": np.int64(3)})
        {'x': [1.0, None], 'n': 3}
    """
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | str | int):
        return value
    array = np.asarray(value)
    if array.ndim:
        return to_plain(array.tolist())
    plain = array.item()
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def _mean(cell: Cell) -> float:
    """The number that ranks a cell; NaN where there is none."""
    if isinstance(cell, Mapping):
        return _mean(cell["mean"])
    if cell is None or isinstance(cell, str | bool):
        return math.nan
    return float(cell)


def _column_texts(rows: Sequence[Row], column: Column) -> list[str]:
    cells = [row.get(column.key) for row in rows]
    texts = [format_cell(cell, column.digits) for cell in cells]
    if column.best is None:
        return texts
    if column.best not in ("min", "max"):
        raise ValueError(f"best={column.best!r}; expected 'min', 'max' or None")
    means = np.array([_mean(cell) for cell in cells])
    if np.isnan(means).all():
        return texts
    best = np.nanmin(means) if column.best == "min" else np.nanmax(means)
    return [f"**{t}**" if m == best else t for t, m in zip(texts, means, strict=True)]


def _is_numeric(rows: Sequence[Row], key: str) -> bool:
    cells = [row.get(key) for row in rows if row.get(key) is not None]
    return bool(cells) and not any(isinstance(cell, str | bool) for cell in cells)


def _odd(value: float) -> str:
    return "n/a" if math.isnan(value) else ("∞" if value > 0 else "-∞")
