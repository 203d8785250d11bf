"""The measures of the curve say what they should of the exact energy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _curve, mcetm_control, mcetm_curve, mcetm_hopper
from emfuse_jax.data import make_dataset
from emfuse_jax.dynamics import Encoded, Expert, SamplingConfig, transition_model

pytestmark = pytest.mark.allow_rank_promotion


def exact_expert():
    """The law's own energy, by its best point on the curve."""
    dense = jnp.linspace(-1.2, 1.2, 801)

    def energy(params, m, target):
        apart = target[..., None, :] - _curve.curve(dense)
        off = jnp.sum(jnp.square(apart), axis=-1) / (2 * _curve.NORMAL**2)
        along = jnp.square(dense - m[..., None]) / (2 * _curve.ALONG**2)
        return jnp.min(off + along, axis=-1)

    def encode(params, slices):
        action = slices.action[..., 0, :]
        feature = jnp.broadcast_to(action[None], (*slices.valid.shape, 2))
        start = _curve.curve(_curve.center(feature))
        return Encoded(feature, start, jnp.full_like(start, 0.1))

    return Expert(
        encode=encode,
        prepare=lambda params, encoded: _curve.center(encoded.feature),
        energy=energy,
        unit=lambda params: jnp.ones(1),
        num_lags=1,
        anchor="current",
        region="trust",
        feature_size=2,
    )


def test_the_exact_energy_reaches_the_ideal_numbers():
    model = transition_model(exact_expert(), SamplingConfig(num_steps=0))
    sizes = _curve.Sizes(rows=500, profiles=4)
    found = _curve._shape(model, sizes)({}, jax.random.key(0))
    assert float(found["monotone"]) > 0.95
    # 1 - exp(-δ²/2τ²)/√2 = 0.969, and P(|z| < 2.5) = 0.9876, at δ = 0.05.
    error = 4 * np.sqrt(0.25 / sizes.rows)
    assert abs(float(found["pooled"][0]) - 0.969) < error
    assert abs(float(found["paired"][0]) - 0.9876) < error
    assert float(found["paired"][1]) == 1.0
    assert float(found["along"]) > 0.99
    assert float(found["mode_std"]) < 0.05


def test_points_beside_the_curve_are_that_far_from_it():
    u = jnp.linspace(-0.8, 0.8, 9)
    np.testing.assert_allclose(_curve.distance(_curve.offset(u, 0.03)), 0.03, atol=2e-3)


def test_limits_count_the_seeds_that_pass():
    rows = [
        {
            field: limit + by * (0.01 if sense == ">=" else -0.01)
            for field, sense, limit in mcetm_curve.LIMITS.values()
        }
        for by in (1, -1)
    ]
    for entry in mcetm_curve.verdict(rows).values():
        assert entry["passed"] == "1/2"


def test_a_share_of_the_data_ends_with_an_episode():
    states = np.zeros((100, 1))
    data = make_dataset(
        observations=states,
        actions=states,
        rewards=states[:, 0],
        next_observations=states,
        terminals=states[:, 0] > 0,
        timeouts=np.isin(np.arange(100), [29, 39, 59, 99]),
    )
    part = mcetm_hopper.first_part(data, 0.4)
    assert len(part.age) == 40
    assert len(mcetm_hopper.first_part(data, 1.0).age) == 100


def test_control_trains_plays_and_does_not_do_so_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", "0")
    tiny = {"rows": 1200, "shares": (1.0,), "kinds": ("etm",), "seeds": (0, 1)}
    steps = {"etm_steps": 4, "policy_updates": 4, "episodes": 2}
    config = mcetm_control.McetmControlConfig(
        **tiny, **steps, work=str(tmp_path / "work"), out=str(tmp_path / "out.json")
    )
    first = mcetm_control.compare(config)
    assert len(first["etm, 1"]) == 2
    written = json.loads((tmp_path / "out.json").read_text())["table"]
    assert len(written["etm, 1 of the data"]["per_seed"]) == 2
    metrics = {p: p.read_bytes() for p in tmp_path.rglob("metrics.jsonl")}
    assert len(metrics) == 4
    mcetm_control.compare(config)
    assert metrics == {p: p.read_bytes() for p in metrics}
    with pytest.raises(ValueError, match="kinds are mcetm, etm and adetm"):
        mcetm_control.McetmControlConfig(kinds=("mlp",))
