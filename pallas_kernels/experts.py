"""Routed experts for 1 to 32 tokens: gate and up with their activation, then down with the sum over a token's experts.

Decoding reads each chosen expert once; with 2-bit weights the instructions, not the bytes, are the bound: while 4 TB/s
bring one IQ2_XXS weight, 132 multiprocessors issue two instructions a lane, one of them integer logic. Hence:

* Activations become 16-bit fixed point, one scale per `Format.unit` of weights (`pack`; its rounding is 2e-5 of the
  norm). `dp2a` multiplies two of them with two 8-bit weights, so that a weight costs half an instruction and no
  conversion to float; sums in int32 are exact and meet their scales once per unit.
* Weights become four signed bytes per word: K-quants by shift and mask, IQ2_XXS and MXFP4 by `prmt`, which looks up
  four 3-bit codes in eight bytes at once. For IQ2_XXS a code is two bits of magnitude, from a table of the 256 grid
  entries as nibbles, and the sign. A multiplication spreads a set of seven signs over the nibbles, another one adds up
  their parity, which is the eighth.
* A thread holds the same units of every row it works on, so activations are loaded once per program and nothing
  changes threads before the last sum over a row. `pack` puts them in the order in which words yield their weights.

Planes of a matrix (n, K) per format (bit layouts: ggml, ``ggml-common.h``); experts have one more leading axis:

    IQ2_XXS  d float16 (n, K/256), grid uint32 (n, K/32), signs uint32 (n, K/32)
    Q2_K     scales uint32 (n, K/64), q uint32 (n, K/16), dm float16 (n, K/128)
    Q4_K     dm float16 (n, K/128), scales uint32 (n, 3K/256), q uint32 (n, K/8)
    MXFP4    e uint8 (n, K/32), q uint32 (n, K/8)
    Q8_0     d float16 (n, K/32), q int8 (n, K)

Formulas: ds4jax/ops/experts.py. Integer dot products for such formats: llama.cpp's ``vecdotq.cuh``, which
takes 8-bit activations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common, formats
from pallas_kernels.common import Unsupported

Array = jax.Array
Ref = Any
Stage = Literal["gate_up", "down"]

MAX_TOKENS = 32
FIXED = 32767  # the largest fixed-point activation


@dataclass(frozen=True)
class Config:
    """A program has `num_warps` warps; each takes `rows` rows of a matrix, one after the other.

    tokens: how many tokens of one expert a program of gate_up serves at most; experts with more are read again.
    sign_tables: how many of the four sign sets of an IQ2_XXS word come from a table (loads) instead of arithmetic.
    """

    num_warps: int = 4
    rows: int = 2
    tokens: int = 1
    sign_tables: int = 0


# ---- instructions ----------------------------------------------------------------------------------------------------
def _ptx(ptx: str, constraints: str, *args: Array, dtype=jnp.int32, pack: int = 1) -> Array:
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    (out,) = plgpu.elementwise_inline_asm(
        ptx, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return out


def _i32(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


class Gpu:
    """Instructions that Pallas has no name for. All arrays of one call have one shape; words are int32 or uint32."""

    @staticmethod
    def dot4(w: Array, x0: Array, x1: Array, total: Array) -> Array:
        """total + the four signed bytes of w times the two signed halves of x0 and the two of x1."""
        ptx = "dp2a.lo.s32.s32 $0, $2, $1, $4; dp2a.hi.s32.s32 $0, $3, $1, $0;"
        return _ptx(ptx, "=&r,r,r,r,r", w, x0, x1, total)

    @staticmethod
    def lookup(codes: Array, low: Array, high: Array) -> Array:
        """Four bytes, each chosen by a nibble 0-7 of the low half of `codes` from the eight bytes of low and high."""
        return _ptx("prmt.b32 $0, $2, $3, $1;", "=r,r,r,r", codes, low, high)

    @staticmethod
    def words(x: Array) -> Array:
        """int8 (..., 4 n) → int32 (..., n). A thread's four bytes are one register: this only gives it a name."""
        ptx = "mov.b32 $0, $4; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        spread = _ptx(ptx, "=r,=r,=r,=r,r", x, pack=4)
        return spread.reshape(*x.shape[:-1], -1, 4).sum(-1)

    @staticmethod
    def fence() -> None:
        """Loads written before stay before: the compiler would move them down to the first use of their values."""
        plgpu.debug_barrier()


class Emulation:
    """The same in plain operations, for interpret mode."""

    @staticmethod
    def _fields(words: Array, bits: int) -> Array:
        """Signed fields of `bits` bits, lowest first, on a new last axis."""
        shape = *words.shape, 32 // bits
        low = bits * lax.broadcasted_iota(jnp.int32, shape, words.ndim)
        return _i32(words)[..., None] << (32 - bits - low) >> (32 - bits)

    @classmethod
    def dot4(cls, w, x0, x1, total):
        x = jnp.concatenate([cls._fields(x0, 16), cls._fields(x1, 16)], axis=-1)
        return total + (cls._fields(w, 8) * x).sum(-1)

    @classmethod
    def lookup(cls, codes, low, high):
        chosen = (cls._fields(codes, 4)[..., :4] & 7)[..., None]
        bytes_ = jnp.concatenate([cls._fields(low, 8), cls._fields(high, 8)], axis=-1)[..., None, :]
        chosen = chosen == lax.broadcasted_iota(jnp.int32, (*chosen.shape[:-1], 8), chosen.ndim - 1)
        return cls.words(jnp.where(chosen, bytes_, 0).sum(-1))[..., 0]

    @staticmethod
    def words(x):
        place = 8 * (lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) % 4)
        return ((x.astype(jnp.int32) & 255) << place).reshape(*x.shape[:-1], -1, 4).sum(-1)

    @staticmethod
    def fence():
        pass


