"""Conditional scalar energies whose condition is read once for a whole chain."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from emfuse_jax.base import Params


class _ConditionalEnergy(nn.Module):
    hidden_sizes: Sequence[int]
    activation: Callable[[jax.Array], jax.Array]

    def setup(self) -> None:
        self.condition_layer = nn.Dense(self.hidden_sizes[0])
        self.target_layer = nn.Dense(self.hidden_sizes[0], use_bias=False)
        self.hidden = [nn.Dense(size) for size in self.hidden_sizes[1:]]
        self.output = nn.Dense(1)

    def project(self, condition: jax.Array) -> jax.Array:
        return self.condition_layer(condition)

    def energy(self, projected: jax.Array, target: jax.Array) -> jax.Array:
        x = self.activation(projected + self.target_layer(target))
        for layer in self.hidden:
            x = self.activation(layer(x))
        return self.output(x)[..., 0]

    def __call__(self, condition: jax.Array, target: jax.Array) -> jax.Array:
        return self.energy(self.project(condition), target)


class EnergyNetwork(NamedTuple):
    """A conditional energy in two halves, the first of them constant along a chain.

    ``init(key, condition, target) -> params``;
    ``project(params, condition [*batch, cond]) -> projected [*batch, hidden]``;
    ``energy(params, projected [*batch, hidden], target [*batch, dim]) -> energy [*batch]``.
    """

    init: Callable[..., Params]
    project: Callable[[Params, jax.Array], Float[Array, "*batch hidden"]]
    energy: Callable[[Params, jax.Array, jax.Array], Float[Array, "*batch"]]


def conditional_energy(
    hidden_sizes: Sequence[int],
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> EnergyNetwork:
    """An MLP energy of ``[condition ‖ target]`` with the condition's half of layer 1 hoisted.

    Args:
        hidden_sizes: widths of the hidden layers, at least one.
        activation: elementwise; smooth ones give smooth chains.

    Raises:
        ValueError: if there is no hidden layer, or an empty one.

    Example:
        >>> network = conditional_energy((64, 64))
        >>> def score(key, x, y):
        ...     params = network.init(key, x, y)
        ...     return network.energy(params, network.project(params, x), y)
        >>> jax.eval_shape(score, jax.random.key(0), jnp.zeros((7, 3)), jnp.zeros((7, 2))).shape
        (7,)
    """
    if not hidden_sizes:
        raise ValueError("conditional_energy needs at least one hidden size, got none")
    if min(hidden_sizes) < 1:
        raise ValueError(f"layer sizes {tuple(hidden_sizes)} must all be positive")
    module = _ConditionalEnergy(tuple(hidden_sizes), activation)

    def project(params: Params, condition: jax.Array) -> jax.Array:
        return jnp.asarray(module.apply(params, condition, method="project"))

    def energy(params: Params, projected: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.asarray(module.apply(params, projected, target, method="energy"))

    return EnergyNetwork(module.init, project, energy)
