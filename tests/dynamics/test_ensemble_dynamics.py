"""The Gaussian ensemble: its likelihood, its bounds, and that members are exchangeable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from emfuse_jax import tree
from emfuse_jax.base import History, SpaceSpec
from emfuse_jax.data.normalizer import Normalizer, apply
from emfuse_jax.dynamics import (
    Batch,
    EnsembleConfig,
    Scales,
    gaussian_ensemble,
    pack_target,
)
from emfuse_jax.dynamics.contrastive import LOG_STD_BOUNDS, beta_nll

SPEC = SpaceSpec(observation_size=3, action_size=2)
MEMBERS, ROWS = 3, 12
CONFIG = EnsembleConfig(num_members=MEMBERS, hidden_sizes=(16,), num_steps=100)


def random_scales(key):
    keys = jax.random.split(key, 3)

    def normalizer(key, shape):
        key_mean, key_scale = jax.random.split(key)
        return Normalizer(
            jax.random.normal(key_mean, shape),
            jnp.exp(jax.random.normal(key_scale, shape)),
        )

    return Scales(
        normalizer(keys[0], (3,)),
        normalizer(keys[1], (2,)),
        normalizer(keys[2], (1, 4)),
    )


@pytest.fixture(scope="module")
def ensemble():
    return gaussian_ensemble(CONFIG, SPEC)


@pytest.fixture(scope="module")
def state(ensemble):
    return jax.jit(ensemble.init)(jax.random.key(0), random_scales(jax.random.key(1)))


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(2), 4)
    history = History(
        jax.random.normal(keys[0], (1, ROWS, 3)),
        jax.random.normal(keys[1], (1, ROWS, 2)),
        jnp.ones((1, ROWS), bool),
    )
    following = jax.random.normal(keys[3], (ROWS, 3))
    return Batch(history, jax.random.normal(keys[2], (ROWS,)), following)


@pytest.fixture(scope="module")
def update(ensemble):
    return jax.jit(ensemble.update)


@pytest.fixture(scope="module")
def predict(ensemble):
    return jax.jit(ensemble.model.predict)


def member_gaussians(params, history):
    """Means and standard deviations in raw units, from the weights, in NumPy."""
    scales = jax.tree.map(np.asarray, params.scales)
    inputs = np.concatenate(
        [
            apply(params.scales.observation, history.observation[0]),
            apply(params.scales.action, history.action[0]),
        ],
        axis=-1,
    )
    means, stds = [], []
    for member in tree.unstack(params.members):
        weights = jax.tree.map(np.asarray, member["params"])
        x = inputs @ weights["fc0"]["kernel"] + weights["fc0"]["bias"]
        x = x / (1.0 + np.exp(-x))
        out = x @ weights["last_fc"]["kernel"] + weights["last_fc"]["bias"]
        means.append(scales.target.mean[0] + scales.target.scale[0] * out[:, :4])
        low, high = LOG_STD_BOUNDS
        log_std = high - np.logaddexp(0.0, high - out[:, 4:])
        log_std = low + np.logaddexp(0.0, log_std - low)
        stds.append(scales.target.scale[0] * np.exp(log_std))
    return np.stack(means), np.stack(stds)


def test_the_energy_is_the_mean_normal_log_density_of_scipy(ensemble, state, batch):
    energy = jax.jit(ensemble.model.energy)(
        state.params, batch.history, batch.next_observation, batch.reward
    )
    mean, std = member_gaussians(state.params, batch.history)
    target = np.asarray(
        pack_target(batch.history.observation[0], batch.next_observation, batch.reward)
    )
    nll = -scipy.stats.norm.logpdf(target[None], mean, std).sum(-1).mean(0)
    constant = 0.5 * 4 * np.log(2 * np.pi)
    np.testing.assert_allclose(energy + constant, nll, rtol=1e-3)
    # Without log σ the densities would not be.
    wrong = 0.5 * np.square((target - mean) / std).sum(-1).mean(0)
    assert np.abs(energy - wrong).min() > 1e-2


def test_beta_nll_between_likelihood_and_squared_error():
    mean, log_std, y = 0.3, jnp.float32(-0.7), jnp.float32(1.1)

    def loss(mean, log_std, beta):
        return beta_nll((y - mean) * jnp.exp(-log_std), log_std, beta)

    likelihood = -scipy.stats.norm.logpdf(1.1, mean, np.exp(-0.7))
    np.testing.assert_allclose(
        loss(mean, log_std, 0.0), likelihood - 0.5 * np.log(2 * np.pi), rtol=1e-5
    )
    # β weighs the same gradient by σ^(2β); β = 1 gives that of squared error.
    plain = jax.grad(loss, argnums=(0, 1))(mean, log_std, 0.0)
    for beta in (0.5, 1.0):
        weighted = jax.grad(loss, argnums=(0, 1))(mean, log_std, beta)
        factor = np.exp(2 * beta * -0.7)
        np.testing.assert_allclose(weighted, np.multiply(plain, factor), rtol=1e-5)
    np.testing.assert_allclose(weighted[0], mean - 1.1, rtol=1e-5)


def test_log_std_keeps_inside_its_bounds_with_a_gradient(ensemble, state, batch):
    scale = np.asarray(state.params.scales.target.scale[0])
    low, high = LOG_STD_BOUNDS

    @jax.jit
    def spread_and_slope(params, shift):
        """Of the energy far from the mean, which depends on σ alone."""

        def energy(shift):
            members = params.members
            bias = members["params"]["last_fc"]["bias"].at[:, 4:].add(shift)
            last = {**members["params"]["last_fc"], "bias": bias}
            shifted = {"params": {**members["params"], "last_fc": last}}
            predicted = ensemble.model.predict(
                params._replace(members=shifted), jax.random.key(0), batch.history
            )
            return ensemble.model.energy(
                params._replace(members=shifted),
                batch.history,
                predicted.next_observation,
                predicted.reward,
            ).sum()

        return jax.value_and_grad(energy)(shift)

    one = jax.tree.map(lambda leaf: leaf[:1], state.params.members)
    params = state.params._replace(members=one)
    for shift, bound in ((50.0, high), (-50.0, low)):
        value, slope = spread_and_slope(params, jnp.float32(shift))
        # At the mean of one member the energy is Σ_d log σ_d.
        expected = ROWS * (4 * bound + np.log(scale).sum())
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        del slope
    # A hard clip has no gradient there; where float32 still tells, this one has.
    for shift in (5.0, -12.0):
        _, slope = spread_and_slope(params, jnp.float32(shift))
        assert float(slope) > 1e-3


def test_predicts_by_the_mean_and_doubts_by_the_spread(predict, state, batch):
    predicted = predict(state.params, jax.random.key(3), batch.history)
    mean, _ = member_gaussians(state.params, batch.history)
    following = np.asarray(batch.history.observation[0]) + mean[..., :3].mean(0)
    np.testing.assert_allclose(
        predicted.next_observation, following, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        predicted.reward, mean[..., 3].mean(0), rtol=1e-3, atol=1e-4
    )
    unit = np.asarray(state.params.scales.target.scale[0, :3])
    spread = np.sqrt((mean[..., :3] / unit).var(0).mean(-1))
    np.testing.assert_allclose(predicted.uncertainty, spread, rtol=1e-3)


def test_members_are_exchangeable(predict, update, state, batch):
    order = jnp.array([2, 0, 1])

    def permute(leaf):
        is_stacked = leaf.ndim > 0 and leaf.shape[0] == MEMBERS
        return leaf[order] if is_stacked else leaf

    permuted = state._replace(
        params=state.params._replace(
            members=jax.tree.map(permute, state.params.members)
        ),
        optimizer=jax.tree.map(permute, state.optimizer),
    )
    first = predict(state.params, jax.random.key(4), batch.history)
    second = predict(permuted.params, jax.random.key(4), batch.history)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # So are the members' parts of the batch.
    parts = np.arange(ROWS).reshape(MEMBERS, -1)[np.asarray(order)].ravel()
    moved = Batch(
        History(*(leaf[:, parts] for leaf in batch.history)),
        batch.reward[parts],
        batch.next_observation[parts],
    )
    after, _ = update(jax.random.key(5), state, batch)
    other, _ = update(jax.random.key(5), permuted, moved)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.tree.map(permute, after.params.members),
        other.params.members,
    )


def test_members_learn_from_their_own_part_only(update, state, batch):
    changed = batch._replace(next_observation=batch.next_observation.at[-1].add(5.0))
    first, _ = update(jax.random.key(6), state, batch)
    second, _ = update(jax.random.key(6), state, changed)
    kernel = [s.params.members["params"]["last_fc"]["kernel"] for s in (first, second)]
    np.testing.assert_array_equal(kernel[0][:2], kernel[1][:2])
    assert (kernel[0][2] != kernel[1][2]).any()


def test_a_batch_that_does_not_divide_is_refused(ensemble, state, batch):
    odd = jax.tree.map(lambda leaf: leaf[..., :-1] if leaf.ndim == 1 else leaf, batch)
    odd = Batch(
        History(*(leaf[:, :-1] for leaf in batch.history)),
        batch.reward[:-1],
        batch.next_observation[:-1],
    )
    with pytest.raises(ValueError, match="batch of 11 windows does not divide among"):
        ensemble.update(jax.random.key(7), state, odd)
