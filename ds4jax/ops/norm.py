"""RMS normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ds4jax.numerics.precision import wide
from ds4jax.ops.weight import Weight


class Norm(NamedTuple):
    """An RMS norm: its weight (K) and epsilon."""

    weight: Weight
    eps: float

    def __call__(self, x: Float[Array, "*s K"]) -> Float[Array, "*s K"]:
        """x normalised."""
        return rms_norm(x, self.eps, self.weight.value)


def rms_norm(x: Float[Array, "*s K"], eps: float, weight: Float[Array, "K"] | None = None) -> Float[Array, "*s K"]:
    """x over its root mean square, times weight. Computed in float32 at least, returned in x's dtype."""
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(y.dtype)
    return y.astype(x.dtype)
