r"""Which policies reach both goals of Particle, in how many dimensions, and at what cost?

    python -m benchmarks.particle --work=runs/particle

Clones the scripted oracle's episodes with a regression (single actions, and chunks), an
energy-based transformer, a diffusion policy with the same transformer, and implicit
cloning; evaluates each in every dimension, with and without a push in mid-episode, by every
way of acting that it has (Langevin or derivative-free; 2 or more descent steps; 15 or 100
solver steps). Every (method, dimensions) is a file in ``--work`` and is not run again. The
time per action is measured for all in turns, in one process, at the end.

All see the same features, ``[observation ‖ first goal - position ‖ second goal -
position]``, standardised. Regression and implicit cloning act on single frames, as
published; the transformers plan chunks and see two frames. An episode with a push is longer
than the published 50 steps, so successes of that length without a push stand beside it.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _particle as methods
from benchmarks import _timing as timing
from emfuse_jax import artifacts, loops
from emfuse_jax.base import Environment, Policy
from emfuse_jax.data.dataset import Dataset, make_dataset
from emfuse_jax.data.normalizer import fit_normalizer
from emfuse_jax.envs.particle import (
    ParticleConfig,
    collect_demonstrations,
    particle,
    particle_oracle,
    succeeded,
)
from emfuse_jax.policies.chunks import chunk_environment, gather_chunks
from experiments._run import run_main

PUBLISHED_STEPS = 50
QUESTION = (
    "How often do cloned policies reach both goals of Particle, by dimension and with a "
    "push, and what does an action cost?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParticleStudyConfig:
    """Settings of the study.

    Attributes:
        dims: dimensions of Particle.
        methods: which to train.
        demonstrations: episodes of the oracle.
        switch_distance: how near to the first goal the oracle turns to the second. The
            published 0.01 is passed in one step of an episode.
        scale: factor of every method's updates, for trials.
        episodes: per evaluation.
        push_step: step of the push.
        push_distance: its length.
        pushed_steps: length of the episodes with a push, and of those beside them.
        seed: of data, training and evaluation.
        timed_dims: the dimensions in which actions are timed.
        timed_rows: states that are acted in at once in the second timing; the first
            times a single one.
        repeats: rounds of the timing.
        step_function: fit an expert that jumps, too: energies do not answer in between.
        work: where finished parts are kept.
        output: the JSON result.
    """

    dims: tuple[int, ...] = (2, 8, 1, 4, 16)
    methods: tuple[str, ...] = tuple(methods.METHODS)
    demonstrations: int = 2000
    switch_distance: float = 0.03
    scale: float = 1.0
    episodes: int = 100
    push_step: int = 25
    push_distance: float = 0.3
    pushed_steps: int = 80
    seed: int = 0
    timed_dims: int = 2
    timed_rows: int = 32
    repeats: int = 5
    step_function: bool = True
    work: str = "runs/particle"
    output: str = "benchmarks/results/particle.json"


def with_differences(environment: Environment) -> Environment:
    """Goals beside their distances: what all methods observe."""

    def observe(state: Any) -> jax.Array:
        return features(environment.observe(state))

    def reset(key: jax.Array) -> tuple[Any, jax.Array]:
        state, observation = environment.reset(key)
        return state, features(observation)

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, Any]:
        state, transition = environment.step(key, state, action)
        return state, transition._replace(
            observation=features(transition.observation),
            next_observation=features(transition.next_observation),
        )

    size = environment.spec.observation_size // 4 * 6
    spec = environment.spec._replace(observation_size=size)
    return Environment(reset, step, observe, spec)


def features(observation: jax.Array) -> jax.Array:
    """``[observation ‖ first goal - position ‖ second goal - position]``."""
    position, _, first, second = jnp.split(observation, 4, axis=-1)
    return jnp.concatenate([observation, first - position, second - position], axis=-1)


def demonstrations(config: ParticleStudyConfig, dims: int) -> Dataset:
    """The oracle's successful episodes, one after another."""
    oracle = particle_oracle(switch_distance=config.switch_distance)
    # As long as the longest episodes of the evaluation: rest at the second goal, of which
    # 50 steps hold little, would look like a start otherwise.
    recorded = ParticleConfig(num_dims=dims, num_steps=config.pushed_steps)
    collect = jax.jit(
        lambda key: collect_demonstrations(
            key, recorded, config.demonstrations, oracle=oracle
        )
    )
    steps, succeeded = collect(jax.random.key(config.seed))
    keep = np.flatnonzero(np.asarray(succeeded))

    def rows(leaf: jax.Array) -> np.ndarray:
        by_episode = np.swapaxes(np.asarray(leaf), 0, 1)[keep]
        return by_episode.reshape(-1, *by_episode.shape[2:])

    return make_dataset(
        observations=rows(features(steps.observation)),
        actions=rows(steps.action),
        rewards=rows(steps.reward),
        next_observations=rows(features(steps.next_observation)),
        terminals=rows(steps.terminated),
        timeouts=rows(steps.truncated),
        source=f"Particle-{dims}D",
    )


