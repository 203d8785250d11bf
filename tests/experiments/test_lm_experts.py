"""Folders of language models that are opened to be fused, and what their tokens are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _tiny_lms as tiny
from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm import ByteTokenizer, pad_left, uniform
from emfuse_jax.llm.model import logits
from experiments._lm_experts import fuse_rule, join_params, open_experts


def write(folder, seed, vocab_size):
    config = dataclasses.replace(tiny.CONFIG, vocab_size=vocab_size)
    tiny.write_model(folder, jax.random.key(seed), config)
    return str(folder)


@pytest.mark.parametrize("sizes", [(257, 264), (264, 272), (264, 264)])
def test_padded_embeddings_are_cropped_to_the_tokenizer(tmp_path, sizes):
    """Checkpoints round the number of rows up, one family's sizes differently: a row that
    is no token has no share of the law, and one tokenizer needs no mapping."""
    paths = [write(tmp_path / str(i), i, size) for i, size in enumerate(sizes)]
    experts = open_experts(paths)
    assert experts.vocab_size == 257
    model = fuse_rule(experts, uniform())
    tokens, valid = pad_left([ByteTokenizer().encode("energies add")])

    def read(params):
        cache = model.init_cache(1, 32)
        return model.prefill(params, tokens, valid, cache, last_only=True)[0][0, 0]

    def own(config, params):
        law = logits(config, params, tokens, valid)[0, -1, :257]
        return jax.nn.log_softmax(law)

    found = jax.jit(read)(join_params(experts))
    laws = [
        jax.jit(own, static_argnums=0)(config, params)
        for config, params in zip(experts.configs, experts.params, strict=True)
    ]
    expected = log_opinion_pool(jnp.stack(laws), jnp.full(2, 0.5))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert float(jax.nn.logsumexp(found)) == pytest.approx(0.0, abs=1e-5)
