"""Implicit cloning learns the density that its negatives allow, and finds its minimum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _standard_errors
from emfuse_jax import loops
from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.losses.negatives import (
    gaussian_mixture_log_prob,
    gaussian_mixture_proposal,
)
from emfuse_jax.nets.energy import EnergyNetwork
from emfuse_jax.policies.ibc import (
    ActionBox,
    IbcConfig,
    Proposal,
    action_box,
    evaluations_per_action,
    ibc,
)
from emfuse_jax.samplers import etm_langevin

SPEC = SpaceSpec(1, 1)
STD = 0.15


def transition(observation, action):
    nothing = jnp.zeros(observation.shape[0])
    false = nothing.astype(bool)
    return Transition(observation, action, nothing, observation, false, false)


# --- what the energy learns, with an energy whose optimum is known -----------------------


def parabola():
    """``½ c (y - m x - b)²`` with c, m and b learned; y in the box scaled to [-1, 1]."""

    def init(key, observation, action):
        return {"log_c": jnp.zeros(1), "m": jnp.zeros(1), "b": jnp.zeros(1)}

    def energy(params, center, y):
        offset = y - center
        scale = jnp.broadcast_to(jnp.exp(params["log_c"]), offset.shape)
        return 0.5 * jnp.sum(scale * jnp.square(offset), axis=-1)

    def project(params, x):
        m, b = (jnp.broadcast_to(params[name], x.shape) for name in "mb")
        return m * x + b

    return EnergyNetwork(init, project, energy)


def beside_the_data():
    """Negatives N(0.5 x + 0.3, 0.4²): known, and not uniform."""

    def law(x):
        return 0.5 * x + 0.3, jnp.full_like(x, 0.4)

    return Proposal(
        lambda key, x, num: gaussian_mixture_proposal(key, *law(x), (1.0,), num),
        lambda x, y: gaussian_mixture_log_prob(y, *law(x), (1.0,)),
    )


def curvature_and_offset(**options):
    """Of ``-E`` fitted to y|x ~ N(0.5 x, 0.15²), in raw units, at x = 0."""
    config = IbcConfig(
        penalty=0.0, num_negatives=16, learning_rate=0.03, decay=0.5, **options
    )
    proposal = beside_the_data() if config.negatives == "proposal" else None
    policy = ibc(config, SPEC, network=parabola(), proposal=proposal)

    def sample(key, data):
        key_x, key_y = jax.random.split(key)
        x = jax.random.uniform(key_x, (512, 1), minval=-1.0)
        return transition(x, 0.5 * x + STD * jax.random.normal(key_y, x.shape))

    @jax.jit
    def fit(key):
        box = ActionBox(jnp.array([-1.5]), jnp.array([1.5]))
        state = policy.init(key, box=box)
        state, _ = loops.fit(key, policy, state, sample, 1000, chunk=1000)
        y = jnp.array([[-1.0], [0.0], [1.0]])
        return -policy.energy(state.params, jnp.zeros((3, 1)), y)

    low, middle, high = np.asarray(fit(jax.random.key(0)), np.float64)
    curvature = low - 2 * middle + high
    return curvature, -0.5 * (high - low) / curvature


TRUE = -1 / STD**2  # -44.4


def test_uniform_negatives_give_the_density():
    curvature, offset = curvature_and_offset(negatives="uniform")
    assert abs(curvature / TRUE - 1) < 0.05
    assert abs(offset) < 0.005


@pytest.mark.parametrize("corrected", [False, True])
def test_other_negatives_bias_it_unless_corrected(corrected):
    curvature, offset = curvature_and_offset(
        negatives="proposal", ranking_correction=corrected
    )
    biased = -1 / STD**2 + 1 / 0.4**2  # -38.2
    shift = -0.3 / 0.4**2 / -biased
    if corrected:
        assert abs(curvature / TRUE - 1) < 0.05
        assert abs(offset) < 0.005
    else:
        assert abs(curvature / biased - 1) < 0.05
        assert abs(offset - shift) < 0.005


def test_the_stationary_variance_of_the_chain():
    """Its noise is multiplied by the rate and not by its root: far colder than exp(-E)."""
    rate, stiffness = 0.1, 1.0
    sampler = etm_langevin(
        lambda y: 0.5 * stiffness * jnp.sum(y**2, axis=-1),
        90,
        first=rate,
        last=rate,
        noise=1.0,
        drift_clip=None,
        step_clip=None,
        bounds=None,
    )
    run = jax.jit(
        lambda key: loops.run_sampler(key, sampler, jnp.zeros((80_000, 1)), 90)[0]
    )
    squares = np.asarray(run(jax.random.key(0)).position)[:, 0] ** 2
    expected = rate**2 / (1 - (1 - 0.5 * rate * stiffness) ** 2)  # 0.1026
    _standard_errors.assert_mean_close(squares, expected, std=np.sqrt(2) * expected)
    assert abs(squares.mean() / expected - 1) < 0.02
    assert squares.mean() < 0.2  # of exp(-E) it would be 1


# --- acting ------------------------------------------------------------------------------

BOX = ActionBox(jnp.array([-0.2, -1.0]), jnp.array([0.8, 0.0]))
WELLS = jnp.array([[-0.6, 0.4], [0.5, -0.7]])  # in the scaled box
DEPTH = jnp.array([1.0, 0.0])  # the second is the deeper one


def two_wells():
    """Energies of scaled actions; the observation shifts nothing."""

    def energy(params, projected, y):
        centers = WELLS.reshape((1,) * (y.ndim - 1) + WELLS.shape)
        distance = jnp.sum(jnp.square((y[..., None, :] - centers) / 0.1), axis=-1)
        return jnp.min(distance + jnp.broadcast_to(DEPTH, distance.shape), axis=-1)

    return EnergyNetwork(
        lambda key, x, y: {"w": jnp.zeros(1)}, lambda params, x: x[..., :1], energy
    )


def to_raw(scaled):
    return np.asarray(BOX.low) + 0.5 * (scaled + 1) * np.asarray(BOX.high - BOX.low)


@pytest.mark.parametrize("inference", ["langevin", "derivative_free"])
def test_it_acts_at_the_lowest_energy_in_raw_units(inference):
    config = IbcConfig(
        inference=inference,
        num_samples=256,
        chain_steps=30,
        search_steps=4,
        step_clip=0.5,
        second_pass=inference == "langevin",
    )
    policy = ibc(config, SpaceSpec(3, 2), network=two_wells())
    params = policy.init(jax.random.key(0), box=BOX).params
    rows = jnp.zeros((100, 3))

    @jax.jit
    def both(key):
        key_lowest, key_drawn = jax.random.split(key)
        lowest = policy.act(params, key_lowest, rows, deterministic=True)
        return lowest, policy.act(params, key_drawn, rows)

    action, drawn = map(np.asarray, both(jax.random.key(1)))
    deep, other = to_raw(np.asarray(WELLS[1])), to_raw(np.asarray(WELLS[0]))
    np.testing.assert_allclose(action, np.tile(deep, (100, 1)), atol=0.04)
    # The same place read as raw units would be far away.
    assert np.linalg.norm(np.asarray(WELLS[1]) - deep) > 0.1

    if inference == "derivative_free":
        return  # resampling again and again is a search, no sampling
    near = [np.linalg.norm(drawn - well, axis=1) < 0.2 for well in (deep, other)]
    assert (near[0] | near[1]).all()  # never between the modes
    assert near[0].sum() > 50
    assert near[1].sum() > 2
    at_deep = policy.energy(params, jnp.zeros(3), jnp.asarray(deep, jnp.float32))
    assert abs(float(at_deep)) < 1e-3


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_candidate_without_an_energy_is_never_taken(deterministic):
    def energy(params, projected, y):
        bowl = jnp.sum(jnp.square(y), axis=-1)
        return jnp.where(y[..., 0] > 0.5, jnp.nan, bowl)

    network = EnergyNetwork(lambda key, x, y: {}, lambda params, x: x, energy)
    config = IbcConfig(num_samples=32, chain_steps=1, first_step=1e-5)
    policy = ibc(config, SPEC, network=network)
    params = policy.init(jax.random.key(0)).params
    act = jax.jit(lambda key: policy.act(params, key, jnp.zeros((20, 1))))
    if deterministic:
        act = jax.jit(
            lambda key: policy.act(params, key, jnp.zeros((20, 1)), deterministic=True)
        )
    # A quarter of 32 uniform starts has no energy; argmin takes NaN for the least.
    assert float(jnp.max(act(jax.random.key(1)))) <= 0.5


def test_a_step_is_cloned_with_one_jump_and_no_value_between():
    """y = ∓0.6 below and above x = ½; every regression has values between."""
    config = IbcConfig(
        hidden_sizes=(32, 32),
        negatives="uniform",
        num_negatives=16,
        penalty=0.0,
        learning_rate=1e-2,
        decay=0.8,
    )
    policy = ibc(config, SPEC)

    def sample(key, data):
        x = jax.random.uniform(key, (64, 1))
        return transition(x, jnp.where(x < 0.5, -0.6, 0.6))

    @jax.jit
    def argmin(key):
        state, _ = loops.fit(key, policy, policy.init(key), sample, 1000, chunk=1000)
        x, y = jnp.linspace(0.0, 1.0, 201), jnp.linspace(-1.0, 1.0, 201)
        grid = jnp.broadcast_to(y[None, :, None], (201, 201, 1))
        energies = policy.energy(state.params, x[:, None], grid)
        return x, y[jnp.argmin(energies, axis=1)]

    x, y = (np.asarray(a, np.float64) for a in argmin(jax.random.key(0)))
    assert not np.any(np.abs(y) < 0.5)
    jumps = np.flatnonzero(np.diff(np.sign(y)))
    assert len(jumps) == 1
    assert abs(x[jumps[0]] - 0.5) < 0.02
    smooth = np.polyval(np.polyfit(x, np.where(x < 0.5, -0.6, 0.6), 7), x)
    assert np.any(np.abs(smooth) < 0.5)


def test_evaluations_are_counted():
    config = IbcConfig(num_samples=10, chain_steps=7)
    assert evaluations_per_action(config) == (10, 70)
    twice = dataclasses.replace(config, second_pass=True)
    assert evaluations_per_action(twice) == (10, 140)
    search = dataclasses.replace(config, inference="derivative_free", search_steps=3)
    assert evaluations_per_action(search) == (40, 0)


# --- training with the published negatives -----------------------------------------------


@pytest.fixture(scope="module")
def updated():
    config = IbcConfig(hidden_sizes=(16,), num_negatives=4, chain_steps=5)
    policy = ibc(config, SpaceSpec(3, 2))
    key_x, key_y = jax.random.split(jax.random.key(0))
    batch = transition(
        5.0 + 2.0 * jax.random.normal(key_x, (32, 3)),
        jax.random.uniform(key_y, (32, 2), minval=-0.1, maxval=0.0),
    )
    shift = Normalizer(jnp.full(3, 5.0), jnp.full(3, 2.0))
    state = policy.init(jax.random.key(1), normalizer=shift, box=BOX)
    new, metrics = jax.jit(policy.update)(jax.random.key(2), state, batch)
    return policy, batch, state, new, metrics


def test_an_update_trains_the_energy_and_nothing_else(updated):
    _, _, state, new, metrics = updated
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert metrics["loss"] == metrics["contrastive"] + metrics["penalty"]
    before, after = (jax.tree.leaves(s.params.energy) for s in (state, new))
    assert all((a != b).any() for a, b in zip(before, after, strict=True) if a.size > 1)
    kept = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        (state.params.normalizer, state.params.box),
        (new.params.normalizer, new.params.box),
    )
    assert all(jax.tree.leaves(kept))


def test_observations_are_normalised_in_training_and_acting_alike(updated):
    policy, batch, state, _, _ = updated
    plain = state.params._replace(normalizer=Normalizer(jnp.zeros(3), jnp.ones(3)))
    normal = (batch.observation - 5.0) / 2.0
    np.testing.assert_allclose(
        policy.energy(state.params, batch.observation, batch.action),
        policy.energy(plain, normal, batch.action),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_penalty_is_of_the_largest_slope_above_one_in_scaled_units():
    slopes = jnp.array([0.5, -3.0])
    line = EnergyNetwork(
        lambda key, x, y: {"w": slopes},
        lambda params, x: x,
        lambda params, projected, y: jnp.sum(
            y * jnp.broadcast_to(params["w"], y.shape), axis=-1
        ),
    )
    config = IbcConfig(negatives="uniform", num_negatives=4)
    policy = ibc(config, SpaceSpec(3, 2), network=line)
    state = policy.init(jax.random.key(0), box=BOX)
    batch = transition(jnp.zeros((8, 3)), jnp.full((8, 2), -0.1))
    _, metrics = jax.jit(policy.update)(jax.random.key(1), state, batch)
    np.testing.assert_allclose(metrics["penalty"], (3.0 - 1.0) ** 2, rtol=1e-5)


# --- the box and other refusals ----------------------------------------------------------


def test_the_box_holds_the_data_and_a_margin_within_the_limits():
    actions = np.array([[-0.5, 0.3, -1.0], [0.5, 0.3, 1.0], [0.1, 0.3, 0.0]])
    box = action_box(actions)
    np.testing.assert_allclose(box.low, [-0.55, 0.2, -1.0], atol=1e-6)
    np.testing.assert_allclose(box.high, [0.55, 0.4, 1.0], atol=1e-6)
    with pytest.raises(ValueError, match=r"reach from -0.5 to 1.5.*rescale"):
        action_box(np.array([[-0.5], [1.5]]))
    with pytest.raises(ValueError, match=r"shape \(0, 2\)"):
        action_box(np.zeros((0, 2)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"chain_steps": 0}, "chain_steps=0"),
        ({"num_negatives": 0}, "num_negatives=0"),
        ({"penalty": -1.0}, "penalty=-1"),
        pytest.param(
            {"negatives": "hard"}, "negatives='hard'", marks=pytest.mark.untyped
        ),
        ({"ranking_correction": True}, "needs the density of the negatives"),
    ],
)
def test_settings_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        IbcConfig(**options)


def test_a_proposal_goes_with_its_setting():
    with pytest.raises(ValueError, match="pass a Proposal"):
        ibc(IbcConfig(negatives="proposal"), SPEC)
    with pytest.raises(ValueError, match="pass a Proposal"):
        ibc(IbcConfig(), SPEC, proposal=beside_the_data())