# ---- formats ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Program:
    """What a program has at hand. k: the columns of a row; table: the format's."""

    fmt: type[Format]
    k: int
    config: Config
    op: type[Gpu] | type[Emulation]
    table: Ref | None = None

    def units(self, start: Array | int) -> Array:
        """int32 (warps, n): the numbers of the units of one step along the rows, the same for every warp."""
        shape = self.config.num_warps, min(self.k // self.fmt.unit, self.fmt.step)
        return start + lax.broadcasted_iota(jnp.int32, shape, 1)

    def sweep(
        self, experts: int, expert: Callable, rows: Sequence[tuple[Sequence[Ref], Array]], packed: Ref, tokens: Callable
    ) -> list[list[Array]]:
        """[row][token] → float32 (warps, n), what every thread has of sums over experts of rows times activations.

        expert(i), tokens(i): the number of the i-th expert, and which `packed` activations it meets. rows: planes and
        the first of num_warps rows. The next weights are on their way while these are used; the last are read twice.
        """
        units = self.k // self.fmt.unit
        step = min(units, self.fmt.step)
        steps = units // step
        last = experts * steps - 1
        which = steps.bit_length() - 1  # item i is step i & (steps - 1) of expert i >> which

        def load(i, expert):
            start = (i & steps - 1) * step
            loaded = [self.fmt.load(refs, Tile(self, start, expert, row)) for refs, row in rows]
            self.op.fence()
            return loaded

        def dot(i, loaded):
            units = self.units((i & steps - 1) * step)
            return self.fmt.dot(loaded, [Activations(packed, t, self.fmt, units) for t in tokens(i >> which)], self)

        def body(i, carry):
            loaded, following, totals = carry
            ahead = load(jnp.minimum(i + 1, last), following), expert(jnp.minimum(i + 2, last) >> which)
            return *ahead, jax.tree.map(jnp.add, totals, dot(i, loaded))

        loaded = load(0, expert(0))
        if last == 0:
            return dot(0, loaded)
        zeros = [[jnp.zeros((self.config.num_warps, step), jnp.float32) for _ in tokens(0)] for _ in rows]
        return lax.fori_loop(0, last + 1, body, (loaded, expert(1 >> which), zeros))[-1]


@dataclass(frozen=True)
class Tile:
    """One step, from unit `start` on, along rows `row`, `row` + 1, … of an expert, one for each warp."""

    program: Program
    start: Array | int
    expert: Array
    row: Array

    @property
    def units(self) -> Array:
        return self.program.units(self.start)

    def at(self, ref: Ref, columns: Array) -> Array:
        """Of each warp's row the values at `columns`, (warps, units)."""
        return ref[self.expert, self.row + lax.broadcasted_iota(jnp.int32, columns.shape, 0), columns]

    def pair(self, ref: Ref, columns: Array) -> list[Array]:
        """The values at 2 · columns and at 2 · columns + 1."""
        shape = *columns.shape, 2
        warp, which = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 2))
        both = ref[self.expert, self.row + warp, columns[..., None] * 2 + which]
        return [p.reshape(columns.shape) for p in lax.split(both, (1, 1), axis=2)]

    def quads(self, ref: Ref) -> list[Array]:
        """The four words of each unit, (warps, units) each. A thread loads them as one value of 16 bytes."""
        warps, n = self.units.shape
        size = 16 // ref.dtype.itemsize
        words = ref[self.expert, pl.ds(self.row, warps), pl.ds(self.start * size, n * size)]
        words = self.program.op.words(words) if words.dtype == jnp.int8 else words
        return [p.reshape(warps, n) for p in lax.split(words.reshape(warps, n, 4), (1,) * 4, axis=2)]


