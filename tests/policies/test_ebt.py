"""The energy-based policy: descents by hand, one set of weights, derivatives, two modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import loops
from emfuse_jax.base import Network, SpaceSpec, Transition
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.nets.energy import conditional_energy
from emfuse_jax.nets.transformer import TransformerConfig
from emfuse_jax.policies import _ebt_loss
from emfuse_jax.policies.ebt import (
    EbtConfig,
    EbtParams,
    ebt_policy,
    ebt_refine,
    s1_config,
    s2_config,
)

pytestmark = pytest.mark.allow_key_reuse
SPEC = SpaceSpec(2, 2)
KEY = jax.random.key(0)
PLAIN = Normalizer(jnp.zeros(2), jnp.ones(2))


def quartic(weights, observation, action):
    """Mean over coordinates of ``½ k (a - g·o)² + c (a - g·o)⁴``."""
    error = action - weights["gain"] * observation
    return jnp.mean(
        0.5 * weights["curvature"] * jnp.square(error) + weights["quartic"] * error**4,
        axis=-1,
    )


def start_weights(quartic=0.0):
    return {
        "gain": jnp.float32(0.5),
        "curvature": jnp.float32(1.0),
        "quartic": jnp.float32(quartic),
    }


NETWORK = Network(lambda key, observation, action: start_weights(0.05), quartic)


def test_acting_is_gradient_descent_by_hand():
    config = EbtConfig(act_steps=5, step_size=0.3)
    refine = jax.jit(ebt_refine(config, SPEC, network=NETWORK))
    observation, start = jnp.array([[1.0, -1.0], [0.4, 0.0]]), 0.8 * jnp.ones((2, 2))
    end = refine(EbtParams(start_weights(), PLAIN), KEY, observation, start=start)
    goal = 0.5 * observation
    np.testing.assert_allclose(
        end.action, goal + 0.7**5 * (start - goal), rtol=1e-5, atol=1e-6
    )
    assert end.num_steps.tolist() == [5, 5]
    assert bool((end.energy < end.start_energy).all())


def test_adaptive_compute_takes_the_steps_of_the_closed_form():
    config = EbtConfig(act_steps=50, step_size=0.3, tolerance=1e-3)
    refine = jax.jit(ebt_refine(config, SpaceSpec(1, 1), network=NETWORK))
    params = EbtParams(start_weights(), Normalizer(jnp.zeros(1), jnp.ones(1)))
    start = jnp.array([[0.01], [0.1], [1.0], [10.0]])
    end = refine(params, KEY, jnp.zeros((4, 1)), start=start)
    assert end.num_steps.tolist() == [7, 13, 20, 26]
    assert float(end.gradient_norm.max()) <= 1e-3


def test_steps_that_are_too_long_are_reported():
    """Curvature 1 allows steps below 2; momentum 0.9 below 1.357."""
    for momentum, step_size, rises in [
        (0.0, 1.9, False),
        (0.0, 2.1, True),
        (0.9, 1.3, False),
        (0.9, 1.42, True),
    ]:
        config = EbtConfig(act_steps=60, step_size=step_size, momentum=momentum)
        refine = ebt_refine(config, SPEC, network=NETWORK)
        start = jnp.array([[0.1, -0.1]])
        params = EbtParams(start_weights(), PLAIN)
        end = jax.jit(refine)(params, KEY, jnp.zeros((1, 2)), start=start)
        assert bool(end.energy[0] > end.start_energy[0]) == rises
        assert bool(jnp.isfinite(end.action).all())


def batch_of(observation, action):
    nothing = jnp.zeros(len(observation))
    false = nothing.astype(bool)
    return Transition(observation, action, nothing, observation, false, false)


@pytest.fixture(scope="module")
def updated():
    """Four quick updates of a network in two halves, and the states after each."""
    network = conditional_energy((8,))
    config = EbtConfig(learning_rate=0.3, warmup_steps=1, act_steps=1)
    policy = ebt_policy(config, SPEC, network=network)
    update = jax.jit(policy.update)
    states = [policy.init(KEY, normalizer=Normalizer(jnp.ones(2), 2 * jnp.ones(2)))]
    for step in range(4):
        key = jax.random.fold_in(KEY, step)
        observation = jax.random.normal(key, (16, 2))
        states.append(update(key, states[-1], batch_of(observation, observation))[0])
    return config, policy, network, states


def test_the_average_follows_its_schedule(updated):
    _, _, _, states = updated
    average = states[1].network  # the first rate is 1
    for step, state in enumerate(states[2:], start=1):
        rate = (1.0 + step) ** -0.75
        average = jax.tree.map(
            lambda old, new, rate=rate: (1 - rate) * old + rate * new,
            average,
            state.network,
        )
    last, lags = states[-1], []
    for got, expected, raw in zip(
        *map(jax.tree.leaves, (last.params.network, average, last.network)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
        lags.append(np.abs(got - raw).max())
    assert max(lags) > 1e-3
    assert last.params.normalizer.mean.tolist() == [1.0, 1.0]  # no update moves it


def test_one_set_of_weights_reads_the_observation_and_makes_the_steps(updated):
    """The authors' code averaged the encoders and stepped with the raw energy net."""
    config, policy, network, states = updated
    params, raw = states[-1].params, states[-1].network
    observation = jax.random.normal(jax.random.key(3), (4, 2))
    start = 0.3 * jax.random.normal(jax.random.key(4), (4, 2))
    refine = jax.jit(ebt_refine(config, SPEC, network=network))
    end = refine(params, KEY, observation, start=start)

    def step(weights):
        def total(action):
            mixed = params._replace(network=weights)
            return jnp.sum(policy.energy(mixed, observation, action))

        move = config.step_size * SPEC.action_size * jax.grad(total)(start)
        return jnp.clip(start - move, -1.0, 1.0)

    np.testing.assert_allclose(end.action, step(params.network), rtol=1e-4, atol=1e-6)
    assert np.abs(end.action - step(raw)).max() > 1e-3
    energy = policy.energy(params, observation, start)
    np.testing.assert_allclose(end.start_energy, energy, rtol=1e-4, atol=1e-6)


