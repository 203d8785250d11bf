r"""How much of Push-T's outline does the scripted pusher cover, and a policy cloned from it?

    python -m benchmarks.pusht --data=data/pusht.hdf5

Records the pusher's episodes as a D4RL-layout file (kept, if it is there), measures it on
starts that are not among them, clones it with a diffusion policy over chunks of actions and
measures the clone on the same starts. The score of an episode is its largest coverage;
success is 95 %, where an episode ends.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _timing as timing
from benchmarks.particle import proportion
from emfuse_jax import loops
from emfuse_jax.data.d4rl_reader import read_d4rl, write_d4rl
from emfuse_jax.data.dataset import Dataset
from emfuse_jax.data.normalizer import fit_normalizer
from emfuse_jax.envs import pusht
from emfuse_jax.nets.transformer import TransformerConfig, transformer_denoiser
from emfuse_jax.policies.chunks import (
    ChunkConfig,
    chunk_spec,
    gather_chunks,
    receding_horizon,
)
from emfuse_jax.policies.diffusion import DiffusionConfig, diffusion
from experiments._progress import Progress
from experiments._run import run_main

QUESTION = "How much of Push-T's outline do the scripted pusher and its clone cover?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushTConfig:
    """Settings.

    Attributes:
        demonstrations: episodes of the pusher to record.
        episodes: per measurement.
        num_steps: updates of the clone; 0 trains none.
        batch_size: of its updates.
        network: of its denoiser.
        chunks: frames, actions planned and actions executed.
        pusher: the scripted expert.
        seed: of the first episode measured; recordings count down from there.
        data: the HDF5 file of the recordings.
        output: the JSON result.
    """

    demonstrations: int = 200
    episodes: int = 100
    num_steps: int = 40_000
    batch_size: int = 64
    network: TransformerConfig = TransformerConfig(  # noqa: RUF009
        num_layers=1, features=48, num_heads=4, mlp_ratio=2
    )
    chunks: ChunkConfig = ChunkConfig(num_frames=2, horizon=8, execute=4)  # noqa: RUF009
    pusher: pusht.PusherConfig = pusht.PusherConfig(num_candidates=32)  # noqa: RUF009
    seed: int = 10_000
    data: str = "data/pusht.hdf5"
    output: str = "benchmarks/results/pusht.json"


def play(
    make: Callable[[int], pusht.Controller], seeds: range, description: str
) -> list[pusht.Episode]:
    """One episode per seed, each with a controller of its own."""
    env, episodes = pusht.make_pusht(), []
    with Progress(len(seeds), description=description, unit="episode") as bar:
        for seed in seeds:
            episodes.append(pusht.play(env, make(seed), seed))
            bar.update(len(episodes))
    return episodes


def scores(episodes: list[pusht.Episode]) -> dict[str, Any]:
    """Successes with an interval, and the coverage."""
    best = np.array([episode.coverage.max() for episode in episodes])
    return {
        "success": proportion(sum(e.succeeded for e in episodes), len(episodes)),
        "mean_best_coverage": float(best.mean()),
        "mean_steps": float(np.mean([len(e.action) for e in episodes])),
    }


def expert(config: PushTConfig) -> Callable[[int], pusht.Controller]:
    """The pusher, anew for each seed."""
    simulator = pusht.make_pusht()

    def make(seed: int) -> pusht.Controller:
        generator = np.random.default_rng(seed)
        return pusht.scripted_pusher(config.pusher, generator, simulator)

    return make


def recorded(config: PushTConfig) -> Dataset:
    """The recordings, made where they are not there."""
    if not pathlib.Path(config.data).exists():
        seeds = range(config.seed - config.demonstrations, config.seed)
        episodes = play(expert(config), seeds, "record")
        kept = [episode for episode in episodes if episode.succeeded]
        write_d4rl(config.data, pusht.d4rl_arrays(kept))
    return read_d4rl(config.data)


def clone(config: PushTConfig, data: Dataset) -> Callable[[int], pusht.Controller]:
    """A diffusion policy trained on the recordings, with fresh frames for each seed."""
    spec = chunk_spec(config.chunks, pusht.SPEC)
    network = transformer_denoiser(
        spec.action_size,
        num_frames=config.chunks.num_frames,
        horizon=config.chunks.horizon,
        config=config.network,
    )
    policy = diffusion(DiffusionConfig(learning_rate=2e-3), spec, network=network)
    frames = np.tile(np.asarray(data.observation), (1, config.chunks.num_frames))
    state = policy.init(jax.random.key(0), normalizer=fit_normalizer(frames))

    def sample(key: jax.Array, arrays: Dataset) -> Any:
        index = jax.random.randint(key, (config.batch_size,), 0, len(arrays.age))
        return gather_chunks(arrays, index, config.chunks)

    arrays = jax.tree.map(jnp.asarray, data)
    with Progress(config.num_steps, description="clone") as bar:
        state, _ = loops.fit(
            jax.random.key(1),
            policy,
            state,
            sample,
            config.num_steps,
            data=arrays,
            chunk=max(config.num_steps // 10, 1),
            on_chunk=lambda step, _, metrics: bar.update(step, metrics),
        )
    horizon = receding_horizon(policy.act, config.chunks, pusht.SPEC)
    act = jax.jit(horizon.act)

    def make(seed: int) -> pusht.Controller:
        memory, key, step = horizon.init(), jax.random.key(seed), 0

        def controller(observation: np.ndarray) -> np.ndarray:
            nonlocal memory, step
            seen = jnp.asarray(observation, jnp.float32)
            step_key = jax.random.fold_in(key, np.uint32(step))
            memory, action = act(state.params, step_key, memory, seen)
            step += 1
            return np.asarray(action)

        return controller

    return make


def main(config: PushTConfig) -> dict[str, Any]:
    """Everything, and the JSON."""
    if min(config.demonstrations, config.episodes) < 1:
        raise ValueError(
            f"demonstrations={config.demonstrations} and episodes={config.episodes} must "
            "be at least 1"
        )
    seeds = range(config.seed, config.seed + config.episodes)
    results = {"expert": scores(play(expert(config), seeds, "expert"))}
    data = recorded(config)
    results["rows"] = len(data.age)
    if config.num_steps:
        results["diffusion"] = scores(play(clone(config, data), seeds, "clone"))
    return timing.write(config.output, QUESTION, config, {}, results)


if __name__ == "__main__":
    sys.exit(run_main(main, PushTConfig))
