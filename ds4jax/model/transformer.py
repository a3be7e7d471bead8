"""The forward pass: embedding, blocks of attention and experts between hyper-connections, head."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ds4jax.config import ModelConfig
from ds4jax.formats.quant import linear, wide
from ds4jax.model import fused, hyper
from ds4jax.model.attention import attention
from ds4jax.model.cache import Cache
from ds4jax.model.moe import moe
from ds4jax.model.norm import rms_norm
from ds4jax.model.weights import Weights
from ds4jax.numerics.rows import Numerics
from pallas_kernels.common import Implementation

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: a static argument of every jitted step.

    numerics: see `ds4jax.numerics.rows`. dtype: of activations. mesh: where the weights lie, None for one device.
    query_blocks: how many blocks of queries attention takes at once; more are faster, and need more memory.
    kernels: "xla" for the functions of this folder as they are, "pallas" for `fused` with the kernels.
    """

    numerics: Numerics = "official"
    dtype: str = "float32"
    mesh: Mesh | None = None
    query_blocks: int | None = None  # one
    kernels: Implementation = "xla"


def block(
    X: Array, tokens: Array, n: Array, w: Weights, cache: Cache, layer: int, cfg: ModelConfig, compute: Compute
) -> tuple[Array, Cache]:
    """One layer: attention, then experts, each between its hyper-connections. X (B, T, N, E) → the same."""

    def attend(h: Array) -> tuple[Array, Cache]:
        return attention(h, n, w, cache, layer, cfg, compute.numerics, compute.query_blocks)

    def feed_forward(h: Array) -> tuple[Array, None]:
        return moe(h, tokens, w, layer, cfg, compute.mesh), None

    X, cache = hyper.connect(X, w.attn.hc.at(layer), w.attn.norm[layer], attend, cfg)
    X, _ = hyper.connect(X, w.ffn.hc.at(layer), w.ffn.norm[layer], feed_forward, cfg)
    return X, cache


def forward(
    w: Weights, cache: Cache, tokens: Array, n: Array, cfg: ModelConfig, compute: Compute
) -> tuple[Array, Cache]:
    """Append tokens to every sequence of the batch.

    tokens: int32 (B, T), of which the first n[b] are real (n: int32 (B,), 0 … T); the rest leaves no trace. T is at
    most 128 or a multiple of it.
    Returns the residual streams (B, T, N, E) before the head, and the cache with lengths advanced by n.
    """
    x = w.embed[tokens].dequantize(jnp.dtype(compute.dtype))
    X = jnp.broadcast_to(x[:, :, None], (*tokens.shape, cfg.n_streams, cfg.embed_dim))
    for layer in range(cfg.n_layers):
        X, cache = block(X, tokens, n, w, cache, layer, cfg, compute)
    return X, cache.replace(length=cache.length + n)


def logits(w: Weights, X: Array, cfg: ModelConfig) -> Array:
    """Streams (..., N, E) → logits (..., vocab), float32 at least."""
    x = rms_norm(hyper.head_collapse(X, w.head.hc, cfg), cfg.norm_eps, w.head.norm)
    return linear(x, w.head.out, wide(x.dtype))


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "all_positions"), donate_argnames="cache")
def prefill(
    w: Weights,
    cache: Cache,
    tokens: Array,
    n: Array,
    *,
    cfg: ModelConfig,
    compute: Compute,
    all_positions: bool = False,
) -> tuple[Array, Cache]:
    """`forward` and the head, jitted, the cache donated. Compiled once per shape of `tokens`: pad to a bucket.

    Returns the logits at each sequence's last real token (B, vocab), or at all T positions (B, T, vocab). Where n is
    0 the logits mean nothing.
    """
    if compute.kernels == "pallas":
        return fused.forward(w, cache, tokens, n, cfg, compute, all_positions)
    X, cache = forward(w, cache, tokens, n, cfg, compute)
    if not all_positions:
        X = jnp.take_along_axis(X, jnp.maximum(n - 1, 0)[:, None, None, None], axis=1)[:, 0]
    return logits(w, X, cfg), cache


def decode_step(
    w: Weights, cache: Cache, tokens: Array, active: Array, *, cfg: ModelConfig, compute: Compute
) -> tuple[Array, Cache]:
    """One token per sequence: tokens int32 (B,), active bool (B,) → logits (B, vocab) and the cache (donated)."""
    return prefill(w, cache, tokens[:, None], active.astype(jnp.int32), cfg=cfg, compute=compute)


def bucket(n: int, largest: int) -> int:
    """The chunk length that n tokens are padded to: a power of two up to 128, then doubling, `largest` at most."""
    size = 1
    while size < min(n, largest):
        size *= 2
    return min(size, largest)
