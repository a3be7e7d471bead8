"""TQ1_0: ternary weights, five to a byte, one scale per 256. Layout: ggml's ``block_tq1_0``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import bytes_of
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array


def _codes(bytes_: Array, n: int) -> Array:
    """uint32 bytes (..., m) → the first code of each, then the second of each, to the n-th: (..., n m)."""
    powers = jnp.array([3**i for i in range(n)], jnp.uint32)[:, None]
    codes = (bytes_[..., None, :] * powers & 255) * 3 >> 8
    return codes.reshape(*bytes_.shape[:-1], -1)


@struct.dataclass
class TQ1_0(ReadOnly):
    """w = d·(q − 1), blocks of 256.

    q: uint32, 48 bytes of five codes: weights 0-159 are the first codes of bytes 0-31, then the second ones and so on;
    weights 160-239 those of bytes 32-47 likewise. high: uint32, four bytes of four codes, weights 240-255. d: float16.

    A byte b with codes q₀, q₁, … is about 256·(q₀/3 + q₁/9 + …): code i is the whole part of 3·(3ⁱ b mod 256) / 256.
    """

    ggml_type = GGMLType.TQ1_0
    planes = {"q": (np.uint32, 48), "high": (np.uint32, 4), "d": (np.float16, 2)}
    q: Array
    high: Array
    d: Array

    @staticmethod
    def _decode(q, high, d):
        q, high = bytes_of(q), bytes_of(high)
        codes = jnp.concatenate([_codes(q[..., :32], 5), _codes(q[..., 32:], 5), _codes(high, 4)], axis=-1)
        return d.astype(jnp.float32) * (codes.astype(jnp.float32) - 1)
