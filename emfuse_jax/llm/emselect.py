"""EMSelect: at every token, the one expert whose own law is nearest to the fused one.

Two experts ``i, j`` meet in their pool ``p_ij ∝ p_i^α p_j^(1-α)``, and ``i`` is chosen
iff ``KL(p_ij ‖ p_i) ≤ KL(p_ij ‖ p_j)``, that is iff ``E_ij[log p_i] ≥ E_ij[log p_j]``:
the entropy of ``p_ij`` is on both sides. More than two experts play a *tournament*. The
papers leave its bracket open, and the winner depends on it; here the first expert defends
its place against each of the others in their given order, and keeps it in a tie. Beside
it stands the rule without an order: the expert of least ``KL(q ‖ p_i)``, with ``q`` the
pool of all. An ``α`` other than ½ draws ``p_ij`` towards one of the pair, who then nearly
always wins: the order decides more than the experts.

What choosing costs. Let ``Q`` be the law of texts drawn from the pool ``q_t`` and ``P``
that of texts drawn from the chosen experts ``p_{i_t}``. With ``Δ_t = KL(q_t ‖ p_{i_t})``
the chain rule gives ``KL(Q ‖ P) = E_Q Σ_t Δ_t ≤ E_Q Σ_t max_i KL(q_t ‖ p_i)``. The
expectation is over texts drawn from the *pool*: sums along a text that EMSelect wrote
estimate ``E_P Σ Δ_t``, which is another number.

Scored on a given text (teacher-forced), EMSelect is ``Σ_t log p_{i_t}(y_t)`` with ``i_t``
chosen before ``y_t`` is seen. That is a proper law of texts, but the law of no single
expert.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.energy import align_weights, categorical_kl, log_opinion_pool
from emfuse_jax.llm._rule import (
    FusionRule,
    memoryless,
    one_hot_weights,
    uniform_weights,
)

__all__ = [
    "SelectionGap",
    "emselect",
    "nearest_to_pool",
    "pairwise_kl",
    "pairwise_margin",
    "pool_divergences",
    "selection_gap",
    "sequence_gap",
    "tournament",
]


class SelectionGap(NamedTuple):
    """What choosing one expert costs against the pool, in nats.

    ``chosen`` is ``Δ = KL(q ‖ p_i)`` of the chosen expert, ``bound`` that of the farthest.
    """

    chosen: Float[Array, "*batch"]
    bound: Float[Array, "*batch"]


def emselect(
    alpha: float = 0.5, order: Literal["tournament", "pool"] = "tournament"
) -> FusionRule:
    """All weight on one expert, chosen anew at every token.

    Args:
        alpha: of the pairwise pools, in [0, 1]: the share of the expert that comes
            first. "pool" has no pairs and ignores it.
        order: "tournament" (depends on the order of the experts) or "pool" (does not).

    Raises:
        ValueError: if ``alpha`` is outside [0, 1] or the order is neither of the two.

    Example:
        >>> from emfuse_jax.llm import fuse_language_models, language_model, LmConfig
        >>> config = LmConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=2)
        >>> fused = fuse_language_models(language_model(config), emselect(), num_models=3)
        >>> fused.vocab_size
        8
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"emselect: alpha {alpha}, expected a number in [0, 1]")
    if order not in ("tournament", "pool"):
        raise ValueError(
            f"emselect: order {order!r}, expected 'tournament' (the experts in their "
            "given order) or 'pool' (the one nearest to the pool of all)"
        )

    def weight_fn(log_probs: jax.Array) -> jax.Array:
        if order == "pool":
            expert = nearest_to_pool(log_probs)
        else:
            expert = tournament(log_probs, alpha=alpha)
        return one_hot_weights(expert, log_probs)

    return memoryless(weight_fn)


