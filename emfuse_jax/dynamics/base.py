"""What every energy-based dynamics model shares: slices, coordinates and the expert.

A model predicts ``y = (s_{t+1} - anchor, r_t)``. Slice ``m`` of a history (1 ≤ m ≤ K) has
the anchor ``s_{t-m+1}`` and the actions ``a_{t-m+1}, …, a_t``; all slices predict the same
next state. Each lag has scales of its own: pooled ones would leave one-step changes a tiny
part of the range.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import History, Params
from emfuse_jax.data.dataset import Dataset, gather_history
from emfuse_jax.data.normalizer import Normalizer, fit_normalizer

Anchor = Literal["backtrack", "current"]
"""``backtrack``: slice ``m`` starts ``m - 1`` steps back (any-step models). ``current``:
every slice starts at the newest state and only its action history grows."""


class Batch(NamedTuple):
    """What a dynamics learner is trained on: a window and what followed it, raw units."""

    history: History
    reward: Float[Array, "*batch"]
    next_observation: Float[Array, "*batch obs"]


class Scales(NamedTuple):
    """The coordinates of one expert. ``target`` has leaves ``[slice, obs + 1]``."""

    observation: Normalizer
    action: Normalizer
    target: Normalizer


class Slices(NamedTuple):
    """Inputs of an encoder, raw units, one row per slice of every history."""

    anchor: Float[Array, "slice *batch obs"]
    action: Float[Array, "*batch lag act"]
    """One action history for all slices: an encoder reads its tokens once."""
    lags: Bool[Array, "slice *batch lag"]
    """Which lags belong to the slice."""
    valid: Bool[Array, "slice *batch"]
    """Whether the history is long enough for the slice."""


class Encoded(NamedTuple):
    """What an expert knows of a slice before a target is named, raw units.

    Its chains start at ``start`` and run in units of ``scale``: the proposal's mean and
    standard deviation, or the anchor and the box of the data where there is no proposal.
    """

    feature: Float[Array, "*batch feature"]
    start: Float[Array, "*batch dim"]
    scale: Float[Array, "*batch dim"]


Region = Literal["box", "trust"]
"""Where chains may go. ``box``: the union of the experts' data boxes (ETM). ``trust``: a
neighbourhood of the pooled proposal; an energy trained by negatives around a proposal says
nothing far from it, and a free chain would walk away."""


class Expert(NamedTuple):
    """An energy over targets, and where its chains live.

    ``encode(params, slices) -> Encoded`` with leaves ``[slice, *batch, …]``;
    ``prepare(params, encoded) -> condition``: what is constant along a chain;
    ``energy(params, condition, target [*batch, dim]) -> energy [*batch]``, raw targets;
    ``unit(params) -> [obs]``: the scale of one-step changes, for dimensionless distances.
    ``num_lags``, ``anchor``, ``region`` and ``feature_size`` are static.
    """

    encode: Callable[[Params, Slices], Encoded]
    prepare: Callable[[Params, Encoded], Any]
    energy: Callable[[Params, Any, jax.Array], jax.Array]
    unit: Callable[[Params], jax.Array]
    num_lags: int
    anchor: Anchor
    region: Region
    feature_size: int


def newest_lags(history: History, num_lags: int) -> History:
    """The ``num_lags`` newest steps: models of several lengths can read one history.

    Raises:
        ValueError: if the history is shorter.

    Example:
        >>> observation = jnp.arange(3.0).reshape(3, 1, 1)  # newest first, one row
        >>> history = History(observation, observation, jnp.ones((3, 1), bool))
        >>> newest_lags(history, 2).observation[:, 0, 0].tolist()
        [0.0, 1.0]
    """
    length = history.valid.shape[0]
    if length < num_lags:
        raise ValueError(
            f"the history has {length} lags, the model reads num_lags={num_lags}; gather "
            f"windows of at least {num_lags} (short episodes are masked by `valid`)"
        )
    return jax.tree.map(lambda leaf: leaf[:num_lags], history)


def make_slices(history: History, anchor: Anchor) -> Slices:
    """The slices of a history, longest last; ``num_lags`` of them.

    Example:
        >>> observation = jnp.array([[[2.0]], [[1.0]]])  # [lag, row, obs], newest first
        >>> history = History(observation, 10 * observation, jnp.ones((2, 1), bool))
        >>> slices = make_slices(history, "backtrack")
        >>> slices.anchor[:, 0, 0].tolist()  # where each slice starts
        [2.0, 1.0]
        >>> slices.lags[:, 0].tolist()  # and which actions it knows
        [[True, False], [True, True]]
    """
    num_lags, batch = history.valid.shape[0], history.valid.shape[1:]
    action = jnp.moveaxis(history.action, 0, -2)
    observation = history.observation
    if anchor == "current":
        observation = jnp.broadcast_to(observation[:1], observation.shape)
    lags = jnp.tri(num_lags, dtype=bool).reshape(num_lags, *(1,) * len(batch), num_lags)
    return Slices(
        anchor=observation,
        action=action,
        lags=jnp.broadcast_to(lags, (num_lags, *batch, num_lags)),
        valid=history.valid,
    )


def pick_slice(tree: Any, index: Int[Array, "*batch"]) -> Any:
    """One slice per row of leaves ``[slice, *batch, …]``; the slice axis goes.

    Example:
        >>> by_slice = jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])  # [slice, row]
        >>> pick_slice(by_slice, jnp.array([0, 1, 0])).tolist()
        [1.0, 20.0, 3.0]
    """

    def pick(leaf: jax.Array) -> jax.Array:
        where = index.reshape((1, *index.shape) + (1,) * (leaf.ndim - index.ndim - 1))
        return jnp.take_along_axis(leaf, where, axis=0)[0]

    return jax.tree.map(pick, tree)


def pack_target(
    anchor: Float[Array, "*batch obs"],
    next_observation: Float[Array, "*batch obs"],
    reward: Float[Array, "*batch"],
) -> Float[Array, "*batch dim"]:
    """``(s_{t+1} - anchor, r_t)``.

    Example:
        >>> pack_target(jnp.ones(2), jnp.array([1.5, 1.0]), jnp.array(7.0)).tolist()
        [0.5, 0.0, 7.0]
    """
    return jnp.concatenate([next_observation - anchor, reward[..., None]], axis=-1)


def sample_windows(
    key: jax.Array, dataset: Dataset, batch_size: int, num_lags: int
) -> Batch:
    """Windows ending at rows drawn uniformly. The key is consumed.

    Example:
        >>> from emfuse_jax.data import linear_gaussian
        >>> dataset, _ = linear_gaussian(num_episodes=4, length=10)
        >>> rows = jax.tree.map(jnp.asarray, dataset)
        >>> batch = jax.eval_shape(
        ...     lambda key: sample_windows(key, rows, batch_size=8, num_lags=5), jax.random.key(0)
        ... )
        >>> batch.history.observation.shape, batch.reward.shape
        ((5, 8, 3), (8,))
    """
    index = jax.random.randint(key, (batch_size,), 0, dataset.age.shape[0])
    return Batch(
        gather_history(dataset, index, num_lags),
        dataset.reward[index],
        dataset.next_observation[index],
    )


def fit_scales(
    dataset: Dataset,
    num_lags: int,
    *,
    anchor: Anchor = "backtrack",
    target: Literal["standard", "box"] = "standard",
) -> Scales:
    """Measures the coordinates of an expert on its training data, on the host.

    Args:
        dataset: training rows, raw units.
        num_lags: slices of the model.
        anchor: see `Anchor`.
        target: ``standard`` (mean and standard deviation, for proposal negatives) or
            ``box`` (largest magnitude, no centring: the published ETM scaler).

    Raises:
        ValueError: if no episode is as long as the window.

    Example:
        >>> from emfuse_jax.data import make_dataset
        >>> time = np.arange(9.0)[:, None]
        >>> dataset = make_dataset(
        ...     observations=time**2, actions=0 * time, rewards=time[:, 0],
        ...     next_observations=(time + 1) ** 2,
        ...     terminals=time[:, 0] == 8, timeouts=time[:, 0] > 8,
        ... )
        >>> scales = fit_scales(dataset, 3, target="box")
        >>> scales.target.scale[:, 0].tolist()  # largest change over one, two and three steps
        [17.0, 32.0, 45.0]
    """
    age, observation = np.asarray(dataset.age), np.asarray(dataset.observation)
    rows = np.arange(len(age))
    if age.max() + 1 < num_lags:
        raise ValueError(
            f"the longest episode has {age.max() + 1} steps, the window has num_lags={num_lags}; "
            f"use num_lags of at most {age.max() + 1}"
        )
    targets = []
    for lag in range(num_lags):
        usable = rows[age >= lag]
        start = observation[usable - (lag if anchor == "backtrack" else 0)]
        change = np.asarray(dataset.next_observation)[usable] - start
        targets.append(
            fit_normalizer(
                np.column_stack([change, np.asarray(dataset.reward)[usable]]),
                kind=target,
            )
        )
    return jax.tree.map(
        jnp.asarray,
        Scales(
            observation=fit_normalizer(observation, kind="standard"),
            action=fit_normalizer(np.asarray(dataset.action), kind="standard"),
            target=Normalizer(
                jnp.stack([target.mean for target in targets]),
                jnp.stack([target.scale for target in targets]),
            ),
        ),
    )
