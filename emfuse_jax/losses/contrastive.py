"""Contrastive losses of energies, one number per example, un-reduced.

All compare the energy of a positive with those of negatives; they differ in what is known
about where the negatives came from. With negatives from a proposal of known density ``q``,
`ranking_nce` makes ``-E`` consistent for ``log p`` up to a constant ``c(x)`` of each
condition. `info_nce` without that correction learns ``log p - log q``; with negatives drawn
by a chain on the model's own energy it is the published recipe of energy transition models,
and no consistent estimate of a density.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = ["contrastive_divergence", "info_nce", "ranking_nce"]


def info_nce(
    positive_energy: Float[Array, "*batch"],
    negative_energy: Float[Array, "*batch negative"],
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*batch"]:
    """``-log [e^{-E⁺/T} / (e^{-E⁺/T} + Σ_j e^{-E_j⁻/T})]``.

    ``log(negatives + 1)`` where all energies are equal. The optimum is
    ``-E/T = log p - log q + c(x)``, where the negatives are independent draws from ``q``.

    Args:
        positive_energy: of the observed target.
        negative_energy: of its negatives.
        temperature: positive.

    Raises:
        ValueError: if the temperature is a number that is not positive.

    References:
        van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive
        Coding", 2018, equation 4. https://arxiv.org/abs/1807.03748

    Example:
        >>> print(f"{info_nce(jnp.zeros(()), jnp.zeros(16)):.3f}")
        2.833
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(
            f"temperature={temperature}; expected a positive number: low energy is good"
        )
    negative = jax.nn.logsumexp(-negative_energy / temperature, axis=-1)
    # log(1 + Σ exp((E⁺ - E⁻)/T)) keeps its digits where the loss is small.
    return jax.nn.softplus(negative + positive_energy / temperature)


def ranking_nce(
    positive_energy: Float[Array, "*batch"],
    negative_energy: Float[Array, "*batch negative"],
    positive_log_proposal: Float[Array, "*batch"],
    negative_log_proposal: Float[Array, "*batch negative"],
) -> Float[Array, "*batch"]:
    """Ranking noise-contrastive estimation: `info_nce` with logits ``-E - log q``.

    The optimum is ``-E = log p + c(x)`` whatever the proposal, as long as it covers the
    data. There is no temperature: any but 1 would break that.

    Args:
        positive_energy: of the observed target.
        negative_energy: of independent draws from the proposal.
        positive_log_proposal: ``log q`` at the target.
        negative_log_proposal: ``log q`` at the draws. No gradient flows into either: the
            proposal is known, not trained against.

    References:
        Ma, Collins, "Noise Contrastive Estimation and Negative Sampling for Conditional
        Models: Consistency and Statistical Efficiency", EMNLP 2018.
        https://arxiv.org/abs/1809.01812

    Example:
        >>> log_q = jnp.log(jnp.array([0.2, 0.8]))
        >>> loss = ranking_nce(-log_q[0], -log_q[1:], log_q[0], log_q[1:])
        >>> print(f"{loss:.4f}")  # log 2: the energy is the proposal's own
        0.6931
    """
    positive_log_proposal, negative_log_proposal = jax.lax.stop_gradient(
        (positive_log_proposal, negative_log_proposal)
    )
    return info_nce(
        positive_energy + positive_log_proposal,
        negative_energy + negative_log_proposal,
    )


def contrastive_divergence(
    positive_energy: Float[Array, "*batch"],
    negative_energy: Float[Array, "*batch negative"],
) -> Float[Array, "*batch"]:
    """``E⁺ - mean_j E_j⁻``, with negatives drawn from the model and their gradient stopped.

    Its gradient is that of the negative log-likelihood where the negatives follow
    ``exp(-E)/Z``. Its value is no loss to watch: at the optimum it is 0 in expectation.

    Args:
        positive_energy: of the observed target.
        negative_energy: of draws from the model.

    References:
        Hinton, "Training Products of Experts by Minimizing Contrastive Divergence", Neural
        Computation 14(8), 2002. https://doi.org/10.1162/089976602760128018

    Example:
        >>> float(contrastive_divergence(jnp.array(1.0), jnp.array([2.0, 4.0])))
        -2.0
    """
    return positive_energy - jnp.mean(negative_energy, axis=-1)
