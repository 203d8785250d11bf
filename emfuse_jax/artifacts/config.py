"""Frozen config dataclasses to JSON and back, and JSON files never half written.

Supported field types: bool, int, float, str, None, ``Literal``, ``tuple[T, ...]``,
``tuple[A, B]``, ``dict[str, T]``, nested dataclasses and unions with None. Anything
else is a `TypeError`: a config that cannot be read back should not be written.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_json(value: Any) -> Any:
    """Turns a config into dicts, lists and scalars that strict JSON can hold.

    Args:
        value: a dataclass, or anything that a field of one may hold. Numbers that are
            not finite become the strings ``"inf"``, ``"-inf"`` and ``"nan"``.

    Raises:
        TypeError: if a value of another type is inside.

    Example:
        >>> to_json({"sizes": (32, 32), "limit": float("inf")})
        {'sizes': [32, 32], 'limit': 'inf'}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be kept in JSON")


def from_json(kind: type[Config], data: Any, *, where: str = "") -> Config:
    """Builds a config of type ``kind``, checking every key and every value.

    A key that is absent takes the field's default.

    Args:
        kind: a dataclass.
        data: what `to_json` returned, or a person wrote.
        where: the dotted name of the place in a larger config, for error texts.

    Raises:
        ValueError: for an unknown key (the nearest known one is named), a missing key
            without a default, or a value of the wrong type.
        TypeError: if ``kind`` has a field of an unsupported type.

    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Net:
        ...     hidden_sizes: tuple[int, ...] = (256, 256)
        >>> from_json(Net, {"hidden_sizes": [32]})
        Net(hidden_sizes=(32,))
        >>> from_json(Net, {"hidden_size": [32]})
        Traceback (most recent call last):
        ValueError: unknown key 'hidden_size'; did you mean 'hidden_sizes'? Known: ...
    """
    return typing.cast(Config, decode(kind, data, where))


def decode(kind: Any, data: Any, where: str = "") -> Any:
    """`from_json` for any type that a field may have, not only dataclasses.

    Example:
        >>> decode(tuple[int, ...], [32, 32])
        (32, 32)
        >>> decode(int, "32", where="sac.num_critics")
        Traceback (most recent call last):
            ...
        ValueError: sac.num_critics...
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if kind is Any:
        return data
    if origin is Literal:
        if (type(data), data) not in [(type(choice), choice) for choice in arguments]:
            near = nearest(str(data), [str(choice) for choice in arguments])
            hint = f"; did you mean {near!r}?" if near else ""
            _wrong(where, data, "one of " + ", ".join(map(repr, arguments)) + hint)
        return data
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is tuple:
        return _decode_tuple(arguments, data, where)
    if origin is dict and arguments[0] is str:
        if not isinstance(data, Mapping):
            _wrong(where, data, "an object")
        return {k: decode(arguments[1], v, _join(where, k)) for k, v in data.items()}
    if kind in (None, type(None), bool, int, float, str):
        return _decode_scalar(kind, data, where)
    raise TypeError(f"{where or 'config'}: fields of type {kind} are not supported")


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind in (None, type(None)):
        return None if data is None else _wrong(where, data, "null")
    if kind is float:
        if isinstance(data, str) and data in _NON_FINITE:
            return _NON_FINITE[data]
        if isinstance(data, int | float) and not isinstance(data, bool):
            try:
                return float(data)
            except OverflowError:  # an integer of hundreds of digits
                return _wrong(where, data, None)
    # A bool is an int to Python, but not to a reader of configs.
    elif isinstance(data, kind) and isinstance(data, bool) == (kind is bool):
        return data
    return _wrong(where, data, {str: "a string", bool: "true or false"}.get(kind))


def _decode_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if sum(map(dataclasses.is_dataclass, options)) > 1:
        raise TypeError(
            f"{where}: a union of two dataclasses cannot be told apart in JSON"
        )
    if data is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return decode(options[0], data, where)
    # An int given for `float | int` stays an int: exact types first.
    for option in sorted(options, key=lambda option: option is not type(data)):
        try:
            return decode(option, data, where)
        except ValueError:
            continue
    return _wrong(where, data, " or ".join(map(str, options)))


def _decode_tuple(arguments: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        _wrong(where, data, "a list")
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(data)
    elif len(data) != len(arguments):
        _wrong(where, data, f"a list of {len(arguments)}")
    pairs = enumerate(zip(arguments, data, strict=True))
    return tuple(decode(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        _wrong(where, data, f"an object with the fields of {kind.__name__}")
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    prefix = f"{where}: " if where else ""
    for key in data:
        if key not in known:
            raise ValueError(prefix + unknown_name("key", key, known))
    hints = typing.get_type_hints(kind)
    absent = [
        name
        for name, field in known.items()
        if name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if absent:
        raise ValueError(f"{prefix}missing {', '.join(absent)}, which has no default")
    values = {k: decode(hints[k], v, _join(where, k)) for k, v in data.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like ``name``; None where none is much like it.

    Example:
        >>> nearest("hoper", ["hopper", "walker2d"])
        'hopper'
    """
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return found[0] if found else None


def unknown_name(noun: str, name: str, known: Iterable[str]) -> str:
    """The text of an error about ``name``, with the nearest known one and all of them.

    Example:
        >>> unknown_name("preset", "fats", ["demo", "fast"])
        "unknown preset 'fats'; did you mean 'fast'? Known: demo, fast"
    """
    known = sorted(known)
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ";"
    return f"unknown {noun} {name!r}{hint} Known: {', '.join(known) or 'none'}"


def differences(first: Any, second: Any, *, where: str = "") -> list[str]:
    """Dotted names under which two JSON values differ, with both values.

    Example:
        >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
        ['a.b: 1 ≠ 3']
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found = []
        for key in dict.fromkeys([*first, *second]):
            sides = (first.get(key, "absent"), second.get(key, "absent"))
            found += differences(*sides, where=_join(where, key))
        return found
    return [] if first == second else [f"{where}: {first!r} ≠ {second!r}"]


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a config or any JSON value; a reader sees the old file or the new, whole.

    Args:
        path: the file; its folder must exist.
        value: passed through `to_json`.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/config.json"
        >>> write_json(path, {"rate": 1e-3})
        >>> read_json(path)
        {'rate': 0.001}
    """
    path = pathlib.Path(path)
    text = json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    replace_file(path, text + "\n")


def replace_file(path: pathlib.Path, text: str) -> None:
    """Puts ``text`` on the disk under another name, then moves it over ``path``.

    Raises:
        OSError: if that fails; it names ``path``, which is as it was.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
        >>> replace_file(path, "whole or not at all")
        >>> path.read_text()
        'whole or not at all'
    """
    try:
        _replace_file(path, text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace_file(path: pathlib.Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON; the text names the file and the line.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text('{"rate": 0.001}')
        >>> read_json(path)
        {'rate': 0.001}
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def load_config(kind: type[Config], path: str | os.PathLike[str]) -> Config:
    """`from_json` of a file; errors name the file.

    Example:
        >>> import tempfile
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Net:
        ...     hidden_sizes: tuple[int, ...] = (64,)
        >>> path = tempfile.mkdtemp() + "/config.json"
        >>> write_json(path, Net(hidden_sizes=(8, 8)))
        >>> load_config(Net, path)
        Net(hidden_sizes=(8, 8))
    """
    data = read_json(path)
    try:
        return from_json(kind, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _wrong(where: str, data: Any, expected: str | None) -> Any:
    name = where or "config"
    raise ValueError(f"{name}={data!r}; expected {expected or 'a number'}")
