"""Language models that are fused by their next-token laws: checkpoints, caches, decoding."""

from emfuse_jax.llm._rule import FusionRule
from emfuse_jax.llm.cache import EXPERT_AXES, KvCache
from emfuse_jax.llm.config import LmConfig, config_from_hf, config_to_hf
from emfuse_jax.llm.emselect import (
    SelectionGap,
    emselect,
    nearest_to_pool,
    pairwise_kl,
    pairwise_margin,
    pool_divergences,
    selection_gap,
    sequence_gap,
    tournament,
)
from emfuse_jax.llm.evidence import evidence, exponentiated_gradient
from emfuse_jax.llm.fuse import FusedCache, fuse_language_models, linear_opinion_pool
from emfuse_jax.llm.model import (
    LINEAR_INPUTS,
    apply_layer,
    embed_tokens,
    init_params,
    language_model,
    logits,
)
from emfuse_jax.llm.packllm import (
    packllm_opt,
    packllm_opt_weights,
    packllm_sim,
    packllm_sim_weights,
    top_one,
)
from emfuse_jax.llm.rope import RopeConfig
from emfuse_jax.llm.rules import (
    FUSION_RULES,
    entropy_adaptive,
    fixed,
    linear_pool,
    rule_by_name,
    uniform,
)
from emfuse_jax.llm.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from emfuse_jax.llm.vocabulary import (
    VocabularyMap,
    align_vocabularies,
    check_same_vocabulary,
    map_log_probs,
    map_tokens,
    map_vocabulary,
)
from emfuse_jax.llm.weights import (
    LoadedLm,
    load_language_model,
    load_params,
    save_pretrained,
)

__all__ = [
    "EXPERT_AXES",
    "FUSION_RULES",
    "LINEAR_INPUTS",
    "ByteTokenizer",
    "FusedCache",
    "FusionRule",
    "KvCache",
    "LmConfig",
    "LoadedLm",
    "RopeConfig",
    "SelectionGap",
    "Tokenizer",
    "VocabularyMap",
    "align_vocabularies",
    "apply_layer",
    "check_same_vocabulary",
    "config_from_hf",
    "config_to_hf",
    "embed_tokens",
    "emselect",
    "entropy_adaptive",
    "evidence",
    "exponentiated_gradient",
    "fixed",
    "fuse_language_models",
    "init_params",
    "language_model",
    "linear_opinion_pool",
    "linear_pool",
    "load_language_model",
    "load_params",
    "load_tokenizer",
    "logits",
    "map_log_probs",
    "map_tokens",
    "map_vocabulary",
    "nearest_to_pool",
    "packllm_opt",
    "packllm_opt_weights",
    "packllm_sim",
    "packllm_sim_weights",
    "pairwise_kl",
    "pairwise_margin",
    "pool_divergences",
    "rule_by_name",
    "save_pretrained",
    "selection_gap",
    "sequence_gap",
    "top_one",
    "tournament",
    "uniform",
]
