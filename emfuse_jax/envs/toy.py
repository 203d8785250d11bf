"""Small environments whose optimal values are known in closed form.

The first six are probes: each isolates one thing that a learner can get wrong, so a
failing probe names the bug. Without an entropy bonus (temperature 0) and with discount
γ their optimal values are:

=================== ======================================= ==========================
environment         what it isolates                        optimal value
=================== ======================================= ==========================
`constant_reward`   the critic's regression                 1
`observed_reward`   a value that depends on the observation s, with s = ±1
`delayed_reward`    the bootstrap and the discount          γ at s = 0, then 1 at s = 1
`endless_reward`    a time limit is not a termination       1 / (1 − γ)
`best_action`       the actor's gradient                    1, at action 0.5
`matching_action`   an actor that depends on s              1, at action s / 2
=================== ======================================= ==========================
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import Environment, SpaceSpec, Transition


class ToyState(NamedTuple):
    """Everything that a toy environment remembers."""

    observation: Float[Array, "*batch obs"]


DynamicsFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""``(observation, action) -> (next_observation, reward, terminated)``."""


def from_dynamics(
    spec: SpaceSpec, draw: Callable[[jax.Array], jax.Array], dynamics: DynamicsFn
) -> Environment:
    """An environment from a start law and a deterministic transition function.

    Args:
        spec: sizes of the spaces.
        draw: ``key -> observation [obs]``.
        dynamics: ``(observation, action) -> (next_observation, reward, terminated)``.

    Example:
        >>> counter = from_dynamics(  # counts up, is paid the action, ends at 2
        ...     SpaceSpec(observation_size=1, action_size=1),
        ...     lambda key: jnp.zeros(1),
        ...     lambda state, action: (state + 1, action[0], state[0] + 1 >= 2),
        ... )
        >>> state, _ = counter.reset(jax.random.key(0))
        >>> _, transition = counter.step(jax.random.key(1), state, jnp.array([0.25]))
        >>> float(transition.reward), bool(transition.terminated)
        (0.25, False)
    """

    def reset(key: jax.Array) -> tuple[ToyState, jax.Array]:
        observation = draw(key)
        return ToyState(observation), observation

    def step(
        key: jax.Array, state: ToyState, action: jax.Array
    ) -> tuple[ToyState, Transition]:
        del key  # the dynamics are deterministic
        following, reward, terminated = dynamics(state.observation, action)
        transition = Transition(
            observation=state.observation,
            action=action,
            reward=reward,
            next_observation=following,
            terminated=terminated,
            truncated=jnp.zeros_like(terminated),
        )
        return ToyState(following), transition

    return Environment(
        reset=reset, step=step, observe=lambda state: state.observation, spec=spec
    )


_ONE = SpaceSpec(observation_size=1, action_size=1)


def _zero(key: jax.Array) -> jax.Array:
    del key
    return jnp.zeros(1)


def _sign(key: jax.Array) -> jax.Array:
    return jax.random.rademacher(key, (1,), jnp.float32)


def _one_step(draw, reward: Callable[[jax.Array, jax.Array], jax.Array]) -> Environment:
    """Every episode is one step long."""
    return from_dynamics(
        _ONE, draw, lambda s, a: (s, reward(s[0], a[0]), jnp.array(True))
    )


def constant_reward() -> Environment:
    """One step, reward 1 whatever is done.

    Example:
        >>> env = constant_reward()
        >>> state, _ = env.reset(jax.random.key(0))
        >>> float(env.step(jax.random.key(1), state, jnp.array([-0.3]))[1].reward)
        1.0
    """
    return _one_step(_zero, lambda s, a: jnp.ones(()))


def observed_reward() -> Environment:
    """One step, reward s, where s is ±1.

    Example:
        >>> env = observed_reward()
        >>> state, sign = env.reset(jax.random.key(0))
        >>> bool(env.step(jax.random.key(1), state, jnp.zeros(1))[1].reward == sign[0])
        True
    """
    return _one_step(_sign, lambda s, a: s)


