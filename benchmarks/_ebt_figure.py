"""Energy landscapes over observation and action, with sampled actions over them."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._figure import COLOURS, axes_grid, styled

POINTS = 81


def landscape(
    energy: Callable[..., jax.Array] | None, params: Any
) -> np.ndarray | None:
    """Energies ``[action, observation]`` on [-1, 1]², each observation's least being 0.

    The least is taken off because energies rank the actions of one observation only.
    """
    if energy is None:
        return None
    ticks = jnp.linspace(-1.0, 1.0, POINTS)
    observation, action = jnp.meshgrid(ticks, ticks)
    values = jax.jit(energy)(params, observation.reshape(-1, 1), action.reshape(-1, 1))
    values = np.asarray(values).reshape(POINTS, POINTS)
    return values - values.min(axis=0, keepdims=True)


@styled
def draw(path: str | os.PathLike[str], panels: Mapping[str, Any]) -> pathlib.Path:
    """One panel per policy.

    Args:
        path: the PNG to write.
        panels: by name: a `landscape` or None, observations and actions.
    """
    figure, grid = axes_grid(len(panels), size=(3.0, 3.0), columns=4, share=True)
    for axes, (name, (energies, observation, action)) in zip(
        grid, panels.items(), strict=True
    ):
        if energies is not None:
            shown = np.minimum(energies, np.quantile(energies, 0.9))
            axes.imshow(
                shown,
                origin="lower",
                extent=(-1, 1, -1, 1),
                cmap="Greys",
                aspect="auto",
            )
        axes.scatter(
            observation, action, s=3, color=COLOURS["vermillion"], linewidths=0
        )
        axes.set(title=name, xlabel="observation", xlim=(-1, 1), ylim=(-1, 1))
        axes.grid(False)
    grid[0].set_ylabel("action")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
