"""Fused dynamics: the closed-form pool of Gaussians, and the identities of any pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _gaussian_expert import PRECISE, gaussian_model, linear_model, make_history
from _standard_errors import assert_mean_close
from emfuse_jax import tree
from emfuse_jax.base import History, SpaceSpec
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.dynamics import (
    ETM_SAMPLING,
    AdetmConfig,
    EnsembleConfig,
    FusionConfig,
    SamplingConfig,
    Scales,
    adetm,
    fuse_dynamics,
    gaussian_ensemble,
    uncertainty_weights,
)
from emfuse_jax.energy import pool_gaussians
from emfuse_jax.loops import run_sampler
from emfuse_jax.samplers import ula

DIM = 3
MEAN = jnp.array([[0.5, -1.0, 2.0], [1.5, 1.0, 0.0]])
STD = jnp.array([[1.0, 0.5, 2.0], [0.5, 1.0, 1.5]])
SCALE = jnp.array([[1.0, 3.0, 1.0], [2.0, 1.0, 3.0]])
WEIGHTS = jnp.array([0.3, 0.7])
POOL = pool_gaussians(MEAN, STD**2, WEIGHTS)


def gaussian_params(scale=SCALE):
    rows = zip(MEAN, STD, scale, strict=True)
    return [dict(zip(("mean", "std", "scale"), row, strict=True)) for row in rows]


def at_zero(rows, num_lags=1):
    return make_history(jnp.zeros((rows, DIM - 1)), num_lags=num_lags)


def test_langevin_on_the_fused_energy_samples_the_closed_form_pool():
    chains, step_size = 4000, 0.1
    model = fuse_dynamics(gaussian_model(DIM), WEIGHTS)

    @jax.jit
    def sample(key, params):
        def energy(y):
            return model.energy(params, at_zero(chains), y[:, :-1], y[:, -1])

        position = jnp.zeros((chains, DIM))
        return run_sampler(key, ula(energy, step_size), position, 80)[0].position

    y = np.asarray(sample(jax.random.key(0), tree.stack(gaussian_params())))
    pooled = np.asarray(POOL.variance)
    variance = pooled / (1.0 - step_size / (2.0 * pooled))  # the chain's own, for ULA
    mean_error = assert_mean_close(y, POOL.mean, std=np.sqrt(variance))
    centred = y - np.asarray(POOL.mean)
    spread = variance * np.sqrt(2.0)
    error = assert_mean_close(centred**2, variance, std=spread)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        product = centred[:, i] * centred[:, j]
        assert_mean_close(product, 0.0, std=np.sqrt(variance[i] * variance[j]))
    # Equal weights, or a mean of the members instead of a pool, are told apart.
    equal = pool_gaussians(MEAN, STD**2, jnp.array([0.5, 0.5]))
    for wrong in (equal.mean, WEIGHTS @ MEAN):
        assert (np.abs(wrong - POOL.mean) > 8 * mean_error).any()
    assert (np.abs(equal.variance - pooled) > 8 * error).any()


@pytest.mark.parametrize("region", ["trust", "box"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "tuple"])
def test_the_descent_ends_at_the_precision_weighted_mean(region, stacked):
    member = gaussian_model(DIM, region=region)
    params = gaussian_params()
    if stacked:
        model = fuse_dynamics(member, WEIGHTS, sampling=PRECISE)
        params = tree.stack(params)
    else:
        model = fuse_dynamics([member, member], WEIGHTS, sampling=PRECISE)
        params = tuple(params)
    predicted = jax.jit(model.predict)(params, jax.random.key(0), at_zero(2))
    y = np.column_stack([predicted.next_observation, predicted.reward])
    np.testing.assert_allclose(y, np.stack([POOL.mean] * 2), atol=1e-4)
    residual = (np.asarray(POOL.mean)[None] - MEAN) / STD
    energy = WEIGHTS @ (0.5 * np.square(residual).sum(1))
    np.testing.assert_allclose(predicted.energy, [energy] * 2, rtol=1e-4)
    # Far from where the chains start: the mean of the means, and no change.
    assert np.abs(y - np.asarray(WEIGHTS @ MEAN)).max() > 0.2


def test_chains_stay_in_the_union_of_the_boxes():
    sampling = SamplingConfig(num_steps=200, margin=1.1, first=8.0)
    model = fuse_dynamics(gaussian_model(DIM, region="box"), WEIGHTS, sampling=sampling)
    params = tree.stack(gaussian_params(scale=0.1 * SCALE))
    predicted = jax.jit(model.predict)(params, jax.random.key(0), at_zero(1))
    y = np.append(predicted.next_observation, predicted.reward)
    union = 0.1 * SCALE.max(axis=0)
    inside = np.clip(POOL.mean, -1.1 * union, 1.1 * union)
    np.testing.assert_allclose(y, inside, rtol=1e-5)
    assert np.abs(inside - POOL.mean).max() > 0.1


def chain_ends(sampling, targets):
    model = gaussian_model(2, region="box", sampling=sampling)
    predict = jax.jit(model.predict)
    history = make_history(jnp.zeros((1, 1)))
    params = {"std": jnp.full(2, 0.2), "scale": jnp.ones(2)}
    return [
        float(
            predict(
                {**params, "mean": jnp.full(2, y)}, jax.random.key(0), history
            ).reward[0]
        )
        for y in targets
    ]


def test_the_default_chain_reaches_every_target_of_its_box():
    targets = [0.9, 0.5, -0.5]
    np.testing.assert_allclose(chain_ends(ETM_SAMPLING, targets), targets, atol=1e-3)
    # With the published clip of 0.5, 30 steps reach a quarter of the box and no further.
    published = SamplingConfig(
        num_steps=30, margin=1.1, first=0.1, last=1e-5, drift_clip=0.5
    )
    np.testing.assert_allclose(
        chain_ends(published, targets), [0.2544, 0.2544, -0.2544], atol=1e-4
    )


SPEC = SpaceSpec(observation_size=2, action_size=1)
LAGS, ROWS = 3, 4
SMALL = AdetmConfig(
    num_lags=LAGS,
    state_features=8,
    action_features=4,
    num_heads=2,
    head_sizes=(8,),
    energy_sizes=(8,),
)


def random_scales(key):
    """Every expert measures states, actions and targets in units of its own."""
    keys = jax.random.split(key, 6)

    def normalizer(key_mean, key_scale, shape):
        scale = jnp.exp(0.5 * jax.random.normal(key_scale, shape))
        return Normalizer(0.3 * jax.random.normal(key_mean, shape), scale)

    return Scales(
        normalizer(keys[0], keys[1], (2,)),
        normalizer(keys[2], keys[3], (1,)),
        normalizer(keys[4], keys[5], (LAGS, 3)),
    )


def random_history(key, rows=ROWS):
    keys = jax.random.split(key, 2)
    return History(
        jax.random.normal(keys[0], (LAGS, rows, 2)),
        jax.random.normal(keys[1], (LAGS, rows, 1)),
        jnp.arange(LAGS)[:, None] <= (jnp.arange(rows)[None] + 1) % LAGS,
    )


@pytest.fixture(scope="module")
def dynamics():
    return adetm(SMALL, SPEC)


@pytest.fixture(scope="module")
def experts(dynamics):
    @jax.jit
    def init(key):
        key_scales, key_init = jax.random.split(key)
        return dynamics.init(key_init, random_scales(key_scales)).params

    return [init(key) for key in jax.random.split(jax.random.key(0), 2)]


@pytest.fixture(scope="module")
def fused(dynamics):
    """Predictions of two stacked experts for any weights, traced."""
    return jax.jit(
        lambda params, weights, history: fuse_dynamics(dynamics.model, weights).predict(
            params, jax.random.key(1), history
        )
    )


@pytest.fixture(scope="module")
def single(dynamics):
    return jax.jit(
        lambda params, history: dynamics.model.predict(
            params, jax.random.key(1), history
        )
    )


def assert_same(first, second, *, rtol=1e-5):
    for name, a, b in zip(first._fields, first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5, err_msg=name)


def test_identical_members_are_one_member(fused, single, experts):
    history = random_history(jax.random.key(2))
    alone = single(experts[0], history)
    twice = tree.stack([experts[0], experts[0]])
    assert_same(fused(twice, jnp.array([0.5, 0.5]), history), alone)
    assert_same(fused(twice, jnp.array([0.2, 0.8]), history), alone)


def test_one_hot_weights_are_that_member(fused, single, experts):
    history = random_history(jax.random.key(3))
    both = tree.stack(experts)
    members = [single(params, history) for params in experts]
    for index, alone in enumerate(members):
        chosen = fused(both, jnp.eye(2)[index], history)
        # The unit of uncertainties is the experts' mean: only relative sizes are kept.
        assert_same(
            chosen._replace(uncertainty=chosen.energy),
            alone._replace(uncertainty=alone.energy),
        )
    mixed = fused(both, jnp.array([0.5, 0.5]), history)
    for alone in members:
        assert np.abs(mixed.next_observation - alone.next_observation).min() > 1e-3


def test_stacked_and_listed_experts_are_the_same_model(dynamics, fused, experts):
    history = random_history(jax.random.key(4))
    listed = fuse_dynamics([dynamics.model, dynamics.model], WEIGHTS)
    predicted = jax.jit(listed.predict)(tuple(experts), jax.random.key(1), history)
    assert_same(predicted, fused(tree.stack(experts), WEIGHTS, history))


def test_one_expert_is_itself_whatever_the_rule(dynamics, single, experts):
    history = random_history(jax.random.key(5))
    model = fuse_dynamics([dynamics.model], uncertainty_weights())
    predicted = jax.jit(model.predict)((experts[0],), jax.random.key(1), history)
    assert_same(predicted, single(experts[0], history))


def test_experts_of_different_widths_can_be_fused(dynamics, single, experts):
    wide = adetm(
        AdetmConfig(
            num_lags=LAGS,
            state_features=16,
            action_features=6,
            num_heads=3,
            head_sizes=(12,),
            energy_sizes=(4, 4),
        ),
        SPEC,
    )
    other = jax.jit(wide.init)(jax.random.key(6), random_scales(jax.random.key(7)))
    history = random_history(jax.random.key(8))
    model = fuse_dynamics([dynamics.model, wide.model], jnp.array([1.0, 0.0]))
    predicted = jax.jit(model.predict)(
        (experts[0], other.params), jax.random.key(1), history
    )
    alone = single(experts[0], history)
    np.testing.assert_allclose(
        predicted.next_observation, alone.next_observation, rtol=1e-5, atol=1e-5
    )


def test_the_chain_rule_through_every_scaler_is_exact(dynamics, experts):
    history = random_history(jax.random.key(9))
    with jax.enable_x64(True):
        params, history, weights = jax.tree.map(
            lambda x: jnp.asarray(
                np.asarray(x), "float64" if x.dtype.kind == "f" else None
            ),
            (tree.stack(experts), history, WEIGHTS),
        )
        model = fuse_dynamics(dynamics.model, weights)

        @jax.jit
        def energy(y):
            following = history.observation[0] + y[:, :-1]
            return model.energy(params, history, following, y[:, -1])

        y = jnp.linspace(-1.0, 1.0, ROWS * 3).reshape(ROWS, 3)
        gradient = jax.jit(jax.grad(lambda y: energy(y).sum()))(y)
        assert gradient.dtype == jnp.float64
        for dim in range(3):
            step = jnp.zeros((1, 3)).at[0, dim].set(1e-6)
            slope = (energy(y + step) - energy(y - step)) / 2e-6
            np.testing.assert_allclose(gradient[:, dim], slope, rtol=1e-5, atol=1e-7)
    assert np.abs(gradient).min() > 1e-3


def test_noise_moves_predictions_but_never_the_uncertainty(dynamics, experts):
    history = random_history(jax.random.key(10))
    quiet = SamplingConfig(num_steps=4, uncertainty_steps=4, margin=2.0)
    noisy = SamplingConfig(num_steps=4, uncertainty_steps=4, margin=2.0, noise=0.5)
    params = (experts[0],)
    ends = {}
    for name, sampling in (("quiet", quiet), ("noisy", noisy)):
        model = fuse_dynamics([dynamics.model], sampling=sampling)
        predict = jax.jit(model.predict)
        ends[name] = [predict(params, jax.random.key(seed), history) for seed in (0, 1)]
    # Nothing random is left without noise, dropout for instance.
    jax.tree.map(np.testing.assert_array_equal, *ends["quiet"])
    first, second = ends["noisy"]
    assert np.abs(first.next_observation - second.next_observation).min() > 1e-4
    np.testing.assert_array_equal(first.uncertainty, second.uncertainty)
    np.testing.assert_array_equal(first.uncertainty, ends["quiet"][0].uncertainty)


def test_an_expert_that_disagrees_with_itself_loses_its_vote():
    turn = jnp.array([[0.0, 0.9], [-0.9, 0.0]])
    good = linear_model(turn, jnp.ones((1, 2)), num_lags=LAGS)
    bad = linear_model(-turn, jnp.ones((1, 2)), num_lags=LAGS)
    states = [jax.random.normal(jax.random.key(11), (ROWS, 2))]
    for _ in range(LAGS - 1):
        states.append(states[-1] @ turn)
    history = History(
        jnp.stack(states[::-1]),
        jnp.zeros((LAGS, ROWS, 1)),
        jnp.ones((LAGS, ROWS), bool),
    )
    params = ({"error": jnp.zeros(())}, {"error": jnp.full((), 0.5)})
    truth = states[-1] @ turn
    gated = fuse_dynamics([good, bad], uncertainty_weights())
    predicted = jax.jit(gated.predict)(params, jax.random.key(0), history)
    np.testing.assert_allclose(predicted.next_observation, truth, atol=1e-4)
    uniform = fuse_dynamics([good, bad])
    halfway = jax.jit(uniform.predict)(params, jax.random.key(0), history)
    assert np.abs(halfway.next_observation - truth).max() > 0.1


def test_a_random_slice_is_one_of_the_valid_ones():
    model = linear_model(jnp.eye(2), jnp.zeros((1, 2)), num_lags=LAGS)
    sampling = SamplingConfig(num_steps=0, slice_choice="random")
    model = fuse_dynamics([model], sampling=sampling)
    rows = 300
    states = jnp.arange(1.0, LAGS + 1)[:, None, None]
    history = History(
        jnp.broadcast_to(states, (LAGS, rows, 2)),
        jnp.zeros((LAGS, rows, 1)),
        jnp.arange(LAGS)[:, None] <= jnp.arange(rows)[None] % 2,
    )
    params = ({"error": jnp.zeros(())},)
    predicted = jax.jit(model.predict)(params, jax.random.key(0), history)
    # The model says "no change": the prediction names the anchor.
    chosen = np.asarray(predicted.next_observation[:, 0])
    assert set(chosen[::2]) == {1.0}
    assert set(chosen[1::2]) == {1.0, 2.0}
    assert_mean_close(chosen[1::2] == 1.0, 0.5)


def count_loops(model, params, num_lags):
    """Loops that are left after compilation: one per chain."""
    lowered = jax.jit(model.predict).lower(
        params, jax.random.key(0), at_zero(2, num_lags)
    )
    return lowered.compile().as_text().count(" while(")


def test_no_chain_runs_for_nothing():
    params = tree.stack(gaussian_params())
    expected = {
        # One slice agrees with itself, and experts have nothing to compare.
        (1, None): 1,
        (1, "uncertainty"): 1,
        # The prediction's and the slices'; the experts' own where weights read them.
        (2, None): 2,
        (2, "uncertainty"): 3,
    }
    for (num_lags, rule), count in expected.items():
        member = gaussian_model(DIM, region="box", num_lags=num_lags)
        weights = uncertainty_weights() if rule else None
        model = fuse_dynamics(member, weights)  # ETM_SAMPLING
        assert count_loops(model, params, num_lags) == count, (num_lags, rule)


def test_a_longer_history_is_read_up_to_the_experts_lags(dynamics, single, experts):
    history = random_history(jax.random.key(12))
    longer = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), history)
    assert_same(single(experts[0], longer), single(experts[0], history), rtol=1e-6)
    shorter = jax.tree.map(lambda leaf: leaf[:2], history)
    with pytest.raises(
        ValueError, match="history has 2 lags, the model reads num_lags=3"
    ):
        single(experts[0], shorter)


def test_what_cannot_be_fused_is_refused(dynamics):
    model = dynamics.model
    other = adetm(AdetmConfig(num_lags=2), SPEC).model
    chains = adetm(AdetmConfig(num_lags=3, negatives="langevin"), SPEC).model
    for wrong in (other, chains):
        with pytest.raises(ValueError, match="only models of one kind"):
            fuse_dynamics([model, wrong])
    with pytest.raises(ValueError, match="got no models"):
        fuse_dynamics([])
    ensemble = gaussian_ensemble(EnsembleConfig(), SPEC).model
    with pytest.raises(ValueError, match="model 1 has no energy of its own"):
        fuse_dynamics([model, ensemble])
    for weights in ([0.5, 0.4], [1.5, -0.5], [0.2, 0.3, 0.5]):
        with pytest.raises(ValueError, match="weights"):
            fuse_dynamics([model, model], jnp.array(weights))
    # For a stack the number is known once there are params.
    params = tree.stack(gaussian_params())
    with pytest.raises(ValueError, match="1 weights for 2 experts"):
        fuse_dynamics(gaussian_model(DIM), jnp.ones(1)).uncertainty(params, at_zero(1))
    twice = fuse_dynamics([fuse_dynamics(gaussian_model(DIM))])
    with pytest.raises(ValueError, match="fuse all of its members at once"):
        twice.uncertainty((params,), at_zero(1))


def test_fusion_config_names_the_rule():
    assert FusionConfig(rule="uniform").weight_rule() is None
    fixed = FusionConfig(rule="fixed", weights=(0.25, 0.75)).weight_rule()
    np.testing.assert_allclose(fixed, [0.25, 0.75])
    rule = FusionConfig(rule="uncertainty", power=2.0).weight_rule()
    np.testing.assert_allclose(
        rule(jnp.array([[1.0], [2.0]]))[:, 0], [0.8, 0.2], atol=1e-3
    )
