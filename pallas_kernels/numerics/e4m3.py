"""E4M3 with one power of two per block, as key/value rows are stored (FP8: arXiv:2209.05433)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.numerics import scale

Array = jax.Array

BLOCK = 64  # values that share a scale
MAX = 448.0
FLOOR = 1e-4  # a block's largest magnitude counts as this at least


def exponent(amax: Array) -> Array:
    """Biased exponents of the scales of blocks with these largest magnitudes, int32."""
    return scale.biased_exponent(amax, FLOOR, MAX)


def encode(scaled: Array) -> Array:
    """Values over their scale → codes."""
    # Narrow through float32: every step is then one rounding on every backend.
    return scaled.astype(jnp.float32).astype(jnp.float8_e4m3fn)


def encode_blocks(x: Array) -> tuple[Array, Array]:
    """x (..., n), of which all n share one scale → codes (..., n), and biased exponents, uint8 (...)."""
    exponents = exponent(jnp.max(jnp.abs(x), axis=-1))
    return encode(x * scale.inverse_power_of_two(exponents, x.dtype)[..., None]), exponents.astype(jnp.uint8)


def decode_blocks(codes: Array, exponents: Array, dtype: DTypeLike) -> Array:
    """codes (..., n), of which all share one scale, and exponents (...) → (..., n) in `dtype`, computed in it."""
    return codes.astype(dtype) * scale.power_of_two(exponents, dtype)[..., None]
