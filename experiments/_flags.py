"""absl flags generated from a config dataclass, and the config back from the flags.

A field ``sac.learning_rate`` becomes ``--sac.learning_rate``; its help is the line of
the same name under ``Attributes:`` in the dataclass's docstring. Flags live in a
`FlagValues` of their own, so that several programs can be parsed in one process.
"""

import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from absl import flags

from emfuse_jax.artifacts.config import decode, to_json, unknown_name
from experiments._names import unknown_flag

MISSING = dataclasses.MISSING
Presets = Mapping[str, Callable[[], Any]]


class Parsed(NamedTuple):
    """A parsed command line; ``config`` is None where help was asked for."""

    config: Any
    traceback: bool
    help: str | None = None
    on_divergence: str = "stop"
    dry_run: bool = False
    devices: str = "one"


class _Leaf(NamedTuple):
    name: str
    kind: Any
    default: Any
    help: str


def parse(
    config_cls: type,
    argv: Sequence[str],
    *,
    presets: Presets | None = None,
    default_preset: str | None = None,
    doc: str = "",
    trains: bool = False,
    shares: bool = False,
) -> Parsed:
    """Reads a command line.

    Args:
        config_cls: a dataclass.
        argv: the program's name, then flags.
        presets: configs by name, chosen with ``--preset``; flags override fields.
        default_preset: the preset when none is given; None is the class's defaults.
        doc: what the program does, for ``--help``.
        trains: whether there are the flags of training commands.
        shares: whether there is ``--devices``.

    Returns:
        The config, what the common flags say, and the help text if asked for.

    Raises:
        flags.Error: for an unknown flag or a value that does not parse.
        ValueError: for an unknown preset, an absent flag without a default, a
            positional argument, or whatever the config refuses.
    """
    preset, base = _preset(argv, presets or {}, default_preset)
    values = flags.FlagValues()
    define(config_cls, values, base=base)
    common = {"flag_values": values, "module_name": "common"}
    flags.DEFINE_boolean("help", False, "show this text", **common)
    flags.DEFINE_boolean("traceback", False, "show where an error comes from", **common)
    if trains:
        _define_training(common)
    if shares:
        flags.DEFINE_string("devices", "one", _DEVICES, **common)
    if presets:
        known = ", ".join(presets)
        flags.DEFINE_string("preset", preset, f"one of {known}", **common)
    try:
        extra = values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        known = [*values, *(f"no{name}" for name in values if values[name].boolean)]
        raise flags.Error(unknown_flag(error.flagname, known)) from error
    if values.help:
        return Parsed(None, values.traceback, _help(argv[0], doc, values))
    if extra:
        raise ValueError(f"unexpected argument {extra[0]!r}; flags are --name=value")
    config = config_from_flags(config_cls, values, base=base)
    # Not by what is there: a config may have a field of such a name.
    names = [*["on_divergence", "dry_run"] * trains, *["devices"] * shares]
    chosen = {name: values[name].value for name in names}
    return Parsed(config, values.traceback, **chosen)


_DEVICES = (
    "train on one device, on all of this machine, or on those of all hosts, where the same "
    "command runs on each (SLURM, GKE, TPU pods and Open MPI are found; elsewhere "
    "hosts,ADDRESS:PORT,PROCESSES,NUMBER)"
)


def _define_training(common: Mapping[str, Any]) -> None:
    """The flags of every command that trains."""
    flags.DEFINE_enum(
        "on_divergence",
        "stop",
        ["stop", "rollback"],
        "where training diverges: stop, or go back to the last checkpoint with half of "
        "every learning rate",
        **common,
    )
    flags.DEFINE_boolean(
        "dry_run",
        False,
        "train nothing and write nothing: read and check everything, then say shapes, "
        "parameters, FLOPs, memory and the expected time",
        **common,
    )


def define(config_cls: type, values: flags.FlagValues, *, base: Any = None) -> None:
    """Defines one flag per leaf field of ``config_cls``.

    Args:
        config_cls: a dataclass, nested ones included.
        values: where the flags go.
        base: a config whose values are the defaults; None takes the fields' own.
    """
    for leaf in _leaves(config_cls, base, ""):
        default = None if leaf.default is MISSING else leaf.default
        options = {"flag_values": values, "module_name": "config"}
        if leaf.kind is bool:
            flags.DEFINE_boolean(leaf.name, default, leaf.help, **options)
        else:
            parser = _Parser(leaf.kind)
            options["serializer"] = _Serializer()
            flags.DEFINE(parser, leaf.name, default, leaf.help, **options)


def config_from_flags(
    config_cls: type, values: flags.FlagValues, *, base: Any = None
) -> Any:
    """Builds the config: ``base``, with the flags given on the command line put over it.

    Raises:
        ValueError: if a field without a default was not given, or the config refuses
            a value; the text names the flag.
    """
    return _build(config_cls, values, base, "")


def parse_text(kind: Any, text: str) -> Any:
    """The value of type ``kind`` that a person writes as ``text``.

    Tuples are written with commas, None as ``none``, whole numbers also as ``1e6``, and
    whatever has no such form as JSON.

    Example:
        >>> parse_text(tuple[int, ...], "256,256")
        (256, 256)
    """
    return decode(kind, _to_data(kind, text))


