"""Fusion rules as a person writes them: ``name`` or ``name:option=value:option=value``."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from emfuse_jax.artifacts.config import unknown_name
from emfuse_jax.llm.rules import FUSION_RULES, FusionRule, rule_by_name

SELECTING = ("emselect", "top_one")
"""Rules that give all weight to one expert: what they cost is told against the uniform
pool, since against themselves it would be nothing."""

STEADY = (
    *("emfuse", "uniform", "fixed", "linear_pool"),
    *("packllm_sim", "packllm_opt", "top_one"),
)
"""Rules whose weights do not move within a text."""

_WEIGHTED = {"emfuse": "fixed", "fixed": "fixed", "linear_pool": "linear_pool"}
"""Rules that take ``--weights``, and what they are then."""


class NamedRule(NamedTuple):
    """A rule and what it is called in tables; ``label`` is what the person wrote."""

    label: str
    name: str
    rule: FusionRule

    @property
    def selects(self) -> bool:
        """Whether one expert has all the weight."""
        return self.name in SELECTING

    @property
    def moves(self) -> bool:
        """Whether weights change from token to token."""
        return self.name not in STEADY


def parse_rules(
    texts: Sequence[str], weights: Sequence[float] = ()
) -> tuple[NamedRule, ...]:
    """The rules that a command line names.

    Args:
        texts: such as ``packllm_sim:temperature=0.1``; a name of `FUSION_RULES` first.
        weights: for the rules that take some.

    Raises:
        ValueError: for an unknown rule (all are listed) or option (its own are), a value
            that does not parse or is out of range, a rule twice, no rule at all, weights
            that no rule uses, or none where a rule needs them.

    Example:
        >>> [rule.name for rule in parse_rules(["emselect:order=pool", "top_one"])]
        ['emselect', 'top_one']
    """
    if not texts:
        raise ValueError(f"no rule is given; known: {', '.join(FUSION_RULES)}")
    if len(set(texts)) < len(texts):
        raise ValueError(f"--rule={','.join(texts)} names a rule twice; give each once")
    rules = tuple(_parse_rule(text, weights) for text in texts)
    if weights and not any(rule.name in _WEIGHTED for rule in rules):
        raise ValueError(
            f"--weights={','.join(map(str, weights))} is not used by --rule="
            f"{','.join(texts)}; rules with given weights: {', '.join(_WEIGHTED)}"
        )
    return rules


def _parse_rule(text: str, weights: Sequence[float]) -> NamedRule:
    name, *parts = text.split(":")
    if name not in FUSION_RULES:
        raise ValueError(unknown_name("fusion rule", name, FUSION_RULES))
    options = dict(_parse_option(text, name, part) for part in parts)
    made = name
    if weights and name in _WEIGHTED:
        made = _WEIGHTED[name]
        options["weights"] = tuple(weights)
    elif name == "fixed":
        raise ValueError("--rule=fixed needs --weights, one for each expert")
    return NamedRule(text, name, rule_by_name(made, **options))


def _parse_option(text: str, rule: str, part: str) -> tuple[str, Any]:
    """A value of the type that the option's default has."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(FUSION_RULES[rule]).parameters.items()
        if isinstance(parameter.default, bool | int | float | str)
    }
    option, separator, value = part.partition("=")
    if not separator or option not in known:
        own = ", ".join(f"{name}={default}" for name, default in known.items())
        raise ValueError(
            f"--rule={text}: {part!r} is no option of {rule}; options are written "
            f"{rule}:name=value, and it has {own or 'none'}"
        )
    kind = type(known[option])
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"--rule={text}: {option}={value}; expected true or false")
        return option, value.lower() == "true"
    try:
        return option, kind(value)
    except ValueError:
        raise ValueError(
            f"--rule={text}: {option}={value!r} is no {kind.__name__}"
        ) from None
