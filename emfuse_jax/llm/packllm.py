"""PackLLM: weights from how well each expert predicts the prompt.

PackLLM adds the experts' raw logits, ``softmax(Σ λ_i z_i)``. With ``Σ λ_i = 1`` the
constants that separate logits from log-probabilities cancel, so at temperature one this
*is* the log-opinion pool: its rules differ from EMFuse's only in λ. Weights are estimated
once, on the prompt, and stay; before a prompt was read, and where it is shorter than two
tokens, they are uniform.

Reference:
    Mavromatis, Karypis, Karypis, "Pack of LLMs: Model Fusion at Test-Time via
    Perplexity Optimization", 2024. https://arxiv.org/abs/2404.11531
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm._rule import (
    FusionRule,
    estimated_once,
    one_hot_weights,
    prompt_loss,
    prompt_targets,
    token_log_probs,
    uniform_weights,
)

__all__ = [
    "packllm_opt",
    "packllm_opt_weights",
    "packllm_sim",
    "packllm_sim_weights",
    "top_one",
]

GRID_STEPS = 20
"""The line search of PackLLM-opt looks at shares 0, 1/20, …, 1."""


def packllm_sim(temperature: float = 1.0) -> FusionRule:
    """``λ = softmax(-L / τ)`` with ``L_i`` expert i's loss on the prompt.

    Args:
        temperature: positive; towards 0 it is `top_one`, towards infinity uniform.

    Raises:
        ValueError: if the temperature is not positive and finite.

    Example:
        >>> rule = packllm_sim(temperature=1.0)
        >>> law = jnp.array([[[[0.9, 0.1]] * 3], [[[0.1, 0.9]] * 3]])  # [model, batch, time, vocab]
        >>> prompt = jnp.zeros((1, 3), int)
        >>> state = rule.init(jnp.log(law), prompt, prompt == 0)  # 0.9 against 0.1 at every token
        >>> [f"{x:.2f}" for x in rule.weights(state, jnp.log(law[:, :, -1]))[:, 0]]
        ['0.90', '0.10']
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"packllm_sim: temperature {temperature}, expected a positive number; for "
            "the limit at 0 use top_one(), for that at infinity uniform()"
        )

    def estimate(
        log_probs: jax.Array, tokens: jax.Array, valid: jax.Array
    ) -> jax.Array:
        return packllm_sim_weights(log_probs, tokens, valid, temperature=temperature)

    return estimated_once(estimate)


def packllm_opt() -> FusionRule:
    """The greedy search for λ that predicts the prompt best; `packllm_opt_weights`.

    Example:
        >>> rule = packllm_opt()
        >>> def weigh(log_probs, prompt):  # [model, batch, time, vocab], [batch, time]
        ...     state = rule.init(log_probs, prompt, jnp.ones(prompt.shape, bool))
        ...     return rule.weights(state, log_probs[:, :, -1])  # the same at every token to come
        >>> shapes = jnp.zeros((3, 2, 5, 257)), jnp.zeros((2, 5), int)
        >>> jax.eval_shape(weigh, *shapes).shape
        (3, 2)
    """
    return estimated_once(packllm_opt_weights)


def top_one() -> FusionRule:
    """All weight on the expert of least loss on the prompt; ties go to the first.

    Example:
        >>> rule = top_one()
        >>> law = jnp.array([[[[0.4, 0.6]] * 3], [[[0.6, 0.4]] * 3]])  # [model, batch, time, vocab]
        >>> prompt = jnp.zeros((1, 3), int)
        >>> state = rule.init(jnp.log(law), prompt, prompt == 0)
        >>> rule.weights(state, jnp.log(law[:, :, -1]))[:, 0].tolist()
        [0.0, 1.0]
    """

    def estimate(
        log_probs: jax.Array, tokens: jax.Array, valid: jax.Array
    ) -> jax.Array:
        loss = prompt_loss(log_probs, tokens, valid)
        best = one_hot_weights(jnp.argmin(loss, axis=0), log_probs[:, :, 0])
        return _unless_empty(best, tokens, valid)

    return estimated_once(estimate)


