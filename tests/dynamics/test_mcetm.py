"""MC-ETM: what each term identifies, and the pitfalls that it must not fall into."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import History, SpaceSpec
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.dynamics import (
    Batch,
    McetmConfig,
    Scales,
    _manifold,
    fuse_dynamics,
    mcetm,
)
from emfuse_jax.dynamics._energy_model import Rows
from emfuse_jax.dynamics._manifold import manifold_negatives, perturb
from emfuse_jax.dynamics.contrastive import training_rows
from emfuse_jax.dynamics.mcetm import _parts
from emfuse_jax.losses import info_nce, ranking_nce
from emfuse_jax.nets.autoencoder import Autoencoder, autoencoder
from emfuse_jax.tree import same_structure, stack

SPEC = SpaceSpec(observation_size=2, action_size=1)
TINY = McetmConfig(
    energy_sizes=(8,),
    head_sizes=(8,),
    autoencoder_sizes=(8,),
    batch_size=16,
    energy_rows=8,
    manifold_rows=4,
    num_steps=10,
    head_phase=0.5,
)


def unit_scales(obs=2, act=1):
    def unit(*shape):
        return Normalizer(jnp.zeros(shape), jnp.ones(shape))

    return Scales(unit(obs), unit(act), unit(1, obs + 1))


def rows_of(state):
    """Rows whose state is given, with an action that matters to nothing."""
    size = state.shape[0]
    zeros = jnp.zeros((size, 1, 1))
    return Rows(state, zeros, jnp.ones((size, 1), bool), jnp.zeros((size, 2)))


def test_contrast_within_a_condition_leaves_its_constant_free_and_cross_pairs_do_not():
    """P1: the same targets and negatives, energies shifted by c(s, a) per row."""
    key = jax.random.split(jax.random.key(0), 4)
    positive = jax.random.normal(key[0], (200,))
    negative = jax.random.normal(key[1], (200, 4))
    elsewhere = jax.random.normal(key[2], (200,))
    shift = 3.0 * jax.random.normal(key[3], (200,))
    log_q = jnp.zeros(200), jnp.zeros((200, 4))

    def within(c):
        return jnp.mean(ranking_nce(positive + c, negative + c[:, None], *log_q))

    def across(c, other):
        return jnp.mean(info_nce(positive + c, (elsewhere + other)[:, None]))

    same = shift[::-1]
    np.testing.assert_allclose(within(shift), within(0.0 * shift), rtol=1e-5)
    assert abs(across(shift, same) - across(0.0 * shift, 0.0 * shift)) > 0.3


def test_cross_pairs_are_least_at_the_density_of_the_data():
    """Symmetric moves: the loss of ``E = θ s² / 2`` on N(0, 1) is least at θ = 1, for
    every width of the move."""
    state = jax.random.normal(jax.random.key(0), (20_000, 1))
    scales = unit_scales(1)

    @functools.partial(jax.jit, static_argnums=0)
    def slope(width, theta):
        config = dataclasses.replace(TINY, num_cross=1, cross_scales=(width,))
        moved = perturb(jax.random.key(1), rows_of(state), scales, config).anchor[0]

        def loss(theta):
            here, there = (0.5 * theta * x[:, 0] ** 2 for x in (state, moved))
            return info_nce(here, there[:, None])

        each = jax.jacfwd(loss)(theta)
        return jnp.mean(each), jnp.std(each) / jnp.sqrt(len(each))

    for width in (0.3, 2.0):
        mean, error = slope(width, 1.0)
        assert abs(mean) < 4 * error
        for wrong, sign in ((0.7, -1), (1.4, 1)):
            mean, error = slope(width, wrong)
            assert sign * mean > 4 * error


def flat_coder():
    """Two dimensions, of which the code keeps the first: the manifold is a line."""
    return Autoencoder(
        init=lambda key, target: {},
        encode=lambda params, target: target[..., :1],
        decode=lambda params, code: jnp.concatenate([code, 0.0 * code], axis=-1),
    )


def test_decoded_negatives_keep_to_the_surface_and_the_visible_chain_leaves_it():
    """P2: decoded targets alone say nothing about the directions off the manifold."""
    config = dataclasses.replace(TINY, latent_steps=3, visible_steps=4)
    target = 0.2 * jax.random.normal(jax.random.key(0), (2000, 2))
    found = jax.jit(
        lambda target: manifold_negatives(
            jax.random.key(1),
            flat_coder(),
            {},
            lambda y: 0.0 * jnp.sum(y, axis=-1),
            target,
            config,
        )
    )(target)
    np.testing.assert_array_equal(found.decoded[:, 1], 0.0)
    # A flat energy: both chains are random walks of known variance.
    expected = np.sqrt(2 * config.visible_step * config.visible_steps)
    assert np.std(found.visible[:, 1]) == pytest.approx(expected, rel=0.1)
    assert (np.abs(found.decoded) <= 1.0).all()
    with pytest.raises(ValueError, match="visible_steps=0 at least 1: decoded targets"):
        McetmConfig(visible_steps=0)


def test_the_latent_chain_descends_the_conditional_energy():
    config = dataclasses.replace(TINY, latent_steps=40, latent_step=0.01)

    @jax.jit
    def run(center):
        found = manifold_negatives(
            jax.random.key(1),
            flat_coder(),
            {},
            lambda y: 50.0 * jnp.square(y[..., 0] - center),
            jnp.zeros((500, 2)),
            config,
        )
        return found.decoded[:, 0]

    # Curvature 100: the clipped drift moves by at most 0.1 a step, and 40 suffice.
    assert np.mean(run(0.5)) == pytest.approx(0.5, abs=0.03)
    assert np.mean(run(-0.3)) == pytest.approx(-0.3, abs=0.03)


def test_autoencoder_bounds_its_code_and_refuses_one_that_is_no_manifold():
    coder = autoencoder(3, 2, (8,))
    params = jax.jit(coder.init)(jax.random.key(0), jnp.zeros((1, 3)))
    code = coder.encode(params, 1e3 * jax.random.normal(jax.random.key(1), (50, 3)))
    assert code.shape == (50, 2)
    assert (np.abs(code) <= 1.0).all()
    assert coder.decode(params, code).shape == (50, 3)
    for size in (0, 3):
        with pytest.raises(ValueError, match=f"latent_size={size} must be at least 1"):
            autoencoder(3, size)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cross_scales": (0.0,)}, "cannot be compared between states"),
        ({"num_cross": 0}, "num_cross=0 must be at least 1"),
        ({"code_noise": (0.5, 0.1)}, "expected \\(smallest, largest\\)"),
        ({"manifold_rows": 65}, "between 1 and energy_rows=64"),
        ({"magnitude_weight": -1.0}, "magnitude_weight=-1.0 must not be negative"),
        ({"cross_weight": float("nan")}, "cross_weight=nan must not be negative"),
        ({"cross_scales": (0.1, float("nan"))}, "cannot be compared between states"),
        ({"code_jitter": -0.1}, "code_jitter=-0.1 must not be negative"),
        ({"latent_step": 0.0}, "latent_step=0.0 must be positive"),
        ({"visible_step": -1e-3}, "visible_step=-0.001 must be positive"),
        ({"negatives": "langevin", "batch_size": 63}, "at most batch_size=63"),
    ],
)
def test_settings_that_would_lose_the_point_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        McetmConfig(**changes)


@pytest.fixture(scope="module")
def trained():
    """A state after the head's phase, and the update that the others share."""
    learner = mcetm(TINY, SPEC)
    update = jax.jit(learner.update)
    state = jax.jit(learner.init)(jax.random.key(0), unit_scales())
    return learner, update, state._replace(step=jnp.asarray(5, jnp.int32))


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(3), 3)
    history = History(
        jax.random.normal(keys[0], (1, 16, 2)),
        jax.random.normal(keys[1], (1, 16, 1)),
        jnp.ones((1, 16), bool),
    )
    following = history.observation[0] + 0.1 * jax.random.normal(keys[2], (16, 2))
    return Batch(history, jnp.zeros(16), following)


