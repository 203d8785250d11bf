"""Derivative-free minimisation of an energy: a population that resamples and shrinks.

Candidates are drawn anew in proportion to ``exp(-E/T)`` and spread by a noise that halves
with every step. It needs energies only, no gradients, and finds the lowest of several
basins as long as the first population has members in it: in few dimensions. From about
five on a population of any size that fits is too thin; take a Langevin chain there.

It is a search, not a sampler of ``exp(-E)``.

References:
    Florence et al., "Implicit Behavioral Cloning", CoRL 2021, algorithm 1 (appendix B.2).
    https://arxiv.org/abs/2109.00137
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from emfuse_jax.base import EnergyFn, Key, Sampler
from emfuse_jax.samplers._common import (
    Bounds,
    check_bounds,
    check_energy,
    check_positive,
    clip_to_box,
)

__all__ = ["PopulationInfo", "PopulationState", "derivative_free", "lowest_energy"]


class PopulationState(NamedTuple):
    """Candidates of every row, and how often they were resampled."""

    position: Float[Array, "*batch candidate dim"]
    step: Int[Array, ""]


class PopulationInfo(NamedTuple):
    """What a step saw before it resampled.

    ``effective_size`` is ``1 / Σ w²`` of the weights: near 1 the population has all but
    collapsed onto one candidate, and the noise alone tells its members apart.
    """

    energy: Float[Array, "*batch candidate"]
    effective_size: Float[Array, "*batch"]


def derivative_free(
    energy_fn: EnergyFn,
    *,
    noise: float = 0.33,
    shrink: float = 0.5,
    temperature: ArrayLike = 1.0,
    bounds: Bounds | None = (-1.0, 1.0),
) -> Sampler:
    """The shrinking resampler of implicit behavioural cloning.

    Step ``k``: weights ``softmax(-E/T)`` over the candidates of a row, as many draws from
    them with replacement, ``+ noise · shrink^k · N(0, I)``, clipped to the box. Start it
    from uniform candidates, and take `lowest_energy` of the last ones.

    Args:
        energy_fn: ``[*batch, candidate, dim] -> [*batch, candidate]``. NaN counts as
            infinite: such a candidate is not drawn, unless all of its row are such.
        noise: standard deviation of the first step's noise, in units of the position.
        shrink: factor of the noise from step to step, in (0, 1].
        temperature: of the weights, positive.
        bounds: the box that candidates are clipped to.

    Returns:
        A `Sampler` of `PopulationState` and `PopulationInfo`. One evaluation of the
        energy per candidate and step, and none of its gradient.

    Raises:
        ValueError: if ``noise`` is negative, ``shrink`` outside (0, 1], ``temperature`` not
            positive or the bounds are out of order; while tracing, if ``energy_fn`` does
            not return one energy per candidate.

    Example:
        >>> from emfuse_jax.loops import run_sampler
        >>> def bowl(y):
        ...     return jnp.sum(((y - 0.3) / 0.05) ** 2, axis=-1)
        >>> key_start, key = jax.random.split(jax.random.key(0))
        >>> start = jax.random.uniform(key_start, (1024, 1), minval=-1.0)
        >>> state, _ = run_sampler(key, derivative_free(bowl), start, 3)
        >>> print(f"{lowest_energy(bowl, state.position)[0][0]:.3f}")
        0.300
    """
    if not noise >= 0:
        raise ValueError(f"noise={noise}; expected a standard deviation of 0 or above")
    if not 0 < shrink <= 1:
        raise ValueError(f"shrink={shrink}; expected in (0, 1], as 0.5 to halve it")
    check_positive("temperature", temperature)
    check_bounds(bounds)

    def init(position: Float[Array, "*batch candidate dim"]) -> PopulationState:
        return PopulationState(position, jnp.zeros((), jnp.int32))

    def step(
        key: Key, state: PopulationState
    ) -> tuple[PopulationState, PopulationInfo]:
        key_choice, key_noise = jax.random.split(key)
        position = state.position
        energy = _energies(energy_fn, position)
        weight = _weights(energy, temperature)
        index = _resample(key_choice, weight)
        chosen = jnp.take_along_axis(position, index[..., None], axis=-2)
        scale = noise * jnp.power(shrink, state.step.astype(position.dtype))
        change = scale * jax.random.normal(key_noise, position.shape, position.dtype)
        info = PopulationInfo(energy, 1.0 / jnp.sum(jnp.square(weight), axis=-1))
        moved = clip_to_box(chosen + change, bounds)
        return PopulationState(moved, state.step + 1), info

    return Sampler(init, step)


def lowest_energy(
    energy_fn: EnergyFn, position: Float[Array, "*batch candidate dim"]
) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
    """The candidate of lowest energy in each row, and that energy; NaN is no energy.

    Example:
        >>> candidates = jnp.array([[3.0], [-1.0], [2.0]])
        >>> best, energy = lowest_energy(lambda y: y[..., 0] ** 2, candidates)
        >>> float(best[0]), float(energy)
        (-1.0, 1.0)
    """
    energy = _energies(energy_fn, position)
    index = jnp.argmin(energy, axis=-1, keepdims=True)
    best = jnp.take_along_axis(position, index[..., None], axis=-2)[..., 0, :]
    return best, jnp.take_along_axis(energy, index, axis=-1)[..., 0]


def _energies(energy_fn: EnergyFn, position: jax.Array) -> jax.Array:
    energy = energy_fn(position)
    check_energy(energy, position, row="candidate")
    # Both argmin and softmax would let a NaN win.
    return jnp.where(jnp.isnan(energy), jnp.inf, energy)


def _weights(energy: jax.Array, temperature: ArrayLike) -> jax.Array:
    # Finite, since infinities of one sign, alone in a row, would cancel to NaN.
    largest = float(jnp.finfo(energy.dtype).max)
    return jax.nn.softmax(jnp.clip(-energy / temperature, -largest, largest), axis=-1)


def _resample(key: Key, weight: jax.Array) -> jax.Array:
    """As many independent draws from the weights of each row as it has candidates.

    By the inverse of the cumulative sum: categorical draws by the Gumbel trick would
    take the square of the candidates in memory.
    """
    size = weight.shape[-1]
    cumulative = jnp.cumsum(weight, axis=-1).reshape(-1, size)
    # Rounding leaves the last sum next to 1; scaled, no draw falls behind it.
    uniform = jax.random.uniform(key, cumulative.shape, weight.dtype)
    uniform = uniform * cumulative[:, -1:]
    index = jax.vmap(lambda c, u: jnp.searchsorted(c, u, side="right"))(
        cumulative, uniform
    )
    return jnp.minimum(index, size - 1).reshape(weight.shape)
