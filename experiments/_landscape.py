"""Slices through energies of next states: each expert beside the fusion."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.base import History, TransitionModel
from emfuse_jax.data import gather_history
from experiments._gather import RunFiles, expert_name
from experiments._measure import data_behind, load_domains, pooled_unit, spaced_rows

POINTS = 61
"""On each side of a slice."""
_HALF_WIDTH = 0.25
"""At least this far from the true next state, in pooled standard deviations of Δs."""


def energy_slices(fusion: RunFiles) -> dict[str, Any]:
    """Energies over the two leading dimensions of the next state, for `_plots`.

    The slice lies around the true next state of one held-out row of the last data set, in
    the middle of those that have a full history; all other dimensions, and the reward, are
    the true ones. It reaches beyond what any of the models predicts.

    Args:
        fusion: a run of fuse_dynamics whose experts and data are still there.

    Returns:
        What `_plots.energy_landscapes` draws, in pooled standard deviations of Δs.

    Raises:
        FileNotFoundError: if an expert or its data are gone.
    """
    paths = fusion.config["experts"]
    trained = {expert_name(path): artifacts.load_run(path) for path in paths}
    rule = fusion.config["fusion"]["rule"]
    trained[f"fused, {rule}"] = artifacts.load_run(fusion.path)
    domains = load_domains(fusion.config["data"] or data_behind(paths), min_length=1)
    test, unit = domains[-1].test, pooled_unit(domains)
    lags = max(t.model.expert.num_lags for t in trained.values() if t.model)
    usable = spaced_rows(test, 3, before=lags)
    row = usable[len(usable) // 2]
    history = gather_history(test, row[None], lags)
    truth = jnp.asarray(test.next_observation[row])
    reward = jnp.asarray(test.reward[row])
    models = {name: (t.model, t.params) for name, t in trained.items() if t.model}
    half = _half_width(models, history, truth, unit)
    ticks = np.linspace(-half, half, POINTS)
    energies = {
        name: _slice(model, params, history, truth, reward, unit, ticks).tolist()
        for name, (model, params) in models.items()
    }
    return {
        "x": ticks.tolist(),
        "y": ticks.tolist(),
        "energies": energies,
        "x_label": "next state 0 − truth (std of Δs)",
        "y_label": "next state 1 − truth (std of Δs)",
        "truth": [0.0, 0.0],
    }


def _half_width(
    models: dict[str, tuple[TransitionModel, Any]],
    history: History,
    truth: jax.Array,
    unit: jax.Array,
) -> float:
    reach = _HALF_WIDTH
    for model, params in models.values():
        predicted = jax.jit(model.predict)(params, jax.random.key(0), history)
        wrong = (predicted.next_observation[0] - truth)[:2] / unit[:2]
        reach = max(reach, 1.3 * float(jnp.max(jnp.abs(wrong))))
    return reach


def _slice(
    model: TransitionModel,
    params: Any,
    history: History,
    truth: jax.Array,
    reward: jax.Array,
    unit: jax.Array,
    ticks: np.ndarray,
) -> np.ndarray:
    """Energies ``[y, x]``."""
    y, x = (grid.ravel() for grid in np.meshgrid(ticks, ticks, indexing="ij"))
    count = x.size
    offset = jnp.zeros((count, truth.size)).at[:, 0].set(x).at[:, 1].set(y)
    following = truth[None] + offset * unit[None]
    many = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=1), history)
    energy = jax.jit(model.energy)(
        params, many, following, jnp.broadcast_to(reward, (count,))
    )
    return np.asarray(energy).reshape(ticks.size, ticks.size)
