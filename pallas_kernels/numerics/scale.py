"""Powers of two that blocks of values share: found, encoded and applied by bits, exact on every backend."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Integer

BIAS = 127  # of an exponent as it is stored, in 8 bits


def biased_exponent(amax: Float[Array, "*s"], floor: float, largest: float) -> Int32[Array, "*s"]:
    """ceil(log2(max(amax, floor) / largest)) + 127 of the largest magnitudes of blocks.

    By bits: a float log2 may round across an integer, and GPUs round a quotient in several ways.
    """
    bits = lax.bitcast_convert_type(jnp.maximum(amax.astype(jnp.float32), floor), jnp.int32)
    # A mantissa above that of `largest` carries into the exponent.
    return (bits - int(np.float32(largest).view(np.int32)) + 0x7FFFFF >> 23) + BIAS


def power_of_two(exponent: Integer[Array, "*s"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*s"]:
    """2^(exponent − 127) for 0 … 254, exact in float32; 0 gives 0 instead of 2^-127."""
    return lax.bitcast_convert_type(exponent.astype(jnp.int32) << 23, jnp.float32).astype(dtype)


def inverse_power_of_two(exponent: Integer[Array, "*s"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*s"]:
    """2^(127 − exponent)."""
    return power_of_two(2 * BIAS - exponent, dtype)
