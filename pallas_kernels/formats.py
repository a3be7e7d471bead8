"""The values of quantized weights: planes, as `ds4jax.formats` describes them for each format → float32.

Planes are (..., rows, elements), in the order of its fields. All of this is plain XLA: for the model's own
reference path, for references of kernels, and for products that dequantize first. Layouts: ggml (``ggml-common.h``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


def _bits(words: Array, width: int) -> Array:
    """Split uint32 words into fields of `width` bits, lowest first: (..., n) → (..., n, 32 // width) uint32."""
    shifts = jnp.arange(0, 32, width, dtype=jnp.uint32)
    return (words[..., None] >> shifts) & jnp.uint32((1 << width) - 1)


def _bytes(words: Array) -> Array:
    """uint32 (..., n) → its bytes in file order, uint32 (..., 4 n)."""
    return _bits(words, 8).reshape(*words.shape[:-1], -1)


def _iq2_xxs_tables() -> tuple[np.ndarray, np.ndarray]:
    """The 256 × 8 grid of magnitudes {8, 25, 43} and the 128 sign bytes (7 bits and their parity), as ggml has them."""
    reference = gguf.quants.IQ2_XXS
    reference.init_grid()
    return reference.grid.reshape(256, 8).astype(np.float32), np.frombuffer(reference.ksigns, np.uint8)


IQ2_XXS_GRID, IQ2_XXS_SIGNS = _iq2_xxs_tables()


def _q8_0(d: Array, q: Array) -> Array:
    q = q.reshape(*d.shape, 32).astype(jnp.float32)
    return q * d[..., None].astype(jnp.float32)


def _q4_k(dm: Array, scales: Array, q: Array) -> Array:
    lead = (*dm.shape[:-1], dm.shape[-1] // 2)
    d, dmin = (dm.reshape(*lead, 2)[..., i, None].astype(jnp.float32) for i in (0, 1))
    # Bytes 0-3 hold the low 6 bits of sc[0:4] and the high bits of sc[4:8]; bytes 4-7 the same for m; bytes 8-11
    # the low nibbles of sc[4:8] and m[4:8].
    lo_sc, lo_m, hi = (_bits(scales.reshape(*lead, 3)[..., i], 8) for i in range(3))
    sc = jnp.concatenate([lo_sc & 63, (hi & 15) | (lo_sc >> 2 & 48)], axis=-1).astype(jnp.float32)
    m = jnp.concatenate([lo_m & 63, (hi >> 4) | (lo_m >> 2 & 48)], axis=-1).astype(jnp.float32)
    # A run of 32 bytes holds two groups: the low nibbles, then the high ones.
    bytes_ = _bytes(q).reshape(*lead, 4, 1, 32)
    q = (bytes_ >> jnp.array([0, 4], jnp.uint32)[:, None]) & 15
    q = q.reshape(*lead, 8, 32).astype(jnp.float32)
    return (d * sc)[..., None] * q - (dmin * m)[..., None]


def _q2_k(scales: Array, q: Array, dm: Array) -> Array:
    lead = (*dm.shape[:-1], dm.shape[-1] // 2)
    d, dmin = (dm.reshape(*lead, 2)[..., i, None].astype(jnp.float32) for i in (0, 1))
    scales = _bytes(scales).reshape(*lead, 16)
    # A run of 32 bytes holds eight groups: bits 0-1 of the bytes, then bits 2-3, 4-5, 6-7.
    bytes_ = _bytes(q).reshape(*lead, 2, 1, 32)
    q = (bytes_ >> jnp.array([0, 2, 4, 6], jnp.uint32)[:, None]) & 3
    q = q.reshape(*lead, 16, 16).astype(jnp.float32)
    sc, m = (scales & 15).astype(jnp.float32), (scales >> 4).astype(jnp.float32)
    return (d * sc)[..., None] * q - (dmin * m)[..., None]


def _iq2_xxs(d: Array, grid: Array, signs: Array) -> Array:
    lead = (*d.shape, 8)
    signs = signs.reshape(lead)
    scale = 0.5 + (signs >> 28).astype(jnp.float32)
    scale = d[..., None].astype(jnp.float32) * scale * 0.25
    sets = (signs[..., None] >> jnp.array([0, 7, 14, 21], jnp.uint32)) & 127
    negative = (jnp.asarray(IQ2_XXS_SIGNS)[sets][..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    magnitude = jnp.asarray(IQ2_XXS_GRID)[_bits(grid.reshape(lead), 8)]
    # The reference multiplies by ±1; a zero scale must give its signed zeros too.
    return scale[..., None, None] * magnitude * jnp.where(negative == 0, jnp.float32(1), jnp.float32(-1))


def _mxfp4(e: Array, q: Array) -> Array:
    bytes_ = _bytes(q).reshape(*e.shape, 1, 16)
    code = (bytes_ >> jnp.array([0, 4], jnp.uint32)[:, None]) & 15
    return _e2m1_bits(code.reshape(*e.shape, 32), e.astype(jnp.int32)[..., None])


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


def _dense(values: Array) -> Array:
    return values.astype(jnp.float32)


_VALUES: dict[str, Callable[..., Array]] = {
    "F32": _dense, "F16": _dense, "BF16": _dense,
    "Q8_0": _q8_0, "Q4_K": _q4_k, "Q2_K": _q2_k, "IQ2_XXS": _iq2_xxs, "MXFP4": _mxfp4,
}  # fmt: skip


def dequantize(fmt: str, *planes: Array) -> Array:
    """The planes of matrices in `fmt` → float32 (..., rows, columns), exact."""
    values, lead = _VALUES[fmt](*planes), planes[0].shape[:-1]
    return values.reshape(*lead, math.prod(values.shape[len(lead) :]))
