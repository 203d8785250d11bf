"""Scores experts and rules on held-out windows: each expert reads a text once, and every
rule is applied to what it said.

A window is a prompt and a continuation (`_lm.Window`). The continuation's log-probability
given the prompt is what every method is scored by; rules that weigh experts by a prompt
see this one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import LanguageModel
from emfuse_jax.evaluation.language import (
    expert_divergence,
    next_token_log_probs,
    watch_tokens,
)
from emfuse_jax.llm.decode import bucket_length, pad_left, token_log_prob
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.rules import uniform
from experiments._lm import Window
from experiments._lm_experts import Experts
from experiments._lm_rules import NamedRule

MEMORY = 256 * 2**20
"""Bytes of all experts' laws that are held at a time."""

Array = np.ndarray | jax.Array
Request = tuple[list[int], list[int]]
"""The tokens of a prompt and of what follows."""


class RuleScore(NamedTuple):
    """One rule on some requests."""

    log_prob: Array
    """Of the whole continuation, ``[request]``."""
    weights: Array
    """Mean over its tokens, ``[request, expert]``."""
    divergence: Array
    """``KL(q ‖ p_i)``, mean over its tokens, ``[request, expert]``."""


class Trace(NamedTuple):
    """What there is to show of one request and rule, token by token."""

    log_probs: Array
    weights: Array
    expert_log_probs: Array


class Scores(NamedTuple):
    """``models`` are the log-probabilities ``[request]`` of single models."""

    models: dict[str, np.ndarray]
    rules: dict[str, RuleScore]
    traces: list[dict[str, Trace]]
    """Of the first requests, by rule."""


