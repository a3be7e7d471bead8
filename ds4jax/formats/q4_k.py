"""Q4_K: 4-bit codes in groups of 32, with a 6-bit scale and minimum each. Layout: ggml's ``block_q4_K``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats import k_quant
from ds4jax.formats.base import Quantized, bits, bytes_of, random_bits, words_of
from ds4jax.formats.search import F16_MAX

Array = jax.Array


@struct.dataclass
class Q4_K(Quantized):
    """w = (d·sc)·q − (dmin·m), in super-blocks of 256 with 8 groups of 32.

    dm: float16, d and dmin of each super-block. scales: uint32, three words (12 bytes) of 6-bit sc and m.
    q: uint32, eight 4-bit codes per word.
    """

    ggml_type = GGMLType.Q4_K
    planes = {"dm": (np.float16, 4), "scales": (np.uint32, 12), "q": (np.uint32, 128)}
    largest = F16_MAX * 63
    dm: Array
    scales: Array
    q: Array

    @staticmethod
    def _decode(dm, scales, q):
        lead = (*dm.shape[:-1], dm.shape[-1] // 2)
        # Bytes 0-3 hold the low 6 bits of sc[0:4] and the high bits of sc[4:8]; bytes 4-7 the same for m; bytes 8-11
        # the low nibbles of sc[4:8] and m[4:8].
        lo_sc, lo_m, hi = (bits(scales.reshape(*lead, 3)[..., i], 8) for i in range(3))
        sc = jnp.concatenate([lo_sc & 63, (hi & 15) | (lo_sc >> 2 & 48)], axis=-1)
        m = jnp.concatenate([lo_m & 63, (hi >> 4) | (lo_m >> 2 & 48)], axis=-1)
        # A run of 32 bytes holds two groups: the low nibbles, then the high ones.
        bytes_ = bytes_of(q).reshape(*lead, 4, 1, 32)
        q = (bytes_ >> jnp.array([0, 4], jnp.uint32)[:, None]) & 15
        return k_quant.decode(dm, sc, m, q.reshape(*lead, 8, 32))

    @classmethod
    def random(cls, key, shape, std):
        keys, shapes = jax.random.split(key, 3), cls.plane_shapes(shape)
        return cls(
            dm=k_quant.random_dm(keys[0], shapes["dm"], std, top=15, top_scale=63),
            scales=random_bits(keys[1], shapes["scales"], np.uint32),
            q=random_bits(keys[2], shapes["q"], np.uint32),
        )

    @staticmethod
    def quantize_blocks(x, importance):
        d, dmin, sc, m, q = k_quant.quantize_blocks(x, importance, group=32, top=15, top_scale=63)
        # The layout is that of `_decode`.
        low, high = (v[:, :4] | v[:, 4:] >> 4 << 6 for v in (sc, m))
        rest = sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4
        q = q.reshape(-1, 4, 2, 32)
        return {
            "dm": jnp.stack([d, dmin], axis=-1),
            "scales": words_of(jnp.concatenate([low, high, rest], axis=-1)),
            "q": words_of(q[:, :, 0] | q[:, :, 1] << 4),
        }
