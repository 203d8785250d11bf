r"""Does ``kill -9`` at any moment cost more than the work since the last checkpoint?

    python -m benchmarks.soak_kill --output=runs/soak/kill.json
    python -m benchmarks.soak_kill --stages=expert_a,policy --kills=1

Every command runs once undisturbed. A second run of it, in a folder of its own, is killed
with all its processes at random moments, every other time while it writes a file, and
given the same command again. In the end the two folders must hold the same rows, results
and checkpoints, bit for bit, and no kill may have cost more than one interval between
checkpoints, or left a checkpoint that is damaged. Both run on one thread. Temporary files
that a killed writer leaves behind are listed, not counted as a difference.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import _kill_stages as kill_stages
from benchmarks._run_contents import contents, leftovers, newest_steps
from emfuse_jax import artifacts
from emfuse_jax.artifacts.config import unknown_name
from experiments._jobs import single_thread

_ROOT = pathlib.Path(__file__).parents[1]
_NAMES = [stage.name for stage in kill_stages.STAGES]
_WRITING = ("*.orbax-checkpoint-tmp*", ".*.json.*", ".*.partial", ".tmp*", "*.deleted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KillConfig:
    """Settings.

    Attributes:
        stages: names; none: all of them.
        kills: per stage.
        seed: of the moments.
        limit: seconds that one command may take.
        folder: for the runs; what is there from an earlier soak is deleted.
        output: the result.
    """

    stages: tuple[str, ...] = ()
    kills: int = 3
    seed: int = 0
    limit: float = 900.0
    folder: str = "runs/soak/kill"
    output: str = "runs/soak/kill.json"

    def __post_init__(self) -> None:
        for name in self.stages:
            if name not in _NAMES:
                raise ValueError(unknown_name("stage", name, _NAMES))


def soak(config: KillConfig) -> dict[str, Any]:
    """Runs and kills everything, writes the result and returns it."""
    folder = pathlib.Path(config.folder).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    results: dict[str, Any] = {}
    chosen = config.stages or tuple(_NAMES)
    for number, stage in enumerate(kill_stages.STAGES):
        if _is_needed(stage.name, chosen):
            started = time.monotonic()
            _finish(config, stage, folder / "whole", folder / "whole")
            seconds = time.monotonic() - started
            if stage.name in chosen:
                rng = np.random.default_rng([config.seed, number])
                results[stage.name] = _disturb(config, stage, folder, seconds, rng)
                print(f"{stage.name}: {_brief(results[stage.name])}", flush=True)
    document = {
        "config": artifacts.to_json(config),
        "provenance": artifacts.provenance(seed=config.seed),
        "kills": sum(result["kills"] for result in results.values()),
        "kills_while_writing": sum(r["kills_while_writing"] for r in results.values()),
        "equal": all(not result["differences"] for result in results.values()),
        "results": results,
    }
    output = pathlib.Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(output, document)
    return document


def _disturb(
    config: KillConfig,
    stage: kill_stages.Stage,
    folder: pathlib.Path,
    seconds: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Kills a second run of a stage, finishes it, and compares."""
    out = folder / "killed" / stage.name
    moments, writing, lost = [], 0, {}
    for number in range(config.kills):
        moment = float(rng.uniform(0.05, 0.95) * seconds)
        while_writing = number % 2 == 1
        killed = _kill(config, stage, folder, moment, while_writing=while_writing)
        if killed is None:  # it was done before
            continue
        moments.append(round(killed[0], 3))
        writing += killed[1]
        for name, (row, checkpoint) in newest_steps(out).items():
            lost[name] = max(lost.get(name, 0), row - checkpoint)
    error = _finish(config, stage, folder / "killed", folder / "whole")
    whole, again = contents(folder / "whole" / stage.name), contents(out)
    different = artifacts.differences(whole, again)
    intervals = _intervals(folder / "whole" / stage.name)
    different += [
        f"{name}: {steps} steps were lost, the interval is {intervals.get(name)}"
        for name, steps in lost.items()
        if steps > intervals.get(name, steps)
    ]
    if "was damaged" in error:
        different.append(f"a checkpoint was damaged: {error[-300:]}")
    return {
        "seconds": round(seconds, 1),
        "kills": len(moments),
        "kills_while_writing": writing,
        "moments": moments,
        "steps_lost_at_most": lost,
        "files_compared": len(whole),
        "leftovers": leftovers(out),
        "differences": different[:20],
    }


