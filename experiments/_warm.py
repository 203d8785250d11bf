"""Where reinforcement learning starts: a clone of the data's behaviour."""

from typing import Any

import jax

from emfuse_jax import loops
from emfuse_jax.base import SpaceSpec
from emfuse_jax.data import Dataset, gather_transition
from emfuse_jax.policies.bc import bc, clone_config, warm_start
from emfuse_jax.policies.model_based import ModelBasedState
from emfuse_jax.policies.sac import SacConfig

BATCH_SIZE = 256


def cloned(
    key: jax.Array,
    state: ModelBasedState,
    config: SacConfig,
    spec: SpaceSpec,
    dataset: Dataset,
    num_updates: int,
) -> ModelBasedState:
    """The state with an actor cloned from ``dataset``; pure, so seeds may be vmapped."""
    learner = bc(clone_config(config), spec)
    key_init, key_fit = jax.random.split(key)

    def sample_batch(key: jax.Array, data: Dataset) -> Any:
        rows = jax.random.randint(key, (BATCH_SIZE,), 0, data.age.shape[0])
        return gather_transition(data, rows)

    clone, _ = loops.fit(
        key_fit,
        learner,
        learner.init(key_init),
        sample_batch,
        num_updates,
        data=dataset,
    )
    return state._replace(policy=warm_start(state.policy, clone.params))
