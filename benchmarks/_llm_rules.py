"""Rules of `llm_study`: those that are reported, and those among which is chosen.

A rule is a function of the experts' laws and of the tokens that were read, so the laws
are computed once and *replayed*: a language model whose parameters are its laws, fused by
`fuse_language_models` like any other.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emfuse_jax.base import LanguageModel
from emfuse_jax.evaluation.language import token_log_probs
from emfuse_jax.llm import _rule
from emfuse_jax.llm._rule import FusionRule
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.rules import rule_by_name

Options = tuple[tuple[str, Any], ...]
"""A rule's options, hashable."""

ScoreFn = Callable[[jax.Array, jax.Array, int], jax.Array]
"""``(laws [model, batch, time, vocab], tokens [batch, time], prompt) -> log p``
of the tokens after the prompt, ``[batch, time - prompt]``."""


def switching(
    rate: float = 1.0,
    switch: float = 0.02,
    *,
    floor: float = -20.0,
    linear: bool = False,
) -> FusionRule:
    """``λ ← (1 - s) λ p(y)^η / Σ + s / n`` after each token: a tracker of the best expert.

    With ``η = 1`` these are the posterior weights of a hidden Markov model whose expert
    is drawn anew with probability ``s`` at every token, and the linear pool with them is
    its law. No expert's weight falls below ``s / n``, so that a change of domain is
    noticed within a few tokens however long the text before it was.

    Args:
        rate: η.
        switch: s, in (0, 1).
        floor: log-probabilities of observed tokens count as no less, in nats.
        linear: pool linearly.

    Reference:
        Herbster, Warmuth, "Tracking the Best Expert", Machine Learning 32, 1998 (the
        fixed share).
    """

    def weights(
        state: Float[Array, "batch model"], log_probs: Float[Array, "model batch vocab"]
    ) -> Float[Array, "model batch"]:
        del log_probs
        return jax.nn.softmax(state, axis=-1).T

    def observe(
        state: Float[Array, "batch model"],
        log_probs: Float[Array, "model batch vocab"],
        token: Int[Array, "batch"],
    ) -> Float[Array, "batch model"]:
        gain = jnp.maximum(_rule.token_log_probs(log_probs, token), floor).T
        posterior = jax.nn.log_softmax(state + rate * gain, axis=-1)
        fresh = np.log(switch / state.shape[-1])
        return jnp.logaddexp(posterior + np.log1p(-switch), jnp.full_like(state, fresh))

    def init(log_probs: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        count = len(log_probs)
        blank = jnp.full((len(tokens), count), -np.log(count), log_probs.dtype)
        return _rule.read_prompt(observe, blank, log_probs, tokens, valid)

    return FusionRule(init, weights, observe, needs_prompt=True, linear=linear)


def running_packllm_sim(temperature: float = 0.1) -> FusionRule:
    """PackLLM-sim whose loss is the mean over all that was read, not the prompt alone."""

    def weights(state: Any, log_probs: jax.Array) -> jax.Array:
        del log_probs
        total, count = state
        return jax.nn.softmax(
            total / (temperature * jnp.maximum(count, 1.0)), axis=-1
        ).T

    def observe(state: Any, log_probs: jax.Array, token: jax.Array) -> Any:
        total, count = state
        return total + _rule.token_log_probs(log_probs, token).T, count + 1.0

    def init(log_probs: jax.Array, tokens: jax.Array, valid: jax.Array) -> Any:
        rows = len(tokens)
        blank = jnp.zeros((rows, len(log_probs))), jnp.zeros((rows, 1))
        return _rule.read_prompt(observe, blank, log_probs, tokens, valid)

    return FusionRule(init, weights, observe, needs_prompt=True)


def make_rule(name: str, options: Options) -> FusionRule:
    """A rule of this module or of the library."""
    own = {"switching": switching, "running_packllm_sim": running_packllm_sim}
    if name in own:
        return own[name](**dict(options))
    return rule_by_name(name, **dict(options))


def _options(**values: Any) -> Options:
    return tuple(values.items())


def _grid(**values: tuple[Any, ...]) -> list[Options]:
    return [
        tuple(zip(values, row, strict=True))
        for row in itertools.product(*values.values())
    ]


FIXED: dict[str, tuple[str, Options]] = {
    "emfuse": ("emfuse", ()),
    "packllm_sim, τ=1": ("packllm_sim", _options(temperature=1.0)),
    "packllm_sim, τ=0.1": ("packllm_sim", _options(temperature=0.1)),
    "packllm_opt": ("packllm_opt", ()),
    "top_one": ("top_one", ()),
    "linear_pool": ("linear_pool", ()),
    "emselect, tournament": ("emselect", _options(order="tournament")),
    "emselect, pool": ("emselect", _options(order="pool")),
    "evidence, defaults": ("evidence", ()),
}
"""Rules without a choice: name, the library's rule, its options."""

_RATES, _DECAYS = (0.25, 0.5, 1.0), (0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
_SWITCH = (0.003, 0.01, 0.03, 0.1)
CHOSEN: dict[str, tuple[str, list[Options]]] = {
    "entropy_adaptive": (
        "entropy_adaptive",
        _grid(smoothing=(0.01, 0.1, 1.0), power=(1.0, 4.0)),
    ),
    "running_packllm_sim": ("running_packllm_sim", _grid(temperature=(0.03, 0.1, 0.3))),
    "evidence": ("evidence", _grid(rate=_RATES, decay=_DECAYS)),
    "evidence, entropy": (
        "evidence",
        _grid(rate=_RATES[:2], decay=_DECAYS[:4], entropy_power=(0.25, 0.5, 1.0)),
    ),
    "evidence, linear": (
        "evidence",
        _grid(rate=_RATES[1:], decay=_DECAYS[1:5], linear=(True,)),
    ),
    "exponentiated_gradient": (
        "exponentiated_gradient",
        _grid(rate=(0.25, 0.5, 1.0), decay=(0.85, 0.9, 0.95, 0.98)),
    ),
    "switching": ("switching", _grid(rate=(0.25, 0.5, 1.0), switch=_SWITCH)),
    "switching, linear": (
        "switching",
        _grid(rate=(0.5, 1.0), switch=_SWITCH, linear=(True,)),
    ),
}
"""Rules whose options are chosen on validation documents: name, rule, candidates."""

OURS = ("evidence", "evidence, entropy", "exponentiated_gradient", "switching")
"""Those of them that are ours, state-dependent, and pools of energies."""


def replayed(vocab_size: int, length: int) -> LanguageModel:
    """A language model whose params are its laws ``[batch, time, vocab]``; column ``t``
    says what follows the tokens up to and with ``t``, which it does not look at."""

    def extend(
        params: jax.Array, tokens: jax.Array, valid: jax.Array, cache: jax.Array
    ):
        del valid
        time = tokens.shape[1]
        laws = jax.lax.dynamic_slice_in_dim(params, cache, time, axis=1)
        return laws, cache + time

    def prefill(params, tokens, valid, cache, *, last_only: bool = False):
        laws, cache = extend(params, tokens, valid, cache)
        return (laws[:, -1:] if last_only else laws), cache

    def step(params, tokens, cache):
        laws, cache = extend(params, tokens[:, None], tokens[:, None], cache)
        return laws[:, 0], cache

    def init_cache(batch_size: int, length: int) -> jax.Array:
        del batch_size, length
        return jnp.zeros((), jnp.int32)

    return LanguageModel(init_cache, prefill, extend, step, vocab_size, length)


@functools.cache
def scorer(name: str, options: Options) -> ScoreFn:
    """Scores texts by a rule from the experts' laws; compiled once per shape."""
    rule = make_rule(name, options)

    @functools.partial(jax.jit, static_argnums=2)
    def score(laws: jax.Array, tokens: jax.Array, prompt: int) -> jax.Array:
        count, _, length, vocab_size = laws.shape
        model = fuse_language_models(
            replayed(vocab_size, length), rule, num_models=count
        )
        every = jnp.ones(tokens.shape, bool)
        return token_log_probs(
            laws,
            model,
            tokens[:, :prompt],
            every[:, :prompt],
            tokens[:, prompt:],
            every[:, prompt:],
        ).log_probs

    return score


def rolling(score: ScoreFn, stride: int = 16) -> ScoreFn:
    """A rule of the prompt that is estimated anew every ``stride`` tokens, each time on as
    many of the last tokens as the prompt has."""

    @functools.partial(jax.jit, static_argnums=2)
    def rolled(laws: jax.Array, tokens: jax.Array, prompt: int) -> jax.Array:
        count, batch, length, vocab_size = laws.shape
        starts = np.arange(0, length - prompt, stride)
        if (length - prompt) % stride:
            raise ValueError(
                f"stride={stride} does not divide {length - prompt} tokens"
            )
        columns = starts[:, None] + np.arange(prompt + stride)[None]
        parts = laws[:, :, columns].reshape(count, -1, columns.shape[1], vocab_size)
        scores = score(parts, tokens[:, columns].reshape(-1, columns.shape[1]), prompt)
        return scores.reshape(batch, -1)

    return rolled


def choose(
    families: Mapping[str, tuple[str, list[Options]]],
    losses: Mapping[tuple[str, Options], float],
) -> dict[str, Any]:
    """The options of least loss, family by family.

    Args:
        families: name, rule and candidates.
        losses: of each rule with each of its candidates.

    Returns:
        By family: ``rule``, the chosen ``options``, its ``loss``, and ``tried``, every
        candidate with its loss.
    """
    found: dict[str, Any] = {}
    for family, (name, candidates) in families.items():
        options = min(candidates, key=lambda options: losses[name, options])
        found[family] = {
            "rule": name,
            "options": dict(options),
            "loss": losses[name, options],
            "tried": [{**dict(row), "loss": losses[name, row]} for row in candidates],
        }
    return found
