"""ETM: the one-step energy transition model.

Reference: Chen et al., "Offline transition modeling via contrastive energy learning",
ICML 2024.
"""

import dataclasses

import jax
import jax.numpy as jnp

from emfuse_jax.base import Dynamics, Network, SpaceSpec
from emfuse_jax.dynamics.contrastive import ContrastiveConfig, contrastive_dynamics


@dataclasses.dataclass(frozen=True, kw_only=True)
class EtmConfig(ContrastiveConfig):
    """A one-step energy transition model; the energy reads ``(s, a)`` themselves.

    Attributes:
        energy_sizes: hidden layers of the energy.
    """

    energy_sizes: tuple[int, ...] = (200, 200, 200, 200)


def etm(config: EtmConfig, spec: SpaceSpec) -> Dynamics:
    """The one-step energy transition model: ``init(key, scales)``, ``update(key, state,
    Batch)`` and ``model``, whose slice uncertainty is 0: it has one slice.

    Example:
        >>> from emfuse_jax.data import linear_gaussian
        >>> from emfuse_jax.dynamics import fit_scales
        >>> dataset, _ = linear_gaussian(num_episodes=4, length=10)
        >>> learner = etm(EtmConfig(), SpaceSpec(3, 2))
        >>> state = jax.eval_shape(learner.init, jax.random.key(0), fit_scales(dataset, 1))
        >>> state.step.shape, learner.model.expert.num_lags
        ((), 1)
    """
    size = spec.observation_size + spec.action_size
    return contrastive_dynamics(
        state_action_encoder(),
        config,
        spec,
        num_lags=1,
        anchor="current",
        feature_size=size,
    )


def state_action_encoder() -> Network:
    """The encoder without parameters: the newest ``[s ‖ a]`` itself.

    Example:
        >>> anchor, action = jnp.array([[1.0, 2.0]]), jnp.array([[[3.0], [4.0]]])
        >>> lags = jnp.ones((1, 2), bool)
        >>> state_action_encoder().apply({}, anchor, action, lags).tolist()
        [[1.0, 2.0, 3.0]]
    """

    def concatenate(
        params: dict, anchor: jax.Array, action: jax.Array, lags: jax.Array
    ) -> jax.Array:
        del params, lags
        return jnp.concatenate([anchor, action[..., 0, :]], axis=-1)

    return Network(lambda key, *example: {}, concatenate)
