"""How many SAC updates does a second of one core buy, beside plain PyTorch?

    python -m benchmarks.sac_updates --output=runs/bench/sac_updates.json

2×256 networks, two critics, learned temperature, batches of 256 sampled from a replay of
HalfCheetah's shapes. Ours is one compiled scan that samples and updates, alone and with
the seeds as a vmapped axis; an update is one seed's. The peer is `_torch_sac`, one eager
agent, since several would train one after another at the same rate.

Before anything is timed both make one update from the same weights, batch and noise; the
largest difference of any weight is in the result. The rates of both libraries' GEMM stand
beside: part of the ratio may be the peer's BLAS.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import numpy as np

from benchmarks import _report
from benchmarks import _timing as timing
from emfuse_jax import loops
from emfuse_jax.base import Buffer, Policy, SpaceSpec, Transition
from emfuse_jax.data import ring_buffer
from emfuse_jax.policies.sac import SacConfig, sac
from emfuse_jax.tree import stack
from experiments._run import run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class SacUpdatesConfig:
    """Settings of the benchmark.

    Attributes:
        seeds: numbers of vmapped seeds to measure.
        updates: of all seeds together, per call.
        hidden: widths of the networks.
        batch_size: rows per update.
        replay_rows: rows in the replay.
        observation_size: of the environment.
        action_size: of the environment.
        repeats: rounds, at least 5.
        threads: cores to use.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    seeds: tuple[int, ...] = (1, 5, 15)
    updates: int = 150
    hidden: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    replay_rows: int = 100_000
    observation_size: int = 17
    action_size: int = 6
    repeats: int = 7
    threads: int = 1
    output: str = ""
    smoke: bool = False


SMOKE = {
    "seeds": (2,),
    "updates": 4,
    "hidden": (16, 16),
    "batch_size": 8,
    "replay_rows": 50,
}
TOLERANCE = 1e-5
"""Of a weight after one update, which moves it by 3e-4."""


def transitions(config: SacUpdatesConfig, rows: int) -> Transition:
    """Random rows, one in twenty terminal."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Transition(
        observation=normal(rows, config.observation_size),
        action=np.tanh(normal(rows, config.action_size)),
        reward=normal(rows),
        next_observation=normal(rows, config.observation_size),
        terminated=rng.random(rows) < 0.05,
        truncated=np.zeros(rows, bool),
    )


def ours(policy: Policy, buffer: Buffer, num_steps: int) -> Callable[..., Any]:
    """Updates of all seeds in one scan, replay sampling included."""

    def run(keys: jax.Array, state: Any, replay: Any) -> Any:
        return loops.fit(
            keys,
            policy,
            state,
            buffer.sample,
            num_steps,
            data=replay,
            chunk=num_steps,
        )

    return run


def for_torch(rows: Transition) -> dict[str, np.ndarray]:
    """What the peer reads of transitions."""
    kept = ("observation", "action", "reward", "next_observation")
    arrays = {name: np.asarray(getattr(rows, name)) for name in kept}
    return {**arrays, "discount": 1.0 - np.asarray(rows.terminated, np.float32)}


def check(config: SacUpdatesConfig, policy: Policy) -> dict[str, float]:
    """One update of both from the same weights, batch and noise."""
    import torch

    from benchmarks._torch_sac import Agent

    rows = transitions(config, config.batch_size)
    state, key = jax.jit(policy.init)(jax.random.key(0)), jax.random.key(1)
    agent = Agent(config.observation_size, config.action_size, config.hidden)
    agent.load(state.params, state.target_critic)
    # What the update draws from its key; a change there shows as an error.
    shape = (1, config.batch_size, config.action_size)
    noise = [
        torch.tensor(np.asarray(jax.random.normal(part, shape))[0])
        for part in jax.random.split(key)
    ]
    new, _ = jax.jit(policy.update)(key, state, rows)
    move = agent.difference(new.params, new.target_critic)
    batch = {name: torch.tensor(value) for name, value in for_torch(rows).items()}
    agent.update(batch, noise)
    difference = agent.difference(new.params, new.target_critic)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"after one update a weight differs by {difference:.3g}, more than "
            f"{TOLERANCE}: ours and the peer do not compute the same thing, so their "
            "speeds cannot be compared"
        )
    return {"max_abs_difference": difference, "max_abs_move": move}


def add_peer(config: SacUpdatesConfig, policy: Policy, calls: dict, units: dict) -> Any:
    """The PyTorch contender, if there is torch; the comparison of one update."""
    try:
        from benchmarks._torch_sac import Agent, Replay
    except ImportError:
        return _report.NO_TORCH
    checks = check(config, policy)
    rows = for_torch(transitions(config, config.replay_rows))
    replay = Replay(rows, config.batch_size)
    agent = Agent(config.observation_size, config.action_size, config.hidden)

    def update() -> None:
        for _ in range(config.updates):
            agent.update(replay.sample())

    calls["pytorch"], units["pytorch"] = update, config.updates
    return checks


def measure(config: SacUpdatesConfig) -> dict[str, Any]:
    """Updates per second of all contenders, in turns."""
    spec = SpaceSpec(config.observation_size, config.action_size)
    policy = sac(SacConfig(hidden_sizes=config.hidden), spec)
    buffer = ring_buffer(config.replay_rows, config.batch_size)
    rows = transitions(config, config.replay_rows)
    empty = buffer.init(jax.tree.map(lambda leaf: leaf[0], rows))
    replay = jax.jit(buffer.add)(empty, rows)
    init = jax.jit(policy.init)
    calls, seconds, units = {}, {}, {}
    for seeds in config.seeds:
        name = f"ours_{seeds}_seeds" if seeds > 1 else "ours"
        num_steps = max(config.updates // seeds, 1)
        keys = jax.random.split(jax.random.key(0), 2 * seeds)
        state = stack([init(key) for key in keys[:seeds]])
        calls[name], seconds[name] = timing.compiled(
            ours(policy, buffer, num_steps), keys[seeds:], state, replay
        )
        units[name] = num_steps * seeds
    checks = add_peer(config, policy, calls, units)
    timings = timing.measure(calls, repeats=config.repeats, compile_seconds=seconds)
    peers = set(calls) - set(seconds)
    return {
        "same_computation": checks,
        "contenders": _report.contenders(timings, units),
        "ratio_to_pytorch_of": {
            name: _report.ratio(timings, units, name, peer)
            for name in seconds
            for peer in peers
        },
    }


def report(results: dict[str, Any]) -> str:
    """The result as a table."""
    lines = ["updates (of one seed) per CPU-second"]
    for name, summary in results["contenders"].items():
        lines.append(_report.rate_line(name, summary))
        if name in results["ratio_to_pytorch_of"]:
            ratio = results["ratio_to_pytorch_of"][name]
            lines.append(_report.ratio_line(f"{name} / pytorch", ratio))
    lines.append(f"  same computation: {results['same_computation']}")
    return "\n".join([*lines, _report.gemm_line(results["gemm_gflop_per_cpu_second"])])


def main(config: SacUpdatesConfig) -> dict[str, Any]:
    """Measures, prints and writes."""
    _report.check_repeats(config.repeats)
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    with timing.quiet_machine(config.threads) as machine:
        results = measure(config)
        width = max(config.hidden)
        results["gemm_gflop_per_cpu_second"] = timing.gemm_rates(
            [(config.batch_size, width)], repeats=config.repeats
        )
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(config.output, question, config, machine, results)
    print(report(results))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, SacUpdatesConfig))
