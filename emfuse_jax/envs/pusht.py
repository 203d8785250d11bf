"""Push-T: a disc pushes a T onto its outline; the ``gym-pusht`` package and an expert for it.

The task of implicit behavioural cloning and of diffusion policies, without their recorded
demonstrations: `scripted_pusher` plans straight pushes with a copy of the simulator. An
episode is over when the T covers 95 % of its outline, or after 300 steps of 0.1 s; its score
is the largest coverage that it reached.

Observations are ``[agent x, y ‖ T x, y ‖ cos, sin of the T's angle]`` with positions scaled
from the arena's 512 pixels to [-1, 1]; actions are set-points of the disc in the same scale.

Needs the package gym-pusht, imported on first use.

References:
    Chi et al., "Diffusion Policy", RSS 2023, section V-A. https://arxiv.org/abs/2303.04137
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from emfuse_jax.base import SpaceSpec

SPEC = SpaceSpec(6, 2)
MAX_STEPS = 300
HALF = 256.0
"""Half the arena, in pixels."""
SUCCESS = 0.95
_DISC = 15.0
_SUBSTEPS = 10

Controller = Callable[[np.ndarray], np.ndarray]
"""``observation [obs] -> action [act]``, one episode's; it may remember."""


class Episode(NamedTuple):
    """One recorded episode; ``coverage`` is of the outline after each step."""

    observation: np.ndarray
    action: np.ndarray
    next_observation: np.ndarray
    coverage: np.ndarray

    @property
    def succeeded(self) -> bool:
        return bool(self.coverage[-1] > SUCCESS)


def make_pusht() -> Any:
    """gym-pusht's environment, with its full state for an observation.

    Raises:
        ImportError: where gym-pusht is not installed.
    """
    try:
        module = importlib.import_module("gym_pusht.envs.pusht")
    except ImportError as error:
        raise ImportError(
            "Push-T needs gym-pusht; pip install emfuse_jax[envs]"
        ) from error
    return module.PushTEnv(obs_type="state")


def observe(state: np.ndarray) -> np.ndarray:
    """gym-pusht's state ``[agent xy, T xy, angle]`` as an observation.

    Example:
        >>> observe(np.array([256.0, 512.0, 0.0, 256.0, 0.0])).tolist()
        [0.0, 1.0, -1.0, 0.0, 1.0, 0.0]
    """
    angle = state[4]
    position = np.asarray(state[:4]) / HALF - 1.0
    return np.concatenate([position, [np.cos(angle), np.sin(angle)]])


