"""IQ4_NL: 4-bit codes of 16 uneven values, one scale per 32. Layout: ggml's ``block_iq4_nl``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import unpack
from ds4jax.formats.iq import VALUES
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array


@struct.dataclass
class IQ4_NL(ReadOnly):
    """w = d·VALUES[q], blocks of 32.

    d: float16. q: uint32, eight codes per word, in the order of Q4_0.
    """

    ggml_type = GGMLType.IQ4_NL
    planes = {"d": (np.float16, 2), "q": (np.uint32, 16)}
    d: Array
    q: Array

    @staticmethod
    def _decode(d, q):
        return d.astype(jnp.float32) * jnp.asarray(VALUES)[unpack(q, 4, run=16)]
