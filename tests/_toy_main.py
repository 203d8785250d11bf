"""Fits a line to noisy data: the smallest command line there can be."""

import dataclasses
import os
import signal
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from emfuse_jax.base import Learner
from experiments import _run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Settings.

    Attributes:
        run_dir: where the run is kept.
        kill_at: kill -9 after saving this step.
        fail: raise this instead of running.
    """

    run_dir: str
    num_steps: int = 40
    learning_rate: float = 0.05
    seed: int = 0
    kill_at: int = 0
    fail: str = ""


class ToyState(NamedTuple):
    """Line and optimiser."""

    params: jax.Array
    optimizer: optax.OptState


def toy_learner(config):
    """A `Learner` whose update draws noise, so that a wrong key would show."""
    tx = optax.adam(config.learning_rate)

    def init(key):
        params = jax.random.normal(key, (3,))
        return ToyState(params, tx.init(params))

    def update(key, state, batch):
        x, y = batch

        def loss_fn(w):
            noise = 0.1 * jax.random.normal(key, y.shape)
            return jnp.mean(jnp.square(x @ w + noise - y))

        loss, grad = jax.value_and_grad(loss_fn)(state.params)
        updates, optimizer = tx.update(grad, state.optimizer)
        params = optax.apply_updates(state.params, updates)
        return ToyState(params, optimizer), {"loss": loss}

    return Learner(init, update)


def train(config):
    """Parse → build → fit → write."""
    if config.fail:
        raise getattr(__import__("builtins"), config.fail)(f"{config.fail} on purpose")
    with _run.open_run(
        config.run_dir,
        config,
        kind="toy",
        seed=config.seed,
        ignore=("run_dir", "kill_at"),
    ) as run:
        key = jax.random.key(config.seed)
        key_data, key_init, key_fit = jax.random.split(key, 3)
        x = jax.random.normal(key_data, (64, 3))
        learner = toy_learner(config)

        def sample_batch(key, data):
            rows = jax.random.randint(key, (8,), 0, 64)
            return tuple(array[rows] for array in data)

        def evaluate(step, state):
            return {"score": -jnp.sum(jnp.square(state.params - 1))}

        original_save = run.save

        def save(step, *args, **kwargs):
            original_save(step, *args, **kwargs)
            if step == config.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        run.save = save
        with run.stage("fit"):
            state = run.fit(
                key_fit,
                learner,
                learner.init(key_init),
                sample_batch,
                config.num_steps,
                data=(x, x @ jnp.ones(3)),
                chunk=5,
                save_every=2,
                evaluate=evaluate,
                description="toy",
            )
        run.write_json("result.json", {"params": state.params.tolist()})


def main(argv=None):
    """The command line."""
    return _run.run_main(train, ToyConfig, argv, trains=True, shares=True)


if __name__ == "__main__":
    sys.exit(main())
