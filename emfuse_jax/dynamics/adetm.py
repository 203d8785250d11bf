"""ADETM: the any-step energy transition model.

One energy ``E([h_s ‖ h_a], y)`` serves every slice of a history: ``h_s`` encodes the state
from which a slice starts, ``h_a`` the actions since, by masked multi-head attention with
lag positions. Its uncertainty needs no second model: see `dynamics.uncertainty`.

References: EMFuse (ICLR 2026) for the model; ADMPO (arXiv:2405.17031) for the slices; Chen
et al., ICML 2024 (ETM) for the energy and its published training.
"""

import dataclasses

from emfuse_jax._settings import at_least
from emfuse_jax.base import Dynamics, SpaceSpec
from emfuse_jax.dynamics.base import Anchor
from emfuse_jax.dynamics.contrastive import ContrastiveConfig, contrastive_dynamics
from emfuse_jax.nets.encoder import slice_encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdetmConfig(ContrastiveConfig):
    """An any-step energy transition model.

    Attributes:
        num_lags: slices: the longest starts ``num_lags - 1`` steps back.
        anchor: what slices start from; ``current`` keeps the newest state and grows
            only the action history, which a Markov model learns to ignore (its
            spread then says little).
        state_features: width of the state encoder.
        action_features: width of the action encoder.
        num_heads: attention heads; must divide ``action_features``.
    """

    num_lags: int = 5
    anchor: Anchor = "backtrack"
    state_features: int = 128
    action_features: int = 32
    num_heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_lags < 2:
            raise ValueError(
                f"num_lags={self.num_lags} leaves no slices to compare; use at least 2, "
                "or etm for a one-step model"
            )
        at_least(self, 1, "state_features", "action_features", "num_heads")
        if self.action_features % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide action_features={self.action_features}"
            )


def adetm(config: AdetmConfig, spec: SpaceSpec) -> Dynamics:
    """The any-step energy transition model: ``init(key, scales)``, ``update(key, state,
    Batch)`` and ``model``.

    Example:
        >>> model = adetm(AdetmConfig(num_lags=3), SpaceSpec(4, 2)).model
        >>> model.expert.num_lags
        3
    """
    encoder = slice_encoder(
        config.state_features, config.action_features, config.num_heads
    )
    return contrastive_dynamics(
        encoder,
        config,
        spec,
        num_lags=config.num_lags,
        anchor=config.anchor,
        feature_size=config.state_features + config.action_features,
    )
