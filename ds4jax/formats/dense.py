"""F32, F16 and BF16: plain values, one plane."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import Quantized

Array = jax.Array


class Dense(Quantized):
    """Base of the unquantized formats."""

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
    values: Array


@struct.dataclass
class F16(Dense):
    """values: float16 (..., out, in)."""

    ggml_type = GGMLType.F16
    planes = {"values": (np.float16, 2)}
    largest = float(jnp.finfo(jnp.float16).max)
    values: Array


@struct.dataclass
class BF16(Dense):
    """values: bfloat16 (..., out, in)."""

    ggml_type = GGMLType.BF16
    planes = {"values": (ml_dtypes.bfloat16, 2)}
    largest = float(jnp.finfo(jnp.bfloat16).max)
    values: Array
