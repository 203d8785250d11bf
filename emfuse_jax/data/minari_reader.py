"""Minari data sets: read by id (local, or downloaded when there is a network), written.

Minari keeps its data sets under ``$MINARI_DATASETS_PATH``, or ``~/.minari/datasets``;
every function takes another ``root``. Remote ids look like ``mujoco/hopper/medium-v0``;
these are Farama's own recordings, not D4RL's files.

Reference: https://minari.farama.org.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from emfuse_jax.data._hdf5 import RefusedError, check_nested
from emfuse_jax.data.dataset import Dataset, episode_bounds, make_dataset

_PATH_VARIABLE = "MINARI_DATASETS_PATH"
_PER_STEP = ("rewards", "terminations", "truncations")
_EPISODE_BYTES = 2**14  # what an episode's groups and headers take
_NETWORK_VARIABLES = ("MINARI_REMOTE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy")


def read_minari(
    dataset_id: str, *, root: str | pathlib.Path | None = None, min_length: int = 1
) -> Dataset:
    """Reads a data set; if it is not local, downloads it first.

    Args:
        dataset_id: such as ``mujoco/hopper/medium-v0``.
        root: Minari's folder; its own default where None.
        min_length: the shortest episode that the caller can use.

    Raises:
        FileNotFoundError: if it is neither local nor can be had; names the local ones.
        ValueError: if the local copy is damaged, or its arrays lie elsewhere, if
            observations or actions are not flat boxes, or for what `make_dataset` refuses.
    """
    minari = _import_minari()
    with _minari_root(root) as folder:
        if not (folder / dataset_id / "data").is_dir():
            _download(minari, dataset_id, folder)
        try:
            _check_files(folder / dataset_id / "data")
            episodes = list(minari.load_dataset(dataset_id).iterate_episodes())
        except ImportError:  # of what a format needs
            raise
        except Exception as error:  # minari and h5py raise what they like on damage
            raise ValueError(
                f"{dataset_id}: the local copy in {folder} cannot be read ({error}); "
                "delete that folder and fetch the data set again"
            ) from error
    _check_episodes(dataset_id, episodes)
    timeouts = [_ends(episode.truncations) for episode in episodes]
    return make_dataset(
        observations=np.concatenate([e.observations[:-1] for e in episodes]),
        actions=np.concatenate([e.actions for e in episodes]),
        rewards=np.concatenate([e.rewards for e in episodes]),
        next_observations=np.concatenate([e.observations[1:] for e in episodes]),
        terminals=np.concatenate([e.terminations for e in episodes]),
        timeouts=np.concatenate(timeouts),
        min_length=min_length,
        source=dataset_id,
    )


def write_minari(
    dataset: Dataset,
    dataset_id: str,
    *,
    root: str | pathlib.Path | None = None,
    reference: tuple[float, float] | None = None,
    overwrite: bool = False,
    **metadata: Any,
) -> pathlib.Path:
    """Writes a `Dataset` as a Minari data set (HDF5), whole or not at all.

    Args:
        dataset: the data; every row must be followed by its ``next_observation``, since
            Minari stores an episode's observations once.
        dataset_id: such as ``mine/hopper/medium-v0``.
        root: Minari's folder; its own default where None.
        reference: random and expert returns, for Minari's normalised scores.
        overwrite: whether an existing data set may be replaced.
        metadata: further arguments of ``minari.create_dataset_from_buffers`` (author,
            description, algorithm_name, …).

    Returns:
        The data set's folder.

    Raises:
        FileExistsError: if it exists and ``overwrite`` is false.
        OSError: if there is no room for it.
        ValueError: if the id is not one, or the episodes are not sequences.
    """
    minari = _import_minari()
    _check_id(dataset_id)
    buffers = _episode_buffers(dataset)
    options: dict[str, Any] = {**_spaces(dataset), **metadata}
    if reference is not None:
        options["ref_min_score"], options["ref_max_score"] = reference
    with _minari_root(root) as folder:
        target = folder / dataset_id
        if target.exists() and not overwrite:
            raise FileExistsError(
                f"{target} exists; choose another id or version, delete it, or ask to "
                "overwrite it"
            )
        _check_room(folder, target, buffers)
        # Hidden folders are not listed, so an interrupted write leaves no half data
        # set.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            with _minari_root(partial):
                minari.create_dataset_from_buffers(dataset_id, buffers, **options)
            _move(pathlib.Path(partial), folder, dataset_id)
    return target


def local_datasets(root: str | pathlib.Path | None = None) -> list[str]:
    """Ids of the data sets that are on this machine."""
    with _minari_root(root):
        return sorted(_import_minari().list_local_datasets())


def _check_files(data: pathlib.Path) -> None:
    """Before Minari opens them: episodes that are not there, and arrays that lead out of
    the file or claim to be far larger than it."""
    told = json.loads((data / "metadata.json").read_text())["total_episodes"]
    for path in data.glob("*.hdf5"):
        count = check_nested(path)
        if told > count:
            raise RefusedError(
                f"metadata.json tells of {told} episodes, {path.name} has {count}"
            )


def _check_episodes(dataset_id: str, episodes: list[Any]) -> None:
    if not episodes:
        raise ValueError(f"{dataset_id}: no episodes")
    for number, episode in enumerate(episodes):
        for name in ("observations", "actions"):
            value = getattr(episode, name)
            if not isinstance(value, np.ndarray) or value.ndim != 2:
                raise ValueError(
                    f"{dataset_id}: {name} are {type(value).__name__}"
                    f"{getattr(value, 'shape', '')}; expected flat vectors [steps, size]. "
                    "Flatten that space and write the data set again"
                )
        steps = len(episode.actions)
        lengths = {
            "observations": len(episode.observations) - 1,
            **{n: np.shape(getattr(episode, n)) for n in _PER_STEP},
        }
        expected = {"observations": steps, **dict.fromkeys(_PER_STEP, (steps,))}
        if steps < 1 or lengths != expected:
            raise ValueError(
                f"{dataset_id}: episode {number} has {steps} actions, "
                f"{len(episode.observations)} observations and "
                f"{', '.join(f'{n} {lengths[n]}' for n in _PER_STEP)}; expected one number "
                "per action, and one observation more"
            )


def _download(minari: Any, dataset_id: str, folder: pathlib.Path) -> None:
    # One failed attempt to connect is known in seconds; the client retries for half a
    # minute. Where a proxy or a mirror is set, only the client can know.
    configured = any(os.environ.get(name) for name in _NETWORK_VARIABLES)
    try:
        if not configured:
            socket.create_connection(("huggingface.co", 443), timeout=3.0).close()
        minari.download_dataset(dataset_id)
    except Exception as error:  # The client's own types are not importable everywhere.
        local = ", ".join(sorted(minari.list_local_datasets())) or "none"
        raise FileNotFoundError(
            f"data set {dataset_id!r} is not in {folder} and could not be downloaded "
            f"({type(error).__name__}: {error}). Local data sets: {local}. Check the "
            "id; "
            'with a network, pip install "minari[hf]" and try again; without one, copy '
            f"the data set's folder to {folder / dataset_id}, or make data with "
            "python -m experiments.collect_data"
        ) from error


def _ends(truncations: np.ndarray) -> np.ndarray:
    """Every episode ends at its last step, whether or not the recording says so."""
    ends = np.array(truncations, bool)
    ends[-1] = True
    return ends


def _episode_buffers(dataset: Dataset) -> list[Any]:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    buffers = []
    for index, (start, end) in enumerate(zip(*episode_bounds(dataset), strict=True)):
        observations = np.asarray(dataset.observation[start:end])
        following = np.asarray(dataset.next_observation[start:end])
        jumps = np.flatnonzero((observations[1:] != following[:-1]).any(axis=1))
        if len(jumps):
            raise ValueError(
                f"row {start + jumps[0]}: next_observation is not the following row's "
                "observation inside an episode; Minari cannot hold that, use D4RL's "
                "layout"
            )
        # Any: annotated as lists, stored as the arrays that are given.
        arrays: dict[str, Any] = {
            "observations": np.concatenate([observations, following[-1:]]),
            "actions": np.asarray(dataset.action[start:end]),
            "rewards": np.asarray(dataset.reward[start:end]),
            "terminations": np.asarray(dataset.terminated[start:end]),
            "truncations": np.asarray(dataset.truncated[start:end]),
        }
        buffers.append(EpisodeBuffer(id=index, **arrays))
    return buffers


def _check_room(folder: pathlib.Path, target: pathlib.Path, buffers: list[Any]) -> None:
    """Beforehand: where a disk is full, HDF5 ends the process instead of raising."""
    names = ("observations", "actions", *_PER_STEP)
    size = sum(np.asarray(getattr(b, name)).nbytes for b in buffers for name in names)
    needed = size + _EPISODE_BYTES * len(buffers)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{needed} bytes are needed and {free} are free", str(target)
        )


def _spaces(dataset: Dataset) -> dict[str, Any]:
    from gymnasium.spaces import Box

    observation_size = dataset.observation.shape[1]
    return {
        "observation_space": Box(-np.inf, np.inf, (observation_size,), np.float32),
        "action_space": Box(-1.0, 1.0, (dataset.action.shape[1],), np.float32),
    }


def _check_id(dataset_id: str) -> None:
    from minari.dataset.minari_dataset import parse_dataset_id

    if not re.search(r"-v\d+$", dataset_id):
        raise ValueError(f"{dataset_id!r} has no version; write {dataset_id}-v0")
    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        raise ValueError(f"{dataset_id!r} is no Minari id: {error}") from error


def _move(partial: pathlib.Path, folder: pathlib.Path, dataset_id: str) -> None:
    """Moves the finished data set into place, with the namespaces that it is new to."""
    for metadata in partial.rglob("namespace_metadata.json"):
        place = folder / metadata.relative_to(partial)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copy(metadata, place)
    target = folder / dataset_id
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial / dataset_id, target)


@contextlib.contextmanager
def _minari_root(root: str | pathlib.Path | None) -> Iterator[pathlib.Path]:
    """Points Minari at ``root``: an environment variable is the only way to tell it."""
    before = os.environ.get(_PATH_VARIABLE)
    if root is not None:
        os.environ[_PATH_VARIABLE] = str(root)
    try:
        from minari.storage import get_dataset_path

        yield pathlib.Path(get_dataset_path(""))
    finally:
        if before is None:
            os.environ.pop(_PATH_VARIABLE, None)
        else:
            os.environ[_PATH_VARIABLE] = before


def _import_minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError(
            'Minari data sets need minari; pip install "minari[hdf5]"'
        ) from error
    return minari
