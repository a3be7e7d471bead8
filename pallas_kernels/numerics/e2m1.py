"""E2M1 numbers (FP4; OCP Microscaling Formats 1.0): a sign, two bits of exponent, one of mantissa."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float16, Float32, Int32, Integer, UInt8, UInt32

from pallas_kernels.numerics import scale

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of codes 0 … 7; 8 … 15 are their negatives
BLOCK = 32  # values of an index key that share a scale
MAX = 6.0
FLOOR = MAX * 2.0**-126  # a block's largest magnitude counts as this at least, so that no scale is subnormal


def exponent(amax: Float[Array, "*s"]) -> Int32[Array, "*s"]:
    """Biased exponents of the scales of blocks with these largest magnitudes."""
    return scale.biased_exponent(amax, FLOOR, MAX)


def encode(scaled: Float[Array, "*s"], dtype: DTypeLike) -> Integer[Array, "*s"]:
    """Values over their scale → the nearest codes 0 … 15 in `dtype`; a tie goes to the even code."""
    # So the thresholds alternate between > and >=.
    a = jnp.abs(scaled)
    code = sum((a > t).astype(dtype) for t in (0.25, 1.25, 2.5, 5.0))
    code = code + sum((a >= t).astype(dtype) for t in (0.75, 1.75, 3.5))
    return code | (scaled < 0).astype(dtype) << 3


def encode_blocks(x: Float[Array, "*s n"], dtype: DTypeLike) -> tuple[Integer[Array, "*s n"], UInt8[Array, "*s"]]:
    """Blocks of n values that share one scale → codes, and biased exponents."""
    exponents = exponent(jnp.max(jnp.abs(x), axis=-1))
    return encode(x * scale.inverse_power_of_two(exponents, x.dtype)[..., None], dtype), exponents.astype(jnp.uint8)


def rounded(x: Float32[Array, "*s n"]) -> Float32[Array, "*s n"]:
    """Blocks with one scale each → the values of their codes: `encode_blocks` and back, in fewer instructions."""
    bits = exponent(jnp.max(jnp.abs(x), axis=-1, keepdims=True)) << 23
    one = lax.bitcast_convert_type(bits, jnp.float32)
    # E2M1 steps by half of a value's power of two, and of no less than the scale. Such a step is the last bit of any
    # float near 1.5 · 2²² powers: adding that number rounds, to even.
    power = lax.bitcast_convert_type(
        lax.bitcast_convert_type(jnp.maximum(jnp.abs(x), one), jnp.int32) & 0x7F800000, jnp.float32
    )
    shift = power * jnp.float32(1.5 * 2**22)
    return (x + shift) - shift


# A code is sign, 2 bits of exponent, 1 of mantissa. Put where float16 has these, it is 2⁻¹⁴ of its value, the subnormal
# 0.5 included.
HALF_SCALE = 2.0**14


def half(code: Integer[Array, "*s"]) -> Float16[Array, "*s"]:
    """Codes 0 … 15, integers of 32 bits → values, HALF_SCALE times too small."""
    bits = (code & 7) << 9 | (code & 8) << 12
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)


def decode(code: Integer[Array, "*s"], dtype: DTypeLike) -> Float[Array, "*s"]:
    """Codes 0 … 15 → values."""
    return (half(code.astype(jnp.uint32)).astype(jnp.float32) * HALF_SCALE).astype(dtype)


def decode_blocks(
    code: Integer[Array, "*s n"], exponents: Integer[Array, "*s"], dtype: DTypeLike
) -> Float[Array, "*s n"]:
    """The inverse of `encode_blocks`, in `dtype`."""
    return decode(code, dtype) * scale.power_of_two(exponents, dtype)[..., None]


def decode_scaled(code: UInt32[Array, "*s"], biased_exponent: Int32[Array, "*#s"]) -> Float32[Array, "*s"]:
    """Codes times 2^(biased_exponent − 127), put together from bits.

    Integer arithmetic, because a backend may flush the subnormal results of a product to zero; overflow gives ±inf as
    the product would. A zero is positive whatever the code's sign says, as in ggml.
    """
    exponent, mantissa = (code >> 1 & 3).astype(jnp.int32), code & 1
    # Code 0 is zero and code 1 is 0.5, the one subnormal: 1.0 · 2^-1. Otherwise (1 + mantissa/2) · 2^(exponent - 1).
    subnormal_code = code & 7 == 1
    field = biased_exponent + jnp.where(subnormal_code, -1, exponent - 1)
    significand = jnp.where(mantissa.astype(bool) & ~subnormal_code, jnp.uint32(0xC00000), jnp.uint32(0x800000))
    normal = (jnp.clip(field, 1, 254).astype(jnp.uint32) << 23) | (significand & jnp.uint32(0x7FFFFF))
    subnormal = significand >> jnp.clip(1 - field, 0, 24).astype(jnp.uint32)
    bits = jnp.where(field >= 255, jnp.uint32(0x7F800000), jnp.where(field >= 1, normal, subnormal))
    bits = jnp.where(code & 7 == 0, jnp.uint32(0), bits)
    sign = jnp.where(code & 7 == 0, jnp.uint32(0), (code >> 3) << 31)
    return lax.bitcast_convert_type(bits | sign, jnp.float32)
