r"""Trains a policy inside a dynamics model, or on data, and tries it in real MuJoCo.

    python -m experiments.train_policy --model=runs/fused --env=hopper --run_dir=runs/policy
    python -m experiments.train_policy --model=runs/expert --run_dir=runs/mine \
        --terminated=my_module:my_function
    python -m experiments.train_policy --method=iql --data=data/hopper.hdf5 --env=hopper \
        --run_dir=runs/iql

With ``--method`` a policy is trained on data alone: ``--method=iql --help`` shows how.
Without it, branch rollouts start from the data behind the model (or ``--data``), are
penalised by its uncertainty and fill the buffer of soft actor-critic. Every environment
that is not listed trains as well, given its termination rule; only the evaluation is
skipped then.
``result.json`` has the returns of the last policy: none is chosen by its return.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.data import Dataset, concatenate, gather_history
from emfuse_jax.dynamics import CandidateConfig, lowest_return, rollout
from emfuse_jax.envs.termination import get_terminated_fn
from emfuse_jax.policies.bc import bc, clone_config
from emfuse_jax.policies.model_based import Imagined, ModelBasedConfig, model_based
from emfuse_jax.policies.sac import SacConfig, sac
from experiments import _methods, _names, _offline, _policy_run, presets
from experiments._measure import check_sizes, data_behind, load_domains, require
from experiments._returns import evaluation_env
from experiments._run import Run, open_run, run_main
from experiments._truncation import candidates_fn, truncated_model
from experiments._warm import cloned


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPolicyConfig:
    """Settings of one policy, or of several seeds of it.

    Attributes:
        method: sac trains in a model; --method=NAME --help shows the flags of bc, iql,
            diffusion and the other methods that train on data.
        model: run directory of a dynamics model or of a fusion.
        run_dir: where everything goes.
        env: hopper, walker2d or halfcheetah; another one (with a rule of its own) or
            none is not evaluated.
        terminated: module:function that says when an episode ends; empty: the env's.
        data: where rollouts start; none: the data behind the model.
        num_updates: gradient steps of the policy.
        clone_updates: gradient steps of behaviour cloning: the actor starts there, and the
            clone's energy joins the critic's as a prior; 0: neither.
        penalty: cut=uncertainty: subtracted from the reward per unit of uncertainty.
        cut: uncertainty: rollouts are penalised by the model's and cut where it is large;
            energy: they move by the best of several candidates and are cut where their
            least energy exceeds what train_dynamics --model=mcetm calibrated, or
            fuse_dynamics of such runs.
        candidates: energy: the sampler, as it was calibrated; and how many next states
            sac.dispersion compares.
        cut_quantile: uncertainty: rollouts are cut where the uncertainty exceeds this quantile of
            it on the data; none: never.
        unknown: truncate: a row cut so is worth what the critic says of its last state;
            terminate: nothing lies beyond; halt: nor is the step itself worth its reward,
            but the least return that the data allow (MOReL, MC-ETM).
        rollout: branches, buffer and batches.
        sac: the policy.
        seed: the first one.
        num_seeds: seeds trained together as one program.
        eval_every: gradient steps between evaluations.
        eval_episodes: deterministic episodes per evaluation and seed.
        version: gymnasium's rewards, v4 or v5.
    """

    method: str = _methods.ONLINE
    model: str = ""
    run_dir: str = ""
    env: str = ""
    terminated: str = ""
    data: tuple[str, ...] = ()
    num_updates: int = 60_000
    clone_updates: int = 0
    penalty: float = 1.0
    cut: Literal["uncertainty", "energy"] = "uncertainty"
    candidates: CandidateConfig = CandidateConfig()  # noqa: RUF009
    cut_quantile: float | None = 0.99
    unknown: Literal["truncate", "terminate", "halt"] = "terminate"
    rollout: ModelBasedConfig = ModelBasedConfig()  # noqa: RUF009
    sac: SacConfig = SacConfig()  # noqa: RUF009
    seed: int = 0
    num_seeds: int = 1
    eval_every: int = 10_000
    eval_episodes: int = 10
    version: Literal["v4", "v5"] = "v4"

    def __post_init__(self) -> None:
        if _methods.check_method(self.method) != _methods.ONLINE:
            raise ValueError(
                f"method={self.method!r} trains on data and has settings of its own; "
                "see experiments._methods.config_class"
            )
        for name in ("num_updates", "num_seeds", "eval_every", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        per_rollout = self.rollout.updates_per_rollout
        for name in ("num_updates", "eval_every"):
            if getattr(self, name) % per_rollout:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of "
                    f"rollout.updates_per_rollout={per_rollout}"
                )
        if self.cut_quantile is not None and not 0.0 <= self.cut_quantile <= 1.0:
            raise ValueError(f"cut_quantile={self.cut_quantile} must be in [0, 1]")


PRESETS = {
    "demo": lambda: TrainPolicyConfig(
        num_updates=40_000,
        eval_every=4_000,
        sac=presets.sac("demo"),
        rollout=presets.model_based("demo"),
    ),
    "fast": lambda: TrainPolicyConfig(
        sac=presets.sac("fast"), rollout=presets.model_based("fast")
    ),
    "paper": functools.partial(
        TrainPolicyConfig,
        num_updates=3_000_000,
        cut_quantile=None,
        sac=presets.sac("paper"),
        rollout=presets.model_based("paper"),
    ),
}


def train(config: TrainPolicyConfig) -> dict[str, Any]:
    """Trains, evaluates, writes ``result.json`` and returns what it holds."""
    require(config, "model", "run_dir")
    if not config.env and not config.terminated:
        raise ValueError(
            "--env names a listed environment, --terminated=module:function the rule of "
            "another one; give at least one of them"
        )
    with _names.environment(config.env):
        terminated_fn = get_terminated_fn(config.terminated or config.env)
    env = evaluation_env(
        config.env,
        config.eval_episodes,
        config.version,
        listed_only=not config.terminated,
    )
    trained = artifacts.load_run(config.model)
    if trained.model is None:
        raise ValueError(
            f"{config.model} holds a policy; --model wants a dynamics model"
        )
    if env is not None and env.spec != trained.spec:
        raise ValueError(
            f"--env={config.env} has {env.spec}, {config.model} was trained on "
            f"{trained.spec}; name the environment of the data"
        )
    domains = load_domains(config.data or data_behind([config.model]), min_length=1)
    check_sizes(domains, trained.spec, config.model)
    dataset = concatenate([domain.train for domain in domains])
    dataset = jax.tree.map(jnp.asarray, dataset)
    # What is wrong with the model is told before there is a run directory.
    branch = rollout_fn(config, trained, dataset, terminated_fn)
    if env is None:
        print(_policy_run.skipped(config.env), file=sys.stderr)
    with open_run(config.run_dir, config, kind="train_policy", seed=config.seed) as run:
        return _train(run, config, trained, dataset, branch, env)


def _train(
    run: Run,
    config: TrainPolicyConfig,
    trained: artifacts.Trained,
    dataset: Dataset,
    branch: Callable[..., Imagined],
    env: Any,
) -> dict[str, Any]:
    _policy_run.describe(run, "sac", config.sac, trained.spec, config.num_seeds)
    prior = bc(clone_config(config.sac), trained.spec).energy
    policy = sac(
        config.sac, trained.spec, prior_energy=prior if config.clone_updates else None
    )
    learner = model_based(
        policy,
        branch,
        config.rollout,
        trained.spec,
        candidates_fn=candidates_fn(trained, config.candidates.num_candidates)
        if config.sac.dispersion
        else None,
    )
    one = config.num_seeds == 1
    key_init, key_fit = _policy_run.seed_keys(config.seed, config.num_seeds)

    def init(key: jax.Array, data: Dataset) -> Any:
        state = learner.init(key)
        if not config.clone_updates:
            return state
        key = jax.random.fold_in(key, 1)
        spec = trained.spec
        return cloned(key, state, config.sac, spec, data, config.clone_updates)

    start = jax.jit(init if one else jax.vmap(init, in_axes=(0, None)))
    per_chunk = config.rollout.updates_per_rollout
    facts = {"model": config.model, "env": config.env}
    with run.stage("train"):
        run.fit(
            key_fit[0] if one else key_fit,
            learner,
            start(key_init[0] if one else key_init, dataset),
            lambda key, data: data,
            config.num_updates // per_chunk,
            data=(trained.params, dataset),
            chunk=1,
            save_every=max(config.eval_every // per_chunk, 1),
            evaluate=_policy_run.evaluator(
                run, config, policy, env, facts, per_chunk=per_chunk
            ),
            description=f"train policy, {per_chunk} updates a round",
            unit="round",
        )
    return _policy_run.finish(run, evaluated=env is not None)


def rollout_fn(
    config: TrainPolicyConfig,
    trained: artifacts.Trained,
    dataset: Dataset,
    terminated_fn: Callable[..., Any],
) -> Callable[..., Imagined]:
    """Branches for `model_based`: penalised, cut where the model knows too little."""
    lags = getattr(trained.model.expert, "num_lags", 1)
    model, penalty, threshold = trained.model, config.penalty, None
    if config.cut == "energy":
        model, threshold = truncated_model(config.model, trained, config.candidates)
        penalty = 0.0  # its uncertainty is an energy, of any sign
    elif config.cut_quantile is not None:
        threshold = uncertainty_quantile(trained, dataset, lags, config.cut_quantile)
    halt_value = None
    if config.unknown == "halt":
        halt_value = lowest_return(dataset.reward, config.sac.discount)

    def branch(params: Any, key: jax.Array, policy: Any, data: Dataset) -> Imagined:
        key_rows, key_rollout = jax.random.split(key)
        num_rows = data.age.shape[0]
        rows = jax.random.randint(
            key_rows, (config.rollout.rollout_rows,), 0, num_rows - 1
        )
        # A single slice knows no uncertainty: step over first rows where one can.
        rows = jnp.where(
            (data.age[rows] == 0) & (data.age[rows + 1] == 1), rows + 1, rows
        )
        steps = rollout(
            params,
            key_rollout,
            model,
            policy,
            gather_history(data, rows, lags),
            config.rollout.horizon,
            terminated_fn=terminated_fn,
            penalty=penalty,
            truncate_above=threshold,
            unknown="truncate" if config.unknown == "truncate" else "terminate",
            halt_value=halt_value,
        )
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
        return Imagined(flat.transition, flat.valid, flat.uncertainty)

    return branch


def uncertainty_quantile(
    trained: artifacts.Trained, dataset: Dataset, lags: int, quantile: float
) -> float:
    """A quantile of the model's uncertainty on rows of the data."""
    rows = np.linspace(0, len(dataset.age) - 1, 5000).astype(int)
    history = gather_history(dataset, rows, lags)
    values = jax.jit(trained.model.uncertainty)(trained.params, history)
    return float(jnp.quantile(values, quantile))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    argv = list(sys.argv if argv is None else argv)
    method = _methods.method_of(argv)
    if method in _methods.OFFLINE:
        config_cls = _methods.config_class(_offline.OfflineConfig, method)
        return run_main(
            _offline.train_offline,
            config_cls,
            argv,
            presets=_offline.method_presets(config_cls, method),
            default_preset="fast",
            trains=True,
            shares=True,
        )
    if method != _methods.ONLINE:
        # Its flags are not known either: the method is what to complain of.
        argv = [argv[0], f"--method={method}"]
    return run_main(
        train,
        TrainPolicyConfig,
        argv,
        presets=PRESETS,
        default_preset="fast",
        trains=True,
    )


if __name__ == "__main__":
    sys.exit(main())
