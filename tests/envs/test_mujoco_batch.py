import warnings

import numpy as np
import pytest

from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.envs.mujoco_table import ENVIRONMENTS, Physics

GYM_NAMES = {"hopper": "Hopper", "walker2d": "Walker2d", "halfcheetah": "HalfCheetah"}


def gym_steps(name, version, seed, action_fn, num_steps):
    import gymnasium

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gymnasium.make(f"{GYM_NAMES[name]}-{version}").unwrapped
        observation, _ = env.reset(seed=seed)
        rows = [(observation, 0.0, False)]
        for _ in range(num_steps):
            rows.append(env.step(action_fn(rows[-1][0]))[:3])
        env.close()
    return rows


def feedback(name):
    """A linear policy of no randomness, chosen to keep the walkers up for a while."""
    shape, scale, seed = {
        "hopper": ((3, 11), 0.3, 16),
        "walker2d": ((6, 17), 0.1, 50),
        "halfcheetah": ((6, 17), 0.3, 1),
    }[name]
    gain = scale * np.random.default_rng(seed).standard_normal(shape)
    return lambda observation: np.tanh(gain @ observation).astype(np.float32)


@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("name", list(ENVIRONMENTS))
def test_a_thousand_steps_equal_gymnasium_bit_for_bit(name, version):
    """The time limit's worth, from upright to fallen and on the floor."""
    act = feedback(name)
    expected = gym_steps(name, version, 3, act, 1000)
    env = MujocoBatch(name, 1, version=version, seed=3)
    observation = env.reset()
    np.testing.assert_array_equal(observation[0], expected[0][0])
    assert observation.dtype == np.float64
    for row in expected[1:]:
        observation, reward, terminated = env.step(act(observation[0])[None])
        np.testing.assert_array_equal(observation[0], row[0])
        assert reward[0] == pytest.approx(row[1], abs=1e-7)
        assert bool(terminated[0]) == row[2]
    fallen = [row[2] for row in expected]
    assert fallen.index(True) > 20 if name != "halfcheetah" else not any(fallen)


@pytest.mark.parametrize("name", ["hopper", "walker2d"])
def test_v4_pays_the_alive_bonus_on_the_fall_and_v5_does_not(name):
    rewards = {}
    for version in ("v4", "v5"):
        env = MujocoBatch(name, 1, version=version)
        env.reset()
        terminated = np.array([False])
        for _ in range(300):
            _, reward, terminated = env.step(
                np.ones((1, env.spec.action_size), np.float32)
            )
            if terminated[0]:
                break
        assert terminated[0]
        rewards[version] = reward[0]
    # Walker2d's foot friction differs too, so only Hopper's rewards are comparable
    # exactly.
    gap = rewards["v4"] - rewards["v5"]
    assert gap == pytest.approx(1.0, abs=1e-9 if name == "hopper" else 0.5)


@pytest.mark.parametrize("name", list(ENVIRONMENTS))
def test_set_state_continues_bit_for_bit(name):
    def run(env, steps, seed):
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(steps):
            action = rng.uniform(-1, 1, (3, env.spec.action_size)).astype(np.float32)
            observation, reward, terminated = env.step(action)
            rows.append(np.concatenate([observation, reward[:, None]], axis=1))
            if terminated.any():
                env.reset(terminated)
        return np.array(rows)

    env = MujocoBatch(name, 3, seed=5)
    env.reset()
    run(env, 40, 0)
    state = env.get_state()
    expected = run(env, 60, 1)
    other = MujocoBatch(name, 3, seed=99)
    other.set_state(state)
    np.testing.assert_array_equal(run(other, 60, 1), expected)
    # Without the state, the run differs.
    assert not np.array_equal(run(MujocoBatch(name, 3, seed=99), 60, 1), expected)


def test_environments_of_one_batch_and_of_neighbouring_seeds_start_differently():
    first, second = MujocoBatch("hopper", 4, seed=0), MujocoBatch("hopper", 4, seed=1)
    starts = np.concatenate([first.reset(), second.reset()])
    assert len(np.unique(starts, axis=0)) == 8
    first.seed(0)
    np.testing.assert_array_equal(first.reset(), starts[:4])


def test_masks_leave_the_other_environments_alone():
    env = MujocoBatch("hopper", 2, seed=0)
    before = env.reset()
    mask = np.array([True, False])
    after, _, _ = env.step(np.ones((2, 3), np.float32), mask)
    assert not np.array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1], before[1])
    again = env.reset(mask)
    np.testing.assert_array_equal(again[1], before[1])


def test_oracle_step_repeats_a_recorded_step():
    env = MujocoBatch("walker2d", 2, seed=1)
    env.reset()
    rng = np.random.default_rng(0)
    errors, spreads = [], []
    for _ in range(30):
        qpos, qvel = env.positions()
        action = rng.uniform(-1, 1, (2, 6)).astype(np.float32)
        guess, guess_reward, _ = env.oracle_step(qpos, qvel, action)
        other, _, _ = env.oracle_step(qpos, qvel, np.zeros_like(action))
        truth, reward, terminated = env.step(action)
        errors.append(np.abs(guess - truth).max() + np.abs(guess_reward - reward).max())
        spreads.append(np.abs(other - truth).max())
        if terminated.any():
            env.reset(terminated)
    assert max(errors) < 1e-6 < np.median(spreads)


@pytest.mark.parametrize("factor", ["gravity", "friction", "mass", "damping", "gear"])
def test_each_physics_factor_changes_the_motion(factor):
    stock, changed = (
        MujocoBatch("hopper", 1, physics=physics)
        for physics in (Physics(), Physics(**{factor: 1.5}))
    )
    stock.reset()
    changed.reset()
    for _ in range(20):
        action = np.full((1, 3), 0.5, np.float32)
        left, right = stock.step(action)[0], changed.step(action)[0]
    assert np.abs(left - right).max() > 1e-4


def test_doubled_gravity_doubles_free_fall():
    def fall(gravity):
        env = MujocoBatch("hopper", 1, physics=Physics(gravity=gravity))
        qpos, qvel = env.positions()
        qpos[:, 1] += 1.0
        after, _, _ = env.oracle_step(qpos, np.zeros_like(qvel), np.zeros((1, 3)))
        return after[0, 0] - qpos[0, 1]

    # 9.81 t²/2 with the joints' own forces at zero in the air.
    assert fall(1.0) == pytest.approx(-9.81 * 0.008**2 / 2, rel=1e-2)
    assert fall(2.0) / fall(1.0) == pytest.approx(2.0, rel=1e-2)


def test_bad_input_names_the_value_and_the_fix():
    with pytest.raises(
        ValueError, match=r"'ant'; known: hopper, walker2d, halfcheetah"
    ):
        MujocoBatch("ant", 1)
    with pytest.raises(ValueError, match="v3"):
        MujocoBatch("hopper", 1, version="v3")
    with pytest.raises(ValueError, match="num_envs=0"):
        MujocoBatch("hopper", 0)
    with pytest.raises(ValueError, match="mass=0"):
        MujocoBatch("hopper", 1, physics=Physics(mass=0.0))
    with pytest.raises(ValueError, match="gravity=nan"):
        MujocoBatch("hopper", 1, physics=Physics(gravity=float("nan")))
    env = MujocoBatch("hopper", 1)
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        env.step(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="1 action values are NaN"):
        env.step(np.array([[0.0, np.nan, 0.0]]))
    with pytest.raises(ValueError, match="needs"):
        env.set_state(MujocoBatch("hopper", 2).get_state())
