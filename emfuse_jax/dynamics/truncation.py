"""Where a rollout should stop: the least energy over a few candidates of the next state.

An energy that can be compared between states (`dynamics.mcetm`) is high everywhere where
the model knows nothing, so its least value over candidates is a reliability signal. What
is too high is calibrated on held-out rows of the data, with the same sampler: the least of
more candidates is lower, and so is that of longer chains, so that a threshold is worth
nothing with another sampler. `Calibration` stores what made it and refuses the rest.

Reference: Fang et al., arXiv:2602.02900 (the signal); Kidambi et al., "MOReL: model-based
offline reinforcement learning", NeurIPS 2020 (the state that ends an episode).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from emfuse_jax._settings import at_least
from emfuse_jax.base import History, Params, Prediction, TransitionModel
from emfuse_jax.dynamics.base import pick_slice
from emfuse_jax.dynamics.sampling import SamplingConfig

BuildFn = Callable[[SamplingConfig], TransitionModel]
"""``sampling -> model``: `transition_model` of an expert, or `fuse_dynamics` of several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """How candidates of a next state are drawn.

    Attributes:
        num_candidates: chains per row.
        sampling: the chains. Without noise, since noise puts a floor under every signal
            that is made of candidates; they differ by where they start.
    """

    num_candidates: int = 8
    sampling: SamplingConfig = SamplingConfig(  # noqa: RUF009
        num_steps=20, spread=1.0, margin=4.0, first=0.3, last=1e-2
    )

    @property
    def chains(self) -> SamplingConfig:
        """``sampling`` for models that are mapped over the candidates: these share the rows
        that run together, ``block_rows`` in all."""
        rows = max(self.sampling.block_rows // self.num_candidates, 1)
        return dataclasses.replace(self.sampling, block_rows=rows)

    def __post_init__(self) -> None:
        at_least(self, 1, "num_candidates")
        if self.sampling.num_steps < 1:
            raise ValueError(
                f"candidates with num_steps={self.sampling.num_steps} descend nowhere: "
                "their energies say where chains start, not what the model knows; "
                "expected at least 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold of the least energy, and what made it.

    Attributes:
        threshold: least energies above it are out of support.
        quantile: of the held-out rows' least energies.
        rows: how many they were.
        candidates: how the candidates were drawn.
        model: which parameters were calibrated (a digest); empty: not recorded.
    """

    threshold: float
    quantile: float
    rows: int
    candidates: CandidateConfig
    model: str = ""

    def check(self, config: CandidateConfig, *, model: str = "") -> None:
        """Refuses another sampler than the one that was calibrated.

        Raises:
            ValueError: naming the setting that differs.
        """
        mine, yours = _settings(self.candidates), _settings(config)
        for name, value in yours.items():
            if value != mine[name]:
                raise ValueError(
                    f"the threshold {self.threshold:.3g} was calibrated with {name}="
                    f"{mine[name]}, this sampler has {name}={value}; calibrate again "
                    "with the sampler that is used"
                )
        if model and self.model and model != self.model:
            raise ValueError(
                f"the threshold {self.threshold:.3g} was calibrated on the parameters "
                f"{self.model}, these are {model}; calibrate again after training"
            )


def _settings(config: CandidateConfig) -> dict[str, object]:
    settings = dataclasses.asdict(config)
    # How many rows run together changes no chain.
    sampling = {k: v for k, v in settings.pop("sampling").items() if k != "block_rows"}
    return settings | sampling


def candidates(
    model: TransitionModel, num_candidates: int
) -> Callable[[Params, jax.Array, History], Prediction]:
    """``(params, key, history) -> Prediction`` with leaves ``[candidate, *batch, …]``.

    Example:
        >>> from emfuse_jax.base import Prediction
        >>> def drift(params, key, history):
        ...     step, zero = jax.random.normal(key, (2, 1)), jnp.zeros(2)
        ...     return Prediction(history.observation[0] + step, zero, zero, zero)
        >>> model = TransitionModel(predict=drift, energy=None, uncertainty=None)
        >>> history = History(jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1)), jnp.ones((1, 2), bool))
        >>> drawn = jax.eval_shape(candidates(model, 8), None, jax.random.key(0), history)
        >>> drawn.next_observation.shape
        (8, 2, 1)
    """

    def draw(params: Params, key: jax.Array, history: History) -> Prediction:
        keys = jax.random.split(key, num_candidates)
        return jax.vmap(model.predict, in_axes=(None, 0, None))(params, keys, history)

    return draw


def min_energy_model(
    build: BuildFn,
    config: CandidateConfig,
    *,
    calibration: Calibration | None = None,
    model: str = "",
) -> TransitionModel:
    """A model that predicts the best of several candidates and doubts by its energy.

    ``predict`` moves to the candidate of least energy; ``uncertainty`` is that energy, in
    nats and of any sign, for ``rollout(…, truncate_above=calibration.threshold)``. It is no
    penalty: rollouts of it take ``penalty=0``.

    Args:
        build: ``sampling -> model``, such as
            ``lambda sampling: transition_model(expert, sampling)``.
        config: the candidates.
        calibration: refuses ``config`` if it was made with another sampler.
        model: digest of the parameters, for that check.

    Raises:
        ValueError: if the calibration is another sampler's, or another model's.

    Example:
        >>> from emfuse_jax.base import Prediction
        >>> def build(sampling):  # draws from N(0, 1), whose energy is y²/2
        ...     def predict(params, key, history):
        ...         y, zero = jax.random.normal(key, (2, 1)), jnp.zeros(2)
        ...         return Prediction(y, zero, zero, 0.5 * y[:, 0] ** 2)
        ...
        ...     return TransitionModel(predict=predict, energy=None, uncertainty=None)
        >>> history = History(jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1)), jnp.ones((1, 2), bool))
        >>> model = min_energy_model(build, CandidateConfig(num_candidates=200))
        >>> least = jax.jit(model.uncertainty)(None, history)
        >>> bool((least < 0.01).all())  # so low because there are so many: hence `Calibration`
        True
    """
    if calibration is not None:
        calibration.check(config, model=model)
    one = build(config.chains)
    draw = candidates(one, config.num_candidates)

    def best(params: Params, key: jax.Array, history: History) -> Prediction:
        drawn = draw(params, key, history)
        # A chain that left for infinity is no candidate.
        energy = jnp.where(jnp.isfinite(drawn.energy), drawn.energy, jnp.inf)
        picked = pick_slice(drawn, jnp.argmin(energy, axis=0))
        return picked._replace(uncertainty=jnp.min(energy, axis=0))

    return TransitionModel(
        predict=best,
        energy=one.energy,
        uncertainty=lambda params, history: (
            best(params, jax.random.key(0), history).uncertainty
        ),
        expert=one.expert,
    )


def lowest_return(
    reward: Float[ArrayLike, "*rows"], discount: float
) -> Float[Array, ""]:
    """A bound below every return: each step pays at least the least of ``reward``, and
    episodes may end at once or never. It is what a step into the unknown may be worth.

    Example:
        >>> float(lowest_return(jnp.array([3.0, -1.0]), 0.75))
        -4.0
        >>> float(lowest_return(jnp.array([3.0, 1.0]), 0.75))  # it may end with this step
        1.0
    """
    least = jnp.min(jnp.asarray(reward))
    return jnp.minimum(least, least / (1.0 - discount))


def calibrate(
    build: BuildFn,
    config: CandidateConfig,
    params: Params,
    history: History,
    *,
    quantile: float = 0.99,
    model: str = "",
) -> Calibration:
    """Measures the threshold on held-out rows, after training, on the host.

    Args:
        build: as for `min_energy_model`.
        config: the candidates that the threshold is for.
        params: the trained model's.
        history: rows of the data that it was not trained on, ``[lag, rows, …]``.
        quantile: share of such rows that stay.
        model: digest of ``params``, stored.

    Raises:
        ValueError: if the quantile is not between 0 and 1, there is no row, or one has no
            finite energy.

    Example:
        >>> from emfuse_jax.base import Prediction
        >>> def build(sampling):  # a model that doubts by the size of the state
        ...     def predict(params, key, history):
        ...         state = history.observation[0]
        ...         return Prediction(state, state[:, 0], state[:, 0], state[:, 0])
        ...
        ...     return TransitionModel(predict=predict, energy=None, uncertainty=None)
        >>> state = jnp.arange(101.0)[None, :, None]
        >>> held_out = History(state, state, jnp.ones((1, 101), bool))
        >>> limit = calibrate(build, CandidateConfig(), None, held_out, quantile=0.9)
        >>> limit.threshold, limit.rows
        (90.0, 101)
    """
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"quantile={quantile}; expected a number between 0 and 1")
    energy = jax.jit(min_energy_model(build, config).uncertainty)(params, history)
    energy = np.asarray(energy)
    if not len(energy) or not np.isfinite(energy).all():
        raise ValueError(
            f"{np.sum(~np.isfinite(energy))} of {len(energy)} held-out rows have no "
            "finite energy; calibrate a trained model on at least one row"
        )
    return Calibration(
        threshold=float(np.quantile(energy, quantile)),
        quantile=quantile,
        rows=len(energy),
        candidates=config,
        model=model,
    )