def pairwise_kl(
    first: Float[Array, "*batch vocab"],
    second: Float[Array, "*batch vocab"],
    *,
    alpha: float = 0.5,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """``KL(p_ij ‖ p_i)`` and ``KL(p_ij ‖ p_j)`` of the pair's pool ``p_ij``.

    Args:
        first: log-probabilities of expert i.
        second: of expert j.
        alpha: the share of expert i.

    Example:
        >>> law = jnp.log(jnp.array([0.5, 0.5]))
        >>> [round(float(kl), 4) for kl in pairwise_kl(law, law)]
        [0.0, 0.0]
    """
    pool = _pair_pool(first, second, alpha)
    return categorical_kl(pool, first), categorical_kl(pool, second)


def pairwise_margin(
    first: Float[Array, "*batch vocab"],
    second: Float[Array, "*batch vocab"],
    *,
    alpha: float = 0.5,
) -> Float[Array, "*batch"]:
    """``E_ij[log p_i] - E_ij[log p_j] = KL(p_ij ‖ p_j) - KL(p_ij ‖ p_i)``.

    Not negative where expert i wins. Experts that agree on no event have no pool; the
    margin is then 0, and i stays.

    Args:
        first: log-probabilities of expert i.
        second: of expert j.
        alpha: the share of expert i.

    Example:
        >>> sharp, flat = jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]]))
        >>> bool(pairwise_margin(sharp, flat) > 0)
        True
    """
    # The pool of `pairwise_kl`, normalised by the sums and not before them: a seventh of
    # the time on a CPU, where this is a tenth of a decoding step.
    if alpha in (0.0, 1.0):
        pool = first if alpha else second
    else:
        pool = alpha * first + (1.0 - alpha) * second
    top = jnp.max(pool, axis=-1, keepdims=True)
    mass = jnp.exp(pool - jnp.where(jnp.isfinite(top), top, 0.0))
    gain = jnp.where(mass > 0, mass * (first - second), 0.0)
    total = jnp.sum(mass, axis=-1)
    return jnp.sum(gain, axis=-1) / jnp.where(total > 0, total, 1.0)


def tournament(
    log_probs: Float[Array, "model *batch vocab"], *, alpha: float = 0.5
) -> Int[Array, "*batch"]:
    """The expert left when all have met: 0 against 1, the winner against 2, and so on.

    Args:
        log_probs: of each expert, normalised.
        alpha: the share of the expert that holds the place.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4]]))
        >>> int(tournament(log_probs))
        1
    """
    champion = log_probs[0]
    expert = jnp.zeros(log_probs.shape[1:-1], jnp.int32)
    for index in range(1, len(log_probs)):
        challenger = log_probs[index]
        stays = pairwise_margin(champion, challenger, alpha=alpha) >= 0
        expert = jnp.where(stays, expert, index)
        champion = jnp.where(stays[..., None], champion, challenger)
    return expert


def nearest_to_pool(
    log_probs: Float[Array, "model *batch vocab"],
    weights: Float[Array, "model *#weighted"] | None = None,
) -> Int[Array, "*batch"]:
    """The expert of least ``KL(q ‖ p_i)`` to the pool of all; ties go to the first.

    Args:
        log_probs: of each expert, normalised.
        weights: of the pool, ``[model]`` or ``[model, *batch]``; None is uniform.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4]]))
        >>> int(nearest_to_pool(log_probs))
        0
    """
    return jnp.argmin(pool_divergences(log_probs, weights), axis=0)


def pool_divergences(
    log_probs: Float[Array, "model *batch vocab"],
    weights: Float[Array, "model *#weighted"] | None = None,
) -> Float[Array, "model *batch"]:
    """``KL(q ‖ p_i)`` from the log-opinion pool ``q`` to each expert, in nats.

    Args:
        log_probs: of each expert, normalised.
        weights: of the pool, ``[model]`` or ``[model, *batch]``; None is uniform.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.8, 0.2], [0.2, 0.8]]))
        >>> pool_divergences(log_probs).round(4).tolist()
        [0.223..., 0.223...]
    """
    held = uniform_weights(log_probs) if weights is None else weights
    held = align_weights(held, log_probs.shape[:-1])
    pool = log_opinion_pool(log_probs, held)
    return categorical_kl(jnp.broadcast_to(pool[None], log_probs.shape), log_probs)


def selection_gap(
    log_probs: Float[Array, "model *batch vocab"],
    expert: Int[Array, "*batch"],
    weights: Float[Array, "model *#weighted"] | None = None,
) -> SelectionGap:
    """``Δ_t`` and its bound at every token.

    Args:
        log_probs: of each expert, normalised.
        expert: the chosen one.
        weights: of the pool that the choice stands for; None is uniform.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4]]))
        >>> gap = selection_gap(log_probs, jnp.array(0))
        >>> bool(gap.chosen < gap.bound)
        True
    """
    divergences = pool_divergences(log_probs, weights)
    chosen = jnp.take_along_axis(divergences, expert[None], axis=0)[0]
    return SelectionGap(chosen, jnp.max(divergences, axis=0))


def sequence_gap(
    log_probs: Float[Array, "model batch time vocab"],
    expert: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
    weights: Float[Array, "model *#weighted"] | None = None,
) -> SelectionGap:
    """``Σ_t Δ_t`` and ``Σ_t max_i KL(q_t ‖ p_i)`` along each text.

    Over texts drawn from the pool, and only over those, the mean of ``chosen`` is an
    unbiased estimate of ``KL(Q ‖ P)``, and the mean of ``bound`` of its upper bound.

    Args:
        log_probs: of each expert at each token of the text.
        expert: the chosen one.
        valid: the tokens that count.
        weights: of the pool that the choice stands for; None is uniform.

    Example:
        >>> same = jnp.zeros((2, 1, 3, 4))  # logits of two experts that agree on three tokens
        >>> expert, valid = jnp.zeros((1, 3), int), jnp.ones((1, 3), bool)
        >>> gap = jax.jit(sequence_gap)(jax.nn.log_softmax(same), expert, valid)
        >>> gap.chosen.tolist(), gap.bound.tolist()
        ([0.0], [0.0])
    """
    gap = selection_gap(log_probs, expert, weights)
    return SelectionGap(
        *(jnp.sum(jnp.where(valid, part, 0.0), axis=-1) for part in gap)
    )


def _pair_pool(first: jax.Array, second: jax.Array, alpha: float) -> jax.Array:
    shares = jnp.array([alpha, 1.0 - alpha], first.dtype)
    return log_opinion_pool(jnp.stack([first, second]), shares)