def moved(before, after):
    return any(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    )


def test_each_part_trains_on_its_own_loss_and_when_it_should(trained, batch):
    """The same key and batch before and after the head's phase: the energy's terms come in,
    and no gradient of them reaches what the residuals are made of."""
    _, update, state = trained
    early = state._replace(step=jnp.zeros((), jnp.int32))
    first, metrics = update(jax.random.key(1), early, batch)
    assert float(metrics["cross_loss"]) == float(metrics["manifold_loss"]) == 0.0
    assert moved(early.params.autoencoder, first.params.autoencoder)
    assert not moved(early.params.energy, first.params.energy)
    after, metrics = update(jax.random.key(1), state, batch)
    assert float(metrics["cross_loss"]) > 0.0
    assert float(metrics["manifold_loss"]) != 0.0
    assert moved(state.params.energy, after.params.energy)
    assert not moved(first.params.head, after.params.head)
    assert not moved(first.params.autoencoder, after.params.autoencoder)
    assert all(np.isfinite(v) for v in metrics.values())


def test_with_chains_for_negatives_all_terms_train_from_the_first_step(batch):
    config = dataclasses.replace(TINY, negatives="langevin", chain_steps=2)
    learner = mcetm(config, SPEC)
    state = jax.jit(learner.init)(jax.random.key(0), unit_scales())
    new, metrics = jax.jit(learner.update)(jax.random.key(1), state, batch)
    assert same_structure(new, state)
    assert float(metrics["cross_loss"]) > 0.0
    assert float(metrics["manifold_loss"]) != 0.0
    assert moved(state.params.energy, new.params.energy)
    assert moved(state.params.autoencoder, new.params.autoencoder)
    assert all(np.isfinite(v) for v in metrics.values())


