r"""Scores a policy in real MuJoCo: D4RL-normalised returns with robust means and intervals.

    python -m experiments.evaluate --run_dir=runs/policy --episodes=20
    python -m experiments.evaluate --policy=hopper_medium --env=hopper \
        --out=runs/hopper_medium.json

A run's policy acts deterministically (``--stochastic``: it samples); its scores go into the
run as ``evaluation.json``. A behaviour policy, packaged or an ``.npz``, acts as it did when
it made its data: it samples. Intervals resample seeds, then episodes, so those of a single
seed say nothing about training. Scores are D4RL-normalised, in the physics of the
installed MuJoCo. Run again with the same settings, it leaves the finished file alone.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax

from emfuse_jax import artifacts
from emfuse_jax.base import SpaceSpec
from emfuse_jax.data.behaviour import (
    behaviour_act,
    load_behaviour,
    packaged_behaviours,
    random_act,
)
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.evaluation.episodes import MAX_STEPS
from emfuse_jax.policies.chunks import ChunkConfig
from experiments import _names
from experiments._found import run_config
from experiments._measure import require
from experiments._progress import Progress
from experiments._returns import (
    ONE_STEP,
    Act,
    PlanningAct,
    compiled_act,
    evaluate_seeds,
    evaluation_env,
    summary,
)
from experiments._run import run_main

KIND = "evaluate"
RESULT_FILE = "evaluation.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of one evaluation.

    Attributes:
        run_dir: a run of train_policy; or give --policy.
        policy: a packaged policy's name, an .npz file, or random.
        env: hopper, walker2d, halfcheetah or a maze; empty: the run's own.
        episodes: per seed, each up to the environment's time limit.
        stochastic: sample a run's actions; behaviour policies always do.
        seed: of the initial states and the sampled actions.
        version: gymnasium's rewards, v4 or v5; of a maze there is one.
        out: the JSON file to write; empty: evaluation.json in the run.
    """

    run_dir: str = ""
    policy: str = ""
    env: str = ""
    episodes: int = 20
    stochastic: bool = False
    seed: int = 0
    version: Literal["v4", "v5"] = "v4"
    out: str = ""

    def __post_init__(self) -> None:
        if self.episodes < 2:
            raise ValueError(
                f"episodes={self.episodes}; expected at least 2, for an interval"
            )


