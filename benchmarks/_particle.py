"""The methods of the Particle study: how each is trained, and the ways in which it acts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from emfuse_jax import loops
from emfuse_jax.base import Metrics, Params, Policy, SpaceSpec, Transition
from emfuse_jax.data import normalizer as normalization
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.nets.energy import conditional_energy
from emfuse_jax.nets.mlp import mlp
from emfuse_jax.nets.transformer import TransformerConfig, transformer_denoiser
from emfuse_jax.policies.chunks import ChunkConfig, chunk_spec
from emfuse_jax.policies.diffusion import DiffusionConfig, diffusion
from emfuse_jax.policies.ebt import EbtConfig, ebt_policy
from emfuse_jax.policies.ibc import (
    IbcConfig,
    action_box,
    evaluations_per_action,
    ibc,
)

SINGLE = ChunkConfig(num_frames=1, horizon=1, execute=1)
CHUNKS = ChunkConfig(num_frames=2, horizon=8, execute=5)
TRANSFORMER = TransformerConfig(num_layers=1, features=48, num_heads=4, mlp_ratio=2)
HIDDEN = (128, 128)


class Cost(NamedTuple):
    """Of one call of a policy's ``act``, which plans for ``executed`` steps.

    ``sequential`` evaluations of the network follow one another, each of ``rows`` rows;
    ``gradients`` says whether they are of an energy's gradient (forward and backward).
    """

    sequential: int
    rows: int
    gradients: bool
    executed: int


class Method(NamedTuple):
    """How to train a policy, and the ways in which it acts.

    ``policy(spec, num_steps) -> Policy`` of the chunks' spec, given the environment's;
    ``init(policy, key, normalizer, actions) -> state``; ``variants(policy, dims) ->
    {name: (act, cost)}``, all on the parameters that ``policy`` trained.
    """

    chunks: ChunkConfig
    batch_size: int
    num_steps: int
    deterministic: bool
    policy: Callable[[SpaceSpec, int], Policy]
    init: Callable[..., Any]
    variants: Callable[[Policy, int], dict[str, tuple[Callable[..., jax.Array], dict]]]


class RegressionParams(NamedTuple):
    network: Params
    normalizer: Normalizer


class RegressionState(NamedTuple):
    params: RegressionParams
    optimizer: optax.OptState


def regression(
    spec: SpaceSpec,
    num_steps: int,
    *,
    hidden_sizes: tuple[int, ...] = HIDDEN,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> Policy:
    """The explicit policy: least squares of the recorded actions."""
    network = mlp(spec.action_size, hidden_sizes, activation=activation)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

    def predict(
        params: RegressionParams, weights: Params, observation: jax.Array
    ) -> jax.Array:
        normal = normalization.apply(params.normalizer, observation)
        return network.apply(weights, normal)

    def init(key: jax.Array, *, normalizer: Normalizer) -> RegressionState:
        weights = network.init(key, jnp.zeros(spec.observation_size))
        params = RegressionParams(weights, normalizer)
        return RegressionState(params, optimizer.init(weights))

    def update(
        key: jax.Array, state: RegressionState, batch: Transition
    ) -> tuple[RegressionState, Metrics]:
        del key

        def objective(weights: Params) -> jax.Array:
            error = predict(state.params, weights, batch.observation) - batch.action
            return jnp.mean(jnp.square(error))

        loss, gradient = jax.value_and_grad(objective)(state.params.network)
        updates, new = optimizer.update(gradient, state.optimizer)
        weights = optax.apply_updates(state.params.network, updates)
        params = state.params._replace(network=weights)
        return RegressionState(params, new), {"loss": loss}

    def act(
        params: RegressionParams,
        key: jax.Array,
        observation: jax.Array,
        /,
        *,
        deterministic: bool = False,
    ) -> jax.Array:
        del key, deterministic
        return jnp.clip(predict(params, params.network, observation), -1.0, 1.0)

    return Policy(init, update, act, None)


def _init_normalized(policy: Policy, key: jax.Array, normalizer: Any, _: Any) -> Any:
    return policy.init(key, normalizer=normalizer)


def _regression(chunks: ChunkConfig, num_steps: int) -> Method:
    return Method(
        chunks=chunks,
        batch_size=256,
        num_steps=num_steps,
        deterministic=True,
        policy=lambda spec, steps: regression(chunk_spec(chunks, spec), steps),
        init=_init_normalized,
        variants=lambda policy, dims: {
            "forward": (policy.act, Cost(1, 1, False, chunks.execute)._asdict())
        },
    )


IBC = IbcConfig(
    hidden_sizes=HIDDEN,
    negatives="langevin",
    num_negatives=8,
    chain_steps=25,
    num_samples=32,
    penalty=0.0,
)
SEARCH = dataclasses.replace(IBC, inference="derivative_free", num_samples=256)


def _ibc(num_steps: int) -> Method:
    def init(policy: Policy, key: jax.Array, normalizer: Any, actions: Any) -> Any:
        box = None if actions is None else action_box(actions)
        return policy.init(key, normalizer=normalizer, box=box)

    def variants(policy: Policy, dims: int) -> dict[str, tuple[Any, dict]]:
        search = ibc(SEARCH, SpaceSpec(6 * dims, dims))
        _, gradients = evaluations_per_action(IBC)
        energies, _ = evaluations_per_action(SEARCH)
        chain, candidates = IBC.num_samples, SEARCH.num_samples
        return {
            "langevin": (
                policy.act,
                Cost(gradients // chain, chain, True, 1)._asdict(),
            ),
            "derivative_free": (
                search.act,
                Cost(energies // candidates, candidates, False, 1)._asdict(),
            ),
        }

    return Method(
        chunks=SINGLE,
        batch_size=128,
        num_steps=num_steps,
        deterministic=True,
        policy=lambda spec, steps: ibc(IBC, chunk_spec(SINGLE, spec)),
        init=init,
        variants=variants,
    )


def _ebt(num_steps: int) -> Method:
    def config(steps: int, act_steps: int = 2) -> EbtConfig:
        return EbtConfig(
            network=TRANSFORMER,
            num_frames=CHUNKS.num_frames,
            horizon=CHUNKS.horizon,
            train_steps=2,
            act_steps=act_steps,
            learning_rate=2e-3,
            warmup_steps=min(100, steps // 10),
            decay_steps=max(steps, 2),
        )

    def variants(policy: Policy, dims: int) -> dict[str, tuple[Any, dict]]:
        spec = chunk_spec(CHUNKS, SpaceSpec(6 * dims, dims))
        return {
            f"{count} steps": (
                ebt_policy(config(10, count), spec).act,
                Cost(count, 1, True, CHUNKS.execute)._asdict(),
            )
            for count in (2, 10)
        }

    return Method(
        chunks=CHUNKS,
        batch_size=64,
        num_steps=num_steps,
        deterministic=False,
        policy=lambda spec, steps: ebt_policy(config(steps), chunk_spec(CHUNKS, spec)),
        init=_init_normalized,
        variants=variants,
    )


def _diffusion(num_steps: int) -> Method:
    def policy(spec: SpaceSpec, count: int = 15, updates: int | None = None) -> Policy:
        network = transformer_denoiser(
            spec.action_size,
            num_frames=CHUNKS.num_frames,
            horizon=CHUNKS.horizon,
            config=TRANSFORMER,
        )
        config = DiffusionConfig(
            num_steps=count, learning_rate=2e-3, decay_steps=updates
        )
        return diffusion(config, spec, network=network)

    def variants(_: Policy, dims: int) -> dict[str, tuple[Any, dict]]:
        spec = chunk_spec(CHUNKS, SpaceSpec(6 * dims, dims))
        return {
            f"{count} steps": (
                policy(spec, count).act,
                Cost(count, 1, False, CHUNKS.execute)._asdict(),
            )
            for count in (2, 15, 100)
        }

    return Method(
        chunks=CHUNKS,
        batch_size=64,
        num_steps=num_steps,
        deterministic=False,
        policy=lambda spec, steps: policy(chunk_spec(CHUNKS, spec), updates=steps),
        init=_init_normalized,
        variants=variants,
    )


# Updates that take about as long, two to three minutes of one core; the regressions less.
METHODS: dict[str, Method] = {
    "mse": _regression(SINGLE, 20_000),
    "mse_chunks": _regression(CHUNKS, 20_000),
    "ibc": _ibc(12_000),
    "ebt": _ebt(8_000),
    "diffusion": _diffusion(40_000),
}


def step_function(*, num_steps: int = 1500, seed: int = 0) -> dict[str, Any]:
    """An expert that jumps: -0.6 left of 0.5, else 0.6, at 500 points.

    Where the energy's argmin and the regression answer in between, and where they jump, on
    401 inputs. The points leave a gap at the jump, in which it may lie anywhere.
    """
    spec = SpaceSpec(1, 1)
    key_data, key_init, key_fit = jax.random.split(jax.random.key(seed), 3)
    inputs = jax.random.uniform(key_data, (500, 1))
    targets = jnp.where(inputs < 0.5, -0.6, 0.6)
    sizes = (64, 64, 64)
    config = IbcConfig(
        negatives="uniform", num_negatives=32, penalty=0.0, decay=1.0, num_samples=1
    )
    network = conditional_energy(sizes, activation=jax.nn.relu)
    policies = {
        "energy": ibc(config, spec, network=network),
        "regression": regression(
            spec, num_steps, hidden_sizes=sizes, activation=jax.nn.relu
        ),
    }

    def sample(key: jax.Array, data: Any) -> Transition:
        x, y = (leaf[jax.random.randint(key, (128,), 0, 500)] for leaf in data)
        false = jnp.zeros(128, bool)
        return Transition(x, y, x[:, 0], x, false, false)

    grid = jnp.linspace(0.0, 1.0, 401)[:, None]
    actions = jnp.linspace(-1.0, 1.0, 1001)
    points = jnp.sort(inputs[:, 0])
    left = float(points[points < 0.5].max())
    right = float(points[points >= 0.5].min())
    results: dict[str, Any] = {"gap_in_the_data": [left, right]}
    for name, policy in policies.items():
        normalizer = normalization.fit_normalizer(inputs)
        state = policy.init(key_init, normalizer=normalizer)
        fit = functools.partial(
            loops.fit, key_fit, policy, sample_batch=sample, num_steps=num_steps
        )
        state, _ = jax.jit(lambda s, d, fit=fit: fit(s, data=d, chunk=num_steps))(
            state, (inputs, targets)
        )
        if policy.energy is None:
            answer = policy.act(state.params, key_fit, grid)[:, 0]
        else:
            rows = jnp.broadcast_to(grid[:, None], (401, 1001, 1))
            energy = policy.energy(
                state.params,
                rows.reshape(-1, 1),
                jnp.tile(actions, 401)[:, None],
            )
            answer = actions[jnp.argmin(energy.reshape(401, 1001), axis=1)]
        jumps = jnp.flatnonzero(jnp.diff(jnp.sign(answer)) != 0)
        results[name] = {
            "intermediate_share": float(jnp.mean(jnp.abs(answer) < 0.5)),
            "jumps_at": [float(grid[i, 0]) for i in jumps],
        }
    return results
