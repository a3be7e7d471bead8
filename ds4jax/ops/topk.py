"""The k rows of highest score for each query (DeepSeek-V4 report, section 2.3.1)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from ds4jax.implementation import Implementation
from ds4jax.ops import tuned
from pallas_kernels import topk as kernel


def highest(
    score: Float[Array, "B T rows"], seen: Int32[Array, "B T"], k: int, implementation: Implementation = "xla"
) -> Int32[Array, "B T k"]:
    """The indices of the k highest scores of each query, none NaN; of equal scores the first ones.

    seen: how many of the rows a query sees, the first ones. Others come last, in order, and only if there is nothing
    else. The order is otherwise free: the formula's is by score, the kernel's by index. Raises Unsupported.
    """
    if implementation == "xla":
        row = jnp.arange(score.shape[-1], dtype=jnp.int32)
        return lax.top_k(jnp.where(row < seen[..., None], score, -jnp.inf), k)[1]
    flat = score.reshape(-1, score.shape[-1]), seen.reshape(-1)
    chosen = kernel.op(*flat, k=k, config=tuned.tiles(kernel), interpret=implementation == "pallas_interpret")
    return chosen.reshape(*score.shape[:-1], k)