def play(
    env: Any, controller: Controller, seed: int, *, max_steps: int = MAX_STEPS
) -> Episode:
    """One episode.

    Args:
        env: from `make_pusht`.
        controller: made anew for each episode if it remembers.
        seed: of the start.
        max_steps: the time limit.

    Raises:
        ValueError: if ``max_steps`` is below 1 or an action is not finite.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}; expected at least 1")
    state, _ = env.reset(seed=int(seed))
    observations, actions, coverages = [observe(state)], [], []
    for _ in range(max_steps):
        action = np.asarray(controller(observations[-1]), np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"action {action}; expected two finite numbers in [-1, 1]")
        action = np.clip(action, -1.0, 1.0)
        state, _, done, _, info = env.step((action + 1.0) * HALF)
        observations.append(observe(state))
        actions.append(action)
        coverages.append(info["coverage"])
        if done:
            break
    seen = np.stack(observations).astype(np.float32)
    return Episode(
        observation=seen[:-1],
        action=np.stack(actions).astype(np.float32),
        next_observation=seen[1:],
        coverage=np.asarray(coverages, np.float32),
    )


def d4rl_arrays(episodes: list[Episode]) -> dict[str, np.ndarray]:
    """Episodes in D4RL's layout, for `data.dataset.make_dataset` and the HDF5 readers.

    Rewards are coverages over 95 %, at most 1, as gym-pusht pays them; covered outlines
    terminate, the time limit truncates.

    Raises:
        ValueError: if there are none.

    Example:
        >>> rows = np.zeros((3, 2))
        >>> episode = Episode(rows, rows, rows, coverage=np.array([0.1, 0.5, 0.96]))
        >>> arrays = d4rl_arrays([episode])
        >>> arrays["terminals"].tolist(), arrays["timeouts"].tolist()
        ([False, False, True], [False, False, False])
    """
    if not episodes:
        raise ValueError("no episodes; expected at least one")
    last = np.cumsum([len(episode.action) for episode in episodes]) - 1
    terminals = np.zeros(last[-1] + 1, bool)
    terminals[last] = [episode.succeeded for episode in episodes]
    timeouts = np.zeros_like(terminals)
    timeouts[last] = ~terminals[last]
    coverage = np.concatenate([episode.coverage for episode in episodes])
    joined = {
        name: np.concatenate([getattr(episode, name) for episode in episodes])
        for name in ("observation", "action", "next_observation")
    }
    return {
        "observations": joined["observation"],
        "actions": joined["action"],
        "rewards": np.clip(coverage / SUCCESS, 0.0, 1.0).astype(np.float32),
        "next_observations": joined["next_observation"],
        "terminals": terminals,
        "timeouts": timeouts,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PusherConfig:
    """Settings of `scripted_pusher`; lengths in pixels.

    Attributes:
        num_candidates: pushes tried in the simulator for each one made.
        lengths: of a push, beyond the contact; one is drawn.
        clearance: between disc and T before a push and on the way to it.
        spread: largest angle between a push and the side's normal, in radians.
    """

    num_candidates: int = 48
    lengths: tuple[float, ...] = (5.0, 12.0, 25.0, 50.0, 90.0)
    clearance: float = 6.0
    spread: float = 0.4


def scripted_pusher(
    config: PusherConfig, generator: np.random.Generator, simulator: Any = None
) -> Controller:
    """Straight pushes, the best of some random ones each time.

    It draws points on the T's sides, simulates a push at each, and makes the one that
    brings the corners nearest to those of the outline; on the way there it goes around
    the T. It sees what a policy sees and knows the simulator.

    Args:
        config: see `PusherConfig`.
        generator: draws the candidates.
        simulator: an environment of its own, to be shared by controllers in turn.
    """
    simulator = make_pusht() if simulator is None else simulator
    simulator.reset(seed=0)
    plan: list[np.ndarray] = []

    def act(observation: np.ndarray) -> np.ndarray:
        agent, block, angle = _pixels(observation)
        if not plan:
            plan.extend(_best_push(config, generator, simulator, agent, block, angle))
        return plan.pop(0) / HALF - 1.0

    return act


def _pixels(observation: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    position = (np.asarray(observation[:4], np.float64) + 1.0) * HALF
    return position[:2], position[2:], float(np.arctan2(*observation[[5, 4]]))


def _place(simulator: Any, agent: np.ndarray, block: np.ndarray, angle: float) -> None:
    simulator.agent.position = tuple(agent)
    simulator.agent.velocity = (0.0, 0.0)
    simulator.block.angle = angle
    simulator.block.position = tuple(block)
    simulator.block.velocity = (0.0, 0.0)
    simulator.block.angular_velocity = 0.0
    simulator.space.reindex_shapes_for_body(simulator.block)
    simulator.space.reindex_shapes_for_body(simulator.agent)


def _corners(simulator: Any, position: Any, angle: float) -> np.ndarray:
    local = np.array(
        [tuple(v) for shape in simulator._block_shapes for v in shape.get_vertices()]
    )
    cos, sin = np.cos(angle), np.sin(angle)
    return local @ np.array([[cos, sin], [-sin, cos]]) + np.asarray(position)


def _distance(simulator: Any) -> float:
    """Mean distance of the T's corners from the outline's."""
    goal = simulator.goal_pose
    here = _corners(simulator, simulator.block.position, simulator.block.angle)
    there = _corners(simulator, goal[:2], goal[2])
    return float(np.linalg.norm(here - there, axis=1).mean())


def _best_push(
    config: PusherConfig,
    generator: np.random.Generator,
    simulator: Any,
    agent: np.ndarray,
    block: np.ndarray,
    angle: float,
) -> list[np.ndarray]:
    """Set-points of the best candidate, the way to it first."""
    best: tuple[float, list[np.ndarray]] = (np.inf, [agent])
    for start, end in _candidates(config, generator, simulator, block, angle):
        _place(simulator, agent, block, angle)
        way = _way(config, simulator, agent, start)
        if way is None:
            continue
        push = _push(start, end)
        _place(simulator, start, block, angle)
        for target in push:
            _step(simulator, target)
        # A long way costs time; so little that it decides between equals only.
        cost = _distance(simulator) + 0.02 * (len(way) + len(push))
        if cost < best[0]:
            best = (cost, [*way, *push])
    return best[1]


def _candidates(
    config: PusherConfig,
    generator: np.random.Generator,
    simulator: Any,
    block: np.ndarray,
    angle: float,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Start and end of the disc's centre, of random pushes on the T's sides."""
    sides = _sides(_corners(simulator, block, angle))
    weight = np.array([np.linalg.norm(b - a) for a, b, _ in sides])
    weight /= weight.sum()
    for _ in range(config.num_candidates):
        a, b, normal = sides[generator.choice(len(sides), p=weight)]
        contact = a + generator.uniform(0.05, 0.95) * (b - a)
        turn = generator.uniform(-config.spread, config.spread)
        cos, sin = np.cos(turn), np.sin(turn)
        direction = -np.array(
            [cos * normal[0] - sin * normal[1], sin * normal[0] + cos * normal[1]]
        )
        start = contact + (_DISC + config.clearance) * normal
        length = config.clearance + generator.choice(config.lengths)
        end = np.clip(start + length * direction, 22.0, 490.0)
        if np.all((start > 22.0) & (start < 490.0)):
            yield start, end


