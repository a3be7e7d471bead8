"""Q3_K: 3-bit codes in groups of 16, with a 6-bit scale each. Layout: ggml's ``block_q3_K``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import scaled, unpack
from ds4jax.formats.read_only import ReadOnly
from pallas_kernels.formats.tiles import shift, u32
from pallas_kernels.formats.units import Rows, Units, centred

Array = jax.Array


# ---- in kernels: half the bits of four words of q are a unit, two bits of each byte a group ------------------
def _load(rows: Rows, unit: Array):
    block, run, half, sub = unit >> 3, *((unit >> i & 1).astype(jnp.uint32) for i in (2, 1, 0))
    codes = [word >> 4 * sub for word in rows.several(1, unit >> 1, 4)]
    high = [word >> 4 * run + 2 * sub for word in rows.several(0, block * 2 + (unit >> 1 & 1), 4)]
    # Bytes 0 and 2 are the scales of the unit's two groups: their low four bits, then their upper two.
    low_sc = rows.at(2, block * 3 + (unit & 1)) >> 8 * half + 4 * run & u32(0x000F000F)
    high_sc = rows.at(2, block * 3 + 2) >> 8 * half + 4 * run + 2 * sub & u32(0x00030003)
    return list(zip(codes, high, strict=True)), low_sc | high_sc << 4, rows.at(3, block)


def _words(ready, group: int, _) -> list[Array]:
    low, high = 2 * group, 2 - group
    return [centred(q >> low & u32(0x03030303) | shift(h, high) & u32(0x04040404), 4) for q, h in ready[0]]


def _scale(loaded, group: int) -> Array:
    _, scales, d = loaded
    return d.astype(jnp.float32) * ((scales >> 16 * group & 63).astype(jnp.float32) - 32)


_UNITS = Units(_load, _words, _scale, groups=2, order=(7, 4, 6, 5, 3, 2, 1, 0))


@struct.dataclass
class Q3_K(ReadOnly):
    """w = (d·(sc − 32))·(q − 4), in super-blocks of 256 with 16 groups of 16.

    high: uint32, whose byte j has in bit i the upper bit of code 32 i + j. q: uint32, the low two bits of sixteen
    codes per word, in the order of Q2_K. scales: uint32, three words: bytes 0-7 hold the low nibbles of sc[0:8] and, on
    top, of sc[8:16]; bytes 8-11 the high two bits of sc[0:4], sc[4:8], sc[8:12], sc[12:16]. d: float16 per super-block.
    """

    ggml_type = GGMLType.Q3_K
    planes = {"high": (np.uint32, 32), "q": (np.uint32, 64), "scales": (np.uint32, 12), "d": (np.float16, 2)}
    for_matmul, for_experts, for_grouped_gemm = _UNITS.runs, _UNITS.dots, _UNITS.tiles
    high: Array
    q: Array
    scales: Array
    d: Array

    @staticmethod
    def _decode(high, q, scales, d):
        sc = unpack(scales[..., :2], 4, run=8) | unpack(scales[..., 2:], 2, run=4) << 4
        codes = unpack(q, 2, run=32) | unpack(high, 1, run=32) << 2
        return scaled(d, sc.astype(jnp.float32) - 32, codes.astype(jnp.float32) - 4)
