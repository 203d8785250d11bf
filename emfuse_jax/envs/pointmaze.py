"""PointMaze with a fixed goal: gymnasium-robotics' mazes and physics, stepped as a batch.

A ball is pushed through a maze; the reward is 1 for every step that ends within 0.45 of
the goal and 0 for all others, and no episode terminates: its return is the time at the
goal. The goal is not observed. Recordings of a ball that wanders between *random* goals
(`waypoint_act`) are then data without a good trajectory: the way to this goal has to be
put together from parts of many.

The task is D4RL's ``maze2d`` (Fu et al., 2020, https://arxiv.org/abs/2004.07219) with
Farama's mazes and time limits. Needs the package gymnasium-robotics.
"""

import dataclasses
import importlib
import pathlib
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from emfuse_jax.base import SpaceSpec
from emfuse_jax.envs.mujoco_batch import MujocoBatch

GOAL_RADIUS = 0.45
"""Within this distance of the goal a step is paid for."""
SPEED_LIMIT = 5.0
"""Velocities are clipped to ± this before each step."""
START_NOISE = 0.25
"""Starts and targets lie within this distance, per axis, of a cell's centre."""
Cell = tuple[int, int]
"""Row and column of the map."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MazeSpec:
    """One task.

    Attributes:
        map_name: of the map in ``gymnasium_robotics.envs.maze.maps``.
        goal: row and column of the goal's cell.
        max_steps: the time limit of an episode.
    """

    map_name: str
    goal: Cell
    max_steps: int


MAZES = {
    "pointmaze-umaze": MazeSpec(map_name="U_MAZE", goal=(3, 1), max_steps=300),
    "pointmaze-medium": MazeSpec(map_name="MEDIUM_MAZE", goal=(6, 6), max_steps=600),
}
"""The tasks by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Table:
    """What `MujocoBatch` asks of its table."""

    frame_skip: int = 1


