"""SAC reaches the optimal values of the probe environments.

All probes have one observation and one action, so one compiled program trains them side
by side, as a vmapped axis, on transitions from uniform random actions.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.envs import toy
from emfuse_jax.nets.critic import q_ensemble
from emfuse_jax.policies.sac import SacConfig, sac
from policies._probes import train_on_probes

DISCOUNT = 0.5
PROBES = (
    "constant_reward",
    "observed_reward",
    "delayed_reward",
    "endless_reward",
    "best_action",
    "matching_action",
    "two_state",
)
CONFIG = SacConfig(
    hidden_sizes=(32, 32),
    discount=DISCOUNT,
    fixed_temperature=0.0,
    target_update_rate=0.05,
    actor_learning_rate=1e-3,
    critic_learning_rate=3e-3,
)


@pytest.fixture(scope="module")
def trained():
    policy = sac(CONFIG, toy.constant_reward().spec)
    states, data = train_on_probes(policy, PROBES)
    critic = q_ensemble(CONFIG.num_critics, CONFIG.hidden_sizes)

    def value(name, observation, action):
        params = states[name].params
        row = (jnp.array([observation]), jnp.array([action]))
        return float(critic.apply(params.critic, *row).min())

    def action(name, observation):
        params = states[name].params
        row = jnp.array([observation])
        return float(policy.act(params, None, row, deterministic=True)[0])

    return value, action, data


def test_constant_reward(trained):
    np.testing.assert_allclose(trained[0]("constant_reward", 0.0, 0.3), 1.0, atol=0.02)


def test_observed_reward(trained):
    values = [trained[0]("observed_reward", s, 0.3) for s in (-1.0, 1.0)]
    np.testing.assert_allclose(values, [-1.0, 1.0], atol=0.05)


def test_delayed_reward_is_discounted_once(trained):
    values = [trained[0]("delayed_reward", s, 0.3) for s in (0.0, 1.0)]
    # Without the bootstrap the first would be 0, without the discount 1.
    np.testing.assert_allclose(values, [DISCOUNT, 1.0], atol=0.05)


def test_time_limits_are_bootstrapped_through(trained):
    value, _, data = trained
    truncated = data.truncated[PROBES.index("endless_reward")]
    assert truncated.mean() == 0.5
    # Cutting at the limit would give 1 + γ/2 · 1 + … = 4/3 for half the rows instead of
    # 2.
    np.testing.assert_allclose(value("endless_reward", 0.0, 0.3), 2.0, atol=0.05)


def test_best_action_is_found(trained):
    value, action, _ = trained
    np.testing.assert_allclose(action("best_action", 0.0), 0.5, atol=0.1)
    np.testing.assert_allclose(value("best_action", 0.0, 0.5), 1.0, atol=0.05)


def test_action_follows_the_observation(trained):
    actions = [trained[1]("matching_action", s) for s in (-1.0, 1.0)]
    np.testing.assert_allclose(actions, [-0.5, 0.5], atol=0.1)


def test_two_state_values_are_those_of_the_optimal_policy(trained):
    value, action, _ = trained
    # V(1) = 1/(1 − γ) = 2 by staying, V(−1) = −0.5 + γ V(1) = 0.5 by moving.
    assert action("two_state", 1.0) < 0.0 < action("two_state", -1.0)
    found = [value("two_state", s, a) for s in (-1.0, 1.0) for a in (-0.6, 0.6)]
    best = np.array([0.0 + DISCOUNT * 0.5, 0.5, 2.0, -0.5 + DISCOUNT * 0.5])
    np.testing.assert_allclose(found, best, atol=0.12)
