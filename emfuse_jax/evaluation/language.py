"""How well a language model, one or many fused, predicts given text.

A text is a context that is read and a continuation that is scored, token by token and
teacher-forced: ``log p(y|x) = Σ_t log p(y_t | x, y_<t)``. What follows for fused models:

* Rules that weigh experts by the prompt (PackLLM) see the context only, and their
  weights then stay: all answers to one question are scored by one and the same law.
  (PackLLM's own evaluation weighs anew for each candidate answer.) After a context of
  one token there is nothing to weigh by.
* EMSelect scores ``Σ_t log p_{i_t}(y_t | x, y_<t)``, where the expert ``i_t`` is chosen
  from the laws before ``y_t`` is seen. The choice is a function of the prefix, so this
  is a proper law over sequences, the one that decoding samples from; but no single
  expert's, and a continuation may be scored by another expert at each token.

Log-probabilities are in nats. Measures take arrays and are not tied to models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import Key, LanguageModel, Params, State
from emfuse_jax.energy import boltzmann_log_prob, categorical_kl
from emfuse_jax.evaluation.statistics import Interval
from emfuse_jax.llm.decode import check_prompt, check_tokens, token_log_prob

__all__ = [
    "TokenScores",
    "bits_per_byte",
    "document_interval",
    "expert_divergence",
    "next_token_log_probs",
    "perplexity",
    "sequence_log_prob",
    "token_log_probs",
    "watch_tokens",
]


class TokenScores(NamedTuple):
    """What a model makes of each token of a continuation."""

    log_probs: Float[Array, "batch time"]
    greedy: Bool[Array, "batch time"]
    """Whether greedy decoding would have chosen it here."""


def token_log_probs(
    params: Params,
    model: LanguageModel,
    context: Int[Array, "batch prompt"],
    context_valid: Bool[Array, "batch prompt"],
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
    *,
    block: int | None = None,
) -> TokenScores:
    """Scores continuations, each token given the context and those before it.

    Args:
        params: the model's.
        model: any language model; a fusion of several is one.
        context: padded on the left (`pad_left`); one token at least, such as the
            tokenizer's beginning- or end-of-text token.
        context_valid: false for padding.
        tokens: what follows, padded on the right.
        valid: false for padding. The scores there are 0 and false.
        block: columns that are read at once: the logits of all columns are
            ``batch · time · vocab`` numbers, those of a block so many fewer. None reads
            all at once.

    Raises:
        ValueError: where the values are at hand (outside of ``jit``): a context is
            empty or not flush right, a token is not in the vocabulary, or context and
            continuation do not fit into the model's context together.

    Example:
        >>> from emfuse_jax.llm import LmConfig, init_params, language_model, pad_left
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> context, context_valid = pad_left([[65, 66], [65]])
        >>> tokens = jnp.array([[67, 68, 69], [67, 68, 69]])
        >>> def score(key):
        ...     return token_log_probs(
        ...         init_params(key, config), language_model(config),
        ...         context, context_valid, tokens, tokens > 0,
        ...     )
        >>> jax.eval_shape(score, jax.random.key(0)).log_probs.shape
        (2, 3)
    """

    def score(logits: jax.Array, token: jax.Array) -> TokenScores:
        greedy = jnp.argmax(logits, axis=-1) == token
        return TokenScores(token_log_prob(logits, token), greedy)

    scores = _read(
        params, model, (context, context_valid), (tokens, valid), score, block
    )
    return TokenScores(jnp.where(valid, scores.log_probs, 0.0), scores.greedy & valid)


def next_token_log_probs(
    params: Params,
    model: LanguageModel,
    context: Int[Array, "batch prompt"],
    context_valid: Bool[Array, "batch prompt"],
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
) -> Float[Array, "batch time vocab"]:
    """The whole law of each token of a continuation, before it is seen.

    Arguments as in `token_log_probs`. Where a column is not ``valid`` the law means
    nothing.

    Raises:
        ValueError: as `token_log_probs`.

    Example:
        >>> from emfuse_jax.llm import LmConfig, init_params, language_model, pad_left
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> context, context_valid = pad_left([[65, 66], [65]])
        >>> tokens = jnp.array([[67, 68, 69], [67, 68, 69]])
        >>> def laws(key):
        ...     return next_token_log_probs(
        ...         init_params(key, config), language_model(config),
        ...         context, context_valid, tokens, tokens > 0,
        ...     )
        >>> jax.eval_shape(laws, jax.random.key(0)).shape  # [batch, time, vocab]
        (2, 3, 257)
    """

    def score(logits: jax.Array, token: jax.Array) -> jax.Array:
        del token
        return boltzmann_log_prob(-logits)

    return _read(params, model, (context, context_valid), (tokens, valid), score, None)


def watch_tokens(
    params: Params,
    model: LanguageModel,
    context: Int[Array, "batch prompt"],
    context_valid: Bool[Array, "batch prompt"],
    tokens: Int[Array, "batch time"],
    keep: Callable[[State], Any],
) -> Any:
    """What a fused model's cache tells before each token of a given text.

    As ``keep`` in `decode.generate`, but along text that is there: expert choices,
    weights, divergences. Reads one token at a time, at the cost of decoding it.

    Args:
        params: the model's.
        model: any language model.
        context: padded on the left.
        context_valid: false for padding.
        tokens: what follows; padding on the right is read like any token.
        keep: called with the cache that predicts the token at hand.

    Returns:
        What ``keep`` returned, stacked over ``[time, …]``.

    Raises:
        ValueError: as `token_log_probs`, where padding counts as well.

    Example:
        >>> from emfuse_jax import llm
        >>> from emfuse_jax.tree import stack
        >>> config = llm.LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> model = llm.language_model(config)
        >>> fused = llm.fuse_language_models(model, llm.evidence(), num_models=2)
        >>> context, valid = llm.pad_left([[65, 66], [65]])
        >>> def weights(key):
        ...     params = stack([llm.init_params(key, config)] * 2)
        ...     tokens = jnp.array([[67, 68, 69], [67, 68, 69]])
        ...     return watch_tokens(params, fused, context, valid, tokens, lambda c: c.weights)
        >>> jax.eval_shape(weights, jax.random.key(0)).shape  # [time, model, batch]
        (3, 2, 2)
    """
    every = jnp.ones(tokens.shape, bool)
    _check(model, (context, context_valid), (tokens, every))
    cache = model.init_cache(len(tokens), context.shape[1] + tokens.shape[1])
    _, cache = model.prefill(params, context, context_valid, cache, last_only=True)

    def step(cache: State, token: jax.Array) -> tuple[State, Any]:
        kept = keep(cache)
        return model.step(params, token, cache)[1], kept

    return jax.lax.scan(step, cache, tokens.T)[1]


def sequence_log_prob(
    log_probs: Float[Array, "*batch time"], valid: Bool[Array, "*#batch time"]
) -> Float[Array, "*batch"]:
    """``log p(y|x)``: the sum over a continuation's tokens.

    Example:
        >>> log_probs = jnp.array([[-1.0, -2.0, -9.0]])
        >>> sequence_log_prob(log_probs, jnp.array([[True, True, False]])).tolist()
        [-3.0]
    """
    return jnp.sum(jnp.where(valid, log_probs, 0.0), axis=-1)


def perplexity(
    log_probs: Float[Array, "*batch"], valid: Bool[Array, "*batch"]
) -> Float[Array, ""]:
    """``exp`` of the mean negative log-probability per token, over all rows together.

    Depends on the vocabulary: compare models of different ones by `bits_per_byte`.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.5, 0.125, 1e-9]]))
        >>> print(f"{perplexity(log_probs, jnp.array([[True, True, False]])):.3f}")
        4.000
    """
    count = jnp.sum(valid).astype(jnp.float32)
    return jnp.exp(-jnp.sum(jnp.where(valid, log_probs, 0.0)) / count)


def bits_per_byte(
    log_prob: Float[Array, "*document"], num_bytes: Int[Array, "*document"]
) -> Float[Array, ""]:
    """``-Σ log p / (ln 2 · Σ bytes)`` over all documents together.

    Args:
        log_prob: of each document, in nats (`sequence_log_prob`).
        num_bytes: of the text that was scored, in UTF-8.

    Example:
        >>> bits_per_byte(jnp.log(jnp.array([0.25, 0.0625])), jnp.array([1, 2])).item()
        2.0
    """
    total = jnp.sum(num_bytes).astype(jnp.float32)
    return -jnp.sum(log_prob) / (jnp.log(2.0) * total)


def expert_divergence(
    log_probs: Float[Array, "*batch vocab"],
    expert_log_probs: Float[Array, "model *batch vocab"],
) -> Float[Array, "model *batch"]:
    """``KL(q_t ‖ p_{i,t})`` of each expert to the fusion, per token, in nats.

    Over text drawn from the fusion its sums over time have mean ``KL(Q ‖ P_i)``, the
    divergence of the sequence laws (chain rule); over other text they do not. A token
    that the expert alone rules out makes it infinite.

    Args:
        log_probs: the fused law of each token, before it is seen.
        expert_log_probs: each expert's, after the same tokens.

    Example:
        >>> fused = jnp.log(jnp.array([0.5, 0.5]))
        >>> experts = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
        >>> expert_divergence(fused, experts).round(3).tolist()
        [0.0, 0.22300000488758087]
    """
    fused = jnp.broadcast_to(log_probs, expert_log_probs.shape)
    return categorical_kl(fused, expert_log_probs)


def document_interval(
    key: Key,
    statistic: Callable[..., jax.Array],
    *scores: jax.Array,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap over documents, which all ``scores`` share.

    What belongs to one document is drawn together: its log-probability and its bytes,
    several methods whose difference is asked for, several training seeds.

    Args:
        key: consumed.
        statistic: ``(*scores) -> scalar``, say `bits_per_byte`.
        scores: with the documents in front.
        confidence: the share of resamples inside the interval.
        num_resamples: how many.

    Raises:
        ValueError: if there are fewer than two documents, their number differs between
            the scores, or ``confidence`` is not inside (0, 1).

    Example:
        >>> log_prob, size = -jnp.arange(1.0, 21.0), jnp.full(20, 8)
        >>> key = jax.random.key(0)
        >>> interval = document_interval(key, bits_per_byte, log_prob, size)
        >>> bool(interval.low < interval.estimate < interval.high)
        True
    """
    counts = {x.shape[0] for x in scores}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"scores of {sorted(counts)} documents; expected arrays of the same "
            "documents, two at least"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}; expected inside (0, 1), as 0.95")
    (count,) = counts

    def resample(resample_key: jax.Array) -> jax.Array:
        rows = jax.random.randint(resample_key, (count,), 0, count)
        return statistic(*(x[rows] for x in scores))

    values = jax.vmap(resample)(jax.random.split(key, num_resamples))
    tail = (1.0 - confidence) / 2.0
    low, high = jnp.quantile(values, jnp.array([tail, 1.0 - tail]))
    return Interval(statistic(*scores), low, high)


