import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emfuse_jax.data.normalizer import apply, fit_normalizer, invert


def example_rows(seed=0, rows=50):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 4)) * [1.0, 30.0, 0.1, 1.0] + [0.0, 5.0, -2.0, 0.0]
    x[:, 3] = 0.1  # a constant that float32 does not hold exactly
    return x.astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 100),
    kind=st.sampled_from(["standard", "box"]),
)
def test_invert_undoes_apply_including_constant_columns(seed, kind):
    x = example_rows(seed)
    normalizer = fit_normalizer(x, kind=kind)
    np.testing.assert_allclose(
        invert(normalizer, apply(normalizer, x)), x, rtol=1e-5, atol=1e-5
    )


def test_standard_is_the_z_score_and_constants_keep_scale_one():
    x = example_rows()
    normalizer = fit_normalizer(x)
    np.testing.assert_allclose(normalizer.scale[:3], x[:, :3].std(axis=0), rtol=1e-4)
    assert float(normalizer.scale[3]) == 1.0
    z = np.asarray(apply(normalizer, x))
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(z[:, :3].std(axis=0), 1.0, rtol=1e-4)
    # Dividing by the rounding noise of a constant would make it arbitrary.
    assert np.abs(z[:, 3]).max() < 1e-6


def test_box_keeps_zero_and_ends_at_one():
    x = example_rows()
    normalizer = fit_normalizer(x, kind="box")
    assert not np.any(normalizer.mean)
    z = np.asarray(apply(normalizer, x))
    np.testing.assert_allclose(np.abs(z).max(axis=0), 1.0, rtol=1e-6)
    zeros = fit_normalizer(jnp.zeros((3, 2)), kind="box")
    np.testing.assert_array_equal(zeros.scale, 1.0)


def test_box_quantile_ignores_the_tail_but_never_divides_by_zero():
    x = np.linspace(-1, 1, 1001, dtype=np.float32)[:, None] * np.ones(
        (1, 2), np.float32
    )
    x[0, 0] = 1e3
    x[:, 1] = 0.0
    x[7, 1] = 4.0
    normalizer = fit_normalizer(x, kind="box", quantile=0.9)
    assert float(normalizer.scale[0]) == pytest.approx(0.9, abs=0.01)
    assert float(normalizer.scale[1]) == 4.0
    assert float(fit_normalizer(x, kind="box").scale[0]) == 1e3


def test_works_under_jit_and_vmap_over_experts():
    x = np.stack([example_rows(0), example_rows(1)])
    batched = jax.jit(jax.vmap(fit_normalizer))(x)
    for expert in range(2):
        single = fit_normalizer(x[expert])
        np.testing.assert_allclose(batched.scale[expert], single.scale, rtol=1e-5)
    np.testing.assert_allclose(fit_normalizer(x, axis=1).mean, batched.mean, rtol=1e-5)


def test_apply_takes_any_batch_shape():
    normalizer = fit_normalizer(example_rows())
    x = jnp.ones((2, 3, 4))
    assert apply(normalizer, x).shape == x.shape
    assert apply(normalizer, x[0, 0]).shape == (4,)


def test_bad_input():
    with pytest.raises(ValueError, match="kind='zscore'"):
        fit_normalizer(np.ones((2, 2)), kind="zscore")
    with pytest.raises(ValueError, match=r"quantile=0.9 with kind='standard'"):
        fit_normalizer(np.ones((2, 2)), quantile=0.9)
    with pytest.raises(ValueError, match="no rows"):
        fit_normalizer(np.ones((0, 2)))
