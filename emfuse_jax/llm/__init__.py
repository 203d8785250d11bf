"""Language models that are fused by their next-token laws: checkpoints, caches, decoding."""

from emfuse_jax.llm.cache import EXPERT_AXES, KvCache
from emfuse_jax.llm.config import LmConfig, config_from_hf, config_to_hf
from emfuse_jax.llm.model import (
    LINEAR_INPUTS,
    apply_layer,
    embed_tokens,
    init_params,
    language_model,
    logits,
)
from emfuse_jax.llm.rope import RopeConfig
from emfuse_jax.llm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from emfuse_jax.llm.weights import (
    LoadedLm,
    load_language_model,
    load_params,
    save_pretrained,
)

__all__ = [
    "EXPERT_AXES",
    "LINEAR_INPUTS",
    "ByteTokenizer",
    "KvCache",
    "LmConfig",
    "LoadedLm",
    "RopeConfig",
    "Tokenizer",
    "apply_layer",
    "config_from_hf",
    "config_to_hf",
    "embed_tokens",
    "init_params",
    "language_model",
    "load_language_model",
    "load_params",
    "load_tokenizer",
    "logits",
    "save_pretrained",
]
