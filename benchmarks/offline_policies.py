r"""What do policies trained on recorded data alone return, and does guidance add to cloning?

    python -m benchmarks.offline_policies --work=runs/offline
    python -m benchmarks.offline_policies --envs=hopper --methods=bc,aepo --work=runs/quick

Records each environment's packaged behaviour policy (PointMaze: a controller that wanders),
trains every method on it with `experiments.train_policy` (equal updates, all seeds as one
program) and scores it on episodes of its own. Inverse temperatures and guidance scales are
chosen on validation seeds, whose returns are not reported, and no policy is chosen by its
return. Diffusion cloning is AEPO's own behaviour model, unguided. Steps that are finished
are not done again; the JSON is written after each method.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._timing import portable
from emfuse_jax import artifacts
from emfuse_jax.data.behaviour import behaviour_act, load_behaviour
from emfuse_jax.envs.pointmaze import MAZES, PointMazeBatch, waypoint_act
from emfuse_jax.evaluation.episodes import MAX_STEPS, evaluate
from emfuse_jax.evaluation.scores import normalized_score, reference_score
from emfuse_jax.policies._guidance import GuidanceConfig
from emfuse_jax.policies.aepo import AepoConfig, aepo_model
from emfuse_jax.policies.bc import BcConfig
from emfuse_jax.policies.diffusion import GuidedDiffusion, guided_act
from emfuse_jax.policies.iql import IqlConfig, IqlCriticsConfig
from emfuse_jax.policies.qgpo import QgpoConfig, qgpo_model
from experiments import collect_data, collect_pointmaze
from experiments._methods import config_class
from experiments._offline import OfflineConfig, train_offline
from experiments._returns import evaluation_env, summarize_scores, summary
from experiments._run import run_main

GUIDED = {"aepo": aepo_model, "qgpo": qgpo_model}
VALIDATION_SEED = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflinePoliciesConfig:
    """Settings of the comparison.

    Attributes:
        envs: hopper, walker2d, halfcheetah and mazes.
        methods: bc, iql, aepo and qgpo.
        rows: of each recording.
        num_updates: gradient steps of each method.
        batch_size: rows per gradient step.
        hidden_sizes: of actors, critics and guidance.
        num_seeds: that are reported.
        episodes: deterministic episodes per seed.
        temperatures: of guidance, inverse temperatures to choose from, in standard
            deviations of the advantage.
        iql_temperatures: the same of implicit Q-learning, in units of the scaled reward.
        scales: guidance scales to choose from.
        validation_seeds: policies behind each choice, of seeds that are not reported.
        validation_episodes: per choice and seed.
        work: where data, runs and steps that are done are kept.
        out: the JSON result.
    """

    envs: tuple[str, ...] = ("hopper", "pointmaze-umaze", "walker2d", "halfcheetah")
    methods: tuple[str, ...] = ("bc", "iql", "aepo", "qgpo")
    rows: int = 100_000
    num_updates: int = 20_000
    batch_size: int = 128
    hidden_sizes: tuple[int, ...] = (128, 128)
    num_seeds: int = 3
    episodes: int = 10
    temperatures: tuple[float, ...] = (1.0, 3.0)
    iql_temperatures: tuple[float, ...] = (0.3, 1.0, 3.0)
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    validation_seeds: int = 2
    validation_episodes: int = 10
    work: str = "runs/offline"
    out: str = "benchmarks/results/offline_policies.json"

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in ("bc", "iql", *GUIDED)]
        if unknown:
            raise ValueError(f"methods={unknown}; known: bc, iql, {', '.join(GUIDED)}")


def own_config(
    config: OfflinePoliciesConfig, env: str, method: str, beta: float
) -> Any:
    """The method's settings. Critics learn three times as fast as published and their
    targets follow four times as fast, in a fraction of the updates, and all alike."""
    sizes = config.hidden_sizes
    rates = {"learning_rate": 1e-3, "target_update_rate": 0.02, "hidden_sizes": sizes}
    critics = IqlCriticsConfig(expectile=0.9 if env in MAZES else 0.7, **rates)
    guidance = GuidanceConfig(hidden_sizes=sizes)
    if method == "bc":
        return BcConfig(hidden_sizes=sizes)
    if method == "iql":
        return IqlConfig(
            critics=critics,
            hidden_sizes=sizes,
            learning_rate=1e-3,
            decay_steps=config.num_updates,
            inverse_temperature=beta,
        )
    if method == "aepo":
        return AepoConfig(critics=critics, guidance=guidance, inverse_temperature=beta)
    # Less support than the default, with which updates cost four times those of aepo.
    support = {"num_support": 8, "support_rows": 4, "batch_size": 32}
    return QgpoConfig(guidance=guidance, inverse_temperature=beta, **support, **rates)


def record(config: OfflinePoliciesConfig, env: str) -> tuple[str, dict[str, Any]]:
    """The data set's file, and what it holds."""
    path = pathlib.Path(config.work) / "data" / f"{env}-{config.rows}.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"env": env, "steps": config.rows, "out": str(path)}
    if env in MAZES:
        chosen = collect_pointmaze.CollectPointMazeConfig(**options)
        return str(path), collect_pointmaze.run(chosen)
    chosen = collect_data.CollectConfig(policy=f"{env}_medium", **options)
    return str(path), collect_data.run(chosen)


