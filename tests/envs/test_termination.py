import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.envs.termination import TERMINATED_FNS, get_terminated_fn


def verdict(name, changes, size):
    observation = jnp.zeros(size).at[0].set(1.25)
    changed = observation
    for index, value in changes.items():
        changed = changed.at[index].set(value)
    action = jnp.zeros(3)
    return bool(TERMINATED_FNS[name](observation, action, changed))


@pytest.mark.parametrize(
    ("changes", "hopper", "walker2d", "halfcheetah"),
    [
        ({}, False, False, False),
        ({0: 0.75}, False, True, False),
        ({0: 0.65}, True, True, False),
        ({0: 2.5}, False, True, False),
        ({0: 0.85, 1: 0.19}, False, False, False),
        ({1: 0.21}, True, False, False),
        ({1: -0.21}, True, False, False),
        ({1: 1.05}, True, True, False),
        ({1: -1.05}, True, True, False),
        ({7: 99.0}, False, False, False),
        ({7: -99.0}, False, False, False),
        ({7: 500.0}, True, True, True),
        # The published code takes abs() of the comparison, and lets this pass.
        ({7: -500.0}, True, True, True),
        ({7: np.nan}, True, True, True),
        ({7: -np.inf}, True, True, True),
        ({0: np.nan}, True, True, True),
        ({0: np.inf}, True, True, True),
    ],
)
def test_truth_table(changes, hopper, walker2d, halfcheetah):
    assert verdict("hopper", changes, 11) == hopper
    assert verdict("walker2d", changes, 17) == walker2d
    assert verdict("halfcheetah", changes, 17) == halfcheetah


@pytest.mark.parametrize("name", ["hopper", "walker2d", "halfcheetah"])
def test_agrees_with_the_simulators_own_flag(name):
    env = MujocoBatch(name, 8, seed=0)
    terminated_fn = jax.jit(TERMINATED_FNS[name])
    observation = env.reset().astype(np.float32)
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(150):
        action = rng.uniform(-1, 1, (8, env.spec.action_size)).astype(np.float32)
        following, _, terminated = env.step(action)
        following = following.astype(np.float32)
        verdicts = terminated_fn(observation, action, following)
        np.testing.assert_array_equal(verdicts, terminated)
        count += terminated.sum()
        observation = env.reset(terminated).astype(np.float32)
    assert count > 10 if name != "halfcheetah" else count == 0


def test_batched_shapes():
    for name, fn in TERMINATED_FNS.items():
        size = 11 if name == "hopper" else 17
        observation = jnp.zeros((2, 5, size))
        assert fn(observation, jnp.zeros((2, 5, 3)), observation).shape == (2, 5)


def test_own_functions_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_pendulum.py").write_text(
        "def terminated(observation, action, next_observation):\n"
        "    return next_observation[..., 0] > 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fn = get_terminated_fn("my_pendulum:terminated")
    assert fn(None, None, jnp.array([[2.0], [0.0]])).tolist() == [True, False]
    assert get_terminated_fn("hopper") is TERMINATED_FNS["hopper"]
    with pytest.raises(ValueError, match="no function 'missing'"):
        get_terminated_fn("my_pendulum:missing")
    with pytest.raises(ValueError, match="cannot be imported"):
        get_terminated_fn("no_such_module_at_all:terminated")
    for name in ("ant", "my_pendulum:", ":terminated"):
        with pytest.raises(ValueError, match="known: hopper, walker2d, halfcheetah"):
            get_terminated_fn(name)
