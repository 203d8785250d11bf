"""Transformers over observation frames and chunks of actions.

One backbone, two heads: an energy of an action chunk, and the noise in one (the same
network as the baseline of the first). Observation frames become tokens that pass a causal
encoder; the actions of a chunk become tokens that attend to each other and to the
encoded frames.

Observations hold ``num_frames`` frames, oldest first, and actions ``horizon`` actions,
flattened to ``[*batch, num_frames * obs]`` and ``[*batch, horizon * act]``. Attention is
the plain product of flax, because fused kernels have no second derivative and a descent
of the energy that is trained through needs one.

References:
    Davies et al., "EBT-Policy: Energy Unlocks Emergent Physical Reasoning Capabilities",
    2025, https://arxiv.org/abs/2510.27545 (the network; without its dropout).
    Chi et al., "Diffusion Policy", RSS 2023, https://arxiv.org/abs/2303.04137 (the noise
    network: the time is one more token to attend to).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from emfuse_jax.base import Network, Params

__all__ = [
    "EnergyTransformer",
    "TransformerConfig",
    "energy_transformer",
    "transformer_denoiser",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes. The defaults suit a processor; the authors take 8 layers of 256 features.

    Attributes:
        num_layers: of the encoder of frames, and as many of the decoder of actions.
        features: width of a token.
        num_heads: of every attention; divides ``features``.
        mlp_ratio: width of a block's hidden layer over ``features``.
    """

    num_layers: int = 2
    features: int = 64
    num_heads: int = 4
    mlp_ratio: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ValueError(f"{name}={size} must be a positive integer")
        if self.features % self.num_heads or self.features % 2:
            raise ValueError(
                f"features={self.features} must be even and a multiple of "
                f"num_heads={self.num_heads}"
            )


