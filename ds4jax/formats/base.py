"""What every weight format is: `Quantized`, a pytree of planes, and the arithmetic on packed bits that formats share.

A format splits each block of the file into planes, one array per kind of content, so that a kernel reads every plane
with wide aligned loads. Bytes keep the file's order and count, but in a format that is `stored` as another one. Every
plane has the rank of the logical array, and only the last axis is packed: it is sharded and indexed like the matrix
itself.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax.unfiled import sizes
from pallas_kernels import formats as kernels
from pallas_kernels.numerics.scale import BIAS

Array = jax.Array


class Quantized:
    """Base of all formats. A value has logical `shape` (..., out, in) and logical dtype float32.

    ggml_type: the file's type, or one that no file has. block: weights per block. block_bytes: their bytes in the file.
    planes: name → (dtype, bytes per block); the order is the order of the pytree leaves.
    largest: the largest magnitude of a weight for which every scale fits the file.
    stored: the format that files hold, of one that is made of it by `repack`, with the same weights; or None.
    for_matmul, for_experts, for_grouped_gemm: what these kernels need, None if the format is not for them.
    """

    ggml_type: ClassVar[Any]  # GGMLQuantizationType or Unfiled
    block: ClassVar[int]
    block_bytes: ClassVar[int]
    planes: ClassVar[dict[str, tuple[Any, int]]]
    largest: ClassVar[float]
    stored: ClassVar[type[Quantized] | None] = None
    for_matmul: ClassVar[kernels.Runs | None] = None
    for_experts: ClassVar[type[kernels.Dots] | None] = None
    for_grouped_gemm: ClassVar[kernels.Tiles | None] = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "planes" in cls.__dict__:
            cls.block, cls.block_bytes = sizes(cls.ggml_type)
            cls.planes = {name: (np.dtype(dtype), nbytes) for name, (dtype, nbytes) in cls.planes.items()}

    # ---- what a format defines -------------------------------------------------------------------------------------
    @staticmethod
    def _decode(*planes: Array) -> Array:
        """The formula: planes (..., blocks, elements of a block), in order → float32 (..., blocks, ...).

        Weights come in the file's order.
        """
        raise NotImplementedError

    @classmethod
    def random(cls, key: Array, shape: tuple[int, ...], std: float) -> Self:
        """Random codes and scales such that the weights have about mean 0 and standard deviation `std`."""
        raise NotImplementedError

    @staticmethod
    def quantize_blocks(x: Array, importance: Array) -> dict[str, Array]:
        """Weights and importances of their columns, float32 (blocks, block) → planes (blocks, elements) by name.

        `ds4jax.formats.quantize` says what is minimised, and casts to the planes' dtypes.
        """
        raise NotImplementedError

    @classmethod
    def repack(cls, w: Any) -> Self:
        """The same weights, from `stored`."""
        raise NotImplementedError

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
    @classmethod
    def decode(cls, *planes: Array) -> Array:
        """Planes in the order of `planes` → the weights they hold, float32 (..., out, in), exact."""
        lead = planes[0].shape[:-1]
        sizes = [nbytes // dtype.itemsize for dtype, nbytes in cls.planes.values()]
        blocks = [p.reshape(*lead, p.shape[-1] // n, n) for p, n in zip(planes, sizes, strict=True)]
        values = cls._decode(*blocks)
        return values.reshape(*lead, math.prod(values.shape[len(lead) :]))

    def dequantize(self, dtype=jnp.float32) -> Array:
        """The weights as an array of logical `shape`; exact in float32, rounded once for a narrower dtype."""
        return self.decode(*(getattr(self, name) for name in self.planes)).astype(dtype)

    # ---- kernels ---------------------------------------------------------------------------------------------------
    @classmethod
    def kernel_format(cls) -> kernels.Format:
        """What `pallas_kernels` knows of this format."""

        def random(key: Array, shape: tuple[int, ...], std: float) -> tuple[Array, ...]:
            return tuple(jax.tree.leaves(cls.random(key, shape, std)))

        return kernels.Format(
            name=cls.__name__,
            block=cls.block,
            planes=tuple((dtype.name, nbytes // dtype.itemsize) for dtype, nbytes in cls.planes.values()),
            dequantize=cls.decode,
            random=random,
            matmul=cls.for_matmul,
            experts=cls.for_experts,
            grouped_gemm=cls.for_grouped_gemm,
        )


# ---- packed bits -----------------------------------------------------------------------------------------------------
def bits(words: Array, width: int) -> Array:
    """Split uint32 words into fields of `width` bits, lowest first: (..., n) → (..., n, 32 // width) uint32."""
    shifts = jnp.arange(0, 32, width, dtype=jnp.uint32)
    return (words[..., None] >> shifts) & jnp.uint32((1 << width) - 1)


def pack_bits(fields: Array, width: int) -> Array:
    """(..., n, k) uint32 fields of `width` bits, lowest first → (..., n) uint32."""
    shifts = jnp.arange(fields.shape[-1], dtype=jnp.uint32) * width
    return jnp.sum(fields << shifts, axis=-1, dtype=jnp.uint32)


def bytes_of(words: Array) -> Array:
    """uint32 (..., n) → its bytes in file order, uint32 (..., 4 n)."""
    return bits(words, 8).reshape(*words.shape[:-1], -1)


def unpack(words: Array, width: int, run: int = 1) -> Array:
    """Fields of `width` bits, at most 8, of uint32 words: (..., n) → (..., 32 n // width) uint32.

    They are taken from runs of `run` bytes: the lowest field of each of its bytes, then the next field of each. With
    the default, the fields of a byte follow one another.
    """
    runs = bytes_of(words).reshape(*words.shape[:-1], -1, 1, run)
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint32)[:, None]
    return ((runs >> shifts) & ((1 << width) - 1)).reshape(*words.shape[:-1], -1)


