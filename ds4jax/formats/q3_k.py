"""Q3_K: 3-bit codes in groups of 16, with a 6-bit scale each. Layout: ggml's ``block_q3_K``."""

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
class Q3_K(ReadOnly):
    """w = (d·(sc − 32))·(q − 4), in super-blocks of 256 with 16 groups of 16.

    high: uint32, whose byte j has in bit i the upper bit of code 32 i + j. q: uint32, the low two bits of sixteen
    codes per word, in the order of Q2_K. scales: uint32, three words: bytes 0-7 hold the low nibbles of sc[0:8] and, on
    top, of sc[8:16]; bytes 8-11 the high two bits of sc[0:4], sc[4:8], sc[8:12], sc[12:16]. d: float16 per super-block.
    """

    ggml_type = GGMLType.Q3_K
    planes = {"high": (np.uint32, 32), "q": (np.uint32, 64), "scales": (np.uint32, 12), "d": (np.float16, 2)}
    high: Array
    q: Array
    scales: Array
    d: Array

    @staticmethod
    def _decode(high, q, scales, d):
        sc = unpack(scales[..., :2], 4, run=8) | unpack(scales[..., 2:], 2, run=4) << 4
        codes = unpack(q, 2, run=32) | unpack(high, 1, run=32) << 2
        return scaled(d, sc.astype(jnp.float32) - 32, codes.astype(jnp.float32) - 4)
