"""IQ1_S: ternary weights, moved by an eighth; eight share an index into a grid. Layout: ggml's ``block_iq1_s``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import bytes_of, scaled
from ds4jax.formats.iq import grid_of
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array

GRID = grid_of(GGMLType.IQ1_S)


@struct.dataclass
class IQ1_S(ReadOnly):
    """w = (d·(1 + 2 s))·(grid[g] ± ⅛), groups of 32 with a 3-bit scale s and one sign, in super-blocks of 256.

    d: float16 per super-block. q: uint32, the low bytes of the indices g of 8 weights each. high: uint16 per group, the
    upper three bits of its four g, s, and in bit 15 whether the eighth is subtracted.
    """

    ggml_type = GGMLType.IQ1_S
    planes = {"d": (np.float16, 2), "q": (np.uint32, 32), "high": (np.uint16, 16)}
    d: Array
    q: Array
    high: Array

    @staticmethod
    def _decode(d, q, high):
        high = high.astype(jnp.uint32)
        upper = (high[..., None] >> jnp.array([0, 3, 6, 9], jnp.uint32)) & 7
        index = bytes_of(q) | upper.reshape(*q.shape[:-1], -1) << 8
        eighths = jnp.where(high >> 15 == 0, jnp.float32(1 / 8), jnp.float32(-1 / 8))
        values = jnp.asarray(GRID)[index].reshape(*high.shape, 32) + eighths[..., None]
        return scaled(d, (high >> 12 & 7) * 2 + 1, values)
