"""The activation of the experts in kernels: SwiGLU (arXiv:2002.05202), clamped."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32


def swiglu(gate: Float32[Array, "*s"], up: Float32[Array, "*s"], clamp: float) -> Float32[Array, "*s"]:
    """silu(min(gate, clamp)) · clip(up, -clamp, clamp)."""
    gate = jnp.minimum(gate, clamp)
    return gate / (1 + jnp.exp(-gate)) * jnp.clip(up, -clamp, clamp)
