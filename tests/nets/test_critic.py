"""Q-ensembles and actor heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import tree
from emfuse_jax.nets.critic import ensemble, gaussian_actor, q_ensemble
from emfuse_jax.nets.mlp import mlp


def test_ensemble_equals_its_members_one_by_one():
    member = mlp(1, (16, 16))
    critic = q_ensemble(3, (16, 16))
    observation = jax.random.normal(jax.random.key(1), (5, 4))
    action = jax.random.normal(jax.random.key(2), (5, 2))
    params = critic.init(jax.random.key(0), observation, action)
    q = critic.apply(params, observation, action)
    assert q.shape == (3, 5)
    for one, expected in zip(tree.unstack(params), q, strict=True):
        np.testing.assert_allclose(
            member.apply(one, observation, action)[:, 0], expected, rtol=1e-5, atol=1e-6
        )
    # Independent members: no two agree.
    assert np.abs(q[0] - q[1]).max() > 1e-3


def test_ensemble_needs_a_member():
    with pytest.raises(ValueError, match="num_members=0"):
        ensemble(mlp(1, ()), 0)


def test_actor_clips_the_log_standard_deviation():
    actor = gaussian_actor(2, (8,), log_std_bounds=(-1.0, 0.5))
    params = actor.init(jax.random.key(0), jnp.zeros(3))
    observation = 100.0 * jax.random.normal(jax.random.key(1), (64, 3))
    mean, log_std = actor.apply(params, observation)
    assert mean.shape == log_std.shape == (64, 2)
    assert log_std.min() == -1.0
    assert log_std.max() == 0.5
    with pytest.raises(ValueError, match="low < high"):
        gaussian_actor(2, (8,), log_std_bounds=(1.0, 1.0))
