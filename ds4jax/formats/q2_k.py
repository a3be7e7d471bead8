"""Q2_K: 2-bit codes in groups of 16, with a 4-bit scale and minimum each. Layout: ggml's ``block_q2_K``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats import k_quant
from ds4jax.formats.base import Quantized, bytes_of, pack_bits, random_bits, words_of
from ds4jax.formats.search import F16_MAX

Array = jax.Array


@struct.dataclass
class Q2_K(Quantized):
    """w = (d·sc)·q − (dmin·m), in super-blocks of 256 with 16 groups of 16.

    scales: uint32, four groups per word, each a byte sc | m << 4. q: uint32, sixteen 2-bit codes per word.
    dm: float16, d and dmin of each super-block.
    """

    ggml_type = GGMLType.Q2_K
    planes = {"scales": (np.uint32, 16), "q": (np.uint32, 64), "dm": (np.float16, 4)}
    largest = F16_MAX * 15
    scales: Array
    q: Array
    dm: Array

    @staticmethod
    def _decode(scales, q, dm):
        lead = (*dm.shape[:-1], dm.shape[-1] // 2)
        scales = bytes_of(scales).reshape(*lead, 16)
        # A run of 32 bytes holds eight groups: bits 0-1 of the bytes, then bits 2-3, 4-5, 6-7.
        bytes_ = bytes_of(q).reshape(*lead, 2, 1, 32)
        q = (bytes_ >> jnp.array([0, 2, 4, 6], jnp.uint32)[:, None]) & 3
        return k_quant.decode(dm, scales & 15, scales >> 4, q.reshape(*lead, 16, 16))

    @classmethod
    def random(cls, key, shape, std):
        keys, shapes = jax.random.split(key, 3), cls.plane_shapes(shape)
        return cls(
            scales=random_bits(keys[0], shapes["scales"], np.uint32),
            q=random_bits(keys[1], shapes["q"], np.uint32),
            dm=k_quant.random_dm(keys[2], shapes["dm"], std, top=3, top_scale=15),
        )

    @staticmethod
    def quantize_blocks(x, importance):
        d, dmin, sc, m, q = k_quant.quantize_blocks(x, importance, group=16, top=3, top_scale=15)
        # Eight groups share 32 bytes, two for each pair of bits.
        q = pack_bits(jnp.swapaxes(q.reshape(-1, 2, 4, 32), -1, -2), 2)
        return {"scales": words_of(sc | m << 4), "q": words_of(q), "dm": jnp.stack([d, dmin], axis=-1)}
