"""Contrastive energy prediction against exact intermediate energies; the biased variant is
seen to fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emfuse_jax import tree
from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.loops import fit
from emfuse_jax.nets.denoiser import DenoiserConfig
from emfuse_jax.policies import _vp
from emfuse_jax.policies._guidance import GuidanceConfig
from emfuse_jax.policies.diffusion import (
    DiffusionConfig,
    GuidedDiffusion,
    guided_act,
)
from emfuse_jax.policies.qgpo import (
    QgpoConfig,
    contrastive_energy_loss,
    qgpo,
    regression_energy_loss,
    split_energy_loss,
    support_value,
)

# Three actions, seen through a channel with four outcomes: everything can be summed.
PRIOR = jnp.array([0.5, 0.3, 0.2])
CHANNEL = jnp.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.1, 0.3, 0.5]])
VALUE = jnp.array([0.0, 1.0, 3.0])


def fitted(loss_fn, num_support):
    """The table of energies that minimises the loss, centred."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 400))

    def step(carry, key):
        table, state = carry
        key_action, key_seen = jax.random.split(key)
        shape = (1024 // num_support, num_support)
        action = jax.random.categorical(key_action, jnp.log(PRIOR), shape=shape)
        seen = jax.random.categorical(key_seen, jnp.log(CHANNEL)[action])
        gradient = jax.grad(lambda t: loss_fn(t[seen], VALUE[action]).mean())(table)
        change, state = optimizer.update(gradient, state)
        return (optax.apply_updates(table, change), state), None

    start = jnp.zeros(4)
    keys = jax.random.split(jax.random.key(0), 400)
    table = jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0]
    return table - table.mean()


def exact(power):
    """``-log E[exp(βQ)|x]``, or ``-E[βQ|x]`` for the biased one, centred."""
    joint = np.asarray(PRIOR)[:, None] * np.asarray(CHANNEL)
    posterior = joint / joint.sum(0)
    value = np.asarray(VALUE)[:, None]
    if power == "exp":
        energy = -np.log((posterior * np.exp(value)).sum(0))
    else:
        energy = -(posterior * value).sum(0)
    return energy - energy.mean()


@pytest.fixture(scope="module")
def tables():
    @jax.jit
    def fit_all():
        return {
            "split": fitted(split_energy_loss, 4),
            "few": fitted(contrastive_energy_loss, 4),
            "many": fitted(contrastive_energy_loss, 32),
            "regression": fitted(regression_energy_loss, 4),
        }

    return {name: np.asarray(table) for name, table in fit_all().items()}


def test_contrastive_energies_are_exact_with_many_actions_or_split_with_few(tables):
    truth = exact("exp")
    assert np.abs(tables["split"] - truth).max() < 0.08
    assert np.abs(tables["many"] - truth).max() < 0.1
    assert np.abs(tables["few"] - truth).max() > 0.12  # it stands in its normaliser


def test_regression_learns_the_mean_value_and_not_the_energy(tables):
    assert np.abs(tables["regression"] - exact("mean")).max() < 0.05
    assert np.abs(tables["regression"] - exact("exp")).max() > 0.12


@pytest.mark.parametrize("loss_fn", [contrastive_energy_loss, split_energy_loss])
def test_a_constant_of_the_row_changes_neither_loss_nor_gradient(loss_fn):
    energy = jnp.array([[0.3, -1.0, 0.5, 0.1]])
    value = jnp.array([[1.0, 0.2, -0.4, 2.0]])
    loss = loss_fn(energy, value)
    np.testing.assert_allclose(loss_fn(energy + 7.0, value - 3.0), loss, rtol=1e-5)
    # Lower where low energy goes with high value.
    assert loss_fn(-value, value)[0] < loss_fn(value, value)[0]


def test_the_support_value_lies_between_mean_and_maximum():
    value = jnp.array([1.0, 2.0, 6.0])
    for beta, expected in ((0.0, 3.0), (1e3, 6.0)):
        found = support_value(value, inverse_temperature=beta)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


CENTERS = (
    np.array(
        [[1, 0], [-1, 0], [0, 1], [0, -1]]
        + [[i / np.sqrt(2), j / np.sqrt(2)] for i in (1, -1) for j in (1, -1)]
    )
    * 4
    / 1.414
)


def test_exact_guidance_gives_the_eight_modes_their_weights_and_the_biased_one_does_not():
    """Rewards k/7 and β = 3: mode k has weight exp(3k/7); all parts in closed form."""
    reward = jnp.arange(8) / 7
    spread = 0.5 / 1.414

    def distances(x, time):
        alpha, sigma = _vp.alpha_sigma(time)
        total = (alpha * spread) ** 2 + sigma**2
        gap = x[:, None] - alpha[:, None, None] * jnp.asarray(CENTERS)[None]
        return gap, total, -0.5 * jnp.sum(gap**2, -1) / total[:, None]

    def noise(params, observation, x, time):
        gap, total, log_weight = distances(x, time)
        responsible = jax.nn.softmax(log_weight, -1)
        sigma = _vp.alpha_sigma(time)[1]
        return (sigma / total)[:, None] * jnp.sum(responsible[..., None] * gap, axis=1)

    def tilted(params, observation, x, time):
        log_weight = jax.nn.log_softmax(distances(x, time)[2], -1)
        return -jax.nn.logsumexp(log_weight + 3 * reward[None], axis=-1)

    def mean_value(params, observation, x, time):
        return -jnp.sum(
            jax.nn.softmax(distances(x, time)[2], -1) * 3 * reward[None], -1
        )

    def total_variation(guidance):
        model = GuidedDiffusion(noise, guidance)
        act = jax.jit(guided_act(model, 2, num_steps=25, bound=None))
        action = np.asarray(act((), jax.random.key(0), jnp.zeros((8000, 1))))
        nearest = ((action[:, None] - CENTERS) ** 2).sum(-1).argmin(-1)
        share = np.bincount(nearest, minlength=8) / len(action)
        return 0.5 * np.abs(share - np.asarray(jax.nn.softmax(3 * reward))).sum()

    assert total_variation(tilted) < 0.03
    assert total_variation(mean_value) > 0.045


