"""Q8_0: 8-bit codes, one scale per 32 weights. Layout: ggml (``ggml-common.h``, ``block_q8_0``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax import lax

from ds4jax.formats.base import Quantized, random_bits, random_scales
from ds4jax.formats.search import F16_MAX

Array = jax.Array


@struct.dataclass
class Q8_0(Quantized):
    """w = d·q. d: float16 per 32 weights. q: int8."""

    ggml_type = GGMLType.Q8_0
    planes = {"d": (np.float16, 2), "q": (np.int8, 32)}
    largest = F16_MAX * 127
    d: Array
    q: Array

    @staticmethod
    def _decode(d, q):
        q = q.reshape(*d.shape, 32).astype(jnp.float32)
        return q * d[..., None].astype(jnp.float32)

    @classmethod
    def random(cls, key, shape, std):
        of_d, of_q = jax.random.split(key)
        shapes = cls.plane_shapes(shape)
        d = random_scales(of_d, shapes["d"], std / (np.arange(-128, 128) ** 2).mean() ** 0.5)
        return cls(d=d.astype(jnp.float16), q=random_bits(of_q, shapes["q"], np.int8))

    @staticmethod
    def quantize_blocks(x, importance):
        """Rounds to nearest, with ggml's own roundings, bit for bit; `importance` is not used."""
        # The compiler would multiply by 1/127 if the divisor were the same for all blocks, and the barrier keeps it
        # from merging the two divisions.
        largest = jnp.max(jnp.abs(x), axis=-1)
        d = lax.optimization_barrier(largest / jnp.where(largest > 0, 127.0, 1.0))
        inverse = jnp.where(d == 0, 0.0, 1 / d)
        return {"d": d, "q": lax.round(x * inverse[..., None], lax.RoundingMethod.AWAY_FROM_ZERO)}
