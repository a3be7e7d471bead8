"""The activation of the experts in kernels: SwiGLU (arXiv:2002.05202), clamped."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def swiglu(gate: Array, up: Array, clamp: float) -> Array:
    """silu(min(gate, clamp)) · clip(up, -clamp, clamp), float32."""
    gate = jnp.minimum(gate, clamp)
    return gate / (1 + jnp.exp(-gate)) * jnp.clip(up, -clamp, clamp)
