"""What ``model.json`` says: kinds of models, their configs and their spaces."""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from emfuse_jax import dynamics
from emfuse_jax.artifacts.config import (
    to_json,
    unknown_name,
    write_json,
)
from emfuse_jax.base import SpaceSpec

MODEL_FILE = "model.json"


class Kind(NamedTuple):
    """A learner by name; its module is imported when it is asked for."""

    module: str
    config_name: str
    factory_name: str

    @property
    def config(self) -> type:
        """The class of its settings."""
        return getattr(importlib.import_module(self.module), self.config_name)

    @property
    def build(self) -> Callable[[Any, SpaceSpec], Any]:
        """``(config, spec) -> learner``."""
        return getattr(importlib.import_module(self.module), self.factory_name)


def _policy(module: str, config_name: str, factory_name: str) -> Kind:
    return Kind(f"emfuse_jax.policies.{module}", config_name, factory_name)


MAX_SIZE = 2**20
"""Of spaces and numbers of seeds, in what a file says of itself."""


KINDS = {
    "adetm": Kind("emfuse_jax.dynamics", "AdetmConfig", "adetm"),
    "etm": Kind("emfuse_jax.dynamics", "EtmConfig", "etm"),
    "mcetm": Kind("emfuse_jax.dynamics", "McetmConfig", "mcetm"),
    "ensemble": Kind("emfuse_jax.dynamics", "EnsembleConfig", "gaussian_ensemble"),
    "sac": _policy("sac", "SacConfig", "sac"),
    "bc": _policy("bc", "BcConfig", "bc"),
    "iql": _policy("iql", "IqlConfig", "iql"),
    "diffusion": _policy("diffusion", "DiffusionConfig", "diffusion"),
    "aepo": _policy("aepo", "AepoConfig", "aepo"),
    "qgpo": _policy("qgpo", "QgpoConfig", "qgpo"),
    "ibc": _policy("ibc", "IbcConfig", "ibc"),
    "ebt": _policy("ebt", "EbtConfig", "ebt_policy"),
    "diffusion_transformer": _policy(
        "diffusion_transformer", "DiffusionTransformerConfig", "diffusion_transformer"
    ),
}
"""What `load_run` can rebuild, besides fusions of dynamics."""


def describe(
    kind: str,
    config: Any,
    spec: SpaceSpec,
    *,
    params_in: str | None = None,
    num_seeds: int = 1,
) -> dict[str, Any]:
    """The content of ``model.json`` for one learner.

    Args:
        kind: one of `KINDS`.
        config: the learner's.
        spec: the spaces it works on.
        params_in: a folder of the run that holds parameters alone; None where
            ``checkpoints`` holds the learner's state.
        num_seeds: more than one puts a seed axis in front of every leaf.

    Raises:
        ValueError: for an unknown kind.

    Example:
        >>> from emfuse_jax.policies.bc import BcConfig
        >>> description = describe("bc", BcConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> description["kind"], description["spec"]
        ('bc', {'observation_size': 11, 'action_size': 3})
    """
    if kind not in KINDS:
        raise ValueError(unknown_name("model", kind, KINDS))
    return {
        "kind": kind,
        "config": to_json(config),
        "spec": spec._asdict(),
        "params_in": params_in,
        "num_seeds": num_seeds,
    }


def describe_fusion(
    members: Sequence[dict[str, Any]], config: dynamics.FusionConfig
) -> dict[str, Any]:
    """The content of ``model.json`` for a fusion.

    Raises:
        ValueError: if the members' spaces differ.

    Example:
        >>> member = describe("etm", dynamics.EtmConfig(), SpaceSpec(11, 3))
        >>> fusion = describe_fusion([member, member], dynamics.FusionConfig())
        >>> fusion["kind"], len(fusion["members"])
        ('fused', 2)
    """
    specs = [member["spec"] for member in members]
    for index, spec in enumerate(specs):
        if spec != specs[0]:
            raise ValueError(
                f"expert {index} has {_sizes(spec)}, expert 0 has {_sizes(specs[0])}; only "
                "experts of one environment can be fused"
            )
    return {
        "kind": "fused",
        "config": to_json(config),
        "spec": specs[0],
        "params_in": "checkpoints",
        "num_seeds": 1,
        "members": list(members),
    }


def write_description(
    path: str | os.PathLike[str], description: dict[str, Any]
) -> None:
    """Writes ``model.json`` into a run directory.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> write_description(folder, describe("etm", dynamics.EtmConfig(), SpaceSpec(11, 3)))
        >>> [path.name for path in pathlib.Path(folder).iterdir()]
        ['model.json']
    """
    write_json(pathlib.Path(path) / MODEL_FILE, description)


def check_description(description: Any, *, inside_fusion: bool = False) -> None:
    """What ``model.json`` must hold before anything is built or opened by it.

    Raises:
        ValueError: if a part is missing or ill-typed, or names a place outside of the run
            directory.

    Example:
        >>> check_description({"kind": "bcc"})
        Traceback (most recent call last):
            ...
        ValueError: unknown model 'bcc'...
    """
    if not isinstance(description, dict):
        raise ValueError(f"it holds {str(description)[:100]}; expected an object")
    kind = description.get("kind")
    known = list(KINDS) if inside_fusion else [*KINDS, "fused"]
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(unknown_name("model", str(kind), known))
    spec = description.get("spec")
    if not isinstance(spec, dict) or set(spec) != set(SpaceSpec._fields):
        raise ValueError(f"spec is {spec!r}; expected {', '.join(SpaceSpec._fields)}")
    for name, number in {**spec, "num_seeds": description.get("num_seeds")}.items():
        if type(number) is not int or not 1 <= number <= MAX_SIZE:
            raise ValueError(f"{name}={number!r}; expected a size from 1 to {MAX_SIZE}")
    if not isinstance(description.get("config"), dict):
        raise ValueError(f"config is {description.get('config')!r}; expected an object")
    if "params_in" not in description:
        raise ValueError("params_in is missing; expected a folder's name, or null")
    folder = description["params_in"]
    if folder is not None and not (
        isinstance(folder, str)
        and folder not in ("", "..")
        and folder == pathlib.PurePath(folder).name
    ):
        raise ValueError(
            f"params_in={folder!r}; expected the name of a folder of the run directory"
        )
    if kind == "fused":
        members = description.get("members")
        if not isinstance(members, list) or not members:
            raise ValueError(f"members is {members!r}; expected the experts")
        for member in members:
            check_description(member, inside_fusion=True)


def is_uniform(members: Sequence[dict[str, Any]]) -> bool:
    """Whether members share one architecture, so that their params are a stack.

    Example:
        >>> spec = SpaceSpec(11, 3)
        >>> one = describe("etm", dynamics.EtmConfig(), spec)
        >>> other = describe("etm", dynamics.EtmConfig(energy_sizes=(64,)), spec)
        >>> is_uniform([one, one]), is_uniform([one, other])
        (True, False)
    """
    return all(_architecture(member) == _architecture(members[0]) for member in members)


_TRAINING_ONLY = {f.name for f in dataclasses.fields(dynamics.McetmConfig)} - {
    "negatives",
    "energy_sizes",
    "head_sizes",
    "sampling",
    "latent_size",
    "autoencoder_sizes",
}
"""Fields that members of one fusion may differ in."""


def _architecture(description: dict[str, Any]) -> Any:
    config = {k: v for k, v in description["config"].items() if k not in _TRAINING_ONLY}
    return description["kind"], config, description["spec"]


def _sizes(spec: dict[str, int]) -> str:
    return f"observation size {spec['observation_size']} and action size {spec['action_size']}"
