"""What is looked at before any array of an HDF5 file is read.

A few bytes can claim to be an array of terabytes, or lead to any other file.
"""

import pathlib
from collections.abc import Iterable
from typing import Any

# Arrays may take this many bytes, and more by this factor on the file's own size.
_ROOM, _RATIO = 2**26, 200


class RefusedError(Exception):
    """Something that a file of data has no need of, and that could do harm."""


def own_entry(group: Any, key: str) -> Any:
    """What a group holds under a name: a group, or an array that lies in this very file.

    Raises:
        RefusedError: for links, and for arrays whose values lie elsewhere.
    """
    h5py = import_h5py()
    if not isinstance(group.get(key, getlink=True), h5py.HardLink):
        raise RefusedError(
            f"{key!r} is a link; copy the array that it points to into the file"
        )
    value = group[key]
    if isinstance(value, h5py.Dataset) and (value.is_virtual or value.external):
        raise RefusedError(
            f"the values of {key!r} lie in other files; copy them into this one"
        )
    return value


def check_sizes(path: str | pathlib.Path, arrays: Iterable[Any]) -> None:
    """To be called before anything is allocated.

    Raises:
        RefusedError: if the arrays claim to be far larger than the file.
    """
    size = sum(int(array.size or 0) * array.dtype.itemsize for array in arrays)
    stored = pathlib.Path(path).stat().st_size
    if size > _ROOM + _RATIO * stored:
        raise RefusedError(
            f"its arrays claim {size} bytes, the file has {stored}; it is damaged, or "
            "compressed beyond what data are"
        )


def check_nested(path: str | pathlib.Path) -> int:
    """Looks at a whole file of groups, as Minari's are; how many there are at its top.

    Raises:
        RefusedError: as `own_entry` and `check_sizes`.
    """
    h5py = import_h5py()
    with h5py.File(path, "r") as file:
        seen, arrays, waiting = set(), [], [file]
        while waiting:
            group = waiting.pop()
            for key in group:
                value = own_entry(group, key)
                # One object may have many names, and lie inside of itself.
                address = h5py.h5o.get_info(value.id).addr
                if address in seen:
                    raise RefusedError(f"{key!r} is in the file twice; keep one copy")
                seen.add(address)
                if isinstance(value, h5py.Group):
                    waiting.append(value)
                elif isinstance(value, h5py.Dataset):
                    arrays.append(value)
        check_sizes(path, arrays)
        return len(file)


def import_h5py() -> Any:
    """The package, or an error that says how it is had."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "HDF5 files need h5py; pip install h5py, or use --format=minari"
        ) from error
    return h5py
