"""What a run directory holds, without what differs between two runs of one command."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from emfuse_jax import artifacts

# report.md shows what report.json holds, seconds among it.
_SKIPPED_FILES = {".lock", "provenance.json", "stages.json", "jobs.json", "report.md"}
_SKIPPED_FOLDERS = {"tensorboard", "logs"}
_SKIPPED_SUFFIXES = {".png", ".pdf", ".svg", ".log"}
_VOLATILE = {
    *("time", "seconds", "cpu", "cpu_seconds", "Seconds per stage"),
    *("provenance", "machine", "load_average"),
}


def contents(folder: pathlib.Path) -> dict[str, Any]:
    """Name to what must be equal: rows, values, arrays, digests of checkpoints.

    The folder's own path is written as ``<run>`` where a file names it.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or _is_skipped(name):
            continue
        checkpoint = _checkpoint_of(folder, name)
        if checkpoint is not None:
            meta = folder / checkpoint / "meta" / "metadata"
            found[str(checkpoint)] = artifacts.read_json(meta)["digest"]
        else:
            found[str(name)] = _content(path, str(folder))
    return found


def leftovers(folder: pathlib.Path) -> list[str]:
    """Unfinished files of killed writers, under names that no reader looks at."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(name) for name in names if _is_leftover(name))


def newest_steps(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Of every training inside: the step of the last row, and of the last checkpoint."""
    found = {}
    for path in folder.rglob("metrics.jsonl"):
        rows = artifacts.read_metrics(path)
        saved = artifacts.steps(path.parent / "checkpoints")
        if rows:
            name = str(path.parent.relative_to(folder))
            found[name] = (rows[-1]["step"], max(saved, default=0))
    return found


def _is_skipped(name: pathlib.Path) -> bool:
    return (
        name.name in _SKIPPED_FILES
        or name.suffix in _SKIPPED_SUFFIXES
        or bool(_SKIPPED_FOLDERS & set(name.parts))
        or _is_leftover(name)
    )


def _is_leftover(name: pathlib.Path) -> bool:
    """Writers put files under hidden or temporary names, and move them into place."""
    return name.name not in _SKIPPED_FILES and any(
        part.startswith(".") or ".orbax-checkpoint-tmp" in part for part in name.parts
    )


def _checkpoint_of(folder: pathlib.Path, name: pathlib.Path) -> pathlib.Path | None:
    """The folder of the step that a file belongs to."""
    for parent in name.parents:
        if parent.name.isdigit() and (folder / parent / "meta" / "metadata").is_file():
            return parent
    return None


def _content(path: pathlib.Path, root: str) -> Any:
    if path.suffix == ".hdf5":
        import h5py

        with h5py.File(path) as file:
            return {key: _digest(np.asarray(file[key])) for key in file}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {key: _digest(file[key]) for key in file.files}
    if path.suffix == ".json":
        return _stable(json.loads(path.read_text().replace(root, "<run>")))
    if path.suffix == ".jsonl":
        lines = path.read_text().replace(root, "<run>").splitlines()
        return [_stable(json.loads(line)) for line in lines]
    return hashlib.blake2b(
        path.read_bytes().replace(root.encode(), b"<run>")
    ).hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in _VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _digest(array: np.ndarray) -> str:
    head = f"{array.shape}{array.dtype}".encode()
    return hashlib.blake2b(head + array.tobytes()).hexdigest()