class Scorer:
    """Experts, other models and rules, compiled once per shape.

    Args:
        experts: those that are fused.
        rules: how.
        others: models of the same vocabulary that are scored alone, beside the experts.
    """

    def __init__(
        self,
        experts: Experts,
        rules: Sequence[NamedRule],
        others: Experts | None = None,
    ) -> None:
        self._count = len(experts.models)
        groups = [experts] if others is None else [experts, others]
        self.names = tuple(name for group in groups for name in group.names)
        self.vocab_size = experts.vocab_size
        self.context_length = min(
            model.context_length for group in groups for model in group.models
        )
        self._read = [pair for group in groups for pair in _readers(group)]
        self._rules = {
            rule.label: jax.jit(_rule_program(rule, self._count, self.vocab_size))
            for rule in rules
        }

    def __call__(
        self,
        requests: Sequence[Request],
        *,
        num_traces: int = 0,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> Scores:
        """Scores each continuation given its prompt.

        Args:
            requests: prompts and continuations; together within the context and one more.
            num_traces: of the first so many requests all is kept.
            on_batch: called with the number of requests that each batch has done.

        Raises:
            ValueError: naming the first request that is empty or too long.
        """
        found: dict[int, Any] = {}
        for rows, arrays in _batches(requests, self.check(requests)):
            tokens, valid = (
                jnp.concatenate(p, axis=1) for p in zip(*arrays, strict=True)
            )
            laws = [read(params, tokens, valid) for read, params in self._read]
            models = [_score_alone(law, *arrays) for law in laws]
            rules = {
                label: program(tuple(laws[: self._count]), *arrays)
                for label, program in self._rules.items()
            }
            models, rules = jax.device_get((models, rules))
            for row, index in enumerate(rows):
                traced = index < num_traces
                found[index] = (
                    [log_prob[row] for log_prob in models],
                    {k: _one_row(v, row, traced) for k, v in rules.items()},
                )
            on_batch(len(rows))
        ordered = [found[index] for index in range(len(requests))]
        return _gather(self.names, list(self._rules), ordered, num_traces)

    def check(self, requests: Sequence[Request]) -> int:
        """The batch size for these requests.

        Raises:
            ValueError: naming the first request that is empty or too long.
        """
        for index, (prompt, rest) in enumerate(requests):
            if not prompt or not rest:
                raise ValueError(f"window {index} has an empty prompt or continuation")
            if len(prompt) + len(rest) > self.context_length + 1:
                raise ValueError(
                    f"window {index} has {len(prompt)} + {len(rest)} tokens, but the "
                    f"context holds {self.context_length}; prepare smaller windows"
                )
        longest = max(len(prompt) + len(rest) for prompt, rest in requests)
        row = 4 * len(self._read) * bucket_length(longest) * self.vocab_size
        return max(1, min(16, MEMORY // row))


def to_requests(
    windows: Sequence[Window], tokenizer: Any, *, same_tokens: bool
) -> list[Request]:
    """The windows' own tokens, or those of another tokenizer for the same texts."""
    if same_tokens:
        return [
            (list(w.tokens[: w.num_prompt]), list(w.tokens[w.num_prompt :]))
            for w in windows
        ]
    return [
        (list(tokenizer.encode(w.prompt)), list(tokenizer.encode(w.continuation)))
        for w in windows
    ]


def wrong_requests(
    windows: Sequence[Window], requests: Sequence[Request]
) -> tuple[list[Request], np.ndarray]:
    """Every prompt before each of its wrong answers, and ``[wrong answer, 2]``: the window
    that it is asked in and the one that it is from."""
    pairs = [
        (index, other)
        for index, window in enumerate(windows)
        for other in window.distractors
        if other < len(windows)
    ]
    wrong = [(requests[index][0], requests[other][1]) for index, other in pairs]
    return wrong, np.array(pairs, int).reshape(-1, 2)


def replay_model(vocab_size: int, context_length: int) -> LanguageModel:
    """Laws that have been computed already, as a language model.

    Its params are ``[batch, time, vocab]``, its cache the next column. Rules that are
    tried on the same text then share the reading of it, and the code that fuses.
    """

    def init_cache(batch_size: int, length: int) -> jax.Array:
        del batch_size, length
        return jnp.zeros((), jnp.int32)

    def prefill(
        params: Any, tokens: Any, valid: Any, cache: Any, *, last_only: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        laws, cache = extend(params, tokens, valid, cache)
        return laws[:, -1:] if last_only else laws, cache

    def extend(
        params: Any, tokens: Any, valid: Any, cache: Any
    ) -> tuple[jax.Array, jax.Array]:
        del valid
        time = tokens.shape[1]
        return jax.lax.dynamic_slice_in_dim(params, cache, time, axis=1), cache + time

    def step(params: Any, tokens: Any, cache: Any) -> tuple[jax.Array, jax.Array]:
        laws, cache = extend(params, tokens[:, None], None, cache)
        return laws[:, 0], cache

    return LanguageModel(init_cache, prefill, extend, step, vocab_size, context_length)


def _readers(experts: Experts) -> list[tuple[Callable[..., jax.Array], Any]]:
    """Each expert's law after every column, normalised, over the fusion's vocabulary.

    A fusion of one does temperature and mapping. Experts that differ in their parameters
    alone share a program.
    """
    shared: list[tuple[Any, Callable[..., jax.Array]]] = []
    readers = []
    for index, model in enumerate(experts.models):
        temperature = (
            None if experts.temperatures is None else experts.temperatures[index]
        )
        mapping = None if experts.vocabulary is None else experts.vocabulary[index]
        plain = mapping is None or mapping.identity
        key = (experts.configs[index], temperature, plain or index)
        known = [read for other, read in shared if other == key]
        if not known:
            one = fuse_language_models(
                [model],
                uniform(),
                temperatures=None if temperature is None else [temperature],
                vocabulary=None if mapping is None else [mapping],
            )
            known = [jax.jit(_reader(one))]
            shared.append((key, known[0]))
        readers.append((known[0], experts.params[index]))
    return readers


def _reader(model: LanguageModel) -> Callable[..., jax.Array]:
    def read(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        cache = model.init_cache(*tokens.shape)
        return model.prefill((params,), tokens, valid, cache)[0]

    return read


def _rule_program(
    rule: NamedRule, count: int, vocab_size: int
) -> Callable[..., tuple[RuleScore, Trace]]:
    def program(
        laws: tuple[jax.Array, ...],
        prompts: tuple[jax.Array, jax.Array],
        texts: tuple[jax.Array, jax.Array],
    ) -> tuple[RuleScore, Trace]:
        replay = replay_model(vocab_size, laws[0].shape[1])
        model = fuse_language_models([replay] * count, rule.rule)
        tokens, valid = texts
        fused = next_token_log_probs(laws, model, *prompts, *texts)
        weights = watch_tokens(
            laws, model, *prompts, tokens, lambda cache: cache.weights
        )
        weights = jnp.moveaxis(weights, 1, 2)  # [time, batch, expert]
        own = _predicting(jnp.stack(laws), prompts[0].shape[1])
        if rule.selects:
            pool = fuse_language_models([replay] * count, uniform())
            pooled = next_token_log_probs(laws, pool, *prompts, *texts)
            divergence = expert_divergence(pooled, own)
        else:
            divergence = expert_divergence(fused, own)
        log_probs = jnp.where(valid, token_log_prob(fused, tokens), 0.0)
        size = jnp.sum(valid, axis=1, keepdims=True)
        counted = jnp.where(valid.T[..., None], weights, 0.0)
        apart = jnp.where(valid[None], divergence, 0.0)
        score = RuleScore(
            log_prob=jnp.sum(log_probs, axis=1),
            weights=jnp.sum(counted, axis=0) / size,
            divergence=jnp.sum(apart, axis=2).T / size,
        )
        experts = token_log_prob(own, jnp.broadcast_to(tokens[None], own.shape[:-1]))
        trace = Trace(
            log_probs, jnp.swapaxes(weights, 0, 1), jnp.moveaxis(experts, 0, 2)
        )
        return score, trace

    return program


@jax.jit
def _score_alone(
    law: jax.Array,
    prompts: tuple[jax.Array, jax.Array],
    texts: tuple[jax.Array, jax.Array],
) -> jax.Array:
    tokens, valid = texts
    own = _predicting(law, prompts[0].shape[1])
    return jnp.sum(jnp.where(valid, token_log_prob(own, tokens), 0.0), axis=1)


def _predicting(laws: jax.Array, prompt: int) -> jax.Array:
    """The laws of the tokens after the prompt: those of the columns before them."""
    return laws[..., prompt - 1 : -1, :]


def _batches(
    requests: Sequence[Request], batch_size: int
) -> Iterator[tuple[list[int], tuple[Any, Any]]]:
    """Requests of one bucket together; the last batch of each is filled up with copies."""
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, (prompt, rest) in enumerate(requests):
        shape = (bucket_length(len(prompt)), bucket_length(len(rest)))
        buckets.setdefault(shape, []).append(index)
    for (prompt_length, length), members in sorted(buckets.items()):
        for first in range(0, len(members), batch_size):
            rows = members[first : first + batch_size]
            filled = rows + rows[-1:] * (batch_size - len(rows))
            prompts = pad_left([requests[i][0] for i in filled], length=prompt_length)
            flipped = pad_left([requests[i][1][::-1] for i in filled], length=length)
            texts = tuple(jnp.flip(x, axis=1) for x in flipped)
            yield rows, (prompts, texts)


def _one_row(
    found: tuple[RuleScore, Trace], row: int, traced: bool
) -> tuple[RuleScore, Trace | None]:
    score, trace = found
    kept = Trace(*(part[row] for part in trace)) if traced else None
    return RuleScore(*(part[row] for part in score)), kept


def _gather(
    names: Sequence[str], labels: Sequence[str], rows: Sequence[Any], num_traces: int
) -> Scores:
    rules = {
        label: RuleScore(
            *(np.asarray(part, np.float64) for part in zip(*parts, strict=True))
        )
        for label in labels
        for parts in [[row[1][label][0] for row in rows]]
    }
    models = np.asarray([row[0] for row in rows], np.float64)
    traces = [
        {label: row[1][label][1] for label in labels} for row in rows[:num_traces]
    ]
    return Scores(dict(zip(names, models.T, strict=True)), rules, traces)