def test_the_condition_is_read_once_for_all_steps_of_a_chain(trained, batch):
    _, _, state = trained
    _, parts = _parts(TINY, SPEC)
    count = 0

    def prepare(params, feature):
        nonlocal count
        count += 1
        return parts.forward.prepare(params, feature)

    counting = parts._replace(forward=parts.forward._replace(prepare=prepare))

    def energies(params, target):
        rows = training_rows(jax.random.key(0), batch, "current", 1.0)
        scale, encoded = parts.scale(params, rows), parts.encode(params, rows)
        energy = counting.conditional(params, encoded, scale)
        return energy(target), energy(2.0 * target)

    shapes = jax.eval_shape(energies, state.params, jnp.zeros((16, 3)))
    assert [shape.shape for shape in shapes] == [(16,), (16,)]
    assert count == 1


@pytest.mark.parametrize(("weight", "moves"), [(0.0, 0), (1e-3, 1)])
def test_neighbours_are_not_encoded_for_nothing(
    trained, batch, monkeypatch, weight, moves
):
    made = []

    def counting(*args):
        made.append(1)
        return perturb(*args)

    monkeypatch.setattr(_manifold, "perturb", counting)
    config = dataclasses.replace(TINY, cross_weight=0.0, magnitude_weight=weight)
    _, _, state = trained
    jax.eval_shape(mcetm(config, SPEC).update, jax.random.key(0), state, batch)
    assert len(made) == moves


def test_two_equal_experts_fuse_to_one(trained, batch):
    learner, _, state = trained
    fused = fuse_dynamics(learner.model)
    params = stack([state.params, state.params])
    one, two = jax.jit(
        lambda *both: (
            learner.model.predict(both[0], jax.random.key(2), batch.history),
            fused.predict(both[1], jax.random.key(2), batch.history),
        )
    )(state.params, params)
    np.testing.assert_allclose(one.next_observation, two.next_observation, atol=1e-5)
    np.testing.assert_allclose(one.energy, two.energy, rtol=1e-4, atol=1e-4)
