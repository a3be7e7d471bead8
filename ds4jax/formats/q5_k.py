"""Q5_K: 5-bit codes in groups of 32, with a 6-bit scale and minimum each. Layout: ggml's ``block_q5_K``."""

from __future__ import annotations

import jax
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats import k_quant
from ds4jax.formats.base import unpack
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array


@struct.dataclass
class Q5_K(ReadOnly):
    """w = (d·sc)·q − (dmin·m), in super-blocks of 256 with 8 groups of 32.

    dm: float16, d and dmin of each super-block. scales: uint32, three words of 6-bit sc and m, as in Q4_K.
    high: uint32, whose byte j has in bit i bit 4 of code 32 i + j. q: uint32, the low four bits of eight codes per
    word, in the order of Q4_K.
    """

    ggml_type = GGMLType.Q5_K
    planes = {"dm": (np.float16, 4), "scales": (np.uint32, 12), "high": (np.uint32, 32), "q": (np.uint32, 128)}
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
