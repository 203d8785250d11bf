"""Named settings: ``demo`` (minutes on two cores), ``fast`` (the best quality per FLOP that
was measured) and ``paper`` (the published recipes)."""

from emfuse_jax.dynamics import ETM_SAMPLING, AdetmConfig, EtmConfig, McetmConfig
from emfuse_jax.nets.denoiser import PAPER_DENOISER, DenoiserConfig
from emfuse_jax.policies._guidance import GuidanceConfig
from emfuse_jax.policies.aepo import AepoConfig
from emfuse_jax.policies.diffusion import DiffusionConfig
from emfuse_jax.policies.iql import IqlCriticsConfig
from emfuse_jax.policies.model_based import ModelBasedConfig
from emfuse_jax.policies.qgpo import QgpoConfig
from emfuse_jax.policies.sac import SacConfig

NAMES = ("demo", "fast", "paper")


def adetm(name: str) -> AdetmConfig:
    """The any-step energy model.

    ``paper``: ETM's training (Chen et al., ICML 2024): 4×200 ReLU energies, 16 negatives
    from chains of 50 steps, batches of 1024; 300 epochs of a million rows are 264 000
    updates. Sizes of the encoders are not published.
    """
    if name == "demo":
        return AdetmConfig(num_steps=8_000)
    if name == "fast":
        return AdetmConfig()
    return AdetmConfig(
        negatives="langevin",
        num_negatives=16,
        energy_sizes=(200, 200, 200, 200),
        action_features=64,
        batch_size=1024,
        # The published loss sums over the batch, so its decay is that much weaker.
        weight_decay=1e-4 / 1024,
        num_steps=264_000,
        sampling=ETM_SAMPLING,
    )


def etm(name: str) -> EtmConfig:
    """The one-step energy model; ``paper`` as for `adetm`."""
    if name != "paper":
        return EtmConfig(num_steps=adetm(name).num_steps, energy_sizes=(128, 128))
    return EtmConfig(
        negatives="langevin",
        num_negatives=16,
        batch_size=1024,
        weight_decay=1e-4 / 1024,
        num_steps=264_000,
        sampling=ETM_SAMPLING,
    )


def mcetm(name: str) -> McetmConfig:
    """The manifold-constrained energy model. Its paper's sizes are not published:
    ``paper`` trains as long as `etm`'s, on the losses of ``fast``."""
    return McetmConfig(num_steps=etm(name).num_steps)


def sac(name: str) -> SacConfig:
    """The policy. ``paper``: EMPO's (actor 1e-4, critics 3e-4, temperature at most 1).

    The actor's rate is annealed to 0, as in EMPO and ADMPO: the last policy is the one
    that is reported, and without it the return still swings by tens of points.
    """
    if name == "paper":
        return SacConfig(
            actor_learning_rate=1e-4,
            actor_decay_steps=3_000_000,
            critic_learning_rate=3e-4,
            temperature_learning_rate=1e-4,
            max_temperature=1.0,
        )
    return SacConfig(
        actor_decay_steps=60_000 if name == "fast" else 40_000, max_temperature=1.0
    )


def model_based(name: str) -> ModelBasedConfig:
    """Rollouts and updates. ``paper``: 50 000 branches of 5 steps per 1000 updates.

    The others make few long branches: a critic that never sees where five steps lead
    overrates it. On Hopper, one seed each: 19 normalised after 40 000 updates with 10 000
    branches of 5 steps, 50 with 512 of 100 (batches of 256); after 60 000 with batches of
    128, 44 with 512 of 100 and 60 with 128 of 400.
    """
    if name == "paper":
        return ModelBasedConfig(rollout_rows=50_000)
    return ModelBasedConfig(
        rollout_rows=128, horizon=400, updates_per_rollout=2000, batch_size=128
    )


def diffusion(name: str) -> DiffusionConfig:
    """The behaviour model. ``paper``: QGPO's network, rate and noise prediction."""
    if name == "paper":
        return DiffusionConfig(
            network=PAPER_DENOISER, prediction="noise", learning_rate=1e-4
        )
    sizes = (128, 128, 128) if name == "fast" else (128, 128)
    return DiffusionConfig(network=DenoiserConfig(hidden_sizes=sizes))


def aepo(name: str) -> AepoConfig:
    """Analytic guidance. ``paper``: the equations; what is not published is QGPO's.

    Values are in units of the advantage's spread: the published β is not known, and raw
    values differ by tens between tasks.
    """
    if name == "paper":
        return AepoConfig(
            behaviour=diffusion(name),
            critics=IqlCriticsConfig(hidden_sizes=(256, 256, 256)),
            guidance=GuidanceConfig(
                hidden_sizes=(256, 256, 256, 256), learning_rate=3e-4
            ),
        )
    return AepoConfig(
        behaviour=diffusion(name), guidance=GuidanceConfig(hidden_sizes=(128, 128))
    )


def qgpo(name: str) -> QgpoConfig:
    """Contrastive guidance. ``paper``: 3×256 critics, 4×256 guidance, 16 support actions,
    α = 3 on raw values; support actions are still those of a ring, see `policies.qgpo`."""
    if name == "paper":
        return QgpoConfig(
            behaviour=diffusion(name),
            guidance=GuidanceConfig(
                hidden_sizes=(256, 256, 256, 256), learning_rate=3e-4
            ),
            inverse_temperature=3.0,
            normalize_values=False,
            hidden_sizes=(256, 256, 256),
            support_rows=256,
            support_steps=15,
            batch_size=256,
            capacity=100_000,
        )
    return QgpoConfig(
        behaviour=diffusion(name),
        guidance=GuidanceConfig(hidden_sizes=(128, 128)),
        loss="split",
        num_support=8,
        support_rows=8,
        support_steps=8,
        batch_size=64,
        hidden_sizes=(128, 128),
    )


OFFLINE = {"diffusion": diffusion, "aepo": aepo, "qgpo": qgpo}
"""Settings by preset of methods on data; the others' own are those of every preset."""
