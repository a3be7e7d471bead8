"""MXFP4: E2M1 values with one power of two per 32 (OCP Microscaling Formats 1.0). Layout: ggml's ``block_mxfp4``."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax import lax

from ds4jax.formats.base import Quantized, bytes_of, random_bits, words_of
from ds4jax.formats.search import INVERTIBLE, error_weights, normalized, search

Array = jax.Array

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@struct.dataclass
class MXFP4(Quantized):
    """w = 2^(e − 127) · E2M1(q). e: uint8 per 32 weights, biased by 127. q: uint32, eight codes per word.

    Codes of a block: bytes 0-15 hold weights 0-15 in their low and 16-31 in their high nibbles.
    """

    ggml_type = GGMLType.MXFP4
    planes = {"e": (np.uint8, 1), "q": (np.uint32, 16)}
    largest = INVERTIBLE
    e: Array
    q: Array

    @staticmethod
    def _decode(e, q):
        bytes_ = bytes_of(q).reshape(*e.shape, 1, 16)
        code = (bytes_ >> jnp.array([0, 4], jnp.uint32)[:, None]) & 15
        return _e2m1_bits(code.reshape(*e.shape, 32), e.astype(jnp.int32)[..., None])

    @classmethod
    def random(cls, key, shape, std):
        """Of two neighbouring exponents, each as often as makes the mean square of the weights std²."""
        of_e, of_q = jax.random.split(key)
        shapes = cls.plane_shapes(shape)
        mantissa, exponent = math.frexp(std / math.sqrt(np.mean(np.square(_E2M1))))
        # (std / rms of the codes)² = 4^(exponent − 1) · (1 − p) + 4^exponent · p
        larger = jax.random.bernoulli(of_e, (4 * mantissa**2 - 1) / 3, shapes["e"])
        e = jnp.where(larger, 127 + exponent, 126 + exponent).astype(jnp.uint8)
        return cls(e=e, q=random_bits(of_q, shapes["q"], np.uint32))

    @staticmethod
    def quantize_blocks(x, importance):
        x, unit = normalized(x)
        w = error_weights(x, importance)

        def code(step):
            halfway = (_E2M1[1:] + _E2M1[:-1]) / 2
            return jnp.sum(jnp.abs(x)[..., None] > step[..., None, None] * halfway, axis=-1)

        # The largest magnitude lies in [1, 2): a step of ¼ puts it at 4 to 8, where 6 is the top.
        def evaluate(step):
            step = jnp.broadcast_to(step, unit.shape)
            error = jnp.abs(x) - step[..., None] * jnp.asarray(_E2M1)[code(step)]
            return jnp.sum(w * error**2, axis=-1), step

        (step,) = search(evaluate, np.array([1 / 4, 1 / 2, 1 / 8], np.float32))
        magnitude = code(step)
        # The biased exponent of unit · step. Below the format's range, the weights are 0.
        e = sum(lax.bitcast_convert_type(v, jnp.int32) >> 23 for v in (unit, step)) - 127
        magnitude = jnp.where(e[..., None] < 0, 0, magnitude).astype(jnp.uint32)
        codes = magnitude | ((x < 0) & (magnitude > 0)).astype(jnp.uint32) << 3
        return {"e": jnp.maximum(e, 0), "q": words_of(codes[:, :16] | codes[:, 16:] << 4)}


def _e2m1_bits(code: Array, biased_exponent: Array) -> Array:
    """E2M1 codes (uint32) times 2^(biased_exponent − 127) as float32, put together from bits.

    Integer arithmetic, because a backend may flush the subnormal results of a product to zero; overflow gives ±inf as
    the product would.
    """
    exponent, mantissa = (code >> 1 & 3).astype(jnp.int32), code & 1
    # Code 0 is zero and code 1 is 0.5, the one subnormal: 1.0 · 2^-1. Otherwise (1 + mantissa/2) · 2^(exponent - 1).
    half = code & 7 == 1
    field = biased_exponent + jnp.where(half, -1, exponent - 1)
    significand = jnp.where(mantissa.astype(bool) & ~half, jnp.uint32(0xC00000), jnp.uint32(0x800000))
    normal = (jnp.clip(field, 1, 254).astype(jnp.uint32) << 23) | (significand & jnp.uint32(0x7FFFFF))
    subnormal = significand >> jnp.clip(1 - field, 0, 24).astype(jnp.uint32)
    bits = jnp.where(field >= 255, jnp.uint32(0x7F800000), jnp.where(field >= 1, normal, subnormal))
    bits = jnp.where(code & 7 == 0, jnp.uint32(0), bits)
    # The reference's zero is positive whatever the code's sign says.
    sign = jnp.where(code & 7 == 0, jnp.uint32(0), (code >> 3) << 31)
    return lax.bitcast_convert_type(bits | sign, jnp.float32)
