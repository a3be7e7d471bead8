"""IQ2_XS: 2 bits a weight; eight weights share an index into a grid. Layout: ggml's ``block_iq2_xs``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import bits, scaled, unpack
from ds4jax.formats.iq import SIGNS, grid_of, signed_points, spread, units_of_points
from ds4jax.formats.read_only import ReadOnly
from pallas_kernels.formats.units import Rows

Array = jax.Array

GRID = grid_of(GGMLType.IQ2_XS)


# ---- in kernels: two words of q are a unit, each of them a group ---------------------------------------------
def _load(rows: Rows, unit: Array):
    scales = rows.at(2, unit >> 2) >> (8 * (unit & 3)).astype(jnp.uint32)
    return rows.several(1, unit, 2), scales, rows.at(0, unit >> 3)


def _look_up(loaded, table):
    q = [half for word in loaded[0] for half in (word, word >> 16)]
    return [(table[(half & 511).astype(jnp.int32)], half >> 9 & 127) for half in q]


_UNITS = units_of_points(_load, _look_up, GRID, spread)


@struct.dataclass
class IQ2_XS(ReadOnly):
    """w = (d·(½ + s)/4)·grid[g]·sign, groups of 16 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. q: uint32 per 16 weights, of each 8 the index g in 9 bits and a number of SIGNS in 7.
    scales: uint32, eight s per word.
    """

    ggml_type = GGMLType.IQ2_XS
    planes = {"d": (np.float16, 2), "q": (np.uint32, 64), "scales": (np.uint32, 8)}
    for_matmul, for_experts, for_grouped_gemm = _UNITS.runs, _UNITS.dots, _UNITS.tiles
    d: Array
    q: Array
    scales: Array

    @staticmethod
    def _decode(d, q, scales):
        q = bits(q, 16).reshape(*q.shape[:-1], -1)
        values = signed_points(GRID, q & 511, jnp.asarray(SIGNS)[q >> 9])
        return scaled(d, (unpack(scales, 4).astype(jnp.float32) + 0.5) / 4, values)
