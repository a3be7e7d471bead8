"""Attention of DeepSeek-V4 (report, section 2.3): a shared key/value row per token, a window, compressed rows, a sink.

A query at position t sees
  * window rows t - W + 1 … t of its own layer,
  * in a layer of ratio 128 (HCA): every compressed row whose tokens all lie at or before t,
  * in a layer of ratio 4 (CSA): those among them that the indexer ranks highest, `index_top_k` at most.

    h ─┬─ q_a ─ r ─┬─ q_b ──────────────── queries ─┐
       │           └─ index q_b ─┐                  │
       ├─ kv ───────── row ──────┼─► window ────────┼─ attend ─ o_a (by group) ─ o_b
       ├─ compressors ─► rows, index keys ─ scores ─ top-k ─┘
       └─ index weights ─────────────────────┘
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ds4jax.config import CSA_RATIO, HCA_RATIO, ModelConfig
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Inputs, Tap, no_tap
from ds4jax.model.weights import Compressor, Weights
from ds4jax.numerics import rows as num
from ds4jax.numerics.precision import wide
from ds4jax.ops import attend, compress, index, latent, topk
from ds4jax.ops.linear import Product, product, products
from ds4jax.ops.norm import Norm
from ds4jax.sharding import TENSOR, total

QUERIES = 1024  # scored at once, which bounds the scores in memory


def compressors(w: Weights, ratio: int) -> dict[str, Compressor]:
    """The compressors of layers of a ratio, by what of the cache they fill: rows and, with ratio 4, index keys."""
    if not ratio:
        return {}
    if ratio == HCA_RATIO:
        return {"hca": w.hca.compressor}
    return {"csa": w.csa.compressor, "index": w.csa.indexer.compressor}


class Prepared(NamedTuple):
    """What the queries of a layer meet. latent: the queries and the window's rows. index_queries, index_weight: of the
    indexer's heads, what each looks for and how much it counts; None where the layer does not choose."""

    latent: latent.Latent
    index_queries: Float[Array, "B T Hi Di"] | None
    index_weight: Float[Array, "B T Hi"] | None


def chooses(cfg: ModelConfig, cache: Cache, layer: int) -> bool:
    """Whether a layer chooses among its compressed rows: ratio 4, and more rows than a query may read."""
    return cfg.ratio(layer) == CSA_RATIO and next(iter(cache.csa.rows.values())).shape[2] > cfg.index_top_k


def prepare(
    h: Float[Array, "S E"], inputs: Inputs, w: Weights, cache: Cache, layer: int, cfg: ModelConfig, compute: Compute,
    choose: bool, tap: Tap = no_tap,
) -> tuple[Prepared, Cache]:  # fmt: skip
    """All that comes before attention: queries, and the cache with the rows of these tokens.

    choose: whether the indexer's queries are wanted.
    """
    a, ratio, kernels = w.attn.at(layer), cfg.ratio(layer), compute.implementations
    B, T = inputs.shape
    accumulated = wide(h.dtype)
    row, key = row_formats(cfg, compute, h.dtype)
    families = {kind: family.at(layer) for kind, family in compressors(w, ratio).items()}

    of_r = [product(a.q_b)]
    beside: list[Product] = []  # what else reads h: a call of its own, which runs side by side with q_b
    for c in families.values():
        beside += [product(c.kv, accumulated), product(c.gate, accumulated)]
    if choose:
        indexer = w.csa.indexer.at(layer)
        beside.append(product(indexer.proj, accumulated))
        of_r.append(product(indexer.q_b, accumulated))
    norm, index_queries = Norm(a.q_a_norm, cfg.norm_eps), None
    with jax.named_scope("projections"):
        r, kv = products(h, [product(a.q_a), product(a.kv, accumulated)], implementation=kernels["linear"])
        rest = products(h, beside, implementation=kernels["linear"]) if beside else []
        # One row's are bound by bytes, and read in one go; for more a kernel of both has the tiles of neither.
        calls = [of_r] if len(h) == 1 else [[p] for p in of_r]
        q, *index_q = (y for call in calls for y in products(r, call, norm=norm, implementation=kernels["linear"]))
    tap(layer, "query", lambda: norm(r))

    if choose:
        with jax.named_scope("indexer"):
            index_queries = index.queries(
                index_q[0], inputs.angles[ratio], key=key, numerics=compute.numerics, implementation=kernels["index"]
            )
    with jax.named_scope("latent"):
        made = latent.latent(
            q, kv, Norm(a.kv_norm, cfg.norm_eps), inputs.angles[ratio], cache.length, inputs.n, cache.window, layer,
            row=row, dtype=attend.query_dtype(kernels["attend"], h.dtype), implementation=kernels["latent"],
        )  # fmt: skip
    tap(layer, "window", lambda: jax.tree.map(lambda near: near[:, -T:], made.near))
    cache = dataclasses.replace(cache, window=made.window)
    if ratio:
        fed = []
        for (kind, c), z, g in zip(families.items(), rest[::2], rest[1::2], strict=False):
            is_index = kind == "index"
            fed.append(compress.Compressor(z, g, c.ape, Norm(c.norm, cfg.norm_eps), key if is_index else row, is_index))
        tap(layer, "compressors", dict(zip(families, fed, strict=True)))
        with jax.named_scope("compressors"):
            moved = compress.compress(
                fed, [getattr(cache, kind) for kind in families], cache.length, inputs.n, inputs.angles[ratio],
                nth_of_ratio(cfg, layer), ratio=ratio, numerics=compute.numerics, implementation=kernels["compress"],
            )  # fmt: skip
        cache = dataclasses.replace(cache, **dict(zip(families, moved, strict=True)))
    return Prepared(made, index_queries, rest[-1].reshape(B, T, -1) if choose else None), cache