def test_the_deterministic_action_needs_no_luck_and_no_neighbours(updated):
    _, policy, _, states = updated
    act = jax.jit(policy.act, static_argnames="deterministic")
    params, observation = states[-1].params, jnp.ones((3, 2)).at[1].set(0.5)
    first = act(params, jax.random.key(1), observation, deterministic=True)
    again = act(params, jax.random.key(2), observation, deterministic=True)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first[0], first[2], rtol=1e-6)
    sampled = act(params, jax.random.key(1), observation)
    assert np.abs(sampled[0] - sampled[2]).max() > 1e-4


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(weights, config):
    observation = jnp.array([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.8]])

    def loss(weights):
        energy_fn = functools.partial(quartic, weights, observation)
        return jnp.mean(
            _ebt_loss.descent_loss(KEY, energy_fn, 0.9 * observation, config)[0]
        )

    return jax.value_and_grad(loss)(weights)


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (s1_config(train_steps=3, step_size=0.3), False),
        (s2_config(train_steps=3, step_size=0.3), True),
        (EbtConfig(train_steps=3, step_size=0.3, truncate=True), False),
        (EbtConfig(train_steps=2, step_size=0.3, detach=False, momentum=0.9), True),
    ],
)
def test_training_differentiates_through_the_steps_unless_told_not_to(config, exact):
    weights = start_weights(0.05)
    _, gradient = loss_and_gradient(weights, config)
    for name in ("gain", "curvature"):
        sides = [
            loss_and_gradient(weights | {name: weights[name] + shift}, config)[0]
            for shift in (1e-2, -1e-2)
        ]
        central = (sides[0] - sides[1]) / 2e-2
        close = np.allclose(gradient[name], central, rtol=1e-2, atol=1e-4)
        assert close == exact, (name, gradient[name], central)


def test_steps_beyond_the_scored_ones_cannot_spoil_the_gradient():
    """They may overflow: their share of the loss is 0, and 0 times infinity is NaN."""
    config = EbtConfig(
        train_steps=1,
        extra_steps=4,
        step_size=0.2,
        energy_scaled=True,
        detach=False,
        truncate=True,
        noise=(0.0, 0.0),
    )

    @jax.jit
    @jax.vmap
    @functools.partial(jax.value_and_grad, argnums=1)
    def draws(key, curvature):
        def energy_fn(action):
            return jnp.sum(0.5 * curvature * jnp.square(action), axis=-1)

        rows = jnp.zeros((8, 1))
        return jnp.mean(_ebt_loss.descent_loss(key, energy_fn, rows, config)[0])

    keys = jax.random.split(jax.random.key(1), 64)
    loss, gradient = (np.asarray(x) for x in draws(keys, jnp.full(64, 2.0)))
    scored = np.isfinite(loss)
    assert 10 < scored.sum() < 64  # the others' scored steps themselves overflow
    # Where the loss is near the largest float its slope may not be: those are no case.
    tame = scored & (loss < 1e6)
    assert tame.sum() > 10
    assert np.isfinite(gradient[tame]).all()


def test_noise_falls_on_half_a_cosine():
    noise = [
        float(_ebt_loss._cosine(jnp.float32(i), first=0.2, last=0.002, count=6))
        for i in range(6)
    ]
    expected = 0.002 + 0.5 * 0.198 * (1 + np.cos(np.pi * np.arange(6) / 6))
    np.testing.assert_allclose(noise, expected, rtol=1e-5)


def wells(weights, observation, action):
    """Wells at ±0.5, the right one deeper, with slopes of about 1."""
    del weights, observation
    distance = jnp.abs(action) - 0.5
    return jnp.mean(jnp.sqrt(jnp.square(distance) + 0.01) - 0.02 * action, axis=-1)


