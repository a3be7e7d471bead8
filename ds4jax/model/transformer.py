"""The forward pass: embedding, blocks of attention and experts between hyper-connections, head.

embed ─► N streams ─► boundary ─ h ─► attention ─ y ─► boundary ─ h ─► experts ─ y ─► boundary … ─► head ─► logits
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from ds4jax.config import ModelConfig
from ds4jax.model import residency
from ds4jax.model.attention import attention
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Inputs, Tap, inputs, no_tap
from ds4jax.model.moe import moe
from ds4jax.model.spread import FIRST, spread
from ds4jax.model.weights import Head, HyperConnection, Weights
from ds4jax.numerics.precision import wide
from ds4jax.ops import mhc
from ds4jax.ops.linear import product, products
from ds4jax.ops.norm import Norm
from ds4jax.ops.weight import Weight
from ds4jax.sharding import TENSOR, gathered


def boundary(s: mhc.Streams, hc: HyperConnection, norm: Weight, cfg: ModelConfig, compute: Compute) -> mhc.Boundary:
    """From one sub-layer to the next; hc and norm have a `Weight` in every place."""
    with jax.named_scope("streams"):
        return mhc.boundary(
            s, mhc.Connection(hc.fn, hc.base, hc.scale), Norm(norm, cfg.norm_eps), eps=cfg.hc_eps,
            iterations=cfg.sinkhorn_iters, implementation=compute.implementations["mhc"],
        )  # fmt: skip


def block(
    s: mhc.Streams, inputs: Inputs, w: Weights, cache: Cache, layer: int, cfg: ModelConfig, compute: Compute,
    tap: Tap = no_tap,
) -> tuple[mhc.Streams, Cache]:  # fmt: skip
    """One layer: attention, then experts."""
    a, f = w.attn, w.ffn
    here = boundary(s, a.hc.at(layer), a.norm.at(layer), cfg, compute)
    y, cache = attention(here.h, inputs, w, cache, layer, cfg, compute, tap)
    here = boundary(here.add(y), f.hc.at(layer), f.norm.at(layer), cfg, compute)
    s = here.add(moe(here.h, inputs, w, layer, cfg, compute, tap))
    tap(layer, "streams", s.added)
    return s, cache


def streams(x: Float[Array, "S E"], cfg: ModelConfig) -> mhc.Streams:
    """Embeddings → the streams before the first layer, all of them the embedding."""
    return mhc.Streams(jnp.broadcast_to(x[:, None], (x.shape[0], cfg.n_streams, cfg.embed_dim)))


def run(
    w: Weights, cache: Cache, tokens: Int32[Array, "B T"], n: Int32[Array, "B"], cfg: ModelConfig, compute: Compute,
    tap: Tap = no_tap,
) -> tuple[mhc.Streams, Cache]:  # fmt: skip
    """`forward`, with the streams as the head takes them."""
    given = inputs(tokens, n, cache.length, cfg, compute.dtype)
    held = None if cache.experts is None else residency.Held(w.ffn.experts, cache.experts)
    if held:
        w = residency.with_experts(w, held)
    with jax.named_scope("embedding"):
        s = streams(w.embed[given.ids].dequantize(jnp.dtype(compute.dtype)), cfg)
    for layer in range(cfg.n_layers):
        s, cache = block(s, given, w, cache, layer, cfg, compute, tap)
    experts = held and held.residents()
    return s, dataclasses.replace(cache, length=cache.length + n, experts=experts)


def forward(
    w: Weights, cache: Cache, tokens: Int32[Array, "B T"], n: Int32[Array, "B"], cfg: ModelConfig, compute: Compute,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B T N E"], Cache]:  # fmt: skip
    """Append tokens to every sequence of the batch.

    tokens: of which the first n[b] are real (0 … T); the rest leaves no trace. T is at most 128 or a multiple of it.
    tap: see `Tap`.
    Returns the residual streams before the head, and the cache with lengths advanced by n. Raises Unsupported for a
    shape, a format, numerics or a mesh that a kernel does not take.
    """
    s, cache = run(w, cache, tokens, n, cfg, compute, tap)
    return s.added().reshape(*tokens.shape, cfg.n_streams, cfg.embed_dim), cache


def head(s: mhc.Streams, w: Head, cfg: ModelConfig, compute: Compute) -> Float[Array, "S vocab"]:
    """Streams → logits, float32 at least: the streams' own collapse, a norm, the output matrix."""
    w = w.single()
    h = boundary(s, w.hc, w.norm, cfg, compute).h
    with jax.named_scope("head"):
        (y,) = products(h, [product(w.out, wide(h.dtype))], implementation=compute.implementations["linear"])
    return gathered(y, compute.mesh, TENSOR)


def logits(
    w: Weights, X: Float[Array, "*s N E"], cfg: ModelConfig, compute: Compute = Compute()  # noqa: B008 (frozen)
) -> Float[Array, "*s vocab"]:  # fmt: skip
    """Streams of `forward` → logits, float32 at least."""
    return head(mhc.Streams(X.reshape(-1, *X.shape[-2:])), w.head, cfg, compute).reshape(*X.shape[:-2], -1)


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "all_positions"), donate_argnames="cache")
def prefill(
    w: Weights,
    cache: Cache,
    tokens: Int32[Array, "B T"],
    n: Int32[Array, "B"],
    *,
    cfg: ModelConfig,
    compute: Compute,
    all_positions: bool = False,
) -> tuple[Float[Array, "B *T vocab"], Cache]:
    """`forward` and the head, jitted, the cache donated. Compiled once per shape of `tokens`: pad to a bucket.

    Returns the logits at each sequence's last real token, or at all T positions. Where n is 0 the logits mean nothing.
    """

    def step(w: Weights, cache: Cache, tokens: Array, n: Array) -> tuple[Array, Cache]:
        s, cache = run(w, cache, tokens, n, cfg, compute)
        lead = tokens.shape if all_positions else n.shape
        return head(s if all_positions else last(s, n), w.head, cfg, compute).reshape(*lead, -1), cache

    return spread(step, compute.mesh, cfg, [FIRST, FIRST], [FIRST])(w, cache, tokens, n)


def last(s: mhc.Streams, n: Int32[Array, "B"]) -> mhc.Streams:
    """The streams of each sequence's last real token, of those of all its tokens."""
    B = len(n)
    T = jax.tree.leaves(s)[0].shape[0] // B
    at = jnp.arange(B, dtype=jnp.int32) * T + jnp.maximum(n - 1, 0)
    return s if T == 1 else jax.tree.map(lambda x: x[at], s)


def decode_step(
    w: Weights, cache: Cache, tokens: Int32[Array, "B"], active: Bool[Array, "B"], *, cfg: ModelConfig, compute: Compute
) -> tuple[Float[Array, "B vocab"], Cache]:
    """One token of each active sequence → logits and the cache (donated)."""
    return prefill(w, cache, tokens[:, None], active.astype(jnp.int32), cfg=cfg, compute=compute)


def bucket(n: int, largest: int) -> int:
    """The chunk length that n tokens are padded to: a power of two up to 128, then doubling, `largest` at most."""
    size = 1
    while size < min(n, largest):
        size *= 2
    return min(size, largest)
