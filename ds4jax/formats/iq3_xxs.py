"""IQ3_XXS: 3 bits a weight; four weights share an index into a grid. Layout: ggml's ``block_iq3_xxs``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import bytes_of, scaled
from ds4jax.formats.iq import grid_of, sign_bytes, signed_points
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array

GRID = grid_of(GGMLType.IQ3_XXS)


@struct.dataclass
class IQ3_XXS(ReadOnly):
    """w = (d·(½ + s)/2)·grid[g]·sign, groups of 32 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. q: uint32, four indices g of 4 weights each. signs: uint32 per 32 weights, four 7-bit
    numbers of SIGNS and s in the top 4 bits.
    """

    ggml_type = GGMLType.IQ3_XXS
    planes = {"d": (np.float16, 2), "q": (np.uint32, 64), "signs": (np.uint32, 32)}
    d: Array
    q: Array
    signs: Array

    @staticmethod
    def _decode(d, q, signs):
        values = signed_points(GRID, bytes_of(q), sign_bytes(signs))
        return scaled(d, ((signs >> 28).astype(jnp.float32) + 0.5) / 2, values)
