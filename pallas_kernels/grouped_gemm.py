"""Products of many rows with quantized matrices, for prefill: routed experts, and single matrices.

A program owns a tile: some rows of x and some of a matrix. It walks along K in steps: loads codes, makes a 16-bit
tile of them in registers, and adds a product on the tensor cores to a float32 sum. One kernel serves both uses: a tile
of rows meets one matrix of a stack, which is the expert of these rows, or the layer.

Experts: pairs (token, slot) are sorted by expert, and the kernel gathers the rows of x and scatters the results by
index, so activations are not copied. Nothing is added atomically: the same input gives the same bits.

Weights are decoded once for all rows of a tile, so tiles are tall; but experts have few rows, most of them none of a
second tile, and a product takes as long for rows that are not there. So the kernel has its loop three times, for tiles
of up to bm / 4, bm / 2 and bm rows. On an H200 that takes 16 % off `gate_up` and 31 % off `down` (4096 tokens).

Bounds, for S tokens of DeepSeek-V4-Flash's layer on an H200: 0.30 S GFLOP (1.9 ms for 4096 at 650 TFLOP/s); 6.4 G
weights to decode once for every bm rows of an expert; x once for every tile of 128 rows of weights (7.7 GB from the L2
cache, 1.4 ms; the codes are 1.9 GB). With 96 rows per expert these are close, so warps that decode and warps that
multiply should share a multiprocessor.

Decoding: a multiprocessor issues 128 lanes of instructions per clock, but at most 64 of integer logic (shifts, masks,
`prmt`), 64 of integer products and 64 of conversions. So the 2-bit formats put codes into the bits of two float16 at a
time, where one instruction each subtracts what the bits mean without a code, and multiplies by the scale. Compiled, a
weight of IQ2_XXS takes 4.7 instructions all told (1.9 of integer logic), one of Q2_K 3.7 (1.2): together 1.0 ms at the
full issue rate of 29 T/s.

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
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common
from pallas_kernels.common import SHARED_MEMORY, Unsupported, call

Array = jax.Array
Planes = tuple[Array, ...]
Kind = Literal["gate_up", "down", "linear"]


STEP = 128  # columns of a step along K


@dataclass(frozen=True)
class Config:
    """Tile of bm rows of x at most and, for each warp, 16 rows of weights (of gate and up: 8 and 8).

    splits: of K, added up by XLA (linear only). fused: decode tiles in the kernel; otherwise XLA writes the whole
    matrix in bfloat16 and multiplies (linear only).
    """

    bm: int = 128
    num_warps: int = 8
    num_stages: int = 2
    splits: int = 1
    fused: bool = True

    def bn(self, matrices: int) -> int:
        """Columns of the result in a tile."""
        return 16 * self.num_warps // matrices

    @property
    def heights(self) -> list[int]:
        """Rows for which there is a loop, ascending."""
        return [bm for bm in (self.bm // 4, self.bm // 2) if bm >= 16] + [self.bm]


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
        dtype = FORMATS[self.fmt].dtype if self.kind == "down" else jnp.bfloat16
        x = jax.random.normal(keys[0], (*rows, self.k), jnp.float32).astype(dtype)
        w = [random_planes(self.fmt, key, (self.stack, self.n, self.k), self.k**-0.5) for key in keys[1:3]]
        if self.kind == "linear":
            return x, jnp.full((1,), self.stack - 1, jnp.int32), w[0]
        # Some experts are more popular than others, and a token takes one at most once.
        score = jax.random.normal(keys[3], (self.m, self.stack)) + jax.random.normal(keys[4], (self.stack,)) / 2
        score, ids = lax.top_k(score, self.slots)
        return (x, ids, jax.nn.softmax(score), *w) if self.kind == "gate_up" else (x, ids, w[0])

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any number of layers, and any limit."""
        return replace(self, stack=0 if self.kind == "linear" else self.stack, clamp=0.0)

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
    _layer(128, ("IQ2_XXS", "Q2_K"))
    | _layer(512, ("IQ2_XXS", "Q2_K"))
    | _layer(2048, ("IQ2_XXS", "Q2_K"))
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
def shared_memory(config: Config) -> int:
    """Bytes of shared memory that a block needs at most: tiles of x in flight, and half the decoded tile.

    Hopper needs the former only; other GPUs hand weights from thread to thread.
    """
    return config.num_stages * config.bm * STEP * 2 + config.num_warps * 16 * STEP


