"""IQ4_XS: 4-bit codes of 16 uneven values, a 6-bit scale per 32. Layout: ggml's ``block_iq4_xs``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import scaled, unpack
from ds4jax.formats.iq import VALUES
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array


@struct.dataclass
class IQ4_XS(ReadOnly):
    """w = (d·(sc − 32))·VALUES[q], in super-blocks of 256 with 8 groups of 32.

    d: float16 per super-block. high: uint16, the upper two bits of each sc. low: uint32, the low four bits of each.
    q: uint32, eight codes per word, of each group in the order of Q4_0.
    """

    ggml_type = GGMLType.IQ4_XS
    planes = {"d": (np.float16, 2), "high": (np.uint16, 2), "low": (np.uint32, 4), "q": (np.uint32, 128)}
    d: Array
    high: Array
    low: Array
    q: Array

    @staticmethod
    def _decode(d, high, low, q):
        upper = high.astype(jnp.uint32) >> jnp.arange(0, 16, 2, dtype=jnp.uint32) & 3
        sc = unpack(low, 4) | upper << 4
        return scaled(d, sc.astype(jnp.float32) - 32, jnp.asarray(VALUES)[unpack(q, 4, run=16)])
