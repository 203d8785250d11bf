"""Least energies: calibration, the refusal of another sampler's, and where rollouts end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import History
from emfuse_jax.dynamics import (
    Calibration,
    CandidateConfig,
    Encoded,
    Expert,
    SamplingConfig,
    calibrate,
    candidates,
    lowest_return,
    min_energy_model,
    rollout,
    transition_model,
)

STEP, NOISE = 0.1, 0.01
CHAINS = SamplingConfig(num_steps=30, spread=1.0, margin=4.0, first=0.5, last=1e-2)
PICK = CandidateConfig(num_candidates=3, sampling=CHAINS)


def chain_expert(steepness=20.0):
    """A walk ``s' = s + 0.1 a`` whose reward is ``s``, learned on ``|s| <= 1``: its energy
    is that of N(s', 0.01²) plus that of the state, which rises outside: a joint one."""

    def encode(params, slices):
        state = slices.anchor
        move = STEP * slices.action[..., 0, :]
        move = jnp.broadcast_to(move[None], state.shape)
        start = jnp.concatenate([move, state], axis=-1)
        return Encoded(state, start, jnp.full_like(start, NOISE))

    def energy(params, condition, target):
        start, outside = condition
        residual = (target - start) / NOISE
        return 0.5 * jnp.sum(jnp.square(residual), axis=-1) + outside

    return Expert(
        encode=encode,
        prepare=lambda params, encoded: (
            encoded.start,
            0.5 * jnp.square(encoded.feature[..., 0])
            + steepness / STEP * jax.nn.relu(jnp.abs(encoded.feature[..., 0]) - 1.0),
        ),
        energy=energy,
        unit=lambda params: jnp.full((1,), STEP),
        num_lags=1,
        anchor="current",
        region="trust",
        feature_size=1,
    )


def build(sampling):
    return transition_model(chain_expert(), sampling)


def at(state):
    state = jnp.asarray(state, jnp.float32)[:, None]
    ones = jnp.ones((1, len(state)), bool)
    return History(state[None], jnp.zeros((1, len(state), 1)), ones)


@pytest.fixture(scope="module")
def calibration():
    held_out = jnp.linspace(-1.0, 1.0, 200)
    return calibrate(build, PICK, {}, at(held_out), quantile=0.99, model="abc")


def test_candidates_start_apart_and_the_best_is_kept():
    history = at(jnp.linspace(-1.0, 1.0, 50))
    short = dataclasses.replace(CHAINS, num_steps=1, first=0.1)
    drawn = jax.jit(candidates(build(short), 4))({}, jax.random.key(0), history)
    assert drawn.next_observation.shape == (4, 50, 1)
    assert (np.std(drawn.next_observation, axis=0) > 0.1 * NOISE).all()
    pick = CandidateConfig(num_candidates=4, sampling=short)
    predict = jax.jit(min_energy_model(build, pick).predict)
    best = predict({}, jax.random.key(0), history)
    np.testing.assert_allclose(
        best.uncertainty, np.min(drawn.energy, axis=0), rtol=1e-5
    )
    np.testing.assert_array_equal(best.energy, best.uncertainty)


def test_the_least_of_more_candidates_is_lower_so_thresholds_do_not_carry_over():
    """P5, and the refusal that guards against it, by the setting's name."""
    short = dataclasses.replace(CHAINS, num_steps=1, first=0.1)
    held_out = at(jnp.linspace(-1.0, 1.0, 200))
    found = [
        calibrate(
            build, CandidateConfig(num_candidates=n, sampling=short), {}, held_out
        )
        for n in (1, 16)
    ]
    assert found[1].threshold < 0.7 * found[0].threshold
    with pytest.raises(
        ValueError, match="num_candidates=1, this sampler has num_candid"
    ):
        min_energy_model(build, found[1].candidates, calibration=found[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", 31), ("noise", 0.5), ("temperature", 1.0), ("spread", 2.0)],
)
def test_a_threshold_of_another_sampler_is_refused_before_tracing(
    calibration, name, value
):
    other = dataclasses.replace(CHAINS, **{name: value})

    def never(sampling):
        raise AssertionError("the model was built")

    with pytest.raises(ValueError, match=f"this sampler has {name}={value}; calibrate"):
        min_energy_model(
            never,
            dataclasses.replace(PICK, sampling=other),
            calibration=calibration,
        )


def test_another_models_threshold_is_refused_and_blocks_of_rows_are_not(calibration):
    same = dataclasses.replace(CHAINS, block_rows=7)
    calibration.check(dataclasses.replace(PICK, sampling=same), model="abc")
    with pytest.raises(ValueError, match="on the parameters abc, these are xyz"):
        calibration.check(PICK, model="xyz")
    assert isinstance(calibration, Calibration)
    assert calibration.candidates == PICK
    # Of 200 even rows in [-1, 1] two lie above |s| = 0.99, where the energy is s² / 2.
    assert calibration.threshold == pytest.approx(0.5 * 0.99**2, abs=0.01)


@pytest.mark.parametrize(("num", "rows"), [(4, 128), (1000, 1)])
def test_candidates_share_the_rows_that_run_together(num, rows):
    """All of them run at once: whole blocks for each would be that much more memory."""
    built = []

    def recording(sampling):
        built.append(sampling)
        return build(sampling)

    config = CandidateConfig(num_candidates=num)
    min_energy_model(recording, config)
    assert built == [dataclasses.replace(config.sampling, block_rows=rows)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_steps", -1), ("uncertainty_steps", -1), ("block_rows", 0)),
        *(("temperature", -1.0), ("noise", float("nan")), ("spread", -1.0)),
        *(("first", -0.1), ("last", 0.0), ("margin", 0.0), ("step_clip", -0.5)),
    ],
)
def test_chains_that_cannot_descend_are_refused_by_name(name, value):
    """A negative temperature would give NaN, a negative step would climb."""
    with pytest.raises(ValueError, match=f"{name}={value}; expected"):
        SamplingConfig(**{name: value})


def test_candidates_that_never_descend_are_refused():
    still = SamplingConfig(num_steps=0, spread=1.0)
    with pytest.raises(ValueError, match="num_steps=0 descend nowhere"):
        CandidateConfig(sampling=still)


@pytest.mark.parametrize("quantile", [0.0, 1.0])
def test_a_quantile_that_cuts_all_or_nothing_is_refused(quantile):
    with pytest.raises(ValueError, match="quantile"):
        calibrate(build, PICK, {}, at(jnp.zeros(3)), quantile=quantile)


CLIFF, DISCOUNT, HORIZON = -10.0, 0.9, 60
POLICIES = {"right": (0.0, 1.0), "left": (0.0, -1.0), "stay": (-5.0, 0.0)}
POLICIES |= {"drift": (0.0, 0.3), "flee": (-2.0, -0.4)}
"""Gain and bias: linear policies, one compiled program."""


def act_by(gains):
    return lambda key, state: jnp.clip(gains[0] * state + gains[1], -1.0, 1.0)


def true_return(policy, start):
    """Beyond |s| = 1 is a cliff: -10 a step for ever. Inside a step pays ``s``."""

    def step(carry, time):
        state, fallen = carry
        fallen = fallen | (jnp.abs(state[:, 0]) > 1.0)
        action = policy(None, state)
        reward = jnp.where(fallen, CLIFF, state[:, 0])
        return (state + STEP * action, fallen), DISCOUNT**time * reward

    carry = start[:, None], jnp.zeros(len(start), bool)
    (_, fallen), rewards = jax.lax.scan(step, carry, jnp.arange(HORIZON))
    tail = jnp.where(fallen, DISCOUNT**HORIZON * CLIFF / (1 - DISCOUNT), 0.0)
    return jnp.sum(rewards, axis=0) + tail


def test_pessimistic_values_stay_below_true_ones_and_rollouts_end_at_the_edge(
    calibration,
):
    """The model extrapolates the walk's rising reward past the cliff it never saw."""
    start = jnp.linspace(-0.45, 0.45, 10)  # no step ends on the edge itself
    model = min_energy_model(build, PICK, calibration=calibration, model="abc")

    @jax.jit
    def run(gains, threshold):
        return rollout(
            {},
            jax.random.key(1),
            model,
            act_by(gains),
            at(start),
            HORIZON,
            terminated_fn=lambda s, a, n: jnp.zeros(s.shape[:-1], bool),
            truncate_above=threshold,
            unknown="terminate",
            halt_value=lowest_return(jnp.array([CLIFF, 1.0]), DISCOUNT),
        )

    def value(steps):
        discount = DISCOUNT ** jnp.arange(HORIZON)[:, None]
        paid = jnp.where(steps.valid, steps.transition.reward, 0.0)
        return jnp.sum(discount * paid, axis=0)

    for name, gains in POLICIES.items():
        steps = run(jnp.array(gains), calibration.threshold)
        pessimistic, true = value(steps), true_return(act_by(gains), start)
        assert (np.asarray(pessimistic) <= np.asarray(true) + 0.05).all(), name
        if name in ("right", "left"):
            last = np.sum(np.asarray(steps.valid), axis=0) - 1
            edge = np.ceil((1.0 - np.sign(1 if name == "right" else -1) * start) / STEP)
            assert (np.abs(last - np.asarray(edge)) <= 1).all()
            assert np.asarray(steps.transition.terminated)[last, np.arange(10)].all()
    # Without truncation the model walks on and is paid for it.
    free = value(run(jnp.array(POLICIES["right"]), jnp.inf))
    true = true_return(act_by(POLICIES["right"]), start)
    assert (np.asarray(free) > np.asarray(true) + 1.0).all()