def configs(shape: Shape) -> list[Config]:
    """What a sweep tries: tiles taller than most experts' rows, and splits of K where there are few tiles."""
    n, steps = shape.n // shape.groups, shape.k // STEP
    linear = shape.kind == "linear"
    rows = shape.m * shape.slots // (1 if linear else shape.stack)
    heights = [bm for bm in (32, 64, 128) if min(rows, 256) / 4 < bm <= max(32, 8 * rows)]
    splits = (1, 2, 4, 8) if linear and rows < 512 else (1,)
    out = [Config(fused=False)] if linear else []
    for bm, warps, stages, split in itertools.product(heights, (4, 8, 16), (2,) if linear else (2, 3), splits):
        c = Config(bm, warps, stages, split)
        if shared_memory(c) <= SHARED_MEMORY and n % c.bn(shape.matrices) == 0 and steps % split == 0:
            out.append(c)
    return out


def default_config(shape: Shape) -> Config:
    """By counting: rows of an expert decide bm, and a large product is worth a decoded copy of the matrix."""
    if shape.kind == "linear":
        if shape.m >= 512 or shape.n // shape.groups % 64 or shape.k % STEP:
            return Config(fused=False)
        blocks = shape.n // 64 * -(-shape.m // 64)
        fitting = [s for s in (1, 2, 4, 8) if shape.k // STEP % s == 0]
        splits = next((s for s in fitting if blocks * s >= 264), fitting[-1])
        return Config(64, 4, 2, splits)
    rows = shape.m * shape.slots / shape.stack
    return Config(32, 8) if rows <= 8 else Config(64, 8) if rows <= 32 else Config(128, 16)


# ---- instructions --------------------------------------------------------------------------------------------------
def _asm(ptx: str, constraints: str, *args: Array, dtype: Any = jnp.int32) -> Array:
    shape = jnp.broadcast_shapes(*(a.shape for a in args))
    (out,) = plgpu.elementwise_inline_asm(
        ptx,
        args=[jnp.broadcast_to(a, shape) for a in args],
        constraints=constraints,
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, dtype)],
    )
    return out


def _halves(words: Array) -> list[Array]:
    """The two float16 of uint32 words, the low one first."""
    return [lax.bitcast_convert_type(w.astype(jnp.uint16), jnp.float16) for w in (words, words >> 16)]


class Gpu:
    """Instructions that Pallas has no name for. Words are uint32; arguments are broadcast."""

    @staticmethod
    def fma(a: Array, b: Array, c: Array) -> Array:
        """a · b + c in one instruction; the compiler keeps a product and a sum apart."""
        return _asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c, dtype=a.dtype)

    @staticmethod
    def bytes(low: Array, high: Array, which: Array | int) -> Array:
        """Four bytes, each chosen by a nibble 0-7 of the low half of `which` from the eight bytes of low and high."""
        which, constraint = ((str(which),), "") if isinstance(which, int) else ((which,), ",r")
        name, args = ("$3", which) if constraint else (which[0], ())
        return lax.bitcast_convert_type(
            _asm(f"prmt.b32 $0, $1, $2, {name};", "=r,r,r" + constraint, low, high, *args), jnp.uint32
        )

    @staticmethod
    def affine(codes: Array, zero: float, scale: Array, plus: Array | None = None) -> list[Array]:
        """(code - zero) · scale + plus of the two float16 in each word, the low one first, two at a time."""
        minus = int(np.float16(-zero).view(np.uint16)) * 0x10001
        ptx = f".reg .b32 v, s, p; mov.b32 v, {minus}; add.rn.f16x2 v, $1, v; mov.b32 s, {{$2, $2}}; "
        if plus is None:
            out = _asm(f"{{ {ptx} mul.rn.f16x2 $0, v, s; }}", "=r,r,h", codes, scale)
        else:
            ptx += "mov.b32 p, {$3, $3}; "
            out = _asm(f"{{ {ptx} fma.rn.f16x2 $0, v, s, p; }}", "=r,r,h,h", codes, scale, plus)
        return _halves(lax.bitcast_convert_type(out, jnp.uint32))


class Emulation:
    """The same in plain operations, for interpret mode."""

    @staticmethod
    def fma(a, b, c):
        return a * b + c

    @staticmethod
    def bytes(low, high, which):
        places = [jnp.uint32(which) >> 4 * i & 7 for i in range(4)]
        chosen = (jnp.where(n < 4, low, high) >> 8 * (n & 3) & 255 for n in places)
        return functools.reduce(jnp.bitwise_or, (byte << 8 * i for i, byte in enumerate(chosen)))

    @staticmethod
    def affine(codes, zero, scale, plus=None):
        scale, plus = scale.astype(jnp.float32), 0 if plus is None else plus.astype(jnp.float32)
        return [((h.astype(jnp.float32) - zero) * scale + plus).astype(jnp.float16) for h in _halves(codes)]


