import numpy as np
import pytest

from emfuse_jax.evaluation.scores import (
    REFERENCE_SCORES,
    normalized_score,
    normalized_spread,
    reference_score,
)


@pytest.mark.parametrize("name", list(REFERENCE_SCORES))
def test_random_is_0_and_expert_is_100(name):
    reference = reference_score(name)
    np.testing.assert_allclose(
        normalized_score(np.array(reference), reference), [0.0, 100.0]
    )


@pytest.mark.parametrize("name", list(REFERENCE_SCORES))
def test_spreads_scale_without_the_offset(name):
    reference = reference_score(name)
    returns = np.random.default_rng(0).normal(1500, 300, 50)
    spread = normalized_spread(returns.std(), reference)
    assert spread == pytest.approx(normalized_score(returns, reference).std())
    # Sending the standard deviation through the score is the known mistake.
    assert abs(normalized_score(returns.std(), reference) - spread) > 0.01
    assert normalized_spread(0.0, reference) == 0.0


def test_known_values():
    # A return of 1500 in each, by hand.
    scores = [normalized_score(1500, REFERENCE_SCORES[n]) for n in REFERENCE_SCORES]
    np.testing.assert_allclose(scores, [46.7119, 32.6395, 14.3387], atol=1e-3)


def test_unknown_environment_lists_the_known():
    with pytest.raises(
        ValueError,
        match=r"'ant'; known: hopper, walker2d, halfcheetah, pointmaze-umaze",
    ):
        reference_score("ant")
