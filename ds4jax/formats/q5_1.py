"""Q5_1: 5-bit codes, a scale and an offset per 32 weights. Layout: ggml's ``block_q5_1``."""

from __future__ import annotations

import jax
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import unpack
from ds4jax.formats.read_only import ReadOnly, random_dm, with_minimum

Array = jax.Array


@struct.dataclass
class Q5_1(ReadOnly):
    """w = d·q + m, blocks of 32.

    dm: float16, d and m of each block. high, q: the codes, as in Q5_0.
    """

    ggml_type = GGMLType.Q5_1
    planes = {"dm": (np.float16, 4), "high": (np.uint32, 4), "q": (np.uint32, 16)}
    dm: Array
    high: Array
    q: Array

    @staticmethod
    def _decode(dm, high, q):
        return with_minimum(dm, unpack(q, 4, run=16) | unpack(high, 1) << 4)

    @classmethod
    def random_scales(cls, key, planes, std):
        return {"dm": random_dm(key, planes["dm"].shape, std, top=31)}
