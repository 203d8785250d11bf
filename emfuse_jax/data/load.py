"""One door to the readers."""

import pathlib

from emfuse_jax.data.d4rl_reader import read_d4rl
from emfuse_jax.data.dataset import Dataset
from emfuse_jax.data.minari_reader import read_minari

FORMATS = ("d4rl", "minari")


def load_dataset(
    source: str | pathlib.Path,
    *,
    format: str | None = None,
    root: str | pathlib.Path | None = None,
    min_length: int = 1,
) -> Dataset:
    """Reads a data set: a D4RL-layout HDF5 file, or a Minari id.

    Args:
        source: a path (``data/hopper.hdf5``) or an id (``mujoco/hopper/medium-v0``).
        format: ``"d4rl"`` or ``"minari"``; where None, a file or a name that ends as
            HDF5 files do is D4RL, everything else Minari.
        root: the folder that the path or id is relative to; the working directory, or
            Minari's own folder, where None.
        min_length: the shortest episode that the caller can use.

    Raises:
        FileNotFoundError: if there is no such data set.
        ValueError: for an unknown format, or data that are not usable; see
            `make_dataset`.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.data.d4rl_reader import dataset_arrays, write_d4rl
        >>> from emfuse_jax.data.synthetic import linear_gaussian
        >>> folder = tempfile.mkdtemp()
        >>> dataset, _ = linear_gaussian(num_episodes=2, length=10)
        >>> write_d4rl(f"{folder}/data.hdf5", dataset_arrays(dataset))
        >>> load_dataset("data.hdf5", root=folder).reward.shape
        (20,)
    """
    if format is None:
        path = pathlib.Path(root or ".") / source
        suffixes = (".hdf5", ".h5")
        format = "d4rl" if path.suffix in suffixes or path.is_file() else "minari"
    if format == "d4rl":
        return read_d4rl(pathlib.Path(root or ".") / source, min_length=min_length)
    if format == "minari":
        return read_minari(str(source), root=root, min_length=min_length)
    raise ValueError(f"format={format!r}; expected one of {', '.join(FORMATS)}")
