"""Products of many rows with quantized matrices, for prefill: routed experts, and single matrices.

A program owns a tile: bm rows of x and bn rows of a matrix. It walks along K in steps of bk: loads codes, makes a
bfloat16 tile of them, and adds a product on the tensor cores to a float32 sum. One kernel serves both uses: a tile of
rows meets one matrix of a stack, which is the expert of these rows, or the layer.

Experts: pairs (token, slot) are sorted by expert, and the kernel gathers the rows of x and scatters the results by
index, so activations are not copied. Nothing is added atomically: the same input gives the same bits.

Bounds, for S tokens of DeepSeek-V4-Flash's layer on an H200: 0.30 S GFLOP (1.9 ms for 4096 at 650 TFLOP/s); 6.4 G
weights to decode once for every bm rows of an expert, at 3.5 to 6 instructions each (1.0 ms at the full issue rate of
29 T/s); 1.9 GB of codes (0.5 ms). With 96 rows per expert the three are close, so several programs share a
multiprocessor, and one decodes while another multiplies.

Formats as in ggml (``ggml-common.h``), a matrix (N, K) split in planes (dtype, elements per K):

    F16, BF16  values K                                    Q8_0     d float16 K/32, q int8 K
    Q4_K       dm float16 K/128, scales uint32 3K/256, q uint32 K/8
    Q2_K       scales uint32 K/64, q uint32 K/16, dm float16 K/128
    IQ2_XXS    d float16 K/256, grid uint32 K/32, signs uint32 K/32
    MXFP4      e uint8 K/32, q uint32 K/8
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.common import SHARED_MEMORY, Implementation, Unsupported, call

Array = jax.Array
Planes = tuple[Array, ...]
Kind = Literal["gate_up", "down", "linear"]


@dataclass(frozen=True)
class Config:
    """Tile of bm rows of x, bn rows of each matrix, bk columns.

    fused: decode tiles in the kernel; otherwise XLA writes the whole matrix in bfloat16 and multiplies (linear only).
    """

    bm: int = 128
    bn: int = 128
    bk: int = 64
    num_warps: int = 8
    num_stages: int = 3
    fused: bool = True


# ---- shapes --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """One call. m tokens; matrices (n, k) in format `fmt`, a stack of `stack` of them: experts, or layers.

    slots: experts of a token. groups: of linear. clamp: of gate_up.
    """

    kind: Kind
    m: int
    n: int
    k: int
    fmt: str
    stack: int
    slots: int = 1
    groups: int = 1
    clamp: float = 10.0

    def inputs(self, key: Array) -> tuple:
        """Arguments of `grouped_gemm`, such that x and the products have about unit scale."""
        keys = jax.random.split(key, 5)
        rows = (self.m * self.slots,) if self.kind == "down" else (self.m,)
        rows += (self.groups,) if self.groups > 1 else ()
        x = jax.random.normal(keys[0], (*rows, self.k), jnp.float32).astype(jnp.bfloat16)
        w = [random_planes(self.fmt, key, (self.stack, self.n, self.k), self.k**-0.5) for key in keys[1:3]]
        if self.kind == "linear":
            return x, jnp.full((1,), self.stack - 1, jnp.int32), w[0]
        # Some experts are more popular than others, and a token takes one at most once.
        score = jax.random.normal(keys[3], (self.m, self.stack)) + jax.random.normal(keys[4], (self.stack,)) / 2
        score, ids = lax.top_k(score, self.slots)
        return (x, ids, jax.nn.softmax(score), *w) if self.kind == "gate_up" else (x, ids, w[0])

    @property
    def static(self) -> dict[str, Any]:
        extra = {"clamp": self.clamp} if self.kind == "gate_up" else {}
        extra = {"groups": self.groups} if self.kind == "linear" else extra
        return {"kind": self.kind, "fmt": self.fmt, **extra}

    @property
    def matrices(self) -> int:
        return 2 if self.kind == "gate_up" else 1

    @property
    def nbytes(self) -> int:
        """Every expert's codes once, x once, the result once (down: of every pair, written, read, and added up)."""
        read = self.m * self.k * (self.slots if self.kind == "down" else self.groups)
        written = self.m * self.n * {"gate_up": self.slots, "down": 2 * self.slots + 1, "linear": 1}[self.kind]
        weights = self.matrices * self.n * self.k * (1 if self.kind == "linear" else self.stack)
        return 2 * (read + written) + round(weights * FORMATS[self.fmt].bits / 8)

    @property
    def flops(self) -> int:
        return 2 * self.m * self.slots * self.matrices * self.n * self.k


def _layer(m: int, fmts: tuple[str, str], stack: int = 256) -> dict[str, Shape]:
    return {
        f"gate_up_{fmts[0].lower()}_{m}": Shape("gate_up", m, 2048, 4096, fmts[0], stack, 6),
        f"down_{fmts[1].lower()}_{m}": Shape("down", m, 4096, 2048, fmts[1], stack, 6),
    }


