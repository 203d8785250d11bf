"""Architectures of language models, and Hugging Face's ``config.json`` to and fro.

Read are the styles of transformers 4 (``rope_theta`` and ``rope_scaling``) and 5
(``rope_parameters``). A key that could change the logits and is not known here is refused:
a config that is half understood gives a model that is quietly wrong.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

from emfuse_jax.llm.rope import ROPE_KINDS, RopeConfig

Family = Literal["llama", "qwen2", "qwen3"]
FAMILIES: tuple[str, ...] = get_args(Family)
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "dtype"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "torch_dtype"),
    *("tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *("partial_rotary_factor", "attention_bias", "mlp_bias", "quantization_config"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
}
# Keys that change no logits. ``auto_map`` is not among them: it asks for code of its own.
_HARMLESS = {
    *("_name_or_path", "architectures", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("attention_dropout", "initializer_range", "pretraining_tp"),
    *("output_attentions", "output_hidden_states", "return_dict", "id2label"),
    *("label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("finetuning_task", "task_specific_params", "tokenizer_class", "num_labels"),
    *("_attn_implementation_autoset", "attn_implementation", "unsloth_version"),
    *("unsloth_fixed", "prefix", "torchscript", "dropout", "model_name", "max_length"),
    # Settings of generation, which older files carry.
    *("temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups"),
    *("repetition_penalty", "length_penalty", "num_return_sequences", "do_sample"),
}
# Nested rope keys by kind, and the fields of `RopeConfig` that they fill.
_ROPE_KEYS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmConfig:
    """The architecture of a decoder-only language model.

    Attributes:
        family: ``qwen2`` has biases on queries, keys and values; ``qwen3`` normalises
            queries and keys per head.
        vocab_size: rows of the embedding (often more than the tokenizer has tokens).
        hidden_size: of the residual stream.
        intermediate_size: of the gated layer.
        num_layers: of attention and gated layer each.
        num_heads: of queries.
        num_kv_heads: of keys and values; divides ``num_heads``.
        head_dim: coordinates per head, even.
        context_length: tokens that the model was trained for.
        norm_epsilon: of the root-mean-square normalisation.
        rope: the rotary embedding.
        tied: the embedding is the output layer too.
        qkv_bias: queries, keys and values have biases.
        o_bias: the attention's output has a bias.
        dtype: of parameters, cache and products; norms, softmax and logits are float32.

    Example:
        >>> config = LmConfig(vocab_size=257, hidden_size=64, num_layers=2, num_heads=4)
        >>> config.head_dim, config.num_kv_heads, config.intermediate_size
        (16, 4, 192)
    """

    family: Family = "llama"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    context_length: int = 2048
    norm_epsilon: float = 1e-6
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        def fill(name: str, value: int) -> None:
            object.__setattr__(self, name, getattr(self, name) or value)

        _expect_one_of("family", self.family, FAMILIES)
        _expect_one_of("dtype", self.dtype, DTYPES)
        fill("num_kv_heads", self.num_heads)
        fill("head_dim", self.hidden_size // max(self.num_heads, 1))
        # Gated layers have three kernels: as many parameters as two of four times the width.
        fill("intermediate_size", 64 * -(-self.hidden_size // 24))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and value >= 1):
                raise ValueError(
                    f"{field.name}={value!r}; expected an int of at least 1"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim}; rotary embeddings need an even one"
            )


def config_from_hf(
    data: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> LmConfig:
    """Reads the dict of a Hugging Face ``config.json``, of either style.

    Args:
        data: the parsed file.
        ignore: keys that you know not to change the logits.

    Raises:
        ValueError: for a model type, activation, rope type or key that is not known, for
            sliding windows, quantised weights and biases in the gated layer, and for
            missing or ill-typed values. The text names the key and its value.

    Example:
        >>> config_from_hf({"model_type": "gpt2"})
        Traceback (most recent call last):
        ValueError: model_type='gpt2' is not supported; expected one of llama, qwen2, qwen3
    """
    data = {key: value for key, value in data.items() if key not in ignore}
    family = data.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type={family!r} is not supported; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    _refuse(data)
    qkv_bias = family == "qwen2" or _flag(data, "attention_bias")
    num_heads = _whole(data, "num_attention_heads")
    # Left out, it means as many as there are queries' heads to Llama alone.
    may_lack = family == "llama" or "num_key_value_heads" in data
    # Qwen3's own default; the others divide the hidden size.
    head_dim = 128 if family == "qwen3" and "head_dim" not in data else 0
    return LmConfig(
        family=family,
        vocab_size=_whole(data, "vocab_size"),
        hidden_size=_whole(data, "hidden_size"),
        intermediate_size=_whole(data, "intermediate_size"),
        num_layers=_whole(data, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_whole(
            data, "num_key_value_heads", num_heads if may_lack else None
        ),
        head_dim=_whole(data, "head_dim", head_dim),
        context_length=_whole(data, "max_position_embeddings"),
        norm_epsilon=_number(data, "rms_norm_eps", 1e-6),
        rope=_rope_from_hf(data),
        tied=_flag(data, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=family != "qwen2" and qkv_bias,
        dtype=_dtype(data),
    )


def config_to_hf(config: LmConfig) -> dict[str, Any]:
    """The dict that transformers, 4 or 5, reads back as the same model.

    Raises:
        ValueError: if the family has no such combination of biases.

    Example:
        >>> config = LmConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=2)
        >>> config_to_hf(config)["model_type"]
        'llama'
    """
    expected_qkv = config.family == "qwen2" or config.o_bias
    if config.qkv_bias != expected_qkv or (config.family == "qwen2" and config.o_bias):
        raise ValueError(
            f"{config.family} models with qkv_bias={config.qkv_bias} and "
            f"o_bias={config.o_bias} have no Hugging Face config; qwen2 has the first "
            "alone, llama and qwen3 have both or neither"
        )
    rope = config.rope
    names = _ROPE_KEYS[rope.kind]
    scaling = {key: getattr(rope, field) for key, field in names.items()}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    scaling = {"rope_type": rope.kind, **scaling}
    data = {
        "architectures": [_CLASSES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {**scaling, "rope_theta": rope.theta},
        # What transformers 4 reads.
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "torch_dtype": config.dtype,
        "dtype": config.dtype,
    }
    if config.family == "qwen2":
        return data | {"use_sliding_window": False}
    if config.family == "qwen3":
        data["use_sliding_window"] = False
    return data | {"attention_bias": config.qkv_bias}


def _refuse(data: Mapping[str, Any]) -> None:
    """What is asked for and not done."""
    if data.get("quantization_config") is not None:
        method = data["quantization_config"]
        raise ValueError(
            f"quantization_config={method!r}: quantised weights are not supported; save the "
            "model unquantised, in float32 or bfloat16"
        )
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={data['hidden_act']!r}; only 'silu' is supported")
    if data.get("mlp_bias"):
        raise ValueError("mlp_bias=true: biases in the gated layer are not supported")
    layers = data.get("layer_types") or ()
    if not isinstance(layers, list | tuple):
        raise ValueError(f"layer_types={layers!r}; expected a list")
    types = {str(kind) for kind in layers} - {"full_attention"}
    # Qwen's configs state a window that use_sliding_window=false switches off.
    window = data["model_type"] == "llama" and data.get("sliding_window") is not None
    if data.get("use_sliding_window") or types or window:
        raise ValueError(
            "sliding-window attention is not supported (use_sliding_window="
            f"{data.get('use_sliding_window')!r}, layer_types={sorted(types)}, "
            f"sliding_window={data.get('sliding_window')!r}); if no text is longer than the "
            "window, set use_sliding_window to false and remove the others"
        )
    for key, value in data.items():
        if value and key not in _READ | _HARMLESS:
            raise ValueError(
                f"{key}={value!r}: this key is not known, so the model might not be what "
                "the config asks for; if you know that it does not change the logits, pass "
                f"ignore=({key!r},)"
            )


def _rope_from_hf(data: Mapping[str, Any]) -> RopeConfig:
    """`RopeConfig` from either style; given both, they must agree."""
    styles = [data[key] for key in ("rope_parameters", "rope_scaling") if data.get(key)]
    for style in styles:
        if not isinstance(style, Mapping):
            raise ValueError(f"rope settings {style!r}; expected an object")
    found = [_one_rope(data, style) for style in styles or [{}]]
    if found[0] != found[-1]:
        raise ValueError(
            f"rope_parameters={data['rope_parameters']!r} and rope_scaling="
            f"{data['rope_scaling']!r} disagree; remove one of them"
        )
    return found[0]


def _one_rope(data: Mapping[str, Any], settings: Mapping[str, Any]) -> RopeConfig:
    settings = {key: value for key, value in settings.items() if value is not None}
    kind = settings.pop("rope_type", settings.get("type", "default"))
    settings.pop("type", None)
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"rope_type={kind!r} is not supported; expected one of {', '.join(ROPE_KINDS)}"
        )
    theta = settings.pop("rope_theta", data.get("rope_theta") or 10_000.0)
    outer = data.get("partial_rotary_factor")
    part = settings.pop("partial_rotary_factor", outer if outer is not None else 1.0)
    if part != 1.0:
        raise ValueError(
            f"partial_rotary_factor={part!r}; only whole heads can be rotated (1.0)"
        )
    if kind == "yarn":
        _yarn_defaults(data, settings)
    names = _ROPE_KEYS[kind]
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise ValueError(
            f"rope settings {', '.join(unknown)} are not known for rope_type={kind!r}; "
            f"expected {', '.join(names) or 'none'}"
        )
    needed = [key for key in names if kind != "yarn" and key not in settings]
    if needed:
        raise ValueError(f"rope_type={kind!r} needs {', '.join(needed)}")
    values: dict[str, Any] = {}
    for key, field in names.items():
        if key not in settings:
            continue
        if key == "original_max_position_embeddings":
            values[field] = _whole(settings, key)
        elif key == "truncate":
            values[field] = _flag(settings, key)
        else:
            values[field] = _number(settings, key)
    return RopeConfig(
        kind=kind, theta=_number({"rope_theta": theta}, "rope_theta"), **values
    )


def _yarn_defaults(data: Mapping[str, Any], settings: dict[str, Any]) -> None:
    """Fills what transformers infers when a YaRN config leaves it out."""
    length = _whole(data, "max_position_embeddings")
    settings.setdefault("original_max_position_embeddings", length)
    original = _whole(settings, "original_max_position_embeddings")
    settings.setdefault("factor", length / original)
    some, all_ = settings.pop("mscale", None), settings.pop("mscale_all_dim", None)
    if some and all_ and "attention_factor" not in settings:
        growth = 0.1 * math.log(max(_number(settings, "factor"), 1.0))
        given = {"mscale": some, "mscale_all_dim": all_}
        above, below = (growth * _number(given, key) + 1.0 for key in given)
        settings["attention_factor"] = above / below


def _whole(data: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = data.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"{key} is missing; expected an int of at least 1")
    if type(value) is not int or value < 1:
        raise ValueError(f"{key}={value!r}; expected an int of at least 1")
    return value


def _number(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = data.get(key, default)
    # JSON as Python reads it has Infinity, which is no setting of any model.
    usual = isinstance(value, int | float) and not isinstance(value, bool)
    if not usual or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r}; expected a positive number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{key} is too large for a number") from error


def _flag(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key}={value!r}; expected true or false")
    return bool(value)


def _dtype(data: Mapping[str, Any]) -> Any:
    """Where a config names no dtype, float32 holds whatever the file does."""
    value = data.get("dtype") or data.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    _expect_one_of("dtype", name, DTYPES)
    return name


def _expect_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(known)}")
