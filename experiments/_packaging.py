"""Copies a behaviour policy's snapshot into the package and documents it."""

import importlib.metadata
import json
import pathlib
import shlex
import shutil
from collections.abc import Callable
from typing import Any

from emfuse_jax import artifacts
from emfuse_jax.data.behaviour import Behaviour, load_behaviour
from experiments._found import run_config

PACKAGING = ("package", "snapshot", "package_dir", "package_episodes")
"""Settings of a packaging; the others are of the training."""


def package(
    config: Any, usual: Any, score: Callable[[str, Behaviour], dict[str, float]]
) -> dict[str, Any]:
    """Copies a snapshot into the package and documents it.

    Args:
        config: a `TrainBehaviourConfig` whose ``package`` is set.
        usual: one of default settings, to tell which flags the training was given.
        score: ``(environment, policy) -> numbers`` to record.

    Returns:
        The policy's record in ``policies.json``.

    Raises:
        FileNotFoundError: if there is no such run or snapshot; lists those there are.
    """
    run_dir = pathlib.Path(config.run_dir)
    made = run_config(run_dir)
    source = snapshot_path(run_dir, config.snapshot)
    if not source.exists():
        steps = sorted(int(path.stem) for path in source.parent.glob("*.npz"))
        raise FileNotFoundError(
            f"no snapshot {config.snapshot} in {run_dir}; there are {steps}"
        )
    folder = pathlib.Path(config.package_dir)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{config.package}.npz"
    shutil.copyfile(source, target)
    record = {
        "env": made["env"],
        "snapshot": config.snapshot,
        "episodes": config.package_episodes,
        **score(made["env"], load_behaviour(target)),
        "mujoco": importlib.metadata.version("mujoco"),
        "commands": _commands(config, made, artifacts.to_json(usual)),
    }
    table = folder / "policies.json"
    records = artifacts.read_json(table) if table.exists() else {}
    records[target.name] = record
    artifacts.write_json(table, dict(sorted(records.items())))
    (folder / "README.md").write_text(describe(artifacts.read_json(table)))
    return record


def _commands(config: Any, made: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """What makes and packages the snapshot again."""
    program = "python -m experiments.train_behaviour"
    run_dir = f"--run_dir={config.run_dir}"
    ours = {k: v for k, v in made.items() if k not in ("env", "run_dir", *PACKAGING)}
    flags = [
        shlex.quote(f"--{name}={json.dumps(value, separators=(',', ':'))}")
        for name, value in ours.items()
        if value != usual[name]
    ]
    package = f"--package={config.package} --snapshot={config.snapshot}"
    return [
        " ".join([program, f"--env={made['env']}", run_dir, *flags]),
        f"{program} {run_dir} {package}",
    ]


def describe(records: dict[str, Any]) -> str:
    """The README of the packaged policies."""
    rows = []
    for name, record in records.items():
        returns = [
            f"{record[f'{label}_return']:.0f} ({record[f'{label}_score']:.1f} "
            f"± {record[f'{label}_score_std']:.1f})"
            for label in ("stochastic", "deterministic")
        ]
        cells = [f"`{name}`", record["env"], f"{record['snapshot']:,}", *returns]
        rows.append(f"| {' | '.join(cells)} | {record['episodes']} |")
    versions = ", ".join(sorted({record["mujoco"] for record in records.values()}))
    commands = dict.fromkeys(
        line for record in records.values() for line in record["commands"]
    )
    return _README.format(
        rows="\n".join(rows), mujoco=versions, commands="\n".join(commands)
    )


_README = """# Packaged behaviour policies

Written by `experiments/train_behaviour.py` from `policies.json`; do not edit.

Snapshots of soft actor-critic, stopped half-way: what a data set of medium level is
collected with. `collect_data --policy=hopper_medium` takes them by name; the layout is
documented in `emfuse_jax/data/behaviour.py`. Returns are means over episodes of at most
1000 steps of gymnasium's v4 environments in MuJoCo {mujoco}, sampled and deterministic;
in parentheses the D4RL-normalised score and its standard deviation over episodes.

| policy | environment | transitions | sampled | deterministic | episodes |
| --- | --- | --- | --- | --- | --- |
{rows}

Made by these commands, pinned to one core (`taskset -c 0`, with `OMP_NUM_THREADS=1` and
`XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`), which gives the same policies bit for
bit with the same versions on the same kind of processor. On several cores matrix products
are summed in another order, and within a few thousand steps it is another policy.

```
{commands}
```
"""


def snapshot_path(run_dir: pathlib.Path, step: int) -> pathlib.Path:
    """Where the snapshot of one step lies."""
    return run_dir / "snapshots" / f"{step}.npz"