def _kill(
    config: KillConfig,
    stage: kill_stages.Stage,
    folder: pathlib.Path,
    moment: float,
    *,
    while_writing: bool,
) -> tuple[float, bool] | None:
    """Starts a stage and kills it; when, and whether it was writing; None if it ended."""
    out = folder / "killed" / stage.name
    process = _start(stage, folder / "killed", folder / "whole")
    started = time.monotonic()
    found = False
    while process.poll() is None:
        age = time.monotonic() - started
        if age > config.limit:
            _end(process)
            raise TimeoutError(f"{stage.name} is not done after {age:.0f} s")
        found = while_writing and age > moment / 2 and _is_writing(out)
        if found or age > (3 * moment if while_writing else moment):
            break
        time.sleep(0.0005 if while_writing else 0.01)
    if process.poll() is not None:
        _end(process)
        return None
    age = time.monotonic() - started
    _end(process)
    return age, found


def _finish(
    config: KillConfig,
    stage: kill_stages.Stage,
    outs: pathlib.Path,
    inputs: pathlib.Path,
) -> str:
    """Runs a stage to its end; what it said on stderr since its first start."""
    process = _start(stage, outs, inputs)
    try:
        process.wait(timeout=config.limit)
    finally:
        _end(process)
    error = _errors(stage, outs).read_text()
    if process.returncode != 0:
        raise ChildProcessError(
            f"{stage.name} ended with {process.returncode}: {error}"
        )
    return error


def _start(
    stage: kill_stages.Stage, outs: pathlib.Path, inputs: pathlib.Path
) -> "subprocess.Popen[bytes]":
    out = outs / stage.name
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **single_thread(os.environ),
        "EMFUSE_JAX_CACHE": str(outs / ".cache"),
    }
    with _errors(stage, outs).open("a") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", *stage.arguments(out, inputs)],
            cwd=_ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


def _errors(stage: kill_stages.Stage, outs: pathlib.Path) -> pathlib.Path:
    """What a stage had to say in all its starts; a pipe would fill."""
    return outs / f"{stage.name}.stderr"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kills a command with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_writing(folder: pathlib.Path) -> bool:
    try:
        return any(True for pattern in _WRITING for _ in folder.rglob(pattern))
    except OSError:  # it went away while it was looked at
        return True


def _intervals(folder: pathlib.Path) -> dict[str, int]:
    """Steps between two checkpoints of each training inside."""
    found = {}
    for path in folder.rglob("metrics.jsonl"):
        saved = artifacts.steps(path.parent / "checkpoints")
        if len(saved) > 1:
            found[str(path.parent.relative_to(folder))] = saved[-1] - saved[-2]
    return found


def _is_needed(name: str, chosen: Sequence[str]) -> bool:
    """Whether a chosen stage is, or needs, this one."""
    by_name = {stage.name: stage for stage in kill_stages.STAGES}

    def needs(other: str) -> bool:
        if other == name:
            return True
        parts = " ".join(by_name[other].command)
        return any(f"{{{n}}}" in parts and needs(n) for n in _NAMES if n != other)

    return any(needs(other) for other in chosen)


def _brief(result: dict[str, Any]) -> str:
    same = "equal" if not result["differences"] else result["differences"][:3]
    return f"{result['kills']} kills ({result['kills_while_writing']} while writing), {same}"


def main(config: KillConfig) -> None:
    """The command line."""
    document = soak(config)
    print(f"{document['kills']} kills, equal: {document['equal']}")
    if not document["equal"]:
        raise ValueError(f"interrupted runs ended differently; see {config.output}")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` in the frame of a command line."""
    from experiments._run import run_main

    return run_main(main, KillConfig, argv)


if __name__ == "__main__":
    sys.exit(run())