# ---- formats -------------------------------------------------------------------------------------------------------
class Tile(NamedTuple):
    """One step of a program: rows of a matrix, and columns [step · STEP, (step + 1) · STEP) in the format's order.

    load: (plane, columns of the plane) → (rows, columns). table, constants: TABLE, and its words from CONSTANTS on.
    op: Gpu, or Emulation.
    """

    load: Callable[[int, Array], Array]
    table: Any
    constants: list[Array]
    step: Array
    op: Any

    def columns(self, n: int) -> Array:
        """The columns of this step in a plane that has n of them in STEP weights: int32 (n,)."""
        return self.step * n + jnp.arange(n, dtype=jnp.int32)


# Constants of which a thread needs several at once. Of those that a compiler knows, or that all threads share, it makes
# a new copy for every use; so each is in the table once for every thread of a row.
CONSTANTS = 256


def _table() -> np.ndarray:
    """uint32: IQ2_XXS's 256 × 8 magnitudes as nibbles 0-2 for 8, 25, 43, then constants.

    Nibble n is weight 0, 4, 1, 5, 2, 6, 3, 7 of the eight. Constants: for IQ2_XXS the bytes 128 + magnitude, the bytes
    128 - magnitude, and the upper bytes of float16 in [16, 32); for Q2_K twice the float16 1024, and 256.
    """
    gguf.quants.IQ2_XXS.init_grid()
    grid = gguf.quants.IQ2_XXS.grid.reshape(256, 2, 4).transpose(0, 2, 1).reshape(256, 8)
    codes = np.searchsorted([8, 25, 43], grid).astype(np.uint32) << 4 * np.arange(8, dtype=np.uint32)
    signed = np.array([[136, 153, 171, 0], [120, 103, 85, 0]], np.uint8).view(np.uint32).reshape(-1)
    constants = np.array([*signed, 0x4C4C4C4C, 0x64006400, 0x5C005C00], np.uint32)
    return np.concatenate([codes.sum(1, dtype=np.uint32), np.repeat(constants, 4)])


TABLE = _table()


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


# Each format has two parts: what a step loads, a step ahead of its use, and the weights (rows, 4, 32) made of it. Where
# codes are looked up in a table, that is a part between, and the step loads two steps ahead. What a part passes on must
# be new: Triton gives up pipelining x when a value crosses two steps untouched.
#
# The tensor cores take a tile of weights from registers. Of 16 rows, threads 4 r to 4 r + 3 of a warp have rows r and
# r + 8; of 16 columns, the first of these threads has 0, 1, 8, 9, the second 2, 3, 10, 11, and so on. But a thread
# should load and decode neighbouring words. So the columns of a step are renumbered, those of x too: thread c decodes
# the 32 weights w[:, c], in any order that suits it, and columns 16 g + 8 a + 2 c + b of the tile are its weights
# 4 g + 2 a + b. And rows r and r + 8 are of gate and of up, or of two halves of the tile. Then nothing moves between
# threads, if a part of 8 rows per warp is loaded with 16 bytes, or one element, by each thread.
def _load_dense(t: Tile) -> Planes:
    return tuple(t.load(0, STEP * t.step + 32 * i + jnp.arange(32, dtype=jnp.int32)) for i in range(4))


def _decode_dense(t: Tile, *values: Array) -> Array:
    return _stack([v.astype(jnp.bfloat16).reshape(-1, 4, 8) for v in values]).swapaxes(2, 3).reshape(-1, 4, 32)


def _load_q8_0(t: Tile) -> Planes:
    c = jnp.arange(4, dtype=jnp.int32)
    d = (t.load(0, 4 * t.step + 2 * i + (c >> 1)) for i in (0, 1))
    return *d, *(t.load(1, STEP * t.step + 64 * i + jnp.arange(64, dtype=jnp.int32)) for i in (0, 1))


def _decode_q8_0(t: Tile, *planes: Array) -> Array:
    w = [
        q.astype(jnp.float32).reshape(-1, 4, 16) * d.astype(jnp.float32)[..., None]
        for d, q in zip(planes[:2], planes[2:], strict=True)
    ]
    return _stack([v.astype(jnp.bfloat16) for v in w]).swapaxes(2, 3).reshape(-1, 4, 32)


# Of a block of Q4_K, a run of 8 words holds 64 weights: 32 in the low nibbles and 32 in the high, each with a scale and
# a minimum. A step is two runs; a thread has half the words of one.
def _load_q4_k(t: Tile) -> Planes:
    block = (t.step >> 1) + jnp.zeros((4,), jnp.int32)
    dm, scales = (t.load(0, 2 * block + i) for i in (0, 1)), (t.load(1, 3 * block + i) for i in range(3))
    return *dm, *scales, t.load(2, t.columns(16))


