"""Manifold-constrained hyper-connections (mHC): N residual streams around every sub-layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ds4jax.config import ModelConfig
from ds4jax.formats.quant import linear, wide
from ds4jax.model.norm import rms_norm
from ds4jax.model.weights import HyperConnection

Array = jax.Array


def _project(X: Array, hc: HyperConnection, cfg: ModelConfig) -> Array:
    """hc.fn · rms(flatten(X)): X (..., N, E) → (..., out), float32 at least."""
    flat = X.reshape(*X.shape[:-2], -1).astype(wide(X.dtype))
    return linear(rms_norm(flat, cfg.norm_eps), hc.fn)


def sinkhorn(C: Array, iterations: int, eps: float) -> Array:
    """Scale C (..., N, N) towards a doubly stochastic matrix: columns first, then rows and columns in turn."""

    def rows_then_columns(_, C: Array) -> Array:
        C = C / (C.sum(-1, keepdims=True) + eps)
        return C / (C.sum(-2, keepdims=True) + eps)

    C = C / (C.sum(-2, keepdims=True) + eps)
    return lax.fori_loop(0, iterations - 1, rows_then_columns, C)


def mixes(X: Array, hc: HyperConnection, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """X (..., N, E) → pre (..., N), post (..., N), C (..., N, N), float32 at least.

    The sub-layer reads u = Σ pre_i X_i; its output y gives X'_k = post_k y + Σ_j C[j, k] X_j.
    """
    N = cfg.n_streams
    m = _project(X, hc, cfg)
    scale, base = hc.scale.astype(m.dtype), hc.base.astype(m.dtype)
    pre = jax.nn.sigmoid(m[..., :N] * scale[0] + base[:N]) + cfg.hc_eps
    post = 2 * jax.nn.sigmoid(m[..., N : 2 * N] * scale[1] + base[N : 2 * N])
    C = (m[..., 2 * N :] * scale[2] + base[2 * N :]).reshape(*m.shape[:-1], N, N)
    C = sinkhorn(jax.nn.softmax(C, axis=-1) + cfg.hc_eps, cfg.sinkhorn_iters, cfg.hc_eps)
    return pre, post, C


def collapse(X: Array, pre: Array) -> Array:
    """Σ pre_i X_i: X (..., N, E), pre (..., N) → (..., E) in X's dtype."""
    return jnp.sum(pre[..., None] * X.astype(pre.dtype), axis=-2).astype(X.dtype)


def expand(X: Array, y: Array, post: Array, C: Array) -> Array:
    """X'_k = post_k y + Σ_j C[j, k] X_j: y (..., E) → (..., N, E) in X's dtype."""
    # N is so small that sums of products, which compile to one pass over X, are faster than matrix products.
    wide_X = X.astype(C.dtype)
    mixed = sum(C[..., j, :, None] * wide_X[..., j, None, :] for j in range(X.shape[-2]))
    return (mixed + post[..., None] * y.astype(post.dtype)[..., None, :]).astype(X.dtype)


def connect(
    X: Array, hc: HyperConnection, norm: Array, F: Callable[[Array], tuple[Array, Any]], cfg: ModelConfig
) -> tuple[Array, Any]:
    """A sub-layer F between its hyper-connections: X (B, T, N, E) → the same, and whatever else F returns.

    F: the normed input (B, T, E) → (output (B, T, E), anything). norm: its weight (E).
    """
    pre, post, C = mixes(X, hc, cfg)
    y, extra = F(rms_norm(collapse(X, pre), cfg.norm_eps, norm))
    return expand(X, y, post, C), extra


def head_collapse(X: Array, hc: HyperConnection, cfg: ModelConfig) -> Array:
    """The output head's own collapse: X (..., N, E) → (..., E)."""
    m = _project(X, hc, cfg)
    pre = jax.nn.sigmoid(m * hc.scale.astype(m.dtype) + hc.base.astype(m.dtype)) + cfg.hc_eps
    return collapse(X, pre)
