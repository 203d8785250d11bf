import jax
import numpy as np
import pytest

from emfuse_jax.data.behaviour import (
    LAYERS,
    Behaviour,
    Linear,
    behaviour_act,
    load_behaviour,
    packaged_behaviours,
    random_act,
    save_behaviour,
)


def policy(seed=0, hidden=8, observation=5, action=2):
    rng = np.random.default_rng(seed)
    sizes = [
        (hidden, observation),
        (hidden, hidden),
        (action, hidden),
        (action, hidden),
    ]
    return Behaviour(
        *(
            Linear(
                rng.standard_normal(size).astype(np.float32),
                rng.standard_normal(size[0]).astype(np.float32),
            )
            for size in sizes
        )
    )


def arrays(policy):
    return {
        f"{name}.{part}": getattr(getattr(policy, name), part)
        for name in LAYERS
        for part in ("weight", "bias")
    }


def test_round_trip(tmp_path):
    save_behaviour(tmp_path / "p.npz", policy())
    loaded = load_behaviour(tmp_path / "p.npz")
    assert loaded.spec == (5, 2)
    for left, right in zip(loaded, policy(), strict=True):
        np.testing.assert_array_equal(left.weight, right.weight)
        np.testing.assert_array_equal(left.bias, right.bias)


def test_forward_by_hand():
    weights = policy()
    observation = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    hidden = observation
    for layer in (weights.fc0, weights.fc1):
        hidden = np.maximum(
            np.einsum("oi,bi->bo", layer.weight, hidden) + layer.bias, 0
        )
    mean = np.einsum("oi,bi->bo", weights.last_fc.weight, hidden) + weights.last_fc.bias
    action = behaviour_act(weights, noise=0.0)(jax.random.key(0), observation)
    np.testing.assert_allclose(action, np.tanh(mean), rtol=1e-5, atol=1e-6)
    assert action.dtype == np.float32


def test_noise_has_the_stated_spread_and_follows_the_key():
    weights = policy()
    zero = Linear(
        np.zeros((2, 8), np.float32), np.log(np.array([0.1, 9.0], np.float32))
    )
    # The mean is 0 and the second log standard deviation, ln 9 > 2, is clipped.
    weights = weights._replace(
        last_fc=Linear(zero.weight, np.zeros(2, np.float32)), last_fc_log_std=zero
    )
    act = behaviour_act(weights)
    observation = np.zeros((20_000, 5), np.float32)
    action = act(jax.random.key(0), observation)
    position = np.arctanh(np.clip(action[:, 0].astype(np.float64), -1 + 1e-9, 1 - 1e-9))
    # The standard error of a standard deviation is σ / sqrt(2 n).
    assert position.std() == pytest.approx(0.1, abs=4 * 0.1 / np.sqrt(2 * 20_000))
    # P(|tanh(σ ε)| < 1/2) for σ = e²: clipped or not, 0.0592 against 0.0486 for σ = 9.
    inside = (np.abs(action[:, 1]) < 0.5).mean()
    assert inside == pytest.approx(0.0592, abs=4 * np.sqrt(0.0592 / 20_000))
    np.testing.assert_array_equal(action, act(jax.random.key(0), observation))
    assert not np.array_equal(action, act(jax.random.key(1), observation))


def test_random_actions_are_uniform():
    action = random_act(3)(jax.random.key(0), np.zeros((5000, 4)))
    assert action.shape == (5000, 3)
    assert action.var() == pytest.approx(1 / 3, abs=0.02)


def test_bad_files_are_refused_by_name(tmp_path):
    path = tmp_path / "p.npz"
    with pytest.raises(FileNotFoundError, match="no behaviour policy 'hopper_best'"):
        load_behaviour("hopper_best")
    path.write_text("no archive")
    with pytest.raises(ValueError, match=r"p.npz: not a readable"):
        load_behaviour(path)
    given = arrays(policy())
    np.savez(path, **{k: v for k, v in given.items() if k != "fc1.bias"})
    with pytest.raises(ValueError, match=r"fc1.bias missing"):
        load_behaviour(path)
    np.savez(path, **{**given, "last_fc.weight": given["last_fc.weight"].T})
    with pytest.raises(ValueError, match=r"last_fc.weight has shape \(8, 2\)"):
        load_behaviour(path)
    np.savez(path, **{**given, "fc1.weight": given["fc1.weight"][:, :3]})
    with pytest.raises(ValueError, match=r"fc1.weight has shape \(8, 3\).*\[out, 8\]"):
        load_behaviour(path)
    np.savez(path, **{**given, "fc0.bias": given["fc0.bias"] * np.nan})
    with pytest.raises(ValueError, match=r"fc0.bias hold NaN"):
        load_behaviour(path)
    np.savez(path, **{**given, "fc0.bias": np.array([object()])})
    with pytest.raises(ValueError, match="not a readable"):
        load_behaviour(path)


@pytest.mark.parametrize("name", packaged_behaviours())
def test_packaged_policies_load(name):
    sizes = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6)}
    assert load_behaviour(name).spec == sizes[name.split("_")[0]]
