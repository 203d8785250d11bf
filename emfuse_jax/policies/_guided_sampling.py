"""Sampling of a diffusion policy that an energy tilts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emfuse_jax._settings import (
    require_key,
)
from emfuse_jax.base import (
    ActFn,
    Params,
)
from emfuse_jax.policies import _vp
from emfuse_jax.policies._vp import NoiseFn


class GuidedDiffusion(NamedTuple):
    """A behaviour and an energy that tilts it; both read parameters first.

    ``noise(params, observation [*batch, obs], noisy_action [*batch, act], time [*batch]) ->
    [*batch, act]``, the mean of ``ε`` given the noisy action;
    ``guidance(params, observation, noisy_action, time) -> energy [*batch]``, ``E_t``: low is
    good.
    """

    noise: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]
    guidance: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def guided_noise(
    noise_fn: NoiseFn,
    energy_fn: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    scale: float = 1.0,
    rescale: bool = False,
) -> NoiseFn:
    """``ε + w σ_t ∇E_t``: the noise of the law tilted by ``exp(-w E_t)``.

    Args:
        noise_fn: the behaviour's.
        energy_fn: ``(noisy_action, time) -> energy [*batch]``.
        scale: ``w``, 0 or more. 1 is exact; others re-temper the target exactly only where
            behaviour and energy are Gaussian and linear.
        rescale: keep the norm of the behaviour's noise. It steadies large guidance and is
            not exact: it acts like a smaller ``w``.

    Raises:
        ValueError: if the scale is negative.

    Example:
        >>> noise = guided_noise(lambda y, time: 0.0 * y, lambda y, time: 3.0 * y[..., 0])
        >>> pushed = noise(jnp.zeros((1, 1)), jnp.ones(1))  # σ is almost 1 there
        >>> f"{float(pushed[0, 0]):.1f}"
        '3.0'
    """
    check_scale(scale)

    def guided(noisy_action: jax.Array, time: jax.Array) -> jax.Array:
        noise = noise_fn(noisy_action, time)
        if scale == 0.0:
            return noise
        slope = jax.grad(lambda x: jnp.sum(energy_fn(x, time)))(noisy_action)
        sigma = _vp.alpha_sigma(time)[1][..., None]
        total = noise + scale * sigma * slope
        if rescale:
            norm = jnp.linalg.norm(total, axis=-1, keepdims=True)
            kept = jnp.linalg.norm(noise, axis=-1, keepdims=True)
            total = total * (kept / jnp.maximum(norm, 1e-12))
        return total

    return guided


def check_scale(scale: float) -> None:
    """Refuses a guidance scale below 0.

    Example:
        >>> check_scale(1.5)
        >>> check_scale(-1.0)
        Traceback (most recent call last):
            ...
        ValueError: guidance scale=-1.0; expected 0 or more. Energies are low ...
    """
    if not scale >= 0.0:
        raise ValueError(
            f"guidance scale={scale}; expected 0 or more. Energies are low where actions "
            "are good, so a negative scale would seek bad ones: flip the energy's sign"
        )


def guided_act(
    model: GuidedDiffusion,
    action_size: int,
    *,
    num_steps: int = 15,
    scale: float = 1.0,
    rescale: bool = False,
    bound: float | None = 1.0,
) -> ActFn:
    """Samples a guided diffusion as a policy's ``act``.

    ``act(params, key, observation, *, deterministic=False)``; the deterministic action
    starts the reverse process at 0, the centre of its noise, and needs no key.

    Args:
        model: behaviour and guidance.
        action_size: dimension of the action.
        num_steps: evaluations of both per action.
        scale: see `guided_noise`; 0 is the behaviour.
        rescale: see `guided_noise`.
        bound: see `_vp.dpm_solver`.

    Raises:
        ValueError: if the scale is negative or there are no steps.

    Example:
        >>> from emfuse_jax.policies.diffusion import GuidedDiffusion
        >>> model = GuidedDiffusion(  # a behaviour N(0, 1), and an energy that likes +1
        ...     noise=lambda params, observation, y, time: y * _vp.alpha_sigma(time)[1][:, None],
        ...     guidance=lambda params, observation, y, time: -y[:, 0],
        ... )
        >>> act = guided_act(model, 1, bound=None)
        >>> jax.eval_shape(act, (), jax.random.key(0), jnp.zeros((7, 11))).shape
        (7, 1)
    """
    check_scale(scale)  # here, not when acting
    if num_steps < 1:
        raise ValueError(
            f"num_steps={num_steps}; expected at least 1 step (15 is usual)"
        )

    def act(
        params: Params,
        key: jax.Array | None,
        observation: jax.Array,
        /,
        *,
        deterministic: bool = False,
    ) -> jax.Array:
        start = jnp.zeros((*observation.shape[:-1], action_size))
        if not deterministic:
            start = jax.random.normal(require_key(key), start.shape)
        noise_fn = guided_noise(
            lambda x, time: model.noise(params, observation, x, time),
            lambda x, time: model.guidance(params, observation, x, time),
            scale=scale,
            rescale=rescale,
        )
        return _vp.dpm_solver(noise_fn, start, num_steps=num_steps, bound=bound)

    return act
