"""Which devices a command trains on: ``--devices=one``, ``all`` or ``hosts``.

With ``hosts`` the same command runs in several processes, which ``jax.distributed`` joins.
Every one of them does the same on the same data, each device with its share of every
batch's rows, and the numbers are those of one device up to rounding. The first process has
the run directory; the others work in a temporary one beside it, share its checkpoints and
write nothing else.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from emfuse_jax.parallel import (
    barrier,
    data_parallel,
    initialize_if_requested,
    is_coordinator,
    make_mesh,
    replicate,
)

CHOICES = "one, all, hosts, or hosts,ADDRESS:PORT,PROCESSES,NUMBER"

_MESH: list[Mesh] = []


@contextlib.contextmanager
def chosen(choice: str, *, rolls_back: bool = False) -> Iterator[None]:
    """Inside, `place` puts training on the devices of a ``--devices`` flag.

    Args:
        choice: ``one``; ``all`` of this process; ``hosts``: of all processes, which SLURM,
            GKE, TPU pods and Open MPI tell of, and elsewhere
            ``hosts,ADDRESS:PORT,PROCESSES,NUMBER`` (of process 0; how many; which one).
        rolls_back: whether diverged training is tried again, which several processes
            cannot.

    Raises:
        ValueError: for anything else, or if there is no cluster to ask.
        RuntimeError: if jax has already computed something.
    """
    kind, *place = choice.split(",")
    if kind == "one" and not place:
        yield
        return
    if kind == "hosts" and len(place) in (0, 3):
        _join(*place)
    elif choice != "all":
        raise ValueError(f"devices={choice!r}; expected {CHOICES}")
    if rolls_back and jax.process_count() > 1:
        raise ValueError("several processes cannot roll back; use --on_divergence=stop")
    _MESH.append(make_mesh({"data": -1}))
    try:
        with _quiet():
            yield
        # Whoever ends first takes the connection with it.
        barrier("the command is done")
    finally:
        _MESH.pop()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only the first process tells what it does; what ends a process is told outside."""
    if is_coordinator():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _join(address: str | None = None, count: str = "", number: str = "") -> None:
    try:
        numbers = [int(count), int(number)] if address else [None, None]
    except ValueError as error:
        raise ValueError(
            f"devices=hosts,{address},{count},{number}; expected {CHOICES}"
        ) from error
    initialize_if_requested(
        True,
        coordinator_address=address,
        num_processes=numbers[0],
        process_id=numbers[1],
    )


def place(learner: Any, state: Any, data: Any, batch_axes: Any) -> tuple[Any, Any, Any]:
    """A learner, its state and its data on the chosen devices.

    Args:
        learner: anything with ``update(key, state, batch)``.
        state: its state.
        data: what batches are drawn from; every device holds it whole, so that all draw
            the same rows.
        batch_axes: which axis of each batch leaf counts rows (see `data_parallel`).
    """
    if not _MESH:
        return learner, state, data
    (mesh,) = _MESH
    learner = data_parallel(learner, mesh, batch_axes=batch_axes)
    return learner, replicate(state, mesh), replicate(data, mesh)


def own(state: Any) -> Any:
    """A placed state as this process alone has it, on its first device."""
    if not _MESH:
        return state
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), state)


def anywhere(flag: bool) -> bool:
    """Whether it holds in any process; the same answer in all."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def open_together(open_fn: Callable[[pathlib.Path], Any], path: pathlib.Path) -> Any:
    """The first process opens a run directory; the others a copy of their own.

    Args:
        open_fn: opens a run at a path.
        path: of the run directory, which all processes see.

    Raises:
        ValueError: in the other processes, if the first one could not open it.
    """
    if jax.process_count() == 1:
        return open_fn(path)
    run, error = None, None
    if is_coordinator():
        try:
            run = open_fn(path)
        except Exception as raised:
            error = raised
    failed = anywhere(error is not None)
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"the first process could not open {path}; it says why")
    if run is None:
        folder = tempfile.TemporaryDirectory(prefix="emfuse-jax-")
        # What a resumed run has found out: not the lock, nor what is being written.
        for file in path.glob("[!.]*.json*"):
            shutil.copy(file, folder.name)
        run = open_fn(pathlib.Path(folder.name))
        run.folder = folder  # goes when the run goes
        run.checkpoints = path / "checkpoints"
        (run.path / "checkpoints").symlink_to(run.checkpoints)
    return run
