"""Model-based learning: what gradient steps are made of, and that runs resume."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import tree
from emfuse_jax.base import Policy, SpaceSpec, Transition
from emfuse_jax.data.dataset import make_dataset
from emfuse_jax.loops import fit
from emfuse_jax.policies.model_based import (
    Imagined,
    ModelBasedConfig,
    model_based,
)

SPEC = SpaceSpec(observation_size=2, action_size=1)
CONFIG = ModelBasedConfig(
    rollout_rows=4,
    horizon=3,
    retain=2,
    updates_per_rollout=5,
    batch_size=20,
    real_ratio=0.25,
)
REAL = -1.0
"""The reward of recorded rows; imagined ones have 1, refused ones NaN."""


class State(NamedTuple):
    params: dict[str, jax.Array]
    step: jax.Array


def counting_policy():
    """Reports what its batches are made of; its weight depends on all it saw."""

    def init(key):
        return State({"w": jax.random.normal(key, ())}, jnp.zeros((), jnp.int32))

    def update(key, state, batch):
        noise = 0.1 * jax.random.normal(key, ())
        seen = jnp.mean(jnp.nan_to_num(batch.reward) * batch.observation[:, 0])
        params = {"w": 0.9 * state.params["w"] + seen + noise}
        return State(params, state.step + 1), {
            "real": jnp.mean((batch.reward == REAL).astype(jnp.float32)),
            "imagined": jnp.mean((batch.reward == 1.0).astype(jnp.float32)),
            "refused": jnp.mean(jnp.isnan(batch.reward).astype(jnp.float32)),
            "rows": jnp.float32(batch.reward.size),
        }

    def act(params, key, observation, *, deterministic=False):
        del key, deterministic
        return params["w"] * observation[:, :1]

    return Policy(init, update, act, None)


def imagine(model_params, key, policy, dataset):
    """A third of the steps is refused, and says so if it is ever drawn."""
    rows = CONFIG.rollout_rows * CONFIG.horizon
    key_state, key_action = jax.random.split(key)
    observation = model_params + jax.random.normal(key_state, (rows, 2))
    valid = jnp.arange(rows) % 3 > 0
    reward = jnp.where(valid, 1.0, jnp.nan)
    done = jnp.zeros(rows, bool)
    transition = Transition(
        observation=observation,
        action=policy(key_action, observation),
        reward=reward,
        next_observation=observation + dataset.observation[:1],
        terminated=done,
        truncated=done,
    )
    return Imagined(transition, valid, jnp.where(valid, 0.5, 7.0))


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    dataset = make_dataset(
        observations=generator.standard_normal((30, 2)),
        actions=generator.uniform(-1, 1, (30, 1)),
        rewards=np.full(30, REAL),
        next_observations=generator.standard_normal((30, 2)),
        terminals=np.zeros(30, bool),
        timeouts=np.arange(30) % 10 == 9,
    )
    return jnp.float32(0.3), jax.tree.map(jnp.asarray, dataset)


class Traced:
    """A compiled ``fit`` of a learner, counting the traces of its update."""

    def __init__(self, config):
        self.count = 0
        self.learner = model_based(counting_policy(), self._imagine, config, SPEC)
        self._runs: dict[Any, Any] = {}

    def _imagine(self, *args):
        self.count += 1
        return imagine(*args)

    def init(self):
        return jax.jit(self.learner.init)(jax.random.key(0))

    def run(self, state, data, num_steps, start=0):
        """Refreshes ``start … num_steps - 1``, each a chunk of its own."""
        if (num_steps, start) not in self._runs:
            self._runs[num_steps, start] = jax.jit(
                lambda key, state, data: fit(
                    key,
                    self.learner,
                    state,
                    lambda key, data: data,
                    num_steps,
                    data=data,
                    chunk=1,
                    start=start,
                )
            )
        return self._runs[num_steps, start](jax.random.key(1), state, data)


@pytest.fixture(scope="module")
def traced():
    return Traced(CONFIG)


@pytest.fixture(scope="module")
def whole(traced, data):
    """The state and the metrics of four refreshes, and the traces that they took."""
    state, metrics = traced.run(traced.init(), data, 4)
    return state, metrics, traced.count


def test_a_batch_holds_the_chosen_share_of_real_rows(whole):
    _, metrics, _ = whole
    np.testing.assert_allclose(metrics["real"], 0.25, rtol=1e-6)
    np.testing.assert_allclose(metrics["rows"], 20.0)


def test_refused_steps_are_never_drawn_or_counted(whole):
    _, metrics, _ = whole
    np.testing.assert_array_equal(metrics["refused"], 0.0)
    np.testing.assert_allclose(metrics["imagined"], 0.75, rtol=1e-6)
    # Eight of twelve steps a refresh, until the buffer of 24 is full.
    np.testing.assert_array_equal(metrics["model_rows"], 8.0)
    np.testing.assert_array_equal(metrics["buffer_rows"], [8.0, 16.0, 24.0, 24.0])
    np.testing.assert_allclose(metrics["model_reward"], 1.0)
    np.testing.assert_allclose(metrics["model_uncertainty"], 0.5)
    np.testing.assert_array_equal(metrics["model_terminated"], 0.0)


def test_one_trace_for_all_refreshes(traced, whole, data):
    _, _, count = whole
    assert count == 1
    traced.run(whole[0], data, 4)
    assert traced.count == count


def test_a_run_in_two_parts_is_the_whole_bitwise(traced, whole, data):
    half, first = traced.run(traced.init(), data, 2)
    resumed, second = traced.run(half, data, 4, start=2)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole[0])
    assert int(resumed.policy.step) == 4 * CONFIG.updates_per_rollout
    for name, values in whole[1].items():
        np.testing.assert_array_equal(
            np.concatenate([first[name], second[name]]), values
        )


def test_rollouts_follow_the_policy_of_their_refresh(traced, data):
    state = traced.init()
    after, _ = traced.run(state, data, 1)
    stored = jax.tree.map(lambda leaf: leaf[0, :8], after.replay.experience)
    weight = state.policy.params["w"]
    np.testing.assert_allclose(
        stored.action, weight * stored.observation[:, :1], rtol=1e-5
    )
    assert float(after.policy.params["w"]) != float(weight)
    assert after.params is after.policy.params


def test_update_keeps_its_input_and_its_structure(traced, data):
    state = traced.init()
    before = jax.tree.map(np.array, state)
    after, _ = traced.run(state, data, 1)
    jax.tree.map(np.testing.assert_array_equal, before, state)
    assert tree.same_structure(after, state)


def test_without_real_rows(data):
    config = ModelBasedConfig(**{**vars(CONFIG), "real_ratio": 0.0})
    traced = Traced(config)
    _, metrics = traced.run(traced.init(), data, 1)
    np.testing.assert_array_equal(metrics["real"], 0.0)
    np.testing.assert_allclose(metrics["rows"], 20.0)


def test_configs_that_cannot_work_are_refused():
    wrongs = ("real_ratio", 1.0), ("real_ratio", -0.1), ("real_ratio", 0.999)
    for name, wrong in (*wrongs, ("horizon", 0)):
        with pytest.raises(ValueError, match=f"{name}={wrong}"):
            ModelBasedConfig(**{name: wrong})
