"""Particle: drive a point through two goals, in as many dimensions as one likes.

The benchmark of implicit behavioural cloning, without a file to download. An episode draws
a start and two goals uniformly in the unit cube; the point has to come within `tolerance`
of the first goal, then of the second, and to be there when the time is over. Actions are
set-points of a proportional-derivative controller, so which goal is next shows in position
and velocity alone, and at the switch the right action jumps: a policy that averages over
both sides of the jump goes between the goals.

Actions live in [-1, 1] per dimension and stand for set-points ``(action + 1) / 2`` in the
unit cube. An observation is ``[position ‖ velocity ‖ first goal ‖ second goal]``.

References:
    Florence et al., "Implicit Behavioral Cloning", CoRL 2021, section 5 and its public
    code. https://arxiv.org/abs/2109.00137
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import Environment, SpaceSpec, Transition
from emfuse_jax.loops import scan_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticleConfig:
    """Settings of `particle`; the defaults are the published ones.

    Attributes:
        num_dims: dimensions of the space that the point moves in.
        num_steps: control steps per episode.
        time_step: of the integration, in seconds.
        action_repeat: integration steps per control step; 10 of 5 ms are 20 Hz.
        stiffness: of the controller, per squared second.
        damping: of the controller, per second.
        tolerance: how near is at a goal.
        must_rest: the reward needs the point at the second goal when the time is over
            (success); False pays both visits alone.
        push_step: control step before which the point is pushed; None never pushes.
        push_distance: how far a push moves it, in a uniformly random direction; may be
            traced, so that one program serves several.
    """

    num_dims: int = 2
    num_steps: int = 50
    time_step: float = 0.005
    action_repeat: int = 10
    stiffness: float = 10.0
    damping: float = 5.0
    tolerance: float = 0.05
    must_rest: bool = True
    push_step: int | None = None
    push_distance: ArrayLike = 0.3

    def __post_init__(self) -> None:
        for name in ("num_dims", "num_steps", "action_repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("time_step", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected above 0")
        if self.push_step is not None and not 0 < self.push_step < self.num_steps:
            raise ValueError(
                f"push_step={self.push_step}; expected a step inside the episode, 1 to "
                f"{self.num_steps - 1}, or None for no push"
            )


class ParticleState(NamedTuple):
    """The point, its goals, and what it has done so far."""

    position: Float[Array, "*batch dim"]
    velocity: Float[Array, "*batch dim"]
    first_goal: Float[Array, "*batch dim"]
    second_goal: Float[Array, "*batch dim"]
    visited_first: Bool[Array, "*batch"]
    visited_second: Bool[Array, "*batch"]
    step: Int[Array, "*batch"]


def particle(config: ParticleConfig) -> Environment:
    """The environment; every episode is truncated after ``num_steps`` and pays 0 or 1.

    The second goal counts only once the first has been visited. Pushes move the position
    and leave the velocity; they happen between two observations, so that a policy sees
    where it was pushed to before it acts.

    Example:
        >>> env = particle(ParticleConfig(num_dims=3))
        >>> state, observation = env.reset(jax.random.key(0))
        >>> observation.shape, env.spec.action_size
        ((12,), 3)
    """

    def reset(key: jax.Array) -> tuple[ParticleState, jax.Array]:
        points = jax.random.uniform(key, (3, config.num_dims))
        no = jnp.array(False)
        state = ParticleState(
            position=points[0],
            velocity=jnp.zeros(config.num_dims),
            first_goal=points[1],
            second_goal=points[2],
            visited_first=no,
            visited_second=no,
            step=jnp.zeros((), jnp.int32),
        )
        return state, observe(state)

    def step(
        key: jax.Array, state: ParticleState, action: jax.Array
    ) -> tuple[ParticleState, Transition]:
        position, velocity = integrate(config, state.position, state.velocity, action)
        following = _visit(config, state, position, velocity)
        last = following.step >= config.num_steps
        paid = (
            succeeded(config, following)
            if config.must_rest
            else (following.visited_second)
        )
        if config.push_step is not None:
            pushed = _push(key, position, config.push_distance)
            now = following.step == config.push_step
            following = following._replace(position=jnp.where(now, pushed, position))
        transition = Transition(
            observation=observe(state),
            action=action,
            reward=jnp.where(last & paid, 1.0, 0.0),
            next_observation=observe(following),
            terminated=jnp.zeros_like(last),
            truncated=last,
        )
        return following, transition

    def observe(state: ParticleState) -> jax.Array:
        return jnp.concatenate(
            [state.position, state.velocity, state.first_goal, state.second_goal], -1
        )

    spec = SpaceSpec(4 * config.num_dims, config.num_dims)
    return Environment(reset=reset, step=step, observe=observe, spec=spec)


def integrate(
    config: ParticleConfig,
    position: Float[Array, "*batch dim"],
    velocity: Float[Array, "*batch dim"],
    action: Float[Array, "*batch dim"],
) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch dim"]]:
    """One control step: the position moves with the old velocity, then the velocity.

    ``x ← x + v Δt``, ``v ← v + (k_p (target - x) - k_v v) Δt`` where the force is that of
    the state before both, ``action_repeat`` times.

    Example:
        >>> config = ParticleConfig(num_dims=1, action_repeat=1, time_step=0.1)
        >>> middle, rest = jnp.array([0.5]), jnp.zeros(1)
        >>> position, velocity = integrate(config, middle, rest, jnp.array([1.0]))  # towards 1
        >>> position.tolist(), velocity.tolist()  # 10 · 0.5 · 0.1; the position follows
        ([0.5], [0.5])
    """
    target = jnp.clip(0.5 * (action + 1.0), 0.0, 1.0)

    def substep(_: jax.Array, carry: tuple[jax.Array, jax.Array]):
        x, v = carry
        force = config.stiffness * (target - x) - config.damping * v
        return x + config.time_step * v, v + config.time_step * force

    return jax.lax.fori_loop(0, config.action_repeat, substep, (position, velocity))


def succeeded(config: ParticleConfig, state: ParticleState) -> Bool[Array, "*batch"]:
    """Both goals visited in order, and the point at the second one now.

    Example:
        >>> here, there = jnp.array([0.5, 0.5]), jnp.array([0.9, 0.9])
        >>> yes, zero = jnp.array(True), jnp.array(0)
        >>> state = ParticleState(here, jnp.zeros(2), there, here, yes, yes, zero)
        >>> bool(succeeded(ParticleConfig(), state)), bool(
        ...     succeeded(ParticleConfig(), state._replace(position=there))
        ... )
        (True, False)
    """
    return state.visited_second & _at(config, state.position, state.second_goal)


def _at(config: ParticleConfig, position: jax.Array, goal: jax.Array) -> jax.Array:
    return jnp.linalg.norm(position - goal, axis=-1) < config.tolerance


def _visit(
    config: ParticleConfig,
    state: ParticleState,
    position: jax.Array,
    velocity: jax.Array,
) -> ParticleState:
    first = state.visited_first | _at(config, position, state.first_goal)
    second = first & _at(config, position, state.second_goal)
    return state._replace(
        position=position,
        velocity=velocity,
        visited_first=first,
        visited_second=state.visited_second | second,
        step=state.step + 1,
    )


def _push(key: jax.Array, position: jax.Array, distance: ArrayLike) -> jax.Array:
    """Moved by ``distance``, and back into the unit cube where that leads outside."""
    direction = jax.random.normal(key, position.shape)
    direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
    return jnp.clip(position + distance * direction, 0.0, 1.0)


class ScriptedPolicy(NamedTuple):
    """A policy with a memory: ``init(observation) -> memory`` and
    ``act(memory, observation) -> (memory, action)``."""

    init: Callable[[jax.Array], jax.Array]
    act: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def particle_oracle(*, switch_distance: float = 0.01) -> ScriptedPolicy:
    """Heads for the first goal until within ``switch_distance`` of it, then the second.

    Its memory is whether it has switched, ``[*batch]``.

    Example:
        >>> oracle = particle_oracle()
        >>> seen = jnp.array([0.5, 0.0, 0.9, 0.2])  # at 0.5, resting, goals 0.9 and 0.2
        >>> _, action = oracle.act(oracle.init(seen), seen)
        >>> print(f"{action[0]:.1f}")
        0.8
    """
    if not switch_distance > 0:
        raise ValueError(f"switch_distance={switch_distance}; expected above 0")

    def init(observation: Float[Array, "*batch obs"]) -> Bool[Array, "*batch"]:
        return jnp.zeros(observation.shape[:-1], bool)

    def act(
        memory: Bool[Array, "*batch"], observation: Float[Array, "*batch obs"]
    ) -> tuple[Bool[Array, "*batch"], Float[Array, "*batch dim"]]:
        position, _, first, second = jnp.split(observation, 4, axis=-1)
        distance = jnp.linalg.norm(position - first, axis=-1)
        memory = memory | (distance < switch_distance)
        return memory, 2.0 * jnp.where(memory[..., None], second, first) - 1.0

    return ScriptedPolicy(init, act)


class Demonstrations(NamedTuple):
    """Episodes side by side; time is axis 0 of the steps."""

    transition: Transition
    succeeded: Bool[Array, "episode"]


def collect_demonstrations(
    key: jax.Array,
    config: ParticleConfig,
    num_episodes: int,
    *,
    oracle: ScriptedPolicy | None = None,
) -> Demonstrations:
    """Episodes of a scripted policy in one scan, pure: jit it.

    Args:
        key: consumed.
        config: of the environment.
        num_episodes: static.
        oracle: `particle_oracle` by default.

    Returns:
        Transitions with leaves ``[num_steps, num_episodes, …]``, and which episodes
        ended in success: clone those.

    Example:
        >>> shapes, successes = jax.eval_shape(
        ...     lambda key: collect_demonstrations(key, ParticleConfig(num_dims=4), 100),
        ...     jax.random.key(0),
        ... )
        >>> shapes.action.shape, successes.shape
        ((50, 100, 4), (100,))
    """
    env = particle(config)
    oracle = particle_oracle() if oracle is None else oracle
    key_reset, key_steps = jax.random.split(key)
    keys = jax.random.split(key_reset, num_episodes)
    states, observation = jax.vmap(env.reset)(keys)

    def step(step_key: jax.Array, carry):
        state, memory = carry
        memory, action = oracle.act(memory, jax.vmap(env.observe)(state))
        step_keys = jax.random.split(step_key, num_episodes)
        state, transition = jax.vmap(env.step)(step_keys, state, action)
        return (state, memory), transition

    initial = (states, oracle.init(observation))
    (final, _), transitions = scan_steps(key_steps, step, initial, config.num_steps)
    return Demonstrations(transitions, succeeded(config, final))