def _decode_q4_k(t: Tile, d: Array, dmin: Array, low_sc: Array, low_m: Array, high: Array, q: Array) -> Array:
    q = q.reshape(*d.shape, 4)
    d, dmin = d.astype(jnp.float32), dmin.astype(jnp.float32)
    run = (jnp.arange(4, dtype=jnp.uint32) >> 1)[None, :]
    late = t.step & 1 == 1  # runs 2 and 3 of a block have their scales elsewhere
    terms = []
    for h in (0, 1):
        sc, m, both = (w >> (16 * run + 8 * h) for w in (low_sc, low_m, high))
        sc, m = (
            jnp.where(late, upper & 15 | word >> 2 & 48, word & 63).astype(jnp.float32)
            for upper, word in ((both, sc), (both >> 4, m))
        )
        # The code in the upper bits of a significand is 16 + q.
        terms.append(((d * sc)[..., None], (-16 * (d * sc) - dmin * m)[..., None]))
    values = []
    for b, h in itertools.product(range(4), (0, 1)):
        code = _float(_shift(q, 19 - 4 * h - 8 * b) & _u32(0x780000) | _u32(0x41800000))
        values.append(t.op.fma(code, *terms[h]).astype(jnp.bfloat16))
    return _stack(values).reshape(*d.shape, 32)


# Of a block of Q2_K, each of two runs of 8 words holds 128 weights: 32 in bits 0-1 of the bytes, then bits 2-3, 4-5,
# 6-7. A group of 16 weights, which is two bits of four words, has a byte sc | m << 4. A step is half the bits of all
# words; a thread has half the words of a run.
def _load_q2_k(t: Tile) -> Planes:
    block, run = (t.step >> 1) + jnp.zeros((4,), jnp.int32), jnp.arange(4, dtype=jnp.int32) >> 1
    dm = (t.load(2, 2 * block + i) for i in (0, 1))
    scales = t.load(0, 4 * block + 2 * run + (t.step & 1))
    return *dm, scales, t.load(1, (t.step >> 1) * 16 + jnp.arange(16, dtype=jnp.int32))


def _decode_q2_k(t: Tile, d: Array, dmin: Array, scales: Array, q: Array) -> Array:
    q = q.reshape(*d.shape, 4) >> ((t.step & 1) * 4).astype(jnp.uint32)
    scales = scales >> ((jnp.arange(4, dtype=jnp.uint32) & 1) * 8)[None, :]
    one, four = t.constants[3:]  # a code in bits 0-1 of 1024 adds 1 to it, one in bits 2-3 of 256, too
    sc = t.op.affine(scales & _u32(0x000F000F) | one, 1024, d)
    m = t.op.affine(scales & _u32(0x00F000F0) | _u32(0x54005400), 64, -dmin)
    one, four = one[..., None], four[..., None]
    values = []
    for s, b in itertools.product((0, 1), (0, 1)):
        # Bytes b and b + 2 of each word, two bits from 2 s on.
        code, zero = (q >> 8 * b & _u32(0xC000C) | four, 256) if s else (q >> 8 * b & _u32(0x30003) | one, 1024)
        values += t.op.affine(code, zero, sc[s][..., None], m[s][..., None])
    return _stack(values).reshape(*d.shape, 32)


def _load_iq2_xxs(t: Tile) -> Planes:
    column = t.columns(4)
    return t.load(0, column >> 3), t.load(1, column), t.load(2, column)


def _look_up_iq2_xxs(t: Tile, d: Array, grid: Array, signs: Array) -> Planes:
    # 1024 + s - 1023.5, where s is four bits.
    scale, _ = t.op.affine(signs >> 28 | _u32(0x6400), 1023.5, d * jnp.float16(16))
    return scale, signs & _u32(0xFFFFFFF), *(t.table[(grid >> 8 * i & 255).astype(jnp.int32)] for i in range(4))


def _decode_iq2_xxs(t: Tile, scale: Array, signs: Array, *magnitudes: Array) -> Array:
    positive, negative, upper = (jnp.broadcast_to(c, signs.shape) for c in t.constants[:3])
    values = []
    for i, codes in enumerate(magnitudes):
        # Copies of seven signs b at every seventh bit have b_j at bit 8 j and b_(j+4) at bit 8 j + 4; here two bits up.
        # The eighth makes their number even: a multiplication adds them up in the last nibble.
        minus = (signs >> 7 * i & 127) * _u32(0x00204081 << 2) & _u32(0x04444444)
        codes = codes | (minus | minus * _u32(0x11111111) & _u32(0x40000000))
        for half in (codes, codes >> 16):
            four = t.op.bytes(positive, negative, half)
            # Such a byte under the upper byte of 16 makes 16 + byte / 64.
            for two in (0x4140, 0x4342):
                values += t.op.affine(t.op.bytes(four, upper, two), 18, scale)
    return _stack(values)


# A block of MXFP4 is four words: 16 weights in the low nibbles, 16 in the high ones.
def _load_mxfp4(t: Tile) -> Planes:
    return t.load(0, t.columns(4)), t.load(1, t.columns(16))


