"""Language models small enough to enumerate, whose laws are known without them.

The logits after a prefix are ``last[y_t] + before[y_(t-1)] + position[t mod period]``: a
stale cache, a shifted position or padding that is counted changes them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import LanguageModel


class TableCache(NamedTuple):
    last: jax.Array
    before: jax.Array
    count: jax.Array
    tokens: jax.Array
    column: jax.Array


def table_lm(vocab_size, *, context_length=64, traces=None):
    """Counts in the dictionary ``traces`` how often each function is traced."""

    def count(name):
        if traces is not None:
            traces[name] = traces.get(name, 0) + 1

    def init_cache(batch_size, length):
        none = jnp.full(batch_size, -1)
        tokens = jnp.full((batch_size, length), -1)
        return TableCache(
            none, none, jnp.zeros(batch_size, int), tokens, jnp.zeros((), int)
        )

    def read(params, cache, token, valid):
        cache = TableCache(
            last=jnp.where(valid, token, cache.last),
            before=jnp.where(valid, cache.last, cache.before),
            count=cache.count + valid,
            # A column too many is dropped, and `column` tells.
            tokens=cache.tokens.at[:, cache.column].set(
                jnp.where(valid, token, -1), mode="drop"
            ),
            column=cache.column + 1,
        )
        before = jnp.where(
            cache.before[:, None] < 0, 0.0, params["before"][cache.before]
        )
        position = params["position"][cache.count % len(params["position"])]
        return cache, params["last"][cache.last] + before + position

    def extend(params, tokens, valid, cache):
        count("extend")
        cache, logits = jax.lax.scan(
            lambda c, column: read(params, c, *column), cache, (tokens.T, valid.T)
        )
        return jnp.swapaxes(logits, 0, 1), cache

    def prefill(params, tokens, valid, cache, *, last_only=False):
        count("prefill")
        cache, logits = jax.lax.scan(
            lambda c, column: read(params, c, *column), cache, (tokens.T, valid.T)
        )
        logits = jnp.swapaxes(logits, 0, 1)
        return logits[:, -1:] if last_only else logits, cache

    def step(params, tokens, cache):
        count("step")
        cache, logits = read(params, cache, tokens, jnp.ones(tokens.shape, bool))
        return logits, cache

    return LanguageModel(init_cache, prefill, extend, step, vocab_size, context_length)


def table_params(key, vocab_size, *, period=5, scale=1.5):
    shapes = {"last": vocab_size, "before": vocab_size, "position": period}
    return {
        name: scale * jax.random.normal(jax.random.fold_in(key, i), (rows, vocab_size))
        for i, (name, rows) in enumerate(shapes.items())
    }


def scripted_params(script, vocab_size, *, start):
    """After ``start`` tokens the model is all but certain of ``script``."""
    position = np.zeros((start + len(script) + 1, vocab_size), np.float32)
    position[start + np.arange(len(script)), script] = 60.0
    return {
        "last": jnp.zeros((vocab_size, vocab_size)),
        "before": jnp.zeros((vocab_size, vocab_size)),
        "position": jnp.asarray(position),
    }


def table_law(params, prefix):
    """Log-probabilities of what follows ``prefix``, without any cache."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    logits = params["last"][prefix[-1]].copy()
    if len(prefix) > 1:
        logits += params["before"][prefix[-2]]
    logits += params["position"][len(prefix) % len(params["position"])]
    return logits - np.logaddexp.reduce(logits)


def table_scores(params, prefix, tokens):
    """Log-probability of each of ``tokens`` after ``prefix``."""
    whole = [*prefix, *tokens]
    count = range(len(prefix), len(whole))
    return np.array([table_law(params, whole[:t])[whole[t]] for t in count])
