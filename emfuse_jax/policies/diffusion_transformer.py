"""Diffusion Policy with a transformer: the baseline of the energy-based one.

The network is that of `nets.transformer`'s energy with a token for the time, the learner
and the sampler are `diffusion`'s.

Reference:
    Chi et al., "Diffusion Policy", RSS 2023. https://arxiv.org/abs/2303.04137 (there
    DDPM with a cosine schedule and 100 steps; here `diffusion`'s schedule and solver).
"""

import dataclasses

from emfuse_jax._settings import at_least
from emfuse_jax.base import Policy, SpaceSpec
from emfuse_jax.nets.transformer import TransformerConfig, transformer_denoiser
from emfuse_jax.policies.diffusion import DiffusionConfig, diffusion

__all__ = ["DiffusionTransformerConfig", "diffusion_transformer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionTransformerConfig:
    """Settings of `diffusion_transformer`.

    Attributes:
        transformer: sizes of the network.
        num_frames: observation frames in an observation, oldest first.
        horizon: actions in a chunk.
        diffusion: learner and sampler; its own ``network`` is not used.
    """

    transformer: TransformerConfig = TransformerConfig()  # noqa: RUF009
    num_frames: int = 1
    horizon: int = 1
    diffusion: DiffusionConfig = DiffusionConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        at_least(self, 1, "num_frames", "horizon")


def diffusion_transformer(
    config: DiffusionTransformerConfig, spec: SpaceSpec
) -> Policy:
    """`diffusion` over stacked observations and flattened chunks with a transformer.

    Args:
        config: see `DiffusionTransformerConfig`.
        spec: sizes of a stacked observation, ``num_frames * obs``, and of a flattened
            chunk, ``horizon * act``.

    Raises:
        ValueError: if ``config.horizon`` or ``config.num_frames`` does not divide the
            size it should.

    Example:
        >>> import jax
        >>> config = DiffusionTransformerConfig(num_frames=2, horizon=4)
        >>> policy = diffusion_transformer(config, SpaceSpec(6, 8))
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
    """
    if spec.observation_size % config.num_frames:
        raise ValueError(
            f"num_frames={config.num_frames} does not divide observation_size="
            f"{spec.observation_size}; observations are flattened stacks of frames"
        )
    network = transformer_denoiser(
        spec.action_size,
        num_frames=config.num_frames,
        horizon=config.horizon,
        config=config.transformer,
    )
    return diffusion(config.diffusion, spec, network=network)
