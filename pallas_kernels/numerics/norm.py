"""RMS normalisation in kernels (arXiv:1910.07467)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


def inverse_rms(squares: Float[Array, "*s"], n: int, eps: float) -> Float[Array, "*s"]:
    """1 / √(mean x² + eps), of the sum of n squares."""
    return lax.rsqrt(squares / n + eps)


def rms_norm(x: Float32[Array, "*s n"], eps: float) -> Float32[Array, "*s n"]:
    """x over its root mean square."""
    return x * inverse_rms(jnp.sum(x * x, axis=-1, keepdims=True), x.shape[-1], eps)
