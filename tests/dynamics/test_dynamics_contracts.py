"""What every dynamics model promises: names, shapes, purity, one trace."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import tree
from emfuse_jax.base import History, Prediction, SpaceSpec
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.dynamics import (
    AdetmConfig,
    Batch,
    EnsembleConfig,
    EtmConfig,
    McetmConfig,
    Scales,
    adetm,
    etm,
    fuse_dynamics,
    gaussian_ensemble,
    mcetm,
)

SPEC = SpaceSpec(observation_size=2, action_size=1)
LAGS, ROWS = 2, 6
SMALL = {"energy_sizes": (8,), "head_sizes": (8,), "batch_size": ROWS, "energy_rows": 4}
SLICES = {
    "num_lags": LAGS,
    "state_features": 8,
    "action_features": 4,
    "num_heads": 2,
}
CHAINS = {"negatives": "langevin", "chain_steps": 3}


def build(name):
    if name == "ensemble":
        return gaussian_ensemble(EnsembleConfig(num_members=2, hidden_sizes=(8,)), SPEC)
    recipe = CHAINS if name.endswith("langevin") else {}
    if name == "mcetm":
        return mcetm(
            McetmConfig(**SMALL, manifold_rows=4, autoencoder_sizes=(8,)), SPEC
        )
    if name.startswith("etm"):
        return etm(EtmConfig(**SMALL, **recipe), SPEC)
    return adetm(AdetmConfig(**SMALL, **SLICES, **recipe), SPEC)


NAMES = ["etm", "etm-langevin", "adetm", "adetm-langevin", "mcetm", "ensemble"]


class Case:
    """A learner, a state and its compiled update, which counts its traces."""

    def __init__(self, name):
        self.learner = build(name)
        num_lags = LAGS if name.startswith("adetm") else 1

        def unit(*shape):
            return Normalizer(jnp.zeros(shape), jnp.ones(shape))

        self.scales = Scales(unit(2), unit(1), unit(num_lags, 3))
        self.state = jax.jit(self.learner.init)(jax.random.key(0), self.scales)
        self.traces = 0

        def update(key, state, batch):
            self.traces += 1
            return self.learner.update(key, state, batch)

        self.update = jax.jit(update)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return Case(request.param)


def zeros():
    history = History(
        jnp.zeros((LAGS, ROWS, 2)),
        jnp.zeros((LAGS, ROWS, 1)),
        jnp.ones((LAGS, ROWS), bool),
    )
    return Batch(history, jnp.zeros(ROWS), jnp.zeros((ROWS, 2)))


def names(function):
    return list(inspect.signature(function).parameters)


def test_argument_names_and_order(case):
    model = case.learner.model
    fused = model
    if model.expert is not None:
        fused = fuse_dynamics([model])
    for each in (model, fused):
        assert names(each.predict) == ["params", "key", "history"]
        assert names(each.energy) == ["params", "history", "next_observation", "reward"]
        assert names(each.uncertainty) == ["params", "history"]
    assert names(case.learner.init) == ["key", "scales"]
    assert names(case.learner.update) == ["key", "state", "batch"]


def test_update_keeps_structure_and_its_input_on_zeros_in_one_trace(case):
    before = jax.tree.map(np.array, case.state)
    state, metrics = case.update(jax.random.key(1), case.state, zeros())
    assert tree.same_structure(state, case.state)
    jax.tree.map(np.testing.assert_array_equal, before, case.state)
    again, _ = case.update(jax.random.key(2), state, zeros())
    assert case.traces == 1
    for leaf in jax.tree.leaves((again, metrics)):
        assert np.isfinite(leaf).all()
    for metric in metrics.values():
        assert metric.shape == ()
    assert any(
        (a != b).any()
        for a, b in zip(
            *map(jax.tree.leaves, (state.params, before.params)), strict=True
        )
    )


@pytest.mark.allow_key_reuse  # under vmap both branches of a cond are taken
def test_update_is_traceable_under_vmap_and_eval_shape(case):
    shapes, _ = jax.eval_shape(
        case.learner.update, jax.random.key(3), case.state, zeros()
    )
    assert tree.same_structure(shapes, case.state)
    seeds = 3
    states = jax.eval_shape(
        jax.vmap(case.learner.init, in_axes=(0, None)),
        jax.random.split(jax.random.key(4), seeds),
        case.scales,
    )
    stacked, metrics = jax.eval_shape(
        jax.vmap(case.learner.update, in_axes=(0, 0, None)),
        jax.random.split(jax.random.key(5), seeds),
        states,
        zeros(),
    )
    assert tree.same_structure(stacked, states)
    assert all(metric.shape == (seeds,) for metric in metrics.values())


def test_the_model_answers_for_any_batch_without_nan(case):
    model, params = case.learner.model, case.state.params
    history = zeros().history

    @jax.jit
    def everything(params, history):
        predicted = model.predict(params, jax.random.key(6), history)
        energy = model.energy(
            params=params,
            history=history,
            next_observation=predicted.next_observation,
            reward=predicted.reward,
        )
        return predicted, energy, model.uncertainty(params, history)

    predicted, energy, uncertainty = everything(params, history)
    assert isinstance(predicted, Prediction)
    assert predicted.next_observation.shape == (ROWS, 2)
    for leaf in (predicted.reward, predicted.energy, energy, uncertainty):
        assert leaf.shape == (ROWS,)
    for leaf in jax.tree.leaves((predicted, energy)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    np.testing.assert_allclose(energy, predicted.energy, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(uncertainty, predicted.uncertainty, rtol=1e-4, atol=1e-6)
    assert (np.asarray(uncertainty) >= 0).all()
    # Rows by themselves, and two batch axes.
    rows = jax.vmap(everything, in_axes=(None, 1))
    grid = History(*(leaf.reshape(LAGS, 2, 3, *leaf.shape[2:]) for leaf in history))
    for shapes, lead in (
        (jax.eval_shape(rows, params, history), (ROWS,)),
        (jax.eval_shape(everything, params, grid), (2, 3)),
    ):
        assert shapes[0].next_observation.shape == (*lead, 2)
        assert shapes[1].shape == shapes[2].shape == lead