@pytest.mark.parametrize("num_candidates", [1, 16])
def test_of_many_candidates_the_one_of_lowest_energy_is_taken(num_candidates):
    config = EbtConfig(num_candidates=num_candidates, act_steps=60, step_size=0.1)
    network = Network(lambda key, observation, action: {}, wells)
    refine = jax.jit(ebt_refine(config, SpaceSpec(2, 1), network=network))
    end = refine(EbtParams({}, PLAIN), jax.random.key(5), jnp.zeros((64, 2)))
    assert end.action.shape == (64, 1)
    assert end.num_steps.shape == (64,)
    share = float(jnp.mean(end.action > 0))
    assert share == 1.0 if num_candidates == 16 else 0.3 < share < 0.7
    np.testing.assert_allclose(np.abs(end.action), 0.5, atol=0.05)
    energy = wells({}, None, end.action)
    np.testing.assert_allclose(end.energy, energy, atol=1e-6)


def two_modes(key, rows):
    key_observation, key_mode = jax.random.split(key)
    observation = jax.random.uniform(key_observation, (rows, 1), minval=-1.0)
    mode = jnp.where(jax.random.bernoulli(key_mode, 0.5, (rows, 1)), 0.4, -0.4)
    return batch_of(observation, 0.5 * jnp.sin(3 * observation) + mode)


def test_both_modes_survive_where_the_nearest_of_several_ends_is_trained():
    """One start would end between the modes, at the conditional mean."""
    updates = 900
    config = EbtConfig(
        num_starts=8, learning_rate=3e-3, warmup_steps=20, decay_steps=updates
    )
    spec, network = SpaceSpec(1, 1), conditional_energy((64, 64))
    policy = ebt_policy(config, spec, network=network)

    @jax.jit
    def train(key):
        state = policy.init(key)
        state, metrics = loops.fit(
            key, policy, state, lambda k, _: two_modes(k, 64), updates, chunk=updates
        )
        held_out = two_modes(jax.random.key(7), 400)
        action = policy.act(state.params, jax.random.key(8), held_out.observation)
        return action - 0.5 * jnp.sin(3 * held_out.observation), metrics

    side, metrics = train(jax.random.key(0))
    assert np.mean(np.abs(np.abs(side) - 0.4) < 0.15) > 0.9
    assert 0.3 < np.mean(side > 0) < 0.7
    assert float(metrics["rise_rate"][-1]) < 0.05


def test_a_curve_is_learned_and_energies_tell_recorded_actions_from_disturbed_ones():
    """The descent ends on the curve, lower than it began, whatever the observation."""
    updates = 1000
    config = EbtConfig(
        start_noise=(0.0, 1.0),
        learning_rate=3e-3,
        warmup_steps=20,
        decay_steps=updates,
    )
    spec, network = SpaceSpec(1, 1), conditional_energy((64, 64))
    policy = ebt_policy(config, spec, network=network)
    refine = ebt_refine(config, spec, network=network)

    def sample(key, data):
        del data
        observation = jax.random.uniform(key, (64, 1), minval=-1.0)
        return batch_of(observation, 0.8 * jnp.sin(3 * observation))

    @jax.jit
    def train(key):
        state = policy.init(key)
        state, _ = loops.fit(key, policy, state, sample, updates, chunk=updates)
        observation = jnp.linspace(-1.0, 1.0, 1000)[:, None]
        right = 0.8 * jnp.sin(3 * observation)
        wrong = right + 0.3 * jax.random.normal(jax.random.key(9), right.shape)
        energy = [policy.energy(state.params, observation, a) for a in (right, wrong)]
        return right, energy, refine(state.params, key, observation)

    right, (recorded, disturbed), end = train(jax.random.key(0))
    assert np.mean(np.square(end.action - right)) < 1e-3
    assert np.mean(end.energy < end.start_energy) > 0.99
    assert np.mean(recorded < disturbed) > 0.95


def test_the_transformer_of_chunks_is_the_default_network():
    sizes = TransformerConfig(num_layers=1, features=8, num_heads=2)
    config = EbtConfig(network=sizes, num_frames=2, horizon=4, num_candidates=3)
    policy = ebt_policy(config, SpaceSpec(6, 8))
    state = jax.eval_shape(policy.init, KEY)
    observation, action = jnp.zeros((5, 6)), jnp.zeros((5, 8))
    acted = jax.eval_shape(policy.act, state.params, KEY, observation)
    assert acted.shape == (5, 8)
    batch = batch_of(observation, action)
    updated, metrics = jax.eval_shape(policy.update, KEY, state, batch)
    assert jax.tree.structure(updated) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"act_steps": 0}, "act_steps=0"),
        ({"train_steps": 0}, "train_steps=0"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"num_starts": 0}, "num_starts=0"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"step_size_spread": 0.5}, "step_size_spread=0.5"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"start_noise": (0.5, 0.1)}, "start_noise="),
        ({"decay_steps": 100}, "decay_steps=100"),
    ],
)
def test_bad_settings_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        EbtConfig(**settings)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_frames=4"):
        ebt_policy(EbtConfig(num_frames=4), SpaceSpec(6, 8))
