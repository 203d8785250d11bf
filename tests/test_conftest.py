"""The checks of conftest.py fire, and its markers relax them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _standard_errors
from emfuse_jax import numerics


def _promote():
    return jnp.ones((2, 3)) + jnp.ones(3)


def _reuse():
    key = jax.random.key(0)
    return jax.random.normal(key) + jax.random.uniform(key)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        _promote()


@pytest.mark.allow_rank_promotion
def test_rank_promotion_can_be_allowed():
    assert _promote().shape == (2, 3)


def test_key_reuse_raises():
    with pytest.raises(jax.errors.KeyReuseError):
        _reuse()


@pytest.mark.allow_key_reuse
def test_key_reuse_can_be_allowed():
    assert jnp.isfinite(_reuse())


def test_annotations_are_enforced():
    with pytest.raises(TypeError, match="masked_mean"):
        numerics.masked_mean([1.0], jnp.ones(1))


@pytest.mark.untyped
def test_annotations_can_be_switched_off():
    with pytest.raises(AttributeError):
        numerics.masked_mean([1.0], jnp.ones(1))


def test_assert_mean_close_knows_the_standard_error():
    draws = np.random.default_rng(0).normal(size=(10_000, 2))
    error = _standard_errors.assert_mean_close(draws, [0.0, 0.0])
    np.testing.assert_allclose(error, 0.01, rtol=0.05)
    with pytest.raises(AssertionError, match="standard"):
        _standard_errors.assert_mean_close(draws, [0.0, 0.1])
    # A hundred times fewer independent draws: the same distance is no evidence.
    _standard_errors.assert_mean_close(draws, [0.0, 0.1], effective_size=100)


def test_compiling_takes_most_of_the_time_and_is_cut_short():
    assert jax.config.values["jax_disable_most_optimizations"]


@pytest.mark.full_compile
def test_programs_can_be_optimised():
    assert not jax.config.values["jax_disable_most_optimizations"]
