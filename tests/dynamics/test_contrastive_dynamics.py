"""The two recipes: what each loss trains, when, and on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import History, SpaceSpec
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.dynamics import (
    AdetmConfig,
    Batch,
    EtmConfig,
    Scales,
    adetm,
    etm,
    make_slices,
)
from emfuse_jax.dynamics.contrastive import ContrastiveConfig

SPEC = SpaceSpec(observation_size=2, action_size=1)
LAGS, ROWS = 2, 16
SIZES = {
    "num_lags": LAGS,
    "state_features": 8,
    "action_features": 4,
    "num_heads": 2,
    "energy_sizes": (8, 8),
    "head_sizes": (8,),
    "batch_size": ROWS,
}
PROPOSAL = AdetmConfig(**SIZES, energy_rows=8, num_steps=100, head_phase=0.5)


def unit_scales(num_lags=LAGS):
    def unit(*shape):
        return Normalizer(jnp.zeros(shape), jnp.ones(shape))

    return Scales(unit(2), unit(1), unit(num_lags, 3))


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(0), 4)
    history = History(
        jax.random.normal(keys[0], (LAGS, ROWS, 2)),
        jax.random.normal(keys[1], (LAGS, ROWS, 1)),
        jnp.ones((LAGS, ROWS), bool),
    )
    following = history.observation[0] + 0.1 * jax.random.normal(keys[2], (ROWS, 2))
    return Batch(history, jax.random.normal(keys[3], (ROWS,)), following)


@pytest.fixture(scope="module")
def proposal():
    return adetm(PROPOSAL, SPEC)


@pytest.fixture(scope="module")
def proposal_state(proposal):
    return jax.jit(proposal.init)(jax.random.key(1), unit_scales())


@pytest.fixture(scope="module")
def proposal_update(proposal):
    return jax.jit(proposal.update)


def moved(before, after):
    return any(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    )


def test_the_head_trains_alone_and_is_then_left_to_its_own_loss(
    proposal_update, proposal_state, batch
):
    results = {}
    for step in (49, 50):
        state = proposal_state._replace(step=jnp.int32(step))
        results[step] = proposal_update(jax.random.key(2), state, batch)
    before = proposal_state.params
    (head_only, first), (joint, second) = results[49], results[50]
    assert not moved(before.energy, head_only.params.energy)
    assert float(first["energy_loss"]) == float(first["energy_gap"]) == 0.0
    assert moved(before.energy, joint.params.energy)
    assert float(second["energy_loss"]) > 0.0
    assert int(joint.step) == 51
    # The energy's gradient stops at the head's mean and at the encoder's feature.
    for part in ("head", "encoder"):
        assert moved(getattr(before, part), getattr(joint.params, part))
        jax.tree.map(
            np.testing.assert_array_equal,
            getattr(head_only.params, part),
            getattr(joint.params, part),
        )
    jax.tree.map(np.testing.assert_array_equal, before.scales, joint.params.scales)


def test_energies_that_run_away_are_seen_in_the_gap(
    proposal_update, proposal_state, batch
):
    state, gaps = proposal_state._replace(step=jnp.int32(50)), []
    for scale in (1.0, 1e7):
        energy = jax.tree.map(lambda leaf: leaf, state.params.energy)
        energy["params"]["output"]["kernel"] *= scale
        grown = state._replace(params=state.params._replace(energy=energy))
        gaps.append(
            float(proposal_update(jax.random.key(2), grown, batch)[1]["energy_gap"])
        )
    assert 0 < abs(gaps[0]) < 10
    np.testing.assert_allclose(gaps[1], 1e7 * gaps[0], rtol=1e-3)
    assert abs(gaps[1]) > 1e4  # where the experiments stop


def test_the_energy_costs_nothing_in_the_heads_phase(proposal, proposal_state, batch):
    """Its branch stays a branch, in the gradient too; a select would compute both."""
    compiled = jax.jit(proposal.update).lower(jax.random.key(3), proposal_state, batch)
    assert " conditional(" in compiled.compile().as_text()


def test_an_energy_without_tilt_is_the_heads_own_density(
    proposal, proposal_state, batch
):
    params = proposal_state.params
    output = params.energy["params"]["output"]
    flat = {**params.energy["params"], "output": jax.tree.map(jnp.zeros_like, output)}
    params = params._replace(energy={"params": flat})
    predict = jax.jit(proposal.model.predict)
    predicted = predict(params, jax.random.key(4), batch.history)
    slices = make_slices(batch.history, "backtrack")
    encoded = jax.jit(proposal.model.expert.encode)(params, slices)
    start = encoded.start[0]
    np.testing.assert_allclose(
        predicted.next_observation,
        batch.history.observation[0] + start[:, :2],
        atol=1e-6,
    )
    # At its own mean the energy is Σ log σ, and grows by ½ r².
    log_scale = jnp.log(encoded.scale[0]).sum(-1)
    np.testing.assert_allclose(predicted.energy, log_scale, atol=1e-5)
    y = start + 2.0 * encoded.scale[0]
    energy = jax.jit(proposal.model.energy)(
        params, batch.history, batch.history.observation[0] + y[:, :2], y[:, 2]
    )
    np.testing.assert_allclose(energy, log_scale + 0.5 * 3 * 4.0, rtol=1e-4)


@pytest.fixture(scope="module")
def langevin():
    chains = {"negatives": "langevin", "num_negatives": 16, "chain_steps": 4}
    return adetm(AdetmConfig(**SIZES, **chains, energy_rows=ROWS), SPEC)


@pytest.fixture(scope="module")
def langevin_state(langevin):
    return jax.jit(langevin.init)(jax.random.key(5), unit_scales())


def test_chains_that_cannot_be_told_from_data_cost_log_17(
    langevin, langevin_state, batch
):
    params = langevin_state.params
    output = jax.tree.map(jnp.zeros_like, params.energy["params"]["output"])
    flat = params._replace(
        energy={"params": {**params.energy["params"], "output": output}}
    )
    update = jax.jit(langevin.update)
    _, metrics = update(jax.random.key(6), langevin_state._replace(params=flat), batch)
    np.testing.assert_allclose(metrics["energy_loss"], np.log(17.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["energy_gap"], 0.0, atol=1e-6)
    assert float(metrics["gradient_penalty"]) == 0.0
    assert float(metrics["loss"]) == pytest.approx(np.log(17.0))
    # Steep energies are penalised: a slope of a costs (a - 5)².
    steep = jax.tree.map(lambda leaf: 1e3 * leaf, params.energy)
    _, metrics = update(
        jax.random.key(6),
        langevin_state._replace(params=params._replace(energy=steep)),
        batch,
    )
    assert float(metrics["gradient_penalty"]) > 1.0
    # Chains and encoder: everything but the scales is trained.
    state, _ = update(jax.random.key(6), langevin_state, batch)
    for part in ("encoder", "energy"):
        assert moved(getattr(params, part), getattr(state.params, part))
    assert params.head == {}


@pytest.mark.parametrize("name", ["proposal", "langevin"])
def test_the_gradient_by_the_target_is_the_finite_difference(name, request, batch):
    model = request.getfixturevalue(name).model
    params = request.getfixturevalue(f"{name}_state").params
    with jax.enable_x64(True):
        params, history = jax.tree.map(
            lambda x: jnp.asarray(
                np.asarray(x), "float64" if x.dtype.kind == "f" else None
            ),
            (params, batch.history),
        )

        @jax.jit
        def energy(y):
            return model.energy(params, history, y[:, :2], y[:, 2])

        y = 0.3 * jnp.sin(jnp.arange(3.0 * ROWS)).reshape(ROWS, 3)
        gradient = jax.jit(jax.grad(lambda y: energy(y).sum()))(y)
        for dim in range(3):
            step = jnp.zeros((1, 3)).at[0, dim].set(1e-7)
            slope = (energy(y + step) - energy(y - step)) / 2e-7
            np.testing.assert_allclose(gradient[:, dim], slope, rtol=1e-4, atol=1e-6)


def test_configs_that_cannot_work_are_refused():
    for wrong, text in (
        ({"newest_probability": 0.0}, "newest_probability=0.0"),
        ({"head_phase": 1.5}, "head_phase=1.5"),
        ({"energy_rows": 512}, "energy_rows=512 exceeds batch_size=256"),
    ):
        with pytest.raises(ValueError, match=text):
            ContrastiveConfig(**wrong)


def test_scales_of_other_data_are_refused(proposal):
    with pytest.raises(ValueError, match=r"fit_scales\(dataset, num_lags=2\)"):
        proposal.init(jax.random.key(7), unit_scales(num_lags=3))
    wide = unit_scales()._replace(action=Normalizer(jnp.zeros(4), jnp.ones(4)))
    with pytest.raises(ValueError, match="scales are for 4 actions, the model has 1"):
        proposal.init(jax.random.key(7), wide)
    one_step = etm(EtmConfig(), SPEC)
    with pytest.raises(ValueError, match="num_lags=1"):
        one_step.init(jax.random.key(7), unit_scales())
