"""Energy-based dynamics over any slice encoder: the training that ETM and ADETM share.

Two recipes give the negatives:

``langevin`` (the papers'): InfoNCE against Langevin chains of the model itself, with a
gradient penalty. The energy lives in the box of the data.

``proposal`` (ours): ranking NCE against a known density, a scale mixture around a Gaussian
head that is trained first by β-NLL. No chains in training, and the energy is consistent for
``-log p(y | x)`` up to ``c(x)``. The energy is the head's own quadratic plus a learned tilt,
``E = -log N(y; μ, σ) + f(feature, asinh((y - μ) / σ))``: the tilt starts near 0, so that
the energy never has to relearn what the head knows, and ``asinh`` keeps far residuals in
range.

References:
    Chen et al., "Offline transition modeling via contrastive energy learning", ICML 2024
    (ETM: the loss, the schedule and the penalty).
    Seitzer et al., "On the pitfalls of heteroscedastic uncertainty estimation with
    probabilistic neural networks", ICLR 2022 (β-NLL).
    Ma and Collins, "Noise contrastive estimation and negative sampling for conditional
    models", EMNLP 2018 (ranking NCE).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from emfuse_jax.base import Dynamics, Metrics, Network, Params, SpaceSpec
from emfuse_jax.dynamics._energy_losses import (
    LossFn,
    beta_nll,
    langevin_loss,
    proposal_loss,
)
from emfuse_jax.dynamics._energy_model import (
    LOG_STD_BOUNDS,
    ContrastiveConfig,
    ContrastiveParams,
    EnergyParams,
    Rows,
    energy_expert,
)
from emfuse_jax.dynamics.base import (
    Anchor,
    Batch,
    Expert,
    Scales,
    make_slices,
    newest_lags,
    pack_target,
    pick_slice,
)
from emfuse_jax.dynamics.fused import transition_model

__all__ = [
    "LOG_STD_BOUNDS",
    "ContrastiveConfig",
    "ContrastiveParams",
    "ContrastiveState",
    "Rows",
    "beta_nll",
    "contrastive_dynamics",
    "energy_learner",
    "training_rows",
]


class ContrastiveState(NamedTuple):
    """What `contrastive_dynamics` trains; ``step`` counts the updates."""

    params: EnergyParams
    optimizer: optax.OptState
    step: jax.Array


def contrastive_dynamics(
    encoder: Network,
    config: ContrastiveConfig,
    spec: SpaceSpec,
    *,
    num_lags: int,
    anchor: Anchor,
    feature_size: int,
) -> Dynamics:
    """An energy-based dynamics model.

    Args:
        encoder: ``apply(params, anchor, action, lags) -> feature``, normalised inputs.
        config: the recipe.
        spec: sizes of the spaces.
        num_lags: slices of the history that the model reads.
        anchor: what a slice starts from.
        feature_size: width of the encoder's output.

    Returns:
        ``Dynamics``: ``init(key, scales) -> state``, ``update(key, state, Batch)``.

    Example:
        >>> from emfuse_jax.dynamics.etm import state_action_encoder
        >>> dynamics = contrastive_dynamics(
        ...     state_action_encoder(), ContrastiveConfig(), SpaceSpec(3, 2),
        ...     num_lags=1, anchor="current", feature_size=5,
        ... )  # this is `etm`; `adetm` gives an encoder of action histories
        >>> dynamics.model.expert.num_lags
        1
    """
    expert, forward = energy_expert(
        encoder, config, spec, num_lags, anchor, feature_size
    )
    loss = proposal_loss if config.negatives == "proposal" else langevin_loss
    return energy_learner(config, expert, forward.init, loss(config, forward))


def energy_learner(
    config: ContrastiveConfig,
    expert: Expert,
    init_params: Callable[[jax.Array, Scales], Any],
    loss_fn: LossFn,
) -> Dynamics:
    """Trains an expert on a loss of its parameters.

    Args:
        config: the recipe.
        expert: what is trained.
        init_params: ``(key, scales) -> params``, a NamedTuple like `ContrastiveParams`:
            all of its fields but the first are trained.
        loss_fn: ``(params, key, rows, step) -> (loss, metrics)``.
    """
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.adam(schedule)
    )

    def init(key: jax.Array, scales: Scales) -> ContrastiveState:
        params = init_params(key, scales)
        return ContrastiveState(
            params, optimizer.init(params[1:]), jnp.zeros((), jnp.int32)
        )

    def update(
        key: jax.Array, state: ContrastiveState, batch: Batch
    ) -> tuple[ContrastiveState, Metrics]:
        key_slice, key_loss = jax.random.split(key)
        batch = batch._replace(history=newest_lags(batch.history, expert.num_lags))
        rows = training_rows(key_slice, batch, expert.anchor, config.newest_probability)

        def objective(trained: tuple[Params, ...]) -> tuple[jax.Array, Metrics]:
            params = state.params._make((state.params.scales, *trained))
            return loss_fn(params, key_loss, rows, state.step)

        grads, metrics = jax.grad(objective, has_aux=True)(tuple(state.params[1:]))
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, tuple(state.params[1:])
        )
        trained: Any = optax.apply_updates(tuple(state.params[1:]), updates)
        params = state.params._make((state.params.scales, *trained))
        return ContrastiveState(params, optimizer_state, state.step + 1), metrics

    return Dynamics(init, update, transition_model(expert, config.resolved_sampling))


def training_rows(
    key: jax.Array, batch: Batch, anchor: Anchor, newest_probability: float
) -> Rows:
    """Draws a slice length for every row by itself (one for the whole batch would
    correlate its gradients) among those that its history allows. The key is consumed.

    Example:
        >>> from emfuse_jax.data import linear_gaussian
        >>> from emfuse_jax.dynamics.base import sample_windows
        >>> dataset, _ = linear_gaussian(num_episodes=4, length=20)
        >>> @jax.jit
        ... def lengths(key):
        ...     key_batch, key_rows = jax.random.split(key)
        ...     rows = jax.tree.map(jnp.asarray, dataset)
        ...     batch = sample_windows(key_batch, rows, 1000, num_lags=3)
        ...     return training_rows(key_rows, batch, "backtrack", 0.5).lags.sum(-1)
        >>> share = (lengths(jax.random.key(0)) == 1).mean()
        >>> 0.45 < share < 0.6  # half from one step back; two and three share the rest
        Array(True, dtype=bool)
    """
    slices = make_slices(batch.history, anchor)
    num_lags = slices.valid.shape[0]
    share = jnp.full((num_lags,), (1.0 - newest_probability) / max(num_lags - 1, 1))
    logits = jnp.log(share.at[0].set(newest_probability if num_lags > 1 else 1.0))
    logits = jnp.where(slices.valid.T, logits[None], -jnp.inf)
    index = jax.random.categorical(key, logits)
    start, lags = pick_slice((slices.anchor, slices.lags), index)
    return Rows(
        start,
        slices.action,
        lags,
        pack_target(start, batch.next_observation, batch.reward),
    )