def _matrix(name: str, n: int, k: int, fmt: str, groups: int = 1) -> dict[str, Shape]:
    return {f"{name}_{m}": Shape("linear", m, n, k, fmt, 2, groups=groups) for m in (64, 2048)}


# DeepSeek-V4-Flash. A quarter of the experts in Q8_0: a stack of 256 would have 2^31 bytes.
SHAPES: dict[str, Shape] = (
    _layer(2048, ("IQ2_XXS", "Q2_K"))
    | _layer(4096, ("IQ2_XXS", "Q2_K"))
    | _layer(8192, ("IQ2_XXS", "Q2_K"))
    | _layer(2048, ("Q4_K", "Q4_K"))
    | _layer(2048, ("MXFP4", "MXFP4"))
    | _layer(2048, ("Q8_0", "Q8_0"), 64)
    | _matrix("q_b", 32768, 1024, "Q8_0")
    | _matrix("kv", 512, 4096, "Q8_0")
    | _matrix("output_a", 8192, 4096, "Q8_0", groups=8)
    | _matrix("output_b", 4096, 8192, "Q8_0")
    | _matrix("shared_gate", 2048, 4096, "Q8_0")
    | _matrix("shared_gate_q4_k", 2048, 4096, "Q4_K")
    | _matrix("shared_gate_mxfp4", 2048, 4096, "MXFP4")
    | _matrix("compressor", 1024, 4096, "F16")
    | _matrix("compressor_bf16", 1024, 4096, "BF16")
)


# ---- tile sizes ----------------------------------------------------------------------------------------------------
def shared_memory(shape: Shape, config: Config) -> int:
    """Bytes of shared memory that a block needs at most: x and codes of every stage in flight, and one decoded tile."""
    c = config
    codes = shape.matrices * c.bn * sum(
        max(1, c.bk // n * m) * np.dtype(dtype).itemsize for dtype, m, n in FORMATS[shape.fmt].planes
    )  # fmt: skip
    return c.num_stages * (2 * c.bm * c.bk + codes) + 2 * c.bn * c.bk


def configs(shape: Shape) -> list[Config]:
    """What a sweep tries."""
    n = shape.n // shape.groups
    out = [Config(fused=False)] if shape.kind == "linear" else []
    for bm, bn, bk, warps, stages in itertools.product((64, 128, 256), (64, 128), (64, 128), (4, 8), (2, 3)):
        c = Config(bm, bn, bk, warps, stages)
        accumulators = bm * bn * shape.matrices // (32 * warps)  # registers of a thread, of 255
        fits = shared_memory(shape, c) <= SHARED_MEMORY and 32 <= accumulators <= 128
        if fits and n % bn == 0 and shape.k % bk == 0:
            out.append(c)
    return out


def default_config(shape: Shape) -> Config:
    """A choice by counting. Rows of an expert decide bm; a large product is worth a decoded copy of the matrix."""
    if shape.kind == "linear" and shape.m >= 512:
        return Config(fused=False)
    rows = shape.m * shape.slots // (shape.stack if shape.kind != "linear" else 1)
    bm = 64 if rows <= 64 else 128
    bn = 64 if shape.kind == "gate_up" or bm == 64 or shape.n // shape.groups % 128 else 128
    long = bn == 64 and FORMATS[shape.fmt].bits < 8  # a step of 128 columns fits beside another
    return Config(bm, bn, 128 if long else 64, 8 if bm == 128 else 4, 2 if long else 3)


# ---- formats -------------------------------------------------------------------------------------------------------
class Tile(NamedTuple):
    """What a decoder sees: load(plane, columns) of this program's bn rows, step i of bk columns."""

    load: Callable[[int, Array], Array]
    table: Any
    step: Array
    bk: int
    fma: Callable[[Array, Array, Array], Array]

    def columns(self, per_step: int) -> Array:
        """The columns of this step in a plane that has `per_step` of them in bk weights: int32 (per_step,)."""
        return self.step * per_step + jnp.arange(per_step, dtype=jnp.int32)


def _iq2_xxs_codes() -> np.ndarray:
    """IQ2_XXS's 256 × 8 magnitudes {8, 25, 43} as uint16: 2-bit codes {0, 2, 3}, weight j in bits 2j and 2j + 1.

    bfloat16 has 8 = 0x4100, 25 = 0x4100 + 2·100 and 43 = 0x4100 + 3·100: a multiplication decodes two weights at once.
    """
    gguf.quants.IQ2_XXS.init_grid()
    grid = gguf.quants.IQ2_XXS.grid.reshape(256, 8)
    codes = np.select([grid == 8, grid == 25, grid == 43], [0, 2, 3]).astype(np.uint32)
    return (codes << (2 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint16)


IQ2_XXS_CODES = _iq2_xxs_codes()


def _u32(value: int) -> Array:
    return jnp.uint32(value)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _stack(parts: list[Array]) -> Array:
    """2^n arrays (...) → (..., 2^n). Triton joins two at a time, without moving data between threads."""
    if len(parts) == 1:
        return parts[0][..., None]
    even, odd = _stack(parts[0::2]), _stack(parts[1::2])
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], len(parts))


