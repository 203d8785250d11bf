r"""Rolls a policy in C MuJoCo and writes what it did as a data set.

    python -m experiments.collect_data --env=hopper --policy=hopper_medium \
        --steps=50000 --out=data/hopper.hdf5
    python -m experiments.collect_data --env=hopper --policy=POLICY.npz \
        --max_speed=2.0 --out=data/hopper-slow.hdf5
    python -m experiments.collect_data --env=walker2d --policy=random \
        --format=minari --out=mine/walker2d/random-v0

``--policy`` is a packaged policy's name, an ``.npz`` in the layout that
``emfuse_jax.data.behaviour`` documents, or ``random``. ``--gravity`` and its like are
factors on the stock physics. ``--min_speed`` and ``--max_speed`` keep the episodes
whose mean forward speed lies between them, so the file may hold fewer rows than
``--steps``.

Run again with the same settings, it leaves the finished file alone. Scores are
D4RL-normalised, in the physics of the installed MuJoCo.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from emfuse_jax.data.behaviour import (
    behaviour_act,
    load_behaviour,
    packaged_behaviours,
    random_act,
)
from emfuse_jax.data.d4rl_reader import KEYS, read_attributes, write_d4rl
from emfuse_jax.data.dataset import episode_bounds, make_dataset
from emfuse_jax.data.load import FORMATS
from emfuse_jax.data.minari_reader import local_datasets, write_minari
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.envs.mujoco_table import Physics, check_environment
from emfuse_jax.evaluation.episodes import MAX_STEPS, ActFn, collect
from emfuse_jax.evaluation.scores import (
    normalized_score,
    normalized_spread,
    reference_score,
)
from experiments import _names
from experiments._progress import Progress
from experiments._run import run_main


def check_recording(config: Any) -> None:
    """What every recording's settings have to be.

    Raises:
        ValueError: for an unknown format, no name, a noise below 0, no rows or no
            environments.
    """
    if config.format not in FORMATS:
        raise ValueError(
            f"format={config.format!r}; expected one of {', '.join(FORMATS)}"
        )
    if not config.out:
        raise ValueError("out is empty; name a file, or for minari an id")
    if not (math.isfinite(config.noise) and config.noise >= 0):
        raise ValueError(f"noise={config.noise}; expected a finite factor of 0 or more")
    for name in ("steps", "num_envs"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Settings of one recording.

    Attributes:
        env: hopper, walker2d or halfcheetah.
        policy: a packaged policy's name, an .npz file, or random.
        steps: rows to record, before episodes are chosen by speed.
        out: the HDF5 file to write, or the Minari id.
        noise: factor on the policy's standard deviation; 0 acts deterministically.
        seed: of the initial states and the policy's noise.
        gravity: factor on gravity.
        friction: factor on the sliding friction.
        mass: factor on masses and inertias.
        damping: factor on the joints' damping.
        gear: factor on the motors' strength.
        min_speed: keep episodes with at least this mean forward speed, in m/s; none:
            all.
        max_speed: keep episodes below this mean forward speed, in m/s; none: all.
        version: gymnasium's rewards, v4 or v5.
        format: d4rl (HDF5) or minari.
        num_envs: environments stepped together; each one's last episode may be cut.
        root: Minari's folder; its own default where empty.
        overwrite: replace an existing data set.
    """

    env: str = "hopper"
    policy: str = "random"
    steps: int = 50_000
    out: str
    noise: float = 1.0
    seed: int = 0
    gravity: float = 1.0
    friction: float = 1.0
    mass: float = 1.0
    damping: float = 1.0
    gear: float = 1.0
    min_speed: float | None = None
    max_speed: float | None = None
    version: Literal["v4", "v5"] = "v4"
    format: Literal["d4rl", "minari"] = "d4rl"
    num_envs: int = 8
    root: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_recording(self)
        low, high = self.speed_range
        if not low < high:
            raise ValueError(f"min_speed={low} must be below max_speed={high}")

    @property
    def speed_range(self) -> tuple[float, float]:
        """The mean speeds of the episodes that are kept."""
        low = -math.inf if self.min_speed is None else self.min_speed
        return low, math.inf if self.max_speed is None else self.max_speed


