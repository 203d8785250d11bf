"""How sure a table of returns is: robust means and bootstrap intervals.

Few runs are the rule in reinforcement learning, so a mean without an interval says
little, and the best run says nothing. Scores are ``[run, task]`` (a run is one training
seed); intervals resample runs within each task, so that tasks stay represented as they
are (stratified bootstrap, percentile method). Evaluation episodes of one run are not
independent runs: `hierarchical_bootstrap` resamples both levels.

References:
    Agarwal, Schwarzer, Castro, Courville & Bellemare, Deep Reinforcement Learning at
    the Edge of the Statistical Precipice, NeurIPS 2021,
    https://arxiv.org/abs/2108.13264 (IQM: section 4.3; stratified bootstrap: section
    4.1; probability of improvement: appendix A.3). Davison & Hinkley, Bootstrap Methods
    and their Application, 1997, section 3.8 (several levels).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from emfuse_jax.base import Key

Statistic = Callable[..., jax.Array]
"""``scores -> scalar``."""


class Interval(NamedTuple):
    """A statistic of the scores, and the interval that its resamples fill."""

    estimate: Float[Array, "..."]
    low: Float[Array, "..."]
    high: Float[Array, "..."]


def iqm(scores: Float[Array, "..."]) -> Float[Array, ""]:
    """Interquartile mean: the mean of the middle half of all scores together.

    Of ``n`` scores ``floor(n / 4)`` are cut at either end, as in
    ``scipy.stats.trim_mean(scores, 0.25)``.

    Example:
        >>> float(iqm(jnp.array([0.0, 1.0, 2.0, 100.0])))
        1.5
    """
    flat = jnp.sort(jnp.ravel(scores))
    cut = flat.size // 4
    return jnp.mean(flat[cut : flat.size - cut])


def mean(scores: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean of all scores together.

    Example:
        >>> float(mean(jnp.array([[1.0, 2.0], [3.0, 6.0]])))
        3.0
    """
    return jnp.mean(scores)


def median(scores: Float[Array, "..."]) -> Float[Array, ""]:
    """The median of all scores together.

    The "median" of the Atari literature is another: that of the tasks' means.

    Example:
        >>> float(median(jnp.array([[1.0, 2.0], [3.0, 6.0]])))
        2.5
    """
    return jnp.median(scores)