class _Block(nn.Module):
    """Pre-normalised attention to oneself, then to a memory, then a hidden layer."""

    config: TransformerConfig

    def attend(self, name: str, query: jax.Array, memory: jax.Array, mask=None):
        heads, features = self.config.num_heads, self.config.features
        attention = nn.MultiHeadDotProductAttention(
            heads, qkv_features=features, normalize_qk=True, name=name
        )
        return attention(query, memory, mask=mask)

    @nn.compact
    def __call__(
        self,
        token: Float[Array, "*batch token features"],
        memory: Float[Array, "*batch memory features"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Array, "*batch token features"]:
        x = nn.RMSNorm(name="self_norm")(token)
        mask = None
        if causal:
            mask = jnp.tril(jnp.ones((x.shape[-2],) * 2, bool))
            mask = mask.reshape((1,) * (x.ndim - 1) + mask.shape)
        token = token + self.attend("self", x, x, mask)
        if memory is not None:
            x = nn.RMSNorm(name="cross_norm")(token)
            token = token + self.attend("cross", x, memory)
        x = nn.RMSNorm(name="mlp_norm")(token)
        x = nn.Dense(self.config.mlp_ratio * self.config.features, name="hidden")(x)
        return token + nn.Dense(self.config.features, name="output")(nn.gelu(x))


class _Backbone(nn.Module):
    """Frames to a memory; the memory and a chunk to one number per action coordinate."""

    config: TransformerConfig
    num_frames: int
    horizon: int
    action_size: int
    timed: bool

    def setup(self) -> None:
        width, layers = self.config.features, range(self.config.num_layers)
        self.frame = nn.Dense(width)
        self.frame_position = self.param(
            "frame_position", nn.initializers.normal(0.02), (self.num_frames, width)
        )
        self.encoder = [_Block(self.config) for _ in layers]
        self.memory_norm = nn.RMSNorm()
        self.action = [nn.Dense(width), nn.Dense(width)]
        self.decoder = [_Block(self.config) for _ in layers]
        self.norm = nn.RMSNorm()
        self.head = [nn.Dense(width), nn.Dense(self.action_size)]
        if self.timed:
            self.time = [nn.Dense(width), nn.Dense(width)]

    def project(self, observation: jax.Array) -> jax.Array:
        """``[*batch, num_frames * obs] -> memory [*batch, num_frames, features]``."""
        *batch, size = observation.shape
        frame = observation.reshape(*batch, self.num_frames, size // self.num_frames)
        token = self.frame(frame)
        token = token + jnp.broadcast_to(self.frame_position, token.shape)
        for block in self.encoder:
            token = block(token, causal=True)
        return self.memory_norm(token)

    def read(self, memory: jax.Array, action: jax.Array) -> jax.Array:
        """``-> [*batch, horizon, act]``."""
        batch = action.shape[:-1]
        token = action.reshape(*batch, self.horizon, self.action_size)
        token = self.action[1](nn.gelu(self.action[0](token)))
        position = sinusoids(jnp.arange(float(self.horizon)), self.config.features)
        token = token + jnp.broadcast_to(position, token.shape)
        memory = jnp.broadcast_to(memory, (*batch, *memory.shape[-2:]))
        for block in self.decoder:
            token = block(token, memory)
        return self.head[1](nn.gelu(self.head[0](self.norm(token))))

    def energy(self, memory: jax.Array, action: jax.Array) -> jax.Array:
        return jnp.mean(self.read(memory, action), axis=(-2, -1))

    def noise(
        self, action: jax.Array, time: jax.Array, observation: jax.Array
    ) -> jax.Array:
        memory = self.project(observation)
        # Times lie in [0, 1]; the wavelengths of positions are made for steps.
        step = self.time[0](sinusoids(1000.0 * time, self.config.features))
        step = self.time[1](nn.silu(step))[..., None, :]
        memory = jnp.concatenate([step, memory], axis=-2)
        return self.read(memory, action).reshape(action.shape)

    def __call__(self, observation: jax.Array, action: jax.Array) -> jax.Array:
        return self.energy(self.project(observation), action)


def sinusoids(
    position: Float[Array, "*batch"], features: int
) -> Float[Array, "*batch features"]:
    """Sines and cosines of geometric wavelengths from 2π to 20000π (Vaswani et al. 2017).

    Example:
        >>> sinusoids(jnp.zeros(1), 4).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """
    half = features // 2
    rate = np.exp(-np.log(10_000.0) * np.arange(half) / half).astype(np.float32)
    angle = position[..., None] * rate.reshape((1,) * position.ndim + (half,))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class EnergyTransformer(NamedTuple):
    """The energy of a chunk, whole or in two halves, the first constant along a descent.

    ``init(key, observation, action) -> params``;
    ``apply(params, observation, action [*batch, horizon * act]) -> energy [*batch]``;
    ``project(params, observation) -> memory [*batch, num_frames, features]``;
    ``energy(params, memory, action) -> energy [*batch]``.
    """

    init: Callable[..., Params]
    apply: Callable[[Params, jax.Array, jax.Array], Float[Array, "*batch"]]
    project: Callable[[Params, jax.Array], jax.Array]
    energy: Callable[[Params, jax.Array, jax.Array], Float[Array, "*batch"]]


def energy_transformer(
    action_size: int,
    *,
    num_frames: int = 1,
    horizon: int = 1,
    config: TransformerConfig = TransformerConfig(),
) -> EnergyTransformer:
    """The energy of an action chunk given observation frames; low is good.

    It is the mean over the chunk and the coordinates of what the network says of each, so
    that its gradient carries a factor ``1 / (horizon * act)``.

    Args:
        action_size: of the flattened chunk, ``horizon * act``.
        num_frames: observation frames.
        horizon: actions of a chunk.
        config: sizes.

    Raises:
        ValueError: if ``horizon`` does not divide ``action_size``; while tracing, if
            ``num_frames`` does not divide the observation's size.

    Example:
        >>> network = energy_transformer(8, num_frames=2, horizon=4)
        >>> observation, action = jnp.zeros((5, 6)), jnp.zeros((5, 8))
        >>> params = jax.eval_shape(network.init, jax.random.key(0), observation, action)
        >>> jax.eval_shape(network.apply, params, observation, action).shape
        (5,)
    """
    module = _backbone(config, action_size, num_frames, horizon, timed=False)

    def init(key: jax.Array, observation: jax.Array, action: jax.Array) -> Params:
        _check_observation(observation, num_frames)
        return module.init(key, observation, action)

    def apply(
        params: Params, observation: jax.Array, action: jax.Array
    ) -> Float[Array, "*batch"]:
        _check_observation(observation, num_frames)
        return jnp.asarray(module.apply(params, observation, action))

    def project(params: Params, observation: jax.Array) -> jax.Array:
        _check_observation(observation, num_frames)
        return jnp.asarray(module.apply(params, observation, method="project"))

    def energy(
        params: Params, memory: jax.Array, action: jax.Array
    ) -> Float[Array, "*batch"]:
        return jnp.asarray(module.apply(params, memory, action, method="energy"))

    return EnergyTransformer(init, apply, project, energy)


def transformer_denoiser(
    action_size: int,
    *,
    num_frames: int = 1,
    horizon: int = 1,
    config: TransformerConfig = TransformerConfig(),
) -> Network:
    """The noise in an action chunk: the energy's network with a token for the time.

    ``apply(params, noisy_action [*batch, horizon * act], time [*batch], observation)``
    returns ``[*batch, horizon * act]``; ``init(key, noisy_action, time, observation)``.
    Times lie in [0, 1].

    Args:
        action_size: of the flattened chunk, ``horizon * act``.
        num_frames: observation frames.
        horizon: actions of a chunk.
        config: sizes.

    Raises:
        ValueError: if ``horizon`` does not divide ``action_size``; while tracing, if
            ``num_frames`` does not divide the observation's size.

    Example:
        >>> network = transformer_denoiser(8, horizon=4)
        >>> inputs = jnp.zeros((5, 8)), jnp.zeros(5), jnp.zeros((5, 6))
        >>> params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
        >>> jax.eval_shape(network.apply, params, *inputs).shape
        (5, 8)
    """
    module = _backbone(config, action_size, num_frames, horizon, timed=True)

    def init(
        key: jax.Array, noisy_action: jax.Array, time: jax.Array, observation: jax.Array
    ) -> Params:
        _check_observation(observation, num_frames)
        return module.init(key, noisy_action, time, observation, method="noise")

    def apply(
        params: Params, noisy_action: jax.Array, time: jax.Array, observation: jax.Array
    ) -> Float[Array, "*batch chunk"]:
        _check_observation(observation, num_frames)
        noise = module.apply(params, noisy_action, time, observation, method="noise")
        return jnp.asarray(noise)

    return Network(init, apply)


def _backbone(
    config: TransformerConfig,
    action_size: int,
    num_frames: int,
    horizon: int,
    *,
    timed: bool,
) -> _Backbone:
    if horizon < 1 or num_frames < 1 or action_size < 1 or action_size % horizon:
        raise ValueError(
            f"horizon={horizon} must divide action_size={action_size} (a flattened "
            f"chunk of that many actions), and num_frames={num_frames} be at least 1"
        )
    return _Backbone(config, num_frames, horizon, action_size // horizon, timed)


def _check_observation(observation: jax.Array, num_frames: int) -> None:
    if observation.shape[-1] % num_frames:
        raise ValueError(
            f"observation has size {observation.shape[-1]}; expected a flattened stack "
            f"of num_frames={num_frames} frames"
        )