def _shift(words: Array, left: int) -> Array:
    return words << left if left >= 0 else words >> -left


def _planar(parts: list[Array]) -> Array:
    """[(bn, r, n)] → (bn, r · parts · n): run r of a row holds the n weights of part 0, then those of part 1, …"""
    bn, r, n = parts[0].shape
    return _stack(parts).transpose(0, 1, 3, 2).reshape(bn, r * len(parts) * n)


def _decode_dense(t: Tile) -> Array:
    return t.load(0, t.columns(t.bk)).astype(jnp.bfloat16)


def _decode_q8_0(t: Tile) -> Array:
    d = t.load(0, t.columns(t.bk // 32)).astype(jnp.float32)
    q = t.load(1, t.columns(t.bk)).astype(jnp.float32)
    return (q.reshape(*d.shape, 32) * d[..., None]).astype(jnp.bfloat16).reshape(q.shape)


def _decode_q4_k(t: Tile) -> Array:
    # A run of 8 words holds 64 weights: 32 in the low nibbles and 32 in the high, each with a scale and a minimum.
    run = t.columns(t.bk // 64)
    block, j = run >> 2, (run & 3).astype(jnp.uint32)
    q = t.load(2, t.columns(t.bk // 8))
    q = q.reshape(q.shape[0], -1, 8)
    d, dmin = (t.load(0, 2 * block + i).astype(jnp.float32) for i in (0, 1))
    words = [t.load(1, 3 * block + i) for i in range(3)]
    parts = []
    for h in (0, 1):
        lo_sc, lo_m, hi = (w >> (16 * (j & 1) + 8 * h)[None, :] for w in words)
        late = (j >= 2)[None, :]
        sc = jnp.where(late, (hi & 15) | (lo_sc >> 2 & 48), lo_sc & 63).astype(jnp.float32)
        m = jnp.where(late, (hi >> 4 & 15) | (lo_m >> 2 & 48), lo_m & 63).astype(jnp.float32)
        scale = (d * sc)[..., None]
        # The code in the upper bits of a significand is 16 + q.
        offset = -16 * scale - (dmin * m)[..., None]
        values = [
            _float(_shift(q, 19 - 4 * h - 8 * c) & _u32(0x780000) | _u32(0x41800000)) for c in range(4)
        ]  # fmt: skip
        parts.append(_stack([t.fma(v, scale, offset).astype(jnp.bfloat16) for v in values]))
    return _planar([p.reshape(*p.shape[:2], 32) for p in parts])


def _decode_q2_k(t: Tile) -> Array:
    # A run of 8 words holds 128 weights: 32 in bits 0-1 of the bytes, then bits 2-3, 4-5, 6-7. A group of 16 weights,
    # which is two bits of four words, has a byte sc | m << 4.
    shifts = min(4, t.bk // 32)
    runs = max(1, t.bk // 128)
    part = t.step * runs if t.bk >= 128 else t.step >> 1  # number of the run
    q = t.load(1, part * 8 + jnp.arange(8 * runs, dtype=jnp.int32))
    if t.bk == 64:  # the upper half of a run is bits 4-7
        q = q >> ((t.step & 1) * 4).astype(jnp.uint32)
    q = q.reshape(q.shape[0], 2 * runs, 4)
    half = jnp.arange(2 * runs, dtype=jnp.int32)  # half a run: four words
    block = (part + (half >> 1)) >> 1
    d, dmin = (t.load(2, 2 * block + i).astype(jnp.float32) for i in (0, 1))
    word = t.step if t.bk == 64 else 2 * (part + (half >> 1))
    words = [t.load(0, word + i + jnp.zeros_like(half)) for i in range(shifts // 2)]
    parts = []
    for s in range(shifts):
        b = words[s // 2] >> (8 * (half & 1) + 16 * (s % 2)).astype(jnp.uint32)[None, :]
        scale = (d * (b & 15).astype(jnp.float32))[..., None]
        # The code in the upper bits of a significand is 4 + q.
        offset = -4 * scale - (dmin * (b >> 4 & 15).astype(jnp.float32))[..., None]
        values = [_float(_shift(q, 21 - 2 * s - 8 * c) & _u32(0x600000) | _u32(0x40800000)) for c in range(4)]
        p = _stack([t.fma(v, scale, offset).astype(jnp.bfloat16) for v in values])
        parts.append(p.reshape(p.shape[0], runs, 32))
    return _planar(parts)


def _decode_iq2_xxs(t: Tile) -> Array:
    column = t.columns(t.bk // 32)
    grid, signs = t.load(1, column), t.load(2, column)
    scale = t.load(0, column >> 3).astype(jnp.float32) * ((signs >> 27 & 30) + 1).astype(jnp.float32) * 0.125
    # The eighth sign of a set is the parity of its seven: of all four sets at once, in bits 0, 7, 14 and 21.
    odd = signs ^ signs >> 1
    odd = odd ^ odd >> 2 ^ odd >> 4 ^ signs >> 6
    values = []
    for i in range(4):
        codes = t.table[(grid >> 8 * i & 255).astype(jnp.int32)].astype(jnp.uint32)
        # Two weights a word, j and j + 4: their codes in bits 2j and 2j + 16, their signs in bits j and j + 16.
        codes = codes | codes << 8
        sets = (signs >> 7 * i & 127) * _u32(0x1001) | _shift(odd, 19 - 7 * i) & _u32(0x80000)
        pairs = []
        for j in range(4):
            pair = (codes >> 2 * j & _u32(0x30003)) * _u32(100) + _u32(0x41004100)
            pairs.append(pair ^ sets << (15 - j) & _u32(0x80008000))
        values += [_float(pair << 16) for pair in pairs] + [_float(pair & _u32(0xFFFF0000)) for pair in pairs]
    w = _stack([(v * scale).astype(jnp.bfloat16) for v in values])
    return w.reshape(w.shape[0], t.bk)


def _decode_mxfp4(t: Tile) -> Array:
    # A block of 32 weights is four words: 16 weights in the low nibbles, 16 in the high ones.
    e = t.load(0, t.columns(t.bk // 32)).astype(jnp.uint32)
    q = t.load(1, t.columns(t.bk // 8))
    q = q.reshape(*e.shape, 4)
    # E2M1 bits within a float16 make 2^-14 times the value, the subnormal one included.
    scale = _float(jnp.minimum(e + 14, 254) << 23)[..., None]
    parts = []
    for h in (0, 1):
        pairs = []  # bytes c and c + 2 of each word
        for c in (0, 1):
            n = 4 * h + 8 * c
            pairs.append(_shift(q, 9 - n) & _u32(0x0E000E00) | _shift(q, 12 - n) & _u32(0x80008000))
        values = [p.astype(jnp.uint16) for p in pairs] + [(p >> 16).astype(jnp.uint16) for p in pairs]
        values = [lax.bitcast_convert_type(v, jnp.float16).astype(jnp.float32) * scale for v in values]
        parts.append(_stack([v.astype(jnp.bfloat16) for v in values]).reshape(*e.shape, 16))
    return _planar(parts)


# The same values in plain XLA, float32: planes (..., N, elements) → (..., N, K).
def _fields(words: Array, width: int) -> Array:
    """uint32 (..., n) → its fields of `width` bits, lowest first: (..., n, 32 / width)."""
    return words[..., None] >> jnp.arange(0, 32, width, dtype=jnp.uint32) & _u32((1 << width) - 1)


def _bytes(words: Array) -> Array:
    return _fields(words, 8).reshape(*words.shape[:-1], -1)


def _pair(dm: Array) -> tuple[Array, Array]:
    """d and dmin, float32 (..., blocks, 1)."""
    dm = dm.astype(jnp.float32).reshape(*dm.shape[:-1], -1, 2)
    return dm[..., :1], dm[..., 1:]


def _dequantize_q8_0(d: Array, q: Array) -> Array:
    return q.reshape(*d.shape, 32).astype(jnp.float32) * d[..., None].astype(jnp.float32)


def _dequantize_q4_k(dm: Array, scales: Array, q: Array) -> Array:
    d, dmin = _pair(dm)
    lo_sc, lo_m, hi = (_fields(scales.reshape(*d.shape[:-1], 3)[..., i], 8) for i in range(3))
    sc = jnp.concatenate([lo_sc & 63, hi & 15 | lo_sc >> 2 & 48], axis=-1)
    m = jnp.concatenate([lo_m & 63, hi >> 4 | lo_m >> 2 & 48], axis=-1)
    q = _bytes(q).reshape(*d.shape[:-1], 4, 1, 32) >> jnp.array([[0], [4]], jnp.uint32) & 15
    q = q.reshape(*sc.shape, 32).astype(jnp.float32)
    return (d * sc.astype(jnp.float32))[..., None] * q - (dmin * m.astype(jnp.float32))[..., None]


def _dequantize_q2_k(scales: Array, q: Array, dm: Array) -> Array:
    d, dmin = _pair(dm)
    b = _bytes(scales).reshape(*d.shape[:-1], 16)
    q = _bytes(q).reshape(*d.shape[:-1], 2, 1, 32) >> jnp.array([[0], [2], [4], [6]], jnp.uint32) & 3
    q = q.reshape(*b.shape, 16).astype(jnp.float32)
    return (d * (b & 15).astype(jnp.float32))[..., None] * q - (dmin * (b >> 4).astype(jnp.float32))[..., None]


def _dequantize_iq2_xxs(d: Array, grid: Array, signs: Array) -> Array:
    grid, signs = (p.reshape(*d.shape, 8) for p in (grid, signs))
    scale = d[..., None].astype(jnp.float32) * (0.5 + (signs >> 28).astype(jnp.float32)) * 0.25
    sets = signs[..., None] >> jnp.array([0, 7, 14, 21], jnp.uint32) & 127
    sets = sets | (lax.population_count(sets) & 1) << 7
    negative = sets[..., None] >> jnp.arange(8, dtype=jnp.uint32) & 1
    codes = jnp.asarray(IQ2_XXS_CODES)[_fields(grid, 8)].astype(jnp.uint32)
    codes = codes[..., None] >> 2 * jnp.arange(8, dtype=jnp.uint32) & 3
    magnitude = jnp.array([8, 0, 25, 43], jnp.float32)[codes]
    return scale[..., None, None] * jnp.where(negative == 1, -magnitude, magnitude)


def _dequantize_mxfp4(e: Array, q: Array) -> Array:
    code = _bytes(q).reshape(*e.shape, 1, 16) >> jnp.array([[0], [4]], jnp.uint32) & 15
    e2m1 = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], jnp.float32)
    return e2m1[code].reshape(*e.shape, 32) * _float(e.astype(jnp.uint32) << 23)[..., None]


@dataclass(frozen=True)
class Format:
    """One way to store a matrix (N, K). planes: (dtype, m, n), m elements for every n weights of a row.

    decode: the tile of one step, bfloat16 (bn, bk), in a kernel; bk is in STEPS.
    dequantize: planes → float32, of any shape that reshapes to the matrix.
    spread: standard deviation of the weights with random codes and d = 1. center: the dmin that makes their mean 0.
    """

    planes: tuple[tuple[Any, int, int], ...]
    decode: Callable[[Tile], Array]
    dequantize: Callable[..., Array]
    spread: float
    center: float = 0

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return sum(np.dtype(dtype).itemsize * 8 * m / n for dtype, m, n in self.planes)

    def structs(self, shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The planes of matrices of `shape` (..., N, K)."""
        return tuple(jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // n * m), dtype) for dtype, m, n in self.planes)


STEPS = (64, 128, 256)
_F16, _U32 = jnp.float16, jnp.uint32
FORMATS = {
    "F16": Format(((_F16, 1, 1),), _decode_dense, lambda values: values.astype(jnp.float32), 1),
    "BF16": Format(((jnp.bfloat16, 1, 1),), _decode_dense, lambda values: values.astype(jnp.float32), 1),
    "Q8_0": Format(((_F16, 1, 32), (jnp.int8, 1, 1)), _decode_q8_0, _dequantize_q8_0, 74),
    "Q4_K": Format(((_F16, 2, 256), (_U32, 3, 256), (_U32, 1, 8)), _decode_q4_k, _dequantize_q4_k, 258, 7.5),
    "Q2_K": Format(((_U32, 1, 64), (_U32, 1, 16), (_F16, 2, 256)), _decode_q2_k, _dequantize_q2_k, 13.9, 1.5),
    "IQ2_XXS": Format(((_F16, 1, 256), (_U32, 1, 32), (_U32, 1, 32)), _decode_iq2_xxs, _dequantize_iq2_xxs, 43),
    "MXFP4": Format(((jnp.uint8, 1, 32), (_U32, 1, 8)), _decode_mxfp4, _dequantize_mxfp4, 2.9),
}


def dequantize(fmt: str, planes: Planes) -> Array:
    """Matrices (..., N, K) in float32, by XLA."""
    dtype, m, n = FORMATS[fmt].planes[0]
    return FORMATS[fmt].dequantize(*planes).reshape(*planes[0].shape[:-1], planes[0].shape[-1] * n // m)


def random_planes(fmt: str, key: Array, shape: tuple[int, ...], std: float) -> Planes:
    """Matrices of `shape` (..., N, K) with random codes and scales; weights have about mean 0 and deviation `std`."""
    f = FORMATS[fmt]
    out = []
    keys = jax.random.split(key, len(f.planes))
    for key, p in zip(keys, f.structs(shape), strict=True):
        if p.dtype in (jnp.uint32, jnp.int8):
            plane = jax.random.bits(key, p.shape, f"uint{p.dtype.itemsize * 8}").astype(p.dtype)
        elif p.dtype == jnp.uint8:
            plane = jax.random.randint(key, p.shape, -1, 2) + (127 + round(math.log2(std / f.spread)))
        elif len(f.planes) == 1:
            plane = jax.random.normal(key, p.shape, jnp.float32) * std
        else:
            plane = jax.random.uniform(key, p.shape, jnp.float32, 0.5, 1.5) * (std / f.spread)
            if f.center:
                plane = plane * jnp.tile(jnp.array([1, f.center], jnp.float32), p.shape[-1] // 2)
        out.append(plane.astype(p.dtype))
    return tuple(out)


# ---- reference -----------------------------------------------------------------------------------------------------
def reference(*args: Any, kind: Kind, fmt: str, clamp: float = 0, groups: int = 1) -> Array:
    """What `grouped_gemm` computes, in float32: every expert meets every token."""
    dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    if kind == "linear":
        x, layer, planes = args
        x = x.reshape(x.shape[0], groups, -1).astype(jnp.float32)
        w = dequantize(fmt, tuple(p[layer[0]] for p in planes))
        return dot("mgk,gnk->mgn", x, w.reshape(groups, -1, w.shape[-1])).reshape(x.shape[0], -1)
    x, ids, *rest = args
    x, order = x.astype(jnp.float32), jnp.argsort(ids.reshape(-1), stable=True)
    expert = jnp.arange(rest[-1][0].shape[0], dtype=jnp.int32)
    if kind == "down":
        h = jnp.zeros_like(x).at[order].set(x).reshape(*ids.shape, -1)

        def add(total: Array, e: tuple[Array, Planes]) -> tuple[Array, None]:
            mine = jnp.where((ids == e[0])[..., None], h, 0).sum(1)
            return total + dot("sk,nk->sn", mine, dequantize(fmt, e[1])), None

        return lax.scan(add, jnp.zeros((ids.shape[0], rest[0][0].shape[1]), jnp.float32), (expert, rest[0]))[0]
    weight, *matrices = rest

    def put(y: Array, e: tuple[Array, Planes, Planes]) -> tuple[Array, None]:
        mine = activation(*(dot("sk,nk->sn", x, dequantize(fmt, w)) for w in e[1:]), clamp)
        return jnp.where((ids == e[0])[..., None], mine[:, None], y), None

    y = jnp.zeros((*ids.shape, matrices[0][0].shape[1]), jnp.float32)
    y = lax.scan(put, y, (expert, *matrices))[0] * weight[..., None]
    return y.reshape(ids.size, -1)[order]


# ---- which rows meet which matrix ----------------------------------------------------------------------------------
class Routing(NamedTuple):
    """Pairs (token, slot) in order of their expert, and of their number among equals.

    order: int32 (P,), the pair at each place; pair = token · slots + slot. counts: int32 (experts,), places that each
    expert has. Pairs of experts outside [0, experts) come last and have no place in `counts`.
    """

    order: Array
    counts: Array


def route(ids: Array, n_experts: int) -> Routing:
    """ids: int32 (S, slots), the expert of every pair."""
    ids = ids.reshape(-1)
    expert = jnp.where((ids >= 0) & (ids < n_experts), ids, n_experts)
    bits = max(1, (ids.size - 1).bit_length())
    if n_experts + 1 << bits > 2**31:
        raise Unsupported(f"routing: {ids.size} pairs among {n_experts} experts, expected a product below 2^31")
    # One sort of one array: the expert in the upper bits, the pair in the lower ones.
    order = jnp.sort(expert << bits | jnp.arange(ids.size, dtype=jnp.int32)) & ((1 << bits) - 1)
    counts = (expert[:, None] == jnp.arange(n_experts, dtype=jnp.int32)).sum(0, dtype=jnp.int32)
    return Routing(order, counts)


def tile_map(counts: Array, pairs: int, bm: int) -> Array:
    """Cuts each expert's rows into tiles of bm: int32 (3, tiles), of expert, first row, and rows (0: nothing to do).

    The number of tiles is static, large enough for every distribution of `pairs` rows.
    """
    n_experts = counts.shape[0]
    tiles = -(-counts // bm)
    last = jnp.cumsum(tiles)
    t = jnp.arange(pairs // bm + min(n_experts, pairs), dtype=jnp.int32)
    expert = jnp.minimum((last <= t[:, None]).sum(-1, dtype=jnp.int32), n_experts - 1)
    offset = (t - (last - tiles)[expert]) * bm  # within the expert's rows
    rows = jnp.clip(counts[expert] - offset, 0, bm)
    return jnp.stack([expert, (jnp.cumsum(counts) - counts)[expert] + offset, rows])


# ---- the kernel ----------------------------------------------------------------------------------------------------
def _fma(a: Array, b: Array, c: Array) -> Array:
    """a · b + c in one instruction; the compiler keeps a product and a sum apart. b and c are broadcast to a."""
    return plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, jnp.broadcast_to(b, a.shape), jnp.broadcast_to(c, a.shape)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )[0]


def _kernel(x, tiles, source, target, factor, table, *refs, formats, steps, clamp, config, interpret):
    """One tile: rows source[...] of x times bn rows of one matrix, or of gate and up, to rows target[...] of out."""
    c = config
    *planes, out = refs
    tile = pl.program_id(1)
    expert, start, rows = tiles[0, tile], tiles[1, tile], tiles[2, tile]
    columns = pl.program_id(0) * c.bn + jnp.arange(c.bn, dtype=jnp.int32)

    @pl.when(rows > 0)
    def _():
        # A tile that is not full repeats its last row: read again, computed again, and written again with equal bits.
        place = start + jnp.minimum(jnp.arange(c.bm, dtype=jnp.int32), rows - 1)
        row = source[place]

        def step(i, sums):
            k = i * c.bk + jnp.arange(c.bk, dtype=jnp.int32)
            x_tile = x[row[:, None], k[None, :]]
            after, first = [], 0
            for fmt, total in zip(formats, sums, strict=True):
                mine = planes[first : first + len(FORMATS[fmt].planes)]
                first += len(mine)

                def load(plane, columns_, mine=mine):
                    return mine[plane][expert, columns[:, None], columns_[None, :]]

                fma = (lambda a, b, c: a * b + c) if interpret else _fma
                w = FORMATS[fmt].decode(Tile(load, table, i, c.bk, fma))
                after.append(total + jnp.dot(x_tile, w.T, preferred_element_type=jnp.float32))
            return tuple(after)

        zero = jnp.zeros((c.bm, c.bn), jnp.float32)
        sums = lax.fori_loop(0, steps, step, (zero,) * len(formats))
        y = sums[0] if clamp is None else activation(*sums, clamp) * factor[place][:, None]
        out[target[place][:, None], columns[None, :]] = y.astype(out.dtype)


def activation(gate: Array, up: Array, clamp: float) -> Array:
    """silu(min(gate, clamp)) · clip(up, -clamp, clamp)."""
    gate = jnp.minimum(gate, clamp)
    return gate * jax.nn.sigmoid(gate) * jnp.clip(up, -clamp, clamp)


@functools.cache
def _call(n: int, k: int, tiles: int, out: jax.ShapeDtypeStruct, formats, clamp, config: Config, interpret: bool):
    kernel = functools.partial(
        _kernel, formats=formats, steps=k // config.bk, clamp=clamp, config=config, interpret=interpret
    )
    return call(
        kernel,
        name="grouped_gemm",
        grid=(n // config.bn, tiles),
        out_shape=out,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )


def _multiply(x, tiles, source, target, factor, matrices, formats, out, clamp, config, interpret) -> Array:
    n, k = out.shape[1], x.shape[1]
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"x: found {x.dtype}, expected bfloat16")
    for fmt, planes in zip(formats, matrices, strict=True):
        if fmt not in FORMATS:
            raise Unsupported(f"format: found {fmt!r}, expected one of {', '.join(FORMATS)}")
        expected = FORMATS[fmt].structs((*planes[0].shape[:-2], n, k))
        if [(p.shape, p.dtype) for p in planes] != [(p.shape, p.dtype) for p in expected]:
            raise Unsupported(f"planes of {fmt} {(n, k)}: found {planes}, expected {expected}")
    if config.bk not in STEPS:
        raise Unsupported(f"bk: found {config.bk}, expected one of {STEPS}")
    if n % config.bn or k % config.bk:
        raise Unsupported(f"matrix: found {n} × {k}, expected multiples of {config.bn} and {config.bk}")
    f = _call(n, k, tiles.shape[1], out, formats, clamp, config, interpret)
    planes = [p for planes in matrices for p in planes]
    return f(x, tiles, source, target, factor, jnp.asarray(IQ2_XXS_CODES), *planes)


# ---- ops -----------------------------------------------------------------------------------------------------------
def gate_up(
    x: Array, weight: Array, routing: Routing, gate: Planes, up: Planes, *, fmts: tuple[str, str], clamp: float,
    config: Config, interpret: bool = False,
) -> Array:  # fmt: skip
    """weight · silu(min(x Gᵀ, clamp)) · clip(x Uᵀ, -clamp, clamp) of every pair, bfloat16 (P, N) in routing's order.

    x: bfloat16 (S, K). weight: float32 (S, slots). gate, up: planes (experts, N, ...). Rows of pairs without an expert
    are undefined.
    """
    pairs = weight.size
    tiles = tile_map(routing.counts, pairs, config.bm)
    out = jax.ShapeDtypeStruct((pairs, gate[0].shape[1]), x.dtype)
    source = routing.order // weight.shape[1]
    target = jnp.arange(pairs, dtype=jnp.int32)
    factor = weight.reshape(-1)[routing.order]
    return _multiply(x, tiles, source, target, factor, (gate, up), fmts, out, clamp, config, interpret)


def down(
    h: Array, ids: Array, routing: Routing, planes: Planes, *, fmt: str, config: Config, interpret: bool = False
) -> Array:
    """Σ over the slots of h Wᵀ, bfloat16 (S, N). h: what `gate_up` returned, bfloat16 (P, K).

    The sum has a fixed order, so it repeats bit for bit.
    """
    n_experts, n, _ = planes[0].shape
    tiles = tile_map(routing.counts, ids.size, config.bm)
    out = jax.ShapeDtypeStruct((ids.size, n), h.dtype)
    source = jnp.arange(ids.size, dtype=jnp.int32)
    factor = jnp.zeros((1,), jnp.float32)
    y = _multiply(h, tiles, source, routing.order, factor, (planes,), (fmt,), out, None, config, interpret)
    y = y.reshape(*ids.shape, n).astype(jnp.float32)
    return jnp.where(((ids >= 0) & (ids < n_experts))[..., None], y, 0).sum(1).astype(h.dtype)


def experts(
    x: Array, ids: Array, weight: Array, w: tuple[Planes, Planes, Planes], *, fmts: tuple[str, str, str], clamp: float,
    configs: tuple[Config, Config] | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """Σ over the slots of weight · expert(x), bfloat16 (S, E).

    x: bfloat16 (S, E). ids: int32 (S, slots); an expert outside the planes' adds nothing. weight: float32 (S, slots).
    w: planes of gate, up and down. configs: of gate and up, and of down.
    """
    n_experts, n, _ = w[0][0].shape
    (s, k), slots = x.shape, ids.shape[1]
    if configs is None:
        shapes = Shape("gate_up", s, n, k, fmts[0], n_experts, slots), Shape("down", s, k, n, fmts[2], n_experts, slots)
        configs = default_config(shapes[0]), default_config(shapes[1])
    routing = route(ids, n_experts)
    h = gate_up(x, weight, routing, w[0], w[1], fmts=fmts[:2], clamp=clamp, config=configs[0], interpret=interpret)
    return down(h, ids, routing, w[2], fmt=fmts[2], config=configs[1], interpret=interpret)


def linear(
    x: Array, layer: Array, planes: Planes, *, fmt: str, groups: int = 1, config: Config | None = None,
    interpret: bool = False,
) -> Array:  # fmt: skip
    """x W[layer]ᵀ, bfloat16 (M, N). x: bfloat16 (M, K), or (M, groups, K) where group g meets rows
    [g · N/groups, (g + 1) · N/groups). layer: int32 (1,). planes: (layers, N, ...).
    """
    layers, n, _ = planes[0].shape
    m, k = x.shape[0], x.shape[-1]
    config = config or default_config(Shape("linear", m, n, k, fmt, layers, groups=groups))
    if not config.fused:
        w = dequantize(fmt, tuple(p[layer[0]] for p in planes)).astype(x.dtype).reshape(groups, n // groups, k)
        y = jnp.einsum("mgk,gnk->mgn", x.reshape(m, groups, k), w, preferred_element_type=jnp.float32)
        return y.reshape(m, n).astype(x.dtype)
    # Group g takes every groups-th row of x seen as (M · groups, K).
    planes = tuple(p.reshape(layers * groups, n // groups, p.shape[-1]) for p in planes)
    t = jnp.arange(-(-m // config.bm) * groups, dtype=jnp.int32)
    group, start = t % groups, t // groups * config.bm
    tiles = jnp.stack([layer[0] * groups + group, group * m + start, jnp.minimum(m - start, config.bm)])
    rows = (jnp.arange(m, dtype=jnp.int32) * groups + jnp.arange(groups, dtype=jnp.int32)[:, None]).reshape(-1)
    out = jax.ShapeDtypeStruct((m * groups, n // groups), x.dtype)
    factor = jnp.zeros((1,), jnp.float32)
    x = x.reshape(m * groups, k)
    return _multiply(x, tiles, rows, rows, factor, (planes,), (fmt,), out, None, config, interpret).reshape(m, n)


def grouped_gemm(
    *args: Any, kind: Kind, implementation: Implementation = "pallas", config: Config | None = None,
    interpret: bool = False, **static: Any,
) -> Array:  # fmt: skip
    """One op by name, with `Shape.inputs` and `Shape.static`, for tests, sweeps and benchmarks.

    gate_up: x, ids, weight, gate, up → (P, N), sorted by expert. down: h (P, K) sorted by expert, ids, planes → (S, N).
    linear: x, layer, planes → (M, N).
    """
    if implementation == "xla":
        return reference(*args, kind=kind, **static).astype(args[0].dtype)
    if kind == "linear":
        return linear(*args, config=config, interpret=interpret, **static)
    x, ids, *rest = args
    n_experts, n, _ = rest[-1][0].shape
    m, slots = ids.shape
    config = config or default_config(Shape(kind, m, n, x.shape[1], static["fmt"], n_experts, slots))
    routing = route(ids, n_experts)
    if kind == "down":
        return down(x, ids, routing, *rest, config=config, interpret=interpret, **static)
    fmts = (static["fmt"],) * 2
    return gate_up(x, rest[0], routing, *rest[1:], fmts=fmts, clamp=static["clamp"], config=config, interpret=interpret)