class PointMazeBatch(MujocoBatch):
    """``num_envs`` copies of a maze; see `MujocoBatch` for the methods.

    Observations are the ball's position and velocity, actions the force in [−1, 1]².

    Args:
        name: one of `MAZES`.
        num_envs: copies.
        seed: of the initial states.

    Raises:
        ValueError: for an unknown maze or a count that is not positive.
        ImportError: where gymnasium-robotics is not installed.

    Attributes:
        max_steps: the time limit of an episode.
        goal: its position ``[2]``.
        maze: gymnasium-robotics' maze.

    Example:
        >>> env = PointMazeBatch("pointmaze-umaze", 2)
        >>> env.reset().shape, env.max_steps
        ((2, 4), 300)
    """

    def __init__(self, name: str, num_envs: int, *, seed: int = 0) -> None:
        if name not in MAZES:
            raise ValueError(f"unknown maze {name!r}; known: {', '.join(MAZES)}")
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}; expected at least 1")
        self.name, self.num_envs, self.version = name, num_envs, "v3"
        self.task = MAZES[name]
        self.max_steps = self.task.max_steps
        self.maze, self.model = _load_maze(self.task.map_name)
        self.table: Any = _Table()
        self.dt = self.model.opt.timestep
        self.spec = SpaceSpec(4, 2)
        self.goal = self.maze.cell_rowcol_to_xy(np.array(self.task.goal))
        self._starts = [
            xy
            for xy in self.maze.unique_reset_locations
            if np.linalg.norm(xy - self.goal) > 0.5
        ]
        self._mujoco = importlib.import_module("mujoco")
        self._data = [self._mujoco.MjData(self.model) for _ in range(num_envs)]
        self._scratch = self._mujoco.MjData(self.model)
        self.seed(seed)
        self.reset()
        self.seed(seed)

    def reset(self, mask: np.ndarray | None = None) -> np.ndarray:
        """Starts in a random cell other than the goal's, at rest, where ``mask`` is true.

        Returns:
            The observations of all environments ``[env, obs]``, float64.
        """
        rows = range(self.num_envs) if mask is None else np.flatnonzero(mask)
        for i in rows:
            data, generator = self._data[i], self._generators[i]
            self._mujoco.mj_resetData(self.model, data)
            start = self._starts[generator.integers(len(self._starts))]
            data.qpos[:] = start + generator.uniform(-START_NOISE, START_NOISE, 2)
            self._mujoco.mj_forward(self.model, data)
        return self.observation()

    def step(
        self, action: np.ndarray, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step; see `MujocoBatch.step`. Velocities are limited before it, actions
        clipped to [−1, 1]."""
        action = self._check_action(action, self.num_envs)
        rows = range(self.num_envs) if mask is None else np.flatnonzero(mask)
        for i in rows:
            data = self._data[i]
            data.qvel[:] = np.clip(data.qvel, -SPEED_LIMIT, SPEED_LIMIT)
            # As gymnasium-robotics: it leaves another warm start for the solver.
            self._mujoco.mj_forward(self.model, data)
        return super().step(np.clip(action, -1.0, 1.0), mask)

    def oracle_step(
        self, qpos: np.ndarray, qvel: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step from any states; see `MujocoBatch.oracle_step`."""
        action = self._check_action(action, len(qpos))
        qvel = np.clip(qvel, -SPEED_LIMIT, SPEED_LIMIT)
        return super().oracle_step(qpos, qvel, np.clip(action, -1.0, 1.0))

    def reward(self, observation: np.ndarray) -> np.ndarray:
        """1 within `GOAL_RADIUS` of the goal, else 0; ``[env]``, float64."""
        distance = np.linalg.norm(observation[:, :2] - self.goal, axis=-1)
        return (distance <= GOAL_RADIUS).astype(np.float64)

    def _observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        return np.concatenate([qpos, qvel], axis=1)

    def _outcome(
        self, before: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        del before, action
        observation = self._observe(qpos, qvel)
        return observation, self.reward(observation), np.zeros(len(qpos), bool)


def waypoint_act(
    env: PointMazeBatch, *, noise: float = 0.5, goal: np.ndarray | None = None
) -> Callable[[jax.Array, np.ndarray], np.ndarray]:
    """A controller that steers along the shortest way to a target, cell by cell, with the
    signature of a policy.

    Proportional to the distance from the next cell's centre and damped (gains 10 and −1,
    those of Farama's recordings). It remembers each environment's target: make a new one
    for every recording.

    Args:
        env: the maze.
        noise: standard deviation of what is added to the force before it is clipped.
        goal: where to go and stay; None: to a random cell, then to another one.

    Example:
        >>> env = PointMazeBatch("pointmaze-umaze", 2)
        >>> act = waypoint_act(env, goal=env.goal)
        >>> act(jax.random.key(0), env.reset()).shape
        (2, 2)
    """
    targets: list[np.ndarray | None] = [goal] * env.num_envs
    free = [np.asarray(xy) for xy in env.maze.unique_goal_locations]
    routes: dict[tuple[Cell, Cell], Cell] = {}

    def target_of(row: int, position: np.ndarray, generator: Any) -> np.ndarray:
        target = targets[row]
        while target is None or (
            goal is None and np.linalg.norm(target - position) <= GOAL_RADIUS
        ):
            centre = free[generator.integers(len(free))]
            target = centre + generator.uniform(-START_NOISE, START_NOISE, 2)
        targets[row] = target
        return target

    def waypoint(position: np.ndarray, target: np.ndarray) -> np.ndarray:
        here, there = (_cell(env.maze, xy) for xy in (position, target))
        if here == there:
            return target
        if (here, there) not in routes:
            routes[here, there] = _first_step(env.maze.maze_map, here, there)
        return env.maze.cell_rowcol_to_xy(np.array(routes[here, there]))

    def act(key: jax.Array, observation: np.ndarray) -> np.ndarray:
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        observation = np.asarray(observation, np.float64)
        position, velocity = observation[:, :2], observation[:, 2:]
        aim = [
            waypoint(xy, target_of(row, xy, generator))
            for row, xy in enumerate(position)
        ]
        force = 10.0 * (np.stack(aim) - position) - velocity
        force += noise * generator.standard_normal(force.shape)
        return np.clip(force, -1.0, 1.0).astype(np.float32)

    return act


def _cell(maze: Any, position: np.ndarray) -> Cell:
    row, column = maze.cell_xy_to_rowcol(position)
    return int(row), int(column)


def _first_step(maze_map: Any, start: Cell, end: Cell) -> Cell:
    """The cell after ``start`` on a shortest way to ``end``, by breadth-first search from
    the end."""
    queue, following = deque([end]), {end: end}
    while queue and start not in following:
        row, column = cell = queue.popleft()
        sides = ((row + 1, column), (row - 1, column), (row, column + 1))
        for side in (*sides, (row, column - 1)):
            if side not in following and maze_map[side[0]][side[1]] != 1:
                following[side] = cell
                queue.append(side)
    return following.get(start, end)


def _load_maze(map_name: str) -> tuple[Any, Any]:
    """gymnasium-robotics' maze, and the MuJoCo model that it writes to a file."""
    try:
        importlib.import_module("gymnasium_robotics")
    except ImportError as error:
        raise ImportError(
            "PointMaze needs gymnasium-robotics; pip install emfuse_jax[envs]"
        ) from error
    mujoco = importlib.import_module("mujoco")
    maps = importlib.import_module("gymnasium_robotics.envs.maze.maps")
    mazes = importlib.import_module("gymnasium_robotics.envs.maze.maze_v4")
    assets = pathlib.Path(str(mazes.__file__)).parents[1] / "assets"
    maze, path = mazes.Maze.make_maze(
        str(assets / "point" / "point.xml"), getattr(maps, map_name), 1.0, 0.4
    )
    try:
        return maze, mujoco.MjModel.from_xml_path(path)
    finally:
        pathlib.Path(path).unlink()
