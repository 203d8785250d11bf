"""A curve in the plane whose conditional energy is known, and what is measured on it.

``(s, a) ~ U[-1, 1]²``, ``m = 0.8 tanh(1.5 (s + a/2))``, ``u ~ N(m, 0.1²)`` in [-1, 1] and
``y = (u, ½ sin πu) + 0.02 ε n(u)`` with the unit normal ``n``. Near the curve the energy is
``(u - m)² / (2 · 0.1²) + δ² / (2 · 0.02²)`` up to one constant for all ``(s, a)``.

As a transition: the action is ``(s, a)``, the observation always 0, the next observation
and the reward are the two coordinates of ``y``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emfuse_jax.base import History, SpaceSpec, TransitionModel
from emfuse_jax.data import Dataset, make_dataset
from emfuse_jax.dynamics import (
    Batch,
    CandidateConfig,
    SamplingConfig,
    candidates,
    min_energy_model,
    transition_model,
)
from emfuse_jax.evaluation.fidelity import auroc

ALONG, NORMAL = 0.1, 0.02
SPEC = SpaceSpec(observation_size=1, action_size=2)
OFFSETS = (0.05, 0.1, 0.2, 0.4)
GRID = jnp.arange(1, 17) * 0.025


class Sizes(NamedTuple):
    """How many rows each measure takes."""

    rows: int = 2000
    profiles: int = 20
    sampled: int = 32
    chains: int = 128
    chain_steps: int = 300


def center(action: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """Where on the curve a next state is, on average."""
    return 0.8 * jnp.tanh(1.5 * (action[..., 0] + 0.5 * action[..., 1]))


def curve(u: Float[Array, "*batch"]) -> Float[Array, "*batch 2"]:
    """The point ``u``."""
    return jnp.stack([u, 0.5 * jnp.sin(jnp.pi * u)], axis=-1)


def normal(u: Float[Array, "*batch"]) -> Float[Array, "*batch 2"]:
    """The unit normal there."""
    slope = 0.5 * jnp.pi * jnp.cos(jnp.pi * u)
    vector = jnp.stack([-slope, jnp.ones_like(u)], axis=-1)
    return vector / jnp.linalg.norm(vector, axis=-1, keepdims=True)


def offset(u: jax.Array, delta: Any) -> jax.Array:
    """Beside the curve."""
    delta = jnp.broadcast_to(jnp.asarray(delta), u.shape)
    return curve(u) + delta[..., None] * normal(u)


def draw_actions(key: jax.Array, rows: int) -> jax.Array:
    """Conditions inside the support."""
    return jax.random.uniform(key, (rows, 2), minval=-1.0, maxval=1.0)


class Draw(NamedTuple):
    """Rows of the law, with where each lies on the curve."""

    action: Float[Array, "rows 2"]
    u: Float[Array, "rows"]
    target: Float[Array, "rows 2"]


def draw(key: jax.Array, rows: int) -> Draw:
    """Rows of the law. The key is consumed."""
    key_action, key_along, key_normal = jax.random.split(key, 3)
    action = draw_actions(key_action, rows)
    u = center(action) + ALONG * jax.random.normal(key_along, (rows,))
    u = jnp.clip(u, -1.0, 1.0)
    return Draw(action, u, offset(u, NORMAL * jax.random.normal(key_normal, (rows,))))


def history_of(action: Float[Array, "*batch 2"]) -> History:
    """The only history there is."""
    batch = action.shape[:-1]
    return History(jnp.zeros((1, *batch, 1)), action[None], jnp.ones((1, *batch), bool))


def batch_of(rows: Draw) -> Batch:
    """What a dynamics learner is trained on."""
    return Batch(history_of(rows.action), rows.target[:, 1], rows.target[:, :1])


def dataset_of(rows: Draw) -> Dataset:
    """The rows as episodes of one step, for `fit_scales`."""
    ends = np.ones(len(rows.u), bool)
    return make_dataset(
        observations=np.zeros((len(rows.u), 1)),
        actions=np.asarray(rows.action),
        rewards=np.asarray(rows.target[:, 1]),
        next_observations=np.asarray(rows.target[:, :1]),
        terminals=ends,
        timeouts=~ends,
    )


MeasureFn = Callable[[Any, jax.Array], dict[str, Any]]


def measures(model: TransitionModel, sizes: Sizes, pick: CandidateConfig) -> MeasureFn:
    """``(params, key) -> numbers``: every number of the acceptance list, for one seed.

    Args:
        model: any one-step energy model of these transitions.
        sizes: how many rows.
        pick: the candidates of the least energy.
    """
    parts = _shape(model, sizes), _support(model, sizes, pick), _sampled(model, sizes)

    def measure(params: Any, key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, len(parts))
        found: dict[str, Any] = {}
        for part, own in zip(parts, keys, strict=True):
            found |= {k: np.asarray(v).tolist() for k, v in part(params, own).items()}
        return found

    return measure


def _shape(model: TransitionModel, sizes: Sizes) -> MeasureFn:
    """How the energy rises off the curve and along it, and its constant."""

    @jax.jit
    def run(params: Any, key: jax.Array) -> dict[str, jax.Array]:
        key_rows, key_side, key_profile = jax.random.split(key, 3)
        rows = draw(key_rows, sizes.rows)
        side = jax.random.rademacher(key_side, (sizes.rows,), jnp.float32)

        def energy(action: jax.Array, target: jax.Array) -> jax.Array:
            following, reward = target[..., :1], target[..., 1]
            return model.energy(params, history_of(action), following, reward)

        on = energy(rows.action, rows.target)
        paired, pooled = [], []
        for size in OFFSETS:
            off = energy(rows.action, offset(rows.u, size * side))
            paired.append(jnp.mean(off > on))
            pooled.append(auroc(jnp.concatenate([on, off]), _labels(sizes.rows)))
        m = center(rows.action)
        away = jnp.where(m + 0.4 * side > 1.0, m - 0.4, m + 0.4 * side)
        away = jnp.where(away < -1.0, m + 0.4, away)
        along = energy(rows.action, curve(away))

        action = draw_actions(key_profile, sizes.profiles)
        steps = jnp.concatenate([jnp.zeros(1), GRID])
        profiles = jnp.stack(
            [
                energy(action, offset(center(action), sign * delta))
                for sign in (-1.0, 1.0)
                for delta in steps
            ]
        ).reshape(2, len(steps), -1)
        return {
            "monotone": jnp.mean(jnp.diff(profiles, axis=1) > 0),
            "monotone_least": jnp.min(
                jnp.mean(jnp.diff(profiles, axis=1) > 0, axis=(0, 1))
            ),
            "paired": jnp.stack(paired),
            "pooled": jnp.stack(pooled),
            "along": auroc(jnp.concatenate([on, along]), _labels(sizes.rows)),
            "mode_std": jnp.std(energy(rows.action, curve(m))),
        }

    return run


def _labels(rows: int) -> jax.Array:
    return jnp.arange(2 * rows) >= rows


def _support(model: TransitionModel, sizes: Sizes, pick: CandidateConfig) -> MeasureFn:
    """What the least energy says of conditions outside the data; its threshold keeps 95 %
    of other rows inside."""

    def build(sampling: SamplingConfig) -> TransitionModel:
        return transition_model(model.expert, sampling)

    least = jax.jit(min_energy_model(build, pick).uncertainty)

    def run(params: Any, key: jax.Array) -> dict[str, Any]:
        key_held, key_in, key_out = jax.random.split(key, 3)

        def of(action: jax.Array) -> np.ndarray:
            return np.asarray(least(params, history_of(action)))

        threshold = np.quantile(of(draw_actions(key_held, sizes.rows)), 0.95)
        inside = of(draw_actions(key_in, sizes.rows))
        direction = draw_actions(key_out, sizes.rows)
        radius = jnp.linalg.norm(direction, axis=-1, keepdims=True)
        # Three times a point near the middle is still inside: those are left out.
        left = np.abs(3.0 * np.asarray(direction)).max(axis=-1) > 1.0
        outside = {
            "": of(3.0 * direction / radius),
            "_tripled": of(3.0 * direction)[left],
        }
        result: dict[str, Any] = {"truncated_inside": np.mean(inside > threshold)}
        for name, values in outside.items():
            labels = np.arange(len(inside) + len(values)) >= len(inside)
            both = jnp.asarray(np.concatenate([inside, values]))
            result[f"ood_auc{name}"] = auroc(both, jnp.asarray(labels))
            result[f"truncated_outside{name}"] = np.mean(values > threshold)
        return result

    return run


def _sampled(model: TransitionModel, sizes: Sizes) -> MeasureFn:
    """Calibrated Langevin on the energy: where its draws lie and how they spread."""
    calibrated = SamplingConfig(
        num_steps=sizes.chain_steps,
        margin=8.0,
        first=0.04,
        last=0.01,
        temperature=1.0,
        drift_clip=100.0,
    )
    drawn = candidates(transition_model(model.expert, calibrated), sizes.chains)

    @jax.jit
    def run(params: Any, key: jax.Array) -> dict[str, jax.Array]:
        key_action, key_chain = jax.random.split(key)
        action = draw_actions(key_action, sizes.sampled)
        found = drawn(params, key_chain, history_of(action))
        points = jnp.concatenate(
            [found.next_observation, found.reward[..., None]], axis=-1
        )
        middle = jnp.mean(points, axis=0)
        # What the law itself averages to: a bent curve's mean lies beside it.
        node, weight = np.polynomial.hermite_e.hermegauss(21)
        m = center(action)
        u = jnp.clip(m[:, None] + ALONG * jnp.asarray(node, jnp.float32)[None], -1, 1)
        share = jnp.asarray(weight / weight.sum(), jnp.float32)
        truth = jnp.einsum("rnd,n->rd", curve(u), share)
        spread = jnp.sqrt(jnp.einsum("rn,n->r", jnp.square(u - truth[:, :1]), share))
        ratio = jnp.std(points[..., 0], axis=0) / spread
        return {
            "mean_error": jnp.mean(jnp.linalg.norm(middle - truth, axis=-1)),
            # The law's own distance: what a perfect sampler would be measured at.
            "law_to_curve": jnp.mean(jnp.linalg.norm(truth - curve(m), axis=-1)),
            "mean_to_curve": jnp.mean(jnp.linalg.norm(middle - curve(m), axis=-1)),
            "along_std": jnp.mean(jnp.std(points[..., 0], axis=0)),
            "along_std_ratio": jnp.mean(ratio),
            "sample_distance": jnp.mean(distance(points)),
        }

    return run


def distance(points: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """To the curve."""
    dense = curve(jnp.linspace(-1.2, 1.2, 1201))
    flat = points.reshape(-1, 1, 2)

    def nearest(point: jax.Array) -> jax.Array:
        return jnp.min(jnp.linalg.norm(point - dense, axis=-1))

    return jax.lax.map(nearest, flat, batch_size=1024).reshape(points.shape[:-1])


def decoded_distance(negatives: Float[Array, "rows 2"], scale: Any) -> float:
    """Mean distance to the curve of decoded negatives, given in scaled targets."""
    return float(jnp.mean(distance(scale.mean + scale.scale * negatives)))
