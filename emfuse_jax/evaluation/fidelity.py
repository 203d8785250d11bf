"""How good a transition model is: errors, rank agreement and likelihoods.

Pure measures of arrays. A model enters as the predictions it made, or as a step
function.

Errors are in units of the pooled standard deviation of ``Δs = s' - s``, so that they
can be averaged over components and compared between environments; a component counts at
most `CLIP` of these, so that one diverging row does not decide a mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emfuse_jax.base import History, Key
from emfuse_jax.loops import scan_steps
from emfuse_jax.numerics import masked_mean

CLIP = 20.0
"""The most that one component's error counts, in standard deviations of ``Δs``."""

StepFn = Callable[[jax.Array, History], jax.Array]
"""``(key, history [lag, *batch, …]) -> next_observation [*batch, obs]``."""


def delta_scale(
    observation: Float[Array, "*batch obs"],
    next_observation: Float[Array, "*batch obs"],
) -> Float[Array, "obs"]:
    """The pooled standard deviation of ``Δs`` per component: the unit of errors.

    A component that never changes gets 1, its raw unit.

    Example:
        >>> before, after = jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [-1.0, 0.0]])
        >>> delta_scale(before, after).tolist()  # the second component never changes
        [1.0, 1.0]
    """
    delta = next_observation - observation
    scale = jnp.std(delta.reshape(-1, delta.shape[-1]), axis=0)
    return jnp.where(scale > 0, scale, 1.0)


def row_error(
    prediction: Float[Array, "*batch obs"],
    target: Float[Array, "*batch obs"],
    scale: Float[Array, "obs"],
    *,
    clip: float = CLIP,
) -> Float[Array, "*batch"]:
    """Root mean square over components of the scaled, clipped error of each row.

    A prediction that is not a number counts as the clip: it is as wrong as can be.

    Example:
        >>> prediction = jnp.array([3.0, 1e9])
        >>> error = row_error(prediction, jnp.zeros(2), jnp.ones(2), clip=4.0)
        >>> round(float(error), 3)
        3.536
    """
    return jnp.sqrt(jnp.mean(_squared_error(prediction, target, scale, clip), axis=-1))


