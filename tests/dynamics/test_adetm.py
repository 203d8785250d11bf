"""The any-step model on a linear-Gaussian system whose every law is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import SpaceSpec
from emfuse_jax.data.dataset import gather_history, split_episodes
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.data.synthetic import linear_gaussian
from emfuse_jax.dynamics import (
    AdetmConfig,
    Scales,
    adetm,
    contrastive_dynamics,
    fit_scales,
    make_slices,
    sample_windows,
)
from emfuse_jax.evaluation.fidelity import auroc, spearman
from emfuse_jax.loops import fit
from emfuse_jax.nets.encoder import slice_encoder

SPEC = SpaceSpec(observation_size=2, action_size=1)
LAGS, NOISE, NUM_STEPS = 3, 0.05, 1500
CONFIG = AdetmConfig(
    num_lags=LAGS,
    num_steps=NUM_STEPS,
    batch_size=64,
    learning_rate=4e-3,
    energy_rows=32,
    head_sizes=(32,),
    energy_sizes=(32,),
    state_features=32,
    action_features=8,
    num_heads=2,
)


@pytest.fixture(scope="module")
def system():
    dataset, law = linear_gaussian(
        100, 30, observation_size=2, action_size=1, noise=NOISE
    )
    train, _, test = split_episodes(dataset)
    rows = np.flatnonzero(test.age >= LAGS - 1)
    mean = law.mean(test.observation[rows], test.action[rows])
    reward = law.reward(test.observation[rows], test.action[rows])
    return train, law, gather_history(test, rows, LAGS), mean, reward


@pytest.fixture(scope="module")
def dynamics():
    return adetm(CONFIG, SPEC)


@pytest.fixture(scope="module")
def params(dynamics, system):
    @jax.jit
    def train(key, scales, data):
        key_init, key_fit = jax.random.split(key)
        state, _ = fit(
            key_fit,
            dynamics,
            dynamics.init(key_init, scales),
            lambda key, data: sample_windows(key, data, CONFIG.batch_size, LAGS),
            NUM_STEPS,
            data=data,
            chunk=NUM_STEPS,
        )
        return state.params

    dataset = system[0]
    scales = fit_scales(dataset, LAGS)
    return train(jax.random.key(0), scales, jax.tree.map(jnp.asarray, dataset))


@pytest.fixture(scope="module")
def predict(dynamics):
    return jax.jit(dynamics.model.predict)


@pytest.fixture(scope="module")
def encode(dynamics):
    return jax.jit(
        lambda params, history: dynamics.model.expert.encode(
            params, make_slices(history, "backtrack")
        )
    )


def test_predicts_the_mean(predict, params, system):
    _, _, history, mean, reward = system
    predicted = predict(params, jax.random.key(1), history)
    error = np.sqrt(np.mean((predicted.next_observation - mean) ** 2))
    assert error < 0.3 * NOISE
    assert np.sqrt(np.mean((predicted.reward - reward) ** 2)) < 0.05 * reward.std()
    # To predict no change is thirty times worse.
    assert np.sqrt(np.mean((history.observation[0] - mean) ** 2)) > 6 * NOISE


def test_every_slice_knows_its_spread(encode, params, system):
    # m steps of noise: σ_m² = noise² Σ_{j<m} 0.81^j, since A is 0.9 times a rotation.
    _, _, history, mean, _ = system
    encoded = encode(params, history)
    expected = NOISE * np.sqrt(np.cumsum(0.81 ** np.arange(LAGS)))
    spread = np.median(encoded.scale[..., :2], axis=(1, 2))
    np.testing.assert_allclose(spread, expected, rtol=0.15)
    assert (np.diff(spread) > 0.1 * NOISE).all()
    # What the longer slices miss is what they have not seen: noise of m - 1 steps.
    following = history.observation + encoded.start[..., :2]
    error = np.sqrt(np.mean((following - mean[None]) ** 2, axis=(1, 2)))
    unseen = np.sqrt(expected**2 - NOISE**2)
    np.testing.assert_allclose(error[1:], unseen[1:], rtol=0.3)


def test_the_energy_is_the_negative_log_density(dynamics, params, system):
    _, _, history, mean, reward = system
    energy = jax.jit(dynamics.model.energy)
    base = energy(params, history, jnp.asarray(mean), jnp.asarray(reward))
    for offset in (1.0, -1.0, 2.0):
        moved = jnp.asarray(mean).at[:, 0].add(offset * NOISE)
        rise = energy(params, history, moved, jnp.asarray(reward)) - base
        assert np.median(rise) == pytest.approx(0.5 * offset**2, rel=0.35)


def test_uncertainty_rises_outside_the_data(predict, params, system):
    _, law, inside, mean, _ = system
    outside = inside._replace(observation=3.0 * inside.observation)
    errors, uncertainties = [], []
    for history in (inside, outside):
        predicted = predict(params, jax.random.key(2), history)
        truth = law.mean(*(np.asarray(leaf[0]) for leaf in history[:2]))
        errors.append(np.linalg.norm(predicted.next_observation - truth, axis=1))
        uncertainties.append(predicted.uncertainty)
    assert errors[1].mean() > 2 * errors[0].mean()
    score = jnp.concatenate(uncertainties)
    is_outside = jnp.arange(score.size) >= len(mean)
    assert float(auroc(score, is_outside)) > 0.9
    assert float(spearman(score, jnp.asarray(np.concatenate(errors)))) > 0.2
    # A score that knows nothing does not pass.
    blind = jax.random.normal(jax.random.key(3), score.shape)
    assert float(auroc(blind, is_outside)) < 0.6


def test_what_a_slice_does_not_reach_cannot_change_it(dynamics, encode, params, system):
    history = system[2]
    base = encode(params, history)
    expert = dynamics.model.expert

    @jax.jit
    def energies(params, encoded):
        target = jax.tree.map(lambda leaf: leaf[0], base).start + 0.1
        condition = jax.vmap(expert.prepare, in_axes=(None, 0))(params, encoded)
        return jax.vmap(expert.energy, in_axes=(None, 0, None))(
            params, condition, target
        )

    for lag in range(1, LAGS):
        changed = history._replace(action=history.action.at[lag].add(3.0))
        moved = encode(params, changed)
        # Slices 1 … lag end before this action; the longer ones hold it.
        for before, after in zip(base, moved, strict=True):
            np.testing.assert_array_equal(before[:lag], after[:lag])
        old, new = energies(params, base), energies(params, moved)
        np.testing.assert_array_equal(old[:lag], new[:lag])
        assert (old[lag:] != new[lag:]).mean() > 0.99


def test_lags_before_the_episode_have_no_effect(predict, params, system):
    history = system[2]
    short = history._replace(valid=history.valid.at[1:].set(False))
    other = short._replace(
        observation=short.observation.at[1:].set(50.0),
        action=short.action.at[1:].set(-1.0),
    )
    first = predict(params, jax.random.key(4), short)
    jax.tree.map(
        np.testing.assert_array_equal, first, predict(params, jax.random.key(4), other)
    )
    np.testing.assert_allclose(first.uncertainty, 0.0, atol=1e-6)
    whole = predict(params, jax.random.key(4), history)
    np.testing.assert_allclose(
        whole.next_observation, first.next_observation, rtol=1e-6, atol=1e-6
    )
    assert float(whole.uncertainty.min()) > 1e-3


def one_lag_params(params):
    """The weights that the newest slice uses, as those of a model of one lag."""
    encoder = jax.tree.map(lambda leaf: leaf, params.encoder)
    weights = encoder["params"]
    weights["state_0"]["kernel"] = weights["state_0"]["kernel"][: -(LAGS - 1)]
    weights["action"]["position"] = weights["action"]["position"][:1]
    target = Normalizer(*(leaf[:1] for leaf in params.scales.target))
    scales = Scales(params.scales.observation, params.scales.action, target)
    return params._replace(scales=scales, encoder=encoder)


def test_one_lag_is_the_one_step_model_with_the_same_weights(predict, params, system):
    history = system[2]
    newest = jax.tree.map(lambda leaf: leaf[:1], history)
    expected = predict(params, jax.random.key(5), history)
    tied = one_lag_params(params)
    for anchor in ("backtrack", "current"):
        one = contrastive_dynamics(
            slice_encoder(32, 8, 2),
            CONFIG,
            SPEC,
            num_lags=1,
            anchor=anchor,
            feature_size=40,
        )
        predicted = jax.jit(one.model.predict)(tied, jax.random.key(5), newest)
        for name in ("next_observation", "reward", "energy"):
            np.testing.assert_allclose(
                getattr(predicted, name), getattr(expected, name), rtol=1e-4, atol=1e-5
            )
        np.testing.assert_array_equal(predicted.uncertainty, 0.0)


def test_configs_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="use at least 2"):
        AdetmConfig(num_lags=1)
    with pytest.raises(ValueError, match="num_heads=4 must divide action_features=6"):
        AdetmConfig(action_features=6)
    for name in ("state_features", "action_features", "num_heads"):
        with pytest.raises(ValueError, match=f"{name}=0; expected at least 1"):
            AdetmConfig(**{name: 0})
