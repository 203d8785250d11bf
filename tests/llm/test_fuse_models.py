"""Transformers fused: stacked and as a tuple, cached, padded, decoded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import tree
from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm.config import LmConfig
from emfuse_jax.llm.decode import generate
from emfuse_jax.llm.emselect import selection_gap
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.model import init_params, language_model, logits
from emfuse_jax.llm.rules import emselect, evidence, uniform

LLAMA = LmConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2)
QWEN = LmConfig(
    family="qwen3", vocab_size=11, hidden_size=16, num_layers=1, num_heads=2, head_dim=4
)


whole = jax.jit(logits, static_argnums=0)
# Tiny programs: compiling them well would take longer than running them.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": "0"}
)


def sharp_params(seed, config):
    """Random parameters whose laws are far from uniform, and from one another."""
    params = init_params(jax.random.key(seed), config)
    return {**params, "embed": 40 * params["embed"], "head": 40 * params["head"]}


LLAMAS = tuple(sharp_params(seed, LLAMA) for seed in range(2))
QWENS = sharp_params(2, QWEN)
TEXT = jax.random.randint(jax.random.key(9), (2, 8), 0, 11)
VALID = jnp.ones((2, 8), bool).at[0, :2].set(False)


def read(model, params):
    """A left-padded prompt, then the rest at once and one by one."""
    cache = model.init_cache(2, 8)
    first, cache = model.prefill(params, TEXT[:, :4], VALID[:, :4], cache)
    rest, after = model.extend(params, TEXT[:, 4:], VALID[:, 4:], cache)

    def step(cache, token):
        found, cache = model.step(params, token, cache)
        return cache, found

    last, steps = jax.lax.scan(step, cache, TEXT[:, 4:].T)
    return first, rest, jnp.moveaxis(steps, 0, 1), (after, last)


@pytest.fixture(scope="module")
def stacked():
    model = fuse_language_models(language_model(LLAMA), evidence(), num_models=2)
    return compiled(functools.partial(read, model))(tree.stack(LLAMAS))


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_reading_in_steps_equals_reading_at_once(stacked):
    _, rest, steps, (after, last) = stacked
    assert_close(rest, steps)
    assert_close(after, last)
    # The bookkeeping of the cache is one for all experts.
    assert after.experts.column.shape == ()
    assert after.experts.keys[0].shape[:2] == (2, 2)


def test_a_stack_equals_a_tuple(stacked):
    model = fuse_language_models([language_model(LLAMA)] * 2, evidence())
    listed = compiled(functools.partial(read, model))(LLAMAS)
    assert_close(listed[1:3], stacked[1:3])


def test_architectures_that_differ_are_pooled():
    configs, params = (LLAMA, QWEN), (LLAMAS[0], QWENS)
    models = [language_model(config) for config in configs]
    model = fuse_language_models(models, uniform())
    first, rest, *_ = compiled(functools.partial(read, model))(params)
    laws = jnp.stack(
        [
            jax.nn.log_softmax(whole(config, own, TEXT, VALID))
            for config, own in zip(configs, params, strict=True)
        ]
    )
    expected = log_opinion_pool(laws, jnp.full(2, 0.5))
    found = jnp.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(found[VALID], expected[VALID], atol=2e-5)
    assert np.abs(laws[0] - laws[1])[VALID].max() > 1


def test_decoding_keeps_the_choices_and_their_gaps():
    model = fuse_language_models(language_model(LLAMA), emselect(), num_models=2)

    def keep(cache):
        chosen = jnp.argmax(cache.weights, axis=0)
        return chosen, selection_gap(cache.log_probs, chosen)

    @jax.jit
    def decode(params):
        return generate(
            params, jax.random.key(0), model, TEXT, VALID, 12, temperature=0, keep=keep
        )

    found = decode(tree.stack(LLAMAS))
    chosen, gap = found.kept
    assert chosen.shape == (12, 2)
    assert set(np.unique(chosen)) == {0, 1}
    assert (gap.chosen <= gap.bound).all()
    assert (gap.bound > 0.01).any()
    # Greedily, each token is the likeliest of the expert that was chosen for it.
    texts = jnp.concatenate([TEXT, found.tokens], axis=1)
    valid = jnp.concatenate([VALID, jnp.ones((2, 12), bool)], axis=1)
    own = np.stack([whole(LLAMA, params, texts, valid) for params in LLAMAS])
    for row in range(2):
        for step in range(12):
            law = own[chosen[step, row], row, 7 + step]
            assert found.tokens[row, step] == law.argmax()
