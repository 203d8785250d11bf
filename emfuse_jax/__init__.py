"""Fuse trained experts through their energies: `E = Σ λ_i E_i`.

The names here are the ones that most programs need; each subpackage has more.
"""

from emfuse_jax import artifacts, data, energy, losses, parallel, samplers
from emfuse_jax.artifacts import Trained, load_run
from emfuse_jax.base import (
    Buffer,
    Dynamics,
    Environment,
    History,
    Learner,
    Network,
    Policy,
    Prediction,
    Sampler,
    SpaceSpec,
    Transition,
    TransitionModel,
)
from emfuse_jax.data import Dataset, load_dataset
from emfuse_jax.dynamics import (
    AdetmConfig,
    EnsembleConfig,
    EtmConfig,
    FusionConfig,
    McetmConfig,
    SamplingConfig,
    adetm,
    etm,
    fit_scales,
    fuse_dynamics,
    gaussian_ensemble,
    historical_slice_uncertainty,
    mcetm,
    rollout,
    sample_windows,
    uncertainty_weights,
    uniform_weights,
)
from emfuse_jax.energy import (
    boltzmann_log_prob,
    energy_from_logits,
    log_opinion_pool,
    pool_energies,
    pool_gaussians,
)
from emfuse_jax.evaluation.scores import normalized_score
from emfuse_jax.evaluation.statistics import bootstrap_interval, iqm
from emfuse_jax.loops import fit, run_sampler, scan_steps
from emfuse_jax.losses import contrastive_divergence, info_nce, ranking_nce
from emfuse_jax.merging import model_soup, regmean
from emfuse_jax.parallel import data_parallel, shard_rows, shard_seeds
from emfuse_jax.policies.aepo import AepoConfig, aepo
from emfuse_jax.policies.bc import BcConfig, bc
from emfuse_jax.policies.diffusion import DiffusionConfig, diffusion
from emfuse_jax.policies.ebt import EbtConfig, ebt_policy
from emfuse_jax.policies.fused import fuse_policies
from emfuse_jax.policies.ibc import IbcConfig, ibc
from emfuse_jax.policies.iql import IqlConfig, iql
from emfuse_jax.policies.model_based import ModelBasedConfig, model_based
from emfuse_jax.policies.online import OnlineConfig, online
from emfuse_jax.policies.qgpo import QgpoConfig, qgpo
from emfuse_jax.policies.sac import SacConfig, sac
from emfuse_jax.samplers import annealed_langevin, from_blackjax, run_chains, ula

__version__ = "0.1.0.dev0"

__all__ = [
    "AdetmConfig",
    "AepoConfig",
    "BcConfig",
    "Buffer",
    "Dataset",
    "DiffusionConfig",
    "Dynamics",
    "EbtConfig",
    "EnsembleConfig",
    "Environment",
    "EtmConfig",
    "FusionConfig",
    "History",
    "IbcConfig",
    "IqlConfig",
    "Learner",
    "McetmConfig",
    "ModelBasedConfig",
    "Network",
    "OnlineConfig",
    "Policy",
    "Prediction",
    "QgpoConfig",
    "SacConfig",
    "Sampler",
    "SamplingConfig",
    "SpaceSpec",
    "Trained",
    "Transition",
    "TransitionModel",
    "adetm",
    "aepo",
    "annealed_langevin",
    "artifacts",
    "bc",
    "boltzmann_log_prob",
    "bootstrap_interval",
    "contrastive_divergence",
    "data",
    "data_parallel",
    "diffusion",
    "ebt_policy",
    "energy",
    "energy_from_logits",
    "etm",
    "fit",
    "fit_scales",
    "from_blackjax",
    "fuse_dynamics",
    "fuse_policies",
    "gaussian_ensemble",
    "historical_slice_uncertainty",
    "ibc",
    "info_nce",
    "iql",
    "iqm",
    "load_dataset",
    "load_run",
    "log_opinion_pool",
    "losses",
    "mcetm",
    "model_based",
    "model_soup",
    "normalized_score",
    "online",
    "parallel",
    "pool_energies",
    "pool_gaussians",
    "qgpo",
    "ranking_nce",
    "regmean",
    "rollout",
    "run_chains",
    "run_sampler",
    "sac",
    "sample_windows",
    "samplers",
    "scan_steps",
    "shard_rows",
    "shard_seeds",
    "ula",
    "uncertainty_weights",
    "uniform_weights",
]
