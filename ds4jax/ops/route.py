"""The router: which experts a token goes to, and what each counts.

    s = √softplus(W_router h)
    experts: the k highest of s + bias, or a table's for the token id
    weight_e = scale · s_e / Σ s

The bias decides who is chosen, not how much a choice counts (auxiliary-loss-free balancing, arXiv:2408.15664). The
first layers route by token id (DeepSeek-V4 report, section 2.1; hash layers, arXiv:2106.04426).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from ds4jax.implementation import Implementation
from ds4jax.ops import tuned
from ds4jax.ops.linear import layers
from ds4jax.ops.weight import Weight
from pallas_kernels import router as kernel


class Routing(NamedTuple):
    """ids: -1 for rows that are no tokens. weight: float32 at least. packed: the activations as the experts' kernel
    takes them, if asked for."""

    ids: Int32[Array, "S k"]
    weight: Float[Array, "S k"]
    packed: Int32[Array, "S words units"] | None = None


def route(
    logits: Float[Array, "S experts"],
    table: Weight,
    tokens: Int32[Array, "S"] | None,
    real: Int32[Array, "S"] | None,
    *,
    k: int,
    norm: bool,
    scale: float,
    pack: tuple[Float[Array, "S E"], str] | None = None,
    implementation: Implementation = "xla",
) -> Routing:
    """The k experts of each token, from the router's logits, float32 at least.

    table: the bias (experts), or, with the ids `tokens`, the experts of every token id, int32 (vocab, k). real: 0 for
    rows that are no tokens; None if all are. norm: whether weights are divided by their sum. pack: activations, and the
    format of the experts that will read them: the kernel then packs them on the way. Raises Unsupported.
    """
    if implementation != "xla":
        x, fmt = pack or (None, None)
        return Routing(
            *kernel.op(
                logits, table.stack, tokens, layers(table.nth), x, real, k=k, norm=norm, scale=scale, fmt=fmt,
                config=tuned.tiles(kernel), interpret=implementation == "pallas_interpret",
            )
        )  # fmt: skip
    s = jnp.sqrt(jax.nn.softplus(logits))
    if tokens is None:
        _, ids = lax.top_k(s + table.value.astype(s.dtype), k)
    else:
        ids = table.value[tokens]
    weight = jnp.take_along_axis(s, ids, axis=-1)
    if norm:
        weight = weight / weight.sum(-1, keepdims=True)
    return Routing(ids if real is None else jnp.where(real[:, None] > 0, ids, -1), weight * scale)
