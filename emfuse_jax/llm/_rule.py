"""What a fusion rule is, and the pieces that rules are made of.

A rule says how much each expert counts in the next-token law. It sees the experts'
log-probabilities and the tokens that were read, never a model, so that the same rule
weighs two bigram tables or two transformers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import State
from emfuse_jax.numerics import multiply_no_nan
from emfuse_jax.tree import select

__all__ = ["FusionRule"]


class FusionRule(NamedTuple):
    """Weights of experts, token by token.

    ``init(log_probs [model, batch, time, vocab], tokens [batch, time], valid [batch,
    time]) -> state`` reads the prompt; column ``t`` of ``log_probs`` says what follows
    the tokens up to and with ``t``. With nothing valid it is the state before any text.
    Leaves of the state lead with ``batch``.
    ``weights(state, log_probs [model, batch, vocab]) -> [model, batch]`` of the token to
    come, summing to one over the experts.
    ``observe(state, log_probs [model, batch, vocab], token [batch]) -> state`` after a
    token was read, with the log-probabilities that predicted it; None where a rule
    remembers nothing of what follows the prompt.

    ``needs_prompt``: whether ``init`` wants the whole prompt; otherwise it gets the last
    column. A rule that observes needs it, since it has to observe the prompt too.
    ``linear``: pool ``Σ w_i p_i`` instead of the log-opinion pool.
    """

    init: Callable[[jax.Array, jax.Array, jax.Array], State]
    weights: Callable[[State, jax.Array], jax.Array]
    observe: Callable[[State, jax.Array, jax.Array], State] | None = None
    needs_prompt: bool = False
    linear: bool = False


def memoryless(
    weight_fn: Callable[[jax.Array], jax.Array], *, linear: bool = False
) -> FusionRule:
    """A rule that looks at the log-probabilities of the token to come, and no further."""

    def init(log_probs: jax.Array, tokens: jax.Array, valid: jax.Array) -> State:
        del log_probs, tokens, valid
        return ()

    def weights(state: State, log_probs: jax.Array) -> jax.Array:
        del state
        return weight_fn(log_probs)

    return FusionRule(init, weights, linear=linear)


def estimated_once(
    estimate: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> FusionRule:
    """A rule whose weights ``[model, batch]`` come from the prompt and stay."""

    def init(log_probs: jax.Array, tokens: jax.Array, valid: jax.Array) -> State:
        return estimate(log_probs, tokens, valid).T

    def weights(state: State, log_probs: jax.Array) -> jax.Array:
        del log_probs
        return state.T

    return FusionRule(init, weights, needs_prompt=True)


def prompt_targets(
    tokens: Int[Array, "batch time"], valid: Bool[Array, "batch time"]
) -> tuple[Int[Array, "batch following"], Bool[Array, "batch following"]]:
    """The token that each column but the last predicts, and whether both are valid."""
    return tokens[:, 1:], valid[:, :-1] & valid[:, 1:]


def token_log_probs(
    log_probs: Float[Array, "model *batch vocab"], tokens: Int[Array, "*batch"]
) -> Float[Array, "model *batch"]:
    """What each expert gave to the token that came."""
    index = jnp.broadcast_to(tokens[None, ..., None], (*log_probs.shape[:-1], 1))
    return jnp.take_along_axis(log_probs, index, axis=-1)[..., 0]


def prompt_loss(
    log_probs: Float[Array, "model batch time vocab"],
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
) -> Float[Array, "model batch"]:
    """Mean cross-entropy in nats of each expert on the prompt; 0 where it is empty.

    The logarithm of its perplexity. The first token is predicted by nothing.
    """
    targets, mask = prompt_targets(tokens, valid)
    losses = -token_log_probs(log_probs[:, :, :-1], targets)
    count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).T
    return jnp.sum(jnp.where(mask[None], losses, 0.0), axis=-1) / count


def read_prompt(
    observe: Callable[[State, jax.Array, jax.Array], State],
    state: State,
    log_probs: Float[Array, "model batch time vocab"],
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
) -> State:
    """Observes the tokens of a prompt one after the other."""
    targets, mask = prompt_targets(tokens, valid)

    def column(state: State, inputs: tuple[jax.Array, ...]) -> tuple[State, None]:
        row, token, live = inputs
        return select(live, observe(state, row, token), state), None

    columns = (jnp.moveaxis(log_probs[:, :, :-1], 2, 0), targets.T, mask.T)
    return jax.lax.scan(column, state, columns)[0]


def uniform_weights(
    log_probs: Float[Array, "model *batch vocab"],
) -> Float[Array, "model *batch"]:
    """One over the number of experts."""
    return jnp.full(log_probs.shape[:-1], 1.0 / len(log_probs), log_probs.dtype)


def one_hot_weights(
    expert: Int[Array, "*batch"], log_probs: Float[Array, "model *batch vocab"]
) -> Float[Array, "model *batch"]:
    """All the weight on one expert of each row."""
    return jax.nn.one_hot(expert, len(log_probs), axis=0, dtype=log_probs.dtype)


def entropy(log_probs: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """Shannon entropy in nats."""
    return -jnp.sum(multiply_no_nan(jnp.exp(log_probs), log_probs), axis=-1)
