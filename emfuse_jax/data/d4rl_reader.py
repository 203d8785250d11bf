"""HDF5 files in D4RL's layout: one array per key, one row per step.

Keys: ``observations``, ``actions``, ``rewards``, ``terminals``, ``timeouts`` and, in
some files only, ``next_observations``. Ours add ``qpos`` and ``qvel`` (float64), the
simulator's state before each step, and attributes that say how the file was made.

Reference: Fu et al., "D4RL", 2020, https://arxiv.org/abs/2004.07219.
"""

import io
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from emfuse_jax.data._hdf5 import (
    RefusedError,
    check_sizes,
    import_h5py,
    own_entry,
)
from emfuse_jax.data.dataset import Dataset, make_dataset

KEYS = (
    "observations",
    "actions",
    "rewards",
    "next_observations",
    "terminals",
    "timeouts",
)


def read_d4rl(path: str | pathlib.Path, *, min_length: int = 1) -> Dataset:
    """Reads a file as a checked `Dataset`.

    Where a file has no ``next_observations``, they are the next row's observations. The
    last step of an episode has none, so it is left out, and with it the knowledge of
    how the episode ended: such data teach no termination.

    Args:
        path: the file.
        min_length: the shortest episode that the caller can use.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is not a whole HDF5 file, or for what `make_dataset` refuses.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.data import linear_gaussian
        >>> path = tempfile.mkdtemp() + "/data.hdf5"
        >>> dataset, _ = linear_gaussian(num_episodes=2, length=10)
        >>> write_d4rl(path, dataset_arrays(dataset))
        >>> int(read_d4rl(path).age.max())
        9
    """
    arrays = read_arrays(path)
    given = {key: arrays.get(key) for key in KEYS}
    if given["next_observations"] is None and all(
        given[key] is not None for key in KEYS if key != "next_observations"
    ):
        given = _derive_next(given, str(path))
    return make_dataset(**given, min_length=min_length, source=str(path))


