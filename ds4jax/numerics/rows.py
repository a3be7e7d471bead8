"""Row formats of the cache, and the low-precision round trips that the released model was trained with.

``official``: every stored window row and compressed row passes E4M3 on its non-RoPE dims, index queries and keys pass
a Hadamard rotation and E2M1; the cache therefore stores exactly these codes, and nothing is lost by it.
``plain``: no round trips; rows are stored in the compute dtype. Hugging Face transformers computes this.
``straight_through``, for training: the values of ``official``, stored in the compute dtype, with the gradient that they
would have without the round trips.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError
from pallas_kernels.numerics import e2m1, e4m3
from pallas_kernels.numerics.hadamard import hadamard

Rows = dict[str, Array]  # the planes of stored rows, each (..., row bytes or values)
Numerics = Literal["official", "plain", "straight_through"]


def _blocks(x: Array, block: int) -> Array:
    """(..., n) → (..., ceil(n / block), block), the last block padded with zeros."""
    pad = -x.shape[-1] % block
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    return x.reshape(*x.shape[:-1], -1, block)


def _flat(blocks: Array, n: int) -> Array:
    """The inverse of `_blocks`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :n]


@dataclasses.dataclass(frozen=True)
class PlainRow:
    """A row of `dim` values in `dtype`."""

    dim: int
    dtype: np.dtype

    def planes(self) -> dict[str, tuple[int, np.dtype]]:
        """Plane name → (values per row, dtype)."""
        return {"x": (self.dim, self.dtype)}

    def encode(self, x: Float[Array, "*s D"]) -> Rows:
        """Rows → their planes."""
        return {"x": x.astype(self.dtype)}

    def decode(self, rows: Rows, dtype: DTypeLike) -> Float[Array, "*s D"]:
        """Planes → the rows, in `dtype`."""
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
            "exponents": (-(-nope // e4m3.BLOCK), np.dtype(np.uint8)),
            "rope": (self.rope_dim, np.dtype(np.float16)),
        }

    def encode(self, x: Float[Array, "*s D"]) -> Rows:
        nope, rope = jnp.split(x, [self.dim - self.rope_dim], axis=-1)
        codes, exponents = e4m3.encode_blocks(_blocks(nope, e4m3.BLOCK))
        return {"codes": _flat(codes, nope.shape[-1]), "exponents": exponents, "rope": rope.astype(jnp.float16)}

    def decode(self, rows: Rows, dtype: DTypeLike) -> Float[Array, "*s D"]:
        codes = rows["codes"]
        nope = e4m3.decode_blocks(_blocks(codes, e4m3.BLOCK), rows["exponents"], dtype)
        return jnp.concatenate([_flat(nope, codes.shape[-1]), rows["rope"].astype(dtype)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Fp4Row:
    """An index key: E2M1 with one power-of-two scale per 32 dims. Byte i holds dims 2i (low nibble) and 2i + 1."""

    dim: int

    def planes(self):
        return {
            "codes": (self.dim // 2, np.dtype(np.uint8)),
            "exponents": (-(-self.dim // e2m1.BLOCK), np.dtype(np.uint8)),
        }

    def encode(self, x: Float[Array, "*s D"]) -> Rows:
        code, exponents = e2m1.encode_blocks(_blocks(x, e2m1.BLOCK), jnp.uint8)
        code = _flat(code, x.shape[-1])
        return {"codes": code[..., 0::2] | code[..., 1::2] << 4, "exponents": exponents}

    def decode(self, rows: Rows, dtype: DTypeLike) -> Float[Array, "*s D"]:
        codes = rows["codes"]
        code = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        return _flat(e2m1.decode_blocks(_blocks(code, e2m1.BLOCK), rows["exponents"], dtype), self.dim)


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


def index_rotation(x: Float[Array, "*s Di"], numerics: Numerics) -> Float[Array, "*s Di"]:
    """What index queries and keys pass before E2M1: the Hadamard matrix over √n; nothing if ``plain``."""
    return x if numerics == "plain" else hadamard(x)