def bootstrap_interval(
    key: Key,
    scores: Float[Array, "run task"]
    | Float[Array, "run"]
    | tuple[Float[Array, "..."], ...],
    statistic: Statistic = iqm,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """Percentile interval by the stratified bootstrap: runs drawn anew within each
    task.

    With few runs it is too narrow, by about ``sqrt(1 - 1/runs)``: five runs are few.

    Args:
        key: consumed.
        scores: ``[run]`` or ``[run, task]``; or a tuple of them, one per method, each
            resampled alone.
        statistic: ``scores -> scalar``, called with one array per method.
        confidence: the share of resamples inside the interval.
        num_resamples: how many.

    Returns:
        The statistic of the scores themselves, and the interval.

    Raises:
        ValueError: if there are no scores, fewer than two runs, values that are not
            finite, or ``confidence`` is not inside (0, 1).

    Example:
        >>> scores = jnp.arange(40.0).reshape(20, 2)
        >>> interval = bootstrap_interval(jax.random.key(0), scores)
        >>> bool(interval.low < interval.estimate < interval.high)
        True
    """
    methods = scores if isinstance(scores, tuple) else (scores,)
    methods = tuple(jnp.asarray(x, float) for x in methods)
    _check(methods, confidence, least=2)

    def resample(resample_key: jax.Array) -> jax.Array:
        keys = jax.random.split(resample_key, len(methods))
        drawn = [_draw_rows(k, x) for k, x in zip(keys, methods, strict=True)]
        return statistic(*drawn)

    return _interval(key, resample, statistic(*methods), confidence, num_resamples)


def hierarchical_bootstrap(
    key: Key,
    scores: Float[Array, "seed episode"],
    statistic: Statistic = mean,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """Percentile interval that resamples seeds, then the episodes of each drawn seed.

    Pooling the episodes instead would take the differences between seeds for noise that
    more episodes remove.

    Args:
        key: consumed.
        scores: as many episodes for every seed. Of one seed alone (a policy that was
            not trained here, say) the interval is about its episodes only.
        statistic: ``scores [seed, episode] -> scalar``.
        confidence: as in `bootstrap_interval`.
        num_resamples: as in `bootstrap_interval`.

    Raises:
        ValueError: as `bootstrap_interval`, but one seed is enough.

    Example:
        >>> returns = jnp.array([[1.0, 3.0], [2.0, 4.0], [1.0, 5.0]])
        >>> interval = hierarchical_bootstrap(jax.random.key(0), returns, num_resamples=200)
        >>> bool(interval.low < mean(returns) < interval.high)
        True
    """
    scores = jnp.asarray(scores, float)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores of shape {scores.shape}; expected [seed, episode] with at least two "
            "episodes"
        )
    _check((scores,), confidence, least=1)

    def resample(resample_key: jax.Array) -> jax.Array:
        key_seed, key_episode = jax.random.split(resample_key)
        rows = jax.random.randint(key_seed, scores.shape[:1], 0, scores.shape[0])
        columns = jax.random.randint(key_episode, scores.shape, 0, scores.shape[1])
        return statistic(jnp.take_along_axis(scores[rows], columns, axis=1))

    return _interval(key, resample, statistic(scores), confidence, num_resamples)


def probability_of_improvement(
    first: Float[Array, "run task"] | Float[Array, "run"],
    second: Float[Array, "run_2 task"] | Float[Array, "run_2"],
) -> Float[Array, ""]:
    """How often a run of the first method beats one of the second on the same task.

    ``mean over tasks of P(first > second) + P(first = second) / 2``, the Mann-Whitney
    statistic. Its interval: ``bootstrap_interval(key, (first, second),
    probability_of_improvement)``.

    Raises:
        ValueError: if the numbers of tasks differ.

    Example:
        >>> float(probability_of_improvement(jnp.array([1.0, 3.0]), jnp.array([2.0])))
        0.5
    """
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"scores of shapes {first.shape} and {second.shape}; expected [run, task] "
            "with the same tasks"
        )
    difference = first[:, None] - second[None]
    wins = (difference > 0) + 0.5 * (difference == 0)
    return jnp.mean(wins)


def _check(methods: tuple[jax.Array, ...], confidence: float, *, least: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}; expected inside (0, 1), as 0.95")
    for scores in methods:
        if scores.ndim not in (1, 2) or scores.size == 0 or scores.shape[0] < least:
            raise ValueError(
                f"scores of shape {scores.shape}; expected [run] or [run, task] with at "
                f"least {least} runs"
            )
        if not isinstance(scores, Tracer):
            bad = ~np.isfinite(np.asarray(scores))
            if bad.any():
                where = tuple(int(i) for i in np.argwhere(bad)[0])
                raise ValueError(
                    f"{bad.sum()} of {scores.size} scores are not finite, the first at "
                    f"{where}; leave failed runs out and say so, or score them"
                )


def _draw_rows(key: jax.Array, scores: jax.Array) -> jax.Array:
    drawn = jax.random.randint(key, scores.shape, 0, scores.shape[0])
    return jnp.take_along_axis(scores, drawn, axis=0)


def _interval(
    key: jax.Array,
    resample: Callable[[jax.Array], jax.Array],
    estimate: jax.Array,
    confidence: float,
    num_resamples: int,
) -> Interval:
    # No scan: outside of jit it would be compiled anew in every call.
    values = jax.vmap(resample)(jax.random.split(key, num_resamples))
    tail = (1.0 - confidence) / 2.0
    low, high = jnp.quantile(values, jnp.array([tail, 1.0 - tail]), axis=0)
    return Interval(estimate, low, high)
