"""Branch rollouts: a Python loop is the reference; what ended is over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _gaussian_expert import make_history
from emfuse_jax.base import History, Prediction, TransitionModel
from emfuse_jax.dynamics import Rollout, rollout
from emfuse_jax.envs.termination import hopper_terminated

HORIZON, ROWS, LAGS = 6, 5, 3


def never(observation, action, next_observation):
    return jnp.zeros(observation.shape[:-1], bool)


def far(observation, action, next_observation):
    return next_observation[..., 0] > 3.0


def make_model(noise=0.1):
    """Remembers: the next state depends on every valid lag."""

    def predict(params, key, history):
        past = jnp.where(history.valid[..., None], history.observation, 0.0)
        acted = jnp.where(history.valid[..., None], history.action, 0.0)
        state = 0.5 * jnp.sum(past, axis=0) + params * jnp.sum(acted, axis=0)
        state = state + noise * jax.random.normal(key, state.shape)
        return Prediction(
            next_observation=state,
            reward=state[..., 0] - history.action[0, ..., 0],
            uncertainty=jnp.abs(history.observation[0, ..., 0]),
            energy=jnp.zeros(state.shape[:-1]),
        )

    return TransitionModel(predict, lambda *_: None, lambda *_: None)


def policy(key, observation):
    return 0.3 * observation + jax.random.normal(key, observation.shape)


def start(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return History(
        jax.random.normal(keys[0], (LAGS, ROWS, 2)),
        jax.random.normal(keys[1], (LAGS, ROWS, 2)),
        jnp.arange(LAGS)[:, None] <= jnp.array([0, 1, 2, 2, 1])[None],
    )


@pytest.fixture(scope="module")
def run():
    return jax.jit(
        lambda key, history, penalty, above: rollout(
            jnp.float32(0.2),
            key,
            make_model(),
            policy,
            history,
            HORIZON,
            terminated_fn=far,
            penalty=penalty,
            truncate_above=above,
        )
    )


def python_loop(key, history, penalty, above):
    """The same rollout row by row in NumPy arrays, queues and ifs."""
    queue = [np.array(leaf) for leaf in history]
    alive, steps = np.ones(ROWS, bool), []
    for time in range(HORIZON):
        key_policy, key_model = jax.random.split(jax.random.fold_in(key, time))
        state = queue[0][0].copy()
        action = np.asarray(policy(key_policy, jnp.asarray(state)))
        queue[1][0] = action
        predicted = make_model().predict(
            jnp.float32(0.2), key_model, History(*map(jnp.asarray, queue))
        )
        following = np.asarray(predicted.next_observation)
        for row in range(ROWS):
            u = float(predicted.uncertainty[row])
            ended = bool(following[row, 0] > 3.0)
            steps.append(
                {
                    "valid": bool(alive[row]),
                    "reward": float(predicted.reward[row]) - penalty * u,
                    "terminated": ended,
                    "truncated": not ended and (u > above or time == HORIZON - 1),
                    "next": following[row],
                    "state": state[row],
                    "action": action[row],
                }
            )
            alive[row] &= not ended and u <= above
        queue[0] = np.concatenate([following[None], queue[0][:-1]])
        queue[1] = np.concatenate([np.zeros_like(action)[None], queue[1][:-1]])
        queue[2] = np.concatenate([np.ones_like(alive)[None], queue[2][:-1]])
    return {name: np.array([step[name] for step in steps]) for name in steps[0]}


@pytest.mark.parametrize(("penalty", "above"), [(0.7, np.inf), (0.0, 1.5)])
def test_is_the_python_loop(run, penalty, above):
    result = run(jax.random.key(1), start(), penalty, above)
    expected = python_loop(jax.random.key(1), start(), penalty, above)
    ours = {
        "valid": result.valid,
        "reward": result.transition.reward,
        "terminated": result.transition.terminated,
        "truncated": result.transition.truncated,
        "next": result.transition.next_observation,
        "state": result.transition.observation,
        "action": result.transition.action,
    }
    for name, value in ours.items():
        flat = np.asarray(value).reshape(HORIZON * ROWS, *value.shape[2:])
        np.testing.assert_allclose(flat, expected[name], rtol=1e-4, atol=1e-5)
    # The example is not trivial: some rows end early, some do not.
    assert 0 < expected["valid"].mean() < 1


def test_nothing_is_valid_after_an_end(run):
    result = run(jax.random.key(2), start(1), 0.0, 2.0)
    over = np.asarray(result.transition.terminated | result.transition.truncated)
    ended_before = np.cumsum(over, axis=0) - over > 0
    np.testing.assert_array_equal(result.valid, ~ended_before)
    assert (
        (over & ~ended_before).any(axis=0).all()
    )  # each ends, at the latest at the end
    assert not (result.transition.terminated & result.transition.truncated).any()
    # Valid steps follow one another.
    following = result.transition.next_observation[:-1]
    np.testing.assert_array_equal(following, result.transition.observation[1:])


def test_penalty(run):
    free = run(jax.random.key(3), start(2), 0.0, jnp.inf)
    np.testing.assert_array_equal(free.transition.reward, free.reward)
    costly = run(jax.random.key(3), start(2), 2.0, jnp.inf)
    np.testing.assert_array_equal(costly.reward, free.reward)
    np.testing.assert_allclose(
        costly.transition.reward, free.reward - 2.0 * free.uncertainty, rtol=1e-5
    )
    assert float(free.uncertainty.min()) > 0.0


def test_unknown_may_end_an_episode_or_only_its_recording():
    ends = {}
    for unknown in ("truncate", "terminate"):
        result = rollout(
            jnp.float32(0.2),
            jax.random.key(4),
            make_model(),
            policy,
            start(),
            HORIZON,
            terminated_fn=never,
            truncate_above=1.5,
            unknown=unknown,
        )
        beyond = np.asarray(result.uncertainty > 1.5)
        last = np.arange(HORIZON)[:, None] == HORIZON - 1
        if unknown == "truncate":
            np.testing.assert_array_equal(result.transition.truncated, beyond | last)
            assert not result.transition.terminated.any()
        else:
            np.testing.assert_array_equal(result.transition.terminated, beyond)
            np.testing.assert_array_equal(result.transition.truncated, last & ~beyond)
        ends[unknown] = result.valid
    assert not ends["truncate"].all()
    np.testing.assert_array_equal(ends["truncate"], ends["terminate"])


def constant_model(change, *, at=None, **wrong):
    """Moves by ``change``; in the row ``at``, from the second step on, returns ``wrong``."""

    def predict(params, key, history):
        del params, key
        state = history.observation[0] + change
        late = history.valid[1]
        shape = state.shape[:-1]
        answer = Prediction(state, jnp.ones(shape), jnp.ones(shape), jnp.zeros(shape))
        bad = late if at is None else late & (jnp.arange(shape[0]) == at)
        for name, value in wrong.items():
            leaf = getattr(answer, name)
            where = bad.reshape(bad.shape + (1,) * (leaf.ndim - 1))
            answer = answer._replace(**{name: jnp.where(where, value, leaf)})
        return answer

    return TransitionModel(predict, lambda *_: None, lambda *_: None)


def roll(model, observation, *, terminated_fn=never, horizon=4, **options) -> Rollout:
    history = make_history(observation, num_lags=2, action_size=1)
    history = history._replace(valid=history.valid.at[1].set(False))
    return rollout(
        None,
        jax.random.key(0),
        model,
        lambda key, observation: observation[..., :1],
        history,
        horizon,
        terminated_fn=terminated_fn,
        penalty=1.0,
        **options,
    )


@pytest.mark.parametrize("field", ["next_observation", "reward", "uncertainty"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_prediction_that_is_not_finite_cuts_its_row(field, value):
    result = roll(constant_model(0.1, at=1, **{field: value}), jnp.zeros((3, 2)))
    expected = np.ones((4, 3), bool)
    expected[1:, 1] = False
    np.testing.assert_array_equal(result.valid, expected)
    # Nothing that is not finite leaves the rollout, valid or not.
    for leaf in jax.tree.leaves(result):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


@pytest.mark.parametrize("above", [None, 2.0])
@pytest.mark.parametrize("field", ["next_observation", "uncertainty"])
def test_a_halt_value_is_paid_for_what_is_not_even_finite(field, above):
    """As unknown as can be: unpaid and not valid, it would be no warning to a learner."""
    wrong = constant_model(0.1, at=1, **{field: jnp.inf})
    options = {"unknown": "terminate", "truncate_above": above}
    result = roll(wrong, jnp.zeros((3, 2)), halt_value=-7.0, **options)
    expected = np.zeros((4, 3))
    expected[1:, 1] = -7.0
    np.testing.assert_array_equal(result.transition.reward, expected)
    np.testing.assert_array_equal(result.transition.terminated, expected < 0.0)
    valid = np.ones((4, 3), bool)
    valid[2:, 1] = False
    np.testing.assert_array_equal(result.valid, valid)
    for leaf in jax.tree.leaves(result):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    # Without one there is no reward to store: the row ends before the step.
    silent = roll(wrong, jnp.zeros((3, 2)), **options)
    np.testing.assert_array_equal(silent.valid, valid & (expected == 0.0))
    assert not silent.transition.terminated.any()


@pytest.mark.untyped
def test_ends_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="needs unknown='terminate'"):
        roll(constant_model(0.1), jnp.zeros((1, 2)), halt_value=-7.0)
    with pytest.raises(ValueError, match="unknown='halt'; expected truncate or termin"):
        roll(constant_model(0.1), jnp.zeros((1, 2)), unknown="halt")


@pytest.mark.parametrize("size", [150.0, -150.0, -500.0])
def test_hopper_ends_on_a_blow_up_in_either_direction(size):
    upright = jnp.zeros((2, 11)).at[:, 0].set(1.25)
    change = jnp.zeros((1, 11)).at[0, 7].set(size)
    result = roll(constant_model(change), upright, terminated_fn=hopper_terminated)
    np.testing.assert_array_equal(result.transition.terminated[0], [True, True])
    np.testing.assert_array_equal(result.valid[:, 0], [True, False, False, False])
    calm = roll(constant_model(change / 100), upright, terminated_fn=hopper_terminated)
    assert calm.valid.all()