class Activations:
    """The packed activations of one token as a program sees them: arrays (warps, units), equal in every row."""

    def __init__(self, ref: Ref, token: Array | int, fmt: type[Format], units: Array):
        self._ref, self._token, self._fmt, self._units = ref, token, fmt, units

    def words(self, start: int, n: int) -> list[Array]:
        """Words 2 i and 2 i + 1 hold the four activations that meet the unit's i-th four weights."""
        return [self._ref[self._token, start + i, self._units] for i in range(n)]

    def sum(self, group: int) -> Array:
        """The sum of a group's activations."""
        return self.words(self._fmt.unit // 2 + group, 1)[0]

    @property
    def scale(self) -> Array:
        return lax.bitcast_convert_type(self.sum(self._fmt.sums), jnp.float32)


class Format:
    """How the weights of a format come out of its planes.

    unit: weights that one scale of the activations covers. A thread has whole units; a row has K / unit of them.
    step: units that the threads of a warp take at once, so that each loads 16 bytes.
    sums: groups of a unit whose activations' sum is needed, for a format with minima.
    planes: (dtype, values per 256 weights) of each plane, in order.
    """

    unit: ClassVar[int]
    step: ClassVar[int] = 32
    sums: ClassVar[int] = 0
    planes: ClassVar[tuple[tuple[str, int], ...]]

    @classmethod
    def order(cls, k: int) -> np.ndarray:
        """int (units, unit): the columns of each unit in the order in which `dot` takes them."""
        raise NotImplementedError

    @classmethod
    def table(cls) -> np.ndarray | None:
        """uint32: what `dot` looks up in memory."""
        return None

    @classmethod
    def load(cls, refs: Sequence[Ref], tile: Tile) -> tuple:
        """What `dot` needs of a tile, arrays (warps, units)."""
        raise NotImplementedError

    @classmethod
    def dot(cls, rows: Sequence[tuple], xs: Sequence[Activations], program: Program) -> list[list[Array]]:
        """[row][token] → float32 (warps, units), each unit's part of the product."""
        raise NotImplementedError


def _bytes(*values: int) -> np.int32:
    """Up to four signed bytes as one word."""
    return np.array([*values, 0, 0, 0][:4], np.int8).view(np.int32)[0]


class IQ2_XXS(Format):
    """w = d·(1 + 2 s)/8 · magnitude · sign: groups of 32 with a 4-bit s, in super-blocks of 256."""

    unit = 32
    step = 128
    planes = (("float16", 1), ("uint32", 8), ("uint32", 8))
    # Nibble n of a spread set is sign 0, 4, 1, 5, 2, 6, 3, 7 (see `spread`).
    nibbles = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    magnitudes = (8, 25, 43)

    @classmethod
    def order(cls, k):
        return (np.arange(k // 8)[:, None] * 8 + cls.nibbles).reshape(-1, cls.unit)

    @staticmethod
    def spread(sets: Array) -> Array:
        """Seven signs b in bits 0-6 → bit 2 of each nibble; the eighth, in nibble 7, makes their number even."""
        # Copies of b at every seventh bit have b_i at bit 8 i and b_(i+4) at bit 8 i + 4.
        signs = sets * jnp.uint32(0x00204081 << 2) & jnp.uint32(0x04444444)
        return signs | (signs * jnp.uint32(0x11111111) & jnp.uint32(0x40000000))

    @classmethod
    @functools.cache
    def table(cls):
        """uint32 (512): the grid as nibbles 0-2, the sign sets as of `spread`, 64 times each word for `lookup`."""
        reference = gguf.quants.IQ2_XXS
        reference.init_grid()
        grid = reference.grid.reshape(256, 8)[:, cls.nibbles]
        codes = np.searchsorted(cls.magnitudes, grid).astype(np.uint32)
        sets = np.arange(128)
        bits = np.stack([sets >> i & 1 for i in range(7)], axis=1)
        bits = np.concatenate([bits, bits.sum(1, keepdims=True) & 1], axis=1)[:, cls.nibbles].astype(np.uint32)
        place = 4 * np.arange(8, dtype=np.uint32)
        out = np.zeros(512, np.uint32)
        out[:256] = (codes << place).sum(1)
        out[256:384] = (bits << place + 2).sum(1)
        out[384:448], out[448:] = (_bytes(*(sign * m for m in cls.magnitudes)).view(np.uint32) for sign in (1, -1))
        return out

    @classmethod
    def load(cls, refs, tile):
        d, grid, signs = refs
        return tile.at(grid, tile.units), tile.at(signs, tile.units), tile.at(d, tile.units >> 3)

    @classmethod
    def dot(cls, rows, xs, program):
        shape = rows[0][0].shape
        # Read per warp: what all threads share lies in a uniform register, and `prmt` would copy it for every use.
        warp = lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        low, high = (jnp.broadcast_to(_i32(program.table[start + warp]), shape) for start in (384, 448))
        totals = [[jnp.zeros(shape, jnp.int32) for _ in xs] for _ in rows]
        for b in range(4):
            words = [x.words(4 * b, 4) for x in xs]
            for total, (grid, signs, _) in zip(totals, rows, strict=True):
                codes = program.table[_i32(grid >> jnp.uint32(8 * b) & jnp.uint32(255))]
                sets = signs >> jnp.uint32(7 * b) & jnp.uint32(127)
                codes = codes | (
                    program.table[_i32(sets) + 256] if b < program.config.sign_tables else cls.spread(sets)
                )
                for half in range(2):
                    w = program.op.lookup(codes >> jnp.uint32(16 * half), low, high)
                    for t, x in enumerate(words):
                        total[t] = program.op.dot4(w, *x[2 * half :][:2], total[t])
        scales = [x.scale for x in xs]
        out = []
        for total, (_, signs, d) in zip(totals, rows, strict=True):
            group, d = _i32(signs >> jnp.uint32(28)) * 2 + 1, d.astype(jnp.float32) * 0.125
            out.append([(n * group).astype(jnp.float32) * (d * x) for n, x in zip(total, scales, strict=True)])
        return out


class Grouped(Format):
    """What formats share whose unit is four words of codes, in `groups` groups that each have a scale in the row."""

    groups: ClassVar[int]

    @classmethod
    def codes(cls, words: Array, group: int, program: Program) -> Array:
        """One of a unit's words → the four signed bytes in it that belong to a group."""
        raise NotImplementedError

    @classmethod
    def products(cls, row: tuple, group: int, xs: list[list[Array]], program: Program) -> list[Array]:
        """The group's dot product of one row with each token's words."""
        totals = [jnp.zeros_like(x[0]) for x in xs]
        for i, words in enumerate(row[0]):
            w = cls.codes(words, group, program)
            totals = [program.op.dot4(w, *x[2 * i :][:2], total) for x, total in zip(xs, totals, strict=True)]
        return totals


class KQuant(Grouped):
    """w = (d·sc)·q − (dmin·m), with small integers sc and m per group."""

    @classmethod
    def group_scales(cls, row: tuple, group: int) -> tuple[Array, Array]:
        """sc and m, int32."""
        raise NotImplementedError

    @classmethod
    def dot(cls, rows, xs, program):
        products = [[0 for _ in xs] for _ in rows]
        minima = [[0 for _ in xs] for _ in rows]
        per_group = cls.unit // 2 // cls.groups
        for g in range(cls.groups):
            words = [x.words(per_group * g, per_group) for x in xs]
            sums = [x.sum(g) for x in xs]
            for i, row in enumerate(rows):
                sc, m = cls.group_scales(row, g)
                for t, n in enumerate(cls.products(row, g, words, program)):
                    products[i][t] += sc * n
                    minima[i][t] += m * sums[t]
        scales = [x.scale for x in xs]
        return [
            [
                (d.astype(jnp.float32) * n.astype(jnp.float32) - dmin.astype(jnp.float32) * m.astype(jnp.float32)) * x
                for n, m, x in zip(product, minimum, scales, strict=True)
            ]
            for (*_, d, dmin), product, minimum in zip(rows, products, minima, strict=True)
        ]


class Q2_K(KQuant):
    """Super-blocks of 256: runs of 32 bytes of codes, whose bits 2 j and 2 j + 1 are 32 weights, two groups of 16.

    A unit is half a run: one group for each j.
    """

    unit = 64
    groups = sums = 4
    planes = (("uint32", 4), ("uint32", 16), ("float16", 2))

    @classmethod
    def order(cls, k):
        u, j, c = np.ix_(np.arange(k // 64), np.arange(4), np.arange(16))
        return (u // 2 * 128 + u % 2 * 16 + 32 * j + c).reshape(-1, cls.unit)

    @classmethod
    def load(cls, refs, tile):
        scales, q, dm = refs
        # Scale bytes of a run's eight groups are two words; every other byte is this half's.
        shift = (8 * (tile.units & 1)).astype(jnp.uint32)
        scales = [word >> shift for word in tile.pair(scales, tile.units >> 1)]
        return tile.quads(q), *scales, *tile.pair(dm, tile.units >> 2)

    @classmethod
    def codes(cls, words, group, program):
        return words >> jnp.uint32(2 * group) & jnp.uint32(0x03030303)

    @classmethod
    def group_scales(cls, row, group):
        word = row[1 + group // 2] >> jnp.uint32(16 * (group % 2))
        return _i32(word & jnp.uint32(15)), _i32(word >> jnp.uint32(4) & jnp.uint32(15))


class Q4_K(KQuant):
    """Super-blocks of 256: runs of 32 bytes of codes, the low nibbles one group of 32, the high ones the next.

    A unit is half a run: 16 weights of each group.
    """

    unit = 32
    groups = sums = 2
    planes = (("float16", 2), ("uint32", 3), ("uint32", 32))

    @classmethod
    def order(cls, k):
        u, n, c = np.ix_(np.arange(k // 32), np.arange(2), np.arange(16))
        return (u // 2 * 64 + u % 2 * 16 + 32 * n + c).reshape(-1, cls.unit)

    @classmethod
    def load(cls, refs, tile):
        dm, scales, q = refs
        block, run = tile.units >> 3, tile.units >> 1 & 3
        # Words 0 and 1 hold sc and m of groups 0-3 in six bits and, on top, two bits of those of groups 4-7, whose low
        # nibbles are in word 2. Shifted so that this run's two groups are the low two bytes.
        shift = ((run & 1) * 16).astype(jnp.uint32)
        sc, m, low = (tile.at(scales, block * 3 + i) >> shift for i in range(3))
        late, six = run >= 2, jnp.uint32(0x3F3F)
        sc = jnp.where(late, low & jnp.uint32(0x0F0F) | sc >> jnp.uint32(2) & jnp.uint32(0x3030), sc & six)
        low = low >> jnp.uint32(4)
        m = jnp.where(late, low & jnp.uint32(0x0F0F) | m >> jnp.uint32(2) & jnp.uint32(0x3030), m & six)
        return tile.quads(q), sc, m, *tile.pair(dm, block)

    @classmethod
    def codes(cls, words, group, program):
        return words >> jnp.uint32(4 * group) & jnp.uint32(0x0F0F0F0F)

    @classmethod
    def group_scales(cls, row, group):
        return tuple(_i32(word >> jnp.uint32(8 * group) & jnp.uint32(255)) for word in row[1:3])


class OneScale(Grouped):
    """One scale per unit, the last value of a row."""

    @classmethod
    def dot(cls, rows, xs, program):
        per_group = cls.unit // 2 // cls.groups
        totals = [[0 for _ in xs] for _ in rows]
        for g in range(cls.groups):
            words = [x.words(per_group * g, per_group) for x in xs]
            for i, row in enumerate(rows):
                for t, n in enumerate(cls.products(row, g, words, program)):
                    totals[i][t] += n
        scales = [x.scale for x in xs]
        return [
            [n.astype(jnp.float32) * (row[-1] * x) for n, x in zip(total, scales, strict=True)]
            for row, total in zip(rows, totals, strict=True)
        ]


class MXFP4(OneScale):
    """w = 2^(e − 127) · E2M1: byte i of a block's sixteen has weight i in its low and weight 16 + i in its high nibble.

    Bytes are twice the E2M1 values, 0 to 12. A group is the low or the high half of every word.
    """

    unit = 32
    groups = 2
    planes = (("uint8", 8), ("uint32", 32))
    values = (0, 1, 2, 3, 4, 6, 8, 12)

    @classmethod
    def order(cls, k):
        u, half, i, byte, nibble = np.ix_(np.arange(k // 32), *(np.arange(n) for n in (2, 4, 2, 2)))
        return (u * 32 + 4 * i + 2 * half + byte + 16 * nibble).reshape(-1, cls.unit)

    @classmethod
    def load(cls, refs, tile):
        e, q = refs
        # 2^(e - 128): the exponent field of a float32; e = 0 (2^-127 at most) counts as zero.
        e = tile.at(e, tile.units).astype(jnp.int32)
        return tile.quads(q), lax.bitcast_convert_type(e << 23, jnp.float32) * 0.5

    @classmethod
    def codes(cls, words, group, program):
        codes = words >> jnp.uint32(16 * group)

        def bytes_(sign: int) -> Array:
            halves = (jnp.full(words.shape, _bytes(*(sign * v for v in cls.values[i:][:4])), jnp.int32) for i in (0, 4))
            return program.op.lookup(codes & jnp.uint32(0x7777), *halves)

        # Byte i of the positive ones, or of the negative ones (4 + i) where the nibble's sign bit is set.
        return program.op.lookup(
            jnp.uint32(0x3210) | codes >> jnp.uint32(1) & jnp.uint32(0x4444), bytes_(1), bytes_(-1)
        )


class Q8_0(OneScale):
    """w = d·q, blocks of 32; a unit is half a block."""

    unit = 16
    groups = 1
    planes = (("float16", 8), ("int8", 256))

    @classmethod
    def order(cls, k):
        return np.arange(k).reshape(-1, cls.unit)

    @classmethod
    def load(cls, refs, tile):
        d, q = refs
        return tile.quads(q), tile.at(d, tile.units >> 1).astype(jnp.float32)

    @classmethod
    def codes(cls, words, group, program):
        return words


FORMATS: dict[str, type[Format]] = {f.__name__: f for f in (IQ2_XXS, Q2_K, Q4_K, MXFP4, Q8_0)}


# ---- shapes ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """One call of a stage for `tokens` tokens that use `used` of `experts` experts each; matrices are (n, k)."""

    stage: Stage
    fmt: str
    tokens: int
    k: int
    n: int
    experts: int = 256
    used: int = 6
    clamp: float = 10.0

    def inputs(self, key: Array) -> tuple:
        """The arguments of `gate_up` or `down`: distinct experts per token, outputs of about unit scale."""
        keys = jax.random.split(key, 5)
        ids = jnp.argsort(jax.random.uniform(keys[0], (self.tokens, self.experts)), axis=-1)[:, : self.used]
        ids = ids.astype(jnp.int32)
        random = formats.find(self.fmt).random
        matrix = functools.partial(random, shape=(self.experts, self.n, self.k), std=self.k**-0.5)
        if self.stage == "down":
            return jax.random.normal(keys[1], (self.tokens * self.used, self.k)), ids, matrix(keys[2])
        x = jax.random.normal(keys[1], (self.tokens, self.k))
        weights = jax.random.uniform(keys[4], ids.shape, jnp.float32, 0.1, 0.4)
        return x, ids, weights, matrix(keys[2]), matrix(keys[3])

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stacks, and any limit."""
        return replace(self, experts=0, clamp=0.0)

    @property
    def static(self) -> dict:
        """Keyword arguments of `experts` besides the arrays."""
        return {"stage": self.stage, "fmt": self.fmt} | ({"clamp": self.clamp} if self.stage == "gate_up" else {})

    @property
    def touched(self) -> float:
        """Expected number of distinct experts."""
        return self.experts * (1 - (1 - self.used / self.experts) ** self.tokens)

    @property
    def matrices(self) -> int:
        return 2 if self.stage == "gate_up" else 1

    @property
    def nbytes(self) -> int:
        """Weights of the experts touched, activations, results."""
        per_256 = sum(np.dtype(dtype).itemsize * n for dtype, n in FORMATS[self.fmt].planes)
        pairs = self.tokens * self.used
        rows = (self.tokens, pairs) if self.stage == "gate_up" else (pairs, self.tokens)
        weights = self.touched * self.matrices * self.n * self.k * per_256 / 256
        return round(weights) + 4 * (rows[0] * self.k + rows[1] * self.n)

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.used * self.matrices * self.n * self.k


def _shapes() -> dict[str, Shape]:
    out = {}
    for gate_up_fmt, down_fmt in (("IQ2_XXS", "Q2_K"), ("Q4_K", "Q4_K"), ("MXFP4", "MXFP4"), ("Q8_0", "Q8_0")):
        for tokens in (1, 2, 4, 16, 32) if gate_up_fmt == "IQ2_XXS" else (1, 16):
            out[f"gate_up {gate_up_fmt} {tokens}"] = Shape("gate_up", gate_up_fmt, tokens, k=4096, n=2048)
            out[f"down {down_fmt} {tokens}"] = Shape("down", down_fmt, tokens, k=2048, n=4096)
    return out


SHAPES: dict[str, Shape] = _shapes()


# ---- ops -------------------------------------------------------------------------------------------------------------
def experts(*arrays, stage: Stage, **options) -> Array:
    """`gate_up` or `down`, by name."""
    return (gate_up if stage == "gate_up" else down)(*arrays, **options)


def gate_up(
    x: Array,
    ids: Array,
    weights: Array,
    gate: Sequence[Array],
    up: Sequence[Array],
    *,
    fmt: str,
    clamp: float,
    first: Array | None = None,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> Array:
    """silu(min(g, clamp)) · clip(u, -clamp, clamp) · weight for each token and each of its experts.

    x (S, K) float, or what `pack` makes of it for `fmt`; ids (S, k) int32, negative where the expert is held elsewhere;
    weights (S, k) float32; planes of gate and up, each (experts, F, K) in `fmt`. first: int32 (1,), the number among
    these experts that id 0 has, by default 0. Returns float32 (S·k, F), the pairs of a token one after the other, zeros
    for experts held elsewhere. Raises Unsupported.
    """
    packed = x.ndim == 3
    (S, k), K = ids.shape, x.shape[2] * FORMATS[fmt].unit if packed and fmt in FORMATS else x.shape[1]
    _, F = _check(fmt, K, S, gate)
    if _check(fmt, K, S, up)[1] != F:
        raise Unsupported(f"gate_up: found gate {gate[0].shape} and up {up[0].shape}, expected equal shapes")
    config = common.choose(config or default_config, Shape("gate_up", fmt, S, K, F, used=k))
    _check_config(config, F)
    table = FORMATS[fmt].table()
    tables = () if table is None else (jnp.asarray(table),)
    f = _gate_up(fmt, S, k, K, F, clamp, config, interpret)
    x = x if packed else pack(x, fmt=fmt, interpret=interpret)
    groups = _groups(ids) if min(config.tokens, S) > 1 else ()
    return f(x, ids.reshape(-1), _first(first), weights.reshape(-1), *groups, *gate, *up, *tables)


def down(
    act: Array,
    ids: Array,
    planes: Sequence[Array],
    plus: Array | None = None,
    *,
    fmt: str,
    first: Array | None = None,
    dtype: Any = jnp.float32,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> Array:
    """Σ over a token's experts of W act, in the order of `ids`, and what `plus` adds: (S, E) in `dtype`.

    act (S·k, F) float, as `gate_up` returns it, zeros for experts held elsewhere; ids and first as there; planes
    (experts, E, F) in `fmt`; plus: float32 (S, E) or None. Sums are float32. Raises Unsupported.
    """
    (S, k), F = ids.shape, act.shape[1]
    _, E = _check(fmt, F, S, planes)
    config = common.choose(config or default_config, Shape("down", fmt, S, F, E, used=k))
    _check_config(config, E)
    table = FORMATS[fmt].table()
    tables = () if table is None else (jnp.asarray(table),)
    f = _down(fmt, S, k, F, E, plus is not None, jnp.dtype(dtype), config, interpret)
    act = pack(act, fmt=fmt, interpret=interpret)
    return f(act, ids.reshape(-1), _first(first), *([] if plus is None else [plus]), *planes, *tables)


def pack(x: Array, *, fmt: str, interpret: bool = False) -> Array:
    """Activations (S, K) as 16-bit fixed point in the order of a format's weights, int32 (S, words, units).

    Of each unit: unit / 2 words of two values, the sums of its groups, the scale (the bits of a float32).
    """
    packing = Packing(fmt, x.shape[1])
    return _pack(packing, len(x), interpret)(x, packing.order)


def _check(fmt: str, K: int, S: int, planes: Sequence[Array]) -> tuple[int, int]:
    """(experts, rows) of a matrix (…, K), or Unsupported."""
    Packing(fmt, K)
    if not 1 <= S <= MAX_TOKENS:
        raise Unsupported(f"tokens: found {S}, expected 1 to {MAX_TOKENS}")
    found = [(p.dtype.name, p.shape[2:]) for p in planes]
    expected = [(dtype, (n * K // 256,)) for dtype, n in FORMATS[fmt].planes]
    if found != expected:
        raise Unsupported(f"{fmt} planes of rows of {K} values: found {found}, expected {expected}")
    return planes[0].shape[:2]


def _check_config(config: Config, n: int) -> None:
    if n % (config.num_warps * config.rows):
        raise Unsupported(f"rows: found {n}, expected a multiple of {config.num_warps} · {config.rows}, see {config}")


def _first(first: Array | None) -> Array:
    return jnp.zeros((1,), jnp.int32) if first is None else first


def _groups(ids: Array) -> tuple[Array, Array]:
    """Of each pair, how many pairs before it have the same expert, and the next one that has it, or how many there are.

    Both are a reduction with nothing after it, so that XLA makes them in one kernel.
    """
    ids = ids.reshape(-1)
    n = jnp.arange(ids.size, dtype=jnp.int32)
    same = ids[:, None] == ids[None, :]
    rank = (same & (n[None, :] < n[:, None])).sum(1, dtype=jnp.int32)
    return rank, jnp.where(same & (n[None, :] > n[:, None]), n[None, :], ids.size).min(1)


# ---- kernels ---------------------------------------------------------------------------------------------------------
@functools.cache
def _order(fmt: str, K: int) -> np.ndarray:
    """int32 (2, words, units): the column of the low and of the high half of every word."""
    order = FORMATS[fmt].order(K).astype(np.int32)
    return np.ascontiguousarray(order.reshape(len(order), -1, 2).T)


@dataclass(frozen=True)
class Packing:
    """`pack` as a part of a kernel: `programs` programs of one warp make a token's. Raises Unsupported."""

    fmt: str
    K: int

    def __post_init__(self):
        if self.fmt not in FORMATS:
            raise Unsupported(f"format: found {self.fmt}, expected one of {', '.join(FORMATS)}")
        if self.K < 256 or self.K & (self.K - 1):
            raise Unsupported(f"columns: found {self.K}, expected a power of two, 256 at least")

    @property
    def shape(self) -> tuple[int, int]:
        """Of a token: words, units."""
        form = FORMATS[self.fmt]
        return form.unit // 2 + form.sums + 1, self.K // form.unit

    @property
    def order(self) -> Array:
        """int32 (2, words, units): the column of the low and of the high half of every word."""
        return jnp.asarray(_order(self.fmt, self.K))

    @property
    def block(self) -> int:
        """Units per program."""
        return min(self.shape[1], 8)

    @property
    def programs(self) -> int:
        return self.shape[1] // self.block

    def run(self, x: Ref, order: Ref, out: Ref, s: Array, program: Array) -> None:
        """Refs: x (S, K), order, out (S, words, units)."""
        here, row = pl.ds(program * self.block, self.block), 0
        for part in self.parts(*(x[s, order[i, :, here]] for i in range(2))):
            out[s, pl.ds(row, len(part)), here] = part
            row += len(part)

    def parts(self, low: Array, high: Array) -> list[Array]:
        """Activations of words (words, units), low and high halves → words, sums, if there are any, and scales."""
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        largest = jnp.maximum(jnp.abs(low), jnp.abs(high)).max(0, keepdims=True)
        factor = jnp.where(largest > 0, FIXED / largest, 0.0)
        low, high = _round(low * factor), _round(high * factor)
        groups = FORMATS[self.fmt].sums
        sums = [(low + high).reshape(groups, -1, low.shape[1]).sum(1)] if groups else []
        return [low & 0xFFFF | high << 16, *sums, lax.bitcast_convert_type(largest * (1 / FIXED), jnp.int32)]


@functools.cache
def _pack(packing: Packing, S: int, interpret: bool):
    def kernel(x, order, out):
        packing.run(x, order, out, pl.program_id(0), pl.program_id(1))

    return common.call(
        kernel,
        name=f"pack_{packing.fmt}",
        grid=(S, packing.programs),
        out_shape=jax.ShapeDtypeStruct((S, *packing.shape), jnp.int32),
        num_warps=1,
        num_stages=1,
        interpret=interpret,
    )


def _round(x: Array) -> Array:
    """The nearest int32 of float32 values below 2^22: adding 1.5 · 2^23 leaves it in the low bits of the sum."""
    return lax.bitcast_convert_type(x + jnp.float32(1.5 * 2**23), jnp.int32) - 0x4B400000


@functools.cache
def _gate_up(fmt: str, S: int, k: int, K: int, F: int, clamp: float, config: Config, interpret: bool):
    planes, warps, tokens = len(FORMATS[fmt].planes), config.num_warps, min(config.tokens, S)

    def kernel(x, ids, first_expert, weights, *rest):
        (rank, following), rest = (rest[:2], rest[2:]) if tokens > 1 else ((None, None), rest)
        gate, up, (*table, out) = rest[:planes], rest[planes : 2 * planes], rest[2 * planes :]
        program = Program(FORMATS[fmt], K, config, Emulation if interpret else Gpu, *table)
        pair, first = pl.program_id(0), pl.program_id(1) * warps * config.rows
        starts = [first + warps * i for i in range(config.rows)]

        def serve(pairs: list[Array]) -> None:
            rows = [(refs, start) for start in starts for refs in (gate, up)]
            dots = iter(program.sweep(1, lambda _: expert, rows, x, lambda _: [p // k for p in pairs]))
            for start in starts:
                for p, *both in zip(pairs, next(dots), next(dots), strict=True):
                    g, u = (part.sum(1) for part in both)
                    g = jnp.minimum(g, clamp)
                    out[p, pl.ds(start, warps)] = g / (1 + jnp.exp(-g)) * jnp.clip(u, -clamp, clamp) * weights[p]

        held, expert = ids[pair] >= 0, ids[pair] + first_expert[0]

        @pl.when(~held)
        def _():
            for start in starts:
                out[pair, pl.ds(start, warps)] = jnp.zeros((warps,), jnp.float32)

        # Of the pairs of one expert every tokens-th serves itself and those that follow.
        pairs = [pair]
        for _ in range(1, tokens):
            pairs.append(jnp.where(pairs[-1] < S * k, following[jnp.minimum(pairs[-1], S * k - 1)], S * k))
        found = sum((p < S * k).astype(jnp.int32) for p in pairs)
        serves = held & (rank[pair] % tokens == 0) if tokens > 1 else held
        for n in range(1, tokens + 1):
            pl.when(serves & (found == n) if tokens > 1 else serves)(functools.partial(serve, pairs[:n]))

    return common.call(
        kernel,
        name=f"experts_gate_up_{fmt}",
        grid=(S * k, F // (warps * config.rows)),
        out_shape=jax.ShapeDtypeStruct((S * k, F), jnp.float32),
        num_warps=warps,
        num_stages=1,
        interpret=interpret,
    )


@functools.cache
def _down(fmt: str, S: int, k: int, F: int, E: int, adds: bool, dtype: np.dtype, config: Config, interpret: bool):
    planes, warps = len(FORMATS[fmt].planes), config.num_warps

    def kernel(act, ids, first_expert, *rest):
        plus, rest = (rest[0], rest[1:]) if adds else (None, rest)
        refs, (*table, out) = rest[:planes], rest[planes:]
        program = Program(FORMATS[fmt], F, config, Emulation if interpret else Gpu, *table)
        s, first = pl.program_id(0), pl.program_id(1) * warps * config.rows
        starts, zero = [first + warps * i for i in range(config.rows)], first_expert[0]

        def expert(i):
            return jnp.maximum(ids[s * k + i], 0) + zero

        def put(start: Array, total: Array) -> None:
            here = s, pl.ds(start, warps)
            out[here] = (total + plus[here] if adds else total).astype(dtype)

        def serve() -> None:
            totals = program.sweep(k, expert, [(refs, start) for start in starts], act, lambda i: [s * k + i])
            for start, (total,) in zip(starts, totals, strict=True):
                put(start, total.sum(1))

        if S == 1:
            return serve()
        # Of several tokens some may be none, and have no experts.
        some = functools.reduce(jnp.maximum, (ids[s * k + i] for i in range(k))) >= 0
        pl.when(some)(serve)

        @pl.when(~some)
        def _():
            for start in starts:
                put(start, jnp.zeros((warps,), jnp.float32))

    return common.call(
        kernel,
        name=f"experts_down_{fmt}",
        grid=(S, E // (warps * config.rows)),
        out_shape=jax.ShapeDtypeStruct((S, E), dtype),
        num_warps=warps,
        num_stages=1,
        interpret=interpret,
    )


# ---- tiles -----------------------------------------------------------------------------------------------------------
def configs(shape: Shape) -> list[Config]:
    """Candidates for a sweep."""
    out = []
    for num_warps in (2, 4, 8):
        for rows in (1, 2, 4):
            for tokens in (1,) if shape.stage == "down" or shape.tokens == 1 else (1, 2, 4):
                for sign_tables in (0, 2, 4) if shape.fmt == "IQ2_XXS" else (0,):
                    out.append(Config(num_warps, rows, tokens, sign_tables))
    return [c for c in out if shape.n % (c.num_warps * c.rows) == 0]


def default_config(shape: Shape) -> Config:
    tokens = 2 if shape.stage == "gate_up" and shape.tokens > 1 else 1
    # Triton takes a minute to compile the many scales of Q4_K for two rows and two tokens.
    rows = 1 if shape.fmt == "Q4_K" and tokens > 1 or shape.n % 8 else 2
    return Config(num_warps=math.gcd(shape.n, 4), rows=rows, tokens=tokens)
