"""Action-value ensembles and Gaussian actor heads."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import Network
from emfuse_jax.nets.mlp import Activation, mlp


def ensemble(network: Network, num_members: int) -> Network:
    """Independent copies of a network on the same inputs, as one batched GEMM.

    Args:
        network: the member.
        num_members: copies; every leaf of the parameters gains this leading axis.

    Returns:
        A `Network` whose output has a leading ``model`` axis.

    Raises:
        ValueError: if ``num_members`` is below 1.

    Example:
        >>> from emfuse_jax.nets.mlp import mlp
        >>> critics = ensemble(mlp(1, (32,)), 5)
        >>> example = jnp.zeros((7, 3))
        >>> params = jax.eval_shape(critics.init, jax.random.key(0), example)
        >>> jax.eval_shape(critics.apply, params, example).shape
        (5, 7, 1)
    """
    if num_members < 1:
        raise ValueError(f"num_members={num_members}; an ensemble needs at least 1")

    def init(key: jax.Array, *inputs: jax.Array):
        keys = jax.random.split(key, num_members)
        return jax.vmap(lambda member_key: network.init(member_key, *inputs))(keys)

    def apply(params, *inputs: jax.Array):
        return jax.vmap(lambda member: network.apply(member, *inputs))(params)

    return Network(init=init, apply=apply)


def q_ensemble(
    num_critics: int,
    hidden_sizes: Sequence[int],
    *,
    activation: Activation = jax.nn.relu,
) -> Network:
    """``num_critics`` action-values ``Q_i(s, a)`` with stacked parameters.

    Returns:
        A `Network`: ``apply(params, observation, action) -> [model, *batch]``.

    Example:
        >>> critic = q_ensemble(2, (8,))
        >>> inputs = jnp.zeros((5, 3)), jnp.zeros((5, 1))  # observation, action
        >>> params = jax.eval_shape(critic.init, jax.random.key(0), *inputs)
        >>> jax.eval_shape(critic.apply, params, *inputs).shape
        (2, 5)
    """
    members = ensemble(mlp(1, hidden_sizes, activation=activation), num_critics)

    def apply(
        params,
        observation: Float[Array, "*batch obs"],
        action: Float[Array, "*batch act"],
    ) -> Float[Array, "model *batch"]:
        return members.apply(params, observation, action)[..., 0]

    return Network(init=members.init, apply=apply)


def gaussian_actor(
    action_size: int,
    hidden_sizes: Sequence[int],
    *,
    log_std_bounds: tuple[float, float] = (-5.0, 2.0),
    activation: Activation = jax.nn.relu,
) -> Network:
    """A state-dependent diagonal Gaussian: mean and clipped log standard deviation.

    Args:
        action_size: dimension of the action.
        hidden_sizes: widths of the shared trunk.
        log_std_bounds: lowest and highest log standard deviation; clipped, not
            squashed, as in the published agents (no gradient outside).
        activation: of the trunk.

    Returns:
        A `Network`: ``apply(params, observation) -> (mean, log_std)``, each
        ``[*batch, act]``.

    Raises:
        ValueError: if the bounds are not increasing.

    Example:
        >>> actor = gaussian_actor(2, (32, 32))
        >>> params = jax.eval_shape(actor.init, jax.random.key(0), jnp.zeros(11))
        >>> mean, log_std = jax.eval_shape(actor.apply, params, jnp.zeros((256, 11)))
        >>> mean.shape, log_std.shape
        ((256, 2), (256, 2))
    """
    low, high = log_std_bounds
    if not low < high:
        raise ValueError(
            f"log_std_bounds={log_std_bounds}; expected (low, high), low < high"
        )
    trunk = mlp(2 * action_size, hidden_sizes, activation=activation)

    def apply(
        params, observation: Float[Array, "*batch obs"]
    ) -> tuple[Float[Array, "*batch act"], Float[Array, "*batch act"]]:
        mean, log_std = jnp.split(trunk.apply(params, observation), 2, axis=-1)
        return mean, jnp.clip(log_std, low, high)

    return Network(init=trunk.init, apply=apply)
