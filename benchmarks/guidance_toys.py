r"""Is energy guidance exact where the answer is known, and where does it break?

    python -m benchmarks.guidance_toys --output=runs/bench/guidance_toys.json \
        --figure=runs/bench/guidance_toys.png

Closed forms first, with exact noise and energies: a linear and a quadratic value over
Gaussian actions (the latter is where the published first-order form changes its sign), and
eight modes with a reward each. Then the same with trained networks: `aepo` on the first two,
`qgpo` on the third, with its published loss, ours, and the biased regression. The value is
given throughout: what is tested is the guidance.
"""

import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _guidance as toys
from benchmarks import _timing as timing
from emfuse_jax import artifacts, loops, tree
from emfuse_jax.base import SpaceSpec
from emfuse_jax.nets.denoiser import DenoiserConfig
from emfuse_jax.policies import _analytic, _vp
from emfuse_jax.policies._guidance import GuidanceConfig
from emfuse_jax.policies.aepo import AepoConfig, aepo, aepo_model
from emfuse_jax.policies.diffusion import DiffusionConfig, guided_act
from emfuse_jax.policies.qgpo import QgpoConfig, qgpo, qgpo_model
from experiments._run import run_main

UNIT = 3.5
"""The eight modes are divided by it for training, so that actions lie in about [-1, 1]."""
FIELD_TIME = 0.2
STRENGTHS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""``β h s²`` of the quadratic problem."""

PARTS = (
    "exact_linear",
    "exact_quadratic",
    "exact_eight",
    "trained_linear",
    "trained_quadratic",
    "trained_eight",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceToysConfig:
    """Settings of the benchmark.

    Attributes:
        seeds: trained together.
        linear_steps: updates on the linear problem.
        quadratic_steps: updates on the quadratic problem.
        eight_steps: updates on the eight modes.
        hidden: widths of all networks.
        batch_size: actions per update.
        support: numbers of support actions per state to try.
        draws: of a posterior, for log-mean-exp.
        samples: actions per law.
        exact_steps: solver steps with closed forms.
        parts: what to measure; what else the output holds already is kept.
        output: the JSON file to write.
        figure: the PNG of guidance fields; empty: none.
        smoke: tiny sizes, to see that everything runs.
    """

    seeds: int = 3
    linear_steps: int = 6000
    quadratic_steps: int = 2500
    eight_steps: int = 6000
    hidden: tuple[int, ...] = (128, 128, 128)
    batch_size: int = 256
    support: tuple[int, ...] = (16, 64)
    draws: int = 2_000_000
    samples: int = 20_000
    exact_steps: int = 500
    parts: tuple[str, ...] = PARTS
    output: str = "benchmarks/results/guidance_toys.json"
    figure: str = ""
    smoke: bool = False

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts={self.parts}; expected some of {', '.join(PARTS)}")


SMOKE = {
    "seeds": 2,
    "linear_steps": 4,
    "quadratic_steps": 4,
    "eight_steps": 4,
    "hidden": (8,),
    "batch_size": 16,
    "support": (4,),
    "draws": 1000,
    "samples": 200,
    "exact_steps": 8,
}


def sample(model: Any, params: Any, size: int, config: Any, **options: Any) -> Any:
    """Actions ``[row, act]`` of one blank observation."""
    act = jax.jit(guided_act(model, size, bound=None, **options))
    return act(params, jax.random.key(11), jnp.zeros((config.samples, 1)))


def moments(action: jax.Array) -> dict[str, Any]:
    """Mean and standard deviation of every dimension."""
    return {"mean": action.mean(0).tolist(), "std": action.std(0).tolist()}


def exact_linear(config: GuidanceToysConfig) -> dict[str, Any]:
    """(a): the energy against log-mean-exp, the guided law against its target."""
    model, errors = toys.linear_model(), {}
    key = jax.random.key(0)
    for time_ in (0.05, 0.1, 0.3, 0.5, 0.9):
        times = jnp.full(1, time_)
        x = _vp.diffuse(toys.MEAN + 0.4, jnp.ones((1, 3)), times)
        noise = model.noise((), None, x, times)
        mean = _vp.predicted_action(x, noise, times)
        spread = jnp.sqrt(_analytic.linear_variance(time_, toys.STD**2))
        draws = mean + spread * jax.random.normal(key, (config.draws, 3))
        value = toys.BETA * toys.linear_value(draws)
        truth = jax.nn.logsumexp(value) - jnp.log(config.draws)
        energy = model.guidance((), None, x, times)[0]
        errors[str(time_)] = float(jnp.abs(-energy - truth))
    steps = config.exact_steps
    laws = {
        "target": {"mean": toys.LINEAR_TARGET[0].tolist(), "std": [toys.STD] * 3},
        "guided": moments(sample(model, (), 3, config, num_steps=steps)),
        "guided, 15 steps": moments(sample(model, (), 3, config, num_steps=15)),
        "scale 2 (target: mean + 2βs²c)": moments(
            sample(model, (), 3, config, num_steps=steps, scale=2.0)
        ),
        "rescaled": moments(
            sample(model, (), 3, config, num_steps=steps, rescale=True)
        ),
    }
    return {"energy_error": errors, "laws": laws}


def exact_quadratic(config: GuidanceToysConfig) -> list[dict[str, Any]]:
    """(b): both forms by the strength ``β h s²``; the goal is at 0.8, the data at 0."""
    rows, goal = [], 0.8
    for strength in STRENGTHS:
        curvature = strength / (toys.BETA * toys.STD**2)
        target = {
            "mean": goal * strength / (1 + strength),
            "std": toys.STD / np.sqrt(1 + strength),
        }
        row: dict[str, Any] = {"strength": strength, "target": target}
        for name, exact in (("first_order", False), ("second_order", True)):
            model = toys.quadratic_model(curvature, goal, exact=exact)
            action = sample(model, (), 1, config, num_steps=config.exact_steps)
            row[name] = {"mean": float(action.mean()), "std": float(action.std())}
        rows.append(row)
    return rows


def exact_eight(config: GuidanceToysConfig) -> dict[str, Any]:
    """The eight modes with closed-form guidance, exact and of the mean reward."""
    result: dict[str, Any] = {"target": toys.EIGHT_TARGET.tolist()}
    for name, exact, scale in (
        ("exact", True, 1.0),
        ("mean reward", False, 1.0),
        ("exact, scale 3", True, 3.0),
    ):
        action = sample(
            toys.eight_model(exact=exact),
            (),
            2,
            config,
            num_steps=min(config.exact_steps, 100),
            scale=scale,
        )
        goal = jax.nn.softmax(scale * toys.EIGHT_BETA * toys.REWARD)
        result[name] = shares(action, goal)
    return result


def shares(action: jax.Array, goal: jax.Array) -> dict[str, Any]:
    """Mode weights, their total variation from the goal, and the spread within modes."""
    weights = toys.mode_weights(action)
    centers = toys.CENTERS[toys.nearest_mode(action)]
    spread = jnp.sqrt(jnp.mean((action - centers) ** 2))
    return {
        "weights": weights.tolist(),
        "total_variation": float(0.5 * np.abs(weights - np.asarray(goal)).sum()),
        "spread": float(spread),
        "spread_target": float(toys.SPREAD),
    }


def train(policy: Any, batch_fn: Any, config: Any, steps: int) -> tuple[list, float]:
    """States of the seeds, trained as one program, and CPU seconds."""
    start = time.process_time()

    @jax.jit
    @jax.vmap
    def run(key: jax.Array) -> Any:
        def batch(key: jax.Array, _: Any) -> Any:
            return batch_fn(key, config.batch_size)

        return loops.fit(key, policy, policy.init(key), batch, steps, chunk=steps)[0]

    states = run(jax.random.split(jax.random.key(0), config.seeds))
    jax.block_until_ready(states)
    return tree.unstack(states), time.process_time() - start


def behaviour(config: GuidanceToysConfig, steps: int) -> DiffusionConfig:
    """The denoiser of every trained toy."""
    return DiffusionConfig(
        network=DenoiserConfig(hidden_sizes=config.hidden),
        learning_rate=3e-3,
        decay_steps=steps,
        bound=None,
    )


def guidance(config: GuidanceToysConfig, steps: int) -> GuidanceConfig:
    """The energy network of every trained toy."""
    return GuidanceConfig(
        hidden_sizes=config.hidden, learning_rate=3e-3, decay_steps=steps
    )


def trained_linear(config: GuidanceToysConfig) -> dict[str, Any]:
    """(c): direction and size of the trained guidance, and where actions go."""
    settings = AepoConfig(
        behaviour=behaviour(config, config.linear_steps),
        guidance=guidance(config, config.linear_steps),
        inverse_temperature=toys.BETA,
        normalize_values=False,
    )
    spec = SpaceSpec(1, 3)
    critics = toys.known_critics(toys.linear_value)
    policy = aepo(settings, spec, critics=critics)
    states, seconds = train(policy, toys.linear_batch, config, config.linear_steps)
    model = aepo_model(settings, spec)
    return {
        "cpu_seconds": seconds,
        "target": toys.LINEAR_TARGET[0].tolist(),
        "field": [guidance_error(model, state.params) for state in states],
        "laws": [
            moments(sample(model, state.params, 3, config, num_steps=60))
            for state in states
        ],
    }


def guidance_error(model: Any, params: Any) -> dict[str, Any]:
    """Cosine with the slope, and size over the exact one, at three times."""
    result = {}
    for time_ in (0.1, 0.3, 0.5):
        times, blank = jnp.full(2000, time_), jnp.zeros((2000, 1))
        action = toys.linear_batch(jax.random.key(1), 2000).action
        x = _vp.diffuse(action, jax.random.normal(jax.random.key(2), (2000, 3)), times)
        slope = -jax.grad(
            lambda y, t=times, b=blank: jnp.sum(model.guidance(params, b, y, t))
        )(x)
        alpha, sigma = (float(value) for value in _vp.alpha_sigma(time_))
        gain = toys.BETA * alpha * toys.STD**2 / ((alpha * toys.STD) ** 2 + sigma**2)
        along = jnp.sum(slope * toys.SLOPE, axis=-1)
        norm = jnp.linalg.norm(toys.SLOPE)
        cosine = along / (jnp.linalg.norm(slope, axis=-1) * norm)
        result[str(time_)] = {
            "cosine": float(cosine.mean()),
            "size": float(along.mean() / (gain * norm**2)),
        }
    return result


def trained_quadratic(config: GuidanceToysConfig) -> dict[str, Any]:
    """The same networks on a sharp value, ``β h s² = 2``, by both forms of the target."""
    strength, goal = 2.0, 0.8
    curvature = strength / (toys.BETA * toys.STD**2)
    critics = toys.known_critics(
        lambda action: -0.5 * curvature * jnp.sum((action - goal) ** 2, axis=-1)
    )

    def batch(key: jax.Array, rows: int) -> Any:
        return toys.rows_of(toys.STD * jax.random.normal(key, (rows, 1)))

    result: dict[str, Any] = {
        "target": {
            "mean": goal * strength / (1 + strength),
            "std": toys.STD / np.sqrt(1 + strength),
        }
    }
    for expansion in ("gradient", "curvature"):
        settings = AepoConfig(
            behaviour=behaviour(config, config.quadratic_steps),
            guidance=guidance(config, config.quadratic_steps),
            inverse_temperature=toys.BETA,
            normalize_values=False,
            expansion=expansion,
        )
        spec = SpaceSpec(1, 1)
        policy = aepo(settings, spec, critics=critics)
        states, _ = train(policy, batch, config, config.quadratic_steps)
        model = aepo_model(settings, spec)
        result[expansion] = [
            moments(sample(model, state.params, 1, config, num_steps=60))
            for state in states
        ]
    return result


def trained_eight(config: GuidanceToysConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contrastive prediction by loss and number of support actions, and its fields."""
    result: dict[str, Any] = {}
    fields = {
        "exact": field(toys.eight_model(exact=True, unit=UNIT), (), "exact", config)
    }
    jobs = [("split", config.support[0]), ("regression", config.support[0])]
    jobs += [("contrastive", number) for number in config.support]
    for loss, number in jobs:
        settings = QgpoConfig(
            behaviour=behaviour(config, config.eight_steps),
            guidance=guidance(config, config.eight_steps),
            loss=loss,
            inverse_temperature=toys.EIGHT_BETA,
            normalize_values=False,
            num_support=number,
            support_rows=max(32 // number, 1),
            support_steps=8,
            batch_size=max(config.batch_size // number, 1),
            capacity=1024,
        )
        spec = SpaceSpec(1, 2)
        policy = qgpo(settings, spec, value_fn=_reward)
        states, seconds = train(policy, _eight_batch, config, config.eight_steps)
        model = qgpo_model(settings, spec)
        name = f"{loss}, {number} actions"
        result[name] = {"cpu_seconds": seconds, "guided": [], "behaviour": []}
        for state in states:
            for scale, kind, goal in (
                (1.0, "guided", toys.EIGHT_TARGET),
                (0.0, "behaviour", jnp.full(8, 0.125)),
            ):
                action = UNIT * sample(
                    model, state.params, 2, config, num_steps=30, scale=scale
                )
                result[name][kind].append(shares(action, goal))
        fields[name] = field(model, states[0].params, name, config)
    return result, fields


def _reward(observation: jax.Array, action: jax.Array) -> jax.Array:
    return toys.REWARD[toys.nearest_mode(UNIT * action)]


def _eight_batch(key: jax.Array, rows: int) -> Any:
    return toys.eight_batch(key, rows, unit=UNIT)


def field(model: Any, params: Any, title: str, config: Any) -> dict[str, Any]:
    """What `_guidance.draw_fields` draws of one model."""
    ticks = np.linspace(-4.0, 4.0, 17)
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    points = jnp.stack([x.ravel(), y.ravel()], axis=-1) / UNIT
    times, blank = jnp.full(len(points), FIELD_TIME), jnp.zeros((len(points), 1))
    slope = -jax.grad(lambda p: jnp.sum(model.guidance(params, blank, p, times)))(
        points
    )
    u, v = np.asarray(slope).T.reshape(2, *x.shape)
    action = UNIT * sample(model, params, 2, config, num_steps=30)
    return {
        "x": ticks,
        "y": ticks,
        "u": u,
        "v": v,
        "actions": np.asarray(action[:2000]),
        "title": title,
    }


def _kept(config: GuidanceToysConfig) -> dict[str, Any]:
    """Results of other parts in the output, in the order of `PARTS`."""
    path = pathlib.Path(config.output)
    if not config.output or not path.exists():
        return {}
    found = artifacts.read_json(path)["results"]
    return {part: found[part] for part in PARTS if part in found}


def main(config: GuidanceToysConfig) -> dict[str, Any]:
    """Measures, draws and writes."""
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    results = _kept(config)
    for part in config.parts:
        start = time.process_time()
        found = globals()[part](config)
        if part == "trained_eight":
            found, fields = found
            if config.figure:
                toys.draw_fields(fields, config.figure)
        spent = time.process_time() - start
        commit = artifacts.provenance()["commit"]
        results[part] = {"result": found, "cpu_seconds": spent, "commit": commit}
        print(f"{part}: {spent:.0f} CPU seconds", file=sys.stderr)
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(config.output, question, config, {}, results)
    rows = results.get("trained_eight", {"result": {}})["result"]
    for name, row in rows.items():
        distances = [round(law["total_variation"], 4) for law in row["guided"]]
        print(f"{name}: total variation from the exact weights, per seed: {distances}")
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, GuidanceToysConfig))
