"""Quantized weights as pytrees: one class per GGUF format, `dequantize`, and `linear`, the only matrix product.

A format splits each block of the file into planes, one array per kind of content, so that a kernel reads every plane
with wide aligned loads; bytes keep the file's order and count (nothing is repacked larger). Every plane has the rank of
the logical array, and only the last axis is packed: a plane is sharded and indexed like the matrix itself.

The formulas of the values are in `pallas_kernels.formats`, since the kernels' references need them too; the tests
compare them with `gguf.quants`, bit for bit.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Self

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax import lax

from pallas_kernels import formats

Array = jax.Array


class Quantized:
    """Base of all formats. A value has logical `shape` (..., out, in) and logical dtype float32.

    ggml_type: the file's type. block: weights per block. block_bytes: bytes per block in the file.
    planes: name → (dtype, bytes per block); the order is the order of the pytree leaves.
    """

    ggml_type: ClassVar[GGMLType]
    block: ClassVar[int]
    block_bytes: ClassVar[int]
    planes: ClassVar[dict[str, tuple[np.dtype, int]]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "planes" in cls.__dict__:
            cls.block, cls.block_bytes = gguf.GGML_QUANT_SIZES[cls.ggml_type]
            cls.planes = {name: (np.dtype(dtype), nbytes) for name, (dtype, nbytes) in cls.planes.items()}

    # ---- structure -------------------------------------------------------------------------------------------------
    @classmethod
    def plane_shapes(cls, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Plane name → array shape, for a logical shape whose last dimension is a multiple of `block`."""
        if shape[-1] % cls.block:
            raise ValueError(f"{cls.ggml_type.name}: row length {shape[-1]} is not a multiple of {cls.block}")
        blocks = shape[-1] // cls.block
        return {name: (*shape[:-1], blocks * n // dt.itemsize) for name, (dt, n) in cls.planes.items()}

    @classmethod
    def struct(cls, shape: tuple[int, ...]) -> Self:
        """The pytree with a `jax.ShapeDtypeStruct` for every plane."""
        shapes = cls.plane_shapes(shape)
        return cls(**{name: jax.ShapeDtypeStruct(shapes[name], dt) for name, (dt, _) in cls.planes.items()})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape (..., out, in)."""
        name, (dtype, nbytes) = next(iter(self.planes.items()))
        plane = getattr(self, name)
        return (*plane.shape[:-1], plane.shape[-1] * dtype.itemsize // nbytes * self.block)

    def __getitem__(self, index) -> Self:
        """Index the leading axes (layer, expert, row); the packed last axis stays whole."""
        return jax.tree.map(lambda p: p[index], self)

    # ---- file bytes ------------------------------------------------------------------------------------------------
    @classmethod
    def _fields(cls, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Views of the planes in file bytes, uint8 (..., row_bytes): (..., blocks) or (..., blocks, items) of bytes.

        Items are as large as the file allows, because numpy copies item by item.
        """
        block = np.dtype([(name, f"V{nbytes}") for name, (_, nbytes) in cls.planes.items()])
        return {name: raw.view(block)[name] for name in cls.planes}

    @classmethod
    def split(cls, raw: np.ndarray, planes: dict[str, np.ndarray]) -> None:
        """Split file bytes, uint8 (..., row_bytes), into the given host planes, which must be contiguous."""
        for name, field in cls._fields(raw).items():
            planes[name].reshape(-1).view(field.dtype).reshape(field.shape)[...] = field

    @classmethod
    def from_bytes(cls, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Split file bytes, uint8 (..., row_bytes), into freshly allocated host planes."""
        shapes = cls.plane_shapes((*raw.shape[:-1], raw.shape[-1] // cls.block_bytes * cls.block))
        planes = {name: np.empty(shapes[name], dtype) for name, (dtype, _) in cls.planes.items()}
        cls.split(raw, planes)
        return planes

    def to_bytes(self) -> np.ndarray:
        """The inverse of `from_bytes`: uint8 (..., row_bytes) on the host, as the file holds it."""
        rows, columns = self.shape[:-1], self.shape[-1]
        out = np.empty((*rows, columns // self.block * self.block_bytes), np.uint8)
        for name, field in self._fields(out).items():
            plane = np.ascontiguousarray(np.asarray(getattr(self, name)))
            field[...] = plane.reshape(-1).view(field.dtype).reshape(field.shape)
        return out

    # ---- values ----------------------------------------------------------------------------------------------------
    def dequantize(self, dtype=jnp.float32) -> Array:
        """The weights as an array of logical `shape`; exact in float32, rounded once for a narrower dtype."""
        return self._values().astype(dtype)

    def _values(self) -> Array:
        """The weights in float32 at least."""
        return formats.dequantize(type(self).__name__, *(getattr(self, name) for name in self.planes))

    @classmethod
    def random(cls, key: Array, shape: tuple[int, ...], std: float) -> Self:
        """Random codes with scales such that the weights have about mean 0 and standard deviation `std`."""
        raise NotImplementedError


def _random_bits(key: Array, shape: tuple[int, ...], dtype) -> Array:
    dtype = np.dtype(dtype)
    bits = jax.random.bits(key, shape, f"uint{dtype.itemsize * 8}")
    return bits if dtype.kind == "u" else lax.bitcast_convert_type(bits, dtype)


class _Dense(Quantized):
    """Unquantized formats: one plane of plain values."""

    def _values(self):
        return self.values.astype(wide(self.values.dtype))

    @classmethod
    def random(cls, key, shape, std):
        return cls(values=(jax.random.normal(key, shape, jnp.float32) * std).astype(cls.planes["values"][0]))


@struct.dataclass
class F32(_Dense):
    """values: float32 (..., out, in)."""

    ggml_type = GGMLType.F32
    planes = {"values": (np.float32, 4)}
    values: Array


@struct.dataclass
class F16(_Dense):
    """values: float16 (..., out, in)."""

    ggml_type = GGMLType.F16
    planes = {"values": (np.float16, 2)}
    values: Array


@struct.dataclass
class BF16(_Dense):
    """values: bfloat16 (..., out, in)."""

    ggml_type = GGMLType.BF16
    planes = {"values": (ml_dtypes.bfloat16, 2)}
    values: Array


@struct.dataclass
class Q8_0(Quantized):
    """w = d·q. d: float16 per 32 weights. q: int8."""

    ggml_type = GGMLType.Q8_0
    planes = {"d": (np.float16, 2), "q": (np.int8, 32)}
    d: Array
    q: Array

    @classmethod
    def random(cls, key, shape, std):
        shapes = cls.plane_shapes(shape)
        q = _random_bits(key, shapes["q"], np.int8)
        return cls(d=jnp.full(shapes["d"], std / _uniform_std(256), jnp.float16), q=q)


@struct.dataclass
class Q4_K(Quantized):
    """w = (d·sc)·q − (dmin·m), in super-blocks of 256 with 8 groups of 32.

    dm: float16, d and dmin of each super-block. scales: uint32, three words (12 bytes) of 6-bit sc and m.
    q: uint32, eight 4-bit codes per word.
    """

    ggml_type = GGMLType.Q4_K
    planes = {"dm": (np.float16, 4), "scales": (np.uint32, 12), "q": (np.uint32, 128)}
    dm: Array
    scales: Array
    q: Array

    @classmethod
    def random(cls, key, shape, std):
        shapes = cls.plane_shapes(shape)
        # Every sc and m equal to 32: bytes 0-7 carry their high bits (2), the low nibbles are zero.
        word = jnp.uint32(0xA0A0A0A0)
        scales = jnp.stack([word, word, jnp.uint32(0)])
        d = std / _uniform_std(16) / 32
        return cls(
            dm=jnp.tile(jnp.array([d, 7.5 * d], jnp.float16), (*shapes["dm"][:-1], shapes["dm"][-1] // 2)),
            scales=jnp.tile(scales, (*shapes["scales"][:-1], shapes["scales"][-1] // 3)),
            q=_random_bits(key, shapes["q"], np.uint32),
        )


@struct.dataclass
class Q2_K(Quantized):
    """w = (d·sc)·q − (dmin·m), in super-blocks of 256 with 16 groups of 16.

    scales: uint32, four groups per word, each a byte sc | m << 4. q: uint32, sixteen 2-bit codes per word.
    dm: float16, d and dmin of each super-block.
    """

    ggml_type = GGMLType.Q2_K
    planes = {"scales": (np.uint32, 16), "q": (np.uint32, 64), "dm": (np.float16, 4)}
    scales: Array
    q: Array
    dm: Array

    @classmethod
    def random(cls, key, shape, std):
        shapes = cls.plane_shapes(shape)
        d = std / _uniform_std(4) / 8
        return cls(
            scales=jnp.full(shapes["scales"], 0x88888888, jnp.uint32),
            q=_random_bits(key, shapes["q"], np.uint32),
            dm=jnp.tile(jnp.array([d, 1.5 * d], jnp.float16), (*shapes["dm"][:-1], shapes["dm"][-1] // 2)),
        )


@struct.dataclass
class IQ2_XXS(Quantized):
    """w = d·(½ + s)/4 · grid[g] · sign, groups of 32 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. grid: uint32 per 32 weights, four indices of 8 weights each.
    signs: uint32 per 32 weights, four 7-bit sign sets and s in the top 4 bits.
    """

    ggml_type = GGMLType.IQ2_XXS
    planes = {"d": (np.float16, 2), "grid": (np.uint32, 32), "signs": (np.uint32, 32)}
    d: Array
    grid: Array
    signs: Array

    @classmethod
    def _fields(cls, raw):
        # In the file, grid and sign words alternate.
        blocks = raw.view(np.dtype([("d", "V2"), ("words", [("grid", "V4"), ("signs", "V4")], 8)]))
        return {"d": blocks["d"], "grid": blocks["words"]["grid"], "signs": blocks["words"]["signs"]}

    @classmethod
    def random(cls, key, shape, std):
        shapes = cls.plane_shapes(shape)
        k1, k2 = jax.random.split(key)
        signs = _random_bits(k2, shapes["signs"], np.uint32) & jnp.uint32((1 << 28) - 1) | jnp.uint32(7 << 28)
        d = std / (7.5 / 4 * math.sqrt(np.mean(formats.IQ2_XXS_GRID**2)))
        grid = _random_bits(k1, shapes["grid"], np.uint32)
        return cls(d=jnp.full(shapes["d"], d, jnp.float16), grid=grid, signs=signs)


@struct.dataclass
class MXFP4(Quantized):
    """E2M1 values with a shared power of two. e: uint8 per 32 weights, biased by 127. q: uint32, eight codes per word.

    Codes of a block: bytes 0-15 hold weights 0-15 in their low and 16-31 in their high nibbles.
    """

    ggml_type = GGMLType.MXFP4
    planes = {"e": (np.uint8, 1), "q": (np.uint32, 16)}
    e: Array
    q: Array

    @classmethod
    def random(cls, key, shape, std):
        shapes = cls.plane_shapes(shape)
        rms = math.sqrt(np.mean(np.square([0, 0.5, 1, 1.5, 2, 3, 4, 6])))
        e = jnp.full(shapes["e"], 127 + round(math.log2(std / rms)), jnp.uint8)
        return cls(e=e, q=_random_bits(key, shapes["q"], np.uint32))


def _uniform_std(levels: int) -> float:
    """Standard deviation of `levels` equally likely consecutive integers."""
    return math.sqrt((levels**2 - 1) / 12)


FORMATS: dict[GGMLType, type[Quantized]] = {f.ggml_type: f for f in (F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4)}


def wide(dtype) -> np.dtype:
    """The dtype to accumulate in and to compute norms, gates and routing in: float32, or float64 for float64."""
    return np.dtype(np.float64 if dtype == jnp.float64 else np.float32)


def linear(x: Array, w: Quantized, dtype=None) -> Array:
    """x (..., in) times w (out, in) transposed: (..., out) in `dtype` (x's unless given), accumulated in float32.

    Every matrix product with a weight goes through here (or `grouped_linear`).
    """
    return matmul("...i,oi->...o", x, w.dequantize(x.dtype), dtype=dtype)


def grouped_linear(x: Array, w: Quantized, groups: int) -> Array:
    """Block-diagonal product: group g of x (..., groups, in) meets rows [g·out, (g+1)·out) of w (groups·out, in)."""
    w = w.dequantize(x.dtype)
    return matmul("...gi,goi->...go", x, w.reshape(groups, -1, w.shape[-1]))


def matmul(equation: str, a: Array, b: Array, dtype=None) -> Array:
    """einsum with at least float32 accumulation, and float32 computed as float32 (no TF32).

    The result has `dtype`, or a's, which must be b's.
    """
    return _matmul(equation, np.dtype(dtype or a.dtype), a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(equation: str, dtype: np.dtype, a: Array, b: Array) -> Array:
    return _einsum(equation, a, b, preferred_element_type=wide(a.dtype)).astype(dtype)


def _matmul_forward(equation: str, dtype: np.dtype, a: Array, b: Array):
    return _matmul(equation, dtype, a, b), (a, b)


def _matmul_backward(equation: str, dtype: np.dtype, operands: tuple[Array, Array], gradient: Array):
    # Rounded to the operands' dtype: a product of float32 and bfloat16 would be computed as slowly as float32.
    _, transpose = jax.vjp(functools.partial(_einsum, equation), *operands)
    return transpose(gradient.astype(operands[0].dtype))


_matmul.defvjp(_matmul_forward, _matmul_backward)
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def lookup(table: Array, index: Array) -> Array:
    """table[index]: (n, ...), int32 → (*index.shape, ...).

    The gradient is a matrix product: scattered additions come in any order on a GPU, and wait for one another.
    """
    return table[index]


def _lookup_backward(residuals: tuple[Array, Array], gradient: Array):
    table, index = residuals
    chosen = jax.nn.one_hot(index.reshape(-1), table.shape[0], dtype=gradient.dtype)
    return matmul("sn,se->ne", chosen, gradient.reshape(index.size, -1)).reshape(table.shape), None


lookup.defvjp(lambda table, index: (table[index], (table, index)), _lookup_backward)
