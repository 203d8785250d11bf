"""Chains in row blocks: the same numbers whatever the blocks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import Sampler
from emfuse_jax.loops import run_sampler
from emfuse_jax.samplers import etm_langevin, run_chains, ula

ROWS, STEPS = 37, 10
START = jax.random.normal(jax.random.key(0), (ROWS, 3))
CENTER = jax.random.normal(jax.random.key(1), (ROWS, 3)) / 2


def _bowl(center, noise=0.0):
    def energy_fn(y):
        return 4 * jnp.sum(jnp.square(y - center), axis=-1)

    return etm_langevin(energy_fn, STEPS, noise=noise)


def _run(make_sampler, block_rows, **options):
    run = jax.jit(
        lambda key: run_chains(
            key,
            make_sampler,
            START,
            STEPS,
            condition=CENTER,
            block_rows=block_rows,
            **options,
        )
    )
    return run(jax.random.key(2))


@pytest.mark.full_compile
@pytest.mark.parametrize("block_rows", [1, 8])
def test_deterministic_chains_do_not_depend_on_the_block_size(block_rows):
    whole, _ = _run(_bowl, None)
    blocks, _ = _run(_bowl, block_rows)
    assert blocks.shape == whole.shape
    np.testing.assert_array_equal(blocks, whole)
    assert np.abs(whole - START).max() > 0.1


def test_noise_belongs_to_the_row_and_not_to_the_block():
    def noisy(center):
        return _bowl(center, noise=0.5)

    whole, _ = _run(noisy, None)
    blocks, _ = _run(noisy, 8)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)
    assert np.abs(whole - _run(_bowl, None)[0]).max() > 0.01


def test_a_row_is_run_sampler_with_the_rows_key():
    end, kept = _run(lambda c: _bowl(c, 0.5), 8, keep=lambda s, i: (i.energy, s))
    energies, states = kept
    assert energies.shape == (STEPS, ROWS)
    assert states.position.shape == (STEPS, ROWS, 3)
    np.testing.assert_array_equal(states.position[-1], end)
    for row in (0, ROWS - 1):
        key = jax.random.fold_in(jax.random.key(2), row)
        sampler = _bowl(CENTER[row], 0.5)
        state, _ = run_sampler(key, sampler, START[row], STEPS)
        np.testing.assert_allclose(end[row], state.position, atol=1e-6)


def test_thinned_chains_keep_the_last_of_each_group():
    _, every = _run(_bowl, 8, keep=lambda s, i: s.position)
    _, some = _run(_bowl, 8, keep=lambda s, i: s.position, thin=5)
    np.testing.assert_allclose(some, every[4::5], atol=1e-6)


def test_a_key_per_row_lets_rows_be_split():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(2), jnp.arange(ROWS))
    sampler = ula(lambda y: jnp.sum(jnp.square(y), axis=-1), 0.01)
    run = jax.jit(lambda k, y: run_chains(k, sampler, y, STEPS, block_rows=8)[0])
    whole = run(jax.random.key(2), START)
    np.testing.assert_allclose(run(keys, START), whole, atol=1e-6)
    np.testing.assert_allclose(run(keys[20:], START[20:]), whole[20:], atol=1e-6)


def test_a_network_energy_moves_by_rounding_alone():
    key_in, key_out = jax.random.split(jax.random.key(3))
    weights = jax.random.normal(key_in, (3, 32)), jax.random.normal(key_out, (32,))

    def make_sampler(center):
        def energy_fn(y):
            return jnp.tanh((y - center) @ weights[0]) @ weights[1]

        return etm_langevin(energy_fn, STEPS)

    whole, _ = _run(make_sampler, None)
    blocks, _ = _run(make_sampler, 8)
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-5)


def test_several_chains_may_share_a_condition():
    start = jnp.broadcast_to(START[:, None], (ROWS, 4, 3))

    def make_sampler(center):
        return _bowl(jnp.broadcast_to(center, (4, 3)))

    end, _ = jax.jit(
        lambda k: run_chains(
            k, make_sampler, start, STEPS, condition=CENTER, block_rows=8
        )
    )(jax.random.key(2))
    alone, _ = _run(_bowl, 8)
    np.testing.assert_allclose(end, np.stack([alone] * 4, axis=1), atol=1e-6)


def test_one_trace_for_one_shape():
    counted = chex.assert_max_traces(lambda center: _bowl(center, 0.5).step, n=1)

    def make_sampler(center):
        sampler = _bowl(center, 0.5)
        return Sampler(sampler.init, counted(center))

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(key, start):
        return run_chains(
            key, make_sampler, start, STEPS, condition=CENTER, block_rows=8
        )

    for seed in range(3):
        run(jax.random.key(seed), START)


def test_run_sampler_traces_its_step_once_per_program():
    sampler = _bowl(0.0, 0.5)
    step = chex.assert_max_traces(sampler.step, n=1)
    chex.clear_trace_counter()
    run = jax.jit(lambda k, y: run_sampler(k, Sampler(sampler.init, step), y, STEPS)[0])
    for seed in range(3):
        run(jax.random.key(seed), START)


def test_gradients_flow_through_blocks():
    @jax.jit
    @jax.grad
    def gradient(center):
        end, _ = run_chains(
            jax.random.key(0), _bowl, START, STEPS, condition=center, block_rows=8
        )
        return jnp.sum(end)

    assert (np.asarray(gradient(CENTER)) > 0).any()
    assert np.isfinite(gradient(CENTER)).all()


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (_bowl(0.0), {"condition": CENTER}, "a condition that it cannot see"),
        (_bowl, {}, "no condition to call it with"),
        (_bowl, {"condition": CENTER[1:]}, r"shape \(36, 3\), expected 37 rows"),
        (_bowl(0.0), {"block_rows": 0}, "block_rows=0"),
        (_bowl(0.0), {"thin": 3}, "thin=3 does not divide"),
    ],
)
def test_bad_calls_are_named(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        run_chains(jax.random.key(0), sampler, START, STEPS, **options)
