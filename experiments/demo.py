r"""The whole job in minutes: data, experts, fusion, policies, returns, text, report.

    python -m experiments.demo --run_dir=runs/demo
    python -m experiments.demo --run_dir=runs/text --parts=language

Packaged behaviour policies of different age play Hopper in C MuJoCo. An any-step energy
model (ADETM) learns from each data set alone; their energies are fused; policies learn
inside the fusion and inside each expert, with equal updates; all are played in MuJoCo.
Beside that, three small language models learn from text that this machine has, a domain
each; the same law fuses them token by token, and all are scored on every domain.
Every step is one of the other commands in a process of its own, as many at a time as
``--workers`` says, on one thread each. Rerun to resume: what is finished is not repeated.
"""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence

from emfuse_jax import artifacts
from emfuse_jax.artifacts.config import unknown_name
from emfuse_jax.data.behaviour import load_behaviour
from emfuse_jax.envs.mujoco_table import check_environment
from experiments import _divergence, _dry_run, _lm_text, _names
from experiments._gather import DEMO
from experiments._jobs import RECORD_FILE, Job, run_jobs, succeeded
from experiments._lm_rules import parse_rules
from experiments._run import open_run, run_main

PARTS = ("dynamics", "language")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo.

    Attributes:
        run_dir: where everything goes.
        parts: dynamics, language, or both.
        env: hopper, walker2d or halfcheetah.
        policies: behaviour policies, packaged names or .npz files: one data set and
            one expert each.
        steps: rows per data set.
        model_updates: gradient steps per expert.
        policy_updates: gradient steps per policy.
        episodes: per evaluation.
        workers: processes at a time; 1 where they would share one accelerator.
        seed: of everything.
        model_flags: more flags for train_dynamics.
        policy_flags: more flags for train_policy.
        prompt: what the fused language models continue.
        rules: of fusion, whose scores are compared.
        speakers: rules under which text is decoded.
        lm_flags: more flags for train_lm_experts.
    """

    run_dir: str = "runs/demo"
    parts: tuple[str, ...] = PARTS
    env: str = "hopper"
    policies: tuple[str, ...] = ("hopper_medium", "hopper_medium_late")
    steps: int = 25_000
    model_updates: int = 8_000
    policy_updates: int = 40_000
    episodes: int = 20
    workers: int = 2
    seed: int = 0
    model_flags: tuple[str, ...] = ()
    policy_flags: tuple[str, ...] = ()
    prompt: str = "def read_options(path, encoding=None):"
    rules: tuple[str, ...] = (
        *("emfuse", "emselect", "packllm_sim:temperature=0.1", "packllm_opt"),
        *("evidence", "linear_pool"),
    )
    speakers: tuple[str, ...] = ("emfuse", "emselect", "evidence")
    lm_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"parts is empty; known: {', '.join(PARTS)}")
        if "language" in self.parts:
            parse_rules(self.rules)
            parse_rules(self.speakers)
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(unknown_name("part", part, PARTS))
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")
        if len(self.policies) < 2:
            raise ValueError(
                f"policies={','.join(self.policies)}; expected at least two to fuse"
            )
        if len({pathlib.Path(policy).stem for policy in self.policies}) < len(
            self.policies
        ):
            raise ValueError(
                f"policies={','.join(self.policies)}; names of files must differ"
            )


PRESETS = {
    "demo": DemoConfig,
    "smoke": lambda: DemoConfig(
        run_dir="runs/smoke",
        steps=600,
        model_updates=20,
        policy_updates=20,
        episodes=2,
        model_flags=(
            *("--adetm.energy_sizes=8", "--adetm.head_sizes=8", "--chunk=10"),
            *("--adetm.state_features=8", "--adetm.batch_size=32"),
            *("--adetm.energy_rows=8", "--adetm.num_lags=2"),
        ),
        policy_flags=(
            *("--rollout.updates_per_rollout=10", "--rollout.rollout_rows=16"),
            *("--rollout.horizon=2", "--sac.hidden_sizes=8", "--eval_every=10"),
        ),
        rules=("emfuse", "packllm_sim:temperature=0.1"),
        speakers=("emselect",),
        lm_flags=(
            *("--tokenizer=byte", "--text.max_bytes=60000", "--num_windows=4"),
            *("--model.num_layers=1", "--model.hidden_size=16", "--model.num_heads=2"),
            "--model.num_kv_heads=2",
            *("--base_steps=10", "--expert_steps=10", "--chunk=10", "--batch_size=2"),
        ),
    ),
}
"""``smoke`` runs every step and shows nothing but that they work."""


def demo(config: DemoConfig) -> None:
    """Runs what is not finished yet; says where the report is, and what it found."""
    if "dynamics" in config.parts:
        with _names.environment(config.env):
            check_environment(config.env)
        for policy in config.policies:
            with _names.behaviour(policy):
                load_behaviour(policy)
    ignore = ("run_dir", "workers")
    with open_run(
        config.run_dir, config, kind=DEMO, seed=config.seed, ignore=ignore
    ) as run:
        folder = pathlib.Path(config.run_dir)
        jobs = plan(config, folder)
        if _dry_run.is_asked():
            _tell(jobs, folder)
            return
        with run.stage("total"):
            run_jobs(jobs, folder, workers=config.workers, stage=run.stage)
        seconds = run.seconds("total")
    report = folder / "report.md"
    print(f"\n{_tables(report.read_text())}\n")
    if "language" in config.parts:
        print(f"{_decoded(folder)}\n")
    print(f"{seconds / 60:.1f} minutes in all; report: {report}, {report.stem}.json")


def plan(config: DemoConfig, folder: pathlib.Path) -> list[Job]:
    """Every command, the ones that others wait for first; what trains goes back where it
    diverges, if that was asked for."""
    jobs = _jobs_of(config, folder)
    if _divergence.mode() == "stop":
        return jobs
    flag = f"--on_divergence={_divergence.mode()}"
    return [
        job._replace(options=(flag,)) if ".train_" in job.command[0] else job
        for job in jobs
    ]


def _tell(jobs: Sequence[Job], folder: pathlib.Path) -> None:
    """The plan of a dry run. What a training costs is known once its data are made."""
    done = succeeded(jobs, folder / RECORD_FILE)
    print("dry run: nothing is written or trained; each command has a --dry_run too\n")
    for job in jobs:
        state = "done" if job.name in done else "to do"
        command = shlex.join(["python", "-m", *job.command, *job.options])
        print(f"{job.name} ({state})\n  {command}")


def _jobs_of(config: DemoConfig, folder: pathlib.Path) -> list[Job]:
    parts: list[Job] = []
    evaluations: list[Job] = []
    if "dynamics" in config.parts:
        chain, evaluations = _dynamics_jobs(config, folder)
        parts += chain
    if "language" in config.parts:
        parts += _language_jobs(config, folder)
    # Short, and only the report waits for them: they fill the gaps.
    parts += evaluations
    made = ("result.json", "fusion.json")
    runs = [folder, *(job.makes.parent for job in parts if job.makes.name in made)]
    report = _job(
        "report",
        *("report", f"--runs={','.join(map(str, runs))}", f"--out={folder}"),
        f"--behaviour={','.join(str(job.makes) for job in evaluations)}",
        "--title=Fused experts against single ones",
        makes=folder / "report.json",
        needs=tuple(job.name for job in parts),
    )
    return [*parts, report]


def _dynamics_jobs(
    config: DemoConfig, folder: pathlib.Path
) -> tuple[list[Job], list[Job]]:
    """Data, experts, fusion and policies; and the evaluation of the behaviours."""
    names = [pathlib.Path(policy).stem for policy in config.policies]
    data = {name: folder / "data" / f"{name}.hdf5" for name in names}
    behaviours = {name: folder / "behaviour" / f"{name}.json" for name in names}
    env, episodes = f"--env={config.env}", f"--episodes={config.episodes}"
    experts, collections, evaluations = [], [], []
    for index, (name, policy) in enumerate(zip(names, config.policies, strict=True)):
        seed = f"--seed={config.seed + index}"
        collections.append(
            _job(
                f"data-{name}",
                *("collect_data", env, f"--policy={policy}", seed),
                *(f"--steps={config.steps}", f"--out={data[name]}"),
                makes=data[name],
            )
        )
        evaluations.append(
            _job(
                f"behaviour-{name}",
                *("evaluate", env, f"--policy={policy}", episodes, seed),
                f"--out={behaviours[name]}",
                makes=behaviours[name],
            )
        )
        run_dir = folder / f"expert-{name}"
        experts.append(
            _job(
                f"expert-{name}",
                *("train_dynamics", "--preset=demo", f"--data={data[name]}", seed),
                *(f"--run_dir={run_dir}", f"--adetm.num_steps={config.model_updates}"),
                *config.model_flags,
                makes=run_dir / "result.json",
                needs=(f"data-{name}",),
            )
        )
    fused = _job(
        "fused",
        "fuse_dynamics",
        f"--experts={','.join(str(folder / e.name) for e in experts)}",
        f"--run_dir={folder / 'fused'}",
        makes=folder / "fused" / "fusion.json",
        needs=tuple(expert.name for expert in experts),
    )
    models = (fused, *experts)
    policies = [_policy_job(config, folder, model.name) for model in models]
    return [*collections, *experts, fused, *policies], evaluations


def _language_jobs(config: DemoConfig, folder: pathlib.Path) -> list[Job]:
    """Language experts, their scores under every rule, and text from their fusion."""
    models, scores, text = (
        folder / f"language-{name}" for name in ("models", "scores", "text")
    )
    experts, seed = f"--experts={models}", f"--seed={config.seed}"
    train = _job(
        models.name,
        *("train_lm_experts", "--preset=demo", f"--run_dir={models}", seed),
        *config.lm_flags,
        makes=models / "result.json",
    )
    score = _job(
        scores.name,
        *("fuse_llm", experts, f"--score={models}", f"--run_dir={scores}", seed),
        *(f"--rule={','.join(config.rules)}", f"--scoring.baseline={config.rules[0]}"),
        makes=scores / "result.json",
        needs=(train.name,),
    )
    decode = _job(
        text.name,
        *("fuse_llm", experts, f"--prompt={config.prompt}", f"--run_dir={text}", seed),
        *(f"--rule={','.join(config.speakers)}", "--sampling.max_new_tokens=80"),
        *("--sampling.temperature=0.7", "--sampling.top_p=0.9"),
        makes=text / "result.json",
        needs=(train.name,),
    )
    return [train, score, decode]


def _policy_job(config: DemoConfig, folder: pathlib.Path, model: str) -> Job:
    name = f"policy-{model.removeprefix('expert-')}"
    return _job(
        name,
        *("train_policy", "--preset=demo", f"--model={folder / model}"),
        *(f"--env={config.env}", f"--run_dir={folder / name}"),
        *(f"--num_updates={config.policy_updates}", f"--seed={config.seed}"),
        f"--eval_episodes={config.episodes}",
        *config.policy_flags,
        makes=folder / name / "result.json",
        needs=(model,),
    )


def _job(
    name: str,
    command: str,
    *flags: str,
    makes: pathlib.Path,
    needs: tuple[str, ...] = (),
) -> Job:
    return Job(name, (f"experiments.{command}", *flags), makes, needs)


def _tables(markdown: str) -> str:
    """The report's main tables, under their headings."""
    shown = ("Returns", "Model error", "Bits per byte")
    parts = []
    for section in markdown.split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        if heading.startswith(shown):
            table = [line for line in lines if line.startswith("|")]
            parts.append("\n".join([heading, "", *table]))
    return "\n\n".join(parts)


def _decoded(folder: pathlib.Path) -> str:
    """What the fused language models wrote, and which expert chose each token."""
    result = artifacts.read_json(folder / "language-text" / "result.json")
    names, colour = result["experts"], sys.stdout.isatty()
    parts = []
    for passage in result["passages"]:
        counted = _lm_text.shares(passage, names).items()
        told = ", ".join(f"{_lm_text.short(n)} {100 * s:.0f} %" for n, s in counted)
        parts.append(
            f"{passage['rule']}: {told} ({_lm_text.legend(passage['moves'])})\n"
            + _lm_text.show(passage, names, colour=colour)
        )
    if colour:
        parts.insert(0, _lm_text.painted_names(names))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = {"presets": PRESETS, "default_preset": "demo", "trains": True}
    return run_main(demo, DemoConfig, argv, **options)


if __name__ == "__main__":
    sys.exit(main())
