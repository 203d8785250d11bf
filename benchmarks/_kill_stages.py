"""The commands that the kill soak interrupts, at sizes at which compiling takes longest."""

import pathlib
from typing import NamedTuple

_MODEL = (
    *("--adetm.num_lags=2", "--adetm.energy_sizes=8", "--adetm.head_sizes=8"),
    *("--adetm.state_features=8", "--adetm.action_features=8", "--adetm.num_heads=2"),
    *("--adetm.batch_size=16", "--adetm.energy_rows=8", "--adetm.num_steps=400"),
)
_ETM = ("--etm.energy_sizes=8", "--etm.head_sizes=8", "--etm.num_steps=400")
_ENSEMBLE = ("--ensemble.hidden_sizes=8", "--ensemble.num_steps=400")
_OFTEN = ("--chunk=10", "--save_every=2")
_POLICY = (
    *("--env=hopper", "--sac.hidden_sizes=8", "--rollout.rollout_rows=8"),
    *("--rollout.horizon=2", "--rollout.updates_per_rollout=10", "--num_updates=100"),
    *("--rollout.batch_size=16", "--eval_every=20", "--eval_episodes=2"),
    "--cut_quantile=none",
)
_OFFLINE = (
    *("--num_updates=400", "--chunk=10", "--eval_every=40", "--batch_size=16"),
    *("--env=hopper", "--eval_episodes=2", "--return_range=none"),
)
_LM = (
    *("--tokenizer=byte", "--text.max_bytes=60000", "--num_windows=4", "--window=32"),
    *("--model.num_layers=1", "--model.hidden_size=16", "--model.num_heads=2"),
    *("--model.num_kv_heads=2", "--base_steps=60", "--expert_steps=40", "--chunk=10"),
    *("--batch_size=2", "--save_every=2", "--prompt=8", "--num_domains=2"),
)


class Stage(NamedTuple):
    """One command.

    Attributes:
        name: of the stage, and of its folder.
        command: module and flags; ``{out}`` is its folder, ``{NAME}`` that of a stage that
            it needs.
    """

    name: str
    command: tuple[str, ...]

    def arguments(self, out: pathlib.Path, inputs: pathlib.Path) -> list[str]:
        """The command for these folders."""
        places = {stage.name: inputs / stage.name for stage in STAGES}
        return [part.format(out=out, **places) for part in self.command]


def _stage(name: str, command: str, *flags: str) -> Stage:
    return Stage(name, (f"experiments.{command}", *flags))


_RUN = "--run_dir={out}"
_DATA = "--data={data}/a.hdf5"
STAGES = (
    _stage(
        "data",
        *("collect_data", "--env=hopper", "--policy=hopper_medium", "--steps=3000"),
        "--out={out}/a.hdf5",
    ),
    _stage("expert_a", "train_dynamics", _DATA, _RUN, *_MODEL, *_OFTEN),
    _stage("expert_b", "train_dynamics", _DATA, _RUN, *_MODEL, *_OFTEN, "--seed=1"),
    _stage("etm", "train_dynamics", "--model=etm", _DATA, _RUN, *_ETM, *_OFTEN),
    _stage(
        "ensemble",
        "train_dynamics",
        "--model=ensemble",
        _DATA,
        _RUN,
        *_ENSEMBLE,
        *_OFTEN,
    ),
    _stage("fused", "fuse_dynamics", "--experts={expert_a},{expert_b}", _RUN, _DATA),
    _stage("merged", "merge", "--experts={expert_a},{expert_b}", _RUN),
    _stage("policy", "train_policy", "--model={expert_a}", _RUN, *_POLICY),
    _stage("bc", "train_policy", "--method=bc", _DATA, _RUN, *_OFFLINE),
    _stage("iql", "train_policy", "--method=iql", _DATA, _RUN, *_OFFLINE),
    _stage(
        "evaluated",
        *("evaluate", "--run_dir={policy}", "--out={out}/result.json", "--episodes=4"),
    ),
    _stage(
        "behaviour",
        *("train_behaviour", "--env=hopper", _RUN, "--total_steps=1600"),
        *("--evaluate_every=400", "--warmup_steps=80", "--evaluate_episodes=2"),
        "--batch_size=16",
    ),
    _stage("language", "train_lm_experts", _RUN, *_LM),
    _stage(
        "scores",
        *("fuse_llm", "--experts={language}", "--score={language}", _RUN),
        "--rule=emfuse,packllm_sim:temperature=0.1",
    ),
    _stage("demo", "demo", "--preset=smoke", _RUN),
)
"""In an order in which each finds what it needs."""
