"""The smallest language models with a memory: tables of the last two tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emfuse_jax.base import LanguageModel


class TableCache(NamedTuple):
    """The last token read, -1 before the first."""

    previous: jax.Array


def table_model(vocab_size: int, context_length: int = 64) -> LanguageModel:
    """``logits = first[token] + second[token before]``.

    Columns of padding get NaN: nobody may look at them.
    """

    def extend(params, tokens, valid, cache):
        def column(previous, inputs):
            token, live = inputs
            before = jnp.where(
                (previous >= 0)[:, None], params["second"][previous], 0.0
            )
            logits = params["first"][token] + before
            logits = jnp.where(live[:, None], logits, jnp.nan)
            return jnp.where(live, token, previous), logits

        previous, logits = jax.lax.scan(column, cache.previous, (tokens.T, valid.T))
        return jnp.moveaxis(logits, 0, 1), TableCache(previous)

    def prefill(params, tokens, valid, cache, *, last_only=False):
        logits, cache = extend(params, tokens, valid, cache)
        if last_only:
            last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1])[None], 0), 1)
            logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)
        return logits, cache

    def step(params, tokens, cache):
        live = jnp.ones((tokens.shape[0], 1), bool)
        logits, cache = extend(params, tokens[:, None], live, cache)
        return logits[:, 0], cache

    def init_cache(batch_size, length):
        del length
        return TableCache(jnp.full(batch_size, -1, jnp.int32))

    return LanguageModel(init_cache, prefill, extend, step, vocab_size, context_length)


def table_params(seed: int, vocab_size: int, scale: float = 1.5):
    """Random tables."""
    key_first, key_second = jax.random.split(jax.random.key(seed))
    shape = (vocab_size, vocab_size)
    return {
        "first": scale * jax.random.normal(key_first, shape),
        "second": scale * jax.random.normal(key_second, shape),
    }
