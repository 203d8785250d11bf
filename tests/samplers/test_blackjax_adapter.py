"""blackjax's kernels and diagnostics behind our interface."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _standard_errors
from emfuse_jax.loops import run_sampler
from emfuse_jax.samplers import (
    effective_sample_size,
    from_blackjax,
    potential_scale_reduction,
    run_chains,
)


def _unit(position):
    return 0.5 * jnp.sum(jnp.square(position), axis=-1)


def _two_wells(position):
    """Wells near -1 and 1, the right one shallower."""
    return jnp.sum(jnp.square(jnp.square(position) - 1) + 0.4 * position, axis=-1)


def _run(energy_fn, start, num_steps, *, step_size):
    sampler = from_blackjax(blackjax.mala, energy_fn, step_size=step_size)
    run = jax.jit(lambda k, y: run_sampler(k, sampler, y, num_steps)[0].position)
    return np.asarray(run(jax.random.key(0), start)[:, 0])


def test_mala_is_unbiased_where_ula_is_not():
    """The same h = 0.5 at which ULA settles at 4/3."""
    start = jax.random.normal(jax.random.key(1), (20_000, 1))
    squares = _run(_unit, start, 30, step_size=0.5) ** 2
    error = _standard_errors.assert_mean_close(squares, 1.0, std=np.sqrt(2))
    assert 20 * error < 1 / 3


def test_two_wells_are_occupied_as_quadrature_says():
    grid = np.linspace(-4, 4, 8001)
    density = np.exp(-((grid**2 - 1) ** 2 + 0.4 * grid))
    left = density[grid < 0].sum() / density.sum()
    start = jnp.where(jnp.arange(4000) % 2 == 0, 1.0, -1.0)[:, None]
    in_left = _run(_two_wells, start, 150, step_size=0.3) < 0
    error = _standard_errors.assert_mean_close(
        in_left, left, std=np.sqrt(left * (1 - left))
    )
    assert left - 0.5 > 10 * error


def test_acceptance_goes_to_one_with_the_step_size():
    start = jax.random.normal(jax.random.key(1), (500, 5))

    @jax.jit
    def acceptance_rate(step_size):
        sampler = from_blackjax(blackjax.mala, _unit, step_size=step_size)
        _, info = sampler.step(jax.random.key(0), sampler.init(start))
        return jnp.mean(info.acceptance_rate)

    rates = [acceptance_rate(step_size) for step_size in (0.5, 0.05, 1e-4)]
    assert rates[0] < rates[1] < rates[2]
    assert rates[0] < 0.95
    assert rates[2] > 0.999


def test_batches_of_any_rank_and_row_blocks():
    sampler = from_blackjax(
        blackjax.hmc,
        _unit,
        step_size=0.3,
        inverse_mass_matrix=jnp.ones(2),
        num_integration_steps=3,
    )
    key = jax.random.key(0)
    for batch in ((), (3,), (3, 2)):
        shape = jax.eval_shape(sampler.step, key, sampler.init(jnp.ones((*batch, 2))))
        assert shape[0].position.shape == (*batch, 2)
        assert shape[1].is_accepted.shape == batch
    run = jax.jit(lambda k, y: run_chains(k, sampler, y, 3, block_rows=4)[0])
    assert run(key, jnp.ones((6, 2))).shape == (6, 2)


def test_an_algorithm_without_a_chain_is_refused():
    with pytest.raises(ValueError, match="without a position"):
        from_blackjax(lambda *_: blackjax.sgld(lambda *_: 0.0), _unit).init(jnp.ones(2))


@pytest.fixture(scope="module")
def autoregressive():
    """Four AR(1) chains, correlation 0.6 from step to step, variance 1."""

    def step(position, noise):
        position = 0.6 * position + 0.8 * noise
        return position, position

    noise = jax.random.normal(jax.random.key(0), (4000, 4, 2))
    first = jax.random.normal(jax.random.key(1), (4, 2))
    return jax.lax.scan(step, first, noise)[1]


@pytest.mark.allow_rank_promotion
def test_effective_sample_size_of_an_autoregressive_chain(autoregressive):
    expected = 16_000 * (1 - 0.6) / (1 + 0.6)
    sizes = jax.jit(effective_sample_size)(autoregressive)
    assert sizes.shape == (2,)
    np.testing.assert_allclose(sizes, expected, rtol=0.15)  # a quarter of the draws


@pytest.mark.allow_rank_promotion
def test_rhat_tells_whether_chains_agree(autoregressive):
    np.testing.assert_allclose(
        potential_scale_reduction(autoregressive), 1.0, atol=0.01
    )
    apart = autoregressive + jnp.arange(4.0)[None, :, None]
    assert (potential_scale_reduction(apart) > 1.3).all()
    with pytest.raises(ValueError, match="at least two"):
        potential_scale_reduction(autoregressive[:, :1])
