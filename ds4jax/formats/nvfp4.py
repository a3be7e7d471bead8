"""NVFP4: E2M1 values with an E4M3 scale per 16. Layout: ggml's ``block_nvfp4``."""

from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import random_scales, scaled, unpack
from ds4jax.formats.read_only import ReadOnly

Array = jax.Array


def _scales() -> np.ndarray:
    exponent, mantissa = np.arange(256) >> 3 & 15, np.arange(256) & 7
    scales = np.ldexp(np.where(exponent > 0, mantissa + 8, mantissa).astype(np.float32), np.maximum(exponent, 1) - 11)
    scales[0x7F] = 0
    return scales


# Half the E4M3 number of every byte, whose sign does not count; NaN, 0x7F, is 0. And twice the 16 E2M1 numbers.
SCALES = _scales()
VALUES = np.array(gguf.quants.NVFP4.kvalues, np.float32)


@struct.dataclass
class NVFP4(ReadOnly):
    """w = SCALES[d]·E2M1(q), blocks of 64 with 4 groups of 16.

    d: uint8 per group. q: uint32, eight codes per word: of each group's eight bytes the low nibbles, then the
    high ones.
    """

    ggml_type = GGMLType.NVFP4
    planes = {"d": (np.uint8, 4), "q": (np.uint32, 32)}
    d: Array
    q: Array

    @staticmethod
    def _decode(d, q):
        return scaled(jnp.float32(1), jnp.asarray(SCALES)[d], jnp.asarray(VALUES)[unpack(q, 4, run=8)])

    @classmethod
    def random_scales(cls, key, planes, std):
        scales = random_scales(key, planes["d"].shape, std / float(np.mean(VALUES**2)) ** 0.5)
        halfway = (SCALES[1:127] + SCALES[:126]) / 2
        return {"d": jnp.searchsorted(jnp.asarray(halfway), scales).astype(jnp.uint8)}
