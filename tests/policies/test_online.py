"""Environment steps, replay and SAC updates as one compiled program."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import tree
from emfuse_jax.base import Environment, Learner
from emfuse_jax.data.buffer import num_stored, ring_buffer
from emfuse_jax.envs import toy
from emfuse_jax.loops import scan_steps
from emfuse_jax.policies.online import OnlineConfig, online
from emfuse_jax.policies.sac import SacConfig, sac

CONFIG = OnlineConfig(
    num_envs=4, updates_per_step=2, warmup_steps=16, max_episode_steps=5
)


LENGTH = 10


class Trainer(NamedTuple):
    """A learner on `matching_action`, compiled, and how often its step was traced."""

    learner: Learner
    init: Any
    run: Any
    traces: list


@pytest.fixture(scope="module")
def trainer():
    env, traces = toy.matching_action(), []

    def step(key, state, action):
        traces.append(None)
        return env.step(key, state, action)

    config = SacConfig(
        hidden_sizes=(32, 32),
        fixed_temperature=0.01,
        actor_learning_rate=3e-3,
        critic_learning_rate=3e-3,
    )
    counting = Environment(env.reset, step, env.observe, env.spec)
    learner = online(counting, sac(config, env.spec), ring_buffer(256, 32), CONFIG)

    def run(key, state, start, num_steps=LENGTH):
        def update(step_key, carry):
            return learner.update(step_key, carry, None)

        return scan_steps(key, update, state, num_steps, start=start)

    return Trainer(
        learner,
        jax.jit(learner.init),
        jax.jit(run, static_argnames="num_steps"),
        traces,
    )


def test_one_program_learns_the_action_and_is_traced_once(trainer):
    state, rewards = trainer.init(jax.random.key(0)), []
    trainer.traces.clear()
    for start in range(0, 400, LENGTH):
        state, metrics = trainer.run(jax.random.key(1), state, start)
        rewards.append(float(metrics["reward"].mean()))
    assert len(trainer.traces) <= 1  # 0 if another test compiled it
    assert state.num_steps == 1600
    assert num_stored(state.replay) == 256
    # The best is 1; a random action earns 1 − 1/3 − 1/4 on average.
    assert np.mean(rewards[-5:]) > 0.97
    assert rewards[0] < 0.9
    np.testing.assert_array_equal(metrics["episode_length"], 1.0)
    np.testing.assert_array_equal(metrics["num_episodes"][-1], 1600)


def test_nothing_is_learned_before_the_warm_up_ends(trainer):
    state = trainer.init(jax.random.key(0))
    new, metrics = trainer.run(jax.random.key(2), state, 0)
    assert tree.same_structure(state, new)
    chex.assert_trees_all_equal(new.params, new.policy.params)
    # Four environments: the 16th transition, of the fourth step, is the warm-up's last.
    np.testing.assert_array_equal(
        metrics["critic_loss"] > 0.0, [False] * 3 + [True] * 7
    )
    assert new.policy.step == 2 * 7
    actions = new.replay.experience.action[0, :16]
    # Uniform on [−1, 1], as the standard error of 16 draws allows.
    assert jnp.abs(actions.mean()) < 4 * np.sqrt(1 / 3 / 16)
    assert jnp.abs(actions).max() > 0.5


def test_replay_holds_the_true_next_observation_of_a_truncated_step():
    env = toy.from_dynamics(
        toy.point_mass().spec._replace(observation_size=1),
        lambda key: jnp.zeros(1),
        lambda s, a: (s + 1.0, jnp.zeros(()), jnp.array(False)),
    )
    policy = sac(SacConfig(hidden_sizes=(4,)), env.spec)
    config = OnlineConfig(
        num_envs=1, updates_per_step=1, warmup_steps=99, max_episode_steps=2
    )
    learner = online(env, policy, ring_buffer(8, 4), config)
    update = jax.jit(learner.update)
    state = learner.init(jax.random.key(0))
    for step in range(4):
        state, _ = update(jax.random.key(step), state, None)
    rows = jax.tree.map(lambda leaf: leaf[0, :4], state.replay.experience)
    np.testing.assert_array_equal(rows.observation[:, 0], [0, 1, 0, 1])
    np.testing.assert_array_equal(rows.next_observation[:, 0], [1, 2, 1, 2])
    np.testing.assert_array_equal(rows.truncated, [False, True, False, True])
    assert not rows.terminated.any()


@pytest.mark.allow_key_reuse
def test_chunks_equal_the_whole_scan(trainer):
    state, key = trainer.init(jax.random.key(3)), jax.random.key(4)
    whole, _ = trainer.run(key, state, 0, num_steps=2 * LENGTH)
    half, _ = trainer.run(key, state, 0)
    chunks, _ = trainer.run(key, half, LENGTH)
    chex.assert_trees_all_equal(whole, chunks)
    assert not np.array_equal(
        whole.replay.experience.action, half.replay.experience.action
    )


def test_vmapped_seeds_equal_a_loop(trainer):
    keys = jax.random.split(jax.random.key(5), 2)
    states = [trainer.init(key) for key in jax.random.split(jax.random.key(6), 2)]
    looped = tree.stack(
        [trainer.run(k, s, 0)[0] for k, s in zip(keys, states, strict=True)]
    )
    run = jax.jit(jax.vmap(trainer.run, in_axes=(0, 0, None)))
    vmapped, _ = run(keys, tree.stack(states), 0)
    chex.assert_trees_all_close(vmapped.params, looped.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(vmapped.replay, looped.replay, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("num_envs", 0), ("updates_per_step", 0), ("warmup_steps", -1)]
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        OnlineConfig(**{field: value})
