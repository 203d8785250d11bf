"""Transition models whose energies, means and spreads are known in closed form."""

import jax
import jax.numpy as jnp

from emfuse_jax.base import History, TransitionModel
from emfuse_jax.dynamics import Encoded, Expert, SamplingConfig, transition_model

PRECISE = SamplingConfig(num_steps=200, margin=1e3, first=0.2, step_clip=1e3)
"""Descends a quadratic whose curvature is not far from 1 to float32's precision."""


def gaussian_model(
    dim, *, region="trust", sampling=PRECISE, num_lags=1
) -> TransitionModel:
    """``E(y) = ½ Σ_d ((y_d - mean_d) / std_d)²`` whatever the history.

    Its params are ``{"mean", "std", "scale"}``, each ``[dim]``; chains run in units of
    ``scale``, from ``mean`` in a trust region and from 0 in a box.
    """

    def encode(params, slices):
        def spread(leaf):
            return jnp.broadcast_to(leaf, (*slices.valid.shape, leaf.shape[-1]))

        start = params["mean"] if region == "trust" else jnp.zeros(dim)
        feature = jnp.concatenate([params["mean"], params["std"]])
        return Encoded(spread(feature), spread(start), spread(params["scale"]))

    def energy(params, condition, target):
        del params
        mean, std = jnp.split(condition, 2, axis=-1)
        return 0.5 * jnp.sum(jnp.square((target - mean) / std), axis=-1)

    expert = Expert(
        encode=encode,
        prepare=lambda params, encoded: encoded.feature,
        energy=energy,
        unit=lambda params: jnp.ones(dim - 1),
        num_lags=num_lags,
        anchor="backtrack",
        region=region,
        feature_size=2 * dim,
    )
    return transition_model(expert, sampling)


def linear_model(dynamics, control, *, num_lags) -> TransitionModel:
    """A deterministic linear system that every slice predicts by iterating it.

    ``s' = s A + a B`` and no reward. Its params ``{"error"}`` are added to the prediction
    of each slice but the newest, in every dimension.
    """
    size = dynamics.shape[0]

    def encode(params, slices):
        def iterate(anchor, lags):
            state = anchor
            for lag in reversed(range(num_lags)):
                moved = state @ dynamics + slices.action[..., lag, :] @ control
                state = jnp.where(lags[..., lag, None], moved, state)
            wrong = jnp.where(jnp.sum(lags, -1) > 1, params["error"], 0.0)
            change = state + wrong[..., None] - anchor
            return jnp.pad(change, [(0, 0)] * (change.ndim - 1) + [(0, 1)])

        start = jax.vmap(iterate)(slices.anchor, slices.lags)
        return Encoded(start, start, jnp.ones_like(start))

    expert = Expert(
        encode=encode,
        prepare=lambda params, encoded: encoded.feature,
        energy=lambda params, mean, y: 0.5 * jnp.sum(jnp.square(y - mean), -1),
        unit=lambda params: jnp.ones(size),
        num_lags=num_lags,
        anchor="backtrack",
        region="trust",
        feature_size=size + 1,
    )
    return transition_model(expert, SamplingConfig(num_steps=0))


def make_history(observation, *, num_lags=1, action_size=1) -> History:
    """A history of one state repeated, and no actions."""
    rows = observation.shape[0]
    return History(
        jnp.broadcast_to(observation, (num_lags, *observation.shape)),
        jnp.zeros((num_lags, rows, action_size)),
        jnp.ones((num_lags, rows), bool),
    )
