"""Named settings: ``demo`` (minutes on two cores), ``fast`` (the best quality per FLOP that
was measured) and ``paper`` (the published recipes)."""

from emfuse_jax.dynamics import ETM_SAMPLING, AdetmConfig, EtmConfig, McetmConfig
from emfuse_jax.policies.model_based import ModelBasedConfig
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
