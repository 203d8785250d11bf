"""Slices through energies of actions: policies trained on data, with what they draw."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.base import Policy
from emfuse_jax.data import load_dataset
from emfuse_jax.policies.chunks import ChunkConfig, gather_chunks
from experiments import _names
from experiments._gather import RunFiles
from experiments._methods import OFFLINE
from experiments._returns import ONE_STEP

POINTS = 61
"""On each side of a slice."""
DRAWN = 64
"""Actions over each slice."""
_EDGE = 0.98
"""A squashed policy has no density at ±1."""


def action_slices(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Energies over the two leading dimensions of an action, for `_plots`.

    A panel per policy that has an energy of actions of two dimensions or more, at the
    middle row of its (last) data set. The other dimensions are those of the drawn action of
    least energy. Of several seeds the first is shown.

    Args:
        runs: any; those of other commands, and of ``--method=sac``, are left out.

    Returns:
        What `_plots.energy_landscapes` draws; empty where no policy has such an energy.

    Raises:
        FileNotFoundError: if the data of one are gone.
    """
    energies: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    ticks = np.linspace(-_EDGE, _EDGE, POINTS)
    for run in runs:
        if run.config.get("method") not in OFFLINE or not run.config.get("data"):
            continue
        trained = artifacts.load_run(run.path)
        policy, params = trained.policy, trained.params
        if policy is None or policy.energy is None or trained.spec.action_size < 2:
            continue
        if trained.description["num_seeds"] > 1:
            params = jax.tree.map(lambda leaf: leaf[0], params)
        observation = _observation(run, trained.description)
        energy, drawn = _slice(policy, params, observation, ticks)
        energies[run.name], samples[run.name] = energy.tolist(), drawn.T.tolist()
    if not energies:
        return {}
    return {
        "x": ticks.tolist(),
        "y": ticks.tolist(),
        "energies": energies,
        "samples": samples,
        "x_label": "action 0",
        "y_label": "action 1",
    }


def _observation(run: RunFiles, description: dict[str, Any]) -> jax.Array:
    """Of the middle row of the data, with the frames that the policy reads."""
    source, plan = run.config["data"][-1], ONE_STEP
    with _names.data_set(source):
        dataset = load_dataset(source)
    if "plan" in description:
        plan = artifacts.from_json(ChunkConfig, description["plan"])
    row = np.array([len(dataset.age) // 2])
    return jnp.asarray(gather_chunks(dataset, row, plan).observation[0])


def _slice(
    policy: Policy, params: Any, observation: jax.Array, ticks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Energies ``[y, x]``, and the leading dimensions ``[draw, 2]`` of drawn actions."""
    rows = jnp.broadcast_to(observation[None], (DRAWN, *observation.shape))
    drawn = jax.jit(policy.act)(params, jax.random.key(0), rows)
    energy = jax.jit(policy.energy)
    best = drawn[jnp.nanargmin(energy(params, rows, drawn))]
    y, x = (grid.ravel() for grid in np.meshgrid(ticks, ticks, indexing="ij"))
    many = jnp.broadcast_to(best[None], (x.size, *best.shape))
    many = many.at[:, 0].set(x).at[:, 1].set(y)
    rows = jnp.broadcast_to(observation[None], (x.size, *observation.shape))
    values = np.asarray(energy(params, rows, many)).reshape(ticks.size, ticks.size)
    return values, np.asarray(drawn[:, :2])
