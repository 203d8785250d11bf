"""The one-step model on a system with a jump."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import History, SpaceSpec
from emfuse_jax.data.synthetic import bump
from emfuse_jax.dynamics import (
    EnsembleConfig,
    EtmConfig,
    etm,
    fit_scales,
    gaussian_ensemble,
    sample_windows,
)
from emfuse_jax.loops import fit

SPEC = SpaceSpec(observation_size=1, action_size=1)
BATCH, SIZES, NUM_STEPS, SEEDS = 64, (64, 64, 64), 500, 6


def train(learner, dataset, target):
    """Parameters of ``[seed]`` models."""
    scales = fit_scales(dataset, 1, target=target)

    def run(key, data):
        key_init, key_fit = jax.random.split(key)
        state, _ = fit(
            key_fit,
            learner,
            learner.init(key_init, scales),
            lambda key, data: sample_windows(key, data, BATCH, 1),
            NUM_STEPS,
            data=data,
            chunk=NUM_STEPS,
        )
        return state.params

    keys = jax.random.split(jax.random.key(0), SEEDS)
    return jax.jit(jax.vmap(run, (0, None)))(keys, jax.tree.map(jnp.asarray, dataset))


def errors_by_side(model, params, law):
    """RMS errors ``[side, seed]`` within 0.1 of the jump, left and right of it."""
    side = np.linspace(0.005, 0.1, 40)
    state, action = np.meshgrid(np.append(-side, side), np.linspace(-0.8, 0.8, 9))
    state, action = (np.float32(x.reshape(-1, 1)) for x in (state, action))
    history = History(
        jnp.asarray(state)[None],
        jnp.asarray(action)[None],
        jnp.ones((1, len(state)), bool),
    )
    predict = jax.jit(jax.vmap(model.predict, (0, None, None)))
    predicted = predict(params, jax.random.key(1), history)
    error = np.asarray(predicted.next_observation) - np.asarray(law.mean(state, action))
    assert not predicted.uncertainty.any()  # one slice, or one member
    sides = (state < 0)[:, 0], (state > 0)[:, 0]
    return np.stack([np.sqrt(np.mean(error[:, x] ** 2, axis=(1, 2))) for x in sides])


@pytest.mark.full_compile
def test_errs_less_than_a_regressor_on_both_sides_of_a_jump():
    dataset, law = bump(jump=0.5, noise=0.05)
    # The same layers, updates and learning rate.
    same = {"num_steps": NUM_STEPS, "learning_rate": 2e-3, "batch_size": BATCH}
    config = EtmConfig(
        negatives="langevin",
        chain_steps=25,
        num_negatives=8,
        energy_sizes=SIZES,
        **same,
    )
    energy = etm(config, SPEC)
    ours = errors_by_side(
        energy.model, train(energy, dataset, config.target_scale), law
    )
    mlp = gaussian_ensemble(
        EnsembleConfig(num_members=1, hidden_sizes=SIZES, **same), SPEC
    )
    theirs = errors_by_side(mlp.model, train(mlp, dataset, "standard"), law)
    less = theirs - ours
    assert (less.mean(1) > 3.0 * less.std(1, ddof=1) / np.sqrt(SEEDS)).all()
    # The regressor has learned the rest: its error is the jump's, half of 1 at most.
    assert theirs.max() < 0.5


def test_reads_the_newest_lag_only():
    model = etm(EtmConfig(energy_sizes=(8,), head_sizes=(8,)), SPEC)
    dataset, _ = bump(num_episodes=4)
    state = jax.jit(model.init)(jax.random.key(0), fit_scales(dataset, 1))
    keys = jax.random.split(jax.random.key(1), 2)
    history = History(
        jax.random.normal(keys[0], (3, 5, 1)),
        jax.random.normal(keys[1], (3, 5, 1)),
        jnp.ones((3, 5), bool),
    )
    predict = jax.jit(model.model.predict)
    newest = jax.tree.map(lambda leaf: leaf[:1], history)
    jax.tree.map(
        np.testing.assert_array_equal,
        predict(state.params, jax.random.key(2), history),
        predict(state.params, jax.random.key(2), newest),
    )
    for name in ("observation", "action"):  # and both of it
        other = newest._replace(**{name: getattr(newest, name) + 1.0})
        following = [
            predict(state.params, jax.random.key(2), each).next_observation
            - each.observation[0]
            for each in (newest, other)
        ]
        assert (np.abs(following[1] - following[0]) > 1e-4).all()


@pytest.mark.parametrize(
    ("negatives", "scale"), [("proposal", "standard"), ("langevin", "box")]
)
def test_the_recipe_names_its_scaler_and_sampling(negatives, scale):
    config = EtmConfig(negatives=negatives)
    assert config.target_scale == scale
    assert etm(config, SPEC).model.expert.region == (
        "trust" if negatives == "proposal" else "box"
    )
    steps = config.resolved_sampling.num_steps
    assert steps == (3 if negatives == "proposal" else 50)
