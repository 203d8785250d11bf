"""Time-conditioned networks over noisy actions: denoisers and scalar energies.

Time enters as Gaussian Fourier features, ``[sin 2π w t, cos 2π w t]`` with frequencies ``w``
that are drawn once and never trained (a constant of the architecture, not a parameter).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from emfuse_jax.base import Network
from emfuse_jax.nets.mlp import he_normal, mlp, small_uniform

_UNET_SIZES = (512, 256, 128)
_CONDITION = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Settings of `denoiser`.

    Attributes:
        kind: residual (blocks that time and observation scale and shift), mlp (a plain
            network of all inputs: half the cost per update, but blurred modes for the same
            cost in all) or unet (the published network of guided policies).
        hidden_sizes: of the blocks or layers; the unet's are fixed at 512, 256, 128 and
            back.
        time_features: number of Fourier features of the time, even.
        time_scale: standard deviation of their frequencies; 30 in published code.
    """

    kind: Literal["residual", "mlp", "unet"] = "residual"
    hidden_sizes: tuple[int, ...] = (128, 128, 128)
    time_features: int = 32
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("residual", "mlp", "unet"):
            raise ValueError(
                f"kind={self.kind!r}; expected 'residual', 'mlp' or 'unet'"
            )
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes}; expected at least one positive size"
            )
        if self.time_features < 2 or self.time_features % 2:
            raise ValueError(
                f"time_features={self.time_features}; expected an even number of at "
                "least 2: each frequency has a sine and a cosine"
            )


PAPER_DENOISER = DenoiserConfig(kind="unet", time_scale=30.0)
"""The network of Lu et al., "Contrastive Energy Prediction for Exact Energy-Guided
Diffusion Sampling in Offline Reinforcement Learning", ICML 2023."""


