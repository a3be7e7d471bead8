"""E4M3: FP8 weights with one power of two per 128 of a row, as DeepSeek publishes dense matrices. In no GGUF file.

There 128 × 128 weights share a scale; here each row has its own copy of it, so that planes are cut like the matrix.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jax import lax

from ds4jax.formats.base import Quantized, random_bits, random_exponents
from ds4jax.unfiled import Unfiled
from pallas_kernels.formats import runs
from pallas_kernels.formats.runs import Runs, blocks_of, columns_of, read
from pallas_kernels.formats.tiles import STEP, Planes, Tile, Tiles, stack
from pallas_kernels.numerics import e4m3
from pallas_kernels.numerics.scale import power_of_two

Array = jax.Array

BLOCK = 128  # weights of a row that share a scale
_SMALL = 0xBF  # of a code's bits: all but the exponent's upper one. What is left is below 2 and never NaN.


def _load_run(planes, layer, rows, first, n, run, interpret):
    e, q = planes
    columns = columns_of(first, n, run)
    codes = read(q, layer, rows, columns)
    scale = power_of_two(read(e, layer, rows, blocks_of(first, n, run, BLOCK)))
    return runs.Loaded([[columns]], lambda _: [runs.Piece([codes.astype(jnp.float32)], scale)])


def _load_tile(t: Tile) -> Planes:
    e = t.load(0, t.columns(1) + jnp.zeros((4,), jnp.int32))
    return e, *(t.load(1, STEP * t.step + 64 * i + jnp.arange(64, dtype=jnp.int32)) for i in (0, 1))


def _decode_tile(t: Tile, e: Array, *codes: Array) -> Array:
    scale = power_of_two(e)[..., None]
    w = [(q.astype(jnp.float32).reshape(-1, 4, 16) * scale).astype(jnp.bfloat16) for q in codes]
    return stack(w).swapaxes(2, 3).reshape(-1, 4, 32)


@struct.dataclass
class E4M3(Quantized):
    """w = 2^(e − 127) · q. e: uint8 per 128 weights of a row, biased by 127; 0 is 0. q: float8_e4m3fn."""

    ggml_type = Unfiled.E4M3
    planes = {"e": (np.uint8, 1), "q": (ml_dtypes.float8_e4m3fn, BLOCK)}
    for_matmul = Runs(_load_run, narrow=True)
    # Part, thread, and four bits of sixteen neighbours.
    for_grouped_gemm = Tiles(_load_tile, _decode_tile, ((2, 4, 4, 2, 2), (0, 2, 3, 1, 4)))
    e: Array
    q: Array

    @staticmethod
    def _decode(e, q):
        return e4m3.decode_blocks(q, e[..., 0], jnp.float32)

    @classmethod
    def random(cls, key, shape, std):
        of_e, of_q = jax.random.split(key)
        shapes = cls.plane_shapes(shape)
        codes = (np.arange(256) & _SMALL).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        e = random_exponents(of_e, shapes["e"], std / math.sqrt(np.mean(np.square(codes.astype(np.float32)))))
        q = random_bits(of_q, shapes["q"], np.uint8) & np.uint8(_SMALL)
        return cls(e=e, q=lax.bitcast_convert_type(q, jnp.float8_e4m3fn))
