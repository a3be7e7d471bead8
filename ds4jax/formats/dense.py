"""F32, F16 and BF16: plain values, one plane."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import Quantized
from pallas_kernels.formats import runs
from pallas_kernels.formats.runs import Runs, columns_of, read
from pallas_kernels.formats.tiles import STEP, Planes, Tile, Tiles, stack

Array = jax.Array


def _load_run(planes, layer, rows, first, n, run, interpret):
    columns = columns_of(first, n, run)
    values = read(planes[0], layer, rows, columns)
    return runs.Loaded([[columns]], lambda _: [runs.Piece([values.astype(jnp.float32)])])


def _load_tile(t: Tile) -> Planes:
    return tuple(t.load(0, STEP * t.step + 32 * i + jnp.arange(32, dtype=jnp.int32)) for i in range(4))


def _decode_tile(t: Tile, *values: Array) -> Array:
    return stack([v.astype(jnp.bfloat16).reshape(-1, 4, 8) for v in values]).swapaxes(2, 3).reshape(-1, 4, 32)


_ORDER = (4, 4, 2, 2, 2), (0, 2, 3, 1, 4)  # part, thread, and three bits of eight neighbours


@struct.dataclass
class Dense(Quantized):
    """Base of the unquantized formats."""

    values: Array

    @staticmethod
    def _decode(values):
        return values if values.dtype == jnp.float64 else values.astype(jnp.float32)

    @classmethod
    def random(cls, key, shape, std):
        return cls(values=(jax.random.normal(key, shape, jnp.float32) * std).astype(cls.planes["values"][0]))

    @staticmethod
    def quantize_blocks(x, importance):
        return {"values": x}


@struct.dataclass
class F32(Dense):
    """values: float32 (..., out, in)."""

    ggml_type = GGMLType.F32
    planes = {"values": (np.float32, 4)}
    largest = float(jnp.finfo(jnp.float32).max)
    for_matmul = Runs(_load_run, dot=None)


@struct.dataclass
class F16(Dense):
    """values: float16 (..., out, in)."""

    ggml_type = GGMLType.F16
    planes = {"values": (np.float16, 2)}
    largest = float(jnp.finfo(jnp.float16).max)
    for_matmul = Runs(_load_run)
    for_grouped_gemm = Tiles(_load_tile, _decode_tile, _ORDER)


@struct.dataclass
class BF16(Dense):
    """values: bfloat16 (..., out, in)."""

    ggml_type = GGMLType.BF16
    planes = {"values": (ml_dtypes.bfloat16, 2)}
    largest = float(jnp.finfo(jnp.bfloat16).max)
    for_matmul = Runs(_load_run, dot="bfloat16")
    for_grouped_gemm = Tiles(_load_tile, _decode_tile, _ORDER)
