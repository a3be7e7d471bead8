"""Attention of DeepSeek-V4: one shared key/value vector per token, a window, compressed rows, and a sink per head.

A query at position t sees
  * window rows t - W + 1 … t of its own layer,
  * in a layer of ratio 128 (HCA): every compressed row whose tokens all lie at or before t,
  * in a layer of ratio 4 (CSA): those among them that the indexer ranks highest, `index_top_k` at most.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.formats.quant import grouped_linear, linear, matmul, wide
from ds4jax.model import indexer, rope
from ds4jax.model.cache import Cache
from ds4jax.model.compressor import append, compressors, project_tokens
from ds4jax.model.norm import rms_norm
from ds4jax.model.weights import Attention, Weights
from ds4jax.numerics import rows as num

Array = jax.Array

QUERY_BLOCK = 128  # queries handled at once, which bounds the scores in memory


def attend(q: Array, sources: list[tuple[Array, Array]], sinks: Array) -> Array:
    """Softmax over all sources and the sink together; the sink only adds to the denominator.

    q (B, T, H, D). sources: rows, which are keys and values at once, (B, K, D) shared by all queries or (B, T, K, D)
    of each query, with masks (B, T, K). sinks (H). → (B, T, H, D). The softmax is in float32 at least.
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


def project(h: Array, position: Array, w: Attention, freq: np.ndarray, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """h (B, T, E) → the latent of the queries (B, T, Rq), queries (B, T, H, D) and window rows (B, T, D), rotated."""
    r = rms_norm(linear(h, w.q_a), cfg.norm_eps, w.q_a_norm)
    q = linear(r, w.q_b).reshape(*h.shape[:-1], cfg.n_heads, cfg.head_dim)
    q = rope.rotate(rms_norm(q, cfg.norm_eps), position, freq)
    kv = rms_norm(linear(h, w.kv), cfg.norm_eps, w.kv_norm)
    return r, q, rope.rotate(kv[:, :, None], position, freq)[:, :, 0]


def compressed_rows(
    h: Array, n: Array, w: Weights, cache: Cache, layer: int, cfg: ModelConfig, numerics: num.Numerics
) -> tuple[Cache, num.Rows, Array | None]:
    """Store the rows that n more tokens h (B, T, E) complete in a layer that compresses.

    → the cache, all of the layer's rows as stored (B, N, ·), and in a layer of ratio 4 its index keys (B, N, Di).
    """
    ratio = cfg.ratio(layer)
    projected = [project_tokens(h, c.at(layer), cache.csa.z.dtype) for c in compressors(w, ratio).values()]
    cache = append(projected, n, w, cache, layer, cfg, numerics, h.dtype)
    nth = cfg.layers_of_ratio(ratio).index(layer)
    rows = jax.tree.map(lambda x: x[nth], cache.of_ratio(ratio).rows)
    if ratio != CSA_RATIO:
        return cache, rows, None
    keys = jax.tree.map(lambda x: x[nth], cache.index.rows)
    return cache, rows, num.index_row(cfg, numerics, h.dtype).decode(keys, h.dtype)


def attention(
    h: Array,
    n: Array,
    w: Weights,
    cache: Cache,
    layer: int,
    cfg: ModelConfig,
    numerics: num.Numerics,
    query_blocks: int | None = None,
) -> tuple[Array, Cache]:
    """h (B, T, E) normed input; n (B,) real tokens of the T. → (B, T, E) and the cache with these tokens stored.

    `cache.length` is still the length before these tokens: the caller advances it after the last layer.
    query_blocks: how many blocks of QUERY_BLOCK queries to take at once; None takes one.
    """
    B, T, _ = h.shape
    if T > QUERY_BLOCK and T % QUERY_BLOCK:
        raise ValueError(f"{T} tokens: more than {QUERY_BLOCK} must be padded to a multiple of it")
    W, dtype, ratio = cfg.window, h.dtype, cfg.ratio(layer)
    a, freq, fmt = w.attn.at(layer), rope.frequencies(cfg, ratio), num.kv_row(cfg, numerics, dtype)
    position = cache.length[:, None] + jnp.arange(T, dtype=jnp.int32)

    r, q, new = project(h, position, a, freq, cfg)
    cache, window = slide(cache, layer, fmt.encode(new), n, W)
    window = fmt.decode(window, dtype)  # (B, W + T, D); row j is position length - W + j
    capacity, iq, iw = 0, None, None
    if ratio:
        cache, rows, keys = compressed_rows(h, n, w, cache, layer, cfg, numerics)
        capacity = next(iter(rows.values())).shape[1]
    choose = ratio == CSA_RATIO and capacity > cfg.index_top_k
    if choose:
        iq, iw = indexer.queries(h, r, position, w.csa.at(layer).indexer, freq, cfg, numerics)

    def block(near: Array, queries: tuple[Array, ...]) -> Array:
        """The window's rows from W before the first query on; queries and what comes with them → (B, ·, H, D)."""
        q, position, iq, iw = queries
        row_position = position[:, :1] - W + jnp.arange(near.shape[1], dtype=jnp.int32)
        age = position[:, :, None] - row_position[:, None]
        sources = [(near, (age >= 0) & (age < W) & (row_position >= 0)[:, None])]
        if choose:
            chosen, seen = indexer.select(indexer.scores(iq, iw, keys), position, cfg.index_top_k)
            picked = jax.tree.map(lambda x: x[jnp.arange(B, dtype=jnp.int32)[:, None, None], chosen], rows)
            sources.append((fmt.decode(picked, dtype), seen))
        elif ratio:
            seen = indexer.visible(position[:, :, None], jnp.arange(capacity, dtype=jnp.int32), ratio)
            sources.append((fmt.decode(rows, dtype), seen))
        return attend(q, sources, a.sinks)

    queries = q, position, iq, iw
    if T <= QUERY_BLOCK:
        o = block(window, queries)
    else:
        near = jnp.stack([window[:, s : s + W + QUERY_BLOCK] for s in range(0, T, QUERY_BLOCK)])
        queries = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, -1, QUERY_BLOCK, *x.shape[2:]), 1, 0), queries)
        o = lax.map(lambda x: block(*x), (near, queries), batch_size=query_blocks)
        o = jnp.moveaxis(o, 0, 1).reshape(q.shape)

    o = rope.rotate(o, position, freq, inverse=True).reshape(B, T, cfg.o_groups, -1)
    o = grouped_linear(o, a.o_a, cfg.o_groups)
    return linear(o.reshape(B, T, -1), a.o_b), cache


def slide(cache: Cache, layer: int, new: num.Rows, n: Array, W: int) -> tuple[Cache, num.Rows]:
    """Store the last W of the n real new rows in the ring; → cache, and the rows before and after, (B, W + T, ·)."""
    length = cache.length
    B, T = next(iter(new.values())).shape[:2]
    batch = jnp.arange(B, dtype=jnp.int32)[:, None]
    # The slots of positions length - W … length - 1; before position 0 they hold nothing, and the mask says so.
    in_order = lax.rem(length[:, None] + jnp.arange(W, dtype=jnp.int32), np.int32(W))
    t = jnp.arange(T, dtype=jnp.int32)
    kept = (t < n[:, None]) & (t >= n[:, None] - W)
    slot = jnp.where(kept, lax.rem(length[:, None] + t, np.int32(W)), W)  # out of range: dropped
    both = jax.tree.map(lambda ring, x: jnp.concatenate([ring[layer][batch, in_order], x], axis=1), cache.window, new)
    ring = jax.tree.map(lambda ring, x: ring.at[layer, batch, slot].set(x, mode="drop"), cache.window, new)
    return cache.replace(window=ring), both
