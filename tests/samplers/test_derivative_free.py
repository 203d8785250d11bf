"""The shrinking resampler finds the lowest basin, resamples by weight, stays inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.loops import run_sampler
from emfuse_jax.samplers import derivative_free, lowest_energy

SEEDS, CANDIDATES = 6, 1024


def two_wells(y):
    """The deeper well at 0.37, another half a nat above it at -0.6."""
    near, far = jnp.square((y - 0.37) / 0.05), jnp.square((y + 0.6) / 0.05) + 0.5
    return jnp.minimum(near, far)[..., 0]


@pytest.fixture(scope="module")
def searched():
    key_start, key = jax.random.split(jax.random.key(0))
    start = jax.random.uniform(key_start, (SEEDS, CANDIDATES, 1), minval=-1.0)
    sampler = derivative_free(two_wells)

    @jax.jit
    def search(key, start):
        state, kept = run_sampler(
            key, sampler, start, 3, keep=lambda s, i: (s.position, i)
        )
        return state, kept, lowest_energy(two_wells, state.position)

    return start, *search(key, start)


def test_it_finds_the_deeper_of_two_wells(searched):
    start, _, _, (best, energy) = searched
    np.testing.assert_allclose(best[:, 0], 0.37, atol=5e-4)
    np.testing.assert_allclose(energy, two_wells(best))
    # Six uniform populations alone are not that good.
    uniform, _ = lowest_energy(two_wells, start)
    assert np.abs(uniform[:, 0] - 0.37).max() > 5e-4


def test_candidates_are_drawn_by_weight(searched):
    start, _, (_, info), _ = searched
    np.testing.assert_allclose(info.energy[0], two_wells(start), rtol=1e-6)
    weight = np.asarray(jax.nn.softmax(-two_wells(start), axis=-1), np.float64)
    np.testing.assert_allclose(
        info.effective_size[0], 1 / (weight**2).sum(1), rtol=1e-4
    )
    silent = derivative_free(lambda y: 2.0 * y[..., 0], noise=0.0)
    state, _ = jax.jit(lambda k, y: silent.step(k, silent.init(y)))(
        jax.random.key(3), start
    )
    y = np.asarray(start[..., 0], np.float64)
    weight = np.exp(-2.0 * y) / np.exp(-2.0 * y).sum(1, keepdims=True)
    expected = (weight * y).sum(1)
    error = np.sqrt(((weight * y**2).sum(1) - expected**2) / CANDIDATES)
    drawn = np.asarray(state.position[..., 0])
    assert (np.abs(drawn.mean(1) - expected) < 4 * error).all()
    assert (y.mean(1) - expected > 10 * error).all()
    assert all(np.isin(row, of).all() for row, of in zip(drawn, y, strict=True))


def test_the_noise_shrinks_and_the_box_holds():
    flat = derivative_free(lambda y: 0.0 * y[..., 0], noise=0.2, bounds=(-0.5, 0.5))
    start = jnp.zeros((4096, 1))
    run = jax.jit(
        lambda k: run_sampler(k, flat, start, 8, keep=lambda s, i: s.position)[1]
    )
    kept = np.asarray(run(jax.random.key(1)))[..., 0]
    assert abs(kept).max() <= 0.5
    assert abs(kept[0].std() - 0.2) < 0.01
    # Variances add up: 0.2² (1 + 1/4 + 1/16 + …) = 0.2² · 4/3, less what the box cuts.
    assert 0.2 * 1.05 < kept[-1].std() < 0.2 * np.sqrt(4 / 3) * 1.02


@pytest.mark.parametrize("odd", [jnp.nan, jnp.inf])
def test_a_candidate_without_an_energy_is_never_taken(odd):
    """NaN would win both the least energy and the weights; a row of nothing else stays."""

    def holed(y):
        return jnp.where(y[..., 0] < 0.0, odd, 3.0 * y[..., 0])

    start = jnp.linspace(-1.0, 1.0, 64)[:, None]
    start = jnp.stack([start, -1.0 - jnp.abs(start)])
    silent = derivative_free(holed, noise=0.0, bounds=None)
    moved, info = silent.step(jax.random.key(0), silent.init(start))
    best, energy = lowest_energy(holed, start)
    assert (np.asarray(moved.position[0]) >= 0.0).all()
    assert len(np.unique(moved.position[0])) > 10
    least = np.linspace(-1.0, 1.0, 64)[32]
    np.testing.assert_allclose([best[0, 0], energy[0]], [least, 3 * least], rtol=1e-5)
    # Nothing is known of the second row: all of it is drawn alike.
    assert np.isin(moved.position[1], start[1]).all()
    np.testing.assert_allclose(info.effective_size[1], 64.0, rtol=1e-4)
    assert energy[1] == jnp.inf


def test_refusals():
    with pytest.raises(ValueError, match="temperature=0"):
        derivative_free(two_wells, temperature=0)
    with pytest.raises(ValueError, match="low <= high"):
        derivative_free(two_wells, bounds=(1.0, -1.0))
    with pytest.raises(ValueError, match="shrink=0"):
        derivative_free(two_wells, shrink=0.0)
    with pytest.raises(ValueError, match="noise=-1"):
        derivative_free(two_wells, noise=-1.0)
    with pytest.raises(ValueError, match="one energy per candidate"):
        lowest_energy(lambda y: jnp.sum(y), jnp.zeros((3, 2)))
