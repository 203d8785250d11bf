"""What `llm_study` computes from trained models: laws, losses, merges, divergences."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._llm_rules import ScoreFn
from benchmarks._llm_texts import Texts
from emfuse_jax.base import Params
from emfuse_jax.energy import boltzmann_log_prob
from emfuse_jax.llm import (
    LINEAR_INPUTS,
    LmConfig,
    apply_layer,
    embed_tokens,
    language_model,
    logits,
)
from emfuse_jax.llm._rule import entropy
from emfuse_jax.llm.decode import generate
from emfuse_jax.llm.emselect import nearest_to_pool, pool_divergences, tournament
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.rules import uniform
from emfuse_jax.merging import Stage, regmean_streamed
from emfuse_jax.tree import stack

ROWS = 8
"""Texts at a time: the laws of three experts over 256 tokens of 1024 are 25 MB then."""


class Models:
    """One architecture's compiled functions, shared by all its parameters."""

    def __init__(self, config: LmConfig):
        self.config = config

        def laws(params: Params, tokens: jax.Array) -> jax.Array:
            scores = logits(config, params, tokens, jnp.ones(tokens.shape, bool))
            return boltzmann_log_prob(-scores)

        def losses(params: Params, tokens: jax.Array) -> jax.Array:
            # Over all columns, like the laws: one number differs from the other by
            # nothing but the order of additions.
            found = laws(params, tokens)[:, :-1]
            return -jnp.take_along_axis(found, tokens[:, 1:, None], axis=-1)[..., 0]

        def layer(params: Params, carry: tuple[jax.Array, jax.Array]):
            hidden, valid = carry
            hidden, inputs = apply_layer(config, params, hidden, valid)
            return (hidden, valid), {name: (x, valid) for name, x in inputs.items()}

        self.laws = jax.jit(laws)
        self.losses = jax.jit(losses)
        self.layer = jax.jit(layer)
        self.pool_sampler = functools.cache(self._pool_sampler)

    def _pool_sampler(self, num_models: int, num_tokens: int) -> Callable[..., Any]:
        """``(stacked params, key, prompts) -> choices`` of each token that it writes."""
        model = fuse_language_models(
            language_model(self.config), uniform(), num_models=num_models
        )

        def run(params: Params, key: jax.Array, tokens: jax.Array) -> Any:
            return generate(
                params,
                key,
                model,
                tokens,
                jnp.ones(tokens.shape, bool),
                num_tokens,
                keep=lambda cache: choices(cache.log_probs),
            ).kept

        return jax.jit(run)

    def regmean(
        self,
        members: Sequence[Params],
        tokens: Sequence[np.ndarray],
        shrinkage: float,
    ) -> Params:
        """RegMean on ``tokens [text, time]`` of each expert's own domain."""
        stages = [
            Stage(("layers", index), self.layer, LINEAR_INPUTS)
            for index in range(self.config.num_layers)
        ]
        carries = [
            [
                (embed_tokens(params, rows), jnp.ones(rows.shape, bool))
                for rows in _batches(own)
            ]
            for params, own in zip(members, tokens, strict=True)
        ]
        return regmean_streamed(
            members, stages, carries, shrinkage=shrinkage, ridge=1e-6
        )


def score_texts(
    models: Models,
    experts: Sequence[Params],
    texts: Texts,
    prompt: int,
    *,
    rules: Mapping[Any, ScoreFn],
    plain: Mapping[str, Params] | None = None,
    watch: Callable[[jax.Array], Any] | None = None,
) -> tuple[dict[Any, np.ndarray], Any]:
    """Nats of every token after the prompt, by method.

    The experts' laws are computed once per batch, and every rule reads them.

    Args:
        models: the architecture.
        experts: by domain.
        texts: of one length.
        prompt: tokens that are given.
        rules: by name; one that has several names is run once.
        plain: single models by name; ``own_expert`` and each expert are added.
        watch: ``laws [model, batch, time, vocab] -> statistics [batch, …]`` of the
            columns that predict the tokens after the prompt.

    Returns:
        ``[text, time - prompt]`` by method, and what ``watch`` returned for all texts.
    """
    found: dict[Any, list[np.ndarray]] = {}
    watched: list[Any] = []
    for rows in _batches(texts.tokens):
        laws = jnp.stack([models.laws(params, rows) for params in experts])
        own = -np.asarray(_token_log_probs(laws, rows))[:, :, prompt - 1 :]
        for index, losses in enumerate(own):
            found.setdefault(f"expert {index}", []).append(losses)
        for name, params in (plain or {}).items():
            losses = np.asarray(models.losses(params, rows))[:, prompt - 1 :]
            found.setdefault(name, []).append(losses)
        done = {
            score: -np.asarray(score(laws, rows, prompt)) for score in rules.values()
        }
        for name, score in rules.items():
            found.setdefault(name, []).append(done[score])
        if watch is not None:
            watched.append(jax.device_get(watch(laws[:, :, prompt - 1 : -1])))
    count = len(texts.tokens)
    scores = {name: np.concatenate(parts)[:count] for name, parts in found.items()}
    each = np.stack([scores[f"expert {i}"] for i in range(len(experts))])
    domain = texts.domain[None, :, prompt:]
    scores["own_expert"] = np.take_along_axis(each, domain, axis=0)[0]
    if watch is None:
        return scores, None
    return scores, jax.tree.map(lambda *x: np.concatenate(x)[:count], *watched)


