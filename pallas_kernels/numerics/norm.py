"""RMS normalisation in kernels (arXiv:1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def inverse_rms(squares: Array, n: int, eps: float) -> Array:
    """1 / √(mean x² + eps), of the sum of n squares."""
    return lax.rsqrt(squares / n + eps)


def rms_norm(x: Array, eps: float) -> Array:
    """x (..., n) float32 over its root mean square."""
    return x * inverse_rms(jnp.sum(x * x, axis=-1, keepdims=True), x.shape[-1], eps)
