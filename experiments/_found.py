"""What earlier runs left, read for what it should be, or refused with the file's name."""

import contextlib
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from emfuse_jax.artifacts.config import read_json


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the body, whatever the content of a file leads to is an error of ours.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: for anything else.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # a file may hold anything
        raise ValueError(
            f"{path} is damaged, or was not written by this package "
            f"({type(error).__name__}: {str(error)[:200]}); run the command that makes it "
            "again"
        ) from error


def run_config(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The config that a run was made with.

    Raises:
        FileNotFoundError: if it is no run directory.
        ValueError: if the file is not one of ours.
    """
    path = pathlib.Path(run_dir) / "config.json"
    with reading(path):
        return dict(read_json(path)["config"].items())


def names_of(value: Any) -> list[str]:
    """A config's tuple of paths or names.

    Raises:
        TypeError: if it is anything else; to be called inside of `reading`.
    """
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{str(value)[:80]}; expected a list of names")
    return value


def folders_in(path: pathlib.Path, names: list[str]) -> list[pathlib.Path]:
    """Folders that a file names, which have to lie in ``path`` itself.

    Raises:
        ValueError: for a name that leads elsewhere.
    """
    for name in names:
        if name != pathlib.PurePath(name).name or name in ("", ".."):
            raise ValueError(f"{name!r} is no folder of {path}")
    return [path / name for name in names]


def token_streams(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The text of every domain as tokens, as `_lm.prepare_text` wrote it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not one of ours.
    """
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > os.stat(path).st_size:
            raise ValueError(f"it unpacks to {size} bytes; ours are not compressed")
        with np.load(path, allow_pickle=False) as arrays:
            streams = {name: np.asarray(arrays[name]) for name in arrays.files}
        for name, stream in streams.items():
            if stream.ndim != 1 or stream.dtype.kind not in "ui":
                raise ValueError(f"{name!r} is {stream.dtype}{stream.shape}, no tokens")
        return streams


def json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file that has one per line; to be called inside of `reading`."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [dict(json.loads(line).items()) for line in lines if line]
