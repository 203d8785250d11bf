"""How far experts and selections are from the pool, over texts that the pool draws.

``KL(Q ‖ P) = E_Q Σ_t KL(q_t ‖ p_t)`` by the chain rule, so that sums along texts drawn from
the pool ``Q`` estimate it: for each expert, and for EMSelect's selections together with
their bound ``E_Q Σ_t max_i KL(q_t ‖ p_i)``. Texts from anywhere else do not.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from emfuse_jax.llm.decode import bucket_length, generate, pad_left
from emfuse_jax.llm.emselect import nearest_to_pool, pool_divergences, tournament
from emfuse_jax.llm.fuse import FusedCache
from emfuse_jax.llm.rules import uniform
from experiments._lm_experts import Experts, fuse_rule, join_params
from experiments._lm_intervals import mean_cells

_BATCH = 16


def drawn_divergences(
    experts: Experts,
    prompts: Sequence[list[int]],
    key: jax.Array,
    num_tokens: int,
) -> dict[str, Any]:
    """Draws a text after each prompt from the uniform pool, at temperature 1.

    Args:
        experts: of the pool.
        prompts: tokens; a text ends after ``num_tokens`` whatever it says.
        key: consumed.
        num_tokens: of each text.

    Returns:
        Sums in nats per text, means with 95 % bootstrap intervals over texts: by expert,
        by EMSelect's two orders, and their bound.

    Raises:
        ValueError: if a prompt leaves no room in the context.
    """
    model = fuse_rule(experts, uniform())
    params = join_params(experts)

    def keep(cache: FusedCache) -> jax.Array:
        apart = pool_divergences(cache.log_probs)
        chosen = [tournament(cache.log_probs), nearest_to_pool(cache.log_probs)]
        picked = [jax.numpy.take_along_axis(apart, i[None], axis=0) for i in chosen]
        return jax.numpy.concatenate([apart, *picked, apart.max(axis=0)[None]])

    @jax.jit
    def draw(params: Any, keys: jax.Array, tokens: jax.Array, valid: jax.Array):
        drawn = generate(params, keys, model, tokens, valid, num_tokens, keep=keep)
        return drawn.kept.sum(axis=0).T

    length = bucket_length(max(map(len, prompts)))
    sums = []
    for first in range(0, len(prompts), _BATCH):
        part = list(prompts[first : first + _BATCH])
        filled = part + part[-1:] * (_BATCH - len(part))
        keys = jax.random.split(jax.random.fold_in(key, first), _BATCH)
        rows = draw(params, keys, *pad_left(filled, length=length))
        sums.append(np.asarray(rows)[: len(part)])
    names = [*experts.names, "emselect", "emselect:order=pool", "bound"]
    columns = zip(names, np.concatenate(sums).T, strict=True)
    nats = mean_cells({name: column.astype(float) for name, column in columns})
    return {"num_texts": len(prompts), "num_tokens": num_tokens, "nats": nats}
