"""Analytic guidance, trained on a problem whose every part is known: Gaussian actions and a
linear value."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import tree
from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.loops import fit
from emfuse_jax.nets.denoiser import DenoiserConfig
from emfuse_jax.policies import _analytic, _vp
from emfuse_jax.policies._guidance import GuidanceConfig
from emfuse_jax.policies.aepo import AepoConfig, aepo, aepo_model
from emfuse_jax.policies.diffusion import DiffusionConfig, diffusion
from emfuse_jax.policies.iql import IqlCritics, IqlCriticsConfig

SPEC = SpaceSpec(1, 2)
MEAN, STD, BETA = jnp.array([[0.3, -0.2]]), 0.5, 2.0
SLOPE = jnp.array([[1.0, -0.5]])
NET = DenoiserConfig(kind="mlp", hidden_sizes=(32, 32), time_features=8)
CONFIG = AepoConfig(
    behaviour=DiffusionConfig(network=NET, bound=None, learning_rate=3e-3),
    guidance=GuidanceConfig(hidden_sizes=(32, 32), learning_rate=3e-3),
    inverse_temperature=BETA,
    normalize_values=False,
    num_bins=16,
)


class Known(NamedTuple):
    params: tuple = ()


def linear_critics():
    return IqlCritics(
        init=lambda key: Known(),
        update=lambda key, state, batch: (state, {}),
        q=lambda params, observation, action: jnp.sum(
            action * jnp.broadcast_to(SLOPE, action.shape), axis=-1
        ),
        value=lambda params, observation: jnp.zeros(observation.shape[:-1]),
    )


def batch_of(key, rows=128):
    action = MEAN + STD * jax.random.normal(key, (rows, 2))
    none, observation = jnp.zeros(rows), jnp.zeros((rows, 1))
    return Transition(observation, action, none, observation, none > 0, none > 0)


@pytest.fixture(scope="module")
def trained():
    policy = aepo(CONFIG, SPEC, critics=linear_critics())

    @jax.jit
    def train(keys):
        def one(key):
            state = policy.init(key)
            return fit(key, policy, state, lambda k, _: batch_of(k), 1000, chunk=500)

        return jax.vmap(one)(keys)

    state, metrics = train(jax.random.split(jax.random.key(0), 2))
    return tree.unstack(state), metrics


@pytest.fixture(scope="module")
def descent(trained):
    energy, rows = aepo_model(CONFIG, SPEC).guidance, jnp.zeros((128, 1))
    params = trained[0][0].params

    def total(noisy, times):
        return -jnp.sum(energy(params, rows, noisy, times))

    return jax.jit(jax.grad(total))


@pytest.mark.parametrize("time", [0.1, 0.3])
def test_the_guidance_points_where_the_value_rises_and_is_as_strong_as_it_should(
    descent, time
):
    noisy = _vp.diffuse(
        batch_of(jax.random.key(3)).action,
        jax.random.normal(jax.random.key(4), (128, 2)),
        jnp.full(128, time),
    )
    slope = np.asarray(descent(noisy, jnp.full(128, time)))
    alpha, sigma = (float(x) for x in _vp.alpha_sigma(time))
    exact = BETA * alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * np.asarray(SLOPE)
    size = np.linalg.norm(slope, axis=-1) * np.linalg.norm(exact)
    cosine = (slope * exact).sum(-1) / size
    assert cosine.mean() > 0.98  # a flipped sign: -1
    along = (slope * exact).sum(-1).mean() / (exact**2).sum()
    assert 0.85 < along < 1.15


def test_the_policy_moves_by_beta_times_the_variance_along_the_slope(trained):
    act = jax.jit(aepo(CONFIG, SPEC, critics=linear_critics()).act)
    params = trained[0][0].params
    action = np.asarray(act(params, jax.random.key(5), jnp.zeros((4000, 1))))
    target = np.asarray(MEAN + BETA * STD**2 * SLOPE)[0]
    np.testing.assert_allclose(action.mean(0), target, atol=0.07)
    assert np.abs(action.mean(0) - np.asarray(MEAN)[0]).min() > 0.15


def test_the_table_holds_the_gaussian_posterior_variance(trained):
    time = jnp.array([0.1, 0.3, 0.9])
    table = jax.jit(_analytic.variance_at)(trained[0][0].moments, time)
    np.testing.assert_allclose(table, _analytic.linear_variance(time, STD**2), rtol=0.1)


def test_seeds_differ_and_the_losses_fall(trained):
    states, metrics = trained
    first, second = (jax.tree.leaves(s.params.energy)[0] for s in states)
    assert jnp.abs(first - second).max() > 1e-3
    assert np.all(metrics["energy_loss"][:, 1] < metrics["energy_loss"][:, 0])


OWN = AepoConfig(
    behaviour=DiffusionConfig(network=NET),
    critics=IqlCriticsConfig(hidden_sizes=(16,)),
    guidance=GuidanceConfig(hidden_sizes=(16,)),
)


@pytest.mark.parametrize(
    ("expansion", "expand_at", "rows"),
    [("gradient", "data", 1), ("curvature", "posterior_mean", 8)],
)
def test_an_update_keeps_the_state_as_it_is_and_is_traced_once(
    expansion, expand_at, rows
):
    traced = []
    critics = linear_critics()

    def counted(key, state, batch):
        traced.append(1)
        return critics.update(key, state, batch)

    config = dataclasses.replace(OWN, expansion=expansion, expand_at=expand_at)
    policy = aepo(config, SPEC, critics=critics._replace(update=counted))
    key = jax.random.key(0)
    state = jax.eval_shape(policy.init, key)
    batch = jax.eval_shape(lambda k: batch_of(k, rows), key)
    new, metrics = jax.eval_shape(policy.update, key, state, batch)
    assert tree.same_structure(state, new)
    assert all(value.shape == () for value in metrics.values())
    assert len(traced) == 1


def test_its_own_critics_and_a_normaliser_fit_in():
    policy, key = aepo(OWN, SPEC), jax.random.key(0)
    normalizer = Normalizer(jnp.array([1.0]), jnp.array([2.0]))
    state = jax.eval_shape(lambda k: policy.init(k, normalizer=normalizer), key)
    batch = jax.eval_shape(lambda k: batch_of(k, 8), key)
    new, metrics = jax.eval_shape(policy.update, key, state, batch)
    assert tree.same_structure(state, new)
    assert {"critic_loss", "value_loss", "behaviour_loss", "energy_loss"} <= set(
        metrics
    )


@pytest.mark.allow_key_reuse
def test_no_guidance_is_the_behaviour(trained):
    guidance = dataclasses.replace(CONFIG.guidance, scale=0.0)
    unguided = aepo(
        dataclasses.replace(CONFIG, guidance=guidance), SPEC, critics=linear_critics()
    )
    params, rows = trained[0][1].params, jnp.zeros((4, 1))
    plain = diffusion(CONFIG.behaviour, SPEC)
    behaviour = jax.jit(plain.act)(params.behaviour, jax.random.key(2), rows)
    action = jax.jit(unguided.act)(params, jax.random.key(2), rows)
    np.testing.assert_array_equal(action, behaviour)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: GuidanceConfig(scale=-1.0), "guidance scale=-1.0; expected 0 or more"),
        (lambda: GuidanceConfig(average_rate=2.0), "average_rate=2.0"),
        (lambda: AepoConfig(inverse_temperature=-0.1), "inverse_temperature=-0.1"),
        (lambda: AepoConfig(expansion="third"), "expansion='third'"),
        (lambda: AepoConfig(expand_at="mode"), "expand_at='mode'"),
        (lambda: AepoConfig(num_bins=0), "num_bins=0"),
        (lambda: AepoConfig(moment_rate=0.0), "moment_rate=0.0"),
        (lambda: IqlCriticsConfig(expectile=1.0), r"expectile=1.0.*\(0, 1\)"),
        (lambda: IqlCriticsConfig(expectile=0.0), "expectile=0.0"),
    ],
)
def test_bad_settings_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()
