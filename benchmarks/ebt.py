r"""What does a two-step energy policy do beside a hundred-step diffusion policy?

    python -m benchmarks.ebt --output=benchmarks/results/ebt.json

One transformer, as an energy that is descended and as a denoiser, on three tasks: a
regression (is the descent trained: error, falling energies, energies that rank actions), two
modes per observation (which recipes keep them apart), and cloning of a Hopper policy's action
chunks (return, network evaluations, and measured time of one action, contenders in turns).
Diffusion is trained once and sampled with several numbers of steps. Seeds train together.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _timing as timing
from benchmarks._ebt_figure import draw, landscape
from benchmarks._ebt_tasks import MODE, auc, per_seed, regression, two_modes
from emfuse_jax import loops
from emfuse_jax.base import Policy, SpaceSpec, Transition
from emfuse_jax.data import fit_normalizer, make_dataset
from emfuse_jax.data.behaviour import behaviour_act, load_behaviour
from emfuse_jax.data.dataset import Dataset
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.evaluation.episodes import collect, evaluate
from emfuse_jax.evaluation.scores import normalized_score, reference_score
from emfuse_jax.nets.transformer import TransformerConfig, transformer_denoiser
from emfuse_jax.policies import chunks
from emfuse_jax.policies.diffusion import DiffusionConfig, diffusion
from emfuse_jax.policies.ebt import EbtConfig, ebt_policy, ebt_refine, s1_config
from experiments._progress import Progress
from experiments._run import run_main

TOY = SpaceSpec(1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EbtBenchmarkConfig:
    """Settings of the benchmark.

    Attributes:
        seeds: trained together.
        toy_steps: updates on the regression and on two modes.
        clone_steps: updates on Hopper.
        diffusion_updates: diffusion makes this many times as many updates as the energy;
            the training times are in the results, not made equal.
        batch_size: rows per update.
        network: the transformer's sizes on Hopper.
        toy_network: its sizes on the other two tasks.
        chunk: frames, actions planned and executed on Hopper.
        num_starts: training descents per recorded action in our recipe for two modes.
        tasks: which to run.
        rows: of Hopper data.
        behaviour: the packaged policy that acted.
        episodes: per seed and contender.
        max_steps: of an episode.
        diffusion_steps: of the sampler.
        repeats: rounds of the timing.
        threads: cores to use.
        output: the JSON file to write.
        figure: the PNG of two modes: energies, sampled actions over them; empty: none.
        smoke: tiny sizes, to see that everything runs.
    """

    seeds: int = 3
    toy_steps: int = 2000
    clone_steps: int = 2000
    diffusion_updates: int = 4
    batch_size: int = 64
    network: TransformerConfig = TransformerConfig(  # noqa: RUF009
        num_layers=1, features=64, num_heads=4
    )
    toy_network: TransformerConfig = TransformerConfig(  # noqa: RUF009
        num_layers=1, features=32, num_heads=2
    )
    chunk: chunks.ChunkConfig = chunks.ChunkConfig(  # noqa: RUF009
        num_frames=2, horizon=4, execute=2
    )
    num_starts: int = 8
    tasks: tuple[str, ...] = ("regression", "two_modes", "hopper")
    rows: int = 20_000
    behaviour: str = "hopper_medium"
    episodes: int = 5
    max_steps: int = 1000
    diffusion_steps: tuple[int, ...] = (100, 15)
    repeats: int = 7
    threads: int = 1
    output: str = "benchmarks/results/ebt.json"
    figure: str = ""
    smoke: bool = False


SMOKE = {
    "seeds": 2,
    "toy_steps": 4,
    "clone_steps": 4,
    "batch_size": 8,
    "network": TransformerConfig(num_layers=1, features=8, num_heads=2),
    "toy_network": TransformerConfig(num_layers=1, features=8, num_heads=2),
    "num_starts": 2,
    "rows": 200,
    "episodes": 2,
    "max_steps": 6,
    "diffusion_steps": (3,),
    "repeats": 5,
}


def ours(config: EbtBenchmarkConfig, steps: int, **settings: Any) -> EbtConfig:
    """The recipe of this library: as the tests on two modes chose it."""
    defaults = {
        "network": config.toy_network,
        "decay_steps": steps,
        "warmup_steps": min(100, steps // 4),
        "act_steps": 2,
    }
    return EbtConfig(**{**defaults, **settings})


def published(config: EbtBenchmarkConfig, steps: int, **settings: Any) -> EbtConfig:
    """EBT-Policy's: detached Nesterov steps from noise, 6 to 10 of them, all scored."""
    defaults = {
        "network": config.toy_network,
        "train_steps": 6,
        "extra_steps": 4,
        "momentum": 0.9,
        "noise": (0.2, 0.002),
        "step_size_spread": 1.5,
        "num_starts": 1,
        "decay_steps": steps,
        "warmup_steps": min(100, steps // 4),
        "act_steps": 2,
    }
    return s1_config(**{**defaults, **settings})


def denoising(config: EbtBenchmarkConfig, spec: SpaceSpec, num_steps: int) -> Policy:
    """Diffusion Policy with the same transformer."""
    sizes: dict[str, Any] = {"config": config.toy_network}
    if spec != TOY:
        sizes = {"config": config.network, **_shape(config)}
    network = transformer_denoiser(spec.action_size, **sizes)
    return diffusion(DiffusionConfig(num_steps=num_steps), spec, network=network)


def train(
    config: EbtBenchmarkConfig,
    policy: Policy,
    sample: Callable[[jax.Array, Any], Transition],
    num_steps: int,
    name: str,
    *,
    data: Any = None,
    **options: Any,
) -> tuple[Any, dict[str, float]]:
    """All seeds as one program; their parameters, and what training cost and ended at."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    start, own = time.perf_counter(), time.process_time()
    init = jax.jit(jax.vmap(lambda key: policy.init(key, **options)))
    with Progress(num_steps, description=name, unit="update") as bar:
        state, metrics = loops.fit(
            keys,
            policy,
            init(keys),
            sample,
            num_steps,
            data=data,
            chunk=max(num_steps // 20, 1),
            on_chunk=lambda step, state, metrics: bar.update(step),
        )
    last = {key: float(np.mean(rows[-1])) for key, rows in metrics.items()}
    last["cpu_seconds"] = time.process_time() - own
    last["wall_seconds"] = time.perf_counter() - start
    last["updates"] = num_steps
    return state.params, last


def regression_study(config: EbtBenchmarkConfig) -> dict[str, Any]:
    """Errors, falling energies and ranking; both recipes and diffusion."""
    held_out = regression(jax.random.key(7), 2000)
    key_start, key_noise = jax.random.split(jax.random.key(8))
    other = held_out.action + 0.3 * jax.random.normal(key_noise, held_out.action.shape)
    recipes = {
        "ours": ours(config, config.toy_steps),
        "published": published(config, config.toy_steps),
    }
    rows = {}
    for name, recipe in recipes.items():
        policy = ebt_policy(recipe, TOY)
        params, facts = train(
            config, policy, _sampler(config, regression), config.toy_steps, name
        )
        row: dict[str, Any] = {"training": facts}
        for steps in (2, 10):
            refine = ebt_refine(dataclasses.replace(recipe, act_steps=steps), TOY)
            end = jax.jit(jax.vmap(refine, (0, None, None)))(
                params, key_start, held_out.observation
            )
            row[f"{steps} steps"] = {
                "mse": per_seed(jnp.square(end.action - held_out.action[None])),
                "energy_falls": per_seed(end.energy < end.start_energy),
            }
        energy = jax.jit(jax.vmap(policy.energy, (0, None, None)))
        right = energy(params, held_out.observation, held_out.action)
        wrong = energy(params, held_out.observation, other)
        row["auc, same observation"] = per_seed(right < wrong)
        row["auc, pooled"] = [auc(*pair) for pair in zip(right, wrong, strict=True)]
        rows[name] = row
    policy = denoising(config, TOY, config.diffusion_steps[0])
    params, facts = train(
        config,
        policy,
        _sampler(config, regression),
        _longer(config, config.toy_steps),
        "diffusion",
    )
    act = jax.jit(jax.vmap(policy.act, (0, None, None)))
    action = act(params, key_start, held_out.observation)
    error = per_seed(jnp.square(action - held_out.action[None]))
    rows["diffusion"] = {"mse": error, "training": facts}
    return rows


def two_mode_study(config: EbtBenchmarkConfig) -> dict[str, Any]:
    """Shares of sampled actions inside a mode, and of each mode."""
    held_out = two_modes(jax.random.key(7), 2000)
    steps = config.toy_steps
    several = ours(
        config,
        steps,
        num_starts=config.num_starts,
        extra_steps=2,
        step_size_spread=1.5,
        act_steps=10,
    )
    policies = {
        "ours": ebt_policy(several, TOY),
        "ours, one start": ebt_policy(ours(config, steps), TOY),
        "published": ebt_policy(published(config, steps, act_steps=20), TOY),
        "diffusion": denoising(config, TOY, config.diffusion_steps[0]),
    }
    rows, panels = {}, {}
    for name, policy in policies.items():
        updates = _longer(config, steps) if name == "diffusion" else steps
        sample = _sampler(config, two_modes)
        params, facts = train(config, policy, sample, updates, name)
        act = jax.jit(jax.vmap(policy.act, (0, None, None)))
        action = act(params, jax.random.key(8), held_out.observation)
        side = np.asarray(action - 0.5 * jnp.sin(3 * held_out.observation)[None])
        rows[name] = {
            "in_a_mode": per_seed(np.abs(np.abs(side) - MODE) < MODE / 4),
            "upper_mode": per_seed(side > 0),
            "between": per_seed(np.abs(side) < MODE / 2),
            "training": facts,
        }
        own = jax.tree.map(lambda leaf: leaf[0], params)
        picture = landscape(policy.energy, own)
        panels[name] = picture, held_out.observation[:400], action[0, :400]
    if config.figure:
        draw(config.figure, panels)
    return rows


def _sampler(config: EbtBenchmarkConfig, task: Callable[..., Transition]) -> Any:
    return lambda key, _: task(key, config.batch_size)


def hopper_data(config: EbtBenchmarkConfig) -> tuple[Dataset, np.ndarray]:
    """Rows of the packaged policy as it acts, and its normalised returns."""
    env = MujocoBatch("hopper", 10)
    act = behaviour_act(load_behaviour(config.behaviour))
    rows = collect(jax.random.key(1), env, act, config.rows)
    rows = {key: rows[key] for key in rows if not key.startswith("q")}
    stats = evaluate(
        jax.random.key(2), env, act, config.episodes, max_steps=config.max_steps
    )
    return make_dataset(**rows), _normalized(stats.returns)


def _normalized(returns: Any) -> np.ndarray:
    return np.asarray(normalized_score(returns, reference_score("hopper")))


def receding_act(
    policy: Policy, chunk: chunks.ChunkConfig, spec: SpaceSpec, rows: int
) -> Callable[[Any], Callable[[jax.Array, Any], Any]]:
    """``params -> act(key, observation)`` for one wave of episodes, compiled once."""
    horizon = chunks.receding_horizon(policy.act, chunk, spec)
    step = jax.jit(horizon.act)

    def start(params: Any) -> Callable[[jax.Array, Any], Any]:
        state = horizon.init((rows,))

        def act(key: jax.Array, observation: Any) -> Any:
            nonlocal state
            state, action = step(params, key, state, observation)
            return action

        return act

    return start


def hopper_study(config: EbtBenchmarkConfig) -> dict[str, Any]:
    """Cloning of chunks: returns, network evaluations, time of an action."""
    dataset, behaviour = hopper_data(config)
    spec = MujocoBatch("hopper", 1).spec
    planned = chunks.chunk_spec(config.chunk, spec)
    data = jax.tree.map(jnp.asarray, dataset)
    whole = jax.jit(lambda data: chunks.gather_chunks(data, _all(data), config.chunk))
    normalizer = fit_normalizer(whole(data).observation)

    def sample(key: jax.Array, data: Dataset) -> Transition:
        rows = jax.random.randint(key, (config.batch_size,), 0, len(dataset.age))
        return chunks.gather_chunks(data, rows, config.chunk)

    recipe = ours(config, config.clone_steps, network=config.network, **_shape(config))
    ebt = ebt_policy(recipe, planned)
    options = {"data": data, "normalizer": normalizer}
    trained = {"ebt": train(config, ebt, sample, config.clone_steps, "ebt", **options)}
    first = denoising(config, planned, config.diffusion_steps[0])
    trained["diffusion"] = train(
        config,
        first,
        sample,
        _longer(config, config.clone_steps),
        "diffusion",
        **options,
    )
    contenders = {"ebt, 2 steps": ("ebt", ebt, 2)}
    longer = dataclasses.replace(recipe, act_steps=10, tolerance=1e-3)
    contenders["ebt, up to 10 steps"] = ("ebt", ebt_policy(longer, planned), 10)
    for steps in config.diffusion_steps:
        policy = denoising(config, planned, steps)
        contenders[f"diffusion, {steps} steps"] = ("diffusion", policy, steps)
    table: dict[str, Any] = {
        "behaviour": {"returns": behaviour.tolist(), "mean": float(behaviour.mean())}
    }
    for name, (kind, policy, steps) in contenders.items():
        params = trained[kind][0]
        table[name] = {
            **_returns(config, policy, params, spec),
            "network_evaluations": steps,
            "kind": "gradient of the energy" if kind == "ebt" else "noise",
        }
    return {
        "table": table,
        "training": {name: facts for name, (_, facts) in trained.items()},
        "refinement": _refinement(config, longer, planned, trained["ebt"][0], data),
        "timing": _times(config, contenders, trained, data),
    }


def _shape(config: EbtBenchmarkConfig) -> dict[str, int]:
    return {"num_frames": config.chunk.num_frames, "horizon": config.chunk.horizon}


def _longer(config: EbtBenchmarkConfig, num_steps: int) -> int:
    return config.diffusion_updates * num_steps


def _all(data: Dataset) -> jax.Array:
    return jnp.arange(len(data.age))


def _returns(
    config: EbtBenchmarkConfig, policy: Policy, params: Any, spec: SpaceSpec
) -> dict[str, Any]:
    start = receding_act(policy, config.chunk, spec, config.episodes)
    env = MujocoBatch("hopper", config.episodes)
    scores = []
    for seed in range(config.seeds):
        own = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        stats = evaluate(
            jax.random.fold_in(jax.random.key(3), seed),
            env,
            start(own),
            config.episodes,
            max_steps=config.max_steps,
        )
        scores.append(_normalized(stats.returns))
    scores = np.stack(scores)
    return {
        "mean": float(scores.mean()),
        "per_seed": scores.mean(axis=1).tolist(),
        "returns": scores.tolist(),
    }


def _refinement(
    config: EbtBenchmarkConfig,
    recipe: EbtConfig,
    spec: SpaceSpec,
    params: Any,
    data: Any,
) -> dict[str, Any]:
    """Steps used, and whether energy ranks errors: the first seed, rows of the data."""
    rows = jnp.linspace(0, len(data.age) - 1, 500).astype(int)
    batch = chunks.gather_chunks(data, rows, config.chunk)
    own = jax.tree.map(lambda leaf: leaf[0], params)
    end = jax.jit(ebt_refine(recipe, spec))(own, jax.random.key(4), batch.observation)
    error = np.mean(np.square(end.action - batch.action), axis=-1)
    ranks = [np.argsort(np.argsort(x)) for x in (np.asarray(end.energy), error)]
    steps = np.asarray(end.num_steps)
    return {
        "tolerance": recipe.tolerance,
        "mean_steps": float(steps.mean()),
        "steps_quantiles": np.quantile(steps, [0.1, 0.5, 0.9]).tolist(),
        "energy_falls": float(np.mean(end.energy < end.start_energy)),
        "rank_correlation_of_energy_and_error": float(np.corrcoef(*ranks)[0, 1]),
    }


def _times(
    config: EbtBenchmarkConfig, contenders: Any, trained: Any, data: Any
) -> dict[str, Any]:
    """Seconds of one plan, for one observation and for 64, contenders in turns."""
    result = {}
    for rows in (1, 64):
        batch = chunks.gather_chunks(data, jnp.arange(rows), config.chunk)
        calls, seconds = {}, {}
        for name, (kind, policy, _) in contenders.items():
            own = jax.tree.map(lambda leaf: leaf[0], trained[kind][0])
            calls[name], seconds[name] = timing.compiled(
                policy.act, own, jax.random.key(5), batch.observation
            )
        timings = timing.measure(calls, repeats=config.repeats, compile_seconds=seconds)
        slowest = f"diffusion, {config.diffusion_steps[0]} steps"
        result[f"{rows} observations"] = {
            name: {
                **one.summary(rows),
                "times_faster_than_" + slowest: timing.ratio(timings, name, slowest),
            }
            for name, one in timings.items()
        }
    return result


def study(config: EbtBenchmarkConfig) -> dict[str, Any]:
    """Everything, written to ``config.output``."""
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    studies = {
        "regression": regression_study,
        "two_modes": two_mode_study,
        "hopper": hopper_study,
    }
    unknown = set(config.tasks) - set(studies)
    if unknown or not config.tasks:
        raise ValueError(f"tasks={config.tasks}; expected some of {tuple(studies)}")
    question = (__doc__ or "").splitlines()[0]
    results, document = {}, {}
    with timing.quiet_machine(config.threads) as machine:
        for name in config.tasks:
            results[name] = studies[name](config)
            # After each, so that an interrupted run leaves what it has.
            document = timing.write(config.output, question, config, machine, results)
    for name, row in results.get("hopper", {}).get("table", {}).items():
        print(f"{name}: {row['mean']:.1f} normalised", flush=True)
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(study, EbtBenchmarkConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
