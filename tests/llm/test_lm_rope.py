"""Rotations: what attention sees of them, and how extended contexts change them."""

import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.llm.rope import (
    RopeConfig,
    attention_factor,
    frequencies,
    rotate,
    rotation,
)

KINDS = {
    "default": RopeConfig(theta=100.0),
    "linear": RopeConfig(kind="linear", theta=100.0, factor=4.0),
    "llama3": RopeConfig(kind="llama3", theta=100.0, factor=4.0, original_length=64),
    "yarn": RopeConfig(kind="yarn", theta=100.0, factor=4.0, original_length=64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_distance_alone(kind):
    """q at s and k at t give a score of s - t, and another one for another distance."""
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in "qk")

    def score(s, t):
        turned = [
            rotate(x, rotation(KINDS[kind], 8, jnp.array([[position]])))
            for x, position in ((q, s), (k, t))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 2) == pytest.approx(score(40, 37), abs=1e-4)
    assert abs(score(5, 2) - score(5, 4)) > 1e-2
    scale = attention_factor(KINDS[kind]) ** 2
    assert score(0, 0) == pytest.approx(scale * float(jnp.sum(q * k)), rel=1e-6)
    norm = jnp.linalg.norm(rotate(q, rotation(KINDS[kind], 8, jnp.array([[9]]))))
    assert float(norm) == pytest.approx(
        scale**0.5 * float(jnp.linalg.norm(q)), rel=1e-5
    )


def test_extensions_keep_fast_and_slow_down_slow_frequencies():
    plain = frequencies(KINDS["default"], 16)
    np.testing.assert_allclose(plain, 100.0 ** (-np.arange(8) / 8), rtol=1e-6)
    np.testing.assert_allclose(frequencies(KINDS["linear"], 16), plain / 4, rtol=1e-6)
    for kind in ("llama3", "yarn"):
        ratio = frequencies(KINDS[kind], 16) / plain
        assert ratio[0] == 1
        assert ratio[-1] == pytest.approx(0.25)
        assert (np.diff(ratio) <= 0).all()
        assert ((ratio > 0.26) & (ratio < 0.99)).any()
    # Wavelengths 2π/f beside 64: kept below 64/4, divided by 4 above 64/1.
    wavelength = 2 * np.pi / plain
    ratio = frequencies(KINDS["llama3"], 16) / plain
    np.testing.assert_array_equal(ratio == 1, wavelength < 16)
    np.testing.assert_allclose(ratio[wavelength > 64], 0.25, rtol=1e-6)


def test_factor_one_changes_nothing():
    for kind in ("linear", "llama3", "yarn"):
        rope = RopeConfig(kind=kind, theta=100.0, original_length=64)
        np.testing.assert_allclose(
            frequencies(rope, 16), frequencies(KINDS["default"], 16), rtol=1e-6
        )
        assert attention_factor(rope) == 1.0


def test_yarn_scales_attention():
    assert attention_factor(KINDS["yarn"]) == pytest.approx(1 + 0.1 * np.log(4))
    rope = RopeConfig(kind="yarn", original_length=64, attention_factor=0.5)
    assert attention_factor(rope) == 0.5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"kind": "dynamic"}, "'dynamic' is not supported; expected one of default"),
        ({"theta": 0.0}, "theta=0.0"),
        ({"factor": 0.5}, "factor=0.5"),
        ({"kind": "llama3"}, "needs original_length"),
        ({"low_frequency_factor": 4.0}, "is not below"),
    ],
)
def test_bad_fields_are_refused(parts, text):
    with pytest.raises(ValueError, match=text):
        RopeConfig(**parts)