def run(config: CollectConfig, *, progress: bool = True) -> dict[str, Any]:
    """Records, chooses episodes, writes the data set.

    Args:
        config: the settings.
        progress: whether to show a bar.

    Returns:
        What was recorded: episodes, rows, returns and scores, as plain numbers.

    Raises:
        ValueError: for an unknown environment, a policy of other sizes, no episode in
            the range of speeds, or no output name.
        FileExistsError: if the data set exists and was made with other settings.
        FileNotFoundError: if there is no such policy.
    """
    with _names.environment(config.env):
        check_environment(config.env)
    made = already_made(config)
    if made is not None:
        return made
    check_writable(config)
    env = MujocoBatch(
        config.env,
        config.num_envs,
        version=config.version,
        physics=Physics(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(Physics)}
        ),
    )
    act = _policy(config, env)
    arrays = _roll(config, env, act, progress)
    arrays = _keep_speeds(config, arrays, env.dt)
    summary = summarize(config.env, arrays)
    write(config, arrays, summary)
    return summary


def summarize(
    name: str, arrays: dict[str, np.ndarray], *, max_steps: int = MAX_STEPS
) -> dict[str, Any]:
    """Counts, and returns over the episodes that were not cut by the recording's end.

    Where every episode was cut, all of them count.
    """
    data = make_dataset(**{key: arrays[key] for key in KEYS})
    starts, ends = episode_bounds(data)
    whole = data.terminated[ends - 1] | (ends - starts >= max_steps)
    returns = np.add.reduceat(data.reward.astype(np.float64), starts)
    chosen = returns[whole] if whole.any() else returns
    reference = reference_score(name)
    return {
        "rows": len(data.reward),
        "episodes": len(starts),
        "cut_episodes": int(np.sum(~whole)),
        "return_mean": float(chosen.mean()),
        "return_std": float(chosen.std()),
        "score_mean": float(normalized_score(chosen.mean(), reference)),
        "score_std": float(normalized_spread(chosen.std(), reference)),
        "length_mean": float(np.mean(ends - starts)),
    }


def episode_speeds(arrays: dict[str, np.ndarray], dt: float) -> np.ndarray:
    """Mean forward speed of each episode in m/s, between its first and its last row."""
    starts, ends = episode_bounds(make_dataset(**{key: arrays[key] for key in KEYS}))
    position = arrays["qpos"][:, 0]
    elapsed = dt * np.maximum(ends - 1 - starts, 1)
    return (position[ends - 1] - position[starts]) / elapsed


def _policy(config: CollectConfig, env: MujocoBatch) -> ActFn:
    if config.policy == "random":
        return random_act(env.spec.action_size)
    with _names.behaviour(config.policy):
        try:
            behaviour = load_behaviour(config.policy)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; or use --policy=random") from error
    if behaviour.spec != env.spec:
        raise ValueError(
            f"policy {config.policy!r} is for {behaviour.spec}, {config.env} has "
            f"{env.spec}; choose a policy of this environment (packaged: "
            f"{', '.join(packaged_behaviours()) or 'none'})"
        )
    return behaviour_act(behaviour, noise=config.noise)


def _roll(
    config: CollectConfig, env: MujocoBatch, act: ActFn, progress: bool
) -> dict[str, np.ndarray]:
    description = f"{config.env} {pathlib.Path(config.policy).stem}"
    key, done = jax.random.key(config.seed), 0
    if not progress:
        return collect(key, env, act, config.steps)
    with Progress(config.steps, description=description) as bar:

        def on_step(rows: int) -> None:
            nonlocal done
            done += rows
            bar.update(done)

        return collect(key, env, act, config.steps, on_step=on_step)