class Candidate(NamedTuple):
    """Who acts; ``digest`` tells its parameters from any others."""

    name: str
    act: Act | PlanningAct
    params: Any
    num_seeds: int
    spec: SpaceSpec
    stochastic: bool
    digest: str
    step: int | None = None


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Plays the episodes, writes the JSON file and returns what it holds."""
    if bool(config.run_dir) == bool(config.policy):
        raise ValueError("give one of --run_dir and --policy")
    if config.policy:
        require(config, "env", "out")
    out = pathlib.Path(config.out or f"{config.run_dir}/{RESULT_FILE}")
    candidate = _candidate(config)
    name = config.env or _environment(config.run_dir)
    env = _simulator(name, config.episodes, config.version)
    if candidate.spec != env.spec:
        raise ValueError(
            f"{candidate.name} is for {candidate.spec}, {name} has {env.spec}; choose a "
            f"policy of this environment (packaged: "
            f"{', '.join(packaged_behaviours()) or 'none'})"
        )
    how = _settings(config, env, candidate)
    result = _already_made(out, how)
    if result is None:
        result = {"kind": KIND, "name": candidate.name, **how}
        result |= _play(config, env, candidate, name)
        result["provenance"] = artifacts.provenance(seed=config.seed)
        artifacts.write_json(out, result)
    print(describe(result))
    return result


def _simulator(name: str, num_envs: int, version: str) -> MujocoBatch:
    """The environment; raises where there is none of that name."""
    env = evaluation_env(name, num_envs, version)
    assert env is not None  # an unknown name has raised, an empty one is the run's own
    return env


def _candidate(config: EvaluateConfig) -> Candidate:
    if config.policy == "random":
        spec = _simulator(config.env, 1, config.version).spec
        return _host("random", random_act(spec.action_size), spec, "random")
    if config.policy:
        with _names.behaviour(config.policy):
            behaviour = load_behaviour(config.policy)
        digest = artifacts.tree_digest(behaviour)
        stem = pathlib.Path(config.policy).stem
        return _host(stem, behaviour_act(behaviour), behaviour.spec, digest)
    trained = artifacts.load_run(config.run_dir)
    if trained.policy is None:
        raise ValueError(
            f"{config.run_dir} holds a {trained.description['kind']!r}, a dynamics model; "
            "--run_dir wants a run of train_policy"
        )
    spec, plan = trained.spec, ONE_STEP
    if "plan" in trained.description:
        plan = artifacts.from_json(ChunkConfig, trained.description["plan"])
        frames, horizon = plan.num_frames, plan.horizon
        spec = SpaceSpec(spec.observation_size // frames, spec.action_size // horizon)
    return Candidate(
        name=pathlib.Path(config.run_dir).name,
        act=compiled_act(
            trained.policy, stochastic=config.stochastic, plan=plan, spec=spec
        ),
        params=trained.params,
        num_seeds=trained.description["num_seeds"],
        spec=spec,
        stochastic=config.stochastic,
        digest=artifacts.tree_digest(trained.params),
        step=trained.step,
    )


def _host(name: str, host_act: Any, spec: SpaceSpec, digest: str) -> Candidate:
    def act(params: Any, key: jax.Array, observation: Any) -> Any:
        del params
        return host_act(key, observation)

    return Candidate(name, act, None, 1, spec, True, digest)


def _environment(run_dir: str) -> str:
    """The environment that a policy was trained for."""
    name = run_config(run_dir).get("env")
    if not name or not isinstance(name, str):
        raise ValueError(f"{run_dir} names no environment; give --env")
    return name


def _settings(
    config: EvaluateConfig, env: MujocoBatch, candidate: Candidate
) -> dict[str, Any]:
    """What decides the numbers."""
    import mujoco

    return {
        "env": env.name,
        "version": env.version,
        "mujoco": mujoco.__version__,
        "num_episodes": config.episodes,
        "stochastic": candidate.stochastic,
        "seed": config.seed,
        "step": candidate.step,
        "digest": candidate.digest,
    }


def _already_made(out: pathlib.Path, how: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier result of these very settings; raises if the file is not ours."""
    if not out.parent.is_dir():
        try:
            out.parent.mkdir(parents=True)
        except OSError as error:
            raise ValueError(
                f"cannot write into {out.parent} ({error.strerror}); choose another --out"
            ) from error
    if not out.exists():
        return None
    try:
        found = artifacts.read_json(out)
        ours = found["kind"] == KIND
    except (ValueError, KeyError, TypeError, OSError):
        ours = False
    if not ours:
        raise ValueError(
            f"{out} exists and is no result of evaluate; choose another --out"
        )
    return found if how.items() <= found.items() else None


def _play(
    config: EvaluateConfig, env: MujocoBatch, candidate: Candidate, name: str
) -> dict[str, Any]:
    done = 0
    with Progress(
        candidate.num_seeds * getattr(env, "max_steps", MAX_STEPS),
        description=f"evaluate {candidate.name}",
    ) as bar:

        def on_step() -> None:
            nonlocal done
            done += 1
            bar.update(done)

        returns = evaluate_seeds(
            jax.random.key(config.seed),
            env,
            candidate.act,
            candidate.params,
            candidate.num_seeds,
            config.episodes,
            on_step=on_step,
        )
    return summary(returns, name)


def describe(result: dict[str, Any]) -> str:
    """The result in a line."""
    low, high = result["interval"]
    iqm_low, iqm_high = result["iqm_interval"]
    seeds = len(result["per_seed"])
    return (
        f"{result['name']}: {result['env']}, {seeds} × {result['num_episodes']} "
        f"{'sampled' if result['stochastic'] else 'deterministic'} episodes, normalised "
        f"{result['mean']:.1f} [{low:.1f}, {high:.1f}], IQM {result['iqm']:.1f} "
        f"[{iqm_low:.1f}, {iqm_high:.1f}]"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(evaluate, EvaluateConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
