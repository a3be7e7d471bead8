"""Q5_K: 5-bit codes in groups of 32, with a 6-bit scale and minimum each. Layout: ggml's ``block_q5_K``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats import k_quant
from ds4jax.formats.base import unpack
from ds4jax.formats.read_only import ReadOnly
from pallas_kernels.formats.tiles import shift, u32
from pallas_kernels.formats.units import Rows, Units

Array = jax.Array


# ---- in kernels: four words of q are a unit, whose low and whose high nibbles are of a group each ------------
def _load(rows: Rows, unit: Array):
    block, run = unit >> 3, unit >> 1 & 3  # two units are a run of 32 bytes, with two groups
    scales = k_quant.scales_of_two([rows.at(1, block * 3 + i) for i in range(3)], run)
    high = [word >> (2 * run).astype(jnp.uint32) for word in rows.several(2, block * 2 + (unit & 1), 4)]
    return list(zip(rows.several(3, unit, 4), high, strict=True)), scales, rows.several(0, block, 2)


def _words(ready, group: int, _) -> list[Array]:
    return [q >> 4 * group & u32(0x0F0F0F0F) | shift(h, 4 - group) & u32(0x10101010) for q, h in ready[0]]


def _scale(loaded, group: int, of: int = 0) -> Array:
    _, scales, dm = loaded
    return dm[of].astype(jnp.float32) * (scales[of] >> 8 * group & 255).astype(jnp.float32)


def _minimum(loaded, group: int) -> Array:
    return _scale(loaded, group, of=1)


_UNITS = Units(_load, _words, _scale, _minimum, groups=2, order=(7, 6, 4, 5, 3, 2, 1, 0))


@struct.dataclass
class Q5_K(ReadOnly):
    """w = (d·sc)·q − (dmin·m), in super-blocks of 256 with 8 groups of 32.

    dm: float16, d and dmin of each super-block. scales: uint32, three words of 6-bit sc and m, as in Q4_K.
    high: uint32, whose byte j has in bit i bit 4 of code 32 i + j. q: uint32, the low four bits of eight codes per
    word, in the order of Q4_K.
    """

    ggml_type = GGMLType.Q5_K
    planes = {"dm": (np.float16, 4), "scales": (np.uint32, 12), "high": (np.uint32, 32), "q": (np.uint32, 128)}
    for_matmul, for_experts, for_grouped_gemm = _UNITS.runs, _UNITS.dots, _UNITS.tiles
    dm: Array
    scales: Array
    high: Array
    q: Array

    @staticmethod
    def _decode(dm, scales, high, q):
        codes = unpack(q, 4, run=32) | unpack(high, 1, run=32) << 4
        return k_quant.decode(dm, *k_quant.scales_and_minima(scales), codes)

    @classmethod
    def random_scales(cls, key, planes, std):
        return {"dm": k_quant.random_dm(key, planes["dm"].shape, std, top=31, top_scale=63)}
