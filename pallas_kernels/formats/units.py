"""One description of a format that gives all three kernels what they need: rows are read in units of 32 weights.

A unit's weights are signed bytes, in groups that each have a scale: `experts` multiplies the bytes as they are,
`matmul` puts them into float32 and `grouped_gemm` into float16, four or two at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.formats import dots, tiles
from pallas_kernels.formats.dots import Dots
from pallas_kernels.formats.runs import Loaded, Piece, Runs, read
from pallas_kernels.formats.tiles import Tile, Tiles, as_float, split, stack, u32

Array = jax.Array

UNIT = 32
_BLOCK = 256  # columns within which `Units.order` says where a weight lies


class Rows(NamedTuple):
    """The planes of the rows at hand. Index and result have an element for each unit.

    at: plane, index → the values there. several: plane, nth, n → n arrays, the values at n · nth, n · nth + 1, …
    """

    at: Callable[[int, Array], Array]
    several: Callable[[int, Array, int], list[Array]]


class Words(NamedTuple):
    """Instructions on words, of `tiles`, and the format's constants."""

    op: Any
    constants: list[Array]


@dataclass(frozen=True)
class Units:
    """How a format's units are read and decoded, for all kernels: w = scale · byte − minimum.

    load: rows, int32 numbers of units → what there is of each unit, any tree of arrays.
    look_up: what was loaded, a table → what `words` takes instead of it. words: that, a group, `Words` → the group's
    signed bytes, four a uint32 word. scale, minimum: what was loaded, a group → float32. groups: of a unit.
    order: the 8 bits of a weight's place within eight units, the upper first: which bit of its column within 256 each
    is. A group's columns are neighbours, in any order.
    table: uint32, what is looked up in memory. constants: uint32, words of which a thread needs several at once.
    step: of `Dots`.
    """

    load: Callable[[Rows, Array], Any]
    words: Callable[[Any, int, Words], list[Array]]
    scale: Callable[[Any, int], Array]
    minimum: Callable[[Any, int], Array] | None = None
    groups: int = 1
    order: tuple[int, ...] = (7, 6, 5, 4, 3, 2, 1, 0)
    look_up: Callable[[Any, Any], Any] | None = None
    table: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()
    step: int = 32

    def columns(self) -> np.ndarray:
        """int32 (8, UNIT): the column of every weight of eight units."""
        place = np.arange(_BLOCK)
        column = sum((place >> 7 - i & 1) << bit for i, bit in enumerate(self.order))
        return np.asarray(column, np.int32).reshape(-1, UNIT)

    def of_a_group(self, group: int) -> slice:
        """Its weights within a unit."""
        size = UNIT // self.groups
        return slice(group * size, (group + 1) * size)

    # ---- for each kernel ---------------------------------------------------------------------------------------------
    @property
    def dots(self) -> type[Dots]:
        sums = self.groups if self.minimum else 0
        return type("UnitDots", (_UnitDots,), {"units": self, "sums": sums, "step": self.step})

    @property
    def tiles(self) -> Tiles:
        # Thread c decodes unit c of a step's four: see `tiles` for where its weights are among the columns.
        axes = tuple(7 - bit for bit in self.order)
        axes = axes[0], *axes[3:7], *axes[1:3], axes[7]
        load, look_up, decode = _tile_parts(self)
        return Tiles(
            load, decode, ((2,) * 8, axes), dtype=jnp.float16, look_up=look_up, table=self.table,
            constants=(*self.constants, _SIXTEEN),
        )  # fmt: skip

    @property
    def runs(self) -> Runs:
        return Runs(_run_part(self), run=UNIT, table=self.table)


def centred(words: Array, zero: int) -> Array:
    """Bytes b below 128 + zero → signed bytes b − zero."""
    return words + u32((128 - zero) * 0x01010101) ^ u32(0x80808080)


