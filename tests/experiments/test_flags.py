"""Flags and configs are two spellings of the same thing."""

import dataclasses
from typing import Literal

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from experiments import _flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """A part.

    Attributes:
        learning_rate: of Adam,
            per update.
        hidden_sizes: widths of the layers.
    """

    learning_rate: float = 3e-4
    hidden_sizes: tuple[int, ...] = (256, 256)
    bounds: tuple[float, float] = (-5.0, 2.0)
    clip: float | None = None

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}; expected > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A program.

    Attributes:
        data: files to read.
    """

    data: tuple[str, ...]
    seed: int = 0
    mode: Literal["langevin", "proposal"] = "proposal"
    backtrack: bool = True
    inner: Inner = Inner()
    spare: Inner | None = None
    parts: tuple[Inner, ...] = ()


FAST = Config(data=("fast.hdf5",), inner=Inner(hidden_sizes=(64,), clip=1.0))
PRESETS = {"fast": lambda: FAST, "paper": lambda: Config(data=("paper.hdf5",))}


def _parse(*arguments, **options):
    return _flags.parse(Config, ["program", *arguments], **options).config


def test_every_kind_of_field():
    config = _parse(
        *("--data=a.hdf5, b.hdf5", "--seed=7", "--mode=langevin", "--nobacktrack"),
        *("--inner.learning_rate=1e-3", "--inner.hidden_sizes=32", "--inner.clip=2"),
        *("--inner.bounds=-1,1", "--spare.clip=3", '--parts=[{"clip": 4}]'),
    )
    assert config == Config(
        data=("a.hdf5", "b.hdf5"),
        seed=7,
        mode="langevin",
        backtrack=False,
        inner=Inner(
            learning_rate=1e-3, hidden_sizes=(32,), bounds=(-1.0, 1.0), clip=2.0
        ),
        spare=Inner(clip=3.0),
        parts=(Inner(clip=4.0),),
    )


def test_only_flags_that_were_given_override():
    options = {"presets": PRESETS, "default_preset": "fast"}
    assert _parse(**options) == FAST
    assert _parse("--preset=paper", **options) == Config(data=("paper.hdf5",))
    inner = dataclasses.replace(FAST.inner, learning_rate=1.0)
    expected = dataclasses.replace(FAST, inner=inner)
    assert _parse("--inner.learning_rate=1", **options) == expected
    # The same value as the class's default still overrides the preset's.
    assert _parse("--inner.clip=none", **options).inner.clip is None
    assert _parse("--inner.hidden_sizes=", **options).inner.hidden_sizes == ()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--seed=1"], ValueError, ["--data is required"]),
        (["--data=a", "--sede=1"], flags.Error, ["sede", "Did you mean", "seed"]),
        (["--data=a", "--seed=x"], flags.Error, ["--seed=x", "could not convert"]),
        (["--data=a", "--seed=1.5"], flags.Error, ["--seed=1.5", "a number"]),
        (["--data=a", "--mode=nce"], flags.Error, ["langevin", "proposal"]),
        (["--data=a", "--inner.bounds=1"], flags.Error, ["a list of 2"]),
        (["--data=a", "--inner.learning_rate=-1"], ValueError, ["--inner:", "> 0"]),
        (["--data=a", "b"], ValueError, ["unexpected argument 'b'"]),
        (["--data=a", '--parts=[{"clp": 1}]'], flags.Error, ["did you mean 'clip'"]),
        (["--preset=fats"], ValueError, ["did you mean 'fast'", "paper"]),
    ],
)
def test_errors_name_the_flag_and_the_fix(arguments, error, words):
    with pytest.raises(error) as caught:
        _parse(*arguments, presets=PRESETS)
    for word in words:
        assert word in str(caught.value)


def test_help_shows_the_docstrings_and_the_presets_values():
    argv = ["program", "--preset=fast", "--help"]
    parsed = _flags.parse(Config, argv, presets=PRESETS, doc="Trains it.\n\nAt length.")
    assert parsed.config is None
    for words in (
        "Trains it.",
        "--inner.learning_rate=0.0003\n      of Adam, per update. (float)",
        "--inner.hidden_sizes=64",
        "--data=fast.hdf5\n      files to read.",
        "--preset=fast\n      one of fast, paper",
    ):
        assert words in parsed.help
    # Equal Literals are one object, in the order of whichever came first.
    assert any(x in parsed.help for x in ("langevin|proposal", "proposal|langevin"))
    # Required flags do not stand in the way of help.
    assert "--data" in _flags.parse(Config, ["program", "--help"]).help


def test_many_programs_in_one_process():
    before = set(flags.FLAGS)
    first, second = (_parse(f"--data={name}") for name in "ab")
    assert (first.data, second.data) == (("a",), ("b",))
    assert set(flags.FLAGS) == before


FLOATS = st.floats(allow_nan=False)
INNERS = st.builds(
    Inner,
    learning_rate=st.floats(min_value=0, exclude_min=True),
    hidden_sizes=st.lists(st.integers(), max_size=3).map(tuple),
    bounds=st.tuples(FLOATS, FLOATS),
    clip=st.none() | FLOATS,
)


@given(INNERS, st.integers(), st.booleans())
def test_flags_written_from_a_config_give_it_back(inner, seed, backtrack):
    config = Config(data=("a",), inner=inner, seed=seed, backtrack=backtrack)
    values = flags.FlagValues()
    _flags.define(Config, values, base=config)
    values.mark_as_parsed()
    arguments = [
        f"--{name}={_flags._Serializer().serialize(values[name].value)}"
        for name in values
        if not name.startswith("spare.")
    ]
    assert _parse(*arguments) == config


def test_attribute_docs_of_several_lines():
    docs = _flags._attribute_docs(Inner)
    assert docs["learning_rate"] == "of Adam, per update."
    assert docs["hidden_sizes"] == "widths of the layers."


def test_a_tuple_of_choices():
    kind = tuple[Literal["left", "right"], ...]
    assert _flags.parse_text(kind, "left, right") == ("left", "right")
    with pytest.raises(ValueError, match="middle"):
        _flags.parse_text(kind, "left,middle")
