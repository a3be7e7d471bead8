"""Q4_0: 4-bit codes, one scale per 32 weights. Layout: ggml's ``block_q4_0``."""

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
class Q4_0(ReadOnly):
    """w = d·(q − 8), blocks of 32.

    d: float16. q: uint32, eight codes per word; bytes 0-15 hold weights 0-15 in their low and 16-31 in their high
    nibbles.
    """

    ggml_type = GGMLType.Q4_0
    planes = {"d": (np.float16, 2), "q": (np.uint32, 16)}
    d: Array
    q: Array

    @staticmethod
    def _decode(d, q):
        return d.astype(jnp.float32) * (unpack(q, 4, run=16).astype(jnp.float32) - 8)
