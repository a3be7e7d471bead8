"""Row formats of the cache, and the low-precision round trips that the released model was trained with.

``official``: every stored window row and compressed row passes E4M3 on its non-RoPE dims, index queries and keys pass
a Hadamard rotation and E2M1; the cache therefore stores exactly these codes, and nothing is lost by it.
``plain``: no round trips; rows are stored in the compute dtype. Hugging Face transformers computes this.
``straight_through``, for training: the values of ``official``, stored in the compute dtype, with the gradient that they
would have without the round trips.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError

Array = jax.Array
Rows = dict[str, Array]  # the planes of stored rows, each (..., row bytes or values)
Numerics = Literal["official", "plain", "straight_through"]

E4M3_BLOCK, E4M3_MAX = 64, 448.0
E2M1_BLOCK, E2M1_MAX = 32, 6.0
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _scale_exponent(amax: Array, floor: float, largest: float) -> Array:
    """ceil(log2(max(amax, floor) / largest)) as int32, read off the bits (a float log2 may round across an integer)."""
    ratio = jnp.maximum(amax.astype(jnp.float32), floor) / largest
    bits = lax.bitcast_convert_type(ratio, jnp.int32)
    return (bits >> 23) - 127 + (bits & 0x7FFFFF != 0).astype(jnp.int32)


def _power_of_two(exponent: Array, dtype: DTypeLike) -> Array:
    """2^exponent, exact for float32's normal exponents, -126 … 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32).astype(dtype)


def _blocks(x: Array, block: int) -> Array:
    """(..., n) → (..., ceil(n / block), block), the last block padded with zeros."""
    pad = -x.shape[-1] % block
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    return x.reshape(*x.shape[:-1], -1, block)


def _encode_scaled(x: Array, block: int, floor: float, largest: float) -> tuple[Array, Array]:
    """x (..., n) → x divided by its block's power of two, in [-largest, largest], and uint8 exponents biased by 127."""
    blocks = _blocks(x, block)
    exponent = _scale_exponent(jnp.abs(blocks).max(-1), floor, largest)
    scaled = blocks * _power_of_two(-exponent, x.dtype)[..., None]
    return scaled.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], (exponent + 127).astype(jnp.uint8)


def _decode_scaled(scaled: Array, exponents: Array, block: int) -> Array:
    blocks = _blocks(scaled, block)
    x = blocks * _power_of_two(exponents.astype(jnp.int32) - 127, scaled.dtype)[..., None]
    return x.reshape(*scaled.shape[:-1], -1)[..., : scaled.shape[-1]]


@dataclasses.dataclass(frozen=True)
class PlainRow:
    """A row of `dim` values in `dtype`."""

    dim: int
    dtype: np.dtype

    def planes(self) -> dict[str, tuple[int, np.dtype]]:
        """Plane name → (values per row, dtype)."""
        return {"x": (self.dim, self.dtype)}

    def encode(self, x: Array) -> Rows:
        """x (..., dim) → planes."""
        return {"x": x.astype(self.dtype)}

    def decode(self, rows: Rows, dtype: DTypeLike) -> Array:
        """planes → (..., dim)."""
        return rows["x"].astype(dtype)


