"""Q4_1: 4-bit codes, a scale and an offset per 32 weights. Layout: ggml's ``block_q4_1``."""

from __future__ import annotations

import jax
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import unpack
from ds4jax.formats.read_only import ReadOnly, random_dm, with_minimum

Array = jax.Array


@struct.dataclass
class Q4_1(ReadOnly):
    """w = d·q + m, blocks of 32.

    dm: float16, d and m of each block. q: uint32, eight codes per word, in the order of Q4_0.
    """

    ggml_type = GGMLType.Q4_1
    planes = {"dm": (np.float16, 4), "q": (np.uint32, 16)}
    dm: Array
    q: Array

    @staticmethod
    def _decode(dm, q):
        return with_minimum(dm, unpack(q, 4, run=16))

    @classmethod
    def random_scales(cls, key, planes, std):
        return {"dm": random_dm(key, planes["dm"].shape, std, top=15)}
