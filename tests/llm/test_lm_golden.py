"""Beside transformers, in torch: every architecture and every rotary embedding.

Checkpoints are tiny and random, with norms, biases and frequencies that all matter.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _lm_models import random_params
from emfuse_jax.llm import (
    ByteTokenizer,
    LmConfig,
    RopeConfig,
    config_from_hf,
    load_language_model,
    logits,
    save_pretrained,
)
from emfuse_jax.llm.rope import attention_factor, frequencies

torch = pytest.importorskip("torch", reason="the reference implementation is in torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # models are so small that threads would wait for each other

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}
CASES = {
    "llama": {"model_type": "llama"},
    "llama-all-heads-tied": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "llama-linear-biases": {
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": LINEAR,
    },
    "llama3": {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"rope_theta": 5e5},
        "rms_norm_eps": 1e-5,
    },
    "llama3-tied": {
        "model_type": "llama",
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1e6}},
    "qwen2-yarn-tied": {
        "model_type": "qwen2",
        "rope_parameters": YARN,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-theta-tied": {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_parameters": {"rope_theta": 5e6},
        "tie_word_embeddings": True,
    },
    "qwen3-yarn-biases": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": YARN | {"truncate": False},
    },
}
NUM_NEW = 64
TOKENS = np.random.default_rng(0).integers(0, 101, (3, 24))
# Row 1 is padded on the left, as prompts are that are decoded together.
VALID = np.arange(24)[None] >= np.array([0, 9, 0])[:, None]


@functools.cache
def reference(case, dtype="float32"):
    """The torch model of a case, all of whose parameters are random."""
    parts = {"rope_parameters": {"rope_type": "default"}} | CASES[case]
    rope = {"rope_theta": 1e4} | parts.pop("rope_parameters")
    config = transformers.AutoConfig.for_model(**SIZES | parts, rope_parameters=rope)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                # Embeddings are of size one; tied, they make logits so below.
                scale = 1.0 if "embed" in name else weight.shape[1] ** -0.5
                weight.copy_(scale * noise)
            else:
                weight.copy_(0.4 * noise + ("norm" in name))
        if config.tie_word_embeddings:
            model.model.norm.weight *= config.hidden_size**-0.5
    return model.to(getattr(torch, dtype))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def save(case, dtype="float32"):
        path = tmp_path_factory.mktemp(case)
        reference(case, dtype).save_pretrained(path)
        return path

    return save


def torch_logits(model, tokens=TOKENS, valid=VALID):
    tokens, valid = torch.tensor(tokens), torch.tensor(valid)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(tokens, attention_mask=valid.long(), position_ids=positions)
    return out.logits.float().numpy()


def our_logits(loaded):
    run = jax.jit(functools.partial(logits, loaded.config))
    return np.asarray(run(loaded.params, jnp.asarray(TOKENS), jnp.asarray(VALID)))


def greedy(loaded, num_new=NUM_NEW):
    """Tokens and logits of greedy decoding: one prefill, then one scan of steps."""
    model = loaded.model

    def run(params, tokens, valid):
        cache = model.init_cache(len(tokens), tokens.shape[1] + num_new)
        found, cache = model.prefill(params, tokens, valid, cache, last_only=True)

        def body(carry, _):
            found, cache = carry
            token = jnp.argmax(found, -1)
            following = model.step(params, token, cache)
            return following, (token, found)

        return jax.lax.scan(body, (found[:, 0], cache), length=num_new)[1]

    tokens, found = jax.jit(run)(loaded.params, jnp.asarray(TOKENS), jnp.asarray(VALID))
    return np.asarray(tokens).T, np.moveaxis(np.asarray(found), 0, 1)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_decode_are_those_of_transformers(folder, case):
    loaded = load_language_model(folder(case))
    tokens, found = greedy(loaded)
    with torch.no_grad():
        out = reference(case).generate(
            torch.tensor(TOKENS),
            attention_mask=torch.tensor(VALID).long(),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    np.testing.assert_array_equal(tokens, out.sequences[:, TOKENS.shape[1] :].numpy())
    expected = torch.stack(out.logits, 1).numpy()
    assert np.abs(found - expected).max() < 5e-6
    assert np.abs(expected).max() > 2  # so that the bound means something
    if case in ("llama3", "qwen2", "qwen3"):  # without a cache, at all positions
        error = np.abs(our_logits(loaded) - torch_logits(reference(case)))[VALID]
        assert error.max() < 5e-6


@pytest.mark.parametrize("case", [name for name in CASES if "rope" in str(CASES[name])])
def test_another_rotary_embedding_would_have_shown(case):
    """What a loader that ignores the rope settings would have given."""
    plain = dict(
        CASES[case], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    config = transformers.AutoConfig.for_model(**SIZES | plain)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(reference(case).state_dict())
    difference = torch_logits(model) - torch_logits(reference(case))
    assert np.abs(difference)[VALID].max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_both_styles_of_config_say_the_same(folder, case):
    new = json.loads((folder(case) / "config.json").read_text())
    assert "rope_theta" not in new
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    old["torch_dtype"] = old.pop("dtype")
    config = config_from_hf(new)
    assert config_from_hf(old) == config
    # And transformers reads the old style as the same model.
    again = transformers.AutoConfig.for_model(**old)
    read = again.rope_parameters | {"rope_type": kind}
    read.pop("type", None)
    assert read == new["rope_parameters"]


def test_frequencies_of_published_models():
    """Llama 3.1's, Qwen 2.5's long-context and plain settings at full size."""
    settings = [
        LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "rope_theta": 1e6,
        },
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "mscale": 1.0}
        | {"mscale_all_dim": 0.5, "original_max_position_embeddings": 4096},
        {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e6},
    ]
    sizes = SIZES | {"head_dim": 128, "max_position_embeddings": 131072}
    for rope in settings:
        data = {"model_type": "llama"} | sizes | {"rope_parameters": rope}
        theirs = transformers.AutoConfig.for_model(**data)
        config = config_from_hf(data)
        module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        expected = module.inv_freq.numpy()
        found = frequencies(config.rope, config.head_dim)
        np.testing.assert_allclose(found, expected, rtol=2e-7)
        factor = attention_factor(config.rope)
        assert factor == pytest.approx(module.attention_scaling, rel=1e-12)


def test_bfloat16_is_as_near_as_bfloat16_can_be(folder):
    """Both are judged by float32 arithmetic on the same weights."""
    case = "qwen3"
    path = folder(case, "bfloat16")
    loaded = load_language_model(path)
    assert loaded.config.dtype == "bfloat16"
    kernel = reference(case, "bfloat16").model.layers[1].mlp.up_proj.weight
    found = loaded.params["layers"][1]["up"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32).T, kernel.float().detach())
    theirs = torch_logits(reference(case, "bfloat16"))
    exact = load_language_model(path, dtype="float32")
    truth = our_logits(exact)
    in_float32 = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32
    )
    assert np.abs(truth - torch_logits(in_float32))[VALID].max() < 5e-6
    ours = np.abs(our_logits(loaded) - truth)[VALID]
    other = np.abs(theirs - truth)[VALID]
    assert other.mean() > 1e-3  # bfloat16 shows
    assert ours.mean() < 1.1 * other.mean()
    assert ours.max() < 2 * other.max()


def test_shards_are_one_model(folder, tmp_path):
    reference("qwen2").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one = load_language_model(folder("qwen2")).params
    many = load_language_model(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, one, many)


OURS = {
    "llama": LmConfig(
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        rope=RopeConfig(kind="llama3", theta=5e5, factor=8.0, original_length=32),
        qkv_bias=True,
        o_bias=True,
    ),
    "qwen2": LmConfig(
        family="qwen2",
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        rope=RopeConfig(kind="yarn", factor=4.0, original_length=64),
        qkv_bias=True,
        tied=True,
    ),
    "qwen3": LmConfig(
        family="qwen3",
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        head_dim=16,
        dtype="bfloat16",
    ),
}


@pytest.mark.parametrize("family", OURS)
def test_transformers_reads_what_we_write(tmp_path, family):
    config, params = OURS[family], random_params(OURS[family])
    save_pretrained(tmp_path, params, config, ByteTokenizer())
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert model.dtype == getattr(torch, config.dtype)
    assert model.generation_config.eos_token_id == 256
    loaded = load_language_model(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    error = np.abs(our_logits(loaded) - torch_logits(model))[VALID].max()
    assert error < (5e-6 if config.dtype == "float32" else 0.2)
    # Written again by transformers, it is still the same.
    model.save_pretrained(tmp_path / "again")
    assert (
        config_from_hf(json.loads((tmp_path / "again/config.json").read_text()))
        == config
    )
    again = load_language_model(tmp_path / "again").params
    jax.tree.map(np.testing.assert_array_equal, again, params)