def plain_losses(models: Models, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Nats of every token but the first ``[text, time - 1]`` under a single model."""
    parts = [np.asarray(models.losses(params, rows)) for rows in _batches(tokens)]
    return np.concatenate(parts)[: len(tokens)]


@jax.jit
def choices(laws: jax.Array) -> dict[str, jax.Array]:
    """What EMSelect does with ``laws [model, batch, time, vocab]``, in nats per token.

    ``KL(q ‖ p_i)`` with ``q`` the uniform pool, of each expert, of the chosen one in
    either order, and the largest; the choices, and the expert of least entropy.
    """
    divergences = pool_divergences(laws)
    picked = {"tournament": tournament(laws), "pool": nearest_to_pool(laws)}
    gaps = {
        f"kl of the {name} choice": jnp.take_along_axis(
            divergences, expert[None], axis=0
        )[0]
        for name, expert in picked.items()
    }
    return {
        "kl": jnp.moveaxis(divergences, 0, -1),
        "kl bound": jnp.max(divergences, axis=0),
        "sharpest": jnp.argmin(entropy(laws), axis=0),
        **gaps,
        **picked,
    }


def describe_choices(
    found: Mapping[str, np.ndarray], own: np.ndarray
) -> dict[str, Any]:
    """Means over all tokens; ``own [text, time]`` is the number of each one's domain."""
    result: dict[str, Any] = {
        name: float(value.mean())
        for name, value in found.items()
        if name.startswith("kl ")
    }
    result["kl of each expert"] = found["kl"].mean(axis=(0, 1)).tolist()
    for name in ("tournament", "pool"):
        result[f"{name} takes the sharpest"] = float(
            np.mean(found[name] == found["sharpest"])
        )
        result[f"{name} takes the domain's own"] = float(np.mean(found[name] == own))
    result["orders agree"] = float(np.mean(found["tournament"] == found["pool"]))
    return result


def sample_pool(
    models: Models,
    experts: Sequence[Params],
    prompts: np.ndarray,
    num_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """`choices` along texts that the uniform pool itself writes after ``prompts``.

    Over these, and only these, sums along the text estimate divergences of laws over
    texts: ``KL(Q ‖ P_i)`` of each expert, ``KL(Q ‖ P)`` of EMSelect, and its bound.
    """
    run = models.pool_sampler(len(experts), num_tokens)
    kept = jax.device_get(
        run(stack(experts), jax.random.key(seed), jnp.asarray(prompts))
    )
    sums = {
        name: value.sum(axis=0) for name, value in kept.items() if name.startswith("kl")
    }
    error = 1.0 / np.sqrt(len(prompts))
    result: dict[str, Any] = {
        "texts": len(prompts),
        "tokens": num_tokens,
        "nats per text": {},
        "nats per token": {},
    }
    for name, value in sums.items():
        mean, spread = value.mean(axis=0), value.std(axis=0) * error
        result["nats per text"][name] = {
            "estimate": mean.tolist(),
            "standard_error": spread.tolist(),
        }
        result["nats per token"][name] = (mean / num_tokens).tolist()
    return result


@jax.jit
def _token_log_probs(laws: jax.Array, tokens: jax.Array) -> jax.Array:
    """What each expert gave to every token but the first ``[model, batch, time - 1]``."""
    index = jnp.broadcast_to(
        tokens[None, :, 1:, None], (*laws.shape[:2], tokens.shape[1] - 1, 1)
    )
    return jnp.take_along_axis(laws[:, :, :-1], index, axis=-1)[..., 0]


def _batches(tokens: np.ndarray) -> list[jax.Array]:
    """`ROWS` texts each, the last batch filled up with the first texts."""
    count = -(-len(tokens) // ROWS) * ROWS
    filled = np.resize(tokens, (count, tokens.shape[1]))
    return [jnp.asarray(rows) for rows in filled.reshape(-1, ROWS, tokens.shape[1])]


def sample_rows(stream: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """Windows of a training stream, anywhere in it, ``[count, length]``."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(stream) - length + 1, count)
    return stream[starts[:, None] + np.arange(length)[None]].astype(np.int32)
