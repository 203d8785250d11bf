"""Rules that weigh experts, and all rules by name.

The law is the log-opinion pool whatever the rule (but for the linear pool, a baseline):
EMFuse, EMSelect, PackLLM and the online rules are choices of λ.
"""

import inspect
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emfuse_jax.energy import check_weights
from emfuse_jax.llm._rule import FusionRule, entropy, memoryless, uniform_weights
from emfuse_jax.llm.emselect import emselect
from emfuse_jax.llm.evidence import evidence, exponentiated_gradient
from emfuse_jax.llm.packllm import packllm_opt, packllm_sim, top_one

__all__ = [
    "FUSION_RULES",
    "FusionRule",
    "entropy_adaptive",
    "fixed",
    "linear_pool",
    "rule_by_name",
    "uniform",
]


def uniform() -> FusionRule:
    """``λ_i = 1 / n``: EMFuse as published.

    Example:
        >>> rule = uniform()
        >>> rule.weights((), jnp.zeros((4, 1, 257)))[:, 0].tolist()  # [model, batch, vocab]
        [0.25, 0.25, 0.25, 0.25]
    """
    return memoryless(uniform_weights)


def fixed(weights: Sequence[float] | Float[Array, "model"]) -> FusionRule:
    """The same weights everywhere.

    Args:
        weights: one per expert, non-negative, summing to one.

    Raises:
        ValueError: if they are not; a wrong number is found when the rule meets experts.

    Example:
        >>> fixed([0.7, 0.7])
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    return memoryless(_constant("fixed", weights))


def linear_pool(
    weights: Sequence[float] | Float[Array, "model"] | None = None,
) -> FusionRule:
    """The linear opinion pool ``Σ λ_i p_i``: a baseline, not a sum of energies.

    Args:
        weights: one per expert, non-negative, summing to one; None is uniform.

    Raises:
        ValueError: as `fixed`.

    Example:
        >>> rule = linear_pool([0.75, 0.25])
        >>> rule.linear, rule.weights((), jnp.zeros((2, 1, 257)))[:, 0].tolist()
        (True, [0.75, 0.25])
    """
    if weights is None:
        return memoryless(uniform_weights, linear=True)
    return memoryless(_constant("linear_pool", weights), linear=True)


def entropy_adaptive(smoothing: float = 0.1, power: float = 1.0) -> FusionRule:
    """Trusts an expert the more, the more certain it is of the token to come.

    ``λ_i = (c_i + a) / Σ_j (c_j + a)`` with the certainty ``c_i = (1 - H_i / log V)^k``
    between 0 (uniform over the vocabulary) and 1 (one token), and Laplace smoothing
    ``a``: no expert is left without a vote, and where none is certain all weights are
    equal. The papers name such a rule without a formula; this one is ours.

    Args:
        smoothing: a, positive; towards infinity it is uniform.
        power: k, positive.

    Raises:
        ValueError: if an option is not positive.

    Example:
        >>> certain, unsure = jnp.array([50.0, 0.0]), jnp.zeros(2)
        >>> log_probs = jax.nn.log_softmax(jnp.stack([certain, unsure]))[:, None]
        >>> rule = entropy_adaptive(smoothing=0.1)
        >>> [f"{x:.3f}" for x in rule.weights((), log_probs)[:, 0]]  # 1.1 / 1.2 and 0.1 / 1.2
        ['0.917', '0.083']
    """
    for name, value in (("smoothing", smoothing), ("power", power)):
        if not (value > 0 and np.isfinite(value)):
            raise ValueError(
                f"entropy_adaptive: {name} {value}, expected a positive number"
            )

    def weight_fn(log_probs: jax.Array) -> jax.Array:
        # A vocabulary of one token leaves nothing to be uncertain of.
        most = np.log(max(log_probs.shape[-1], 2))
        certainty = jnp.clip(1.0 - entropy(log_probs) / most, 0.0, 1.0) ** power
        smoothed = certainty + smoothing
        return smoothed / jnp.sum(smoothed, axis=0, keepdims=True)

    return memoryless(weight_fn)


FUSION_RULES: MappingProxyType[str, Callable[..., FusionRule]] = MappingProxyType(
    {
        "emfuse": uniform,
        "uniform": uniform,
        "fixed": fixed,
        "entropy_adaptive": entropy_adaptive,
        "packllm_sim": packllm_sim,
        "packllm_opt": packllm_opt,
        "top_one": top_one,
        "linear_pool": linear_pool,
        "emselect": emselect,
        "evidence": evidence,
        "exponentiated_gradient": exponentiated_gradient,
    }
)
"""Every rule by name; "emfuse" is "uniform"."""


def rule_by_name(name: str, **options: Any) -> FusionRule:
    """The rule of this name, with its options.

    Args:
        name: a key of `FUSION_RULES`.
        **options: of that rule; the others keep their defaults.

    Raises:
        ValueError: if there is no such rule or option (all are listed), if a needed one
            is missing, or if a value is bad.

    Example:
        >>> rule_by_name("packllm_sim", temperature=0.1).needs_prompt
        True
    """
    if name not in FUSION_RULES:
        raise ValueError(
            f"there is no fusion rule {name!r}; there are {', '.join(FUSION_RULES)}"
        )
    factory = FUSION_RULES[name]
    signature = inspect.signature(factory)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(
            f"fusion rule {name!r}: {error}; its options are {signature}"
        ) from None
    return factory(**options)


def _constant(
    rule: str, weights: Sequence[float] | Float[Array, "model"]
) -> Callable[[jax.Array], jax.Array]:
    if np.ndim(weights) != 1:
        raise ValueError(
            f"{rule}: weights of shape {np.shape(weights)}, expected one per expert"
        )
    checked = check_weights(weights, np.shape(weights)[0])

    def weight_fn(log_probs: jax.Array) -> jax.Array:
        if len(checked) != len(log_probs):
            raise ValueError(
                f"{rule}: {len(checked)} weights for {len(log_probs)} experts; give one "
                "weight per expert"
            )
        column = checked.astype(log_probs.dtype)[:, None]
        return jnp.broadcast_to(column, log_probs.shape[:-1])

    return weight_fn
