"""RMS normalisation."""

import jax
import jax.numpy as jnp
from jax import lax

from ds4jax.formats.quant import wide


def rms_norm(x: jax.Array, eps: float, weight: jax.Array | None = None) -> jax.Array:
    """x (..., n) over its root mean square, times weight (n). Computed in float32 at least, returned in x's dtype."""
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(y.dtype)
    return y.astype(x.dtype)
