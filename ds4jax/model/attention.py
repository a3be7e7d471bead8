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

from ds4jax import numerics as num
from ds4jax.cache import Cache
from ds4jax.config import CSA_RATIO, HCA_RATIO, ModelConfig
from ds4jax.model import indexer, rope
from ds4jax.model.compressor import compress
from ds4jax.model.norm import rms_norm
from ds4jax.quant import grouped_linear, linear, matmul
from ds4jax.weights import Weights

Array = jax.Array

QUERY_BLOCK = 128  # queries handled at once, which bounds the scores in memory


def attend(q: Array, sources: list[tuple[Array, Array]], sinks: Array) -> Array:
    """Softmax over all sources and the sink together; the sink only adds to the denominator.

    q (B, T, H, D). sources: rows, which are keys and values at once, (B, K, D) shared by all queries or (B, T, K, D)
    of each query, with masks (B, T, K). sinks (H). → (B, T, H, D).
    """
    logits = []
    for rows, mask in sources:
        s = matmul("bthd,bkd->bthk" if rows.ndim == 3 else "bthd,btkd->bthk", q, rows) / math.sqrt(q.shape[-1])
        logits.append(jnp.where(mask[:, :, None], s, -jnp.inf))
    sink = sinks.astype(q.dtype)[:, None]
    highest = lax.stop_gradient(jnp.max(jnp.concatenate([*logits, jnp.broadcast_to(sink, (*q.shape[:3], 1))], -1), -1))
    highest = highest[..., None]
    exps = [jnp.exp(s - highest) for s in logits]
    total = jnp.exp(sink - highest) + sum(e.sum(-1, keepdims=True) for e in exps)
    out = [
        matmul("bthk,bkd->bthd" if rows.ndim == 3 else "bthk,btkd->bthd", e, rows)
        for e, (rows, _) in zip(exps, sources, strict=True)
    ]
    return sum(out) / total


def attention(
    h: Array, n: Array, w: Weights, cache: Cache, layer: int, cfg: ModelConfig, numerics: num.Numerics
) -> tuple[Array, Cache]:
    """h (B, T, E) normed input; n (B,) real tokens of the T. → (B, T, E) and the cache with these tokens stored.

    `cache.length` is still the length before these tokens: the caller advances it after the last layer.
    """
    B, T, _ = h.shape
    if T > QUERY_BLOCK and T % QUERY_BLOCK:
        raise ValueError(f"{T} tokens: more than {QUERY_BLOCK} must be padded to a multiple of it")
    W, D, dtype = cfg.window, cfg.head_dim, h.dtype
    ratio, length = cfg.ratio(layer), cache.length
    a, freq, fmt = w.attn.at(layer), rope.frequencies(cfg, ratio), num.kv_row(cfg, numerics, dtype)
    position = length[:, None] + jnp.arange(T, dtype=jnp.int32)

    r = rms_norm(linear(h, a.q_a), cfg.norm_eps, a.q_a_norm)
    q = linear(r, a.q_b).reshape(B, T, cfg.n_heads, D)
    q = rope.rotate(rms_norm(q, cfg.norm_eps), position, freq)
    kv = rms_norm(linear(h, a.kv), cfg.norm_eps, a.kv_norm)
    new = fmt.encode(rope.rotate(kv[:, :, None], position, freq)[:, :, 0])

    cache, window = _slide(cache, layer, new, n, W)
    window = fmt.decode(window, dtype)  # (B, W + T, D); row j is position length - W + j

    if ratio:
        keep = (h, length, n)
        kind = "csa" if ratio == CSA_RATIO else "hca"
        nth = cfg.layers_of_ratio(ratio).index(layer)
        extra = getattr(w, kind).at(layer)
        stored = compress(*keep, extra.compressor, getattr(cache, kind), nth, ratio, fmt, freq, cfg)
        cache = cache.replace(**{kind: stored})
        rows = jax.tree.map(lambda x: x[nth], stored.rows)
        capacity = next(iter(rows.values())).shape[1]
    if ratio == CSA_RATIO:
        key_fmt = num.index_row(cfg, numerics, dtype)
        index = compress(
            *keep, extra.indexer.compressor, cache.index, nth, ratio, key_fmt, freq, cfg,
            finish=lambda row: num.index_rotation(row, numerics),
        )  # fmt: skip
        cache = cache.replace(index=index)
        keys = key_fmt.decode(jax.tree.map(lambda x: x[nth], index.rows), dtype)
        iq, iw = indexer.queries(h, r, position, extra.indexer, freq, cfg, numerics)
    else:
        iq = iw = jnp.zeros((B, T, 0), dtype)

    def block(start: Array | int, size: int) -> Array:
        """Queries start … start + size - 1 of the T."""

        def take(x: Array, extra: int = 0) -> Array:
            return lax.dynamic_slice_in_dim(x, start, size + extra, axis=1)

        qs, ps, near = take(q), take(position), take(window, W)
        row_position = ps[:, :1] - W + jnp.arange(size + W, dtype=jnp.int32)
        age = ps[:, :, None] - row_position[:, None]
        sources = [(near, (age >= 0) & (age < W) & (row_position >= 0)[:, None])]
        if ratio == HCA_RATIO or (ratio == CSA_RATIO and capacity <= cfg.index_top_k):
            seen = indexer.visible(ps[:, :, None], jnp.arange(capacity, dtype=jnp.int32), ratio)
            sources.append((fmt.decode(rows, dtype), seen))
        elif ratio == CSA_RATIO:
            chosen, seen = indexer.select(indexer.scores(take(iq), take(iw), keys), ps, cfg.index_top_k)
            picked = jax.tree.map(lambda x: x[jnp.arange(B, dtype=jnp.int32)[:, None, None], chosen], rows)
            sources.append((fmt.decode(picked, dtype), seen))
        return attend(qs, sources, a.sinks)

    if T <= QUERY_BLOCK:
        o = block(0, T)
    else:
        starts = jnp.arange(0, T, QUERY_BLOCK, dtype=jnp.int32)
        o = lax.map(lambda s: block(s, QUERY_BLOCK), starts)  # T is a multiple: see transformer.BUCKETS
        o = jnp.moveaxis(o, 0, 1).reshape(B, T, cfg.n_heads, D)

    o = rope.rotate(o, position, freq, inverse=True).reshape(B, T, cfg.o_groups, -1)
    o = grouped_linear(o, a.o_a, cfg.o_groups)
    return linear(o.reshape(B, T, -1), a.o_b), cache


def _slide(cache: Cache, layer: int, new: num.Rows, n: Array, W: int) -> tuple[Cache, num.Rows]:
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
