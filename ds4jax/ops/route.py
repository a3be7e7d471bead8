"""The router: which experts a token goes to, and what each counts.

    s = √softplus(W_router h)
    experts: the k highest of s + bias, or a table's for the token id
    weight_e = scale · s_e / Σ s

The bias decides who is chosen, not how much a choice counts (auxiliary-loss-free balancing, arXiv:2408.15664). The
first layers route by token id (hash layers, arXiv:2106.04426).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ds4jax.implementation import Implementation
from ds4jax.ops import tuned
from ds4jax.ops.linear import layers
from ds4jax.ops.weight import Weight
from pallas_kernels import router as kernel

Array = jax.Array


class Routing(NamedTuple):
    """ids: int32 (S, k), -1 for rows that are no tokens. weight: (S, k), float32 at least. packed: the activations as
    the experts' kernel takes them, if asked for."""

    ids: Array
    weight: Array
    packed: Array | None = None


def route(
    logits: Array,
    table: Weight,
    tokens: Array | None,
    real: Array | None,
    *,
    k: int,
    norm: bool,
    scale: float,
    pack: tuple[Array, str] | None = None,
    implementation: Implementation = "xla",
) -> Routing:
    """logits (S, n_experts) of the router, float32 at least → the k experts of each token.

    table: the bias (n_experts), or, with tokens int32 (S,), the experts of every token id, int32 (vocab, k). real:
    int32 (S,), 0 for rows that are no tokens; None if all are. norm: whether weights are divided by their sum. pack:
    activations (S, E), and the format of the experts that will read them: the kernel then packs them on the way.
    Raises Unsupported.
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
