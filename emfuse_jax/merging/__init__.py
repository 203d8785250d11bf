"""Merging: one model from the parameters of several, at the cost of one.

The baselines of fusing by energy: soups, and RegMean, over any pytree of linear layers.
"""

from emfuse_jax.merging.flax_layers import flax_grams
from emfuse_jax.merging.grams import (
    Gram,
    GramMemory,
    Grams,
    Stage,
    collect_grams,
    gram,
    gram_memory,
    tree_bytes,
)
from emfuse_jax.merging.regmean import (
    merge_layers,
    merge_linear,
    regmean,
    regmean_streamed,
)
from emfuse_jax.merging.soup import (
    GreedySoup,
    check_same_architecture,
    greedy_soup,
    model_soup,
)

__all__ = [
    "Gram",
    "GramMemory",
    "Grams",
    "GreedySoup",
    "Stage",
    "check_same_architecture",
    "collect_grams",
    "flax_grams",
    "gram",
    "gram_memory",
    "greedy_soup",
    "merge_layers",
    "merge_linear",
    "model_soup",
    "regmean",
    "regmean_streamed",
    "tree_bytes",
]
