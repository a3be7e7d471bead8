"""Q6_K: 6-bit codes in groups of 16, with an 8-bit scale each. Layout: ggml's ``block_q6_K``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import scaled, unpack
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array


@struct.dataclass
class Q6_K(ReadOnly):
    """w = (d·sc)·(q − 32), in super-blocks of 256 with 16 groups of 16.

    q: uint32, the low four bits of eight codes per word: of each run of 64 bytes the low nibbles, then the high ones.
    high: uint32, the upper two bits of sixteen codes per word: of each run of 32 bytes bits 0-1, then 2-3, 4-5, 6-7.
    scales: int8, the sc. d: float16 per super-block.
    """

    ggml_type = GGMLType.Q6_K
    planes = {"q": (np.uint32, 128), "high": (np.uint32, 64), "scales": (np.int8, 16), "d": (np.float16, 2)}
    q: Array
    high: Array
    scales: Array
    d: Array

    @staticmethod
    def _decode(q, high, scales, d):
        codes = unpack(q, 4, run=64) | unpack(high, 2, run=32) << 4
        return scaled(d, scales, codes.astype(jnp.float32) - 32)
