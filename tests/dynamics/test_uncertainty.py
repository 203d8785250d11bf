"""Historical-slice uncertainty, and the weight rules that read it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from _gaussian_expert import linear_model
from emfuse_jax.base import History
from emfuse_jax.dynamics import (
    fixed_weights,
    historical_slice_uncertainty,
    push,
    uncertainty_weights,
    uniform_weights,
)

uncertainty_fn = jax.jit(
    lambda predictions, where, unit: historical_slice_uncertainty(
        predictions, where=where, unit=unit
    )
)


def random_slices(num_slices=4, rows=5, dim=3, seed=0):
    return jax.random.normal(jax.random.key(seed), (num_slices, rows, dim))


def test_slices_that_agree_leave_no_uncertainty():
    same = jnp.broadcast_to(random_slices()[:1], (4, 5, 3))
    np.testing.assert_array_equal(historical_slice_uncertainty(same), np.zeros(5))
    assert float(historical_slice_uncertainty(random_slices()).min()) > 0.1


def test_by_hand():
    # Two slices at (0, 1) and (4, 1): mean (2, 1), population variance (4, 0), their mean
    # over dimensions 2.
    predictions = jnp.array([[[0.0, 1.0]], [[4.0, 1.0]]])
    by_hand = historical_slice_uncertainty(predictions)
    np.testing.assert_allclose(by_hand, [np.sqrt(2.0)], rtol=1e-6)
    # In units of (2, 1) the first variance is 1.
    halved = historical_slice_uncertainty(predictions, unit=jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(halved, [np.sqrt(0.5)], rtol=1e-6)


def test_is_the_published_spread():
    # EMFuse: u = (1/k) Σ_m ‖ŝ^(m) - s̄‖² = D u²; ADMPO: sqrt(mean_d Var_k).
    predictions = np.asarray(random_slices(seed=1), np.float64)
    ours = np.asarray(historical_slice_uncertainty(random_slices(seed=1)))
    distance = ((predictions - predictions.mean(0)) ** 2).sum(-1).mean(0)
    np.testing.assert_allclose(3 * ours**2, distance, rtol=1e-5)
    np.testing.assert_allclose(ours, np.sqrt(predictions.var(0).mean(-1)), rtol=1e-5)
    # The sample variance would be a third larger.
    assert abs(predictions.var(0, ddof=1).mean(-1) / ours**2 - 1).min() > 0.3


@settings(max_examples=20, deadline=None)
@given(
    order=st.permutations(range(4)),
    valid=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_neither_the_order_nor_invalid_slices_matter(order, valid):
    predictions, order = random_slices(rows=1), jnp.array(order)
    where, unit = jnp.array(valid)[:, None], jnp.ones(3)
    expected = uncertainty_fn(predictions, where, unit)
    permuted = uncertainty_fn(predictions[order], where[order], unit)
    np.testing.assert_allclose(permuted, expected, rtol=1e-5)
    garbage = jnp.where(where[..., None], predictions, jnp.nan)
    np.testing.assert_array_equal(uncertainty_fn(garbage, where, unit), expected)
    if sum(valid) < 2:
        assert float(expected[0]) == 0.0  # unknown


def test_grows_with_the_disagreement():
    base, direction = random_slices(seed=2), random_slices(seed=3)
    base = jnp.broadcast_to(base[:1], base.shape)
    sizes = [0.0, 0.1, 0.2, 0.5, 1.0, 10.0]
    values = [historical_slice_uncertainty(base + s * direction) for s in sizes]
    assert (np.diff(np.stack(values), axis=0) > 0).all()
    np.testing.assert_allclose(values[-1], 10 * values[-2], rtol=1e-4)


def test_gradient_is_finite_where_slices_agree():
    gradient = jax.grad(lambda x: historical_slice_uncertainty(x).sum())(
        jnp.ones((3, 2, 4))
    )
    np.testing.assert_array_equal(gradient, np.zeros((3, 2, 4)))


def test_a_deterministic_linear_model_agrees_with_itself_at_every_horizon():
    keys = jax.random.split(jax.random.key(4), 4)
    dynamics = 0.9 * jnp.linalg.qr(jax.random.normal(keys[0], (3, 3)))[0]
    control = 0.3 * jax.random.normal(keys[1], (2, 3))
    model = linear_model(dynamics, control, num_lags=5)
    uncertainty = jax.jit(model.uncertainty)
    state = jax.random.normal(keys[2], (7, 3))
    history = History(
        jnp.zeros((5, 7, 3)), jnp.zeros((5, 7, 2)), jnp.zeros((5, 7), bool)
    )
    for step, key in enumerate(jax.random.split(keys[3], 12)):
        history = push(history, state)
        action = jax.random.normal(key, (7, 2))
        history = history._replace(action=history.action.at[0].set(action))
        assert float(uncertainty({"error": jnp.zeros(())}, history).max()) < 1e-6
        wrong = uncertainty({"error": jnp.full((), 0.1)}, history)
        if step > 0:  # one slice cannot disagree
            assert float(wrong.min()) > 0.03
        state = state @ dynamics + action @ control


def test_uniform_and_fixed_weights():
    uncertainty = random_slices(3, 5)[..., 0]
    np.testing.assert_allclose(uniform_weights(uncertainty), np.full((3, 5), 1 / 3))
    fixed = fixed_weights(jnp.array([0.5, 0.3, 0.2]))(uncertainty)
    np.testing.assert_allclose(fixed[:, 4], [0.5, 0.3, 0.2])
    # A single weight would otherwise be given to every expert.
    for wrong in ([1.0], [0.5, 0.5]):
        with pytest.raises(ValueError, match=f"{len(wrong)} weights for 3 experts"):
            fixed_weights(jnp.array(wrong))(uncertainty)


def test_uncertainty_weights_are_the_inverse_power():
    uncertainty = jnp.array([[0.1, 1.0, 0.0], [0.2, 1.0, 0.0]])
    weights = uncertainty_weights(4.0, floor=0.0)(uncertainty[:, :2])
    np.testing.assert_allclose(weights[:, 0], [16 / 17, 1 / 17], rtol=1e-5)
    np.testing.assert_allclose(weights[:, 1], [0.5, 0.5], rtol=1e-6)
    floored = uncertainty_weights(4.0)(uncertainty)
    np.testing.assert_allclose(floored.sum(0), np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(floored[:, 2], [0.5, 0.5])  # nobody knows
    np.testing.assert_allclose(uncertainty_weights(0.0)(uncertainty), 0.5)
    blind = uncertainty_weights()(jnp.array([[0.01], [jnp.inf]]))
    np.testing.assert_array_equal(blind[:, 0], [1.0, 0.0])