class _Parser(flags.ArgumentParser):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self._kind = kind
        self.syntactic_help = _type_name(kind)

    def parse(self, argument: Any) -> Any:
        if isinstance(argument, str):
            return parse_text(self._kind, argument)
        return argument

    def flag_type(self) -> str:
        return self.syntactic_help


class _Serializer(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        if isinstance(value, tuple) and not any(map(dataclasses.is_dataclass, value)):
            return ",".join(map(str, value))
        if isinstance(value, str | int | float | None):
            return str(value)
        return json.dumps(to_json(value), ensure_ascii=False)


def _preset(argv: Sequence[str], presets: Presets, default: str | None):
    """The chosen preset and its config, before the other flags are defined."""
    values = flags.FlagValues()
    flags.DEFINE_string("preset", default, "", flag_values=values, module_name="common")
    if presets:
        values(list(argv), known_only=True)
    else:
        values.mark_as_parsed()
    if values.preset is None:
        return None, None
    if values.preset not in presets:
        raise ValueError(unknown_name("preset", values.preset, presets))
    return values.preset, presets[values.preset]()


def _nested(kind: Any) -> Any:
    """The dataclass that a field holds, also behind ``| None``; None for a leaf."""
    options = [kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [o for o in typing.get_args(kind) if o is not type(None)]
    one = len(options) == 1 and dataclasses.is_dataclass(options[0])
    return options[0] if one else None


def _fields(config_cls: type, base: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of each field."""
    hints = typing.get_type_hints(config_cls)
    for field in dataclasses.fields(config_cls):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if base is not None:
            default = getattr(base, field.name)
        if field.init:
            yield field.name, hints[field.name], default


def _leaves(config_cls: type, base: Any, prefix: str) -> Iterator[_Leaf]:
    helps = _attribute_docs(config_cls)
    for name, kind, default in _fields(config_cls, base):
        nested = _nested(kind)
        if nested is None:
            yield _Leaf(prefix + name, kind, default, helps.get(name, ""))
        else:
            inner = default if dataclasses.is_dataclass(default) else None
            yield from _leaves(nested, inner, f"{prefix}{name}.")


def _build(config_cls: type, values: flags.FlagValues, base: Any, prefix: str) -> Any:
    arguments = {}
    for name, kind, default in _fields(config_cls, base):
        nested, flag = _nested(kind), prefix + name
        if nested is not None:
            given = any(n.startswith(flag + ".") and values[n].present for n in values)
            if default is not None or given:
                inner = default if dataclasses.is_dataclass(default) else None
                default = _build(nested, values, inner, flag + ".")
        elif values[flag].present:
            default = values[flag].value
        if default is MISSING:
            raise ValueError(f"flag --{flag} is required; see --help")
        arguments[name] = default
    try:
        return config_cls(**arguments)
    except ValueError as error:
        where = f"--{prefix.rstrip('.')}: " if prefix else ""
        raise ValueError(f"{where}{error}") from error


def _to_data(kind: Any, text: str) -> Any:
    """What JSON would hold; wrong types are left for `decode` to name."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", "null"):
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _to_data(options[0], text)
    if origin is Literal:
        return next((choice for choice in arguments if str(choice) == text), text)
    if origin is tuple and not text.strip():
        return []
    simple = {int, float, str, Ellipsis}
    if origin is tuple and all(
        a in simple or typing.get_origin(a) is Literal for a in arguments
    ):
        items = [item.strip() for item in text.split(",")]
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(items)
        elif len(items) != len(arguments):
            return items
        return [_to_data(*pair) for pair in zip(arguments, items, strict=True)]
    if kind is str:
        return text
    if kind is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if kind in (int, float):
        number = float(text)
        return int(number) if kind is int and number.is_integer() else number
    return json.loads(text)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return kind.__name__ if kind in (bool, int, float, str) else str(kind)


def _attribute_docs(config_cls: type) -> dict[str, str]:
    """The ``Attributes:`` sections of a class and its bases, by name; the class's own
    words go before those of its bases."""
    docs: dict[str, str] = {}
    for cls in reversed(config_cls.__mro__):
        doc = inspect.cleandoc(cls.__doc__ or "")
        section = re.search(
            r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", doc, flags=re.MULTILINE
        )
        if section is not None:
            entries = re.split(r"^    (\w+): ", section.group(1), flags=re.MULTILINE)
            texts = (" ".join(text.split()) for text in entries[2::2])
            docs |= dict(zip(entries[1::2], texts, strict=True))
    return docs


def _help(program: str, doc: str, values: flags.FlagValues) -> str:
    lines = [f"usage: {program} [--flag=value ...]", "", inspect.cleandoc(doc), ""]
    groups = values.flags_by_module_dict()
    for flag in [*groups.get("common", []), *groups.get("config", [])]:
        default = "" if flag.default is None else "=" + flag.default_as_str.strip("'")
        text = flag.help.removeprefix("(no help available)")
        lines.append(f"  --{flag.name}{default}")
        lines += textwrap.wrap(
            f"{text} ({flag.parser.syntactic_help or flag.flag_type()})".strip(),
            width=84,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
        )
    return "\n".join(lines)
