r"""Trains a behaviour policy with SAC in C MuJoCo, and packages snapshots of it.

    python -m experiments.train_behaviour --env=hopper --run_dir=runs/behaviour/hopper
    python -m experiments.train_behaviour --run_dir=runs/behaviour/hopper \
        --package=hopper_medium --snapshot=100000

The first trains: a batch of environments is stepped on the host, then as many gradient
steps as there are environments run as one compiled scan, with the replay buffer on the
device. Every ``evaluate_every`` transitions the policy is saved under ``snapshots/`` and
scored, and the whole run is checkpointed: the same command goes on after a kill and
ends with the same numbers bit for bit.

The second scores one snapshot on more episodes and copies it into the package, with a
row about it in the table beside it.

Scores are D4RL-normalised, in the physics of the installed MuJoCo.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.data.behaviour import (
    PACKAGED,
    Behaviour,
    Linear,
    behaviour_act,
    save_behaviour,
)
from emfuse_jax.data.buffer import ring_buffer
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.envs.mujoco_table import check_environment
from emfuse_jax.evaluation.episodes import MAX_STEPS, evaluate
from emfuse_jax.evaluation.scores import (
    normalized_score,
    normalized_spread,
    reference_score,
)
from emfuse_jax.loops import scan_steps
from emfuse_jax.policies.online import example_transition
from emfuse_jax.policies.sac import SacConfig, sac
from experiments import _dry_run, _names
from experiments._packaging import PACKAGING, package, snapshot_path
from experiments._progress import Progress
from experiments._run import Run, open_run, run_main
from experiments._stopping import StoppedError, until_asked

# The published layout clips the log standard deviation to these bounds.
_SAC = SacConfig(log_std_bounds=(-20.0, 2.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBehaviourConfig:
    """Settings of a behaviour policy's training.

    Attributes:
        env: hopper, walker2d or halfcheetah.
        run_dir: where everything goes.
        seed: of everything.
        total_steps: environment transitions, the end of the run.
        num_envs: environments stepped together; also the gradient steps per step of
            them all, so that there is one per transition.
        warmup_steps: transitions from uniform random actions.
        batch_size: rows per gradient step.
        evaluate_every: transitions between evaluations, snapshots and checkpoints.
        evaluate_episodes: per evaluation, for the sampled and for the mean action each.
        bands: stop once snapshots have scored, in this order, inside each of these
            ranges of the normalised score, as [[30,45],[45,65]]; empty: never early.
        band_gap: transitions at least between two such snapshots.
        sac: the learner.
        package: the name to package a snapshot under, instead of training.
        snapshot: the step of that snapshot.
        package_dir: where packaged policies lie.
        package_episodes: that its packaged scores are means of.
    """

    env: str = "hopper"
    run_dir: str
    seed: int = 0
    total_steps: int = 400_000
    num_envs: int = 8
    warmup_steps: int = 5_000
    batch_size: int = 256
    evaluate_every: int = 10_000
    evaluate_episodes: int = 10
    bands: tuple[tuple[float, float], ...] = ()
    band_gap: int = 0
    sac: SacConfig = _SAC
    package: str = ""
    snapshot: int = 0
    package_dir: str = str(PACKAGED)
    package_episodes: int = 50

    def __post_init__(self) -> None:
        with _names.environment(self.env):
            check_environment(self.env)
        for name in ("num_envs", "batch_size", "evaluate_every", "evaluate_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("evaluate_every", "warmup_steps"):
            if getattr(self, name) % self.num_envs:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of "
                    f"num_envs={self.num_envs}"
                )
        if self.total_steps % self.evaluate_every:
            raise ValueError(
                f"total_steps={self.total_steps} is not a multiple of "
                f"evaluate_every={self.evaluate_every}"
            )


class RunState(NamedTuple):
    """Everything that decides what the run does next."""

    learner: Any
    replay: Any
    simulator: Any
    episode_return: np.ndarray
    episode_length: np.ndarray


class Program(NamedTuple):
    """The compiled functions of a run; state and replay are donated."""

    init: Any
    act: Any
    add: Any
    learn: Any


def compile_program(config: TrainBehaviourConfig, spec: SpaceSpec) -> Program:
    """Jits what the host loop calls."""
    policy = sac(config.sac, spec)
    buffer = ring_buffer(config.total_steps, config.batch_size)

    def init(key: jax.Array) -> tuple[Any, Any]:
        return policy.init(key), buffer.init(example_transition(spec))

    def learn(key: jax.Array, state: Any, replay: Any, rows: Transition, first: Any):
        replay = buffer.add(replay, rows)

        def step(step_key: jax.Array, carry: Any) -> tuple[Any, Any]:
            key_batch, key_update = jax.random.split(step_key)
            return policy.update(key_update, carry, buffer.sample(key_batch, replay))

        state, metrics = scan_steps(key, step, state, config.num_envs, start=first)
        return state, replay, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

    return Program(
        init=jax.jit(init),
        act=jax.jit(policy.act),
        add=jax.jit(buffer.add, donate_argnums=0),
        learn=jax.jit(learn, donate_argnums=(1, 2)),
    )


def train(config: TrainBehaviourConfig) -> list[dict[str, Any]]:
    """Trains, or goes on; returns the rows of ``metrics.jsonl``."""
    envs = MujocoBatch(config.env, config.num_envs, seed=config.seed)
    with open_run(
        config.run_dir,
        config,
        kind="train_behaviour",
        seed=config.seed,
        ignore=("run_dir", *PACKAGING),
    ) as run:
        if _dry_run.is_asked():
            _tell(run, config, envs)
            raise _dry_run.Done
        return _train(run, config, envs, compile_program(config, envs.spec))


def _tell(run: Run, config: TrainBehaviourConfig, envs: MujocoBatch) -> None:
    """A dry run: the learner's updates, and the simulator's share of their time."""
    program, policy = compile_program(config, envs.spec), sac(config.sac, envs.spec)
    buffer = ring_buffer(config.total_steps, config.batch_size)
    learner, replay = program.init(_key(config, 0))
    envs.reset()
    action = np.zeros((config.num_envs, envs.spec.action_size))
    started, steps = time.monotonic(), 100
    for _ in range(steps):
        envs.step(action)
        envs.reset()
    simulating = (time.monotonic() - started) / steps / config.num_envs
    _dry_run.tell(
        f"train_behaviour in {config.env}",
        _key(config, 1),
        policy,
        learner,
        buffer.sample,
        config.total_steps - config.warmup_steps,
        data=replay,
        done=max(run.done - config.warmup_steps, 0),
        beside={"of simulation": simulating},
    )


def _train(
    run: Run, config: TrainBehaviourConfig, envs: MujocoBatch, program: Program
) -> list[dict[str, Any]]:
    envs.reset()
    zeros = np.zeros(config.num_envs)
    state = RunState(
        *program.init(_key(config, 0)), envs.get_state(), zeros, zeros.astype(np.int64)
    )
    found, step = run.restore(state), 0
    if found is not None:
        state, step = found.tree, found.step
        envs.set_state(state.simulator)
    path = run.path / "metrics.jsonl"
    with (
        Progress(config.total_steps, initial=step, description=config.env) as bar,
        until_asked("the next evaluation") as asked,
    ):
        while step < config.total_steps and not chosen(
            config, artifacts.read_metrics(path)
        ):
            started = time.process_time()
            until = step + config.evaluate_every
            state, metrics = _advance(config, program, envs, state, step, until)
            step = until
            run.check(step, metrics, state.learner.params)
            policy = to_behaviour(state.learner.params.actor)
            snapshot = snapshot_path(run.path, step)
            snapshot.parent.mkdir(exist_ok=True)
            save_behaviour(snapshot, policy)
            key = jax.random.fold_in(_key(config, 2), step)
            metrics |= scores(key, config.env, policy, config.evaluate_episodes)
            metrics["cpu_seconds"] = time.process_time() - started
            run.log(step, metrics)
            run.save(step, state._replace(simulator=envs.get_state()))
            bar.update(step, {"score": metrics["stochastic_score"]})
            if asked():
                raise StoppedError(f"at step {step}, which is saved")
    return artifacts.read_metrics(path)


def _advance(
    config: TrainBehaviourConfig,
    program: Program,
    envs: MujocoBatch,
    state: RunState,
    step: int,
    until: int,
) -> tuple[RunState, dict[str, float]]:
    """Collects and learns from transition ``step`` to ``until``; mean metrics."""
    key_act, key_learn, key_random = jax.random.split(_key(config, 1), 3)
    seed = int(jax.random.randint(key_random, (), 0, 2**31 - 1))
    finished, history = [], []
    for first in range(step, until, config.num_envs):
        warming = first < config.warmup_steps
        if warming:
            shape = (config.num_envs, envs.spec.action_size)
            generator = np.random.default_rng((seed, first))
            action = generator.uniform(-1.0, 1.0, shape).astype(np.float32)
        else:
            key = jax.random.fold_in(key_act, first)
            observation = np.float32(envs.observation())
            action = np.asarray(program.act(state.learner.params, key, observation))
        rows, state, returns = collect(envs, state, action)
        finished += returns
        if warming:
            state = state._replace(replay=program.add(state.replay, rows))
            continue
        learner, replay, metrics = program.learn(
            key_learn, state.learner, state.replay, rows, first
        )
        state = state._replace(learner=learner, replay=replay)
        history.append(metrics)
    history = jax.device_get(history)
    names = history[0] if history else ()
    means = {name: float(np.mean([row[name] for row in history])) for name in names}
    if finished:
        means["train_return"] = float(np.mean(finished))
    return state, means


def collect(
    envs: MujocoBatch, state: RunState, action: np.ndarray
) -> tuple[Transition, RunState, list[float]]:
    """One step of every environment; those that end start anew.

    Returns:
        The true transitions ``[env]``, the episodes' bookkeeping, and the returns of
        the episodes that ended.
    """
    observation = envs.observation()
    following, reward, terminated = envs.step(action)
    length, total = state.episode_length + 1, state.episode_return + reward
    truncated = (length >= MAX_STEPS) & ~terminated
    done = terminated | truncated
    if done.any():
        envs.reset(done)
    rows = Transition(
        np.float32(observation),
        np.float32(action),
        np.float32(reward),
        np.float32(following),
        terminated,
        truncated,
    )
    state = state._replace(
        episode_return=np.where(done, 0.0, total),
        episode_length=np.where(done, 0, length),
    )
    return rows, state, list(total[done])


def chosen(config: TrainBehaviourConfig, rows: list[dict[str, Any]]) -> list[int]:
    """Steps of the first snapshots inside each band, in order; [] if one is missing."""
    steps: list[int] = []
    for low, high in config.bands:
        least = steps[-1] + config.band_gap if steps else 0
        inside = [
            row["step"]
            for row in rows
            if row["step"] >= least and low <= row["stochastic_score"] <= high
        ]
        if not inside:
            return []
        steps.append(inside[0])
    return steps


def scores(
    key: jax.Array, name: str, policy: Behaviour, num_episodes: int
) -> dict[str, float]:
    """Mean return, normalised score and its spread, sampled and deterministic."""
    env, reference = MujocoBatch(name, num_episodes), reference_score(name)
    keys = jax.random.split(key)
    result = {}
    for label, noise, one in zip(
        ("stochastic", "deterministic"), (1.0, 0.0), keys, strict=True
    ):
        act = behaviour_act(policy, noise=noise)
        returns = evaluate(one, env, act, num_episodes).returns
        result[f"{label}_return"] = float(returns.mean())
        result[f"{label}_score"] = float(normalized_score(returns.mean(), reference))
        spread = float(normalized_spread(returns.std(ddof=1), reference))
        result[f"{label}_score_std"] = spread
    return result


def to_behaviour(actor: Any) -> Behaviour:
    """A SAC actor of two hidden layers in the layout of `data.behaviour`."""
    layers = {
        name: Linear(np.asarray(layer["kernel"]).T, np.asarray(layer["bias"]))
        for name, layer in actor["params"].items()
    }
    last = layers.pop("last_fc")
    means, log_stds = (
        Linear(*parts)
        for parts in zip(np.split(last.weight, 2), np.split(last.bias, 2), strict=True)
    )
    return Behaviour(last_fc=means, last_fc_log_std=log_stds, **layers)


def command(config: TrainBehaviourConfig) -> None:
    """Trains or packages, and says what came out."""
    if config.package and _dry_run.is_asked():
        raise ValueError("--dry_run is about training: give it without --package")
    if config.package:
        key, episodes = jax.random.key(config.seed), config.package_episodes
        record = package(
            config,
            TrainBehaviourConfig(run_dir=config.run_dir),
            lambda env, policy: scores(key, env, policy, episodes),
        )
        print(f"{config.package}: sampled {record['stochastic_score']:.1f}")
        return
    for row in train(config):
        print(
            f"{row['step']}: sampled {row['stochastic_score']:.1f}, "
            f"deterministic {row['deterministic_score']:.1f}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(command, TrainBehaviourConfig, argv, trains=True)


def _key(config: TrainBehaviourConfig, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


if __name__ == "__main__":
    sys.exit(main())