def _read(
    params: Params,
    model: LanguageModel,
    context: tuple[jax.Array, jax.Array],
    continuation: tuple[jax.Array, jax.Array],
    score: Callable[[jax.Array, jax.Array], Any],
    block: int | None,
) -> Any:
    """``score(logits that predict, token)`` of blocks of columns, put together again."""
    _check(model, context, continuation)
    tokens, valid = continuation
    batch, time = tokens.shape
    block = time if block is None else min(block, time)
    padding = -time % block
    # What follows a row's last token is not asked for, so that it is not read: a
    # continuation may fill the context and one token more.
    read = jnp.pad(valid[:, 1:], [(0, 0), (0, 1 + padding)])
    tokens = jnp.pad(tokens, [(0, 0), (0, padding)])
    cache = model.init_cache(batch, context[0].shape[1] + time + padding)
    logits, cache = model.prefill(params, *context, cache, last_only=True)

    def read_block(
        carry: tuple[State, jax.Array], columns: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[State, jax.Array], Any]:
        cache, before = carry
        logits, cache = model.extend(params, *columns, cache)
        logits = logits.astype(jnp.float32)
        predicting = jnp.concatenate([before[:, None], logits[:, :-1]], axis=1)
        return (cache, logits[:, -1]), score(predicting, columns[0])

    start = (cache, logits[:, -1].astype(jnp.float32))
    if block == time:
        return read_block(start, (tokens, read))[1]
    blocks = [x.reshape(batch, -1, block).swapaxes(0, 1) for x in (tokens, read)]
    scores = jax.lax.scan(read_block, start, (blocks[0], blocks[1]))[1]
    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(batch, -1, *x.shape[3:])[:, :time], scores
    )


def _check(
    model: LanguageModel,
    context: tuple[jax.Array, jax.Array],
    continuation: tuple[jax.Array, jax.Array],
) -> None:
    tokens, valid = continuation
    if tokens.shape[1] == 0:
        raise ValueError("the continuations are empty; give one token at least")
    if any(isinstance(x, Tracer) for x in (*context, *continuation)):
        return
    check_tokens(model, tokens, valid, "continuation")
    more = np.maximum(np.asarray(valid).sum(axis=1) - 1, 0)
    check_prompt(model, *context, more)
