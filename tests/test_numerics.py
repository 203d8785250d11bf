import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from emfuse_jax.numerics import (
    masked_mean,
    masked_variance,
    multiply_no_nan,
    safe_sqrt,
)

INFINITY = jnp.float32(jnp.inf)


def test_multiply_no_nan_is_the_product_but_for_zero_times_infinity():
    weight = jnp.array([0.0, 0.0, 0.0, 2.0, 2.0])
    value = jnp.array([INFINITY, -INFINITY, jnp.nan, INFINITY, 3.0])
    np.testing.assert_array_equal(
        multiply_no_nan(weight, value), [0, 0, 0, np.inf, 6.0]
    )
    assert np.isnan(weight * value)[:3].all()


def test_multiply_no_nan_has_finite_gradients_at_zero_times_infinity():
    by_weight, by_value = jax.grad(lambda w, v: multiply_no_nan(w, v), argnums=(0, 1))(
        jnp.float32(0.0), -INFINITY
    )
    assert (float(by_weight), float(by_value)) == (0.0, 0.0)
    # Elsewhere they are the product's.
    by_weight, by_value = jax.grad(multiply_no_nan, argnums=(0, 1))(2.0, 3.0)
    assert (float(by_weight), float(by_value)) == (3.0, 2.0)
    # A bare where on the product would leave NaN.
    naive = jax.grad(lambda w, v: jnp.where(w == 0, 0.0, w * v))(0.0, jnp.inf)
    assert np.isnan(naive)


def test_safe_sqrt():
    x = jnp.array([-1.0, 0.0, 1e-30, 4.0])
    np.testing.assert_allclose(safe_sqrt(x), [0, 0, 1e-15, 2], rtol=1e-6)
    gradient = jax.vmap(jax.grad(safe_sqrt))(x)
    np.testing.assert_allclose(gradient, [0, 0, 5e14, 0.25], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(-10, 10, width=32), st.booleans()), min_size=1, max_size=6
    )
)
def test_masked_moments_are_those_of_the_kept_rows(rows):
    x = jnp.array([value for value, _ in rows])
    mask = jnp.array([kept for _, kept in rows])
    kept = np.array([value for value, kept in rows if kept])
    garbage = jnp.where(mask, x, jnp.nan)
    mean = kept.mean() if len(kept) else 0.0
    variance = kept.var() if len(kept) else 0.0
    np.testing.assert_allclose(masked_mean(garbage, mask), mean, atol=1e-5)
    np.testing.assert_allclose(
        masked_variance(garbage, mask, 0), variance, rtol=1e-5, atol=1e-4
    )


def test_masked_mean_over_axes_broadcasts_the_mask():
    x = jnp.arange(12.0).reshape(3, 2, 2)
    mask = jnp.array([True, False, True])[:, None, None]
    np.testing.assert_allclose(masked_mean(x, mask, 0), np.mean([x[0], x[2]], axis=0))
    np.testing.assert_allclose(masked_mean(x, mask), np.mean([x[0], x[2]]))
    np.testing.assert_allclose(masked_mean(x, mask, (0, 2)), [5 - 0.5, 6.5])
    # Not divided by the axis' length.
    assert float(masked_mean(jnp.ones(4), jnp.arange(4) < 1)) == 1.0
