r"""Records a ball that wanders through a maze, and writes what it did as a data set.

    python -m experiments.collect_pointmaze --out=data/umaze.hdf5
    python -m experiments.collect_pointmaze --env=pointmaze-medium --steps=100000 \
        --format=minari --out=mine/pointmaze/medium-v0

A controller steers from one random cell to the next along the shortest way. The reward is
1 near the one goal of the task, which it passes now and then: the sparse-reward case, in
which the way to the goal has to be put together. ``--policy=goal`` goes straight to the
goal and stays there, the best that can be done; ``random`` pushes at random.

Run again with the same settings, it leaves the finished file alone. Scores are 0 for random
forces and 100 for ``--policy=goal``.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax

from emfuse_jax.data.behaviour import random_act
from emfuse_jax.envs.pointmaze import PointMazeBatch, waypoint_act
from emfuse_jax.evaluation.episodes import ActFn, collect
from experiments import _names, collect_data
from experiments._progress import Progress
from experiments._run import run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectPointMazeConfig:
    """Settings of one recording.

    Attributes:
        env: pointmaze-umaze or pointmaze-medium.
        policy: waypoint wanders, goal goes to the goal, random pushes at random.
        steps: rows to record.
        out: the HDF5 file to write, or the Minari id.
        noise: standard deviation of what is added to the controller's force.
        seed: of the initial states, the targets and the noise.
        format: d4rl (HDF5) or minari.
        num_envs: mazes stepped together; each one's last episode may be cut.
        root: Minari's folder; its own default where empty.
        overwrite: replace an existing data set.
    """

    env: str = "pointmaze-umaze"
    policy: Literal["waypoint", "goal", "random"] = "waypoint"
    steps: int = 50_000
    out: str
    noise: float = 0.5
    seed: int = 0
    format: Literal["d4rl", "minari"] = "d4rl"
    num_envs: int = 10
    root: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        collect_data.check_recording(self)

    @property
    def version(self) -> str:
        """Of gymnasium-robotics' environment."""
        return "v3"


def run(config: CollectPointMazeConfig, *, progress: bool = True) -> dict[str, Any]:
    """Records and writes the data set; returns what was recorded, as plain numbers.

    Args:
        config: the settings.
        progress: whether to show a bar.

    Raises:
        ValueError: for an unknown maze or no output name.
        FileExistsError: if the data set exists and was made with other settings.
        ImportError: where gymnasium-robotics is not installed.
    """
    made = collect_data.already_made(config)
    if made is not None:
        return made
    collect_data.check_writable(config)
    with _names.environment(config.env):
        env = PointMazeBatch(config.env, config.num_envs)
    act, done = _policy(config, env), 0
    bar = Progress(config.steps if progress else 0, description=config.env)

    def on_step(rows: int) -> None:
        nonlocal done
        done += rows
        if progress:
            bar.update(done)

    with bar:
        arrays = collect(
            jax.random.key(config.seed),
            env,
            act,
            config.steps,
            max_steps=env.max_steps,
            on_step=on_step,
        )
    summary = collect_data.summarize(config.env, arrays, max_steps=env.max_steps)
    collect_data.write(config, arrays, summary)
    return summary


def _policy(config: CollectPointMazeConfig, env: PointMazeBatch) -> ActFn:
    if config.policy == "random":
        return random_act(env.spec.action_size)
    goal = env.goal if config.policy == "goal" else None
    return waypoint_act(env, noise=config.noise, goal=goal)


def report(config: CollectPointMazeConfig) -> None:
    """Records, and says what."""
    print(collect_data.describe(config, run(config)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(report, CollectPointMazeConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