def read_arrays(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of numbers at the top of the file, by name, unchecked.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is not a whole HDF5 file.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.data import linear_gaussian
        >>> path = tempfile.mkdtemp() + "/data.hdf5"
        >>> write_d4rl(path, dataset_arrays(linear_gaussian(num_episodes=2, length=10)[0]))
        >>> read_arrays(path)["actions"].shape
        (20, 2)
    """
    h5py = import_h5py()
    if not pathlib.Path(path).is_file():
        beside = sorted(p.name for p in pathlib.Path(path).parent.glob("*.hdf5"))
        raise FileNotFoundError(
            f"no file {str(path)!r} (data sets in that folder: "
            f"{', '.join(beside[:20]) or 'none'}); check the path, or make data with "
            "python -m experiments.collect_data"
        )
    try:
        with h5py.File(path, "r") as file:
            found = _datasets(file)
            check_sizes(path, found.values())
            return {key: np.asarray(dataset[()]) for key, dataset in found.items()}
    except RefusedError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # h5py raises what it likes on damaged files
        raise ValueError(
            f"{path}: not a whole HDF5 file, truncated perhaps ({error}); copy or "
            "download it again"
        ) from error


def read_attributes(path: str | pathlib.Path) -> dict[str, Any]:
    """The file's attributes: how it was made.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.data import linear_gaussian
        >>> path = tempfile.mkdtemp() + "/data.hdf5"
        >>> arrays = dataset_arrays(linear_gaussian(num_episodes=2, length=10)[0])
        >>> write_d4rl(path, arrays, attributes={"seed": 3})
        >>> int(read_attributes(path)["seed"])
        3
    """
    h5py = import_h5py()
    try:
        with h5py.File(path, "r") as file:
            return {name: _attribute(file.attrs, name) for name in file.attrs}
    except FileNotFoundError:
        raise
    except Exception as error:  # as above
        raise OSError(f"{path}: attributes cannot be read ({error})") from error


def write_d4rl(
    path: str | pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    *,
    attributes: Mapping[str, str | float | int] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a file in D4RL's layout, whole or not at all.

    It is written beside its place and moved there, so that a reader never sees half a
    file and an interrupted writer leaves an older file as it was.

    Args:
        path: where; missing folders are made.
        arrays: the keys of `read_d4rl` and any others.
        attributes: how the data were made.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: if the file exists and ``overwrite`` is false.
        OSError: if there is no room for it, or no right to write; nothing has changed then.
        ValueError: if the arrays are not data that `read_d4rl` would accept.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.data import linear_gaussian
        >>> path = tempfile.mkdtemp() + "/data.hdf5"
        >>> dataset, _ = linear_gaussian(num_episodes=2, length=10)
        >>> write_d4rl(path, dataset_arrays(dataset), attributes={"policy": "random"})
        >>> read_d4rl(path).observation.shape
        (20, 3)
    """
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists; choose another name, delete it, or ask to overwrite it"
        )
    given: dict[str, Any] = {key: arrays.get(key) for key in KEYS}
    make_dataset(**given, source=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = _image(arrays, attributes or {})
    # Not tempfile, whose files only their owner may read.
    partial = path.with_name(f".{path.name}-{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(image.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _image(
    arrays: Mapping[str, np.ndarray], attributes: Mapping[str, str | float | int]
) -> io.BytesIO:
    """The file, made in memory: HDF5 ends the process where a disk is full."""
    h5py = import_h5py()
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(
                key,
                data=value,
                compression="gzip",
                compression_opts=4,
                shuffle=True,
            )
        for name, value in attributes.items():
            # A string of fixed length: see `_attribute`.
            fixed = np.bytes_(value.encode()) if isinstance(value, str) else value
            file.attrs[name] = fixed
    return image


def dataset_arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    """A `Dataset` under D4RL's keys, for `write_d4rl`.

    Example:
        >>> from emfuse_jax.data import linear_gaussian
        >>> sorted(dataset_arrays(linear_gaussian(num_episodes=2, length=10)[0]))[:3]
        ['actions', 'next_observations', 'observations']
    """
    return {
        "observations": np.asarray(dataset.observation),
        "actions": np.asarray(dataset.action),
        "rewards": np.asarray(dataset.reward),
        "next_observations": np.asarray(dataset.next_observation),
        "terminals": np.asarray(dataset.terminated),
        "timeouts": np.asarray(dataset.truncated),
    }


def _datasets(file: Any) -> dict[str, Any]:
    """The arrays at the top that lie in this very file, without texts.

    Values of variable length lie in a heap in which libhdf5 loops for ever where the file
    is damaged.
    """
    h5py = import_h5py()
    entries = {key: own_entry(file, key) for key in file}
    arrays = {k: v for k, v in entries.items() if isinstance(v, h5py.Dataset)}
    texts = [key for key in KEYS if key in arrays and arrays[key].dtype.hasobject]
    if texts:
        raise RefusedError(
            f"{texts[0]!r} holds no numbers; write it as an array of them"
        )
    return {k: v for k, v in arrays.items() if not v.dtype.hasobject}


def _attribute(attributes: Any, name: str) -> Any:
    """A number or a text of fixed length; others lie in the heap that `_datasets` avoids."""
    if attributes.get_id(name).dtype.hasobject:
        raise RefusedError(f"{name!r} has no fixed length")
    value = attributes[name]
    return value.decode() if isinstance(value, np.bytes_) else value


def _derive_next(given: dict[str, Any], source: str) -> dict[str, Any]:
    # Checked as a whole first, so that errors name the file's own rows.
    checked = {**given, "next_observations": given["observations"]}
    data = make_dataset(**checked, source=source)
    last = data.terminated | data.truncated
    keep = np.flatnonzero(~last)
    return {
        "observations": data.observation[keep],
        "actions": data.action[keep],
        "rewards": data.reward[keep],
        "next_observations": data.observation[keep + 1],
        "terminals": np.zeros(len(keep), bool),
        "timeouts": last[keep + 1],
    }
