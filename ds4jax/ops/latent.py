"""From projections to what attention reads: queries, and the window's new rows.

    q    each head: RMS norm without weight, RoPE
    kv   RMS norm with weight, RoPE; stored in the layer's window as a row that is key and value for all heads

Multi-head latent attention with one latent row per token: arXiv:2405.04434, section 2.1, with q_lora and one kv head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ds4jax.implementation import Implementation
from ds4jax.numerics import rows as num
from ds4jax.numerics.precision import wide
from ds4jax.ops import ring, rope, tuned
from ds4jax.ops.linear import layers
from ds4jax.ops.norm import Norm, rms_norm
from pallas_kernels import latent as kernel
from pallas_kernels import queries as many


class Latent(NamedTuple):
    """window: the stack of rings (L, B, W + SPARE, ·) with the new rows. near: rows that attention reads for the
    window: of up to SPARE tokens the stack of rings, of more (B, W + T, ·) with position length - W + j at j, the new
    ones at the end."""

    queries: Float[Array, "B T H D"]
    near: num.Rows
    window: num.Rows


def latent(
    q: Float[Array, "S HD"],
    kv: Float[Array, "S D"],
    norm: Norm,
    angles: rope.Angles,
    length: Int32[Array, "B"],
    n: Int32[Array, "B"],
    window: num.Rows,
    layer: int,
    *,
    row: num.RowFormat,
    dtype,
    implementation: Implementation = "xla",
) -> Latent:
    """Finish the projections of T new tokens of B sequences, and store the rows of those that are real.

    norm: of kv. length, n: tokens before these, and how many of the T are real. window: the stack of rings; `layer` is
    the one to write. row: how window rows are stored. dtype: of the queries that are returned. The kernel takes up to
    SPARE tokens of each sequence and rows of `official`; for more a kernel makes the queries, and XLA the rows. Raises
    Unsupported.
    """
    B, T, _ = angles.cos.shape
    few = T <= ring.SPARE
    if implementation != "xla" and few:
        queries, window = kernel.op(
            q, kv, norm.weight.stack, angles.cos, angles.sin, length, n, layers(norm.weight.nth, layer), window,
            eps=norm.eps, config=tuned.tiles(kernel), interpret=implementation == "pallas_interpret",
        )  # fmt: skip
        return Latent(queries, window, window)
    if implementation != "xla":
        queries = many.op(
            q, *(x.reshape(B * T, -1) for x in (angles.cos, angles.sin)), kind="attention", dim=row.dim, eps=norm.eps,
            config=tuned.tiles(many), interpret=implementation == "pallas_interpret",
        ).reshape(B, T, -1, row.dim)  # fmt: skip
    else:
        q = q.reshape(B, T, -1, row.dim).astype(wide(q.dtype))
        queries = rope.turn(rms_norm(q, norm.eps), angles.cos[:, :, None], angles.sin[:, :, None])
    new = rows(kv, norm, angles, row)
    moved = ring.store(new, window, layer, length, n)
    return Latent(queries.astype(dtype), moved if few else _slide(new, window, layer, length), moved)


def rows(kv: Float[Array, "S D"], norm: Norm, angles: rope.Angles, row: num.RowFormat) -> num.Rows:
    """The window rows of T tokens of B sequences, planes (B, T, ·), from their projections kv."""
    B, T, _ = angles.cos.shape
    return row.encode(rope.turn(norm(kv).reshape(B, T, -1), angles.cos, angles.sin))


def _slide(new: num.Rows, window: num.Rows, layer: int, length: Array) -> num.Rows:
    """The W rows before the new ones and the new ones, in order: (B, W + T, ·)."""
    W = next(iter(window.values())).shape[2] - ring.SPARE
    before = ring.rows(window, layer, length - W, W)  # before position 0: nothing, as attention's mask says
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), before, new)
