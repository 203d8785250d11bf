"""Checkpoints that survive ``kill -9`` and tell when they are damaged.

Arrays are written by orbax, one folder per step, under a temporary name until all is
written. Beside them go a digest of every leaf, since a flipped bit restores silently,
and the shapes, so that a checkpoint of another architecture is told apart from a
damaged one. Kept are the newest steps and the one with the best score.

With several processes (``jax.distributed``) all of them call these functions with the
same arguments, on a folder that all see: each writes and reads its own shards, the first
one writes the rest and deletes; what is a process's own has to be the same in all. The
digest is of whole arrays, so a checkpoint can be restored onto any other number of
processes and devices.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from emfuse_jax.artifacts._errors import brief, system_errno
from emfuse_jax.artifacts._leaves import (
    canonical,
    check_architecture,
    describe_leaves,
    placed,
    tree_digest,
)
from emfuse_jax.artifacts._processes import anywhere, leads, wait_for_all
from emfuse_jax.artifacts.config import read_json, to_json

__all__ = [
    "Restored",
    "best_step",
    "delete",
    "delete_after",
    "read_meta",
    "restore",
    "restore_latest",
    "save",
    "steps",
    "tree_digest",
]

_DELETED = ".deleted"


class Restored(NamedTuple):
    """What `restore_latest` found.

    Attributes:
        step: of the newest undamaged checkpoint.
        tree: its arrays, placed as those of the template are.
        damaged: newer steps that could not be read, with the reason.
    """

    step: int
    tree: Any
    damaged: dict[int, str]


def save(
    path: str | os.PathLike[str],
    step: int,
    tree: Any,
    *,
    config: Any = None,
    score: jax.typing.ArrayLike | None = None,
    keep: int = 3,
) -> None:
    """Writes a checkpoint; it is complete on the disk when this returns.

    Args:
        path: the folder of all steps; made if absent.
        step: must be newer than every step there; saving the newest again with the
            same values does nothing.
        tree: any pytree of arrays and numbers, typed keys included.
        config: a dataclass or JSON value to keep with the arrays (see `read_meta`).
        score: higher is better; the best-scored step is never deleted. NaN is no score.
        keep: how many of the newest steps stay.

    Raises:
        ValueError: if a step at least as new is there, or ``keep`` is less than 1.
        OSError: if it could not be written (no room, no right to); what was saved
            before stays as it was.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> path = tempfile.mkdtemp()
        >>> for step, score in [(1, 0.9), (2, 0.1), (3, 0.2)]:
        ...     save(path, step, {"w": jnp.full(2, step)}, score=score, keep=1)
        >>> steps(path)  # the newest, and the best
        [1, 3]
        >>> restore(path, {"w": jnp.zeros(2, jnp.int32)})["w"].tolist()
        [3, 3]
    """
    if keep < 1:
        raise ValueError(f"keep={keep}; expected at least 1")
    folder = pathlib.Path(path).absolute()
    tree = jax.tree.map(canonical, tree)
    number = None if score is None else float(np.asarray(score))
    meta = {
        "step": int(step),
        "score": None if number is None or np.isnan(number) else number,
        "digest": tree_digest(tree),
        "leaves": describe_leaves(tree),
        "config": to_json(config),
    }
    meta["check"] = _meta_digest(meta)
    latest = max(steps(folder), default=-1)
    if latest == step and _readable_meta(folder, step).get("digest") == meta["digest"]:
        return
    if latest >= step:
        raise ValueError(
            f"step {step} is not newer than step {latest} in {folder}; go on from "
            "restore_latest(), or delete_after() the step to go on from"
        )
    _write(folder, step, tree, meta)
    _delete(folder, lambda: set(steps(folder)) - _preserved(folder, keep))


def restore(path: str | os.PathLike[str], like: Any, *, step: int | None = None) -> Any:
    """Reads a checkpoint.

    Args:
        path: the folder given to `save`.
        like: a tree of the same structure, shapes and dtypes (arrays or
            ``jax.eval_shape``'s result); arrays go to its leaves' devices.
        step: which one; None is the newest undamaged one.

    Raises:
        FileNotFoundError: if there is no checkpoint, or not that step.
        ValueError: if the checkpoint is of another architecture (the first leaf that
            differs is named), or the step asked for is damaged.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> path = tempfile.mkdtemp()
        >>> save(path, 1, {"w": jnp.ones(2)})
        >>> restore(path, {"w": jnp.zeros(2)})["w"].tolist()
        [1.0, 1.0]
        >>> restore(path, {"w": jnp.zeros(3)})
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    if step is None:
        found = restore_latest(path, like)
        if found is None:
            raise FileNotFoundError(f"no checkpoint in {path}")
        return found.tree
    folder = pathlib.Path(path).absolute()
    if step not in steps(folder):
        raise FileNotFoundError(
            f"no checkpoint of step {step} in {folder}; there are {steps(folder)}"
        )
    try:
        return _read(folder, step, like)
    except _DamageError as error:
        raise ValueError(
            f"checkpoint {folder / str(step)} is damaged ({error}); the steps there "
            f"are {steps(folder)}"
        ) from error


def restore_latest(
    path: str | os.PathLike[str], like: Any, *, discard_damaged: bool = False
) -> Restored | None:
    """Reads the newest checkpoint whose digest is right.

    Args:
        path: the folder given to `save`.
        like: as in `restore`.
        discard_damaged: delete the damaged steps that are newer, as a run must that is
            going to save those steps again; leave it off where another process writes.

    Returns:
        The step found and its tree, or None where nothing was ever saved.

    Raises:
        ValueError: if the checkpoint is of another architecture, or all are damaged.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> path = pathlib.Path(tempfile.mkdtemp())
        >>> for step in (1, 2):
        ...     save(path, step, {"w": jnp.full(2, float(step))})
        >>> (path / "2" / "meta" / "metadata").write_text("torn")  # a disk that lied
        4
        >>> restore_latest(path, {"w": jnp.zeros(2)}).step
        1
    """
    folder = pathlib.Path(path).absolute()
    damaged: dict[int, str] = {}
    for step in sorted(steps(folder), reverse=True):
        tree, damage = None, None
        try:
            tree = _read(folder, step, like)
        except _DamageError as error:
            damage = str(error)
        if anywhere(damage is not None):
            damaged[step] = damage or "another process could not read it"
            continue
        if discard_damaged:
            delete_after(folder, step)
        return Restored(step, tree, damaged)
    if damaged:
        raise ValueError(f"every checkpoint in {folder} is damaged: {damaged}")
    return None


def steps(path: str | os.PathLike[str]) -> list[int]:
    """The steps that were saved completely, oldest first.

    Example:
        >>> import tempfile
        >>> steps(tempfile.mkdtemp())
        []
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return []
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())


def best_step(path: str | os.PathLike[str]) -> int | None:
    """The step with the highest score, the newest of equals; None if none has one.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> path = tempfile.mkdtemp()
        >>> save(path, 1, {"w": jnp.zeros(2)}, score=0.9)
        >>> save(path, 2, {"w": jnp.ones(2)}, score=0.1)
        >>> best_step(path), steps(path)[-1]
        (1, 2)
    """
    scores = {step: _readable_meta(path, step).get("score") for step in steps(path)}
    scored = [(score, step) for step, score in scores.items() if score is not None]
    return max(scored)[1] if scored else None


def delete_after(path: str | os.PathLike[str], step: int) -> None:
    """Deletes every checkpoint newer than ``step``.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> path = tempfile.mkdtemp()
        >>> for step in (1, 2, 3):
        ...     save(path, step, {"w": jnp.full(2, step)})
        >>> delete_after(path, 1)
        >>> steps(path)
        [1]
    """
    _delete(pathlib.Path(path), lambda: {s for s in steps(path) if s > step})


def delete(path: str | os.PathLike[str], step: int) -> None:
    """Deletes one checkpoint, if it is there.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> path = tempfile.mkdtemp()
        >>> save(path, 1, {"w": jnp.zeros(2)})
        >>> delete(path, 1)
        >>> steps(path)
        []
    """
    _delete(pathlib.Path(path), lambda: {step} & set(steps(path)))


def read_meta(path: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """What was saved beside the arrays.

    Returns:
        A dict with ``step``, ``score``, ``digest``, ``leaves`` and ``config``, and their
        own digest, ``check``.

    Raises:
        FileNotFoundError: if there is no such step.
        ValueError: if the file is damaged.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> path = tempfile.mkdtemp()
        >>> save(path, 1, {"w": jnp.zeros(2)}, config={"rate": 1e-3}, score=0.5)
        >>> meta = read_meta(path, 1)
        >>> meta["config"], meta["score"]
        ({'rate': 0.001}, 0.5)
    """
    file = pathlib.Path(path) / str(step) / "meta" / "metadata"
    meta = read_json(file)
    if not isinstance(meta, dict) or (
        "check" in meta and meta["check"] != _meta_digest(meta)  # older ones have none
    ):
        raise ValueError(
            f"{file}: the digest does not match: it has changed on the disk"
        )
    return meta


def _meta_digest(meta: dict[str, Any]) -> str:
    """Of all but itself: a changed score would choose another best checkpoint."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class _DamageError(Exception):
    """A checkpoint that cannot be read, or whose values are not those saved."""


def _read(folder: pathlib.Path, step: int, like: Any) -> Any:
    import orbax.checkpoint as ocp

    try:
        meta = read_meta(folder, step)
        saved, digest = meta["leaves"], meta["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamageError(brief(error)) from error
    check_architecture(saved, describe_leaves(like), folder / str(step))
    template = jax.tree.map(placed, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder / str(step) / "state", template)
    except Exception as error:  # orbax, tensorstore and zarr raise what they like
        raise _DamageError(brief(error)) from error
    if tree_digest(tree) != digest:
        raise _DamageError("the digest does not match: bits have changed on the disk")
    return tree


def _write(folder: pathlib.Path, step: int, tree: Any, meta: dict[str, Any]) -> None:
    """Writes under a temporary name, which orbax changes when all is on the disk."""
    import orbax.checkpoint as ocp

    if leads():
        folder.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder)
    wait_for_all("cleared")
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)
                ),
            )
    except Exception as error:  # orbax, tensorstore and zarr raise what they like
        # A full disk needs the room for what else is to be written.
        _clear_leftovers(folder)
        if step in steps(folder):
            return
        raise OSError(
            system_errno(error),
            f"checkpoint {folder / str(step)} could not be written ({brief(error)}); "
            f"what was saved before it is whole (steps {steps(folder) or 'none'})",
        ) from error


def _clear_leftovers(folder: pathlib.Path) -> None:
    for leftover in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _preserved(folder: pathlib.Path, keep: int) -> set[int]:
    return {*steps(folder)[-keep:], best_step(folder)} - {None}


def _delete(folder: pathlib.Path, unwanted: Callable[[], set[int]]) -> None:
    if leads():
        trash = folder / _DELETED
        for step in sorted(unwanted()):
            # Renamed first: a kill in the middle leaves no half of a checkpoint behind.
            trash.mkdir(exist_ok=True)
            os.replace(folder / str(step), trash / f"{step}-{os.getpid()}")
        shutil.rmtree(trash, ignore_errors=True)
    wait_for_all("deleted")


def _readable_meta(path: str | os.PathLike[str], step: int) -> dict[str, Any]:
    try:
        return read_meta(path, step)
    except (OSError, ValueError):
        return {}