SPEC = SpaceSpec(2, 1)
SMALL = QgpoConfig(
    behaviour=DiffusionConfig(
        network=DenoiserConfig(kind="mlp", hidden_sizes=(32, 32), time_features=8),
        learning_rate=3e-3,
        num_steps=8,
    ),
    guidance=GuidanceConfig(hidden_sizes=(32,), learning_rate=3e-3),
    inverse_temperature=2.0,
    num_support=4,
    support_rows=4,
    support_steps=5,
    capacity=256,
    batch_size=32,
    hidden_sizes=(32,),
    learning_rate=3e-3,
    target_update_rate=0.05,
    loss="split",
)


def batch_of(key, rows=64):
    """One step that pays the action; nothing follows, whatever is bootstrapped."""
    action = jnp.clip(0.35 * jax.random.normal(key, (rows, 1)), -1, 1)
    observation, true = jnp.zeros((rows, 2)), jnp.ones(rows, bool)
    return Transition(observation, action, action[:, 0], observation, true, ~true)


@pytest.mark.allow_key_reuse
def test_it_learns_the_value_of_a_bandit_and_moves_towards_it():
    policy = qgpo(SMALL, SPEC)

    @jax.jit
    def train(key):
        state = policy.init(key)
        return fit(key, policy, state, lambda k, _: batch_of(k), 500, chunk=500)

    state, metrics = train(jax.random.key(0))
    act = jax.jit(policy.act)
    action = act(state.params, jax.random.key(1), jnp.zeros((1000, 2)))
    # β is in units of the values' spread: the exact shift is 2 standard deviations.
    assert 0.3 < float(action.mean()) < 0.9
    assert float(metrics["critic_loss"][0]) < 0.1


def test_support_is_drawn_anew_and_a_known_value_reads_raw_observations():
    config = dataclasses.replace(SMALL, capacity=4, support_rows=4)
    policy = qgpo(config, SPEC, value_fn=lambda observation, _: observation[..., 0])
    shift = Normalizer(jnp.full(2, 5.0), jnp.ones(2))
    state = policy.init(jax.random.key(0), normalizer=shift)
    update, seen = jax.jit(policy.update), []
    batch = batch_of(jax.random.key(1), 8)
    batch = batch._replace(observation=batch.observation + 5.0)
    for number in range(2):
        state, metrics = update(jax.random.key(2 + number), state, batch)
        seen.append(np.asarray(state.ring.experience.support))
    np.testing.assert_allclose(metrics["value_mean"], 5.0, rtol=1e-6)
    # The ring was full: nothing is left of what the behaviour would have done before
    # (some of what an untrained one does lies at the bound).
    assert np.mean(seen[1] != seen[0]) > 0.5


@pytest.mark.parametrize("loss", ["contrastive", "regression"])
def test_an_update_keeps_the_state_as_it_is(loss):
    config = QgpoConfig(
        behaviour=SMALL.behaviour,
        guidance=SMALL.guidance,
        loss=loss,
        capacity=16,
        batch_size=1,
        support_rows=1,
        num_support=4,
    )
    policy, key = qgpo(config, SPEC), jax.random.key(0)
    state = jax.eval_shape(policy.init, key)
    batch = jax.eval_shape(lambda k: batch_of(k, 1), key)
    new, metrics = jax.eval_shape(policy.update, key, state, batch)
    assert tree.same_structure(state, new)
    assert all(value.shape == () for value in metrics.values())


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": "mse"}, "loss='mse'; expected one of"),
        ({"inverse_temperature": -3.0}, "inverse_temperature=-3.0; expected 0"),
        ({"target_inverse_temperature": -3.0}, "target_inverse_temperature=-3.0"),
        ({"num_support": 1}, "num_support=1; expected at least 4"),
        ({"support_steps": 0}, "support_steps=0; expected at least 1"),
        ({"capacity": 4}, "capacity=4 holds fewer"),
        ({"discount": 1.5}, "discount=1.5"),
        ({"target_update_rate": 0.0}, "target_update_rate=0.0"),
        ({"reward_scale": 0.0}, "reward_scale=0.0"),
    ],
)
def test_bad_settings_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        QgpoConfig(**options)


def test_a_batch_smaller_than_the_support_is_refused():
    policy, key = qgpo(SMALL, SPEC), jax.random.key(0)
    state = jax.eval_shape(policy.init, key)
    batch = jax.eval_shape(lambda k: batch_of(k, 2), key)
    with pytest.raises(ValueError, match="batch of 2 rows, support_rows=4"):
        jax.eval_shape(policy.update, key, state, batch)
