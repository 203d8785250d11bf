"""Metrics of a run: JSON lines, TensorBoard events and a CSV made from the lines.

One row per chunk, on the disk before `MetricWriter.write` returns. The lines are the
record; names may come and go from row to row. A row is
``{"step", "time", name: value}`` with ``time`` in seconds since 1970; a value is a
number or, for runs that train several seeds at once, a list of them.
"""

import csv
import io
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from emfuse_jax.artifacts.config import replace_file, to_json

Row = dict[str, Any]

_NON_FINITE = {"inf": np.inf, "-inf": -np.inf, "nan": np.nan}


class MetricWriter:
    """Appends rows to a JSON-lines file and, if asked, to TensorBoard.

    Args:
        path: the ``.jsonl`` file; continued if it exists.
        tensorboard: a folder for event files, or None.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
        >>> with MetricWriter(path) as writer:
        ...     writer.write(10, {"loss": 0.5})
        ...     writer.write(20, {"loss": 0.25})
        ...     writer.truncate_after(10)
        >>> [(row["step"], row["loss"]) for row in read_metrics(path)]
        [(10, 0.5)]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tensorboard: str | os.PathLike[str] | None = None,
    ) -> None:
        self._path = pathlib.Path(path)
        self._tensorboard = tensorboard
        self._events: Any = None
        if self._path.exists():
            _drop_torn_line(self._path)
        self._file: Any = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds one row.

        Args:
            step: updates done so far.
            metrics: scalars, or arrays ``[seed]``, by name; JAX, NumPy or Python.

        Raises:
            ValueError: if a value is neither a scalar nor one-dimensional.
            OSError: if the row cannot be written; the rows before it stay.
        """
        values = {name: _as_numbers(name, value) for name, value in metrics.items()}
        row = {"step": int(step), "time": time.time(), **values}
        try:
            self._file.write(json.dumps(to_json(row), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._tensorboard is None:
            return
        events = self._events or self._open_events(purge_step=None)
        for name, number in _flat(values).items():
            events.add_scalar(name, number, int(step), row["time"])
        events.flush()

    def truncate_after(self, step: int) -> None:
        """Forgets every row past ``step``, so that a resumed run repeats none.

        TensorBoard is told to hide the events past ``step`` that older files hold.
        """
        self._file.close()
        kept = [row for row in _rows(self._path) if json.loads(row)["step"] <= step]
        replace_file(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8")
        if self._tensorboard is not None:
            self._close_events()
            self._open_events(purge_step=step + 1)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._close_events()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_events(self, purge_step: int | None) -> Any:
        import tensorboardX

        folder = pathlib.Path(str(self._tensorboard))
        # Files are named by the second: without a suffix of its own, one opened within
        # the same second would overwrite the last.
        suffix = f".{len(list(folder.glob('*')))}"
        self._events = tensorboardX.SummaryWriter(
            str(folder), purge_step=purge_step, filename_suffix=suffix
        )
        return self._events

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """Reads the rows of a JSON-lines file; a last line cut short by a kill is left out.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if a line is damaged; the text names it.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 1, "loss": 0.5}\\n{"step": 2, "lo')  # killed here
        >>> read_metrics(path)
        [{'step': 1, 'loss': 0.5}]
    """
    rows = []
    for number, line in enumerate(_rows(pathlib.Path(path)), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is damaged: it holds no row")
        rows.append({name: _decode(value) for name, value in row.items()})
    return rows


def export_csv(
    path: str | os.PathLike[str], csv_path: str | os.PathLike[str]
) -> list[str]:
    """Writes the rows of a JSON-lines file as CSV.

    The header holds every name that any row has, in order of appearance, and lists
    become columns ``name/0``, ``name/1``, …; cells that a row lacks stay empty.

    Returns:
        The header.

    Example:
        >>> import tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.jsonl").write_text('{"step": 1, "loss": [0.5, 0.6]}\\n')
        >>> export_csv(folder / "metrics.jsonl", folder / "metrics.csv")
        ['step', 'loss/0', 'loss/1']
    """
    rows = [_flat(row) for row in read_metrics(path)]
    header = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, header, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    replace_file(pathlib.Path(csv_path), text.getvalue())
    return header


def _rows(path: pathlib.Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _drop_torn_line(path: pathlib.Path) -> None:
    with path.open("r+b") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def _as_numbers(name: str, value: Any) -> Any:
    array = np.asarray(value)
    if array.ndim > 1:
        raise ValueError(
            f"metric {name!r} has shape {array.shape}; expected a scalar or one number "
            "per seed: reduce it first"
        )
    return array.tolist()


def _flat(row: Mapping[str, Any]) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/{i}": item for i, item in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
