"""What every training of a policy does with its run directory: the policy's parameters and
its returns at each evaluation, and the keys of its seeds."""

from collections.abc import Callable
from typing import Any

import jax

from emfuse_jax import artifacts
from emfuse_jax.artifacts.config import nearest
from emfuse_jax.base import Policy
from emfuse_jax.policies.chunks import ChunkConfig
from experiments import _names
from experiments._returns import ONE_STEP, compiled_act, evaluate_seeds, summary
from experiments._run import Run

POLICY_FOLDER = "policy"


def seed_keys(seed: int, num_seeds: int) -> tuple[jax.Array, jax.Array]:
    """Of the initial state and of the training, ``[seed]``: each seed's are those that it
    would have alone."""

    def split(seed: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.key(seed))

    keys = jax.vmap(split)(seed + jax.numpy.arange(num_seeds))
    return keys[:, 0], keys[:, 1]


def describe(
    run: Run,
    kind: str,
    own: Any,
    spec: Any,
    num_seeds: int,
    *,
    plan: ChunkConfig = ONE_STEP,
) -> None:
    """Writes ``model.json``: the parameters lie in `POLICY_FOLDER`; ``plan`` says how a
    policy of chunks acts."""
    description = artifacts.describe(
        kind, own, spec, params_in=POLICY_FOLDER, num_seeds=num_seeds
    )
    if plan != ONE_STEP:
        description["plan"] = artifacts.to_json(plan)
    artifacts.write_description(run.path, description)


def evaluator(
    run: Run,
    config: Any,
    policy: Policy,
    env: Any,
    facts: dict[str, Any],
    *,
    per_chunk: int = 1,
    plan: ChunkConfig = ONE_STEP,
) -> Callable[[int, Any], dict[str, float]]:
    """What `Run.fit` calls before each checkpoint: saves the policy, tries it, and writes
    ``result.json``.

    Args:
        run: the run.
        config: has ``env``, ``seed``, ``num_seeds`` and ``eval_episodes``.
        policy: who acts.
        env: where; None evaluates nothing.
        facts: what ``result.json`` says besides the returns.
        per_chunk: updates of the policy per step of `Run.fit`.
        plan: how a policy of chunks acts.
    """
    act = compiled_act(policy, plan=plan, spec=None if env is None else env.spec)
    folder = run.checkpoints.parent / POLICY_FOLDER  # one of all processes
    result = dict(facts)

    def evaluate(chunks: int, state: Any) -> dict[str, float]:
        step, params = chunks * per_chunk, state.params
        artifacts.delete_after(folder, step - 1)
        artifacts.save(folder, step, params)
        result["step"] = step
        if env is None:
            run.write_json("result.json", result)
            return {"update": step}
        key = jax.random.key(config.seed + 10_000)
        returns = evaluate_seeds(
            key, env, act, params, config.num_seeds, config.eval_episodes
        )
        result.update(summary(returns, config.env))
        run.write_json("result.json", result)
        low, high = result["interval"]
        return {
            "update": step,
            "normalized_return": result["mean"],
            "return_low": low,
            "return_high": high,
        }

    return evaluate


def skipped(env: str) -> str:
    """Why there was no evaluation."""
    why = f"{env!r} cannot be simulated here" if env else "no --env was named"
    near = nearest(env, _names.environments())
    return f"evaluation skipped: {why}" + (f"; did you mean {near!r}?" if near else "")


def finish(run: Run, *, evaluated: bool) -> dict[str, Any]:
    """Adds the seconds to ``result.json``, says what it holds and returns it."""
    result = artifacts.read_json(run.path / "result.json")
    result["cpu_seconds"] = run.seconds("train, cpu")
    run.write_json("result.json", result)
    if not evaluated:
        print(f"trained; {skipped(result['env'])}")
        return result
    low, high = result["interval"]
    print(
        f"{result['env']}: {result['mean']:.1f} normalised, 95 % interval "
        f"[{low:.1f}, {high:.1f}], per seed {[round(x, 1) for x in result['per_seed']]}"
    )
    return result