def train(
    config: OfflinePoliciesConfig,
    env: str,
    method: str,
    beta: float,
    *,
    seed: int,
    num_seeds: int,
    data: str,
) -> tuple[artifacts.Trained, float]:
    """The trained policies (a seed axis leads, also of one) and the CPU seconds."""
    name = f"{method}-beta{beta:g}" if beta else method
    run_dir = pathlib.Path(config.work) / env / f"{name}-seed{seed}"
    settings = {
        method: own_config(config, env, method, beta),
        "data": (data,),
        "run_dir": str(run_dir),
        "num_updates": config.num_updates,
        "eval_every": config.num_updates,
        "chunk": min(1000, config.num_updates),
        "batch_size": config.batch_size,
        # A maze's rewards are 0 and 1 per step: a range of 100 keeps them near that.
        "return_range": 100.0 if env in MAZES else 1000.0,
        "seed": seed,
        "num_seeds": num_seeds,
    }
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    result = train_offline(config_class(OfflineConfig, method)(**settings))
    trained = artifacts.load_run(run_dir)
    if num_seeds == 1:
        one = jax.tree.map(lambda leaf: leaf[None], trained.params)
        trained = trained._replace(params=one)
    return trained, result["cpu_seconds"]


class Player:
    """Plays several policies of one method side by side, each on episodes of its own."""

    def __init__(self, env: str, method: str, trained: artifacts.Trained) -> None:
        self._env = env
        policy = trained.policy
        assert policy is not None
        act = functools.partial(policy.act, deterministic=True)
        if method in GUIDED:
            own = artifacts.from_json(
                artifacts.KINDS[method].config, trained.description["config"]
            )
            act = functools.partial(
                scalable_act(GUIDED[method](own, trained.spec), own, trained.spec),
                deterministic=True,
            )
        self._act = jax.jit(jax.vmap(act, in_axes=(0, None, 0)))

    def scores(
        self, key: jax.Array, params: Any, num: int, episodes: int
    ) -> np.ndarray:
        """Normalised returns ``[policy, episode]`` of ``num`` policies, whose parameters
        lead with that axis."""
        env = evaluation_env(self._env, num * episodes, "v4")
        assert env is not None

        def act(key: jax.Array, observation: Any) -> np.ndarray:
            rows = observation.reshape(num, episodes, -1)
            action = self._act(params, key, rows)
            return np.asarray(action).reshape(num * episodes, -1)

        limit = getattr(env, "max_steps", MAX_STEPS)
        stats = evaluate(key, env, act, num * episodes, max_steps=limit)
        returns = np.asarray(stats.returns).reshape(num, episodes)
        return np.asarray(normalized_score(returns, reference_score(self._env)))


def scalable_act(model: GuidedDiffusion, own: Any, spec: Any) -> Any:
    """``act`` of ``(params, guidance scale)``: one program for every scale."""
    scaled = GuidedDiffusion(
        lambda p, *inputs: model.noise(p[0], *inputs),
        lambda p, *inputs: p[1] * model.guidance(p[0], *inputs),
    )
    return guided_act(
        scaled,
        spec.action_size,
        num_steps=own.behaviour.num_steps,
        bound=own.behaviour.bound,
    )


def choose(
    config: OfflinePoliciesConfig, env: str, method: str, data: str
) -> dict[str, Any]:
    """Inverse temperature and guidance scale (1 without guidance) by the validation seeds'
    mean return."""
    table, player, spent = {}, None, 0.0
    guided, num = method in GUIDED, config.validation_seeds
    scales = config.scales if guided else (1.0,)
    count = len(scales)
    for beta in config.temperatures if guided else config.iql_temperatures:
        options = {"seed": VALIDATION_SEED, "num_seeds": num, "data": data}
        trained, seconds = train(config, env, method, beta, **options)
        player = player or Player(env, method, trained)
        # Of every seed one policy per scale.
        params = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, count, axis=0), trained.params
        )
        scores = player.scores(
            jax.random.key(VALIDATION_SEED),
            (params, jnp.tile(jnp.asarray(scales), num)) if guided else params,
            num * count,
            config.validation_episodes,
        )
        spent += seconds
        means = scores.reshape(num, count, -1).mean(axis=(0, 2))
        table[f"{beta:g}"] = dict(zip(map(str, scales), means.tolist(), strict=True))
    best = max(
        ((float(b), float(s)) for b, row in table.items() for s in row),
        key=lambda pair: table[f"{pair[0]:g}"][str(pair[1])],
    )
    return {"beta": best[0], "scale": best[1], "table": table, "cpu_seconds": spent}


