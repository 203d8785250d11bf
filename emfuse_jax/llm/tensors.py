"""The safetensors file format, read from the disk's pages and checked before it is used.

A file is eight bytes of header length, a JSON header with a dtype, a shape and a byte range
per tensor, and the bytes (https://github.com/huggingface/safetensors, "Format"). Every
length in the header comes from whoever wrote the file: all of them are compared with each
other and with the size of the file before anything is read or allocated by them.

Reading is done here because bfloat16 is not a dtype of numpy's, and the package's own
numpy reader fails on it; ``ml_dtypes``, which jax brings, has it.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from emfuse_jax.llm._files import parse_object, replace_file

_MAX_HEADER = 100_000_000  # the reference reader's limit
_METADATA = "__metadata__"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as read-only views of the mapped file.

    Nothing is read until an array is used. Copy what must outlive the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, or its header is not what the format allows;
            the text names the file and the tensor.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> write_tensors(path, {"w": np.arange(3.0)})
        >>> read_tensors(path)["w"].tolist()
        [0.0, 1.0, 2.0]
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    entries, start = _read_header(path)
    data = np.memmap(path, np.uint8, mode="r")
    return {
        name: data[start + entry.begin : start + entry.end]
        .view(entry.dtype)
        .reshape(entry.shape)
        for name, entry in entries.items()
    }


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    """Writes a file that every reader of the format reads; whole or not at all.

    Args:
        path: the file; its folder must exist.
        tensors: arrays by name; each is brought to the host when its turn comes.

    Raises:
        ValueError: for a dtype that the format does not have.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> write_tensors(path, {"w": np.ones((2, 3), np.float32)})
        >>> read_tensors(path)["w"].shape
        (2, 3)
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}  # transformers wants it
    offset = 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        if dtype not in _NAMES:
            raise ValueError(
                f"tensor {name} is {dtype}; expected one of {', '.join(map(str, _NAMES))}"
            )
        size = math.prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size

    def chunks() -> Iterator[bytes | memoryview]:
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that every tensor starts aligned
        yield struct.pack("<Q", len(text))
        yield text
        for tensor in tensors.values():
            array = np.ascontiguousarray(tensor)
            yield array.reshape(-1).view(np.uint8).data

    replace_file(pathlib.Path(path), chunks())


def _read_header(path: pathlib.Path) -> tuple[dict[str, _Entry], int]:
    """The checked entries, and where in the file their bytes start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(
                f"{path} is truncated: it has {size} bytes, and a safetensors file has more "
                "than 8; download or save it again"
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path}: the header's length is given as {length} bytes, but the file has "
                f"{size} and headers at most {_MAX_HEADER}; it is truncated, or not a "
                "safetensors file"
            )
        header = parse_object(file.read(length), f"{path}: the header")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: {_METADATA} is {metadata!r}; expected an object")
    entries = {
        name: _check_entry(f"{path}: tensor {name!r}", entry)
        for name, entry in header.items()
    }
    _check_ranges(path, entries, size - 8 - length)
    return entries, 8 + length


def _check_entry(where: str, entry: Any) -> _Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{where} is {str(entry)[:100]}; expected dtype, shape and data_offsets"
        )
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(
            f"{where} has dtype {name!r}; expected one of {', '.join(_DTYPES)} (quantised "
            "weights are not supported)"
        )
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(
            f"{where} has shape {str(shape)[:100]} and data_offsets {str(offsets)[:100]}; "
            "expected a list of sizes and a pair of them"
        )
    dtype, (begin, end) = _DTYPES[name], offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise ValueError(
            f"{where} of shape {shape} and dtype {name} needs {needed} bytes, but "
            f"data_offsets {offsets} are {end - begin} apart"
        )
    return _Entry(dtype, tuple(shape), begin, end)


def _check_ranges(path: pathlib.Path, entries: dict[str, _Entry], size: int) -> None:
    """The ranges must cover the file's bytes once each, as the format says."""
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name!r} ends at byte {entry.end} of the data, "
                f"and there are {size}; download or save it again"
            )
        if entry.begin != reached:
            raise ValueError(
                f"{path}: tensor {name!r} starts at byte {entry.begin} of the data; expected "
                f"{reached}, where the one before it ends"
            )
        reached = entry.end
    if reached != size:
        raise ValueError(
            f"{path}: the tensors end at byte {reached} of the data, and there are {size}"
        )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and item >= 0 for item in value
    )
