"""The methods of `experiments.train_policy`: one table, and a command line for each."""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Any

from emfuse_jax import artifacts
from emfuse_jax.artifacts.config import unknown_name

ONLINE = "sac"
OFFLINE = {
    "bc": "behaviour cloning with a tanh-normal policy",
    "iql": "implicit Q-learning with advantage-weighted cloning",
    "diffusion": "behaviour cloning with a diffusion model",
    "aepo": "a diffusion behaviour guided by the analytic energy of IQL's value",
    "qgpo": "a diffusion behaviour guided by contrastive energy prediction",
    "diffusion_transformer": "diffusion cloning of action chunks with a transformer",
    "ebt": "an energy transformer over action chunks, acting by descent",
    "ibc": "implicit behavioural cloning: the lowest action of a contrastive energy",
}
"""Methods that train on data alone, with what they are; `artifacts.KINDS` builds them."""


VALUED = ("iql", "aepo", "qgpo")
"""Methods that learn values of single actions, so that they plan no chunks."""


def names() -> list[str]:
    """Every method that ``--method`` takes."""
    return [ONLINE, *OFFLINE]


def check_method(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: for an unknown one; names the nearest and lists them all.
    """
    if name not in names():
        raise ValueError(unknown_name("method", name, names()))
    return name


def method_of(argv: Sequence[str]) -> str:
    """What ``--method`` says on a command line, before the other flags are known."""
    from absl import flags

    values = flags.FlagValues()
    options = {"flag_values": values, "module_name": "common"}
    flags.DEFINE_string("method", ONLINE, "", **options)
    try:
        values(list(argv), known_only=True)
    except flags.Error:  # the parser of all flags says what is wrong
        return ONLINE
    return values.method


@functools.cache
def config_class(base: type, method: str) -> type:
    """``base`` with one more field, named after the method: its own settings.

    Args:
        base: a frozen dataclass with a field ``method``.
        method: one of `OFFLINE`.

    Raises:
        ValueError: for a method that does not train on data alone.
    """
    if method not in OFFLINE:
        raise ValueError(unknown_name("method", method, OFFLINE))
    own = artifacts.KINDS[method].config
    fields: list[Any] = [
        ("method", typing.Literal[method], dataclasses.field(default=method)),
        (method, own, dataclasses.field(default_factory=own)),
    ]
    return dataclasses.make_dataclass(
        f"Train_{method}",
        fields,
        bases=(base,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": f"Attributes:\n    {method}: {OFFLINE[method]}.\n"},
    )


def own_config(config: Any) -> Any:
    """The settings of the method itself, out of what `config_class` made: those of a
    transformer take their frames and actions from ``config.plan``."""
    own = getattr(config, config.method)
    names = {field.name for field in dataclasses.fields(own)}
    if {"num_frames", "horizon"} <= names:
        plan = config.plan
        own = dataclasses.replace(own, num_frames=plan.num_frames, horizon=plan.horizon)
    return own
