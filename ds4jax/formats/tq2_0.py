"""TQ2_0: ternary weights in 2 bits each, one scale per 256. Layout: ggml's ``block_tq2_0``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import unpack
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array


@struct.dataclass
class TQ2_0(ReadOnly):
    """w = d·(q − 1), blocks of 256.

    q: uint32, sixteen codes per word: of each run of 32 bytes bits 0-1, then 2-3, 4-5, 6-7. d: float16.
    """

    ggml_type = GGMLType.TQ2_0
    planes = {"q": (np.uint32, 64), "d": (np.float16, 2)}
    q: Array
    d: Array

    @staticmethod
    def _decode(q, d):
        return d.astype(jnp.float32) * (unpack(q, 2, run=32).astype(jnp.float32) - 1)
