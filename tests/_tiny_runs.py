"""The command lines at a size at which nothing but compiling takes time."""

import pathlib

import jax
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.data.d4rl_reader import write_d4rl

MODEL = (
    *("--adetm.num_lags=2", "--adetm.energy_sizes=8", "--adetm.head_sizes=8"),
    *("--adetm.state_features=8", "--adetm.action_features=8", "--adetm.num_heads=2"),
    *("--adetm.batch_size=16", "--adetm.energy_rows=8", "--adetm.num_steps=20"),
    *("--chunk=5", "--save_every=2"),
)
"""Of train_dynamics: four rows of metrics, checkpoints at 10 and 20."""
POLICY = (
    *("--sac.hidden_sizes=8", "--rollout.rollout_rows=8", "--rollout.horizon=2"),
    *("--rollout.updates_per_rollout=5", "--rollout.batch_size=16"),
    *("--num_updates=20", "--eval_every=10", "--eval_episodes=2"),
    "--cut_quantile=none",
)
"""Of train_policy: checkpoints after 2 and 4 chunks of 5 updates."""


def arrays(rows=200, length=20, observation=11, action=3, seed=0):
    """Random steps in D4RL's layout: ``rows / length`` episodes, no termination."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((rows + 1, observation)).astype(np.float32)
    timeouts = np.arange(1, rows + 1) % length == 0
    return {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": rng.uniform(-1, 1, (rows, action)).astype(np.float32),
        "rewards": rng.standard_normal(rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": timeouts,
    }


def write_data(path, **changes):
    """A data set on the disk; keywords are those of `arrays`."""
    write_d4rl(path, arrays(**changes))
    return path


def rows_of(run_dir):
    """The metrics of a run, without the time of the day."""
    rows = artifacts.read_metrics(pathlib.Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def digests(folder):
    """Digest by step: two runs with the same ones hold the same bits."""
    return {
        step: artifacts.read_meta(folder, step)["digest"]
        for step in artifacts.steps(folder)
    }


def snapshot(folder):
    """Every file's bytes, by name."""
    folder = pathlib.Path(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TraceCounts:
    """Counts how often functions were traced by ``jit``, by name; use with ``with``."""

    EVENT = "/jax/core/compile/jaxpr_trace_duration"

    def __init__(self):
        self.counts = {}

    def _listen(self, event, duration, **facts):
        if event == self.EVENT:
            name = facts.get("fun_name", "")
            self.counts[name] = self.counts.get(name, 0) + 1

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self.counts

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)
