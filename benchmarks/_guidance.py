"""Toy problems of guided diffusion whose every intermediate energy is known."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import Transition
from emfuse_jax.policies import _analytic, _vp
from emfuse_jax.policies.diffusion import GuidedDiffusion
from emfuse_jax.policies.iql import IqlCritics
from experiments._figure import PathLike, axes_grid, save, styled

# N(m, s² I) and Q = c·a: the target is N(m + β s² c, s² I) = N((.8, -.45, .225), .25 I).
MEAN = jnp.array([[0.3, -0.2, 0.1]])
SLOPE = jnp.array([[1.0, -0.5, 0.25]])
STD, BETA = 0.5, 2.0
LINEAR_TARGET = MEAN + BETA * STD**2 * SLOPE

# Eight modes on a circle, mode k with reward k/7, order of directions as published.
_DIAGONAL = 2**-0.5
CENTERS = (4.0 / 1.414) * jnp.array(
    [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    + [[x * _DIAGONAL, y * _DIAGONAL] for x in (1.0, -1.0) for y in (1.0, -1.0)]
)
SPREAD = 0.5 / 1.414
REWARD = jnp.arange(8) / 7.0
EIGHT_BETA = 3.0
EIGHT_TARGET = jax.nn.softmax(EIGHT_BETA * REWARD)


class Known(NamedTuple):
    """State of critics that have nothing to learn."""

    params: tuple = ()


def known_critics(value_fn: Any) -> IqlCritics:
    """A given ``Q(action)`` in the shape of IQL's critics, with ``V = 0``."""
    return IqlCritics(
        init=lambda key: Known(),
        update=lambda key, state, batch: (state, {}),
        q=lambda params, observation, action: value_fn(action),
        value=lambda params, observation: jnp.zeros(observation.shape[:-1]),
    )


def rows_of(action: jax.Array) -> Transition:
    """Actions of a bandit with one blank observation."""
    none = jnp.zeros(action.shape[0])
    blank = none[:, None]
    return Transition(blank, action, none, blank, none > 0, none > 0)


def linear_value(action: jax.Array) -> jax.Array:
    """``c·a``."""
    return jnp.sum(action * jnp.broadcast_to(SLOPE[0], action.shape), axis=-1)


def linear_batch(key: jax.Array, rows: int) -> Transition:
    """Draws of N(m, s² I)."""
    return rows_of(MEAN + STD * jax.random.normal(key, (rows, 3)))


def eight_batch(key: jax.Array, rows: int, *, unit: float = 1.0) -> Transition:
    """Draws of the eight modes, divided by ``unit``."""
    key_mode, key_noise = jax.random.split(key)
    mode = jax.random.randint(key_mode, (rows,), 0, 8)
    noise = SPREAD * jax.random.normal(key_noise, (rows, 2))
    return rows_of((CENTERS[mode] + noise) / unit)


def nearest_mode(action: jax.Array) -> jax.Array:
    """Index of the nearest centre, ``[*batch]``."""
    centers = CENTERS.reshape((1,) * (action.ndim - 1) + CENTERS.shape)
    return jnp.argmin(jnp.sum((action[..., None, :] - centers) ** 2, -1), axis=-1)


def mode_weights(action: jax.Array) -> np.ndarray:
    """Shares of the modes among draws ``[row, 2]``."""
    found = np.asarray(nearest_mode(action))
    return np.bincount(found, minlength=8) / found.size


def gaussian_noise(x: jax.Array, time: jax.Array, mean: Any, std: float) -> jax.Array:
    """Exact ``ε`` of N(m, s² I)."""
    alpha, sigma = (scale[..., None] for scale in _vp.alpha_sigma(time))
    return sigma * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)


def linear_model() -> GuidedDiffusion:
    """The linear problem with its exact energy."""

    def noise(params, observation, x, time) -> jax.Array:
        return gaussian_noise(x, time, MEAN, STD)

    def guidance(params, observation, x, time) -> jax.Array:
        mean = _vp.predicted_action(x, gaussian_noise(x, time, MEAN, STD), time)
        variance = _analytic.linear_variance(time, STD**2)
        slope = jnp.broadcast_to(SLOPE, x.shape)
        return _analytic.first_order_energy(
            linear_value(mean),
            slope,
            jnp.zeros_like(x),
            variance,
            inverse_temperature=BETA,
        )

    return GuidedDiffusion(noise, guidance)


def quadratic_model(curvature: float, goal: float, *, exact: bool) -> GuidedDiffusion:
    """N(0, s²) in one dimension with ``Q = -½ h (a - g)²``, expanded at the mean."""

    def noise(params, observation, x, time) -> jax.Array:
        return gaussian_noise(x, time, 0.0, STD)

    def guidance(params, observation, x, time) -> jax.Array:
        mean = _vp.predicted_action(x, noise(params, observation, x, time), time)
        variance = _analytic.linear_variance(time, STD**2)
        value = -0.5 * curvature * jnp.sum((mean - goal) ** 2, axis=-1)
        slope, offset = -curvature * (mean - goal), jnp.zeros_like(mean)
        if exact:
            hessian = jnp.full((*mean.shape, 1), -curvature)
            return _analytic.second_order_energy(
                value, slope, hessian, offset, variance, inverse_temperature=BETA
            )
        return _analytic.first_order_energy(
            value, slope, offset, variance, inverse_temperature=BETA
        )

    return GuidedDiffusion(noise, guidance)


def eight_model(*, exact: bool, unit: float = 1.0) -> GuidedDiffusion:
    """The eight modes with their exact energy, or with that of the mean reward."""

    def modes(x: jax.Array, time: jax.Array) -> tuple[jax.Array, ...]:
        alpha, sigma = _vp.alpha_sigma(time)
        total = (alpha * SPREAD / unit) ** 2 + sigma**2
        gap = x[:, None] - alpha[:, None, None] * CENTERS[None] / unit
        log_share = jax.nn.log_softmax(-0.5 * jnp.sum(gap**2, -1) / total[:, None], -1)
        return gap, total, sigma, log_share

    def noise(params, observation, x, time) -> jax.Array:
        gap, total, sigma, log_share = modes(x, time)
        mean_gap = jnp.sum(jnp.exp(log_share)[..., None] * gap, axis=1)
        return (sigma / total)[:, None] * mean_gap

    def guidance(params, observation, x, time) -> jax.Array:
        log_share = modes(x, time)[-1]
        tilt = EIGHT_BETA * REWARD[None]
        if exact:
            return -jax.nn.logsumexp(log_share + tilt, axis=-1)
        return -jnp.sum(jnp.exp(log_share) * tilt, axis=-1)

    return GuidedDiffusion(noise, guidance)


@styled
def draw_fields(data: Mapping[str, Any], path: PathLike) -> Any:
    """Sampled actions over arrows of the guidance, a panel per method.

    Args:
        data: by method: ``x``, ``y`` (ticks), ``u``, ``v`` (the guidance ``-∇E_t``, ``[y,
            x]``), ``actions [row, 2]`` and a ``title``.
        path: of the PNG.
    """
    figure, panels = axes_grid(len(data), size=(3.4, 3.4), columns=4, share=True)
    for axes, field in zip(panels, data.values(), strict=True):
        actions = np.asarray(field["actions"])
        axes.plot(*actions.T, ".", color="#56B4E9", markersize=1.2, alpha=0.5)
        axes.quiver(
            field["x"], field["y"], field["u"], field["v"], color="0.25", width=0.004
        )
        axes.set(title=field["title"], xlabel="action 0", ylabel="action 1")
        axes.set_aspect("equal")
    return save(figure, path)
