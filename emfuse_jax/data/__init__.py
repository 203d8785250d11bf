"""Data: checked arrays and windows of history, readers, the normaliser, buffers."""

from emfuse_jax.data.behaviour import (
    Behaviour,
    behaviour_act,
    load_behaviour,
    packaged_behaviours,
    random_act,
    save_behaviour,
)
from emfuse_jax.data.buffer import num_stored, ring_buffer
from emfuse_jax.data.d4rl_reader import read_d4rl, write_d4rl
from emfuse_jax.data.dataset import (
    Dataset,
    concatenate,
    episode_bounds,
    gather_history,
    gather_transition,
    make_dataset,
    split_episodes,
    take,
)
from emfuse_jax.data.load import load_dataset
from emfuse_jax.data.minari_reader import read_minari, write_minari
from emfuse_jax.data.normalizer import (
    Normalizer,
    fit_normalizer,
    identity_normalizer,
)
from emfuse_jax.data.synthetic import Law, bump, linear_gaussian

__all__ = [
    "Behaviour",
    "Dataset",
    "Law",
    "Normalizer",
    "behaviour_act",
    "bump",
    "concatenate",
    "episode_bounds",
    "fit_normalizer",
    "gather_history",
    "gather_transition",
    "identity_normalizer",
    "linear_gaussian",
    "load_behaviour",
    "load_dataset",
    "make_dataset",
    "num_stored",
    "packaged_behaviours",
    "random_act",
    "read_d4rl",
    "read_minari",
    "ring_buffer",
    "save_behaviour",
    "split_episodes",
    "take",
    "write_d4rl",
    "write_minari",
]