def row_formats(cfg: ModelConfig, compute: Compute, dtype) -> tuple[num.RowFormat, num.RowFormat]:
    """How window rows and compressed rows are stored, and how index keys are."""
    return num.kv_row(cfg, compute.numerics, dtype), num.index_row(cfg, compute.numerics, dtype)


def nth_of_ratio(cfg: ModelConfig, layer: int) -> int:
    """The number of a layer among those of its ratio; 0 for one that does not compress."""
    ratio = cfg.ratio(layer)
    return cfg.layers_of_ratio(ratio).index(layer) if ratio else 0


def attention(
    h: Float[Array, "S E"], inputs: Inputs, w: Weights, cache: Cache, layer: int, cfg: ModelConfig, compute: Compute,
    tap: Tap,
) -> tuple[Float[Array, "S E"], Cache]:  # fmt: skip
    """Attention of the normed h, and the cache with these tokens stored.

    `cache.length` is still the length before these tokens: the caller advances it after the last layer.
    """
    a, ratio, kernels, nth = w.attn.at(layer), cfg.ratio(layer), compute.implementations, nth_of_ratio(cfg, layer)
    row, key = row_formats(cfg, compute, h.dtype)
    choose = chooses(cfg, cache, layer)
    tap(layer, "attention", h)
    made, cache = prepare(h, inputs, w, cache, layer, cfg, compute, choose, tap)
    rows = cache.of_ratio(ratio).rows if ratio else None
    with jax.named_scope("indexer"):
        chosen = _choose(made, cache, inputs, nth, key, cfg, compute) if choose else None
    with jax.named_scope("attend"):
        o = attend.attend(
            made.latent.queries, made.latent.near, rows, chosen, inputs.first, a.sinks, inputs.angles[ratio],
            layer=layer, nth=nth, ratio=ratio, row=row, dtype=h.dtype, causal=inputs.causal,
            query_blocks=compute.query_blocks, implementation=kernels["attend"],
        )  # fmt: skip
    with jax.named_scope("projections"):
        groups = a.o_a.n_out // cfg.o_lora_rank  # of this device
        o = o.reshape(len(h), groups, -1)
        (o,) = products(o, [product(a.o_a)], groups=groups, implementation=kernels["linear"])
        (y,) = products(o, [product(a.o_b)], implementation=kernels["linear"])
    return total(y, compute.mesh, TENSOR), cache


def _choose(
    made: Prepared, cache: Cache, inputs: Inputs, nth: int, key: num.RowFormat, cfg: ModelConfig, compute: Compute
) -> Int32[Array, "B T k"]:
    """The compressed rows that each query reads; those that it sees come first."""
    assert made.index_queries is not None and made.index_weight is not None
    kernels, out = compute.implementations, []
    T = inputs.shape[1]
    position = inputs.first[:, None] + jnp.arange(T, dtype=jnp.int32)
    for start in range(0, T, QUERIES):
        q, weight, at = (x[:, start : start + QUERIES] for x in (made.index_queries, made.index_weight, position))
        score = index.scores(
            q, weight, cache.index.rows, nth, at, key=key, ratio=CSA_RATIO, query_blocks=compute.query_blocks,
            implementation=kernels["index"],
        )  # fmt: skip
        out.append(topk.highest(score, index.seen(at, CSA_RATIO), cfg.index_top_k, kernels["topk"]))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)
