"""IQ3_XXS: 3 bits a weight; four weights share an index into a grid. Layout: ggml's ``block_iq3_xxs``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import bytes_of, scaled
from ds4jax.formats.iq import grid_of, sign_bytes, signed_points, spread
from ds4jax.formats.read_only import ReadOnly
from pallas_kernels.formats.tiles import u32
from pallas_kernels.formats.units import Rows, Units

Array = jax.Array

GRID = grid_of(GGMLType.IQ3_XXS)


# ---- in kernels: 32 weights of a scale are a unit, a point of the grid four bytes ----------------------------
def _load(rows: Rows, unit: Array):
    return rows.several(1, unit, 2), rows.at(2, unit), rows.at(0, unit >> 3)


def _look_up(loaded, table):
    q, signs, _ = loaded
    points = [table[(word >> 8 * i & 255).astype(jnp.int32)] for word in q for i in range(4)]
    return points, [signs >> 7 * i & 127 for i in range(4)]


def _words(ready, group: int, _) -> list[Array]:
    points, sets = ready
    # `spread` puts the signs of the first four weights into nibbles 0, 2, 4 and 6, those of the other four between.
    negative = [spread(s) >> start & u32(0x01010101) for s in sets for start in (2, 6)]
    return [(point ^ n * 255) + n for point, n in zip(points, negative, strict=True)]


def _scale(loaded, _) -> Array:
    _, signs, d = loaded
    return d.astype(jnp.float32) * ((signs >> 28).astype(jnp.float32) * 0.5 + 0.25)


_UNITS = Units(
    _load,
    _words,
    _scale,
    look_up=_look_up,
    table=tuple(GRID.astype(np.uint8).view(np.uint32).ravel().tolist()),
)


@struct.dataclass
class IQ3_XXS(ReadOnly):
    """w = (d·(½ + s)/2)·grid[g]·sign, groups of 32 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. q: uint32, four indices g of 4 weights each. signs: uint32 per 32 weights, four 7-bit
    numbers of SIGNS and s in the top 4 bits.
    """

    ggml_type = GGMLType.IQ3_XXS
    planes = {"d": (np.float16, 2), "q": (np.uint32, 64), "signs": (np.uint32, 32)}
    for_matmul, for_experts, for_grouped_gemm = _UNITS.runs, _UNITS.dots, _UNITS.tiles
    d: Array
    q: Array
    signs: Array

    @staticmethod
    def _decode(d, q, signs):
        values = signed_points(GRID, bytes_of(q), sign_bytes(signs))
        return scaled(d, ((signs >> 28).astype(jnp.float32) + 0.5) / 2, values)
