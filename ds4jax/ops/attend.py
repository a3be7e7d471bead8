"""Sparse attention over the window and compressed rows, which are keys and values at once, with a sink per head.

    p = softmax([q · k_j / √D …, sink]),  o = Σ_j p_j k_j,  then the inverse RoPE of the query's position

The sink adds to the denominator only. All heads share the rows (multi-query attention over latents: arXiv:2405.04434).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from ds4jax.implementation import Implementation
from ds4jax.numerics import rows as num
from ds4jax.numerics.precision import matmul, wide
from ds4jax.ops import ring, rope, tuned
from ds4jax.ops.blocks import QUERY_BLOCK, in_blocks
from ds4jax.ops.index import visible
from ds4jax.ops.linear import layers
from ds4jax.ops.weight import Weight
from pallas_kernels import mla as kernel


def query_dtype(implementation: Implementation, dtype):
    """The dtype that `attend` takes queries in: the kernel multiplies in float16."""
    return dtype if implementation == "xla" else jnp.float16


def attend(
    q: Float[Array, "B T H D"],
    near: num.Rows,
    rows: num.Rows | None,
    chosen: Int32[Array, "B T k"] | None,
    position: Int32[Array, "B"],
    sinks: Weight,
    angles: rope.Angles,
    *,
    layer: int,
    nth: int,
    ratio: int,
    row: num.RowFormat,
    dtype,
    causal: bool = True,
    query_blocks: int | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "B T H D"]:
    """Attention of queries q at positions `position` + 0 … T - 1, in `dtype`.

    near: the window's rows as `latent` returns them: of up to SPARE tokens the rings (L, B, W + SPARE, ·), of which
    `layer` is read; of more (B, W + T, ·). rows: compressed rows (L', B, rows, ·), of which `nth` is read; None with
    ratio 0. A query at p sees the first (p + 1) // ratio of them, or of the rows in its list `chosen`, visible ones
    first. sinks: (H). row: how rows are stored. causal: whether a query sees the W rows up to its own; otherwise all of
    them see all T and the W rows before, where T <= QUERY_BLOCK. The softmax is in float32 at least. query_blocks: see
    `in_blocks`. The kernel takes `official` rows of 64 times a power of two with 64 dims of RoPE, and 16 heads or a
    multiple. Raises Unsupported.
    """
    B, T, _, D = q.shape
    is_ring = T <= ring.SPARE
    W = next(iter(near.values())).shape[2 if is_ring else 1] - (ring.SPARE if is_ring else T)
    if implementation != "xla":
        nth = nth if ratio else layer  # not read with ratio 0; equal numbers are one in `layers`
        return kernel.op(
            q, near, rows, chosen, position, layers(layer, nth, sinks.nth), sinks.stack, angles.cos, angles.sin,
            ratio=ratio, width=W, ring=is_ring, causal=causal, dtype=dtype, config=tuned.tiles(kernel),
            interpret=implementation == "pallas_interpret",
        )  # fmt: skip
    assert causal or T <= QUERY_BLOCK
    window = row.decode(jax.tree.map(lambda x: x[layer], near) if is_ring else near, q.dtype)
    far = None if rows is None else jax.tree.map(lambda x: x[nth], rows)

    def window_of(start: int) -> Array:
        return window if is_ring else window[:, start : start + W + min(T, QUERY_BLOCK)]

    def block(queries: tuple, local: Array) -> Array:
        q, at, chosen = queries
        if is_ring:
            local_position = ring.positions(at[:, -1], local.shape[1])
        else:
            local_position = at[:, :1] - W + jnp.arange(local.shape[1], dtype=jnp.int32)
        age = (at if causal else at[:, -1:])[:, :, None] - local_position[:, None]
        seen = (local_position >= 0)[:, None] & (age >= 0) & (age < (W if causal else W + T))
        seen = jnp.broadcast_to(seen, (*at.shape, local.shape[1]))
        sources = [(local, seen)]
        if chosen is not None:
            batch = jnp.arange(B, dtype=jnp.int32)[:, None, None]
            picked = row.decode(jax.tree.map(lambda x: x[batch, chosen], far), q.dtype)
            sources.append((picked, visible(at[..., None], jnp.arange(chosen.shape[-1], dtype=jnp.int32), ratio)))
        elif far is not None:
            all_rows = row.decode(far, q.dtype)
            seen = visible(at[..., None], jnp.arange(all_rows.shape[1], dtype=jnp.int32), ratio)
            sources.append((all_rows, seen))
        return softmax_with_sink(q, sources, sinks.value)

    at = position[:, None] + jnp.arange(T, dtype=jnp.int32)
    o = in_blocks(block, (q, at, chosen), window_of, query_blocks)
    return rope.turn(o, angles.cos[:, :, None], -angles.sin[:, :, None]).astype(dtype)


def softmax_with_sink(
    q: Float[Array, "B T H D"],
    sources: list[tuple[Float[Array, "B ... _rows D"], Bool[Array, "B T _rows"]]],
    sinks: Float[Array, "H"],
) -> Float[Array, "B T H D"]:
    """Attention over all sources and the sink together; the sink only adds to the denominator.

    sources: rows that all queries of a sequence share, or of each query its own, with masks. The result has q's dtype.
    """
    dtype, logits = wide(q.dtype), []
    for rows, mask in sources:
        s = matmul("bthd,bkd->bthk" if rows.ndim == 3 else "bthd,btkd->bthk", q, rows, dtype) / math.sqrt(q.shape[-1])
        logits.append(jnp.where(mask[:, :, None], s, -jnp.inf))
    sink = sinks.astype(dtype)[:, None]
    highest = lax.stop_gradient(jnp.max(jnp.concatenate([*logits, jnp.broadcast_to(sink, (*q.shape[:3], 1))], -1), -1))
    highest = highest[..., None]
    exps = [jnp.exp(s - highest) for s in logits]
    total = jnp.exp(sink - highest) + sum(e.sum(-1, keepdims=True) for e in exps)
    out = [
        matmul("bthk,bkd->bthd" if rows.ndim == 3 else "bthk,btkd->bthd", e.astype(q.dtype), rows, dtype)
        for e, (rows, _) in zip(exps, sources, strict=True)
    ]
    return (sum(out) / total).astype(q.dtype)
