"""The list of what there is names what the commands take, and nothing else."""

import importlib
import typing

import pytest

from emfuse_jax import artifacts
from emfuse_jax.dynamics import FusionConfig
from emfuse_jax.llm.rules import rule_by_name
from experiments import list as command
from experiments.merge import MergeConfig


@pytest.fixture(scope="module")
def found():
    return command.show(command.ListConfig())


def test_every_command_runs_and_says_what_it_is(found):
    assert "experiments.train_policy" in found["commands"]
    assert "experiments.presets" not in found["commands"]
    for name, text in found["commands"].items():
        assert callable(importlib.import_module(name).main), name
        assert text, name


def test_what_is_listed_is_what_is_taken(found):
    assert set(found["models"]) | set(found["methods"]) == set(artifacts.KINDS)
    for kind, config, field in (
        ("fusions", FusionConfig, "rule"),
        ("merges", MergeConfig, "method"),
    ):
        assert set(found[kind]) == set(
            typing.get_args(typing.get_type_hints(config)[field])
        )
    assert all(text for kind in found.values() for text in kind.values())
    with pytest.raises(ValueError, match="emselect"):
        rule_by_name("no such rule")
    assert "emselect" in found["rules"]
    assert "41.6" in found["data"]["hopper_medium"]
    assert list(found["envs"])[-1] == "pointmaze-medium"
    assert found["presets"]["experiments.train_dynamics"] == "demo, fast, paper"


def test_some_kinds_alone(capsys):
    assert command.main(["list", "--only=rules"]) == 0
    text = capsys.readouterr().out
    assert "emselect" in text
    assert "hopper_medium" not in text
    assert command.main(["list", "--only=rulez"]) == 2
    assert "did you mean 'rules'" in capsys.readouterr().err
