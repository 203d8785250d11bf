"""Files of a model's folder: JSON objects, and writing that never leaves half a file."""

import json
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it holds anything else; the text names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return parse_object(path.read_bytes(), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data``; ``where`` names it in errors."""
    try:
        # A key given twice means two things to two readers.
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}; expected an object")
    return value


def write_object(path: pathlib.Path, value: dict[str, Any]) -> None:
    """`replace_file` with indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(path, [(text + "\n").encode()])


def replace_file(path: pathlib.Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes under another name, then moves the file over ``path``."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return found
