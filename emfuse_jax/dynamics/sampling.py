"""How a target is found on an energy: the chain's settings and the chain."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from emfuse_jax._settings import at_least, positive
from emfuse_jax.base import EnergyFn, Sampler
from emfuse_jax.samplers import annealed_langevin, etm_langevin, etm_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a target is found on an energy, in units of the experts' scale.

    Attributes:
        num_steps: langevin steps from the start; 0 predicts the start itself.
        uncertainty_steps: steps (without noise) before the slices are compared; 0
            compares their starts.
        margin: chains keep within ``start ± margin · scale``.
        first: first step size.
        last: last step size; they fall quadratically.
        noise: noise, multiplied by the step size. 0 descends to a mode.
        temperature: calibrated noise ``√η`` times the root of this, so that small
            steps draw from ``exp(-E / temperature)``; None multiplies ``noise`` by
            ``η``, as published. 0 descends.
        spread: chains start this far from the start (standard deviation), so that
            several of them find several modes.
        drift_clip: largest gradient component: one below ``margin / Σ step sizes``
            could not reach the margin at all.
        step_clip: largest step component.
        slice_choice: which slice moves a rollout: the most accurate, or one drawn
            per row as in ADMPO.
        block_rows: chains that run together: as many as stay in the cache.
    """

    num_steps: int = 3
    uncertainty_steps: int = 0
    margin: float = 0.5
    first: float = 0.5
    last: float = 1e-3
    noise: float = 0.0
    temperature: float | None = None
    spread: float = 0.0
    drift_clip: float = 10.0
    step_clip: float = 0.5
    slice_choice: Literal["newest", "random"] = "newest"
    block_rows: int = 512

    def __post_init__(self) -> None:
        at_least(self, 0, "num_steps", "uncertainty_steps", "noise", "temperature")
        at_least(self, 0, "spread")
        at_least(self, 1, "block_rows")
        positive(self, "margin", "first", "last")
        for name in ("drift_clip", "step_clip"):  # infinite ones clip nothing
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)}; expected a positive number"
                )


ETM_SAMPLING = SamplingConfig(
    num_steps=50, uncertainty_steps=50, margin=1.1, first=0.1, last=1e-5
)
"""The deterministic chain of ETM through the box of the data, from "nothing changes"; its
gradient clip is that of training, so that it can reach every target."""


def quiet(sampling: SamplingConfig) -> SamplingConfig:
    """The same chain without anything random.

    Example:
        >>> quiet(SamplingConfig(noise=0.1, spread=1.0)).spread
        0.0
    """
    return dataclasses.replace(sampling, noise=0.0, temperature=None, spread=0.0)


def chain(energy: EnergyFn, sampling: SamplingConfig, num_steps: int) -> Sampler:
    """The configured chain in coordinates where the start is 0 and the scale 1.

    Example:
        >>> import jax
        >>> from emfuse_jax.loops import run_sampler
        >>> def energy(y):
        ...     return 5.0 * jnp.sum((y - 0.3) ** 2, axis=-1)
        >>> sampler = chain(energy, SamplingConfig(), num_steps=50)
        >>> state, _ = run_sampler(jax.random.key(0), sampler, jnp.zeros(1), 50)
        >>> round(float(state.position[0]), 3)  # from the start to the mode, within ± margin
        0.3
    """
    bounds = (-sampling.margin, sampling.margin)
    if sampling.temperature:
        rate = etm_schedule(num_steps, sampling.first, sampling.last)
        variance = sampling.temperature
        return annealed_langevin(
            energy,
            lambda step: 0.5 * rate(step),
            lambda step: jnp.sqrt(variance * rate(step)),
            drift_clip=sampling.drift_clip,
            step_clip=sampling.step_clip,
            bounds=bounds,
        )
    return etm_langevin(
        energy,
        num_steps,
        first=sampling.first,
        last=sampling.last,
        noise=sampling.noise if sampling.temperature is None else 0.0,
        drift_clip=sampling.drift_clip,
        step_clip=sampling.step_clip,
        bounds=bounds,
    )
