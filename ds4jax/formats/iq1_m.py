"""IQ1_M: ternary weights, moved by an eighth; eight share an index into a grid. Layout: ggml's ``block_iq1_m``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax import lax

from ds4jax.formats.base import bytes_of, mean_square, random_scales, scaled, unpack
from ds4jax.formats.iq import grid_of
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array

GRID = grid_of(GGMLType.IQ1_M)
PARTS = np.array([0, 4, 8, 12], np.uint32)  # where each of the four parts of d lies in it


@struct.dataclass
class IQ1_M(ReadOnly):
    """w = (d·(1 + 2 s))·(grid[g] ± ⅛), groups of 16 with a 3-bit scale s, in super-blocks of 256.

    q: uint32, the low bytes of the indices g of 8 weights each. high: uint32, for each g four bits: its upper three,
    and whether the eighth is subtracted. scales: uint16 per 64 weights, four s and in the top four bits a part of d,
    whose float16 begins in the last of a super-block's four.
    """

    ggml_type = GGMLType.IQ1_M
    planes = {"q": (np.uint32, 32), "high": (np.uint32, 16), "scales": (np.uint16, 8)}
    q: Array
    high: Array
    scales: Array

    @staticmethod
    def _decode(q, high, scales):
        parts = scales.astype(jnp.uint32)
        d = jnp.sum(parts >> 12 << PARTS, axis=-1, keepdims=True, dtype=jnp.uint32).astype(jnp.uint16)
        s = (parts[..., None] >> jnp.array([0, 3, 6, 9], jnp.uint32)) & 7
        high = unpack(high, 4)
        eighths = jnp.where(high >> 3 == 0, jnp.float32(1 / 8), jnp.float32(-1 / 8))
        values = jnp.asarray(GRID)[bytes_of(q) | (high & 7) << 8] + eighths[..., None]
        s = s.reshape(*parts.shape[:-1], -1) * 2 + 1
        return scaled(lax.bitcast_convert_type(d, jnp.float16), s, values)

    @classmethod
    def random_scales(cls, key, planes, std):
        scales = planes["scales"].reshape(*planes["scales"].shape[:-1], -1, 4)
        # The mean of (1 + 2 s)² over s = 0 … 7.
        scale_square = 4 * mean_square(8) + 4 * 7 / 2 + 1
        d = random_scales(key, (*scales.shape[:-1], 1), std / (scale_square * (np.mean(GRID**2) + 1 / 64)) ** 0.5)
        d = lax.bitcast_convert_type(d.astype(jnp.float16), jnp.uint16).astype(jnp.uint32)
        parts = (d >> PARTS << 12).astype(jnp.uint16)
        return {"scales": (scales & 0xFFF | parts).reshape(planes["scales"].shape)}