def _keep_speeds(
    config: CollectConfig, arrays: dict[str, np.ndarray], dt: float
) -> dict[str, np.ndarray]:
    low, high = config.speed_range
    if (low, high) == (-math.inf, math.inf):
        return arrays
    speeds = episode_speeds(arrays, dt)
    keep = (speeds >= low) & (speeds < high)
    if not keep.any():
        raise ValueError(
            f"none of {len(speeds)} episodes has a mean speed in [{low}, {high}); they "
            f"run from {speeds.min():.3g} to {speeds.max():.3g}, median "
            f"{np.median(speeds):.3g} m/s"
        )
    starts, ends = episode_bounds(make_dataset(**{key: arrays[key] for key in KEYS}))
    rows = np.concatenate([np.arange(starts[i], ends[i]) for i in np.flatnonzero(keep)])
    return {key: value[rows] for key, value in arrays.items()}


def _settings(config: Any) -> str:
    """What decides the rows, for the file's attributes."""
    settings = dataclasses.asdict(config)
    for name in ("out", "root", "overwrite", "format"):
        settings.pop(name)
    policy = pathlib.Path(config.policy)
    if policy.is_file():
        # The file's content is what matters, not where it lay.
        settings["policy"] = policy.name
        settings["policy_sha256"] = hashlib.sha256(policy.read_bytes()).hexdigest()
    return json.dumps(settings, sort_keys=True)


def already_made(config: Any) -> dict[str, Any] | None:
    """The summary of a finished recording with these very settings, if there is one."""
    if config.overwrite:
        return None
    path = pathlib.Path(config.out)
    if config.format == "minari":
        exists = config.out in local_datasets(config.root or None)
    else:
        exists = path.exists()
        attributes = _attributes(path) if path.is_file() else {}
        if attributes.get("how") == _settings(config):
            return json.loads(attributes["summary"])
    if exists:
        raise FileExistsError(
            f"{config.out} exists and is not known to be made with these settings; "
            "choose another --out, or give --overwrite"
        )
    return None


def _attributes(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_attributes(path)
    except OSError:
        return {}


def check_writable(config: Any) -> None:
    """Before the work rather than after it."""
    if config.format != "d4rl":
        return
    folder = pathlib.Path(config.out).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"cannot write into {folder}; choose another --out")


def write(config: Any, arrays: dict[str, np.ndarray], summary: dict[str, Any]) -> None:
    """Writes the data set, with what made it in its attributes."""
    import mujoco

    reference = reference_score(config.env)
    if config.format == "minari":
        write_minari(
            make_dataset(**{key: arrays[key] for key in KEYS}),
            config.out,
            root=config.root or None,
            reference=reference,
            overwrite=config.overwrite,
            description=f"{_settings(config)} mujoco {mujoco.__version__}",
        )
        return
    attributes = {
        "how": _settings(config),
        "summary": json.dumps(summary),
        "environment": f"{config.env}-{config.version}",
        "mujoco": mujoco.__version__,
        "ref_min_score": reference.minimum,
        "ref_max_score": reference.maximum,
    }
    write_d4rl(config.out, arrays, attributes=attributes, overwrite=config.overwrite)


def describe(config: Any, summary: dict[str, Any]) -> str:
    """The summary in a line."""
    return (
        f"{config.out}: {summary['rows']} steps, {summary['episodes']} episodes "
        f"({summary['cut_episodes']} cut by the end of the recording), return "
        f"{summary['return_mean']:.0f} ± {summary['return_std']:.0f}, normalised "
        f"{summary['score_mean']:.1f} ± {summary['score_std']:.1f}, mean length "
        f"{summary['length_mean']:.0f}"
    )


def report(config: CollectConfig) -> None:
    """Records, and says what."""
    print(describe(config, run(config)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(report, CollectConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
