"""Flags that pages name are flags that some command line takes."""

import dataclasses
import importlib.util
import inspect
import pathlib
import re

import pytest
from absl import flags

from experiments import _flags

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ["README.md", "WORKSPACE.md", "docs/migration.md", "docs/guides/policies.md"]
# Of every command line, and of `train_policy`, whose flags depend on the method.
COMMON = {"devices", "dry_run", "help", "method", "on_divergence", "preset"}


@pytest.fixture(scope="module")
def known():
    found = set(COMMON)
    for path in (ROOT / "experiments").glob("[a-z]*.py"):
        module = importlib.import_module(f"experiments.{path.stem}")
        for value in vars(module).values():
            if inspect.isclass(value) and dataclasses.is_dataclass(value):
                values = flags.FlagValues()
                _flags.define(value, values)
                found |= set(values)
    return found


def flags_of(text):
    """The flags that a page names; of a table with two columns, in the second."""
    rows = [
        line.split("|")[2] if line.count("|") == 3 else line
        for line in text.splitlines()
    ]
    return set(re.findall(r"--([a-z][\w.]*\w)", "\n".join(rows)))


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page, known):
    placeholders = {"part.field"}
    named = flags_of((ROOT / page).read_text()) - placeholders
    assert named
    assert named <= known, sorted(named - known)


def test_the_commands_for_clusters_exist(known):
    """The guide's recipes name flags of SLURM and gcloud, too; these are ours."""
    text = (ROOT / "docs/guides/devices.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"-m experiments\.(\w+)([^\"`\n]*)", text)
    assert [name for name, _ in commands] == ["train_dynamics", "train_dynamics"]
    for name, flags_ in commands:
        assert importlib.util.find_spec(f"experiments.{name}")
        assert {"devices", "data", "run_dir"} <= flags_of(flags_) <= known


def test_a_flag_that_no_command_takes_is_seen(known):
    assert not flags_of("`--sac.learning_speed`") <= known
    assert flags_of("| `--alpha` | `--sac.fixed_temperature=0.2` |") <= known
