"""IQ2_S: 2 bits a weight; eight weights share an index into a grid. Layout: ggml's ``block_iq2_s``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import bytes_of, scaled, unpack
from ds4jax.formats.iq import grid_of, signed_points, spread_all, units_of_points
from ds4jax.formats.read_only import ReadOnly
from pallas_kernels.formats.units import Rows

Array = jax.Array

GRID = grid_of(GGMLType.IQ2_S)


# ---- in kernels: a word of q is a unit, half of it a group ---------------------------------------------------
def _load(rows: Rows, unit: Array):
    high, scales = (rows.at(plane, unit >> 2) >> (8 * (unit & 3)).astype(jnp.uint32) for plane in (3, 4))
    return (rows.at(1, unit), high, rows.at(2, unit)), scales, rows.at(0, unit >> 3)


def _look_up(loaded, table):
    (q, high, signs), *_ = loaded
    index = [q >> 8 * i & 255 | (high >> 2 * i & 3) << 8 for i in range(4)]
    return [(table[g.astype(jnp.int32)], signs >> 8 * i & 255) for i, g in enumerate(index)]


_UNITS = units_of_points(_load, _look_up, GRID, spread_all, step=128)


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
    for_matmul, for_experts, for_grouped_gemm = _UNITS.runs, _UNITS.dots, _UNITS.tiles
    d: Array
    q: Array
    signs: Array
    high: Array
    scales: Array

    @staticmethod
    def _decode(d, q, signs, high, scales):
        values = signed_points(GRID, bytes_of(q) | unpack(high, 2) << 8, bytes_of(signs))
        return scaled(d, (unpack(scales, 4).astype(jnp.float32) + 0.5) / 4, values)
