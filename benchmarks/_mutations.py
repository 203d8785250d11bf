"""Damaged and hostile files out of whole ones: bytes, JSON values, arrays of archives.

Everything is drawn from a generator, so that a seed and an index name an input.
"""

import io
import json
import struct
import zipfile
from typing import Any

import numpy as np

_NUMBERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32]
_NUMBERS += [2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30]
_VALUES: list[Any] = [
    *(None, True, False, "", "x", "../../etc/passwd", "/etc/passwd", "\ud800", "é\0"),
    *(0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), [], {}, [[]], {"a": {}}),
    *(["x"] * 3, [1, 2, 3], [-1], [2**40, 2**40], "x" * 1000),
]


def damage_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """One to four changes: bits, bytes, numbers, cuts, repeats, text that is elsewhere."""
    changed = bytearray(data)
    for _ in range(1 + rng.geometric(0.5)):
        size = len(changed)
        at = int(rng.integers(0, size + 1))
        length = int(min(rng.geometric(0.1), size - at))
        kind = rng.integers(0, 8)
        if kind == 0 and at < size:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and at < size:
            changed[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF]))
        elif kind == 2:
            width, sign = rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
            number = _NUMBERS[int(rng.integers(0, len(_NUMBERS)))] % 256 ** int(width)
            changed[at : at + width] = number.to_bytes(int(width), str(sign))
        elif kind == 3:
            del changed[at:]
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            changed[at:at] = changed[at : at + length] * int(rng.integers(1, 50))
        elif kind == 6:
            changed[at:at] = rng.bytes(length)
        elif size:
            other = int(rng.integers(0, size))
            changed[at : at + length] = changed[other : other + length]
    return bytes(changed)


def damage_value(rng: np.random.Generator, value: Any) -> Any:
    """A JSON value with one to three places changed, added, renamed or removed."""
    for _ in range(rng.geometric(0.6)):
        value = _damage_one(rng, value)
    return value


def damage_json(rng: np.random.Generator, data: bytes) -> bytes:
    """A JSON file with other values, mostly; sometimes other bytes, or too deep."""
    kind = rng.random()
    if kind < 0.3:
        return damage_bytes(rng, data)
    if kind < 0.32:
        depth = int(rng.choice([100, 1000, 100_000]))
        return rng.choice([b"[", b'{"a":']) * depth
    value = damage_value(rng, json.loads(data))
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damage_npz(rng: np.random.Generator, data: bytes) -> bytes:
    """An archive whose members are damaged and its checksums right, mostly."""
    if rng.random() < 0.25:
        return damage_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = str(rng.choice(list(members)))
    if rng.random() < 0.2:
        members.pop(name)
    elif rng.random() < 0.6:  # the header: a few bytes of text after ten of numbers
        head, tail = members[name][:128], members[name][128:]
        members[name] = damage_bytes(rng, head) + tail
    else:
        members[name] = damage_bytes(rng, members[name])
    file = io.BytesIO()
    method = int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(file, "w", method) as archive:
        for key, content in members.items():
            archive.writestr(key, content)
    return file.getvalue()


def damage_safetensors(rng: np.random.Generator, data: bytes) -> bytes:
    """A file with another header, mostly, whose length is told right, mostly."""
    if rng.random() < 0.3:
        return damage_bytes(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    text = damage_json(rng, data[8 : 8 + length])
    told = len(text) if rng.random() < 0.9 else int(rng.integers(0, 2**63))
    return struct.pack("<Q", told) + text + data[8 + length :]


def _damage_one(rng: np.random.Generator, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, kind = list(value)[int(rng.integers(0, len(value)))], rng.random()
        changed = dict(value)
        if kind < 0.75:
            changed[key] = _damage_one(rng, value[key])
        elif kind < 0.87:
            del changed[key]
        elif kind < 0.95:
            changed[key + "x"] = changed.pop(key)
        else:
            changed[str(_any(rng))[:50]] = _any(rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, kind = int(rng.integers(0, len(value))), rng.random()
        items = list(value)
        if kind < 0.7:
            items[at] = _damage_one(rng, items[at])
        elif kind < 0.85:
            del items[at]
        else:
            items = items[: at + 1] * int(rng.integers(1, 5)) + items[at:]
        return items
    if isinstance(value, str) and value and rng.random() < 0.4:
        data = value.encode("utf-8", "surrogatepass")
        return damage_bytes(rng, data).decode(errors="replace")
    return _any(rng)


def _any(rng: np.random.Generator) -> Any:
    pool = _NUMBERS if rng.random() < 0.5 else _VALUES
    return pool[int(rng.integers(0, len(pool)))]
