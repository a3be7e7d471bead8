"""Q5_0: 5-bit codes, one scale per 32 weights. Layout: ggml's ``block_q5_0``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import unpack
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array


@struct.dataclass
class Q5_0(ReadOnly):
    """w = d·(q − 16), blocks of 32.

    d: float16. high: uint32, whose bit i is bit 4 of code i. q: uint32, the low four bits of eight codes per word, in
    the order of Q4_0.
    """

    ggml_type = GGMLType.Q5_0
    planes = {"d": (np.float16, 2), "high": (np.uint32, 4), "q": (np.uint32, 16)}
    d: Array
    high: Array
    q: Array

    @staticmethod
    def _decode(d, high, q):
        codes = unpack(q, 4, run=16) | unpack(high, 1) << 4
        return d.astype(jnp.float32) * (codes.astype(jnp.float32) - 16)
