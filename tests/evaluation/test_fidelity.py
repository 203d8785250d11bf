import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from emfuse_jax.base import History
from emfuse_jax.evaluation.fidelity import (
    auroc,
    delta_scale,
    k_step_error,
    log_partition,
    negative_log_likelihood,
    open_loop,
    rms_error,
    row_error,
    spearman,
)


def test_errors_are_in_units_of_the_change_of_state():
    key_state, key_delta = jax.random.split(jax.random.key(0))
    state = 10.0 * jax.random.normal(key_state, (200, 3))
    units = jnp.array([[0.01, 1.0, 100.0]])
    following = state + units * jax.random.normal(key_delta, (200, 3))
    scale = delta_scale(state, following)
    np.testing.assert_allclose(scale, np.std(following - state, axis=0), rtol=1e-5)
    # Predicting no change is an error of one: the deltas' mean is small beside it.
    assert float(rms_error(state, following, scale)) == pytest.approx(1.0, abs=0.02)
    # In raw units the third component would decide alone.
    assert float(jnp.sqrt(jnp.mean((state - following) ** 2))) > 50.0


def test_a_component_that_never_changes_keeps_its_unit():
    state = jnp.zeros((4, 2)).at[:, 0].set(jnp.arange(4.0))
    np.testing.assert_allclose(delta_scale(state, 2.0 * state)[1], 1.0)


def test_each_component_is_clipped_alone():
    scale = jnp.array([1.0, 2.0])
    target = jnp.zeros((3, 2))
    prediction = jnp.array([[3.0, 0.0], [0.0, -1e6], [jnp.nan, jnp.inf]])
    rows = row_error(prediction, target, scale)
    expected = np.sqrt([9 / 2, 400 / 2, 400.0])
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    total = rms_error(prediction, target, scale)
    np.testing.assert_allclose(total, np.sqrt(np.mean(expected**2)), rtol=1e-6)
    kept = rms_error(prediction, target, scale, where=jnp.array([True, False, False]))
    np.testing.assert_allclose(kept, expected[0], rtol=1e-6)


@pytest.fixture(scope="module")
def system():
    """A linear system with memory: s' depends on the last two states and actions."""
    key_state, key_action = jax.random.split(jax.random.key(4))
    states = [jax.random.normal(k, (6, 2)) for k in jax.random.split(key_state)]
    actions = jax.random.normal(key_action, (9, 6, 1))
    for t in range(1, 9):
        states.append(
            0.8 * states[t] - 0.3 * states[t - 1] + actions[t] + 0.5 * actions[t - 1]
        )
    return jnp.stack(states), actions


def second_order(_, history):
    state, action = history.observation, history.action
    return 0.8 * state[0] - 0.3 * state[1] + action[0] + 0.5 * action[1]


def start(system):
    states, actions = system
    # The newest action is wrong on purpose: the true actions replace it.
    return History(
        observation=jnp.stack([states[1], states[0]]),
        action=jnp.stack([jnp.full_like(actions[1], jnp.nan), actions[0]]),
        valid=jnp.ones((2, 6), bool),
    )


def test_an_exact_model_has_no_error_however_far_ahead(system):
    states, actions = system
    predictions = open_loop(jax.random.key(0), second_order, start(system), actions[1:])
    np.testing.assert_allclose(predictions, states[2:], rtol=1e-4, atol=1e-5)


def test_a_wrong_model_errs_as_a_loop_by_hand_says(system):
    states, actions = system

    def wrong(key, history):
        return second_order(key, history) + 0.1

    predictions = open_loop(jax.random.key(0), wrong, start(system), actions[1:])
    errors = k_step_error(predictions, states[2:], jnp.ones(2))
    bias = [0.0, 0.0]
    for _ in range(8):
        bias.append(0.8 * bias[-1] - 0.3 * bias[-2] + 0.1)
    np.testing.assert_allclose(errors, bias[2:], rtol=1e-3)
    # Fed with true states instead, the error would stay that of one step.
    assert errors[-1] > 1.5 * errors[0]
    # After an episode's end nothing counts.
    inside = jnp.arange(8)[:, None] < jnp.array([[8, 8, 8, 8, 8, 3]])
    poisoned = states[2:].at[3:, 5].set(jnp.nan)
    masked = k_step_error(predictions, poisoned, jnp.ones(2), where=inside)
    np.testing.assert_allclose(masked, errors, rtol=1e-3)


