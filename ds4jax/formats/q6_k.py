"""Q6_K: 6-bit codes in groups of 16, with an 8-bit scale each. Layout: ggml's ``block_q6_K``."""

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


# ---- in kernels: four words of q are a unit, whose low and whose high nibbles are a group --------------------
def _load(rows: Rows, unit: Array):
    of_q = unit & 3  # of the four units of a run of 64 bytes; they share 32 bytes of high, of which each has some bits
    codes = rows.several(0, unit, 4)
    high = [word >> (of_q & 2).astype(jnp.uint32) for word in rows.several(1, (unit >> 2) * 2 + (unit & 1), 4)]
    scales = [rows.at(2, (unit >> 2) * 8 + of_q + 4 * group) for group in (0, 1)]
    return list(zip(codes, high, strict=True)), scales, rows.at(3, unit >> 3)


def _words(ready, group: int, _) -> list[Array]:
    low, high = 4 * group, 4 - 4 * group
    return [centred(q >> low & u32(0x0F0F0F0F) | shift(h, high) & u32(0x30303030), 32) for q, h in ready[0]]


def _scale(loaded, group: int) -> Array:
    _, scales, d = loaded
    return d.astype(jnp.float32) * scales[group].astype(jnp.float32)


_UNITS = Units(_load, _words, _scale, groups=2, order=(7, 5, 4, 6, 3, 2, 1, 0))


@struct.dataclass
class Q6_K(ReadOnly):
    """w = (d·sc)·(q − 32), in super-blocks of 256 with 16 groups of 16.

    q: uint32, the low four bits of eight codes per word: of each run of 64 bytes the low nibbles, then the high ones.
    high: uint32, the upper two bits of sixteen codes per word: of each run of 32 bytes bits 0-1, then 2-3, 4-5, 6-7.
    scales: int8, the sc. d: float16 per super-block.
    """

    ggml_type = GGMLType.Q6_K
    planes = {"q": (np.uint32, 128), "high": (np.uint32, 64), "scales": (np.int8, 16), "d": (np.float16, 2)}
    for_matmul, for_experts, for_grouped_gemm = _UNITS.runs, _UNITS.dots, _UNITS.tiles
    q: Array
    high: Array
    scales: Array
    d: Array

    @staticmethod
    def _decode(q, high, scales, d):
        codes = unpack(q, 4, run=64) | unpack(high, 2, run=32) << 4
        return scaled(d, scales, codes.astype(jnp.float32) - 32)
