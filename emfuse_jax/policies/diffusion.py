"""Diffusion policies: behaviour cloning by denoising, and guidance by an energy.

A behaviour model learns the noise in ``a_t = α_t a_0 + σ_t ε`` from recorded actions alone.
An energy ``E_t(a_t|s)`` (low is good) tilts what it samples: the policy
``π(a|s) ∝ μ(a|s) exp(-w E_0(a|s))`` has the noise ``ε_μ + w σ_t ∇E_t`` at every time, where

    ``exp(-E_t(a_t|s)) = mean of exp(-E_0(a_0|s)) over μ(a_0|a_t, s)``.

A model is a `GuidedDiffusion`; `guided_act` samples it. Models of one behaviour add up
their guidance: energies pool as everywhere.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020.
    https://arxiv.org/abs/2006.11239
    Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR
    2022, section 4 (predicting the velocity). https://arxiv.org/abs/2202.00512
    Lu et al., "Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling in
    Offline Reinforcement Learning", ICML 2023, theorem 3.1 (the intermediate energy).
    https://arxiv.org/abs/2304.12824
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from emfuse_jax._settings import (
    at_least,
    decays,
    positive,
    rates,
)
from emfuse_jax.base import (
    Metrics,
    Network,
    Params,
    Policy,
    SpaceSpec,
    Transition,
)
from emfuse_jax.data import normalizer as normalization
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.nets.denoiser import DenoiserConfig, denoiser
from emfuse_jax.policies import _vp
from emfuse_jax.policies._guided_sampling import (
    GuidedDiffusion,
    check_scale,
    guided_act,
    guided_noise,
)
from emfuse_jax.policies._learning import (
    decayed_adam,
    gradient_step,
    moving_average,
)

__all__ = [
    "DiffusionConfig",
    "DiffusionParams",
    "DiffusionState",
    "GuidedDiffusion",
    "check_scale",
    "denoising_loss",
    "diffusion",
    "diffusion_model",
    "draw_times",
    "guided_act",
    "guided_noise",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Settings of `diffusion`.

    Attributes:
        network: of the denoiser, unless one is passed.
        prediction: what the network predicts. noise: ``ε``. velocity: ``α ε - σ a``, from
            which the noise is ``σ a_t + α v``: exact in the limit of all noise, where an
            error of the noise is an error of the action ``σ/α`` times as large.
        learning_rate: Adam.
        decay_steps: anneal the rate to 0 along a cosine over this many updates; none keeps
            it constant.
        average_rate: of the moving average of the weights, with which it acts.
        min_time: times are drawn from ``U(min_time, 1)``.
        num_steps: evaluations of the denoiser per action.
        bound: predicted actions are clipped to ``[-bound, bound]`` while sampling; none:
            never.
    """

    network: DenoiserConfig = DenoiserConfig()  # noqa: RUF009
    prediction: Literal["velocity", "noise"] = "velocity"
    learning_rate: float = 1e-3
    decay_steps: int | None = None
    average_rate: float = 0.005
    min_time: float = 1e-3
    num_steps: int = 15
    bound: float | None = 1.0

    def __post_init__(self) -> None:
        if self.prediction not in ("velocity", "noise"):
            raise ValueError(
                f"prediction={self.prediction!r}; expected 'velocity' or 'noise'"
            )
        at_least(self, 1, "num_steps")
        positive(self, "learning_rate", "bound")
        decays(self, "decay_steps")
        rates(self, "average_rate")
        if not 0.0 < self.min_time < 1.0:
            raise ValueError(
                f"min_time={self.min_time}; expected a time in (0, 1), such as 1e-3"
            )


class DiffusionParams(NamedTuple):
    """``denoiser`` is the average of the weights; ``normalizer`` is of observations."""

    denoiser: Params
    normalizer: Normalizer


class DiffusionState(NamedTuple):
    """``denoiser`` holds the trained weights, ``params`` their average."""

    params: DiffusionParams
    denoiser: Params
    optimizer: optax.OptState
    step: jax.Array


def draw_times(
    key: jax.Array, shape: tuple[int, ...], min_time: float
) -> Float[Array, "*batch"]:
    """Times ``U(min_time, 1)``, one per stratum of the first axis: less noise in a loss.

    Rows must be exchangeable, as those of a shuffled batch are.

    Example:
        >>> times = draw_times(jax.random.key(0), (4,), 0.0)
        >>> (times * 4).astype(int).tolist()  # one in each quarter
        [0, 1, 2, 3]
    """
    rows = shape[0] if shape else 1
    stratum = jnp.arange(rows).reshape((rows,) + (1,) * (len(shape) - 1))
    uniform = (jax.random.uniform(key, shape or (1,)) + stratum) / rows
    return (min_time + (1.0 - min_time) * uniform).reshape(shape)