@dataclasses.dataclass(frozen=True)
class Fp8Row:
    """A key/value row: E4M3 with one power-of-two scale per 64 non-RoPE dims, then `rope_dim` float16 values.

    The RoPE part is float16, as ds4 stores it; DeepSeek's reference has bfloat16 there.
    """

    dim: int
    rope_dim: int

    def planes(self):
        nope = self.dim - self.rope_dim
        return {
            "codes": (nope, np.dtype(jnp.float8_e4m3fn)),
            "exponents": (-(-nope // E4M3_BLOCK), np.dtype(np.uint8)),
            "rope": (self.rope_dim, np.dtype(np.float16)),
        }

    def encode(self, x: Array) -> Rows:
        nope, rope = jnp.split(x, [self.dim - self.rope_dim], axis=-1)
        scaled, exponents = _encode_scaled(nope, E4M3_BLOCK, 1e-4, E4M3_MAX)
        # Narrow through float32: every step is then one rounding on every backend.
        codes = scaled.astype(jnp.float32).astype(jnp.float8_e4m3fn)
        return {"codes": codes, "exponents": exponents, "rope": rope.astype(jnp.float16)}

    def decode(self, rows: Rows, dtype: DTypeLike) -> Array:
        nope = _decode_scaled(rows["codes"].astype(dtype), rows["exponents"], E4M3_BLOCK)
        return jnp.concatenate([nope, rows["rope"].astype(dtype)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Fp4Row:
    """An index key: E2M1 with one power-of-two scale per 32 dims. Byte i holds dims 2i (low nibble) and 2i + 1."""

    dim: int

    def planes(self):
        return {
            "codes": (self.dim // 2, np.dtype(np.uint8)),
            "exponents": (-(-self.dim // E2M1_BLOCK), np.dtype(np.uint8)),
        }

    def encode(self, x: Array) -> Rows:
        scaled, exponents = _encode_scaled(x, E2M1_BLOCK, E2M1_MAX * 2.0**-126, E2M1_MAX)
        # Nearest value; a tie goes to the even code, so the thresholds alternate between > and >=.
        a = jnp.abs(scaled)
        code = sum((a > t).astype(jnp.uint8) for t in (0.25, 1.25, 2.5, 5.0))
        code = code + sum((a >= t).astype(jnp.uint8) for t in (0.75, 1.75, 3.5))
        code = code | (scaled < 0).astype(jnp.uint8) << 3
        return {"codes": code[..., 0::2] | code[..., 1::2] << 4, "exponents": exponents}

    def decode(self, rows: Rows, dtype: DTypeLike) -> Array:
        codes = rows["codes"]
        code = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        values = jnp.asarray(np.concatenate([E2M1_VALUES, -E2M1_VALUES]), dtype)
        return _decode_scaled(values[code], rows["exponents"], E2M1_BLOCK)


@dataclasses.dataclass(frozen=True)
class StraightThroughRow(PlainRow):
    """A row that has passed `lossy`, as plain values; the gradient passes unchanged."""

    lossy: Fp8Row | Fp4Row

    def encode(self, x):
        fixed = lax.stop_gradient(x)
        passed = self.lossy.decode(self.lossy.encode(fixed), x.dtype)
        # Adds up to exactly `passed`: a value and its rounding are within a factor of 2, or the rounding is 0.
        return super().encode(x + (passed - fixed))


RowFormat = PlainRow | Fp8Row | Fp4Row


def kv_row(cfg: ModelConfig, numerics: Numerics, dtype: DTypeLike) -> RowFormat:
    """How window rows and compressed rows are stored."""
    return _row(Fp8Row(cfg.head_dim, cfg.rope_dim), numerics, dtype)


def index_row(cfg: ModelConfig, numerics: Numerics, dtype: DTypeLike) -> RowFormat:
    """How index keys are stored."""
    return _row(Fp4Row(cfg.index_head_dim), numerics, dtype)


def _row(official: Fp8Row | Fp4Row, numerics: Numerics, dtype: DTypeLike) -> RowFormat:
    if numerics == "official":
        return official
    plain = official.dim, np.dtype(dtype)
    return PlainRow(*plain) if numerics == "plain" else StraightThroughRow(*plain, official)


def check(cfg: ModelConfig, numerics: Numerics) -> None:
    """Refuse a shape that the official numerics are not defined for. Raises ConfigError."""
    if numerics != "plain" and cfg.layers_of_ratio(4) and cfg.index_head_dim & (cfg.index_head_dim - 1):
        raise ConfigError(
            f"numerics={numerics!r} rotates index keys by a Hadamard matrix: attention.indexer.key_length is "
            f"{cfg.index_head_dim}, expected a power of two (numerics='plain' takes any)"
        )


def index_rotation(x: Array, numerics: Numerics) -> Array:
    """What index queries and keys x (..., n) pass before E2M1: the Hadamard matrix over √n; nothing if ``plain``."""
    return x if numerics == "plain" else hadamard(x)


def hadamard(x: Array) -> Array:
    """x (..., n) times the n-point Hadamard matrix (Sylvester's order) over √n; n a power of two.

    Butterflies rather than a product: the order of the additions, and so every bit, is the same for any batch.
    """
    n, lead = x.shape[-1], x.shape[:-1]
    step = 1
    while step < n:
        pairs = x.reshape(*lead, -1, 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(*lead, n)
        step *= 2
    return x * (1 / math.sqrt(n))
