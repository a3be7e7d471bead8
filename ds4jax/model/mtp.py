"""The multi-token-prediction head: from the main model's streams and the next token, a draft of the token after it.

The head is one more block, number `cfg.n_layers`, with a window of its own in the cache. Its row of position t is made
from the streams of t and the token of t + 1, so it runs one token behind the main model: over the prompt too, since it
attends to its own rows only. DeepSeek-V3, arXiv:2412.19437, section 2.2, with one join for each stream.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ds4jax.config import ModelConfig
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Tap, inputs, no_tap
from ds4jax.model.transformer import block
from ds4jax.model.transformer import head as output_head
from ds4jax.model.weights import Head, Mtp, Weights
from ds4jax.ops import mhc
from ds4jax.ops.linear import linear
from ds4jax.ops.norm import rms_norm
from ds4jax.ops.weight import single


def join(X: Float[Array, "*s N E"], x: Float[Array, "*s E"], w: Mtp, cfg: ModelConfig) -> Float[Array, "*s N E"]:
    """Streams X and the next tokens' embeddings x → streams of the head's block.

    Z_i = h_proj(rms(X_i)·hnorm) + e_proj(rms(x)·enorm).
    """
    e = linear(rms_norm(x, cfg.norm_eps, w.enorm), single(w.e_proj))
    return linear(rms_norm(X, cfg.norm_eps, w.hnorm), single(w.h_proj)) + e[..., None, :]


def head(w: Weights) -> Head:
    """The head's own collapse and norm, and the main model's output matrix."""
    assert w.mtp is not None
    own = w.mtp.head
    return Head(hc=own.hc, norm=own.norm, out=w.head.out)


def draft(
    w: Weights, cache: Cache, X: Float[Array, "B T N E"], tokens: Int32[Array, "B T"], start: Int32[Array, "B"],
    n: Int32[Array, "B"], cfg: ModelConfig, compute: Compute, tap: Tap = no_tap,
) -> tuple[Float[Array, "B T vocab"], Float[Array, "B T N E"], Cache]:  # fmt: skip
    """Append T positions to the head's window of every sequence, and draft a token from each.

    X: streams of positions start … start + T - 1, of which n are real. They are the main model's, from `forward`; or,
    for a further draft, what this function returned, one position on. tokens: the token after each position: given,
    sampled or drafted.
    Returns logits of the tokens at start + 2 …; the block's output streams; and the cache, its length as it was: that
    is the main model's.
    """
    assert w.mtp is not None
    given = inputs(tokens, n, start, cfg, compute.dtype)
    x = w.embed[given.ids].dequantize(jnp.dtype(compute.dtype))
    s = mhc.Streams(join(X.reshape(-1, *X.shape[2:]), x, w.mtp, cfg))
    s, moved = block(s, given, w, dataclasses.replace(cache, length=start), cfg.n_layers, cfg, compute, tap)
    logits = output_head(s, head(w), cfg, compute)
    moved = dataclasses.replace(moved, length=cache.length)
    return logits.reshape(*tokens.shape, -1), s.added().reshape(X.shape), moved