def denoising_loss(
    output: Float[Array, "*batch act"],
    action: Float[Array, "*batch act"],
    noise: Float[Array, "*batch act"],
    time: Float[Array, "*batch"],
    *,
    prediction: str,
) -> Float[Array, "*batch"]:
    """Squared error of the predicted noise or velocity, summed over dimensions.

    Example:
        >>> rows = jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones(1)
        >>> denoising_loss(*rows, prediction="noise").tolist()
        [2.0]
    """
    target = noise
    if prediction == "velocity":
        alpha, sigma = _vp.alpha_sigma(time)
        target = alpha[..., None] * noise - sigma[..., None] * action
    return jnp.sum(jnp.square(output - target), axis=-1)


def diffusion_model(
    config: DiffusionConfig, spec: SpaceSpec, *, network: Network | None = None
) -> GuidedDiffusion:
    """The behaviour of `diffusion`'s parameters, with an energy of 0 everywhere.

    Example:
        >>> model = diffusion_model(DiffusionConfig(), SpaceSpec(observation_size=5, action_size=3))
        >>> no_energy = model.guidance(None, None, jnp.zeros((2, 3)), jnp.zeros(2))
        >>> no_energy.tolist()
        [0.0, 0.0]
    """
    network = denoiser(spec.action_size, config.network) if network is None else network

    def noise(
        params: DiffusionParams,
        observation: jax.Array,
        noisy_action: jax.Array,
        time: jax.Array,
    ) -> jax.Array:
        normal = normalization.apply(params.normalizer, observation)
        output = network.apply(params.denoiser, noisy_action, time, normal)
        if config.prediction == "noise":
            return output
        alpha, sigma = _vp.alpha_sigma(time)
        return sigma[..., None] * noisy_action + alpha[..., None] * output

    def guidance(params, observation, noisy_action, time) -> jax.Array:
        del params, observation, time
        return jnp.zeros(noisy_action.shape[:-1])

    return GuidedDiffusion(noise, guidance)


def diffusion(
    config: DiffusionConfig, spec: SpaceSpec, *, network: Network | None = None
) -> Policy:
    """Behaviour cloning with a diffusion model.

    ``init(key, *, normalizer=None) -> DiffusionState``, the normaliser being one of
    observations (`data.normalizer.fit_normalizer`; None leaves them as they are);
    ``update(key, state, batch: Transition)`` reads observations and actions only; ``act``
    as for `guided_act`. There is no ``energy``: the density is not available.

    Args:
        config: see `DiffusionConfig`.
        spec: sizes of the spaces; actions live in [-1, 1] where ``config.bound`` is 1.
        network: ``apply(params, noisy_action, time, observation)`` and ``init`` with those
            inputs; None is `nets.denoiser.denoiser`. What its output means is
            ``config.prediction``.

    Returns:
        A `Policy` whose state is a `DiffusionState`.

    Example:
        >>> policy = diffusion(DiffusionConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
        >>> action = jax.eval_shape(policy.act, state.params, jax.random.key(0), jnp.zeros((7, 11)))
        >>> action.shape
        (7, 3)
    """
    network = denoiser(spec.action_size, config.network) if network is None else network
    optimizer = decayed_adam(config.learning_rate, config.decay_steps)

    def init(key: jax.Array, *, normalizer: Normalizer | None = None) -> DiffusionState:
        size = spec.observation_size
        if normalizer is None:
            normalizer = normalization.identity_normalizer(size)
        params = network.init(
            key, jnp.zeros(spec.action_size), jnp.zeros(()), jnp.zeros(size)
        )
        return DiffusionState(
            params=DiffusionParams(jax.tree.map(jnp.copy, params), normalizer),
            denoiser=params,
            optimizer=optimizer.init(params),
            step=jnp.zeros((), jnp.int32),
        )

    def update(
        key: jax.Array, state: DiffusionState, batch: Transition
    ) -> tuple[DiffusionState, Metrics]:
        key_time, key_noise = jax.random.split(key)
        action = batch.action
        time = draw_times(key_time, action.shape[:-1], config.min_time)
        noise = jax.random.normal(key_noise, action.shape)
        noisy_action = _vp.diffuse(action, noise, time)
        normal = normalization.apply(state.params.normalizer, batch.observation)

        def objective(params: Params) -> tuple[jax.Array, None]:
            output = network.apply(params, noisy_action, time, normal)
            loss = denoising_loss(
                output, action, noise, time, prediction=config.prediction
            )
            return jnp.mean(loss), None

        weights, new_optimizer, loss, _ = gradient_step(
            optimizer, objective, state.denoiser, state.optimizer
        )
        average = moving_average(
            weights, state.params.denoiser, state.step, config.average_rate
        )
        params = state.params._replace(denoiser=average)
        new_state = DiffusionState(params, weights, new_optimizer, state.step + 1)
        return new_state, {"loss": loss}

    model = diffusion_model(config, spec, network=network)
    act = guided_act(
        model,
        spec.action_size,
        num_steps=config.num_steps,
        scale=0.0,
        bound=config.bound,
    )
    return Policy(init, update, act, None)
