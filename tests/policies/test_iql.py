"""Implicit Q-learning: expectiles by another route, and the values of probe
environments in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from emfuse_jax.envs import toy
from emfuse_jax.policies.iql import (
    IqlConfig,
    IqlCriticsConfig,
    advantage_weight,
    expectile_loss,
    iql,
    iql_critics,
)
from policies._probes import train_on_probes

pytestmark = pytest.mark.allow_rank_promotion  # distrax

DISCOUNT, EXPECTILE = 0.5, 0.8
PROBES = (
    "constant_reward",
    "observed_reward",
    "delayed_reward",
    "endless_reward",
    "best_action",
    "matching_action",
)
CONFIG = IqlConfig(
    critics=IqlCriticsConfig(
        expectile=EXPECTILE,
        discount=DISCOUNT,
        hidden_sizes=(32, 32),
        learning_rate=3e-3,
        target_update_rate=0.05,
    ),
    hidden_sizes=(32,),
    learning_rate=3e-3,
    inverse_temperature=20.0,
)


def sample_expectile(samples, level):
    """Where the weighted excesses balance, found by a root search."""

    def balance(m):
        above = np.maximum(samples - m, 0.0).sum()
        return level * above - (1.0 - level) * np.maximum(m - samples, 0.0).sum()

    return optimize.brentq(balance, samples.min(), samples.max())


def minimiser(targets, level):
    targets = jnp.asarray(targets)

    @jax.jit
    def slope(m):
        prediction = jnp.broadcast_to(m, targets.shape)
        return jax.grad(lambda p: expectile_loss(p, targets, expectile=level).mean())(
            prediction
        ).sum()

    return optimize.brentq(
        lambda m: float(slope(m)), targets.min(), targets.max(), xtol=1e-6
    )


def test_the_half_expectile_loss_is_half_the_squared_error():
    prediction, target = jnp.arange(5.0), jnp.array([3.0, -1.0, 2.0, 9.0, 0.5])
    loss = expectile_loss(prediction, target, expectile=0.5)
    np.testing.assert_allclose(loss, 0.5 * jnp.square(target - prediction))


@pytest.mark.parametrize("level", [0.1, 0.7, 0.9])
def test_the_loss_is_least_at_the_expectile_of_the_targets(level):
    samples = np.random.default_rng(0).exponential(size=300).astype(np.float32)
    expected = sample_expectile(samples.astype(np.float64), level)
    np.testing.assert_allclose(minimiser(samples, level), expected, rtol=1e-4)


def test_the_upper_expectile_of_a_standard_normal_is_positive():
    samples = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    found = minimiser(samples.astype(np.float32), 0.7)
    # The sign printed in a later paper's slides, y = V − Q, gives −0.34.
    assert abs(found - 0.336) < 2e-3


def test_weights_are_clipped_before_they_overflow():
    weight = advantage_weight(jnp.array([-1e9, 0.0, 0.1, 1e9]), inverse_temperature=3.0)
    np.testing.assert_allclose(weight, [0.0, 1.0, np.exp(0.3), 100.0], rtol=1e-5)
    cloning = advantage_weight(jnp.array([-1.0, 9.0]), inverse_temperature=0.0)
    np.testing.assert_array_equal(cloning, 1.0)
    gradient = jax.grad(
        lambda a: advantage_weight(a, inverse_temperature=3.0, max_weight=5.0).sum()
    )(jnp.array([1e9]))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IqlCriticsConfig(expectile=1.0), "expectile=1.0"),
        (lambda: IqlCriticsConfig(expectile=0.0), "expectile=0.0"),
        (lambda: IqlConfig(inverse_temperature=-0.1), "inverse_temperature=-0.1"),
        (lambda: IqlConfig(max_weight=0.0), "max_weight=0.0"),
        (
            lambda: expectile_loss(jnp.ones(1), jnp.ones(1), expectile=1.5),
            "expectile=1.5",
        ),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.fixture(scope="module")
def trained():
    """Functions of (probe, observation, action) after one program trained them all."""
    spec = toy.constant_reward().spec
    policy, critics = iql(CONFIG, spec), iql_critics(CONFIG.critics, spec)
    states, _ = train_on_probes(policy, PROBES)
    params = {name: state.params for name, state in states.items()}

    def q(name, s, a):
        return float(critics.q(params[name].critics, jnp.array([s]), jnp.array([a])))

    def value(name, s):
        return float(critics.value(params[name].critics, jnp.array([s])))

    def action(name, s):
        row = jnp.array([s])
        return float(policy.act(params[name], None, row, deterministic=True)[0])

    return q, value, action


def test_rewards_and_observations_reach_the_critics(trained):
    q, value, _ = trained
    np.testing.assert_allclose(q("constant_reward", 0.0, 0.3), 1.0, atol=0.05)
    found = [
        (q("observed_reward", s, 0.3), value("observed_reward", s)) for s in (-1.0, 1.0)
    ]
    np.testing.assert_allclose(found, [(-1.0, -1.0), (1.0, 1.0)], atol=0.06)


def test_the_value_is_discounted_once_and_bootstrapped_through_time_limits(trained):
    q, _, _ = trained
    found = [q("delayed_reward", s, 0.3) for s in (0.0, 1.0)]
    np.testing.assert_allclose(found, [DISCOUNT, 1.0], atol=0.06)
    np.testing.assert_allclose(q("endless_reward", 0.0, 0.3), 2.0, atol=0.1)


def test_the_state_value_is_the_expectile_of_its_actions_values(trained):
    actions = np.linspace(-1.0, 1.0, 20_001)
    expected = sample_expectile(1.0 - np.square(actions - 0.5), EXPECTILE)
    lower = sample_expectile(1.0 - np.square(actions - 0.5), 1.0 - EXPECTILE)
    found = trained[1]("best_action", 0.0)
    assert abs(found - expected) < 0.06 < abs(found - lower)


def test_the_policy_moves_to_the_better_actions(trained):
    _, _, action = trained
    # Cloning alone would give 0, the mean of what was recorded.
    assert 0.3 < action("best_action", 0.0) < 0.7
    assert (
        action("matching_action", -1.0) < -0.25 < 0.25 < action("matching_action", 1.0)
    )
