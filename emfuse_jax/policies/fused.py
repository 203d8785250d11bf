"""Fusing policies: one diffusion policy out of several, and of any other energies.

The energy of a guided diffusion policy is that of its behaviour plus its guidance, so the
log-opinion pool of policies ``Π_i π_i^λ_i`` has the noise ``Σ λ_i ε_i`` and the guidance
``Σ λ_i E_i``, pooled by `energy.pool` like logits and like energies of dynamics. A
behaviour prior, a second critic or a cost joins the sum as one more energy.

Each term is the diffused one, and the product of diffused laws is the diffused product only
where the members' laws are Gaussian of equal covariance, or where only the guidance of one
behaviour is added to: otherwise the pool is followed at low noise and approximated at high
noise, as in every composition of diffusion models.

References:
    Du et al., "Reduce, Reuse, Recycle: Compositional Generation with Energy-Based
    Diffusion Models and MCMC", ICML 2023. https://arxiv.org/abs/2302.11552
    Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", ICLR
    2023 (an energy of clean actions, read at the posterior mean).
    https://arxiv.org/abs/2209.14687
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from emfuse_jax.base import Params
from emfuse_jax.energy.pool import align_weights, check_weights, pool_energies
from emfuse_jax.numerics import multiply_no_nan
from emfuse_jax.policies._vp import predicted_action
from emfuse_jax.policies.diffusion import GuidedDiffusion

ActionEnergy = Callable[[Params, jax.Array, jax.Array], jax.Array]
"""``(params, observation, action) -> energy [*batch]``; low is good. A `Policy`'s
``energy`` is one, and so is ``-β Q``."""


class FusedParams(NamedTuple):
    """Parameters of `fuse_policies`: of each member and of each added energy, in order."""

    members: tuple[Params, ...]
    energies: tuple[Params, ...] = ()


def fuse_policies(
    members: Sequence[GuidedDiffusion],
    weights: ArrayLike | Sequence[float],
    *,
    guidance_weights: ArrayLike | Sequence[float] | None = None,
    energies: Sequence[ActionEnergy] = (),
    energy_weights: ArrayLike | Sequence[float] = (),
) -> GuidedDiffusion:
    """Pools guided diffusion policies and further energies of actions into one model.

    `diffusion.guided_act` acts with it, and it can be fused again. Its parameters are
    `FusedParams`; all members read the same observations, in raw units.

    Args:
        members: behaviours with their guidance: `aepo_model`, `qgpo_model`,
            `diffusion_model` of the members' configs.
        weights: ``λ [model]`` of the behaviours, summing to one. (1, 0) keeps the first one's.
        guidance_weights: ``[model]``, of the members' guidance, 0 or more; None is ``weights``: the
            log-opinion pool of the policies. (1, 1) asks for what both value.
        energies: of clean actions, each read at the action that the fused behaviour
            expects, ``E[a_0|a_t]``: exact for energies linear in the action.
        energy_weights: 0 or more, one for each of ``energies``.

    Raises:
        ValueError: if the numbers do not fit, ``weights`` do not sum to one, or a weight
            is negative or not finite.

    Example:
        >>> def expert(center):
        ...     def noise(params, observation, noisy_action, time):
        ...         return noisy_action - params * center
        ...     def guidance(params, observation, noisy_action, time):
        ...         return noisy_action.sum(-1)
        ...     return GuidedDiffusion(noise, guidance)
        >>> fused = fuse_policies([expert(0.0), expert(1.0)], [0.5, 0.5])
        >>> inputs = jnp.zeros((1, 3)), jnp.zeros((1, 1)), jnp.ones(1)
        >>> float(fused.noise(FusedParams((1.0, 1.0)), *inputs)[0, 0])
        -0.5
    """
    num = len(members)
    weights = check_weights(weights, num)
    if guidance_weights is None:
        guidance_weights = weights
    guides = _check_positive("guidance_weights", guidance_weights, num, "member")
    extra = _check_positive("energy_weights", energy_weights, len(energies), "energy")
    pooled_weights = jnp.concatenate([guides, extra])

    def noise(
        params: FusedParams, observation: Any, noisy_action: Any, time: Any
    ) -> jax.Array:
        _check_params(params, num, len(energies))
        terms = []
        for member, own, weight in zip(members, params.members, weights, strict=True):
            # As in `pool_energies`: an absent member's derivative is dropped at its input.
            absent = jnp.broadcast_to(weight == 0, noisy_action.shape)
            held = jax.lax.stop_gradient(noisy_action)
            seen = jnp.where(absent, held, noisy_action)
            terms.append(member.noise(own, observation, seen, time))
        stacked = jnp.stack(terms)
        aligned = align_weights(weights, stacked.shape)
        # An expert of weight 0 has no say, even where it makes a NaN.
        return jnp.sum(multiply_no_nan(aligned, stacked), axis=0)

    def guidance(
        params: FusedParams, observation: Any, noisy_action: Any, time: Any
    ) -> jax.Array:
        _check_params(params, num, len(energies))

        def of_member(member: GuidedDiffusion, own: Params) -> Callable[..., Any]:
            return lambda x: member.guidance(own, observation, x, time)

        def of_energy(energy: ActionEnergy, own: Params) -> Callable[..., Any]:
            def energy_fn(x: jax.Array) -> jax.Array:
                expected = predicted_action(
                    x, noise(params, observation, x, time), time
                )
                return energy(own, observation, expected)

            return energy_fn

        terms = [
            *map(of_member, members, params.members),
            *map(of_energy, energies, params.energies),
        ]
        return pool_energies(terms, pooled_weights)(noisy_action)

    return GuidedDiffusion(noise, guidance)


def _check_positive(name: str, weights: Any, num: int, noun: str) -> jax.Array:
    """Weights as floats; raises unless there are ``num`` finite ones of 0 or more."""
    array = jnp.asarray(weights, jnp.float32)
    if array.shape != (num,):
        raise ValueError(
            f"{name} have shape {array.shape}; expected one for each {noun}: ({num},)"
        )
    bad = not isinstance(array, Tracer) and not bool(
        jnp.all(jnp.isfinite(array) & (array >= 0.0))
    )
    if bad:
        raise ValueError(
            f"{name}={array.tolist()} hold a negative or non-finite value; expected 0 or "
            "more: low energy is good, so flip the sign of an energy that is not"
        )
    return array


def _check_params(params: FusedParams, num: int, num_energies: int) -> None:
    found = len(params.members), len(params.energies)
    if found != (num, num_energies):
        raise ValueError(
            f"parameters of {found[0]} members and {found[1]} energies; the fusion has "
            f"{num} and {num_energies}: FusedParams(members=(...), energies=(...))"
        )
