"""Transition models: energies over next states, their fusion, rollouts, uncertainty."""

from emfuse_jax.dynamics.adetm import AdetmConfig, adetm
from emfuse_jax.dynamics.base import (
    Batch,
    Encoded,
    Expert,
    Scales,
    Slices,
    fit_scales,
    make_slices,
    pack_target,
    sample_windows,
)
from emfuse_jax.dynamics.contrastive import ContrastiveConfig, contrastive_dynamics
from emfuse_jax.dynamics.ensemble import EnsembleConfig, gaussian_ensemble
from emfuse_jax.dynamics.etm import EtmConfig, etm
from emfuse_jax.dynamics.fused import (
    FusionConfig,
    fuse_dynamics,
    transition_model,
)
from emfuse_jax.dynamics.mcetm import McetmConfig, mcetm
from emfuse_jax.dynamics.rollout import Rollout, act_on, push, rollout
from emfuse_jax.dynamics.sampling import ETM_SAMPLING, SamplingConfig
from emfuse_jax.dynamics.truncation import (
    Calibration,
    CandidateConfig,
    calibrate,
    candidates,
    lowest_return,
    min_energy_model,
)
from emfuse_jax.dynamics.uncertainty import (
    fixed_weights,
    historical_slice_uncertainty,
    uncertainty_weights,
    uniform_weights,
)

__all__ = [
    "ETM_SAMPLING",
    "AdetmConfig",
    "Batch",
    "Calibration",
    "CandidateConfig",
    "ContrastiveConfig",
    "Encoded",
    "EnsembleConfig",
    "EtmConfig",
    "Expert",
    "FusionConfig",
    "McetmConfig",
    "Rollout",
    "SamplingConfig",
    "Scales",
    "Slices",
    "act_on",
    "adetm",
    "calibrate",
    "candidates",
    "contrastive_dynamics",
    "etm",
    "fit_scales",
    "fixed_weights",
    "fuse_dynamics",
    "gaussian_ensemble",
    "historical_slice_uncertainty",
    "lowest_return",
    "make_slices",
    "mcetm",
    "min_energy_model",
    "pack_target",
    "push",
    "rollout",
    "sample_windows",
    "transition_model",
    "uncertainty_weights",
    "uniform_weights",
]
