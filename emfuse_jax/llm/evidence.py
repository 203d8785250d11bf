"""Weights that follow the text: online rules, without training, from the prompt on.

A prompt says which expert knows the *beginning* of a text. These rules go on listening:
every token that is read, the prompt's and those that follow, moves the weights before
the next one is predicted. Old evidence fades by ``γ`` per token, so that in a document of
several domains the weights can follow.

* `evidence`: ``λ_i ∝ exp(η S_i)``, ``S_i ← γ S_i + log p_i(y)``. With ``η = γ = 1`` these
  are the posterior weights of Bayes' rule under a uniform prior, and the *linear* pool
  with them is the exact Bayesian mixture of the experts. With ``γ = 1`` and ``η = 1 /
  (τ n)`` after ``n`` tokens they are PackLLM-sim's.
* `exponentiated_gradient`: the same, less what was to be expected: ``S_i ← γ S_i +
  log p_i(y) - E_q[log p_i]`` with ``q`` the fused law. The difference is the downhill
  direction of the pool's own loss, ``-∂(-log q(y))/∂λ_i``, and that loss is convex in λ:
  this is online mirror descent on what PackLLM-opt searches by a grid. It does not reward
  an expert for being sharp where it would have been right anyway.

References:
    Kivinen, Warmuth, "Exponentiated Gradient versus Gradient Descent for Linear
    Predictors", Information and Computation 132(1), 1997.
    Heskes, "Selecting Weighting Factors in Logarithmic Opinion Pools", NeurIPS 1997.
    Herbster, Warmuth, "Tracking the Best Expert", Machine Learning 32, 1998 (weights
    that may move on).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emfuse_jax.base import State
from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm._rule import FusionRule, entropy, read_prompt, token_log_probs
from emfuse_jax.numerics import multiply_no_nan

__all__ = ["evidence", "exponentiated_gradient"]


def evidence(
    rate: float = 0.5,
    decay: float = 0.95,
    *,
    entropy_power: float = 0.0,
    floor: float = -20.0,
    linear: bool = False,
) -> FusionRule:
    """``λ_i ∝ exp(η Σ_s γ^(t-s) log p_i(y_s)) · (0.1 + H_i)^-κ``.

    Args:
        rate: η, in 1 / nats; 0 is uniform (but for the entropy).
        decay: γ in [0, 1], per token: evidence counts for about ``1 / (1 - γ)`` tokens.
        entropy_power: κ: also trust an expert the more, the smaller the entropy ``H_i``
            of its law of the token to come. 0 leaves that out.
        floor: log-probabilities of observed tokens count as no less, in nats; one
            impossible token would otherwise silence an expert for good.
        linear: pool linearly, ``Σ λ_i p_i``.

    Raises:
        ValueError: if an option is outside its range.

    Example:
        >>> rule = evidence(rate=1.0, decay=1.0)
        >>> log_probs = jnp.log(jnp.array([[[0.8, 0.2]], [[0.2, 0.8]]]))  # [model, batch, vocab]
        >>> nothing = jnp.zeros((1, 1), int)
        >>> state = rule.init(log_probs[:, :, None], nothing, nothing > 0)
        >>> state = rule.observe(state, log_probs, jnp.array([0]))  # what the first expected
        >>> [f"{x:.2f}" for x in rule.weights(state, log_probs)[:, 0]]
        ['0.80', '0.20']
    """
    _check_options("evidence", rate, decay, floor)
    if not 0 <= entropy_power < math.inf:
        raise ValueError(
            f"evidence: entropy_power {entropy_power}, expected 0 (leave the entropy "
            "out) or a positive number"
        )

    def gain(
        log_probs: Float[Array, "model batch vocab"],
        token: Int[Array, "batch"],
        weights: Float[Array, "model batch"],
    ) -> Float[Array, "model batch"]:
        del weights
        return jnp.maximum(token_log_probs(log_probs, token), floor)

    def weight_fn(
        score: Float[Array, "model batch"], log_probs: Float[Array, "model batch vocab"]
    ) -> Float[Array, "model batch"]:
        logits = rate * score
        if entropy_power:
            logits = logits - entropy_power * jnp.log(0.1 + entropy(log_probs))
        return jax.nn.softmax(logits, axis=0)

    return _online(gain, weight_fn, decay, linear=linear)


def exponentiated_gradient(
    rate: float = 0.5, decay: float = 0.98, *, floor: float = -20.0
) -> FusionRule:
    """Online mirror descent on the loss of the log-opinion pool itself.

    ``λ_i ∝ exp(η S_i)``, ``S_i ← γ S_i + log p_i(y) - Σ_y' q(y') log p_i(y')``.

    Args:
        rate: η, in 1 / nats; 0 is uniform.
        decay: γ in [0, 1], per token: pulls the weights back to uniform.
        floor: log-probabilities count as no less, in nats.

    Raises:
        ValueError: if an option is outside its range.

    Example:
        >>> rule = exponentiated_gradient(rate=1.0)
        >>> log_probs = jnp.log(jnp.array([[[0.8, 0.2]], [[0.2, 0.8]]]))  # [model, batch, vocab]
        >>> nothing = jnp.zeros((1, 1), int)
        >>> state = rule.init(log_probs[:, :, None], nothing, nothing > 0)
        >>> state = rule.observe(state, log_probs, jnp.array([0]))  # what the first expected
        >>> [f"{x:.2f}" for x in rule.weights(state, log_probs)[:, 0]]
        ['0.80', '0.20']
    """
    _check_options("exponentiated_gradient", rate, decay, floor)

    def gain(
        log_probs: Float[Array, "model batch vocab"],
        token: Int[Array, "batch"],
        weights: Float[Array, "model batch"],
    ) -> Float[Array, "model batch"]:
        pool = jnp.exp(log_opinion_pool(log_probs, weights))[None]
        floored = jnp.maximum(log_probs, floor)
        expected = jnp.sum(multiply_no_nan(pool, floored), axis=-1)
        return token_log_probs(floored, token) - expected

    def weight_fn(
        score: Float[Array, "model batch"], log_probs: Float[Array, "model batch vocab"]
    ) -> Float[Array, "model batch"]:
        del log_probs
        return jax.nn.softmax(rate * score, axis=0)

    return _online(gain, weight_fn, decay)


def _online(gain, weight_fn, decay: float, *, linear: bool = False) -> FusionRule:
    """A rule whose state is a discounted sum of gains, ``score [batch, model]``."""

    def weights(score: State, log_probs: jax.Array) -> jax.Array:
        return weight_fn(score.T, log_probs)

    def observe(score: State, log_probs: jax.Array, token: jax.Array) -> State:
        held = weight_fn(score.T, log_probs)
        moved = decay * score.T + gain(log_probs, token, held)
        # Only differences matter; kept near 0 they lose no digits in a long text.
        return (moved - jnp.max(moved, axis=0, keepdims=True)).T

    def init(log_probs: jax.Array, tokens: jax.Array, valid: jax.Array) -> State:
        blank = jnp.zeros((len(tokens), len(log_probs)), log_probs.dtype)
        return read_prompt(observe, blank, log_probs, tokens, valid)

    return FusionRule(init, weights, observe, needs_prompt=True, linear=linear)


def _check_options(name: str, rate: float, decay: float, floor: float) -> None:
    # Infinite ones would be NaN where experts agree, or where all rule a token out.
    if not 0 <= rate < math.inf:
        raise ValueError(f"{name}: rate {rate}, expected 0 (uniform) or a positive one")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(
            f"{name}: decay {decay}, expected a number in [0, 1] (1 never forgets)"
        )
    if not -math.inf < floor < 0:
        raise ValueError(
            f"{name}: floor {floor}, expected a finite negative log-probability"
        )
