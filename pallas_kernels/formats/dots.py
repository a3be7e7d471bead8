"""What `experts` needs of a format: dot products of rows of a matrix with 16-bit fixed-point activations.

`pallas_kernels.experts` says how weights and activations meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formats.tiles import split

Array = jax.Array
Ref = Any


# ---- instructions ----------------------------------------------------------------------------------------------------
def _ptx(ptx: str, constraints: str, *args: Array, dtype=jnp.int32, pack: int = 1) -> Array:
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    (out,) = plgpu.elementwise_inline_asm(
        ptx, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return out


def i32(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


class Gpu:
    """Instructions that Pallas has no name for. All arrays of one call have one shape; words are int32 or uint32."""

    @staticmethod
    def dot4(w: Array, x: tuple[Array, Array], total: Array, signed: bool = True) -> Array:
        """total + the four bytes of w, signed or not, times the two signed halves of each word of x."""
        of = "s32" if signed else "u32"
        ptx = f"dp2a.lo.s32.{of} $0, $2, $1, $4; dp2a.hi.s32.{of} $0, $3, $1, $0;"
        return _ptx(ptx, "=&r,r,r,r,r", w, *x, total)

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
        return i32(words)[..., None] << (32 - bits - low) >> (32 - bits)

    @classmethod
    def dot4(cls, w, x, total, signed=True):
        halves = jnp.concatenate([cls._fields(word, 16) for word in x], axis=-1)
        return total + ((cls._fields(w, 8) & (-1 if signed else 255)) * halves).sum(-1)

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


# ---- what a format sees, and what it gives ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Program:
    """What a program of `experts` has at hand. k: the columns of a row; config: of experts; table: the format's."""

    fmt: type[Dots]
    k: int
    config: Any
    op: type[Gpu] | type[Emulation]
    table: Ref = None

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

    def several(self, ref: Ref, columns: Array, n: int) -> list[Array]:
        """The values at n · columns, at n · columns + 1, … A thread loads them at once."""
        shape = *columns.shape, n
        warp, which = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 2))
        return split(ref[self.expert, self.row + warp, columns[..., None] * n + which])

    def pair(self, ref: Ref, columns: Array) -> list[Array]:
        """The values at 2 · columns and at 2 · columns + 1."""
        return self.several(ref, columns, 2)

    def quads(self, ref: Ref) -> list[Array]:
        """The four words of each unit, (warps, units) each. A thread loads them as one value of 16 bytes."""
        warps, n = self.units.shape
        size = 16 // ref.dtype.itemsize
        words = ref[self.expert, pl.ds(self.row, warps), pl.ds(self.start * size, n * size)]
        words = self.program.op.words(words) if words.dtype == jnp.int8 else words
        return split(words.reshape(warps, n, 4))


class Activations:
    """The packed activations of one token as a program sees them: arrays (warps, units), equal in every row."""

    def __init__(self, ref: Ref, token: Array | int, fmt: type[Dots], units: Array):
        self._ref, self._token, self._fmt, self._units = ref, token, fmt, units

    def _word(self, i: int) -> Array:
        return self._ref[self._token, i, self._units]

    def fours(self, start: int, n: int) -> list[tuple[Array, Array]]:
        """Of the activations that meet the unit's i-th four weights, from `start` on, the first two and the others."""
        half = self._fmt.unit // 4
        return [(self._word(i), self._word(half + i)) for i in range(start, start + n)]

    def sum(self, group: int) -> Array:
        """The sum of a group's activations."""
        return self._word(self._fmt.unit // 2 + group)

    @property
    def scale(self) -> Array:
        return lax.bitcast_convert_type(self.sum(self._fmt.sums), jnp.float32)


class Dots:
    """How the weights of a format come out of its planes.

    unit: weights that one scale of the activations covers. A thread has whole units; a row has K / unit of them.
    step: units that the threads of a warp take at once, so that each loads 16 bytes.
    sums: groups of a unit whose activations' sum is needed, for a format with minima.
    rows: of a warp, by default, that meet several tokens; with many scales, two take a minute to compile.
    """

    unit: ClassVar[int]
    step: ClassVar[int] = 32
    sums: ClassVar[int] = 0
    rows: ClassVar[int] = 2

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


def signed_bytes(*values: int) -> np.int32:
    """Up to four signed bytes as one word."""
    return np.array([*values, 0, 0, 0][:4], np.int8).view(np.int32)[0]


class Grouped(Dots):
    """What formats share whose unit is four words of codes, in `groups` groups that each have a scale in the row."""

    groups: ClassVar[int]
    signed: ClassVar[bool] = True

    @classmethod
    def codes(cls, words: Array, group: int, program: Program) -> Array:
        """One of a unit's words → the four bytes in it, signed or not, that belong to a group."""
        raise NotImplementedError

    @classmethod
    def products(cls, row: tuple, group: int, xs: list[list], program: Program) -> list[Array]:
        """The group's dot product of one row with each token's activations, as of `Activations.fours`."""
        totals = [jnp.zeros_like(x[0][0]) for x in xs]
        for i, words in enumerate(row[0]):
            w = cls.codes(words, group, program)
            totals = [program.op.dot4(w, x[i], total, cls.signed) for x, total in zip(xs, totals, strict=True)]
        return totals


class KQuant(Grouped):
    """w = (d·sc)·q − (dmin·m), with small integers sc and m per group, and codes of so many bits.

    The g-th codes of a byte are multiplied where they are, times 2^(bits·g): a sum is shifted, not every word.
    """

    bits: ClassVar[int]
    signed = False

    @classmethod
    def codes(cls, words, group, program):
        return words & jnp.uint32((2**cls.bits - 1) * 0x01010101 << cls.bits * group)

    @classmethod
    def products(cls, row, group, xs, program):
        return [n >> cls.bits * group for n in super().products(row, group, xs, program)]

    @classmethod
    def group_scales(cls, row: tuple, group: int) -> tuple[Array, Array]:
        """sc and m, int32."""
        raise NotImplementedError

    @classmethod
    def dot(cls, rows, xs, program):
        products: list[list[Any]] = [[0 for _ in xs] for _ in rows]
        minima: list[list[Any]] = [[0 for _ in xs] for _ in rows]
        per_group = cls.unit // 4 // cls.groups
        for g in range(cls.groups):
            fours = [x.fours(per_group * g, per_group) for x in xs]
            sums = [x.sum(g) for x in xs]
            for i, row in enumerate(rows):
                sc, m = cls.group_scales(row, g)
                for t, n in enumerate(cls.products(row, g, fours, program)):
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


class OneScale(Grouped):
    """One scale per unit, the last value of a row."""

    @classmethod
    def dot(cls, rows, xs, program):
        per_group = cls.unit // 4 // cls.groups
        totals: list[list[Any]] = [[0 for _ in xs] for _ in rows]
        for g in range(cls.groups):
            fours = [x.fours(per_group * g, per_group) for x in xs]
            for i, row in enumerate(rows):
                for t, n in enumerate(cls.products(row, g, fours, program)):
                    totals[i][t] += n
        scales = [x.scale for x in xs]
        return [
            [n.astype(jnp.float32) * (row[-1] * x) for n, x in zip(total, scales, strict=True)]
            for row, total in zip(rows, totals, strict=True)
        ]
