"""Online learning as one `base.Learner`: steps, replay and updates together.

One ``update`` steps ``num_envs`` copies of a jittable environment once, adds what
happened to the replay buffer and makes ``updates_per_step`` gradient steps of the
policy. Under `loops.fit` that is one compiled scan: nothing leaves the device until a
chunk ends, and ``vmap`` over keys trains several seeds at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emfuse_jax.base import (
    Buffer,
    Environment,
    Learner,
    Metrics,
    Policy,
    State,
    Transition,
)
from emfuse_jax.envs.base import AutoResetState, auto_reset
from emfuse_jax.loops import scan_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Settings of `online`.

    Attributes:
        num_envs: copies of the environment stepped together.
        updates_per_step: gradient steps per step of all copies.
        warmup_steps: transitions from uniform random actions before the first gradient
            step; at least one batch is sensible.
        max_episode_steps: time limit; None leaves the environment's own.
    """

    num_envs: int = 16
    updates_per_step: int = 16
    warmup_steps: int = 1000
    max_episode_steps: int | None = 1000

    def __post_init__(self) -> None:
        for name, least in (
            ("num_envs", 1),
            ("updates_per_step", 1),
            ("warmup_steps", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)}; expected {least} or more"
                )


class OnlineState(NamedTuple):
    """``env`` is batched over ``num_envs``; ``num_steps`` counts transitions."""

    policy: State
    env: AutoResetState
    replay: State
    num_steps: jax.Array

    @property
    def params(self) -> Any:
        """The policy's parameters, as its ``act`` takes them."""
        return self.policy.params


def online(
    env: Environment, policy: Policy, buffer: Buffer, config: OnlineConfig
) -> Learner:
    """Learns from its own experience.

    ``init(key) -> OnlineState``; ``update(key, state, batch=None) -> (state,
    metrics)``, where ``batch`` is ignored: the data come from the environment. Metrics
    are the policy's (0 during the warm-up) and, over the copies, the mean ``reward``,
    ``episode_return`` and ``episode_length`` of the last finished episodes, and the sum
    of ``num_episodes``.

    Args:
        env: one environment, not batched, without auto-reset.
        policy: any off-policy learner that acts, such as `sac.sac`.
        buffer: a replay buffer of transitions.
        config: see `OnlineConfig`.

    Example:
        >>> from emfuse_jax.data import ring_buffer
        >>> from emfuse_jax.envs.toy import point_mass
        >>> from emfuse_jax.policies.sac import SacConfig, sac
        >>> env = point_mass()
        >>> learner = online(
        ...     env, sac(SacConfig(), env.spec), ring_buffer(10_000, 256), OnlineConfig()
        ... )
        >>> state = jax.eval_shape(learner.init, jax.random.key(0))
    """
    envs = auto_reset(env, max_steps=config.max_episode_steps)
    spec = env.spec

    def init(key: jax.Array) -> OnlineState:
        key_env, key_policy = jax.random.split(key)
        state, _ = jax.vmap(envs.reset)(jax.random.split(key_env, config.num_envs))
        return OnlineState(
            policy=policy.init(key_policy),
            env=state,
            # Strongly typed, or a scan would trace its body a second time.
            replay=jax.tree.map(
                lambda leaf: leaf.astype(leaf.dtype),
                buffer.init(example_transition(spec)),
            ),
            num_steps=jnp.zeros((), jnp.int32),
        )

    def collect(
        key: jax.Array, state: OnlineState
    ) -> tuple[AutoResetState, Transition]:
        key_policy, key_random, key_step = jax.random.split(key, 3)
        observation = jax.vmap(envs.observe)(state.env)
        shape = (config.num_envs, spec.action_size)
        action = jnp.where(
            state.num_steps < config.warmup_steps,
            jax.random.uniform(key_random, shape, minval=-1.0, maxval=1.0),
            policy.act(state.policy.params, key_policy, observation),
        )
        keys = jax.random.split(key_step, config.num_envs)
        return jax.vmap(envs.step)(keys, state.env, action)

    learn = _learn(policy, buffer, config.updates_per_step)

    def update(
        key: jax.Array, state: OnlineState, batch: Any = None
    ) -> tuple[OnlineState, Metrics]:
        del batch
        key_collect, key_learn = jax.random.split(key)
        env_state, transition = collect(key_collect, state)
        replay = buffer.add(state.replay, transition)
        num_steps = state.num_steps + config.num_envs

        # Under vmap the condition becomes a select over its operands, which the checker
        # for reused keys takes for a second use: pass the key as plain numbers.
        operands = jax.random.key_data(key_learn), state.policy, replay
        _, shapes = jax.eval_shape(learn, *operands)
        idle = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        learner, metrics = jax.lax.cond(
            num_steps >= max(config.warmup_steps, 1),
            learn,
            lambda _, policy_state, __: (policy_state, idle),
            *operands,
        )
        metrics = {**metrics, **_experience(transition, env_state)}
        return OnlineState(learner, env_state, replay, num_steps), metrics

    return Learner(init=init, update=update)


def _learn(policy: Policy, buffer: Buffer, num_updates: int) -> Callable[..., Any]:
    """``(key data, policy's state, replay) -> (state, mean metrics)``: the updates of a
    step."""

    def learn(
        key_data: jax.Array, learner: State, replay: State
    ) -> tuple[State, Metrics]:
        def one(step_key: jax.Array, carry: State) -> tuple[State, Metrics]:
            key_sample, key_update = jax.random.split(step_key)
            return policy.update(key_update, carry, buffer.sample(key_sample, replay))

        key = jax.random.wrap_key_data(key_data)
        learner, metrics = scan_steps(key, one, learner, num_updates)
        return learner, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

    return learn


def _experience(transition: Transition, env: AutoResetState) -> Metrics:
    """Rewards of the step and what the last finished episodes were worth."""
    statistics = env.statistics
    return {
        "reward": jnp.mean(transition.reward),
        "episode_return": jnp.mean(statistics.last_return),
        "episode_length": jnp.mean(statistics.last_length.astype(jnp.float32)),
        "num_episodes": jnp.sum(statistics.num_episodes).astype(jnp.float32),
    }


def example_transition(spec: Any) -> Transition:
    """One transition of zeros, to give a buffer its shapes.

    Example:
        >>> from emfuse_jax.base import SpaceSpec
        >>> example_transition(SpaceSpec(observation_size=11, action_size=3)).observation.shape
        (11,)
    """
    return Transition(
        observation=jnp.zeros(spec.observation_size),
        action=jnp.zeros(spec.action_size),
        reward=jnp.zeros(()),
        next_observation=jnp.zeros(spec.observation_size),
        terminated=jnp.zeros((), bool),
        truncated=jnp.zeros((), bool),
    )
