"""Scoring many texts of all lengths: a host loop over compiled batches.

Requests are sorted into buckets, powers of two for the context and for the continuation,
and each bucket runs in batches of one size: one compiled program per bucket.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import LanguageModel, Params
from emfuse_jax.evaluation.language import TokenScores, token_log_probs
from emfuse_jax.llm.decode import bucket_length, pad_left

__all__ = [
    "ContinuationScore",
    "Request",
    "Scorer",
    "compile_scorer",
    "rolling_windows",
    "score_continuations",
]

Request = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context and of its continuation, neither of them empty."""


class Scorer(NamedTuple):
    """A language model's `token_log_probs`, compiled once per bucket.

    ``score(params, context, context_valid, tokens, valid) -> scores``.
    """

    score: Callable[..., TokenScores]
    model: LanguageModel


class ContinuationScore(NamedTuple):
    """Of one request: ``log p`` of each token, and whether it was the likeliest."""

    log_probs: np.ndarray
    greedy: np.ndarray


def compile_scorer(model: LanguageModel, *, block: int | None = 128) -> Scorer:
    """Compiles, when first used, a program per bucket. Make one, use it for everything.

    Args:
        model: any language model.
        block: columns of a continuation that are read at once, see `token_log_probs`.

    Example:
        >>> from emfuse_jax.llm import LmConfig, language_model
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> scorer = compile_scorer(language_model(config))  # compiles at the first request
        >>> scorer.model.vocab_size
        257
    """

    def score(params: Params, *arrays: jax.Array) -> TokenScores:
        return token_log_probs(params, model, *arrays, block=block)

    return Scorer(jax.jit(score), model)


def score_continuations(
    params: Params,
    scorer: Scorer,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], Any] | None = None,
) -> list[ContinuationScore]:
    """Scores each continuation given its context, in the order of the requests.

    Args:
        params: the model's.
        scorer: from `compile_scorer`.
        requests: contexts and continuations. Together they may have one token more
            than the model's context, since the last is not read.
        batch_size: rows per call. A bucket's last batch is filled up with copies.
        on_batch: called with the number of requests that each batch has done.

    Raises:
        ValueError: if a context or a continuation is empty, too long or holds tokens
            that the vocabulary lacks.

    Example:
        >>> from emfuse_jax.llm import LmConfig, init_params, language_model
        >>> config = LmConfig(vocab_size=257, hidden_size=8, num_layers=1, num_heads=1)
        >>> params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
        >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
        >>> scorer = compile_scorer(language_model(config), block=None)
        >>> (score,) = score_continuations(params, scorer, [([65], [66, 67])])
        >>> [f"{x:.2f}" for x in score.log_probs]  # a uniform law: log 1/257
        ['-5.55', '-5.55']
    """
    model = scorer.model
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        _check_request(model, index, context, continuation)
        shape = (
            bucket_length(len(context), maximum=model.context_length),
            bucket_length(len(continuation), minimum=8),
        )
        buckets.setdefault(shape, []).append(index)
    scores: dict[int, ContinuationScore] = {}
    # The largest come first: what does not fit into memory fails at once.
    for (prompt, time), members in sorted(buckets.items(), reverse=True):
        for first in range(0, len(members), batch_size):
            rows = members[first : first + batch_size]
            filled = rows + rows[-1:] * (batch_size - len(rows))
            contexts = pad_left([requests[i][0] for i in filled], length=prompt)
            texts = _pad_right([requests[i][1] for i in filled], time)
            batch = jax.device_get(scorer.score(params, *contexts, *texts))
            for row, index in enumerate(rows):
                length = len(requests[index][1])
                scores[index] = ContinuationScore(
                    batch.log_probs[row, :length], batch.greedy[row, :length]
                )
            if on_batch is not None:
                on_batch(len(rows))
    return [scores[index] for index in range(len(requests))]


def rolling_windows(
    tokens: Sequence[int], prefix_token: int, length: int
) -> list[Request]:
    """Cuts a long text into requests that score each of its tokens once.

    The first window follows ``prefix_token`` alone, the others their last token before;
    the last window is as long as the others and scores only what is left, so that it has
    the more context. These are the windows of lm-evaluation-harness (context length 1).

    Args:
        tokens: of the text.
        prefix_token: what the first token is given, such as the end-of-text token.
        length: of the model's context.

    Example:
        >>> rolling_windows(range(10), -1, 4)[-1]
        ([5, 6, 7], [8, 9])
    """
    if length < 1:
        raise ValueError(f"length={length}; expected the model's context length")
    whole = [prefix_token, *tokens]
    windows: list[Request] = []
    scored = 1
    while scored < len(whole):
        end = min(scored + length, len(whole))
        begin = max(end - length - 1, 0)
        windows.append((whole[begin:scored], whole[scored:end]))
        scored = end
    return windows


def _pad_right(sequences: list[Sequence[int]], length: int) -> tuple[jax.Array, ...]:
    flipped = pad_left([list(x)[::-1] for x in sequences], length=length)
    return tuple(jnp.flip(x, axis=1) for x in flipped)


def _check_request(
    model: LanguageModel, index: int, context: Sequence[int], text: Sequence[int]
) -> None:
    if not len(context) or not len(text):
        which = "context" if not len(context) else "continuation"
        raise ValueError(
            f"request {index} has an empty {which}; a context needs one token at least "
            "(such as the end-of-text token), a continuation one to score"
        )
    size, room = len(context) + len(text), model.context_length + 1
    if size > room:
        raise ValueError(
            f"request {index} has {len(context)} + {len(text)} tokens, the model takes "
            f"{room} together; cut the context from the left, or the text into windows "
            "(rolling_windows)"
        )
    for token in (*context, *text):
        if not 0 <= token < model.vocab_size:
            raise ValueError(
                f"request {index} holds token {token}, the model's vocabulary is 0 … "
                f"{model.vocab_size - 1}; use the tokenizer that belongs to it"
            )