def words_of(bytes_: Array) -> Array:
    """(..., 4 n) uint32 bytes in file order → (..., n) uint32 words."""
    return pack_bits(bytes_.reshape(*bytes_.shape[:-1], -1, 4), 8)


# ---- formulas --------------------------------------------------------------------------------------------------------
def scaled(d: Array, scales: Array, values: Array) -> Array:
    """(d·scale)·value in float32: d (..., 1), scales (..., groups), values (..., weights) → (..., groups, group)."""
    d, scales, values = (v.astype(jnp.float32) for v in (d, scales, values))
    return (d * scales)[..., None] * values.reshape(*scales.shape, -1)


# ---- random planes ---------------------------------------------------------------------------------------------------
def random_bits(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Uniform bits as an integer dtype."""
    dtype = np.dtype(dtype)
    raw = jax.random.bits(key, shape, f"uint{dtype.itemsize * 8}")
    return raw if dtype.kind == "u" else lax.bitcast_convert_type(raw, dtype)


def random_scales(key: Array, shape: tuple[int, ...], rms: float) -> Array:
    """float32 scales of root mean square `rms`, no two alike: uniform between a half and three halves of one value."""
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5) * (rms / math.sqrt(13 / 12))


def random_exponents(key: Array, shape: tuple[int, ...], rms: float) -> Array:
    """uint8, biased by 127: of two neighbouring powers of two, each as often as makes their mean square rms²."""
    mantissa, exponent = math.frexp(rms)
    # rms² = 4^(exponent − 1) · (1 − p) + 4^exponent · p
    larger = jax.random.bernoulli(key, (4 * mantissa**2 - 1) / 3, shape)
    return jnp.where(larger, BIAS + exponent, BIAS - 1 + exponent).astype(jnp.uint8)


def mean_square(levels: int) -> float:
    """Of the integers 0 … levels − 1, each as likely as the others."""
    return (levels - 1) * (2 * levels - 1) / 6
