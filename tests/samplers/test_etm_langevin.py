"""The chain of energy transition models: its schedule, its reach and its floor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _standard_errors
from emfuse_jax.energy import pool_energies
from emfuse_jax.loops import run_sampler
from emfuse_jax.samplers import etm_langevin, etm_schedule


def _bowl(center, stiffness=10.0):
    return lambda y: stiffness * jnp.sum(jnp.square(y - center), axis=-1)


def _end(sampler, num_steps, *, seed=0, start=None):
    start = jnp.zeros(1) if start is None else start
    run = jax.jit(lambda k, y: run_sampler(k, sampler, y, num_steps)[0].position)
    return np.asarray(run(jax.random.key(seed), start))


@pytest.mark.parametrize(
    ("num_steps", "last", "total"),
    [(30, 1e-5, 1.0174), (100, 1e-5, 3.3508), (50, 1e-3, 1.7168)],
)
def test_schedule_sums(num_steps, last, total):
    values = jax.vmap(etm_schedule(num_steps, 0.1, last))(jnp.arange(num_steps))
    np.testing.assert_allclose(values.sum(), total, atol=5e-5)
    np.testing.assert_allclose(values[jnp.array([0, -1])], [0.1, last], rtol=1e-5)


def test_a_schedule_of_one_step_and_of_none():
    np.testing.assert_allclose(etm_schedule(1)(0), 0.1)
    with pytest.raises(ValueError, match="num_steps=0"):
        etm_schedule(0)


def test_steps_are_the_published_ones():
    """Clamp the gradient, scale both terms by the rate, clamp the step and the box."""

    def energy_fn(y):
        return jnp.sum(20 * jnp.cos(3 * y) + jnp.sin(7 * y), axis=-1)

    key, num_steps = jax.random.key(0), 50
    start = jax.random.uniform(jax.random.key(1), (6, 4), minval=-1.0, maxval=1.0)
    sampler = etm_langevin(energy_fn, num_steps)
    _, kept = jax.jit(
        lambda k, y: run_sampler(k, sampler, y, num_steps, keep=lambda s, i: s.position)
    )(key, start)
    position, worst = np.asarray(start, np.float64), 0.0
    clamped = np.zeros(3)
    for step in range(num_steps):
        noise = jax.random.normal(jax.random.fold_in(key, step), (6, 4))
        rate = (0.1 - 0.001) * (1 - step / 49) ** 2 + 0.001
        slope = -60 * np.sin(3 * position) + 7 * np.cos(7 * position)
        # The published code subtracts its noise; the law of the chain is the same.
        move = rate * (0.5 * np.clip(slope, -10, 10) - 0.5 * np.asarray(noise))
        free = position - np.clip(move, -0.5, 0.5)
        clamped += [
            (abs(slope) > 10).sum(),
            (abs(move) > 0.5).sum(),
            (free > 1.1).sum(),
        ]
        position = np.clip(free, -1.1, 1.1)
        worst = max(worst, np.abs(np.asarray(kept[step]) - position).max())
        position = np.asarray(kept[step], np.float64)  # compare single steps
    assert worst < 2e-6
    assert (clamped > 0).all()  # every clamp was at work


def test_reach_of_a_tightly_clipped_chain():
    """Pitfall: clip 0.5 and 30 steps stop at .2544, whatever the minimum."""
    tight = etm_langevin(_bowl(0.9), 30, last=1e-5, noise=0.0, drift_clip=0.5)
    np.testing.assert_allclose(_end(tight, 30), 0.2544, atol=1e-4)
    wide = etm_langevin(_bowl(0.9), 50, last=1e-5, noise=0.0)
    np.testing.assert_allclose(_end(wide, 50), 0.9, atol=1e-4)


def test_the_clip_rate_tells_that_the_chain_is_out_of_reach():
    rates = []
    for clip in (0.5, 10.0):
        sampler = etm_langevin(_bowl(0.9), 30, last=1e-5, noise=0.0, drift_clip=clip)
        run = jax.jit(
            lambda k, y, sampler=sampler: run_sampler(
                k, sampler, y, 30, keep=lambda s, info: info.drift_clip_rate
            )
        )
        rates.append(run(jax.random.key(0), jnp.zeros(1))[1])
    assert rates[0][-1] == 1.0
    assert rates[1][0] == 1.0
    assert rates[1][-1] == 0.0


def test_only_noisy_chains_have_a_floor():
    """Pitfall: noisy chains differ on one and the same energy, whatever is known."""
    start = jnp.full((4000, 1), 0.2)
    noisy = _end(etm_langevin(_bowl(0.2, 2.0), 30, last=1e-5), 30, start=start)
    still = etm_langevin(_bowl(0.2, 2.0), 30, last=1e-5, noise=0.0)
    ends = _end(still, 30, start=start)
    assert np.ptp(ends) == 0.0
    np.testing.assert_array_equal(ends, _end(still, 30, seed=1, start=start))
    # No clip is near, so that y ← (1 - 2 η) y + ½ η ε around the minimum.
    variance = 0.0
    for rate in np.asarray(jax.vmap(etm_schedule(30, 0.1, 1e-5))(jnp.arange(30))):
        variance = (1 - 2 * rate) ** 2 * variance + (0.5 * rate) ** 2
    squares = (noisy[:, 0] - noisy.mean()) ** 2
    _standard_errors.assert_mean_close(squares, variance, std=np.sqrt(2) * variance)
    assert noisy.std() > 0.02


def test_fused_quadratics_end_at_the_precision_weighted_mean():
    centers, stiffness = np.array([-0.6, 0.5]), np.array([4.0, 12.0])
    weights = jnp.array([0.7, 0.3])
    members = [_bowl(c, q) for c, q in zip(centers, stiffness, strict=True)]
    precision = np.asarray(weights) * stiffness
    sampler = etm_langevin(pool_energies(members, weights), 50, last=1e-5, noise=0.0)
    expected = precision @ centers / precision.sum()
    np.testing.assert_allclose(_end(sampler, 50), expected, atol=2e-4)
    assert abs(expected - np.asarray(weights) @ centers) > 0.1


def test_fused_quadratics_in_different_boxes():
    """Experts scaled by w_i meet in z, where y_i = (W / w_i) z and W = max_i w_i."""
    centers, stiffness = np.array([0.3, 0.8]), np.array([6.0, 5.0])
    scales, weights = np.array([2.0, 0.5]), jnp.array([0.5, 0.5])
    ratios = scales.max() / scales

    def member(index):
        bowl = _bowl(centers[index], stiffness[index])
        return lambda z: bowl(ratios[index] * z)

    fused = pool_energies([member(0), member(1)], weights)
    sampler = etm_langevin(fused, 50, last=1e-5, noise=0.0, first=0.02)
    raw = scales.max() * _end(sampler, 50)
    precision = np.asarray(weights) * stiffness / scales**2
    expected = precision @ (scales * centers) / precision.sum()
    np.testing.assert_allclose(raw, expected, atol=5e-4)
    assert abs(expected - scales.max() * np.asarray(weights) @ centers) > 0.1
