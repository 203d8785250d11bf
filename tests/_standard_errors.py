"""Assertions that know how uncertain a sample mean is."""

import numpy as np


def assert_mean_close(
    samples, expected, *, sigmas=4.0, effective_size=None, std=None, axis=0
):
    """Asserts that the mean of ``samples`` lies within ``sigmas`` standard errors.

    Args:
        samples: draws along ``axis``; every other axis is tested by itself.
        expected: the true mean, broadcast to the shape of the sample mean.
        sigmas: how many standard errors are allowed.
        effective_size: the number of independent draws; the length of ``axis`` unless
            the samples are correlated, as those of a chain are.
        std: the true standard deviation of one draw where it is known; the samples'
            own otherwise.
        axis: the axis, or axes, of the draws.

    Returns:
        The standard error, for a companion assertion that a wrong answer would fail.
    """
    samples = np.asarray(samples, np.float64)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    size = np.prod([samples.shape[a] for a in axes])
    if effective_size is None:
        effective_size = size
    if std is None:
        std = samples.std(axis=axes, ddof=1 if size > 1 else 0)
    mean = samples.mean(axis=axes)
    error = np.asarray(std) / np.sqrt(effective_size)
    deviation = np.abs(mean - np.asarray(expected, np.float64))
    assert np.isfinite(mean).all(), f"the sample mean is not finite: {mean}"
    assert (deviation <= sigmas * error).all(), (
        f"mean {mean} is {deviation} from {expected}; allowed were {sigmas} standard "
        f"errors of {error}"
    )
    return error
