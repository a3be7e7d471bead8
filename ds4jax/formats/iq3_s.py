"""IQ3_S: 3 bits a weight; four weights share an index into a grid. Layout: ggml's ``block_iq3_s``."""

from __future__ import annotations

import jax
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import bytes_of, scaled, unpack
from ds4jax.formats.iq import grid_of, signed_points
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array

GRID = grid_of(GGMLType.IQ3_S)


@struct.dataclass
class IQ3_S(ReadOnly):
    """w = (d·(1 + 2 s))·grid[g]·sign, groups of 32 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. q: uint32, the low bytes of the indices g of 4 weights each. high: uint32, the upper bit
    of each g. signs: uint32, a bit per weight. scales: uint32, eight s.
    """

    ggml_type = GGMLType.IQ3_S
    planes = {
        "d": (np.float16, 2),
        "q": (np.uint32, 64),
        "high": (np.uint32, 8),
        "signs": (np.uint32, 32),
        "scales": (np.uint32, 4),
    }
    d: Array
    q: Array
    high: Array
    signs: Array
    scales: Array

    @staticmethod
    def _decode(d, q, high, signs, scales):
        values = signed_points(GRID, bytes_of(q) | unpack(high, 1) << 8, bytes_of(signs))
        return scaled(d, unpack(scales, 4) * 2 + 1, values)