def best_action() -> Environment:
    """One step, reward 1 − (a − 0.5)².

    Example:
        >>> env = best_action()
        >>> state, _ = env.reset(jax.random.key(0))
        >>> float(env.step(jax.random.key(1), state, jnp.array([0.5]))[1].reward)
        1.0
    """
    return _one_step(_zero, lambda s, a: 1.0 - jnp.square(a - 0.5))


def matching_action() -> Environment:
    """One step, reward 1 − (a − s/2)², where s is ±1.

    Example:
        >>> env = matching_action()
        >>> state, sign = env.reset(jax.random.key(0))
        >>> float(env.step(jax.random.key(1), state, sign / 2)[1].reward)
        1.0
    """
    return _one_step(_sign, lambda s, a: 1.0 - jnp.square(a - 0.5 * s))


def delayed_reward() -> Environment:
    """Two steps: s = 0 pays nothing, s = 1 pays 1 and terminates.

    Example:
        >>> env = delayed_reward()
        >>> state, _ = env.reset(jax.random.key(0))
        >>> state, first = env.step(jax.random.key(1), state, jnp.zeros(1))
        >>> state, second = env.step(jax.random.key(2), state, jnp.zeros(1))
        >>> float(first.reward), float(second.reward), bool(second.terminated)
        (0.0, 1.0, True)
    """

    def dynamics(observation: jax.Array, action: jax.Array):
        last = observation[0] > 0.5
        return jnp.ones(1), jnp.where(last, 1.0, 0.0), last

    return from_dynamics(_ONE, _zero, dynamics)


def endless_reward() -> Environment:
    """Reward 1 for ever from one state; wrap it with a time limit.

    Example:
        >>> env = endless_reward()
        >>> state, _ = env.reset(jax.random.key(0))
        >>> bool(env.step(jax.random.key(1), state, jnp.zeros(1))[1].terminated)
        False
    """
    return from_dynamics(_ONE, _zero, lambda s, a: (s, jnp.ones(()), jnp.array(False)))


def two_state() -> Environment:
    """States −1 and 1 without end: a positive action moves to the other, else it stays.

    Staying in 1 pays 1, moving costs 0.5, staying in −1 pays nothing. For γ > 1/3 it is
    best to move to 1 and stay: ``V(1) = 1 / (1 − γ)``, ``V(−1) = −0.5 + γ V(1)``.

    Example:
        >>> env = two_state()
        >>> state, sign = env.reset(jax.random.key(0))
        >>> _, transition = env.step(jax.random.key(1), state, jnp.array([1.0]))
        >>> bool(transition.next_observation[0] == -sign[0]), float(transition.reward)
        (True, -0.5)
    """

    def dynamics(observation: jax.Array, action: jax.Array):
        move = action[0] > 0.0
        reward = jnp.where(move, -0.5, jnp.where(observation[0] > 0.0, 1.0, 0.0))
        return jnp.where(move, -observation, observation), reward, jnp.array(False)

    return from_dynamics(_ONE, _sign, dynamics)


def point_mass(*, time_step: float = 0.1) -> Environment:
    """A unit mass on a line: observation (position, velocity), action a force in [−1,
    1].

    Semi-implicit Euler with ``time_step`` in seconds; the reward is
    ``−(position² + 0.1 velocity² + 0.01 force²)`` before the step. Starts are uniform
    in [−1, 1]². Linear and quadratic, so the optimal controller within the force's
    bounds is the linear-quadratic regulator.

    Example:
        >>> env = point_mass(time_step=0.1)
        >>> state, before = env.reset(jax.random.key(0))
        >>> _, transition = env.step(jax.random.key(1), state, jnp.array([1.0]))
        >>> gained = transition.next_observation[1] - before[1]
        >>> f"{gained:.2f}"  # a unit force for a tenth of a second
        '0.10'
    """

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)

    def dynamics(observation: jax.Array, action: jax.Array):
        position, velocity = observation
        force = jnp.clip(action[0], -1.0, 1.0)
        cost = position**2 + 0.1 * velocity**2 + 0.01 * force**2
        velocity = velocity + time_step * force
        following = jnp.stack([position + time_step * velocity, velocity])
        return following, -cost, jnp.array(False)

    return from_dynamics(SpaceSpec(2, 1), draw, dynamics)
