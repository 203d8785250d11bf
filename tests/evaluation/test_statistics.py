import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from emfuse_jax.evaluation.statistics import (
    bootstrap_interval,
    hierarchical_bootstrap,
    iqm,
    mean,
    median,
    probability_of_improvement,
)

EXPERIMENTS = 500


@pytest.mark.parametrize("size", [1, 3, 4, 7, 10, 101])
def test_iqm_is_the_trimmed_mean(size):
    scores = jax.random.cauchy(jax.random.key(size), (size,))
    expected = scipy.stats.trim_mean(np.asarray(scores), 0.25)
    np.testing.assert_allclose(iqm(scores), expected, rtol=1e-5)
    if size > 3:
        assert abs(float(jnp.mean(scores)) - expected) > 1e-3


def test_statistics_take_all_scores_together():
    scores = jnp.array([[0.0, 10.0], [1.0, 11.0], [2.0, 99.0]])
    assert float(mean(scores)) == pytest.approx(123.0 / 6)
    assert float(median(scores)) == 6.0
    assert float(iqm(scores)) == pytest.approx(6.0)


def coverage(intervals, truth):
    inside = (intervals.low <= truth) & (truth <= intervals.high)
    return float(jnp.mean(inside))


def simulate(key, sample, interval, experiments=EXPERIMENTS):
    """``interval(key, sample(key))`` for each of many experiments."""

    def one(experiment_key):
        key_sample, key_interval = jax.random.split(experiment_key)
        return interval(key_interval, sample(key_sample))

    keys = jax.random.split(key, experiments)
    return jax.jit(lambda k: jax.lax.map(one, k))(keys)


def test_intervals_cover_the_truth_as_often_as_they_say():
    offsets = jnp.array([[-3.0, 0.0, 3.0]])  # symmetric tasks, so the true IQM is 0

    def sample(key):
        return offsets + jax.random.normal(key, (25, 3))

    def interval(key, scores):
        return bootstrap_interval(key, scores, num_resamples=200)

    intervals = simulate(jax.random.key(1), sample, interval)
    assert coverage(intervals, 0.0) == pytest.approx(0.95, abs=0.03)

    # Not stratified: the tasks' differences count as noise, and it covers too much.
    def pooled(key, scores):
        return bootstrap_interval(
            key, scores.reshape(-1), statistic=mean, num_resamples=200
        )

    assert coverage(simulate(jax.random.key(2), sample, pooled, 100), 0.0) > 0.98


def test_both_levels_are_resampled():
    def sample(key):
        key_seed, key_episode = jax.random.split(key)
        seeds = jax.random.normal(key_seed, (20, 1))
        return seeds + jax.random.normal(key_episode, (20, 10))

    def interval(key, scores):
        return hierarchical_bootstrap(key, scores, num_resamples=200)

    # Drawing episodes within drawn seeds counts their noise once too often: the
    # variance is that of seeds alone plus 1/10, at most 10 % above.
    covered = coverage(simulate(jax.random.key(3), sample, interval), 0.0)
    assert covered == pytest.approx(0.95, abs=0.03)

    def pooled(key, scores):
        return bootstrap_interval(
            key, scores.reshape(-1), statistic=mean, num_resamples=200
        )

    assert coverage(simulate(jax.random.key(4), sample, pooled, 100), 0.0) < 0.7


def test_the_key_decides_the_numbers():
    scores = jax.random.normal(jax.random.key(0), (10, 3))
    for method in (bootstrap_interval, hierarchical_bootstrap):
        first, again, other = (
            method(jax.random.key(seed), scores) for seed in (7, 7, 8)
        )
        np.testing.assert_array_equal(first, again)
        assert float(first.low) != float(other.low)
        assert first.low < first.estimate < first.high


def test_a_wider_confidence_is_a_wider_interval():
    scores = jax.random.normal(jax.random.key(0), (10, 3))
    widths = [
        float(interval.high - interval.low)
        for interval in (
            bootstrap_interval(jax.random.key(0), scores, mean, confidence=c)
            for c in (0.5, 0.9, 0.99)
        )
    ]
    assert widths == sorted(widths)
    # The normal approximation, n - 1 for n, is close for a mean.
    deviation = float(jnp.sqrt(jnp.mean(jnp.var(scores, axis=0))))
    normal = 2 * scipy.stats.norm.ppf(0.95) * deviation / np.sqrt(30)
    assert widths[1] == pytest.approx(normal, rel=0.15)


def test_constant_scores_have_an_interval_of_one_point():
    interval = bootstrap_interval(jax.random.key(0), jnp.full((10, 3), 3.0))
    np.testing.assert_array_equal(interval, [3.0, 3.0, 3.0])


def test_of_one_seed_the_episodes_alone_are_resampled():
    scores = jnp.arange(30.0).reshape(1, 30)
    interval = hierarchical_bootstrap(jax.random.key(0), scores)
    normal = 1.96 * float(jnp.std(scores)) / np.sqrt(30)
    assert float(interval.high - interval.low) == pytest.approx(2 * normal, rel=0.1)


def test_improvement_is_the_mann_whitney_statistic():
    key_first, key_second = jax.random.split(jax.random.key(0))
    first = jax.random.randint(key_first, (12, 2), 0, 6).astype(jnp.float32)
    second = jax.random.randint(key_second, (9, 2), 1, 8).astype(jnp.float32)
    expected = np.mean(
        [
            scipy.stats.mannwhitneyu(first[:, t], second[:, t]).statistic / (12 * 9)
            for t in range(2)
        ]
    )
    assert float(probability_of_improvement(first, second)) == pytest.approx(expected)
    assert float(probability_of_improvement(second, first)) == pytest.approx(
        1 - expected
    )
    interval = bootstrap_interval(
        jax.random.key(1), (first, second), probability_of_improvement
    )
    assert interval.low < expected < interval.high < 0.5


@pytest.mark.untyped
def test_errors_name_the_value_and_the_fix():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"shape \(1,\).*at least 2 runs"):
        bootstrap_interval(key, jnp.zeros(1))
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap_interval(key, jnp.zeros(3), confidence=95)
    with pytest.raises(ValueError, match=r"1 of 6 scores.*first at \(1, 0\)"):
        bootstrap_interval(key, jnp.zeros((3, 2)).at[1, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"expected \[seed, episode\]"):
        hierarchical_bootstrap(key, jnp.zeros(5))
    with pytest.raises(ValueError, match="same tasks"):
        probability_of_improvement(jnp.zeros((3, 2)), jnp.zeros((3, 1)))
