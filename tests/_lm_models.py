"""Tiny language models whose every part matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.llm import LmConfig, RopeConfig, init_params

TINY = LmConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    context_length=128,
)


@functools.cache
def random_params(config, seed=0):
    """Parameters far from their initial values: norms are not one, biases not zero, and
    laws over the vocabulary not flat. From numpy, which has nothing to compile."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))

    def draw(path, leaf):
        name = path[-1].key
        scale = 0.4 if leaf.ndim == 1 else leaf.shape[0] ** -0.5
        if name == "embed":
            scale = 1.0
        value = scale * generator.standard_normal(leaf.shape) + name.endswith("norm")
        if config.tied and name == "norm":
            value *= config.hidden_size**-0.5  # the logits are of size one too
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def families():
    """One config per family, with the parts that only it has."""
    llama3 = RopeConfig(
        kind="llama3",
        theta=1e4,
        factor=8.0,
        original_length=16,
        high_frequency_factor=4.0,
    )
    return {
        "llama": dict(family="llama", rope=llama3, qkv_bias=True, o_bias=True),
        "qwen2": dict(family="qwen2", qkv_bias=True, tied=True),
        "qwen3": dict(family="qwen3", head_dim=16, rope=RopeConfig(theta=1e6)),
    }


def random_tokens(seed, shape, vocab_size=TINY.vocab_size):
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size)


def largest(x):
    return float(jnp.max(jnp.abs(x)))
