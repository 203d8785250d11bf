"""MC-ETM: an energy transition model that knows where its data are.

To ETM it adds an autoencoder of targets, negatives from near its manifold, and energies
that can be compared between states:

* *Near-manifold negatives*: codes of observed targets are perturbed, moved by Langevin on
  the code with the learned conditional energy, decoded, and moved again by a short chain
  among the targets themselves, which leaves the decoder's surface. They enter as in MPDR,
  by contrastive divergence: at the optimum it asks for nothing, so that it does not bend
  the energy away from ``-log p``, as such negatives in InfoNCE would.
* *Cross negatives*: contrast among targets of one ``(s, a)`` leaves an arbitrary
  ``c(s, a)`` in the energy, and its minimum says nothing. The same target (in residuals
  of the head) is therefore also compared between ``(s, a)`` and random neighbours of it,
  in pairs: conditional noise-contrastive estimation, whose optimum is the joint
  ``-log p(s, a, y)`` up to one constant.
* *Magnitude*: a small penalty of the squared energy.

So the least energy over a few candidates (`dynamics.truncation`) tells whether a model
knows a state and action at all.

References:
    Fang et al., "Manifold-constrained energy-based transition models for offline
    reinforcement learning", arXiv:2602.02900 (the idea; sizes and equations are ours).
    Yoon et al., NeurIPS 2023, arXiv:2310.18677 (MPDR: the two chains).
    Ceylan and Gutmann, "Conditional noise-contrastive estimation of unnormalised models",
    ICML 2018 (the cross term).
"""

import dataclasses

import jax
import jax.numpy as jnp

from emfuse_jax.base import Dynamics, SpaceSpec
from emfuse_jax.dynamics._energy_losses import langevin_loss, proposal_loss
from emfuse_jax.dynamics._energy_model import McetmParams, energy_expert
from emfuse_jax.dynamics._manifold import Negatives, Parts, manifold_loss
from emfuse_jax.dynamics.base import Batch, Expert, Scales, newest_lags
from emfuse_jax.dynamics.contrastive import energy_learner, training_rows
from emfuse_jax.dynamics.etm import EtmConfig, state_action_encoder
from emfuse_jax.nets.autoencoder import autoencoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class McetmConfig(EtmConfig):
    """A manifold-constrained energy transition model.

    Attributes:
        energy_sizes: hidden layers of the energy.
        head_phase: proposal: part of ``num_steps`` in which the head and the autoencoder
            train alone; a step of the energy costs several of theirs. Langevin has no
            head to wait for: all terms are there from the first step.
        energy_rows: rows of the batch that train the terms below and the autoencoder;
            with a proposal also the energy's own.
        latent_size: dimension of the code; 0 is half of the target's, rounded up.
        autoencoder_sizes: hidden layers of the encoder, reversed in the decoder.
        code_jitter: noise on the code while the autoencoder trains, codes in [-1, 1].
        code_noise: smallest and largest width of a code's perturbation.
        latent_steps: langevin steps on the code.
        latent_step: their step size, positive.
        visible_steps: langevin steps after decoding; at least 1, since decoded targets
            alone say nothing about the directions off the manifold.
        visible_step: their step size, in scaled targets, positive.
        manifold_weight: of the near-manifold negatives; 0 leaves them out.
        manifold_rows: rows of the batch that have one each.
        num_cross: neighbours of ``(s, a)`` per row.
        cross_scales: widths of the neighbourhoods, in standard deviations of the data.
        cross_weight: of the cross negatives.
        magnitude_weight: of the squared energy.
    """

    energy_sizes: tuple[int, ...] = (128, 128)
    head_phase: float = 0.8
    latent_size: int = 0
    autoencoder_sizes: tuple[int, ...] = (128, 128)
    code_jitter: float = 0.02
    code_noise: tuple[float, float] = (0.025, 0.5)
    latent_steps: int = 5
    latent_step: float = 0.005
    visible_steps: int = 5
    visible_step: float = 1e-3
    manifold_weight: float = 0.1
    manifold_rows: int = 16
    num_cross: int = 4
    cross_scales: tuple[float, ...] = (0.1, 0.5, 2.0)
    cross_weight: float = 1.0
    magnitude_weight: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_steps < 0 or self.visible_steps < 1:
            raise ValueError(
                f"latent_steps={self.latent_steps} must be at least 0 and visible_steps="
                f"{self.visible_steps} at least 1: decoded targets alone teach nothing "
                "about the directions off the manifold"
            )
        for name in ("latent_step", "visible_step"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0.0 <= self.code_noise[0] <= self.code_noise[1]:
            raise ValueError(
                f"code_noise={self.code_noise}; expected (smallest, largest) width"
            )
        scales = self.cross_scales
        if self.num_cross < 1 or not scales or not all(scale > 0 for scale in scales):
            raise ValueError(
                f"num_cross={self.num_cross} must be at least 1 and cross_scales="
                f"{scales} positive: without neighbours of (s, a) energies "
                "cannot be compared between states"
            )
        if not 1 <= self.manifold_rows <= self.energy_rows <= self.batch_size:
            raise ValueError(
                f"manifold_rows={self.manifold_rows} must be between 1 and energy_rows="
                f"{self.energy_rows}, and that at most batch_size={self.batch_size}"
            )
        weights = ("manifold_weight", "cross_weight", "magnitude_weight")
        for name in ("code_jitter", *weights):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


def mcetm(config: McetmConfig, spec: SpaceSpec) -> Dynamics:
    """The manifold-constrained energy transition model: ``init(key, scales)``,
    ``update(key, state, Batch)`` and ``model``.

    Raises:
        ValueError: if ``latent_size`` is not below the target's size.

    Example:
        >>> mcetm(McetmConfig(), SpaceSpec(4, 2)).model.expert.num_lags
        1
    """
    expert, parts = _parts(config, spec)
    dim = spec.observation_size + 1
    own_loss = proposal_loss if config.negatives == "proposal" else langevin_loss

    def init(key: jax.Array, scales: Scales) -> McetmParams:
        key_energy, key_coder = jax.random.split(key)
        params = parts.forward.init(key_energy, scales)
        return McetmParams(*params, parts.coder.init(key_coder, jnp.zeros((1, dim))))

    loss = manifold_loss(parts, own_loss(config, parts.forward))
    return energy_learner(config, expert, init, loss)


def _parts(config: McetmConfig, spec: SpaceSpec) -> tuple[Expert, Parts]:
    dim = spec.observation_size + 1
    size = spec.observation_size + spec.action_size
    expert, forward = energy_expert(
        state_action_encoder(), config, spec, 1, "current", size
    )
    latent = config.latent_size or (dim + 1) // 2
    coder = autoencoder(dim, latent, config.autoencoder_sizes)
    return expert, Parts(config, forward, coder)


def near_manifold(
    config: McetmConfig,
    spec: SpaceSpec,
    params: McetmParams,
    key: jax.Array,
    batch: Batch,
) -> Negatives:
    """The near-manifold negatives of a batch, as training draws them: for a look at them.

    Of a longer history the newest lag alone is read, as by the model.

    Returns:
        `Negatives` in scaled targets, ``[batch, dim]``.
    """
    key_rows, key_chain = jax.random.split(key)
    expert, parts = _parts(config, spec)
    batch = batch._replace(history=newest_lags(batch.history, expert.num_lags))
    rows = training_rows(key_rows, batch, expert.anchor, config.newest_probability)
    return parts.negatives(params, key_chain, rows, parts.encode(params, rows))
