"""States of untrained models without compiling their initialisers, which takes seconds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import Dynamics
from emfuse_jax.dynamics import Scales


def untrained(dynamics: Dynamics, scales: Scales, *, seed: int = 0) -> Any:
    """What ``dynamics.init`` returns, with kernels of variance 1 / fan-in from numpy.

    Args:
        dynamics: an energy model; its state has ``params`` with ``scales``.
        scales: its coordinates.
        seed: of the kernels.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(dynamics.init, jax.random.key(0), scales)

    def kernel(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else max(leaf.size, 1)
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    # An optimiser that has seen nothing is all zeros.
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = jax.tree.map(kernel, shapes.params)._replace(scales=scales)
    return state._replace(params=params)