def measure(
    config: OfflinePoliciesConfig, env: str, method: str, data: str
) -> dict[str, dict[str, Any]]:
    """Rows of the table that one method gives: its own, and AEPO's unguided behaviour."""
    chosen = {} if method == "bc" else choose(config, env, method, data)
    trained, seconds = train(
        config,
        env,
        method,
        chosen.get("beta", 0.0),
        seed=0,
        num_seeds=config.num_seeds,
        data=data,
    )
    player, num = Player(env, method, trained), config.num_seeds

    def row(scale: float | None) -> dict[str, Any]:
        params = trained.params
        if scale is not None:
            params = (params, jnp.full(num, scale))
        scores = player.scores(jax.random.key(7), params, num, config.episodes)
        return {**summarize_scores(scores), "cpu_seconds": seconds}

    scale = chosen["scale"] if method in GUIDED else None
    rows = {method: {**row(scale), "chosen": chosen}}
    if method == "aepo":
        # Trained along with the guidance, so that it has no cost of its own.
        rows["diffusion"] = row(0.0)
        del rows["diffusion"]["cpu_seconds"]
    return rows


def behaviours(config: OfflinePoliciesConfig, env: str) -> dict[str, dict[str, Any]]:
    """Scores of who made the data: as it acted then and, of a policy, without its noise."""
    num = config.num_seeds * config.episodes
    world = evaluation_env(env, num, "v4")
    assert world is not None
    if isinstance(world, PointMazeBatch):
        acts = {"behaviour": waypoint_act(world)}
    else:
        policy = load_behaviour(f"{env}_medium")
        acts = {
            "behaviour": behaviour_act(policy),
            "behaviour, noiseless": behaviour_act(policy, noise=0.0),
        }
    limit = getattr(world, "max_steps", MAX_STEPS)
    found = {}
    for name, act in acts.items():
        stats = evaluate(jax.random.key(7), world, act, num, max_steps=limit)
        found[name] = summary(np.asarray(stats.returns)[None], env)
    return found


def compare(config: OfflinePoliciesConfig) -> dict[str, Any]:
    """Does everything and writes the JSON."""
    start, table, data = time.process_time(), {}, {}
    settings = artifacts.to_json(config)
    for env in config.envs:
        path, data[env] = record(config, env)
        done = pathlib.Path(config.work) / env / "rows"
        done.mkdir(parents=True, exist_ok=True)
        jobs = {"behaviour": functools.partial(behaviours, config, env)}
        jobs |= {
            method: functools.partial(measure, config, env, method, path)
            for method in config.methods
        }
        for name, job in jobs.items():
            rows = _once(done / f"{name}.json", settings, job)
            table.setdefault(env, {}).update(rows)
            for label, entry in rows.items():
                low, high = entry["iqm_interval"]
                print(
                    f"{env}, {label}: IQM {entry['iqm']:.1f} [{low:.1f}, {high:.1f}]",
                    flush=True,
                )
            _write(config, table, data, time.process_time() - start)
    return table


def _once(path: pathlib.Path, settings: Any, make: Any) -> dict[str, Any]:
    """Rows made once with these settings; which environments, methods and files does not
    matter."""
    own = {
        k: v for k, v in settings.items() if k not in ("envs", "methods", "out", "work")
    }
    if path.exists():
        known = artifacts.read_json(path)
        if known["config"] == own:
            return known["rows"]
        raise ValueError(
            f"{path} was made with other settings "
            f"({'; '.join(artifacts.differences(known['config'], own)[:3])}); choose "
            "another --work"
        )
    rows = make()
    artifacts.write_json(path, {"config": own, "rows": rows})
    return rows


def _write(
    config: OfflinePoliciesConfig, table: Any, data: Any, cpu_seconds: float
) -> None:
    result = {
        "question": (__doc__ or "").split("\n")[0],
        "provenance": artifacts.provenance(),
        "config": artifacts.to_json(config),
        "cpu_seconds_of_last_start": cpu_seconds,
        "data": data,
        "table": table,
    }
    path = pathlib.Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(path, portable(result))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(compare, OfflinePoliciesConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