def test_steps_of_a_stochastic_model_have_their_own_keys(system):
    def noisy(key, history):
        return jax.random.normal(key, history.observation.shape[1:])

    key, actions = jax.random.key(1), system[1]
    predictions = open_loop(key, noisy, start(system), actions)
    expected = [jax.random.normal(jax.random.fold_in(key, i), (6, 2)) for i in range(9)]
    np.testing.assert_allclose(predictions, jnp.stack(expected), rtol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_agrees_with_scipy(ties):
    key_x, key_y = jax.random.split(jax.random.key(2))
    x = jax.random.normal(key_x, (300,))
    y = jnp.exp(2.0 * x) + 3.0 * jax.random.normal(key_y, (300,))
    if ties:
        x, y = jnp.round(x), jnp.round(y / 4)
    expected = scipy.stats.spearmanr(np.asarray(x), np.asarray(y)).statistic
    assert float(spearman(x, y)) == pytest.approx(expected, abs=1e-5)
    # Neither a correlation of values, nor (with ties) one of places in a sort.
    pearson = np.corrcoef(np.asarray(x), np.asarray(y))[0, 1]
    assert abs(expected - pearson) > 1e-2
    if ties:
        places = [np.argsort(np.argsort(np.asarray(v))) for v in (x, y)]
        assert abs(expected - np.corrcoef(*places)[0, 1]) > 1e-3


def test_rank_measures_see_only_the_order():
    x = jnp.linspace(-3.0, 3.0, 50)
    assert float(spearman(x, jnp.exp(x))) == pytest.approx(1.0)
    assert float(spearman(x, -(x**3))) == pytest.approx(-1.0)
    assert np.isnan(spearman(x, jnp.zeros(50)))
    assert np.isnan(spearman(x, x.at[3].set(jnp.nan)))


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_share_of_ordered_pairs(ties):
    key_score, key_class = jax.random.split(jax.random.key(3))
    positive = jax.random.bernoulli(key_class, 0.3, (120,))
    score = jax.random.normal(key_score, (120,)) + positive
    if ties:
        score = jnp.round(score)
    high, low = np.asarray(score[positive]), np.asarray(score[~positive])
    pairs = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    assert float(auroc(score, positive)) == pytest.approx(pairs.mean(), abs=1e-6)
    # Area under the curve by the trapezoid rule over thresholds.
    thresholds = np.concatenate([[np.inf], np.unique(np.asarray(score))[::-1]])
    hits = [(high >= t).mean() for t in thresholds]
    alarms = [(low >= t).mean() for t in thresholds]
    area = np.trapezoid(hits, alarms)
    assert float(auroc(score, positive)) == pytest.approx(area, abs=1e-6)
    assert float(auroc(-score, positive)) == pytest.approx(1 - area, abs=1e-6)
    assert area > 0.6


def test_auroc_without_a_class_is_not_a_number():
    assert np.isnan(auroc(jnp.arange(3.0), jnp.zeros(3, bool)))


def gaussian_energy(position, precision):
    return 0.5 * jnp.sum(precision * position**2, axis=-1) - 3.0


@pytest.fixture(scope="module")
def importance():
    """Gaussian energies of known Z, and draws from a wider Gaussian: `[row, draw]`."""
    precision = jnp.array([[[1.0, 4.0]], [[2.0, 0.5]]])
    draws = 2.0 * jax.random.normal(jax.random.key(6), (2, 4000, 2))
    log_proposal = jnp.sum(jax.scipy.stats.norm.logpdf(draws, scale=2.0), axis=-1)
    known = np.log(2 * np.pi) + 3.0 - 0.5 * jnp.log(jnp.array([4.0, 1.0]))
    return gaussian_energy(draws, precision), log_proposal, known, precision[:, 0]


def test_log_partition_of_a_gaussian(importance):
    energy, log_proposal, known, precision = importance
    estimate = log_partition(energy, log_proposal)
    deviation = np.abs(estimate.log_partition - known)
    assert (deviation < 4 * estimate.standard_error).all()
    # The error is small enough to see a forgotten proposal, or a forgotten log n.
    assert (estimate.standard_error < 0.05).all()
    # E[w²] / E[w]² in closed form, for variances 1/precision under a proposal's 4.
    ratio = np.prod(4.0 * precision / np.sqrt(8.0 * precision - 1.0), axis=-1)
    np.testing.assert_allclose(estimate.effective_sample_size, 4000 / ratio, rtol=0.1)
    point = jnp.array([[0.3, -0.2], [1.0, 0.5]])
    nll = negative_log_likelihood(gaussian_energy(point, precision), known)
    expected = -scipy.stats.norm.logpdf(point, scale=precision**-0.5).sum(-1)
    np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_a_constant_in_the_energy_moves_log_z_and_not_the_likelihood(importance):
    energy, log_proposal, _, _ = importance
    plain = log_partition(energy, log_proposal)
    shifted = log_partition(energy + 100.0, log_proposal)
    np.testing.assert_allclose(
        shifted.log_partition, plain.log_partition - 100.0, rtol=1e-5
    )
    np.testing.assert_allclose(
        shifted.effective_sample_size, plain.effective_sample_size, rtol=1e-3
    )


def test_effective_sample_size_at_its_ends():
    equal = log_partition(jnp.zeros(8), jnp.zeros(8))
    assert float(equal.effective_sample_size) == pytest.approx(8.0)
    assert float(equal.standard_error) == pytest.approx(0.0, abs=1e-3)
    one = log_partition(jnp.zeros(8).at[1:].set(1e4), jnp.zeros(8))
    assert float(one.effective_sample_size) == pytest.approx(1.0)
    assert float(one.log_partition) == pytest.approx(-np.log(8.0))
    none = log_partition(jnp.full(8, jnp.inf), jnp.zeros(8))
    assert float(none.log_partition) == -np.inf
    assert float(none.effective_sample_size) == 0.0
    assert float(none.standard_error) == np.inf
