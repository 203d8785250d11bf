"""``config.json``: what is understood comes back, what is not is refused by name."""

import dataclasses

import pytest

from _lm_models import TINY, families
from emfuse_jax.llm import LmConfig, RopeConfig, config_from_hf, config_to_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "pretraining_tp": 1,
    "use_cache": True,
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def test_published_configs_are_read():
    """Llama 3.2 1B's and Qwen2.5 0.5B's files, as they were published."""
    llama = config_from_hf(LLAMA)
    assert llama == LmConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        context_length=131072,
        norm_epsilon=1e-5,
        tied=True,
        dtype="bfloat16",
        rope=RopeConfig(
            kind="llama3", theta=500000.0, factor=32.0, original_length=8192
        ),
    )
    qwen = config_from_hf(QWEN2)
    assert (qwen.qkv_bias, qwen.o_bias, qwen.head_dim) == (True, False, 64)
    assert qwen.rope == RopeConfig(theta=1e6)


@pytest.mark.parametrize("name", families())
def test_round_trip(name):
    config = dataclasses.replace(TINY, **families()[name])
    assert config_from_hf(config_to_hf(config)) == config
    other = RopeConfig(
        kind="yarn",
        factor=2.0,
        original_length=64,
        truncate=False,
        attention_factor=0.7,
    )
    config = dataclasses.replace(config, rope=other, dtype="bfloat16", tied=True)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox'.*llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=true: biases in the gated layer"),
        ({"sliding_window": 4096}, "sliding-window.*4096"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*unquantised"),
        ({"auto_map": {"AutoModel": "a.B"}}, "auto_map="),
        ({"num_local_experts": 8}, "num_local_experts=8.*ignore="),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*yarn"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type='longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}},
            "mrope_section are not known",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "needs original_max",
        ),
        ({"rope_scaling": [2.0]}, "expected an object"),
        ({"rope_parameters": {"rope_type": "default"}}, "disagree"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 2048.0}, "hidden_size=2048.0; expected an int"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 5}, "num_heads=32 is not a multiple of"),
        ({"head_dim": 63}, "head_dim=63"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
    ],
)
def test_what_is_not_done_is_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        config_from_hf(LLAMA | changes)


def test_a_key_can_be_vouched_for():
    data = LLAMA | {"house_style": "baroque"}
    with pytest.raises(ValueError, match="house_style='baroque'"):
        config_from_hf(data)
    assert config_from_hf(data, ignore=("house_style",)) == config_from_hf(LLAMA)


def test_defaults_are_those_of_transformers():
    bare = {key: LLAMA[key] for key in LLAMA if not key.startswith(("rope", "rms"))}
    for key in (
        "num_key_value_heads",
        "head_dim",
        "torch_dtype",
        "tie_word_embeddings",
    ):
        bare.pop(key)
    config = config_from_hf(bare)
    assert (config.num_kv_heads, config.head_dim, config.tied) == (32, 64, False)
    assert (config.rope, config.norm_epsilon) == (RopeConfig(), 1e-6)
    assert config.dtype == "float32"
    assert (
        config_from_hf(
            bare | {"model_type": "qwen3", "num_key_value_heads": 8}
        ).head_dim
        == 128
    )
    # Qwen's default is 32 whatever the number of heads, so it has to be said.
    with pytest.raises(ValueError, match="num_key_value_heads is missing"):
        config_from_hf(bare | {"model_type": "qwen2"})
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 32768}
    assert config_from_hf(bare | {"rope_parameters": yarn}).rope.factor == 4.0


def test_combinations_without_a_config_are_refused():
    for parts in ({"qkv_bias": True}, {"family": "qwen2"}, {"o_bias": True}):
        with pytest.raises(ValueError, match="have no Hugging Face config"):
            config_to_hf(dataclasses.replace(TINY, **parts))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (
            {"family": "mistral"},
            "family='mistral'; expected one of llama, qwen2, qwen3",
        ),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"num_heads": 3}, "num_heads=3 is not a multiple of num_kv_heads=2"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
@pytest.mark.untyped
def test_bad_fields_are_refused(parts, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(TINY, **parts)