# ---- experts ---------------------------------------------------------------------------------------------------------
class _UnitDots(Dots):
    unit = UNIT
    rows = 1
    units: ClassVar[Units]

    @classmethod
    def order(cls, k):
        return (np.arange(0, k, _BLOCK)[:, None, None] + cls.units.columns()).reshape(-1, UNIT)

    @classmethod
    def table(cls):
        """The table, then 64 times each of the constants; None if there are neither."""
        memory = [np.array(cls.units.table, np.uint32), np.repeat(np.array(cls.units.constants, np.uint32), 64)]
        return np.concatenate(memory) if cls.units.table or cls.units.constants else None

    @classmethod
    def load(cls, refs, tile):
        rows = Rows(lambda plane, index: tile.at(refs[plane], index), lambda plane, *a: tile.several(refs[plane], *a))
        return cls.units.load(rows, tile.units)

    @classmethod
    def dot(cls, rows, xs, program):
        units, shape = cls.units, (program.config.num_warps, min(program.k // UNIT, cls.step))
        # Read per warp: what all threads share lies in a uniform register, and `prmt` would copy it for every use.
        warp = lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        starts = range(len(units.table), len(units.table) + 64 * len(units.constants), 64)
        constants = [jnp.broadcast_to(program.table[start + warp], shape) for start in starts]
        words = Words(tiles.Emulation if program.op is dots.Emulation else tiles.Gpu, constants)
        found = rows if units.look_up is None else [units.look_up(row, program.table) for row in rows]
        totals = [[jnp.zeros(shape, jnp.float32) for _ in xs] for _ in rows]
        n = UNIT // 4 // units.groups
        for group in range(units.groups):
            activations = [x.fours(n * group, n) for x in xs]
            for total, row, ready in zip(totals, rows, found, strict=True):
                weights, scale = units.words(ready, group, words), units.scale(row, group)
                for t, (x, meet) in enumerate(zip(xs, activations, strict=True)):
                    product = jnp.zeros(shape, jnp.int32)
                    for w, four in zip(weights, meet, strict=True):
                        product = program.op.dot4(w, four, product)
                    total[t] += product.astype(jnp.float32) * scale
                    if units.minimum is not None:
                        total[t] -= x.sum(group).astype(jnp.float32) * units.minimum(row, group)
        scales = [x.scale for x in xs]
        return [[part * x for part, x in zip(total, scales, strict=True)] for total in totals]


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------
_SIXTEEN = 0x4C4C4C4C  # the upper bytes of float16 in [16, 32): with a lower byte b, 16 + b / 64


def _tile_parts(units: Units) -> tuple[Callable, Callable | None, Callable]:
    def load(t: Tile):
        def several(plane, nth, n):
            index = (nth[:, None] * n + jnp.arange(n, dtype=jnp.int32)[None, :]).reshape(-1)
            return split(t.load(plane, index).reshape(-1, len(nth), n))

        return (units.load(Rows(t.load, several), t.columns(4)),)

    def scales(loaded):
        """Of each group the scale of bytes / 64, and what to add, if anything."""
        for group in range(units.groups):
            scale = (units.scale(loaded, group) * 64).astype(jnp.float16)
            yield (scale,) if units.minimum is None else (scale, (-units.minimum(loaded, group)).astype(jnp.float16))

    def look_up(t: Tile, loaded):
        assert units.look_up is not None
        return units.look_up(loaded, t.table), list(scales(loaded))

    def decode(t: Tile, ready, factors=None):
        factors = list(scales(ready)) if factors is None else factors
        *constants, sixteen = t.constants
        values = []
        for group, factor in enumerate(factors):
            for word in units.words(ready, group, Words(t.op, constants)):
                word = word ^ u32(0x80808080)  # 128 + byte
                for two in (0x4140, 0x4342):
                    values += t.op.affine(t.op.bytes(word, sixteen, two), 18, *factor)
        return stack(values)

    return load, None if units.look_up is None else look_up, decode


# ---- matmul ----------------------------------------------------------------------------------------------------------
def _floats(words: Array, interpret: bool) -> list[Array]:
    """The four signed bytes of each word as float32: put under the upper bytes of 2^23, they make 2^23 + 128 + byte."""
    words = words ^ u32(0x80808080)
    if interpret:
        return [as_float(words >> 8 * i & 255 | u32(0x4B000000)) - (2**23 + 128) for i in range(4)]
    out = [jax.ShapeDtypeStruct(words.shape, jnp.float32)]
    found = []
    for i in range(4):
        put = f"prmt.b32 $0, $1, 0x4B000000, 0x744{i}; sub.f32 $0, $0, 0f4B000080;"
        found += plgpu.elementwise_inline_asm(put, args=[words], constraints="=f,r", pack=1, result_shape_dtypes=out)
    return found


def _first_column(units: Units, unit: Array) -> Array:
    """The column of a unit's first weight."""
    within = (((unit >> 2 - i) & 1) << bit for i, bit in enumerate(units.order[:3]))
    return sum(within, (unit >> 3) * _BLOCK)


def _run_part(units: Units) -> Callable[..., Loaded]:
    groups = [units.columns()[0][units.of_a_group(g)] for g in range(units.groups)]

    def load(planes, layer, rows, first, n, run, interpret):
        def at(plane, index):
            return read(planes[plane], layer, rows, index)

        def several(plane, nth, n):
            return split(at(plane, nth[:, None] * n + lax.broadcasted_iota(jnp.int32, (len(nth), n), 1)))

        unit = lax.div(first, np.int32(UNIT)) + lax.iota(jnp.int32, n // UNIT)
        loaded = units.load(Rows(at, several), unit)
        start = _first_column(units, unit)[:, None]
        columns = [start + int(c.min()) + lax.broadcasted_iota(jnp.int32, (1, c.size), 1) for c in groups]

        def decode(_):
            ready = loaded if units.look_up is None else units.look_up(loaded, planes[-1])
            words = Words(tiles.Emulation if interpret else tiles.Gpu, [u32(c) for c in units.constants])
            pieces = []
            for group, c in enumerate(groups):
                values = [v for word in units.words(ready, group, words) for v in _floats(word, interpret)]
                minimum = None if units.minimum is None else units.minimum(loaded, group)
                pieces.append(Piece([stack([values[i] for i in np.argsort(c)])], units.scale(loaded, group), minimum))
            return pieces

        return Loaded([[c] for c in columns], decode)

    return load