def _sides(corners: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The outer sides of the T with their outward normals."""
    sides = []
    for shape, other in ((corners[:4], corners[4:]), (corners[4:], corners[:4])):
        center = shape.mean(axis=0)
        for a, b in zip(shape, np.roll(shape, -1, axis=0), strict=True):
            normal = np.array([b[1] - a[1], a[0] - b[0]])
            normal /= np.linalg.norm(normal)
            normal *= np.sign(normal @ (0.5 * (a + b) - center))
            if not _inside(other, 0.5 * (a + b) + 2.0 * normal):
                sides.append((a, b, normal))
    return sides


def _inside(polygon: np.ndarray, point: np.ndarray) -> bool:
    """Whether a convex polygon holds a point."""
    edge = np.roll(polygon, -1, axis=0) - polygon
    to = point - polygon
    cross = edge[:, 0] * to[:, 1] - edge[:, 1] * to[:, 0]
    return bool(np.all(cross >= 0) or np.all(cross <= 0))


def _way(
    config: PusherConfig, simulator: Any, agent: np.ndarray, start: np.ndarray
) -> list[np.ndarray] | None:
    """Set-points that lead around the T to where a push starts; None where none is found."""
    radius = _DISC + 0.5 * config.clearance
    if not _free(simulator, start, start, _DISC + 1.0):
        return None
    turn = np.linspace(0.0, 2.0 * np.pi, 12, endpoint=False)
    center = np.array(simulator.block.local_to_world(simulator.block.center_of_gravity))
    ring = center + 115.0 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    ring = [point for point in ring if np.all((point > 22.0) & (point < 490.0))]
    if _free(simulator, agent, start, radius):
        return _glide(agent, start)
    leave = [_free(simulator, agent, point, _DISC - 1.0) for point in ring]
    reach = [_free(simulator, point, start, radius) for point in ring]
    best: tuple[float, list[np.ndarray] | None] = (np.inf, None)
    for i, first in enumerate(ring):
        for j, second in enumerate(ring):
            if leave[i] and reach[j]:
                length = sum(
                    np.linalg.norm(b - a)
                    for a, b in ((agent, first), (first, second), (second, start))
                )
                if length < best[0] and _free(simulator, first, second, radius):
                    way = _glide(agent, first) + _glide(first, second)
                    best = (float(length), way + _glide(second, start))
    return best[1]


def _free(simulator: Any, a: np.ndarray, b: np.ndarray, radius: float) -> bool:
    """Whether a disc can go straight from ``a`` to ``b`` without touching the T."""
    hits = simulator.space.segment_query(
        tuple(a), tuple(b), radius, simulator._block_shapes[0].filter
    )
    return all(hit.shape not in simulator._block_shapes for hit in hits)


def _glide(a: np.ndarray, b: np.ndarray, stride: float = 60.0) -> list[np.ndarray]:
    """Set-points from ``a`` to ``b`` and a rest there: the disc follows a set-point with a
    delay of a step or two, and would cut corners without it."""
    count = int(np.ceil(np.linalg.norm(b - a) / stride))
    points = [a + (b - a) * (i + 1) / count for i in range(count)]
    return [*points, b] if count else []


def _push(start: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
    return [*_glide(start, end, 30.0), end]


def _step(simulator: Any, target: np.ndarray) -> None:
    """gym-pusht's control step without its reward."""
    agent, dt = simulator.agent, simulator.dt
    x, y = (float(v) for v in target)
    for _ in range(_SUBSTEPS):
        (px, py), (vx, vy) = agent.position, agent.velocity
        ax = simulator.k_p * (x - px) - simulator.k_v * vx
        ay = simulator.k_p * (y - py) - simulator.k_v * vy
        agent.velocity = (vx + ax * dt, vy + ay * dt)
        simulator.space.step(dt)
