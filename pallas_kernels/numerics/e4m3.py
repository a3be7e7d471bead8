"""E4M3 with one power of two per block, as key/value rows are stored (FP8: arXiv:2209.05433)."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Int32, Integer, UInt8

from pallas_kernels.numerics import scale

BLOCK = 64  # values that share a scale
MAX = 448.0
FLOOR = 1e-4  # a block's largest magnitude counts as this at least


def exponent(amax: Float[Array, "*s"]) -> Int32[Array, "*s"]:
    """Biased exponents of the scales of blocks with these largest magnitudes."""
    return scale.biased_exponent(amax, FLOOR, MAX)


def encode(scaled: Float[Array, "*s"]) -> Float8e4m3fn[Array, "*s"]:
    """Values over their scale → codes."""
    # Narrow through float32: every step is then one rounding on every backend.
    return scaled.astype(jnp.float32).astype(jnp.float8_e4m3fn)


def encode_blocks(x: Float[Array, "*s n"]) -> tuple[Float8e4m3fn[Array, "*s n"], UInt8[Array, "*s"]]:
    """Blocks of n values that share one scale → codes, and biased exponents."""
    exponents = exponent(jnp.max(jnp.abs(x), axis=-1))
    return encode(x * scale.inverse_power_of_two(exponents, x.dtype)[..., None]), exponents.astype(jnp.uint8)


def decode_blocks(
    codes: Float8e4m3fn[Array, "*s n"], exponents: Integer[Array, "*s"], dtype: DTypeLike
) -> Float[Array, "*s n"]:
    """The inverse of `encode_blocks`, in `dtype`, computed in it."""
    return codes.astype(dtype) * scale.power_of_two(exponents, dtype)[..., None]
