"""Several language models as one: ``log q(y | text) = Σ_i λ_i log p_i(y | text) - log Z``.

The law is `energy.log_opinion_pool`, the same that fuses transition energies: an expert's
energy of a token is ``-log p_i``. Everything else is a rule for λ (`rules`). The result is
a `LanguageModel`, so that decoding and scoring do not ask whether a model is one or many;
its logits are normalised log-probabilities.

Every column is fused as it was when the text had been read so far. A rule that estimates
its weights on the prompt therefore has them from the prompt's last column on; columns
before that are fused with its weights without a prompt, since a weight that has seen the
text it scores is no forecast.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import LanguageModel, Params, State
from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm._experts import Experts, gather_experts
from emfuse_jax.llm._rule import FusionRule
from emfuse_jax.llm.vocabulary import VocabularyMap
from emfuse_jax.tree import select

__all__ = ["FusedCache", "fuse_language_models", "linear_opinion_pool"]


class FusedCache(NamedTuple):
    """What a fusion remembers of a text.

    ``experts`` are the experts' caches and ``rule`` the rule's state. ``log_probs [model,
    batch, vocab]`` are the experts' laws of the token to come, and ``weights [model,
    batch]`` what each counts in it: the choice of a rule that chooses is their argmax.
    ``started [batch]`` tells whether a row has read anything.
    """

    experts: State
    rule: State
    log_probs: Float[Array, "model batch vocab"]
    weights: Float[Array, "model batch"]
    started: Bool[Array, "batch"]


def fuse_language_models(
    models: LanguageModel | Sequence[LanguageModel],
    rule: FusionRule,
    *,
    num_models: int | None = None,
    temperatures: Sequence[float] | Float[Array, "model"] | None = None,
    vocabulary: Sequence[VocabularyMap] | None = None,
) -> LanguageModel:
    """The log-opinion pool of language models, as one language model.

    Args:
        models: several models, whose params are then the tuple of theirs; or one, whose
            params are a stack ``[model, …]`` (`tree.stack`) of ``num_models`` experts of
            that architecture, evaluated as one batched step.
        rule: how the experts are weighed (`rules`).
        num_models: how many experts a stack holds; only with one model.
        temperatures: one per expert, positive: ``p_i = softmax(z_i / τ_i)``. None is 1.
        vocabulary: how each expert's tokens stand for those of the fusion
            (`align_vocabularies`); None where all have the same.

    Raises:
        ValueError: if there is no model, a number of weights, temperatures or maps is not
            that of the experts, a temperature is not positive, or vocabularies differ
            without a mapping.

    Example:
        >>> from emfuse_jax.llm import LmConfig, language_model, uniform
        >>> small, large = (
        ...     language_model(LmConfig(vocab_size=257, hidden_size=16, num_layers=n, num_heads=2))
        ...     for n in (1, 3)
        ... )
        >>> fused = fuse_language_models([small, large], uniform())  # params: the tuple of theirs
        >>> fused.vocab_size
        257
        >>> many = fuse_language_models(small, uniform(), num_models=3)  # params: tree.stack(…)
    """
    experts = gather_experts(
        models,
        num_models=num_models,
        temperatures=temperatures,
        vocabulary=vocabulary,
    )
    _check_rule(rule, experts)
    return _fused_model(experts, rule)


def linear_opinion_pool(
    log_probs: Float[Array, "model *batch vocab"],
    weights: Float[Array, "model *batch"],
) -> Float[Array, "*batch vocab"]:
    """``log Σ_i w_i p_i``; the weights sum to one, and so does the result.

    Example:
        >>> log_probs = jnp.log(jnp.array([[1.0, 0.0], [0.5, 0.5]]))
        >>> jnp.exp(linear_opinion_pool(log_probs, jnp.array([0.5, 0.5]))).tolist()
        [0.75, 0.25]
    """
    return jax.nn.logsumexp(log_probs, axis=0, b=weights[..., None])


def _fused_model(experts: Experts, rule: FusionRule) -> LanguageModel:
    def init_cache(batch_size: int, length: int) -> FusedCache:
        state, log_probs = _blank(rule, experts, batch_size)
        return FusedCache(
            experts=experts.init_cache(batch_size, length),
            rule=state,
            log_probs=log_probs,
            weights=jnp.full(log_probs.shape[:-1], 1.0 / experts.num_models),
            started=jnp.zeros(batch_size, bool),
        )

    def prefill(
        params: Params,
        tokens: Int[Array, "batch time"],
        valid: Bool[Array, "batch time"],
        cache: FusedCache,
        *,
        last_only: bool = False,
    ) -> tuple[Float[Array, "batch column vocab"], FusedCache]:
        skip = last_only and not rule.needs_prompt
        log_probs, caches = experts.call(
            "prefill", params, tokens, cache.experts, valid, last_only=skip
        )
        last = _last_valid(valid)
        newest = log_probs[:, :, 0] if skip else _at_column(log_probs, last)
        if rule.needs_prompt:
            state = rule.init(log_probs, tokens, valid)
        else:
            state = rule.init(newest[:, :, None], tokens[:, -1:], valid[:, -1:])
        fused, weights = _fuse(rule, state, newest)
        after = FusedCache(caches, state, newest, weights, jnp.any(valid, axis=-1))
        if last_only:
            return fused[:, None], after
        columns, _ = _fuse_columns(rule, tokens, valid, log_probs, cache)
        at_last = jnp.arange(tokens.shape[1])[None] == last[:, None]
        return jnp.where(at_last[..., None], fused[:, None], columns), after

    def extend(
        params: Params,
        tokens: Int[Array, "batch time"],
        valid: Bool[Array, "batch time"],
        cache: FusedCache,
    ) -> tuple[Float[Array, "batch time vocab"], FusedCache]:
        log_probs, caches = experts.call("extend", params, tokens, cache.experts, valid)
        fused, after = _fuse_columns(rule, tokens, valid, log_probs, cache)
        return fused, after._replace(experts=caches)

    def step(
        params: Params, tokens: Int[Array, "batch"], cache: FusedCache
    ) -> tuple[Float[Array, "batch vocab"], FusedCache]:
        log_probs, caches = experts.call("step", params, tokens, cache.experts)
        live = jnp.ones(tokens.shape, bool)
        after, fused = _read_column(rule, cache, (tokens, live, log_probs))
        return fused, after._replace(experts=caches)

    return LanguageModel(
        init_cache,
        prefill,
        extend,
        step,
        vocab_size=experts.vocab_size,
        context_length=experts.context_length,
    )


def _fuse(
    rule: FusionRule, state: State, log_probs: Float[Array, "model batch vocab"]
) -> tuple[Float[Array, "batch vocab"], Float[Array, "model batch"]]:
    """The fused law and the weights in it: the one place where experts are pooled."""
    # Folded into the pool, constant weights make XLA's CPU program ten times slower.
    weights = jax.lax.optimization_barrier(rule.weights(state, log_probs))
    pool = linear_opinion_pool if rule.linear else log_opinion_pool
    return pool(log_probs, weights), weights


def _fuse_columns(
    rule: FusionRule,
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
    log_probs: Float[Array, "model batch time vocab"],
    cache: FusedCache,
) -> tuple[Float[Array, "batch time vocab"], FusedCache]:
    """Fuses columns of text as if they had been read one after the other."""
    if rule.observe is None:
        # Nothing that is read here moves the weights: all columns at once.
        columns = jax.vmap(
            functools.partial(_fuse, rule, cache.rule), in_axes=2, out_axes=(1, 2)
        )
        fused, weights = columns(log_probs)
        last, some = _last_valid(valid), jnp.any(valid, axis=-1)
        newest = _at_column(log_probs, last)
        held = _at_column(weights[..., None], last)[..., 0]
        after = cache._replace(
            log_probs=jnp.where(some[None, :, None], newest, cache.log_probs),
            weights=jnp.where(some[None], held, cache.weights),
            started=cache.started | some,
        )
        return fused, after
    rows = (tokens.T, valid.T, jnp.moveaxis(log_probs, 2, 0))
    # The experts' caches are not carried: the scan would copy them.
    carried = cache._replace(experts=())
    after, fused = jax.lax.scan(functools.partial(_read_column, rule), carried, rows)
    return jnp.moveaxis(fused, 0, 1), after._replace(experts=cache.experts)


def _read_column(
    rule: FusionRule, cache: FusedCache, column: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[FusedCache, Float[Array, "batch vocab"]]:
    """Reads one token per row; rows that are not live stay as they are."""
    token, live, log_probs = column
    state = cache.rule
    if rule.observe is not None:
        observed = rule.observe(state, cache.log_probs, token)
        state = select(live & cache.started, observed, state)
    fused, weights = _fuse(rule, state, log_probs)
    after = cache._replace(
        rule=state,
        log_probs=jnp.where(live[None, :, None], log_probs, cache.log_probs),
        weights=jnp.where(live[None], weights, cache.weights),
        started=cache.started | live,
    )
    return after, fused


def _last_valid(valid: Bool[Array, "batch time"]) -> Int[Array, "batch"]:
    """The last valid column of each row; the last of all where there is none."""
    return valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=-1)


def _at_column(
    columns: Float[Array, "model batch time vocab"], index: Int[Array, "batch"]
) -> Float[Array, "model batch vocab"]:
    return jnp.take_along_axis(columns, index[None, :, None, None], axis=2)[:, :, 0]


def _blank(
    rule: FusionRule, experts: Experts, batch_size: int
) -> tuple[State, Float[Array, "model batch vocab"]]:
    """The rule's state before any text, and laws that say nothing."""
    shape = (experts.num_models, batch_size, 1, experts.vocab_size)
    log_probs = jnp.full(shape, -np.log(experts.vocab_size))
    nothing = jnp.zeros((batch_size, 1), jnp.int32)
    state = rule.init(log_probs, nothing, nothing.astype(bool))
    return state, log_probs[:, :, 0]


def _check_rule(rule: FusionRule, experts: Experts) -> None:
    """Tries the rule on shapes alone, so that a wrong number of weights is found here."""
    if rule.observe is not None and not rule.needs_prompt:
        raise ValueError(
            "the rule observes tokens but does not ask for the prompt; set needs_prompt, "
            "or what it knows depends on how the text was cut"
        )

    def weights() -> jax.Array:
        state, log_probs = _blank(rule, experts, 1)
        return rule.weights(state, log_probs)

    shape = jax.eval_shape(weights).shape
    if shape != (experts.num_models, 1):
        raise ValueError(
            f"the rule's weights have shape {shape} for {experts.num_models} experts and one "
            f"row, expected {(experts.num_models, 1)}"
        )
