"""What there is to choose from: commands, methods, rules, models, data and presets.

    python -m experiments.list
    python -m experiments.list --only=rules,data

Names are those that flags take; ``--help`` of a command lists its flags.
"""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from emfuse_jax import artifacts
from emfuse_jax.artifacts.config import unknown_name
from emfuse_jax.data.behaviour import PACKAGED, packaged_behaviours
from emfuse_jax.data.text_sources import available_sources, default_sources
from emfuse_jax.evaluation.scores import MAZE_SCORES, REFERENCE_SCORES
from emfuse_jax.llm.rules import FUSION_RULES
from experiments import _methods
from experiments._run import run_main

Entries = Mapping[str, str]
"""What each name is, in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Settings of the list.

    Attributes:
        only: the kinds to show; none is all.
    """

    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in KINDS:
                raise ValueError(unknown_name("kind", name, KINDS))


def commands() -> Entries:
    """Every ``python -m experiments.…``."""
    here = pathlib.Path(__file__).parent
    files = sorted(here.glob("[a-z]*.py"))
    docs = {
        path.stem: ast.get_docstring(ast.parse(path.read_text("utf-8")))
        for path in files
    }
    return {
        f"experiments.{name}": _first_sentence(doc)
        for name, doc in docs.items()
        if doc and f"python -m experiments.{name}" in doc
    }


def methods() -> Entries:
    """What ``train_policy --method`` takes."""
    online = "soft actor-critic on rollouts of a dynamics model"
    return {_methods.ONLINE: online, **_methods.OFFLINE}


def models() -> Entries:
    """What ``train_dynamics --model`` takes."""
    return {
        name: _summary(kind.build)
        for name, kind in artifacts.KINDS.items()
        if kind.module.startswith("emfuse_jax.dynamics")
    }


def rules() -> Entries:
    """What ``fuse_llm --rule`` takes."""
    return {name: _summary(rule) for name, rule in FUSION_RULES.items()}


def fusions() -> Entries:
    """What ``fuse_dynamics --fusion.rule`` takes."""
    return {
        "uncertainty": "weights from the experts' own slice uncertainties, row by row",
        "uniform": "the same weight for every expert",
        "fixed": "the weights that --fusion.weights gives",
    }


def merges() -> Entries:
    """What ``merge --method`` takes."""
    return {
        "soup": "the mean of the parameters",
        "greedy_soup": "the mean of those experts that do not worsen the validation error",
        "regmean": "least squares, linear layer by linear layer",
    }


def data() -> Entries:
    """Packaged behaviour policies, Minari's data sets and text, those that are here."""
    records = artifacts.read_json(PACKAGED / "policies.json")
    found = {}
    for name in packaged_behaviours():
        facts = records[f"{name}.npz"]
        found[name] = (
            f"behaviour policy of {facts['env']}, {facts['stochastic_score']:.1f} "
            "normalised: collect_data --policy"
        )
    for name in _local_datasets():
        found[name] = "transitions: train_dynamics and train_policy --data"
    sources = default_sources()
    here = {source.name for source in available_sources(len(sources))}
    for name in sources:
        state = "" if name in here else " (too few files on this machine)"
        found[name] = f"text: train_lm_experts --domains{state}"
    return found


def _local_datasets() -> list[str]:
    from emfuse_jax.data.minari_reader import local_datasets

    try:
        return local_datasets()
    except ImportError:
        return []


def envs() -> Entries:
    """What ``--env`` takes: environments with reference returns."""
    return {
        name: f"returns of {score.minimum:.0f} and {score.maximum:.0f} are 0 and 100"
        for name, score in (REFERENCE_SCORES | MAZE_SCORES).items()
    }


def presets() -> Entries:
    """What ``--preset`` takes, by command."""
    found = {}
    for command in commands():
        module = importlib.import_module(command)
        if hasattr(module, "PRESETS"):
            found[command] = ", ".join(module.PRESETS)
    return found


KINDS: dict[str, Callable[[], Entries]] = {
    kind.__name__: kind
    for kind in (commands, methods, models, rules, fusions, merges, data, envs, presets)
}


def show(config: ListConfig) -> dict[str, Entries]:
    """Prints the list and returns it."""
    found = {name: KINDS[name]() for name in config.only or KINDS}
    for name, entries in found.items():
        print(f"{name}: {(inspect.getdoc(KINDS[name]) or '').rstrip('.')}")
        width = max(map(len, entries), default=0)
        for entry, text in entries.items():
            print(f"  {entry:{width}}  {text}")
        print()
    return found


def _summary(item: object) -> str:
    return _first_sentence(inspect.getdoc(item) or "")


def _first_sentence(doc: str) -> str:
    """The first paragraph up to what follows a full stop or a signature."""
    text = " ".join(doc.partition("\n\n")[0].split())
    return re.split(r"(?<=\.) |: ``|; `", text)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(show, ListConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