def packllm_sim_weights(
    log_probs: Float[Array, "model batch time vocab"],
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "model batch"]:
    """PackLLM-sim: ``λ_i ∝ PPL_i^(-1/τ)``.

    Args:
        log_probs: column ``t`` says what follows the tokens up to and with ``t``.
        tokens: of the prompt.
        valid: false for padding.
        temperature: τ, positive.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[[0.8, 0.2]] * 2], [[[0.2, 0.8]] * 2]]))
        >>> tokens, valid = jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
        >>> packllm_sim_weights(log_probs, tokens, valid)[:, 0].round(2).tolist()
        [0.799..., 0.199...]
    """
    loss = prompt_loss(log_probs, tokens, valid)
    # Who called a token impossible that came has no vote; where all did, all have one.
    none = jnp.all(loss == jnp.inf, axis=0, keepdims=True)
    return jax.nn.softmax(jnp.where(none, 0.0, -loss) / temperature, axis=0)


def packllm_opt_weights(
    log_probs: Float[Array, "model batch time vocab"],
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
) -> Float[Array, "model batch"]:
    """PackLLM-opt: experts join in order of their loss, each with the best share.

    ``q ← normalise(q^a · p_k^(1-a))`` with ``a`` from 0, 0.05, …, 1 of least prompt loss.
    Among equals the smallest ``a`` wins, in favour of the expert that joins, as in the
    authors' code; experts of equal loss join in their given order. ``a = 1`` is on the
    grid, so the pool is never worse on the prompt than its best member.

    Args:
        log_probs: column ``t`` says what follows the tokens up to and with ``t``.
        tokens: of the prompt.
        valid: false for padding.

    Returns:
        Weights in the experts' given order.

    Example:
        >>> log_probs = jnp.log(jnp.array([[[[0.8, 0.2]] * 2], [[[0.2, 0.8]] * 2]]))
        >>> tokens, valid = jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
        >>> jax.jit(packllm_opt_weights)(log_probs, tokens, valid)[:, 0].tolist()
        [1.0, 0.0]
    """
    targets, mask = prompt_targets(tokens, valid)
    loss = prompt_loss(log_probs, tokens, valid)
    search = jax.vmap(_join_greedily, in_axes=(1, 1, 0, 0), out_axes=1)
    weights = search(log_probs[:, :, :-1], loss, targets, mask)
    return _unless_empty(weights, tokens, valid)


def _join_greedily(
    log_probs: Float[Array, "model time vocab"],
    loss: Float[Array, "model"],
    targets: Int[Array, "time"],
    mask: Bool[Array, "time"],
) -> Float[Array, "model"]:
    order = jnp.argsort(loss, stable=True)
    grid = jnp.arange(GRID_STEPS + 1, dtype=log_probs.dtype) / GRID_STEPS
    weights = jax.nn.one_hot(order[0], len(log_probs), dtype=log_probs.dtype)
    current = log_probs[order[0]]
    for rank in range(1, len(log_probs)):
        pair = jnp.stack([current, log_probs[order[rank]]])

        def pool(share: jax.Array, pair: jax.Array = pair) -> jax.Array:
            return log_opinion_pool(pair, jnp.stack([share, 1.0 - share]))

        def pooled_loss(share: jax.Array, pool=pool) -> jax.Array:
            losses = -token_log_probs(pool(share)[None], targets)[0]
            return jnp.sum(jnp.where(mask, losses, 0.0))

        # One share at a time: all of them at once would be 21 times the logits.
        share = grid[jnp.argmin(jax.lax.map(pooled_loss, grid))]
        current = pool(share)
        joined = jax.nn.one_hot(order[rank], len(log_probs), dtype=log_probs.dtype)
        weights = share * weights + (1.0 - share) * joined
    return weights


def _unless_empty(
    weights: Float[Array, "model batch"],
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
) -> Float[Array, "model batch"]:
    """Uniform weights in rows whose prompt predicts nothing."""
    _, mask = prompt_targets(tokens, valid)
    uniform = uniform_weights(weights[..., None])
    return jnp.where(jnp.any(mask, axis=-1)[None], weights, uniform)
