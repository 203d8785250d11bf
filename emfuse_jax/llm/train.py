"""Training a language model: next-token cross-entropy, AdamW, warm-up and cosine.

The rule of GPT-3 and LLaMA at any size: gradients clipped at norm 1, a rate that rises
linearly and falls along half a cosine to a tenth, decay of matrices only; the defaults of
rate and second moment are those that did best on models of a million parameters. The
number of steps is part of the state, not of the program, so that a base and the experts
that start from it run the same compiled chunk.

References:
    Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019,
    https://arxiv.org/abs/1711.05101 (algorithm 2). Brown et al., Language Models are
    Few-Shot Learners, NeurIPS 2020, https://arxiv.org/abs/2005.14165 (appendix B).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import Learner, Metrics, Params
from emfuse_jax.llm.config import LmConfig
from emfuse_jax.llm.model import init_params, logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmTrainConfig:
    """Settings of `lm_learner`.

    Attributes:
        learning_rate: at the end of the warm-up.
        warmup: fraction of the steps over which the rate rises.
        final_rate: fraction of the learning rate that is left at the last step.
        weight_decay: of matrices (embeddings included), not of norms and biases.
        first_moment: decay of AdamW's mean.
        second_moment: decay of AdamW's mean square.
        max_gradient_norm: longer gradients are scaled down to it.
    """

    learning_rate: float = 5e-3
    warmup: float = 0.05
    final_rate: float = 0.1
    weight_decay: float = 0.1
    first_moment: float = 0.9
    second_moment: float = 0.99
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be positive and weight_decay="
                f"{self.weight_decay} not negative"
            )
        if not (0 <= self.warmup < 1 and 0 <= self.final_rate <= 1):
            raise ValueError(
                f"warmup={self.warmup} must be in [0, 1) and final_rate="
                f"{self.final_rate} in [0, 1]"
            )


class LmState(NamedTuple):
    """``num_steps`` is where the schedule ends."""

    params: Params
    optimizer: optax.OptState
    step: Int[Array, ""]
    num_steps: Int[Array, ""]


def lm_learner(config: LmConfig, training: LmTrainConfig | None = None) -> Learner:
    """A learner of one language model's parameters.

    ``init(key, num_steps, params=None) -> LmState``: random parameters, or the given ones
    (an expert that starts from a base; `loops.fit` donates them, so pass a copy if you
    keep yours). ``update(key, state, tokens [batch, time]) -> (state, metrics)``: every
    token after the first is predicted; the metrics are ``loss`` (nats per token),
    ``gradient_norm`` before clipping, and ``learning_rate``.

    Example:
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> learner = lm_learner(config)
        >>> def first_update(key):
        ...     state = learner.init(key, 1000)
        ...     return learner.update(key, state, jnp.zeros((4, 32), jnp.int32))
        >>> _, metrics = jax.eval_shape(first_update, jax.random.key(0))
        >>> sorted(metrics)
        ['gradient_norm', 'learning_rate', 'loss']
    """
    training = training or LmTrainConfig()
    optimizer = optax.chain(
        optax.clip_by_global_norm(training.max_gradient_norm),
        optax.scale_by_adam(training.first_moment, training.second_moment),
        optax.add_decayed_weights(training.weight_decay, mask=_matrices),
    )

    def init(key: jax.Array, num_steps: int, params: Any = None) -> LmState:
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1")
        if params is None:
            params = _start(init_params(key, config), config)
        zero = jnp.zeros((), jnp.int32)
        steps = jnp.asarray(num_steps, jnp.int32)
        return LmState(params, optimizer.init(params), zero, steps)

    def update(
        key: jax.Array, state: LmState, batch: jax.Array
    ) -> tuple[LmState, Metrics]:
        del key

        def objective(params: Params) -> jax.Array:
            return jnp.mean(next_token_loss(config, params, batch))

        loss, gradient = jax.value_and_grad(objective)(state.params)
        direction, new = optimizer.update(gradient, state.optimizer, state.params)
        rate = learning_rate(training, state.step, state.num_steps)
        params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": rate,
        }
        return LmState(params, new, state.step + 1, state.num_steps), metrics

    return Learner(init, update)


def next_token_loss(
    config: LmConfig,
    params: Params,
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"] | None = None,
) -> Float[Array, "batch time-1"]:
    """``-log p(token | the tokens before it)`` in nats, for every token after the first.

    Args:
        config: of the model.
        params: of the model.
        tokens: text.
        valid: false for padding, whose losses are 0; None: all are text.

    Example:
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> tokens = jnp.zeros((4, 32), jnp.int32)
        >>> def loss(key):
        ...     return next_token_loss(config, init_params(key, config), tokens)
        >>> jax.eval_shape(loss, jax.random.key(0)).shape  # nothing predicts the first token
        (4, 31)
    """
    if valid is None:
        valid = jnp.ones(tokens.shape, bool)
    scores = logits(config, params, tokens[:, :-1], valid[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
    # A first token after padding on the left has nothing that predicts it.
    return jnp.where(valid[:, 1:] & valid[:, :-1], loss, 0.0)


def learning_rate(
    training: LmTrainConfig, step: Int[Array, ""], num_steps: Int[Array, ""]
) -> Float[Array, ""]:
    """The rate of update number ``step``, the first being 0.

    It rises to ``learning_rate`` over the first ``warmup`` of the updates, beginning above
    zero, and is ``final_rate`` times that at the last one.

    Example:
        >>> training = LmTrainConfig(learning_rate=1e-3, warmup=0.1, final_rate=0.1)
        >>> steps = jnp.array([0, 9, 99])  # the first, the end of the warm-up, the last
        >>> rates = jax.vmap(lambda step: learning_rate(training, step, jnp.array(100)))(steps)
        >>> [f"{rate:.1e}" for rate in rates]
        ['1.0e-04', '1.0e-03', '1.0e-04']
    """
    total = num_steps.astype(jnp.float32)
    rising = jnp.maximum(training.warmup * total, 1.0)
    done = (step + 1).astype(jnp.float32)
    phase = jnp.clip((done - rising) / jnp.maximum(total - rising, 1.0), 0.0, 1.0)
    falling = training.final_rate + (1.0 - training.final_rate) * 0.5 * (
        1.0 + jnp.cos(jnp.pi * phase)
    )
    return training.learning_rate * jnp.minimum(done / rising, 1.0) * falling


def _start(params: Params, config: LmConfig) -> Params:
    """Random parameters of which every layer is the identity at first.

    The stream then is the embedding, large enough (variance 1 / width) that the first
    layers' output does not drown it. Two layers of width 128 get to 2.6 bits per byte with
    it where they get to 3.0 without (500 updates of 1024 tokens, three domains).
    """
    scale = config.hidden_size**-0.5 / jnp.std(params["embed"])
    embed = (params["embed"] * scale).astype(params["embed"].dtype)
    layers = [
        {k: jnp.zeros_like(v) if k in ("o", "down") else v for k, v in layer.items()}
        for layer in params["layers"]
    ]
    return {**params, "embed": embed, "layers": layers}


def _matrices(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)
