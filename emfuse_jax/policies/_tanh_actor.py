"""The tanh-normal actor that soft actor-critic, implicit Q-learning and cloning share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from emfuse_jax import distributions
from emfuse_jax._settings import require_key
from emfuse_jax.base import ActFn, Params
from emfuse_jax.nets.critic import gaussian_actor


class TanhActor(NamedTuple):
    """Functions of the actor's own parameters.

    ``init(key, observation) -> params``; ``sample(params, key, observation) -> (action,
    log_prob)``, reparameterised; ``act`` as `base.Policy`'s, the deterministic action being
    ``tanh(mean)``, for which the key may be None; ``energy(params, observation, action) ->
    -log π(a|s)``.
    """

    init: Callable[..., Params]
    sample: Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    act: Callable[..., jax.Array]
    energy: Callable[[Params, jax.Array, jax.Array], jax.Array]


def tanh_actor(
    action_size: int,
    hidden_sizes: Sequence[int],
    *,
    log_std_bounds: tuple[float, float],
) -> TanhActor:
    """A `TanhActor` of `nets.critic.gaussian_actor`.

    Args:
        action_size: dimension of the action, in [-1, 1].
        hidden_sizes: of the network.
        log_std_bounds: clip of the log standard deviation.
    """
    network = gaussian_actor(action_size, hidden_sizes, log_std_bounds=log_std_bounds)

    def sample(
        params: Params, key: jax.Array, observation: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        law = network.apply(params, observation)
        return distributions.sample_and_log_prob(key, *law)

    def act(
        params: Params,
        key: jax.Array | None,
        observation: jax.Array,
        *,
        deterministic: bool = False,
    ) -> jax.Array:
        if deterministic:
            return distributions.mode(network.apply(params, observation)[0])
        return sample(params, require_key(key), observation)[0]

    def energy(params: Params, observation: jax.Array, action: jax.Array) -> jax.Array:
        mean, log_std = network.apply(params, observation)
        return -distributions.log_prob(mean, log_std, action)

    return TanhActor(network.init, sample, act, energy)


def of_actor(actor: TanhActor) -> tuple[ActFn, Callable[..., jax.Array]]:
    """``act`` and ``energy`` of a policy whose parameters have the field ``actor``."""

    def act(
        params: Params,
        key: jax.Array | None,
        observation: jax.Array,
        *,
        deterministic: bool = False,
    ) -> jax.Array:
        return actor.act(params.actor, key, observation, deterministic=deterministic)

    def energy(params: Params, observation: jax.Array, action: jax.Array) -> jax.Array:
        return actor.energy(params.actor, observation, action)

    return act, energy