class Trained(NamedTuple):
    """A method in one dimension, trained."""

    policy: Policy
    params: Any
    seconds: float
    metrics: dict[str, float]


def train(
    config: ParticleStudyConfig, method: methods.Method, dims: int, data: Dataset
) -> Trained:
    """One training run; its CPU seconds include compiling."""
    arrays = jax.tree.map(jnp.asarray, data)
    spec = with_differences(particle(ParticleConfig(num_dims=dims))).spec
    num_steps = max(int(method.num_steps * config.scale), 10)
    chunk = max(num_steps // 10, 1)
    num_steps = num_steps // chunk * chunk
    policy = method.policy(spec, num_steps)
    key_init, key_fit = jax.random.split(jax.random.key(config.seed + 1))
    frames = jnp.tile(jnp.asarray(data.observation), (1, method.chunks.num_frames))
    state = method.init(policy, key_init, fit_normalizer(frames), data.action)

    def sample(key: jax.Array, arrays: Dataset) -> Any:
        index = jax.random.randint(key, (method.batch_size,), 0, len(data.age))
        return gather_chunks(arrays, index, method.chunks)

    started = time.process_time()
    state, metrics = loops.fit(
        key_fit,
        policy,
        state,
        sample,
        num_steps,
        data=arrays,
        chunk=chunk,
        on_chunk=lambda step, state, row: print(
            f"  {step}/{num_steps} "
            + " ".join(f"{name}={float(value):.4g}" for name, value in row.items()),
            flush=True,
        ),
    )
    seconds = time.process_time() - started
    last = {name: float(values[-1]) for name, values in metrics.items()}
    return Trained(policy, state.params, seconds, last)


def evaluate(
    config: ParticleStudyConfig,
    method: methods.Method,
    dims: int,
    act: Callable[..., jax.Array],
    params: Any,
) -> dict[str, Any]:
    """Successes of one way to act, when published episodes end and at the end of longer
    ones, without a push and with one."""
    execute = method.chunks.execute
    check_lengths(config, execute)

    def run(params: Any, key: jax.Array, push_distance: jax.Array) -> jax.Array:
        case = pushed_case(config, dims, push_distance)
        env = chunk_environment(with_differences(particle(case)), method.chunks)
        key_reset, key_steps = jax.random.split(key)
        reset_keys = jax.random.split(key_reset, config.episodes)
        state, _ = jax.vmap(env.reset)(reset_keys)

        def step(step_key: jax.Array, state: Any) -> tuple[Any, jax.Array]:
            key_act, key_env = jax.random.split(step_key)
            observation = jax.vmap(env.observe)(state)
            action = act(
                params, key_act, observation, deterministic=method.deterministic
            )
            keys = jax.random.split(key_env, config.episodes)
            state, _ = jax.vmap(env.step)(keys, state, action)
            return state, succeeded(case, state.inner)

        steps = config.pushed_steps // execute
        _, done = loops.scan_steps(key_steps, step, state, steps)
        return done

    run = jax.jit(run)
    key = jax.random.key(config.seed + 2)
    plain, pushed = (run(params, key, x) for x in (0.0, config.push_distance))
    return cases(plain, pushed, PUBLISHED_STEPS // execute)


def check_lengths(config: ParticleStudyConfig, execute: int) -> None:
    """Episodes end where a chunk does."""
    if PUBLISHED_STEPS % execute or config.pushed_steps % execute:
        raise ValueError(
            f"pushed_steps={config.pushed_steps} and {PUBLISHED_STEPS} must be multiples "
            f"of the {execute} steps that a chunk executes"
        )


def pushed_case(
    config: ParticleStudyConfig, dims: int, push_distance: Any
) -> ParticleConfig:
    """Longer episodes with a push of any length, 0 for none."""
    return ParticleConfig(
        num_dims=dims,
        num_steps=config.pushed_steps,
        push_step=config.push_step,
        push_distance=push_distance,
    )


def cases(plain: Any, pushed: Any, published: int) -> dict[str, Any]:
    """Shares of ``[step, episode]`` successes: after the published length, at the end, and
    at the end of the pushed ones."""
    rows = {
        "success": plain[published - 1],
        "long": plain[-1],
        "pushed": pushed[-1],
    }
    return {name: proportion(int(row.sum()), len(row)) for name, row in rows.items()}


def proportion(successes: int, trials: int) -> dict[str, Any]:
    """A share with its 95 % interval (Wilson 1927)."""
    z, share = 1.96, successes / trials
    center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    spread = share * (1 - share) / trials + z**2 / (4 * trials**2)
    half = z / (1 + z**2 / trials) * spread**0.5
    return {
        "share": share,
        "interval": [max(center - half, 0.0), min(center + half, 1.0)],
        "episodes": trials,
    }


def oracle_success(config: ParticleStudyConfig, dims: int) -> dict[str, Any]:
    """What the scripted policy reaches, in the same cases."""
    oracle = particle_oracle(switch_distance=config.switch_distance)

    def run(case: ParticleConfig) -> jax.Array:
        collect = jax.jit(
            lambda key: (
                collect_demonstrations(
                    key, case, config.episodes, oracle=oracle
                ).succeeded
            )
        )
        return collect(jax.random.key(config.seed + 2))

    long = pushed_case(config, dims, 0.0)
    pushed = pushed_case(config, dims, config.push_distance)
    short = ParticleConfig(num_dims=dims, num_steps=PUBLISHED_STEPS)
    return cases([run(short), run(long)], [run(pushed)], 1)


def part(config: ParticleStudyConfig, name: str, dims: int) -> dict[str, Any]:
    """One method in one dimension, from its file if it is there."""
    folder = pathlib.Path(config.work)
    path = folder / f"{name}-{dims}d.json"
    method = methods.METHODS[name]
    asked = {**artifacts.to_json(config), "method": name, "dims": dims}
    asked |= {"num_steps": method.num_steps, "batch_size": method.batch_size}
    for other in (
        "methods",
        "timed_dims",
        "timed_rows",
        "repeats",
        "step_function",
        "work",
        "output",
    ):
        asked.pop(other)
    if path.exists():
        found = artifacts.read_json(path)
        if found["config"] == asked:
            return found
    trained = train(config, method, dims, demonstrations(config, dims))
    variants = {}
    for variant, (act, cost) in method.variants(trained.policy, dims).items():
        variants[variant] = evaluate(config, method, dims, act, trained.params)
        variants[variant]["cost"] = cost
        share = {k: variants[variant][k]["share"] for k in ("success", "pushed")}
        print(f"{name} {variant}, {dims} dimensions: {share}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.save(folder / f"{name}-{dims}d", 0, trained.params)
    result = {
        "config": asked,
        "train_cpu_seconds": trained.seconds,
        "metrics": trained.metrics,
        "variants": variants,
    }
    artifacts.write_json(path, result)
    return result


def time_actions(config: ParticleStudyConfig) -> dict[str, Any]:
    """CPU seconds per action of all ways to act, in turns; values do not matter here."""
    dims = config.timed_dims
    spec = with_differences(particle(ParticleConfig(num_dims=dims))).spec
    results: dict[str, Any] = {}
    for rows in (1, config.timed_rows):
        calls, executed = {}, {}
        for name in config.methods:
            method = methods.METHODS[name]
            policy = method.policy(spec, 10)
            size = method.chunks.num_frames * spec.observation_size
            normalizer = fit_normalizer(jax.random.normal(jax.random.key(0), (9, size)))
            state = method.init(policy, jax.random.key(1), normalizer, None)
            observation = jax.random.uniform(jax.random.key(2), (rows, size))
            for variant, (act, _) in method.variants(policy, dims).items():

                def call(params, key, observation, act=act, method=method):
                    return act(
                        params, key, observation, deterministic=method.deterministic
                    )

                label = f"{name} {variant}"
                arguments = state.params, jax.random.key(3), observation
                calls[label] = timing.compiled(call, *arguments)[0]
                executed[label] = rows * method.chunks.execute
        timings = timing.measure(calls, repeats=config.repeats)
        results[f"{rows} rows"] = {
            label: {
                "cpu_ms_per_executed_action": 1e3
                * timing.spread(t.cpu)["median"]
                / executed[label],
                "cpu_ms_per_call": timing.spread([1e3 * s for s in t.cpu]),
            }
            for label, t in timings.items()
        }
    return results


def main(config: ParticleStudyConfig) -> dict[str, Any]:
    """Everything, and the JSON."""
    unknown = [name for name in config.methods if name not in methods.METHODS]
    if unknown or config.episodes < 1:
        raise ValueError(
            f"methods={config.methods}, episodes={config.episodes}; methods are "
            f"{', '.join(methods.METHODS)}, and at least one episode"
        )
    table: dict[str, Any] = {}
    for dims in config.dims:
        row: dict[str, Any] = {"oracle": oracle_success(config, dims)}
        for name in config.methods:
            row[name] = part(config, name, dims)
        table[f"{dims}"] = row
    results = {"by_dimension": table, "time_per_action": time_actions(config)}
    if config.step_function:
        results["step_function"] = methods.step_function(seed=config.seed)
    return timing.write(config.output, QUESTION, config, {}, results)


if __name__ == "__main__":
    sys.exit(run_main(main, ParticleStudyConfig))
