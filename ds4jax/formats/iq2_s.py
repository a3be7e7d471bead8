"""IQ2_S: 2 bits a weight; eight weights share an index into a grid. Layout: ggml's ``block_iq2_s``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import bytes_of, scaled, unpack
from ds4jax.formats.iq import grid_of, signed_points
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array

GRID = grid_of(GGMLType.IQ2_S)


@struct.dataclass
class IQ2_S(ReadOnly):
    """w = (d·(½ + s)/4)·grid[g]·sign, groups of 16 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. q: uint32, the low bytes of the indices g of 8 weights each. signs: uint32, a bit per
    weight. high: uint32, the upper two bits of each g. scales: uint32, eight s per word.
    """

    ggml_type = GGMLType.IQ2_S
    planes = {
        "d": (np.float16, 2),
        "q": (np.uint32, 32),
        "signs": (np.uint32, 32),
        "high": (np.uint32, 8),
        "scales": (np.uint32, 8),
    }
    d: Array
    q: Array
    signs: Array
    high: Array
    scales: Array

    @staticmethod
    def _decode(d, q, signs, high, scales):
        values = signed_points(GRID, bytes_of(q) | unpack(high, 2) << 8, bytes_of(signs))
        return scaled(d, (unpack(scales, 4).astype(jnp.float32) + 0.5) / 4, values)