def rms_error(
    prediction: Float[Array, "*batch obs"],
    target: Float[Array, "*batch obs"],
    scale: Float[Array, "obs"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    clip: float = CLIP,
) -> Float[Array, ""]:
    """Root mean square over components and rows of the scaled, clipped error.

    Args:
        prediction: of the next observation, in raw units.
        target: what came, in raw units.
        scale: from `delta_scale`, of the pooled data of all domains.
        where: rows that count; all by default.
        clip: the most that one component counts.

    Example:
        >>> float(rms_error(jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2)), jnp.array([3.0, 4.0])))
        1.0
    """
    squared = jnp.mean(_squared_error(prediction, target, scale, clip), axis=-1)
    return jnp.sqrt(jnp.mean(squared) if where is None else masked_mean(squared, where))


def open_loop(
    key: Key,
    step_fn: StepFn,
    history: History,
    actions: Float[Array, "time *batch act"],
) -> Float[Array, "time *batch obs"]:
    """Predicts several steps ahead, fed with its own predictions and the true actions.

    Args:
        key: not consumed; step ``i`` is given ``fold_in(key, i)``.
        step_fn: for example ``lambda key, history: model.predict(params, key,
            history).next_observation``.
        history: up to the first step, newest first; its newest action is replaced by
            ``actions[0]``.
        actions: the true ones, ``a_t … a_(t+time-1)``.

    Returns:
        The predicted ``s_(t+1) … s_(t+time)``.

    Example:
        >>> history = History(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1)), jnp.ones((1, 1), bool))
        >>> def step_fn(key, history):  # a model that adds the action
        ...     return history.observation[0] + history.action[0]
        >>> actions = jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1)
        >>> open_loop(jax.random.key(0), step_fn, history, actions)[:, 0, 0].tolist()
        [1.0, 3.0, 6.0]
    """

    def step(step_key: jax.Array, carry: tuple[History, jax.Array]):
        past, time = carry
        current = past._replace(action=past.action.at[0].set(actions[time]))
        observation = step_fn(step_key, current)
        # The action that follows the prediction is filled in by the next step.
        pushed = History(
            _push(current.observation, observation),
            _push(current.action, current.action[0]),
            _push(current.valid, jnp.ones_like(current.valid[0])),
        )
        return (pushed, time + 1), observation

    _, predictions = scan_steps(
        key, step, (history, jnp.zeros((), jnp.int32)), actions.shape[0]
    )
    return predictions


def k_step_error(
    predictions: Float[Array, "time *batch obs"],
    targets: Float[Array, "time *batch obs"],
    scale: Float[Array, "obs"],
    *,
    where: Bool[Array, "time *batch"] | None = None,
    clip: float = CLIP,
) -> Float[Array, "time"]:
    """`rms_error` for each number of steps ahead: entry ``k - 1`` is the k-step error.

    Args:
        predictions: from `open_loop`.
        targets: what came.
        scale: from `delta_scale`.
        where: false from an episode's end on.
        clip: the most that one component counts.

    Example:
        >>> targets = jnp.zeros((3, 5, 2))  # [time, row, obs]
        >>> drifting = targets + jnp.arange(1.0, 4.0)[:, None, None]
        >>> k_step_error(drifting, targets, jnp.ones(2)).tolist()
        [1.0, 2.0, 3.0]
    """
    count = jnp.ones(targets.shape[:-1], bool) if where is None else where
    return jax.vmap(lambda p, t, w: rms_error(p, t, scale, where=w, clip=clip))(
        predictions, targets, count
    )


def spearman(x: Float[Array, "row"], y: Float[Array, "row"]) -> Float[Array, ""]:
    """Spearman's rank correlation; tied values share their mean rank.

    NaN where one of the two is constant, as in scipy: there is no order to agree with.

    Example:
        >>> float(spearman(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 8.0, 27.0])))
        1.0
    """
    ranks = [_centred_ranks(v) for v in (x, y)]
    norm = jnp.sqrt(jnp.sum(ranks[0] ** 2)) * jnp.sqrt(jnp.sum(ranks[1] ** 2))
    return jnp.clip(jnp.sum(ranks[0] * ranks[1]) / norm, -1.0, 1.0)


def auroc(score: Float[Array, "row"], positive: Bool[Array, "row"]) -> Float[Array, ""]:
    """Area under the ROC curve: ``P(score of a positive > score of a negative)``.

    Ties count one half (Mann & Whitney, 1947). NaN where one class is missing.

    Args:
        score: high should mean positive.
        positive: the class of each row, for example "out of the domain".

    Example:
        >>> float(auroc(jnp.array([0.1, 0.4, 0.3]), jnp.array([False, True, True])))
        1.0
    """
    ranks = _centred_ranks(score)
    num_positive = jnp.sum(positive)
    num_negative = positive.size - num_positive
    # Σ over positives of (rank - mean rank) = n₊ n₋ (AUROC - 1/2).
    above = jnp.sum(jnp.where(positive, ranks, 0.0))
    return above / (num_positive * 1.0 * num_negative) + 0.5


class LogPartition(NamedTuple):
    """An importance-sampled ``log Z``, and how far to trust it."""

    log_partition: Float[Array, "*batch"]
    effective_sample_size: Float[Array, "*batch"]
    """Of the draws; a handful means that the estimate is that of a few draws."""
    standard_error: Float[Array, "*batch"]
    """Of ``log_partition``, to first order."""


def log_partition(
    energy: Float[Array, "*batch draw"], log_proposal: Float[Array, "*batch draw"]
) -> LogPartition:
    """``log Z ≈ log mean_j exp(-E(y_j) - log q(y_j))`` with draws ``y_j`` from ``q``.

    The estimate of ``Z`` is unbiased; that of ``log Z`` is too low by about half its
    squared standard error, so likelihoods from few effective draws look too good. ``q``
    must reach wherever ``exp(-E)`` does (a Gaussian plus a box, say): what it misses
    goes unseen, in the effective sample size too.

    Args:
        energy: of the draws.
        log_proposal: their log density under what they were drawn from.

    References:
        Owen, Monte Carlo theory, methods and examples, 2013, chapter 9,
        https://artowen.su.domains/mc/

    Example:
        >>> energies = jnp.full((4,), 2.0)  # a constant energy on a box of volume 1
        >>> float(log_partition(energies, jnp.zeros(4)).log_partition)
        -2.0
    """
    log_ratio = -energy - log_proposal
    num_draws = log_ratio.shape[-1]
    first = jax.nn.logsumexp(log_ratio, axis=-1)
    second = jax.nn.logsumexp(2.0 * log_ratio, axis=-1)
    # All draws impossible: exp(-inf + inf) would be NaN, the sample size is 0.
    some = jnp.isfinite(first)
    size = jnp.exp(jnp.where(some, 2.0 * first - second, -jnp.inf))
    variance = jnp.maximum(1.0 / size - 1.0 / num_draws, 0.0)
    return LogPartition(first - jnp.log(1.0 * num_draws), size, jnp.sqrt(variance))


def negative_log_likelihood(
    energy: Float[Array, "*batch"], log_partition: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """``-log p(y|x) = E(x, y) + log Z(x)`` in nats, row by row.

    Example:
        >>> energy, log_z = jnp.array([0.5]), jnp.array([0.5 * jnp.log(2 * jnp.pi)])
        >>> round(float(negative_log_likelihood(energy, log_z)[0]), 3)  # a normal, one σ away
        1.419
    """
    return energy + log_partition


def _squared_error(
    prediction: jax.Array, target: jax.Array, scale: jax.Array, clip: float
) -> jax.Array:
    unit = scale.reshape((1,) * (target.ndim - 1) + scale.shape)
    wrong = jnp.where(jnp.isnan(prediction), clip, (prediction - target) / unit)
    return jnp.square(jnp.clip(wrong, -clip, clip))


def _push(past: jax.Array, newest: jax.Array) -> jax.Array:
    return jnp.concatenate([newest[None], past[:-1]])


def _centred_ranks(values: jax.Array) -> jax.Array:
    """Ranks minus their mean; equal values share the mean of their ranks."""
    ordered = jnp.sort(values)
    below = jnp.searchsorted(ordered, values, side="left")
    up_to = jnp.searchsorted(ordered, values, side="right")
    ranks = (below + up_to - values.size) / 2.0
    # searchsorted would rank NaN last, and hide it.
    return jnp.where(jnp.any(jnp.isnan(values)), jnp.nan, ranks)
