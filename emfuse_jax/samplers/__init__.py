"""Samplers of energies: Langevin kernels, chains in row blocks, a derivative-free search,
blackjax's kernels."""

from emfuse_jax.samplers.blackjax_adapter import (
    effective_sample_size,
    from_blackjax,
    potential_scale_reduction,
)
from emfuse_jax.samplers.chains import run_chains
from emfuse_jax.samplers.derivative_free import (
    PopulationInfo,
    PopulationState,
    derivative_free,
    lowest_energy,
)
from emfuse_jax.samplers.descent import (
    Descended,
    DescentInfo,
    DescentState,
    descent,
    max_step_size,
    minimize,
)
from emfuse_jax.samplers.langevin import (
    LangevinInfo,
    LangevinState,
    annealed_langevin,
    etm_langevin,
    etm_schedule,
    ula,
)

__all__ = [
    "Descended",
    "DescentInfo",
    "DescentState",
    "LangevinInfo",
    "LangevinState",
    "PopulationInfo",
    "PopulationState",
    "annealed_langevin",
    "derivative_free",
    "descent",
    "effective_sample_size",
    "etm_langevin",
    "etm_schedule",
    "from_blackjax",
    "lowest_energy",
    "max_step_size",
    "minimize",
    "potential_scale_reduction",
    "run_chains",
    "ula",
]
