"""The safetensors reader, beside the reference one and on files that lie."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from emfuse_jax.llm.tensors import read_tensors, write_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2.0, np.nan], ml_dtypes.bfloat16),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(7, np.int64),
    "flags": np.array([True, False]),
}


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()


def test_round_trip(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert_same(read_tensors(tmp_path / "x.safetensors"), TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_reference_reader_and_writer_agree(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    assert_same(reference.load_file(path), TENSORS)
    reference.save_file(TENSORS, path, metadata={"format": "np"})
    assert_same(read_tensors(path), TENSORS)


def test_unaligned_data_is_read(tmp_path):
    data = np.array([3.0, 4.0], np.float32).tobytes()
    for pad in range(8):
        path = write(
            tmp_path / "x", json.dumps({"a": entry()}).encode() + b" " * pad, data
        )
        np.testing.assert_array_equal(np.array(read_tensors(path)["a"]), [3.0, 4.0])


def test_nothing_is_read_before_it_is_used(tmp_path):
    """The file's pages are mapped: 64 MB of zeros cost nothing until copied."""
    path = tmp_path / "x"
    size = 2**26
    write(path, {"a": entry("U8", (size,), (0, size))})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    tracemalloc.start()
    tensor = read_tensors(path)["a"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensor.shape == (size,)
    assert peak < 2**20


HUGE = 2**62
HOSTILE = {
    "no header": (b"", "truncated", 0),
    "a length beyond the file": (b"{}", "length is given as 4611686018427387904", HUGE),
    "not JSON": (b"{nope", "is not JSON", None),
    "not UTF-8": (b"\xff\xfe", "is not JSON", None),
    "not an object": (b"[1]", "holds a list", None),
    "brackets without end": (b"[" * 100_000, "is not JSON", None),
    "a name given twice": (b'{"a": 1, "a": 2}', "'a' is given twice", None),
    "an entry that is none": ({"a": [1, 2]}, "tensor 'a'.*expected dtype, shape", None),
    "an unknown dtype": ({"a": entry("F8_E4M3")}, "dtype 'F8_E4M3'.*quantised", None),
    "a dtype that is no name": ({"a": entry([])}, "tensor 'a' has dtype", None),
    "a negative size": ({"a": entry(shape=(-2,))}, "list of sizes", None),
    "a size that is true": ({"a": entry(shape=(True,))}, "list of sizes", None),
    "a fractional size": ({"a": entry(shape=(2.0,))}, "list of sizes", None),
    "one offset": ({"a": entry(offsets=(0,))}, "a pair of them", None),
    "a shape of more bytes than the range": (
        {"a": entry(shape=(HUGE, HUGE))},
        "needs 8507059173023461586",
        None,
    ),
    "a range backwards": ({"a": entry(offsets=(8, 0))}, "are -8 apart", None),
    "a range beyond the file": (
        {"a": entry(shape=(HUGE // 4,), offsets=(0, HUGE))},
        "truncated: tensor 'a' ends at byte 4611686018427387904",
        None,
    ),
    "a range over another": (
        {"a": entry(), "b": entry()},
        "tensor 'b' starts at byte 0 of the data; expected 8",
        None,
    ),
    "a hole": ({"a": entry(shape=(1,), offsets=(4, 8))}, "expected 0", None),
    "bytes of nobody": (
        {"a": entry(shape=(1,), offsets=(0, 4))},
        "end at byte 4",
        None,
    ),
    "metadata that is none": ({"__metadata__": 3, "a": entry()}, "__metadata__", None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_before_anything_is_allocated(tmp_path, case):
    header, text, length = HOSTILE[case]
    path = write(tmp_path / "x.safetensors", header, b"\0" * 8, length)
    if case == "no header":
        path.write_bytes(b"\0" * 7)
    tracemalloc.start()
    with pytest.raises(ValueError, match=text) as caught:
        read_tensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "x.safetensors" in str(caught.value)
    assert peak < 2**22


def test_every_truncation_is_refused(tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "cut"
    write_tensors(whole, TENSORS)
    data = whole.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"truncated|is not JSON"):
            read_tensors(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="the tensors end at byte"):
        read_tensors(path)


def test_a_missing_file_and_an_unknown_dtype(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="tensor c is complex64"):
        write_tensors(tmp_path / "x", {"c": np.zeros(2, np.complex64)})
    assert list(tmp_path.iterdir()) == []