def fourier_features(
    time: Float[Array, "*batch"], num_features: int, scale: float
) -> Float[Array, "*batch {num_features}"]:
    """Sines and cosines of ``2π w t`` with fixed frequencies ``w ~ N(0, scale²)``.

    Example:
        >>> jnp.abs(fourier_features(jnp.zeros(3), 4, 30.0))[0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    draws = np.random.default_rng(0).standard_normal(num_features // 2)
    frequency = jnp.asarray(2.0 * np.pi * scale * draws, jnp.float32)
    phase = time[..., None] * frequency.reshape((1,) * time.ndim + (-1,))
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def denoiser(action_size: int, config: DenoiserConfig | None = None) -> Network:
    """A network that reads a noisy action, its time and an observation.

    Args:
        action_size: dimension of the action.
        config: sizes; None is `DenoiserConfig`'s defaults.

    Returns:
        A `Network`: ``init(key, noisy_action, time, observation)`` and
        ``apply(params, noisy_action [*batch, act], time [*batch], observation [*batch,
        obs]) -> [*batch, act]``.

    Example:
        >>> network = denoiser(2, DenoiserConfig(hidden_sizes=(8,)))
        >>> inputs = jnp.zeros((5, 2)), jnp.zeros(5), jnp.zeros((5, 3))  # action, time, observation
        >>> params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
        >>> jax.eval_shape(network.apply, params, *inputs).shape
        (5, 2)
    """
    config = DenoiserConfig() if config is None else config
    if config.kind == "unet":
        return _timed(_UNet(action_size), config)
    if config.kind == "residual":
        return _timed(_Residual(action_size, tuple(config.hidden_sizes)), config)
    network = mlp(
        action_size,
        config.hidden_sizes,
        activation=nn.silu,
        kernel_init=he_normal(),
        output_init=small_uniform(),
    )
    return _timed(network, config)


def time_energy(
    hidden_sizes: Sequence[int], *, time_features: int = 32, time_scale: float = 1.0
) -> Network:
    """A scalar energy of a noisy action, its time and an observation.

    Args:
        hidden_sizes: of a SiLU network; smooth, because its gradient is the guidance.
        time_features: number of Fourier features, even.
        time_scale: standard deviation of their frequencies.

    Returns:
        A `Network` with inputs as for `denoiser` and output ``[*batch]``.

    Example:
        >>> energy = time_energy((64, 64))
        >>> inputs = jnp.zeros((7, 2)), jnp.zeros(7), jnp.zeros((7, 3))  # action, time, observation
        >>> params = jax.eval_shape(energy.init, jax.random.key(0), *inputs)
        >>> jax.eval_shape(energy.apply, params, *inputs).shape
        (7,)
    """
    config = DenoiserConfig(
        hidden_sizes=tuple(hidden_sizes),
        time_features=time_features,
        time_scale=time_scale,
    )
    network = denoiser(1, config)

    def apply(params, noisy_action, time, observation) -> Float[Array, "*batch"]:
        return network.apply(params, noisy_action, time, observation)[..., 0]

    return Network(network.init, apply)


class _Residual(nn.Module):
    """Pre-activation blocks, each scaled and shifted by the condition."""

    output_size: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(
        self, noisy_action: jax.Array, features: jax.Array, observation: jax.Array
    ) -> jax.Array:
        condition = jnp.concatenate([features, observation], axis=-1)
        for index in range(2):
            condition = nn.Dense(_CONDITION, name=f"condition_{index}")(condition)
            condition = nn.silu(condition)
        inputs = jnp.concatenate([noisy_action, observation], axis=-1)
        x = nn.Dense(self.hidden_sizes[0], name="input")(inputs)
        for index, size in enumerate(self.hidden_sizes):
            modulation = nn.Dense(2 * x.shape[-1], name=f"modulation_{index}")
            scale, shift = jnp.split(modulation(condition), 2, axis=-1)
            hidden = nn.silu(x * (1.0 + scale) + shift)
            if size != x.shape[-1]:
                x = nn.Dense(size, use_bias=False, name=f"skip_{index}")(x)
            x = x + nn.Dense(size, name=f"block_{index}")(hidden)
        last = nn.Dense(self.output_size, kernel_init=small_uniform(), name="last_fc")
        return last(nn.silu(x))


class _Block(nn.Module):
    """``dense(silu(dense(x) + mlp(condition))) + dense(x)``."""

    size: int

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        shift = nn.Dense(self.size)(nn.silu(nn.Dense(self.size)(condition)))
        hidden = nn.silu(nn.Dense(self.size)(x) + shift)
        return nn.Dense(self.size)(hidden) + nn.Dense(self.size)(x)


class _UNet(nn.Module):
    """Published sizes: condition 64 to 128, blocks 512, 256, 128 and back, skips joined."""

    output_size: int

    @nn.compact
    def __call__(
        self, noisy_action: jax.Array, features: jax.Array, observation: jax.Array
    ) -> jax.Array:
        state = nn.silu(nn.Dense(32, name="observation")(observation))
        time = nn.Dense(32, name="time")(features)
        condition = jnp.concatenate([state, time], axis=-1)
        condition = nn.Dense(128)(nn.silu(nn.Dense(128)(condition)))
        x, skips = noisy_action, []
        for size in _UNET_SIZES:
            x = _Block(size)(x, condition)
            skips.append(x)
        x = _Block(_UNET_SIZES[-1])(x, condition)
        for size, skip in zip(_UNET_SIZES[-2::-1], skips[:0:-1], strict=True):
            x = _Block(size)(jnp.concatenate([skip, x], axis=-1), condition)
        x = jnp.concatenate([skips[0], x], axis=-1)
        return nn.Dense(self.output_size, name="last_fc")(x)


def _timed(module: Network | nn.Module, config: DenoiserConfig) -> Network:
    """Replaces the time by its features."""

    def featured(noisy_action, time, observation) -> tuple[jax.Array, ...]:
        features = fourier_features(time, config.time_features, config.time_scale)
        return noisy_action, features, observation

    def init(key, noisy_action, time, observation):
        return module.init(key, *featured(noisy_action, time, observation))

    def apply(params, noisy_action, time, observation) -> jax.Array:
        inputs = featured(noisy_action, time, observation)
        return jnp.asarray(module.apply(params, *inputs))

    return Network(init, apply)
