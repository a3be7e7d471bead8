"""IQ2_XS: 2 bits a weight; eight weights share an index into a grid. Layout: ggml's ``block_iq2_xs``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import scaled, unpack
from ds4jax.formats.iq import SIGNS, grid_of, signed_points
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array

GRID = grid_of(GGMLType.IQ2_XS)


@struct.dataclass
class IQ2_XS(ReadOnly):
    """w = (d·(½ + s)/4)·grid[g]·sign, groups of 16 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. q: uint16 per 8 weights, the index g in 9 bits and a number of SIGNS in the upper 7.
    scales: uint32, eight s per word.
    """

    ggml_type = GGMLType.IQ2_XS
    planes = {"d": (np.float16, 2), "q": (np.uint16, 64), "scales": (np.uint32, 8)}
    d: Array
    q: Array
    scales: Array

    @staticmethod
    def _decode(d, q, scales):
        values = signed_points(GRID, q & 511, jnp.asarray(SIGNS)[q >> 9])
        return scaled(d, (unpack(scales, 4).astype(jnp.float32) + 0.5) / 4, values)
