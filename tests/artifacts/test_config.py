"""Configs survive the way to JSON and back, and nothing wrong gets in."""

import dataclasses
import json
import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emfuse_jax.artifacts import config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 3e-4
    hidden_sizes: tuple[int, ...] = (256, 256)
    bounds: tuple[float, float] = (-5.0, 2.0)

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}; expected > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = Inner()
    spare: Inner | None = None
    mode: Literal["langevin", "proposal"] = "proposal"
    steps: int | None = None
    scale: int | float | None = None
    flag: bool = False
    many: tuple[Inner, ...] = ()
    table: dict[str, float] = dataclasses.field(default_factory=dict)


FLOATS = st.floats(allow_nan=False)
INNERS = st.builds(
    Inner,
    learning_rate=st.floats(min_value=0, exclude_min=True),
    hidden_sizes=st.lists(st.integers(), max_size=3).map(tuple),
    bounds=st.tuples(FLOATS, FLOATS),
)
OUTERS = st.builds(
    Outer,
    name=st.text(),
    inner=INNERS,
    spare=st.none() | INNERS,
    mode=st.sampled_from(["langevin", "proposal"]),
    steps=st.none() | st.integers(),
    scale=st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    many=st.lists(INNERS, max_size=2).map(tuple),
    table=st.dictionaries(st.text(), FLOATS, max_size=2),
)


@given(OUTERS)
def test_round_trip(outer):
    text = json.dumps(config_lib.to_json(outer), allow_nan=False)
    again = config_lib.from_json(Outer, json.loads(text))
    assert again == outer
    # 1 == 1.0, so types are compared as well.
    assert repr(again) == repr(outer)


def test_nan_survives():
    data = config_lib.to_json(Inner(bounds=(math.nan, math.inf)))
    assert data["bounds"] == ["nan", "inf"]
    assert math.isnan(config_lib.from_json(Inner, data).bounds[0])


def test_absent_keys_take_defaults_and_ints_become_floats():
    outer = config_lib.from_json(Outer, {"name": "a", "inner": {"learning_rate": 1}})
    assert outer == Outer(name="a", inner=Inner(learning_rate=1.0))
    assert type(outer.inner.learning_rate) is float


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "a", "stpes": 1}, ["unknown key 'stpes'", "did you mean 'steps'"]),
        (
            {"name": "a", "inner": {"learning_rat": 1}},
            ["inner: unknown", "learning_rate"],
        ),
        ({}, ["missing name"]),
        ({"name": 1}, ["name=1", "a string"]),
        ({"name": "a", "flag": 1}, ["flag=1", "true or false"]),
        ({"name": "a", "steps": True}, ["steps=True", "a number"]),
        ({"name": "a", "steps": 1.5}, ["steps=1.5"]),
        ({"name": "a", "scale": "x"}, ["scale='x'", "int", "float"]),
        ({"name": "a", "mode": "nce"}, ["mode='nce'", "'langevin', 'proposal'"]),
        ({"name": "a", "inner": {"bounds": [1]}}, ["inner.bounds", "a list of 2"]),
        (
            {"name": "a", "inner": {"hidden_sizes": [1, "b"]}},
            ["inner.hidden_sizes[1]='b'"],
        ),
        ({"name": "a", "inner": 3}, ["inner=3", "fields of Inner"]),
        ({"name": "a", "inner": None}, ["inner=None"]),
        ({"name": "a", "table": {"k": "v"}}, ["table.k='v'"]),
        ({"name": "a", "many": [{"learning_rate": -1}]}, ["many[0]", "expected > 0"]),
    ],
)
def test_errors_name_the_place_and_the_fix(data, words):
    with pytest.raises(ValueError, match=r"expected|unknown|missing") as caught:
        config_lib.from_json(Outer, data)
    for word in words:
        assert word in str(caught.value)


def test_unsupported_types_are_refused_both_ways():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        value: set[int]

    with pytest.raises(TypeError, match="set"):
        config_lib.from_json(Odd, {"value": [1]})
    with pytest.raises(TypeError, match="set"):
        config_lib.to_json(Odd({1}))


def test_written_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "config.json"
    config_lib.write_json(path, Outer(name="λ"))
    assert config_lib.load_config(Outer, path) == Outer(name="λ")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        config_lib.write_json(path, {"bad": {1}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_file_errors_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError):
        config_lib.load_config(Outer, path)
    path.write_text('{"name": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        config_lib.load_config(Outer, path)
    path.write_text('{"nam": "a"}')
    with pytest.raises(ValueError, match=r"config\.json: unknown key 'nam'"):
        config_lib.load_config(Outer, path)
