"""The multi-token-prediction head: from the main model's streams and the next token, a draft of the token after it.

The head is one more block, number `cfg.n_layers`, with a window of its own in the cache. Its row of position t is made
from the streams of t and the token of t + 1, so it runs one token behind the main model: over the prompt too, since it
attends to its own rows only.
"""

import jax
import jax.numpy as jnp

from ds4jax.config import ModelConfig
from ds4jax.formats.quant import linear
from ds4jax.model.cache import Cache
from ds4jax.model.norm import rms_norm
from ds4jax.model.transformer import Compute, block, logits
from ds4jax.model.weights import Head, Mtp, Weights

Array = jax.Array


def join(X: Array, x: Array, w: Mtp, cfg: ModelConfig) -> Array:
    """Streams X (B, T, N, E) and the next tokens' embeddings x (B, T, E) → streams of the head's block (B, T, N, E).

    Z_i = h_proj(rms(X_i)·hnorm) + e_proj(rms(x)·enorm).
    """
    e = linear(rms_norm(x, cfg.norm_eps, w.enorm), w.e_proj)
    return linear(rms_norm(X, cfg.norm_eps, w.hnorm), w.h_proj) + e[:, :, None]


def head(w: Weights, Z: Array, cfg: ModelConfig) -> Array:
    """The block's output streams (..., N, E) → logits (..., vocab), float32 at least, by the main output matrix."""
    own = w.mtp.head
    return logits(w.replace(head=Head(hc=own.hc, norm=own.norm, out=w.head.out)), Z, cfg)


def draft(
    w: Weights, cache: Cache, X: Array, tokens: Array, start: Array, n: Array, cfg: ModelConfig, compute: Compute
) -> tuple[Array, Array, Cache]:
    """Append T positions to the head's window of every sequence, and draft a token from each.

    X (B, T, N, E): streams of positions start … start + T - 1, start int32 (B,); n (B,) of the T are real. They are the
    main model's, from `forward`; or, for a further draft, what this function returned, one position on.
    tokens: int32 (B, T), the token after each position: given, sampled or drafted.
    Returns logits (B, T, vocab) of the tokens at start + 2 …; the block's output streams (B, T, N, E); and the cache,
    its length as it was: that is the main model's.
    """
    x = w.embed[tokens].dequantize(jnp.dtype(compute.dtype))
    Z = join(X, x, w.mtp, cfg)
    Z, moved = block(Z, tokens, n, w, cache.replace(length=start), cfg.n_layers, cfg, compute)
    return head(w, Z, cfg), Z, moved.replace(length=cache.length)
