"""D4RL's normalised scores: 0 is a random policy, 100 the benchmark's expert.

References: Fu et al., "D4RL: Datasets for Deep Data-Driven Reinforcement Learning",
2020, https://arxiv.org/abs/2004.07219, appendix and ``d4rl/infos.py``. A score is
"D4RL-normalised" for any simulator version; name the version beside it.
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike


class ReferenceScore(NamedTuple):
    """Mean returns of the random and of the expert policy."""

    minimum: float
    maximum: float


REFERENCE_SCORES = {
    "hopper": ReferenceScore(-20.272305, 3234.3),
    "walker2d": ReferenceScore(1.629008, 4592.3),
    "halfcheetah": ReferenceScore(-280.178953, 12135.0),
}


MAZE_SCORES = {
    "pointmaze-umaze": ReferenceScore(14.2, 231.7),
    "pointmaze-medium": ReferenceScore(0.0, 468.8),
}
"""Ours, since D4RL's mazes have other sizes and time limits: random forces, and the waypoint
controller that goes to the goal and stays (means of 100 and of 20 episodes)."""


def reference_score(name: str) -> ReferenceScore:
    """The table's row.

    Raises:
        ValueError: for an environment without reference returns; lists those that have.

    Example:
        >>> reference_score("hopper").maximum
        3234.3
    """
    known = REFERENCE_SCORES | MAZE_SCORES
    if name not in known:
        raise ValueError(
            f"no reference returns for {name!r}; known: {', '.join(known)}. Report raw "
            "returns, or pass your own ReferenceScore(minimum, maximum)"
        )
    return known[name]


def normalized_score(
    returns: ArrayLike, reference: ReferenceScore
) -> np.ndarray | np.floating:
    """``100 (return - min) / (max - min)``, for returns and for means of returns.

    Not for standard deviations or interval widths: see `normalized_spread`.

    Example:
        >>> float(normalized_score(3234.3, REFERENCE_SCORES["hopper"]))
        100.0
    """
    span = reference.maximum - reference.minimum
    return 100.0 * (np.asarray(returns, np.float64) - reference.minimum) / span


def normalized_spread(
    spread: ArrayLike, reference: ReferenceScore
) -> np.ndarray | np.floating:
    """``100 spread / (max - min)``: differences of returns scale without the offset.

    Example:
        >>> reference = reference_score("hopper")
        >>> normalized_spread(reference.maximum - reference.minimum, reference).item()
        100.0
    """
    span = reference.maximum - reference.minimum
    return 100.0 * np.asarray(spread, np.float64) / span