def _decode_mxfp4(t: Tile, e: Array, q: Array) -> Array:
    q = q.reshape(*e.shape, 4)
    # E2M1 bits within a float16 make 2^-14 times the value, the subnormal one included.
    scale = _float(jnp.minimum(e.astype(jnp.uint32) + 14, 254) << 23)[..., None]
    values = {}
    for b, h in itertools.product((0, 1), (0, 1)):
        n = 8 * b + 4 * h
        pair = _shift(q, 9 - n) & _u32(0x0E000E00) | _shift(q, 12 - n) & _u32(0x80008000)  # of bytes b and b + 2
        for byte, half in (b, pair), (b + 2, pair >> 16):
            value = lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
            values[byte, h] = (value * scale).astype(jnp.bfloat16)
    return _stack([values[key] for key in sorted(values)]).reshape(*e.shape, 32)


@dataclass(frozen=True)
class Format:
    """One way to store a matrix (N, K). planes: (dtype, m, n), m elements for every n weights of a row.

    load, decode: in a kernel, what a step needs, and the weights (rows, 4, 32) of four threads made of it.
    order: (dims, axes); K, reshaped to (blocks, *dims) and transposed to (blocks, *axes), has the kernel's order.
    spread: standard deviation of the weights with random codes and d = 1. center: the dmin that makes their mean 0.
    dtype: of the weights' tile and of x: float16, where two weights are decoded at a time; its 11 bits hold more of a
    weight and all of a bfloat16 x below 65504 that is not tiny.
    look_up: between load and decode, a step ahead: what comes from a table.
    """

    planes: tuple[tuple[Any, int, int], ...]
    load: Callable[[Tile], Planes]
    decode: Callable[..., Array]
    order: tuple[tuple[int, ...], tuple[int, ...]]
    spread: float
    center: float = 0
    dtype: Any = jnp.bfloat16
    look_up: Callable[..., Planes] | None = None

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return sum(np.dtype(dtype).itemsize * 8 * m / n for dtype, m, n in self.planes)

    def structs(self, shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The planes of matrices of `shape` (..., N, K)."""
        return tuple(jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // n * m), dtype) for dtype, m, n in self.planes)


_F16, _U32 = jnp.float16, jnp.uint32
_DENSE = (4, 4, 2, 2, 2), (0, 2, 3, 1, 4)  # part, thread, and three bits of eight neighbours
FORMATS = {
    "F16": Format(((_F16, 1, 1),), _load_dense, _decode_dense, _DENSE, 1),
    "BF16": Format(
        ((jnp.bfloat16, 1, 1),), _load_dense, _decode_dense, _DENSE, 1
    ),
    "Q8_0": Format(((_F16, 1, 32), (jnp.int8, 1, 1)), _load_q8_0, _decode_q8_0,
        ((2, 4, 4, 2, 2), (0, 2, 3, 1, 4)),  # part, thread, and four bits of sixteen neighbours
        74),
    "Q4_K": Format(
        ((_F16, 2, 256), (_U32, 3, 256), (_U32, 1, 8)), _load_q4_k, _decode_q4_k,
        ((2, 2, 2, 4, 4), (3, 4, 0, 2, 1)),  # run, nibble, half, word, byte
        258, 7.5,
    ),
    "Q2_K": Format(
        ((_U32, 1, 64), (_U32, 1, 16), (_F16, 2, 256)), _load_q2_k, _decode_q2_k,
        ((2, 2, 2, 2, 4, 2, 2), (1, 4, 2, 6, 0, 3, 5)),  # run, step, bits, half, word, and two bits of the byte
        13.9, 1.5, dtype=_F16,
    ),
    "IQ2_XXS": Format(
        ((_F16, 1, 256), (_U32, 1, 32), (_U32, 1, 32)), _load_iq2_xxs, _decode_iq2_xxs,
        ((4, 4, 2, 2, 2), (1, 3, 4, 0, 2)),  # thread, set, and three bits of eight neighbours
        43, dtype=_F16, look_up=_look_up_iq2_xxs,
    ),
    "MXFP4": Format(
        ((jnp.uint8, 1, 32), (_U32, 1, 8)), _load_mxfp4, _decode_mxfp4,
        ((4, 2, 4, 4), (2, 3, 0, 1)),  # block, nibble, word, byte
        2.9,
    ),
}  # fmt: skip


def arrange(x: Array, fmt: str) -> Array:
    """x (..., K) with its columns in the order in which a kernel meets those of a matrix in `fmt`."""
    if fmt not in FORMATS:
        raise Unsupported(f"format: found {fmt!r}, expected one of {', '.join(FORMATS)}")
    (dims, axes), lead = FORMATS[fmt].order, x.ndim - 1
    if x.shape[-1] % math.prod(dims):
        raise Unsupported(f"columns for {fmt}: found {x.shape[-1]}, expected a multiple of {math.prod(dims)}")
    x_ = x.reshape(*x.shape[:-1], -1, *dims)
    return x_.transpose(*range(lead + 1), *(lead + 1 + a for a in axes)).reshape(x.shape)


def _operand(x: Array, fmt: str) -> Array:
    """x as the kernel takes it."""
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"x: found {x.dtype}, expected bfloat16")
    return arrange(x, fmt).astype(FORMATS[fmt].dtype)


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


def tile_map(counts: Array, pairs: int, bm: int, first: int = 0) -> Array:
    """Cuts each expert's rows into tiles of bm: int32 (3, tiles), of matrix, first row, and rows (0: nothing to do).

    first: the matrix of the first expert.

    The number of tiles is static, large enough for every distribution of `pairs` rows.
    """
    n_experts = counts.shape[0]
    tiles = -(-counts // bm)
    last = jnp.cumsum(tiles)
    t = jnp.arange(pairs // bm + min(n_experts, pairs), dtype=jnp.int32)
    expert = jnp.minimum((last <= t[:, None]).sum(-1, dtype=jnp.int32), n_experts - 1)
    offset = (t - (last - tiles)[expert]) * bm  # within the expert's rows
    rows = jnp.clip(counts[expert] - offset, 0, bm)
    return jnp.stack([first + expert, (jnp.cumsum(counts) - counts)[expert] + offset, rows])


# ---- the kernel ----------------------------------------------------------------------------------------------------
def _kernel(x, tiles, source, target, columns, factor, table, *refs, formats, steps, clamp, config, interpret):
    """One tile: some rows of one matrix, or of gate and up, times rows source[...] of x, to rows target[...] of out."""
    c = config
    *planes, out = refs
    ends = list(itertools.accumulate(len(FORMATS[fmt].planes) for fmt in formats))
    planes = [planes[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    column, tile, split = (pl.program_id(i) for i in range(3))
    expert, start, rows = tiles[0, tile], tiles[1, tile], tiles[2, tile]

    def multiply(bm: int) -> None:
        # A tile that is not full repeats its last row: read again, computed again, and written again with equal bits.
        place = start + jnp.minimum(jnp.arange(bm, dtype=jnp.int32), rows - 1)
        row, row_out = source[place], target[place]
        half = 8 * c.num_warps
        n = [
            column * c.bn(len(formats)) + i * half + jnp.arange(half, dtype=jnp.int32) for i in range(3 - len(formats))
        ]
        parts = [(fmt, mine, columns[m]) for fmt, mine in zip(formats, planes, strict=True) for m in n]
        thread = jnp.arange(4, dtype=jnp.int32)
        constants = [table[i + thread][None, :] for i in range(CONSTANTS, len(TABLE), 4)]
        op = Emulation if interpret else Gpu
        first = split * (steps // c.splits)
        last = first + steps // c.splits - 1

        def weights(i):
            for fmt, mine, row_w in parts:
                load = functools.partial(lambda mine, r, p, k: mine[p][expert, r[:, None], k[None, :]], mine, row_w)
                yield FORMATS[fmt], Tile(load, table, constants, i, op)

        def load(i):
            """What has to be there a step before it is looked up."""
            return [f.load(t) if f.look_up else () for f, t in weights(jnp.minimum(i, last))]

        def ready(i, loaded):
            """What `decode` needs."""
            tiles = zip(weights(jnp.minimum(i, last)), loaded, strict=True)
            return [f.look_up(t, *mine) if f.look_up else f.load(t) for (f, t), mine in tiles]

        def step(i, carry):
            total, codes, coming = carry
            x_tile = x[row[:, None], (i * STEP + jnp.arange(STEP, dtype=jnp.int32))[None, :]]
            w = [f.decode(t, *mine) for (f, t), mine in zip(weights(i), codes, strict=True)]
            # The codes of the next steps arrive while the tensor cores work.
            codes, coming = ready(i + 1, coming), load(i + 2)
            w = jnp.stack(w, -1).reshape(c.num_warps, 8, 4, 8, 2, 2, 2).transpose(0, 6, 1, 3, 4, 2, 5)
            w = w.reshape(2 * half, STEP)
            return total + jnp.dot(w, x_tile.T, preferred_element_type=jnp.float32), codes, coming

        total = jnp.zeros((2 * half, bm), jnp.float32)
        total, *_ = lax.fori_loop(first, last + 1, step, (total, ready(first, load(first)), load(first + 1)))
        y = jnp.unstack(total.reshape(c.num_warps, 2, 8, bm).transpose(0, 2, 3, 1), axis=-1)
        if clamp is not None:
            y = [activation(*y, clamp)]
        for part, m in zip(y, n, strict=True):
            part = part.reshape(half, bm)
            if clamp is not None:
                part = part * factor[place][None, :]
            out[split, row_out[:, None], m[None, :]] = part.astype(out.dtype).T

    for low, bm in itertools.pairwise([0, *c.heights]):
        pl.when((rows > low) & (rows <= bm))(functools.partial(multiply, bm))


def activation(gate: Array, up: Array, clamp: float) -> Array:
    """silu(min(gate, clamp)) · clip(up, -clamp, clamp)."""
    gate = jnp.minimum(gate, clamp)
    return gate * jax.nn.sigmoid(gate) * jnp.clip(up, -clamp, clamp)


@functools.cache
def _call(k: int, tiles: int, out: jax.ShapeDtypeStruct, formats, clamp, config: Config, interpret: bool):
    return call(
        functools.partial(
            _kernel, formats=formats, steps=k // STEP, clamp=clamp, config=config, interpret=interpret
        ),
        name=f"grouped_{k}_{out.shape[2]}",  # what a profile shows
        grid=(out.shape[2] // config.bn(len(formats)), tiles, config.splits),
        out_shape=out,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )  # fmt: skip


def _multiply(
    x: Array, tiles: Array, source: Array, target: Array, matrices: tuple[Planes, ...], formats: tuple[str, ...], *,
    config: Config, interpret: bool, columns: Array | None = None, factor: Array | None = None,
    clamp: float | None = None, dtype: Any = jnp.bfloat16,
) -> Array:  # fmt: skip
    """(rows, N) in `dtype`: row target[p] is row source[p] of x times a matrix, for the places p in `tiles`.

    x: in the format's dtype, its columns arranged. columns: int32 (N,), the rows of the matrix in order
    of the output's columns.
    """
    (_, n, _), k = matrices[0][0].shape, x.shape[-1]
    for fmt, planes in zip(formats, matrices, strict=True):
        if x.dtype != FORMATS[fmt].dtype:
            raise Unsupported(f"x for {fmt}: found {x.dtype}, expected {jnp.dtype(FORMATS[fmt].dtype)}")
        expected = FORMATS[fmt].structs((planes[0].shape[0], n, k))
        if [(p.shape, p.dtype) for p in planes] != [(p.shape, p.dtype) for p in expected]:
            raise Unsupported(f"planes of {fmt} {(n, k)}: found {planes}, expected {expected}")
    bn, bk = config.bn(len(formats)), STEP * config.splits
    if n % bn or k % bk:
        raise Unsupported(f"matrix: found {n} × {k}, expected multiples of {bn} and {bk}")
    if columns is None:
        columns = jnp.arange(n, dtype=jnp.int32)
    if factor is None:
        factor = jnp.zeros((1,), jnp.float32)
    dtype = jnp.dtype(dtype)
    out = jax.ShapeDtypeStruct((config.splits, target.shape[0], n), dtype if config.splits == 1 else jnp.float32)
    f = _call(k, tiles.shape[1], out, formats, clamp, config, interpret)
    planes = [p for planes in matrices for p in planes]
    y = f(x, tiles, source, target, columns, factor, jnp.asarray(TABLE), *planes)
    return y[0] if config.splits == 1 else y.sum(0).astype(dtype)


# ---- ops -----------------------------------------------------------------------------------------------------------
def gate_up(
    x: Array, weight: Array, routing: Routing, gate: Planes, up: Planes, *, fmt: str, clamp: float, config: Config,
    columns: Array | None = None, dtype: Any = jnp.bfloat16, first: int = 0, interpret: bool = False,
) -> Array:  # fmt: skip
    """weight · silu(min(x Gᵀ, clamp)) · clip(x Uᵀ, -clamp, clamp) of every pair, (P, N) in routing's order, in `dtype`.

    x: bfloat16 (S, K). weight: float32 (S, slots). gate, up: planes (matrices, N, ...), where that of the first expert
    is number `first`. columns: int32 (N,), an order of the result's columns. Rows of pairs without an expert are
    undefined.
    """
    pairs = weight.size
    return _multiply(
        _operand(x, fmt), tile_map(routing.counts, pairs, config.bm, first),
        routing.order // weight.shape[1], jnp.arange(pairs, dtype=jnp.int32), (gate, up), (fmt, fmt),
        columns=columns, factor=weight.reshape(-1)[routing.order], clamp=clamp, dtype=dtype, config=config,
        interpret=interpret,
    )  # fmt: skip


def down(
    h: Array, ids: Array, routing: Routing, planes: Planes, *, fmt: str, config: Config, first: int = 0,
    interpret: bool = False,
) -> Array:  # fmt: skip
    """Σ over the slots of h Wᵀ, bfloat16 (S, N). h: (P, K) in the format's dtype and routing's order, columns arranged.

    planes, first: as for `gate_up`. The sum has a fixed order, so it repeats bit for bit.
    """
    n_experts, n = routing.counts.shape[0], planes[0].shape[1]
    places = jnp.arange(ids.size, dtype=jnp.int32)
    tiles = tile_map(routing.counts, ids.size, config.bm, first)
    y = _multiply(h, tiles, places, routing.order, (planes,), (fmt,), config=config, interpret=interpret)
    y = y.reshape(*ids.shape, n).astype(jnp.float32)
    return jnp.where(((ids >= 0) & (ids < n_experts))[..., None], y, 0).sum(1).astype(jnp.bfloat16)


def experts(
    x: Array, ids: Array, weight: Array, gate: Planes, up: Planes, down_: Planes, *, fmts: tuple[str, str],
    clamp: float, n_experts: int | None = None, first: tuple[int, int] = (0, 0),
    config: common.Choice[Config, Shape] | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """Σ over the slots of weight · expert(x), bfloat16 (S, E).

    x: bfloat16 (S, E). ids: int32 (S, slots); an expert outside 0 … n_experts - 1 adds nothing. weight: float32
    (S, slots). fmts: of gate and up, and of down. n_experts, first: of the planes' matrices (by default all of
    them), and which is the first, again of gate and up, and of down.
    """
    n_experts, n = n_experts or gate[0].shape[0], gate[0].shape[1]
    (s, k), slots = x.shape, ids.shape[1]
    shapes = Shape("gate_up", s, n, k, fmts[0], n_experts, slots), Shape("down", s, k, n, fmts[1], n_experts, slots)
    configs = [common.choose(config or default_config, shape) for shape in shapes]
    routing = route(ids, n_experts)
    columns = arrange(jnp.arange(n, dtype=jnp.int32), fmts[1])  # as `down` wants them
    h = gate_up(
        x, weight, routing, gate, up, fmt=fmts[0], clamp=clamp, columns=columns, dtype=FORMATS[fmts[1]].dtype,
        first=first[0], config=configs[0], interpret=interpret,
    )  # fmt: skip
    return down(h, ids, routing, down_, fmt=fmts[1], first=first[1], config=configs[1], interpret=interpret)


def linear(
    x: Array, layer: Array, planes: Planes, *, fmt: str, groups: int = 1, dtype: Any = None,
    config: common.Choice[Config, Shape] | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """x W[layer]ᵀ, (M, N) in `dtype`, by default x's. x: bfloat16 (M, K), or (M, groups, K) where group g meets rows
    [g · N/groups, (g + 1) · N/groups). layer: int32 (1,). planes: (layers, N, ...).
    """
    layers, n, _ = planes[0].shape
    m, k = x.shape[0], x.shape[-1]
    config = common.choose(config or default_config, Shape("linear", m, n, k, fmt, layers, groups=groups))
    if not config.fused:
        raise Unsupported(f"linear: found {config}, which leaves the product to XLA, expected fused=True")
    # Group g takes every groups-th row of x seen as (M · groups, K).
    planes = tuple(p.reshape(layers * groups, n // groups, p.shape[-1]) for p in planes)
    t = jnp.arange(-(-m // config.bm) * groups, dtype=jnp.int32)
    group, start = t % groups, t // groups * config.bm
    tiles = jnp.stack([layer[0] * groups + group, group * m + start, jnp.minimum(m - start, config.bm)])
    rows = (jnp.arange(m, dtype=jnp.int32) * groups + jnp.arange(groups, dtype=jnp.int32)[:, None]).reshape(-1)
    x = _operand(x.reshape(m * groups, k), fmt)
    dtype = dtype or jnp.bfloat16
    y = _multiply(x, tiles, rows, rows, (planes,), (fmt,), config=config, dtype=dtype, interpret=interpret)
    return y.reshape(m, n)


def grouped_gemm(
    *args: Any, kind: Kind, fmt: str, config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False, **static: Any,
) -> Array:  # fmt: skip
    """One op by name, with `Shape.inputs` and `Shape.static`, for tests, sweeps and benchmarks.

    gate_up: x, ids, weight, gate, up → (P, N), sorted by expert. down: h (P, K) sorted by expert, in the format's
    dtype, its columns arranged, ids, planes → (S, N). linear: x, layer, planes → (M, N).
    """
    if kind == "linear":
        return linear(*args, fmt=fmt, config=config, interpret=interpret, **static)
    x, ids, *rest = args
    n_experts, n, _ = rest[-1][0].shape
    shape = Shape(kind, ids.shape[0], n, x.shape[1], fmt, n_experts, ids.shape[1])
    config = common.choose(config or default_config, shape)
    routing, f = route(ids, n_experts), {"fmt": fmt, "config": config, "interpret": interpret}
    if kind == "down":
        return down(x, ids, routing, *rest, **f)
    return gate_up(x, rest[0], routing, *rest[1:], **f, **static)
