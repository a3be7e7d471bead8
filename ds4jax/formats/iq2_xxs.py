"""IQ2_XXS: 2 bits a weight; eight weights share an index into a grid. Layout: ggml's ``block_iq2_xxs``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax import lax

from ds4jax.formats.base import Quantized, bytes_of, mean_square, pack_bits, random_bits, random_scales, scaled
from ds4jax.formats.iq import (
    NIBBLES,
    SIGNED,
    grid_codes,
    grid_of,
    sign_bytes,
    signed_points,
    spread,
)
from ds4jax.formats.search import F16_MAX, error_weights, half, level, normalized, ratio, search, super_scale
from pallas_kernels.formats.dots import Dots, Program, i32
from pallas_kernels.formats.tiles import Planes, Tile, Tiles, stack, u32

Array = jax.Array


# The 256 × 8 grid of magnitudes {8, 25, 43}.
GRID = grid_of(GGMLType.IQ2_XXS)


GRID_CODES = grid_codes(GRID)


class NibbleDots(Dots):
    """w = d·(1 + 2 s)/8 · magnitude · sign: groups of 32 with a 4-bit s, in super-blocks of 256.

    signed: where the table has SIGNED, 64 times each word.
    """

    unit = 32
    step = 128
    signed: ClassVar[int]

    @classmethod
    def order(cls, k):
        return (np.arange(k // 8)[:, None] * 8 + NIBBLES).reshape(-1, cls.unit)

    @classmethod
    def codes(cls, row: tuple, i: int, program: Program) -> Array:
        """The i-th eight weights of units, in nibbles: the number of the magnitude, and the sign. Bit 3 is 0."""
        raise NotImplementedError

    @classmethod
    def scale(cls, row: tuple) -> tuple[Array, Array]:
        """s, int32, and d."""
        raise NotImplementedError

    @classmethod
    def dot(cls, rows, xs, program):
        shape = rows[0][0].shape
        # Read per warp: what all threads share lies in a uniform register, and `prmt` would copy it for every use.
        warp = lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        low, high = (jnp.broadcast_to(i32(program.table[cls.signed + i + warp]), shape) for i in (0, 64))
        totals = [[jnp.zeros(shape, jnp.int32) for _ in xs] for _ in rows]
        for b in range(4):
            fours = [x.fours(2 * b, 2) for x in xs]
            for total, row in zip(totals, rows, strict=True):
                codes = cls.codes(row, b, program)
                for upper in range(2):
                    w = program.op.lookup(codes >> jnp.uint32(16 * upper), low, high)
                    for t, x in enumerate(fours):
                        total[t] = program.op.dot4(w, x[upper], total[t])
        scales = [x.scale for x in xs]
        out = []
        for total, row in zip(totals, rows, strict=True):
            s, d = cls.scale(row)
            group, d = s * 2 + 1, d.astype(jnp.float32) * 0.125
            out.append([(n * group).astype(jnp.float32) * (d * x) for n, x in zip(total, scales, strict=True)])
        return out


class _Dots(NibbleDots):
    signed = 256

    @classmethod
    @functools.cache
    def table(cls):
        """uint32 (384): the grid as nibbles 0-2, 64 times each word for `lookup`."""
        return np.concatenate([GRID_CODES, np.repeat(SIGNED, 64)]).astype(np.uint32)

    @classmethod
    def load(cls, refs, tile):
        d, grid, signs = refs
        return tile.at(grid, tile.units), tile.at(signs, tile.units), tile.at(d, tile.units >> 3)

    @classmethod
    def codes(cls, row, i, program):
        grid, signs, _ = row
        codes = program.table[i32(grid >> jnp.uint32(8 * i) & jnp.uint32(255))]
        return codes | spread(signs >> jnp.uint32(7 * i) & jnp.uint32(127))

    @classmethod
    def scale(cls, row):
        _, signs, d = row
        return i32(signs >> jnp.uint32(28)), d


def _load_tile(t: Tile) -> Planes:
    column = t.columns(4)
    return t.load(0, column >> 3), t.load(1, column), t.load(2, column)


def scale_of_tile(t: Tile, s: Array, d: Array) -> Array:
    """Four bits s and d, float16 → d·(½ + s)/4 · 64, as `values_of_tile` takes it."""
    scale, _ = t.op.affine(s | u32(0x6400), 1023.5, d * jnp.float16(16))  # 1024 + s - 1023.5
    return scale


def values_of_tile(t: Tile, scale: Array, codes: Sequence[Array]) -> Array:
    """Words of eight nibbles, as of `NibbleDots`, → float16 weights (rows, 4, 32), with the constants NIBBLE_BYTES."""
    positive, negative, upper = (jnp.broadcast_to(c, codes[0].shape) for c in t.constants)
    values = []
    for eight in codes:
        for four in (eight, eight >> 16):
            four = t.op.bytes(positive, negative, four)
            # Such a byte under the upper byte of 16 makes 16 + byte / 64.
            for two in (0x4140, 0x4342):
                values += t.op.affine(t.op.bytes(four, upper, two), 18, scale)
    return stack(values)


# The bytes 128 + magnitude, the bytes 128 − magnitude, and the upper bytes of float16 in [16, 32). Code 3 would be 0.
NIBBLE_BYTES = (0x80AB9988, 0x80556778, 0x4C4C4C4C)
TILE_ORDER = ((4, 4, 2, 2, 2), (1, 3, 4, 0, 2))  # thread, set, and three bits of eight neighbours


def _look_up(t: Tile, d: Array, grid: Array, signs: Array) -> Planes:
    codes = (t.table[(grid >> 8 * i & 255).astype(jnp.int32)] for i in range(4))
    return scale_of_tile(t, signs >> 28, d), signs & u32(0xFFFFFFF), *codes


def _decode_tile(t: Tile, scale: Array, signs: Array, *magnitudes: Array) -> Array:
    return values_of_tile(t, scale, [codes | spread(signs >> 7 * i & 127) for i, codes in enumerate(magnitudes)])


@struct.dataclass
class IQ2_XXS(Quantized):
    """w = d·(½ + s)/4 · grid[g] · sign, groups of 32 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. grid: uint32 per 32 weights, four indices of 8 weights each.
    signs: uint32 per 32 weights, four 7-bit sign sets and s in the top 4 bits.
    """

    ggml_type = GGMLType.IQ2_XXS
    planes = {"d": (np.float16, 2), "grid": (np.uint32, 32), "signs": (np.uint32, 32)}
    largest = F16_MAX * 15.5 / 4 * 43
    for_experts = _Dots
    for_grouped_gemm = Tiles(
        _load_tile,
        _decode_tile,
        TILE_ORDER,
        dtype=jnp.float16,
        look_up=_look_up,
        table=tuple(GRID_CODES.tolist()),
        constants=NIBBLE_BYTES,
    )
    d: Array
    grid: Array
    signs: Array

    @staticmethod
    def _decode(d, grid, signs):
        values = signed_points(GRID, bytes_of(grid), sign_bytes(signs))
        return scaled(d, ((signs >> 28).astype(jnp.float32) + 0.5) / 4, values)

    @classmethod
    def _fields(cls, raw):
        # In the file, grid and sign words alternate.
        blocks = raw.view(np.dtype([("d", "V2"), ("words", [("grid", "V4"), ("signs", "V4")], 8)]))
        return {"d": blocks["d"], "grid": blocks["words"]["grid"], "signs": blocks["words"]["signs"]}

    @classmethod
    def random(cls, key, shape, std):
        keys, shapes = jax.random.split(key, 3), cls.plane_shapes(shape)
        # The mean of (½ + s)² over s = 0 … 15.
        scale_square = mean_square(16) + 15 / 2 + 1 / 4
        d = random_scales(keys[0], shapes["d"], std / (scale_square / 16 * np.mean(GRID**2)) ** 0.5)
        grid, signs = (random_bits(key, shapes["grid"], np.uint32) for key in keys[1:])
        return cls(d=d.astype(jnp.float16), grid=grid, signs=signs)

    @staticmethod
    def quantize_blocks(x, importance):
        """With a group's scale s, eight weights cost Σ w (|x| − s·g)² = s²·B − 2s·A + constant at grid point g.

        A = Σ w|x|g and B = Σ w g² do not depend on s: one table of each serves the whole search. The number of minus
        signs must be even; where x has an odd number, one weight i takes the wrong sign, which costs 4s·w|x|g at i. The
        cheapest i depends on g only, and A less twice its w|x|g makes the cost above exact again.
        """
        x, unit = normalized(x)
        x, w = (v.reshape(len(x), 8, 4, 8) for v in (x, error_weights(x, importance)))
        wx = w * jnp.abs(x)
        negative = x < 0
        odd = jnp.sum(negative, axis=-1) % 2 == 1

        # Sums of eight terms rather than matrix products: the same bits on every run, and no reduced precision.
        def terms(v, grid):
            return [v[..., i, None] * grid[:, i] for i in range(8)]

        aligned = terms(wx, GRID)
        least = functools.reduce(jnp.minimum, aligned)
        a = functools.reduce(jnp.add, aligned) - jnp.where(odd[..., None], 2 * least, 0.0)
        b = functools.reduce(jnp.add, terms(w, GRID**2))

        def costs(scale):
            scale = scale[..., None, None]
            return scale * (scale * b - 2 * a)

        def nearest(scale):
            """Grid index (blocks, 8, 4) at scale (blocks, 8), and A and B there, summed over the group."""
            index = jnp.argmin(costs(scale), axis=-1)
            at = (jnp.take_along_axis(table, index[..., None], axis=-1)[..., 0] for table in (a, b))
            return index, *(jnp.sum(v, axis=-1) for v in at)

        # Every group's own scale: around the ratio of the root mean squares, then one step of least squares.
        rms = jnp.sqrt(ratio(jnp.sum(w * x * x, axis=(-1, -2)), jnp.sum(w, axis=(-1, -2))) / np.mean(GRID**2))
        factors = np.geomspace(0.6, 1.6, 10, dtype=np.float32)
        (scale,) = search(lambda c: (jnp.sum(jnp.min(costs(c * rms), axis=-1), axis=-1), c * rms), factors)
        _, a_sum, b_sum = nearest(scale)
        scale = jnp.maximum(ratio(a_sum, b_sum), 0.0)

        # The file's scale is d·(½ + s)/4.
        d_half, d = half(super_scale(4 * scale, b_sum, top=15, offset=0.5), unit)
        s = level(4 * scale, d, top=15, offset=0.5)
        index, _, _ = nearest(d[..., None] * (0.5 + s) / 4)

        wrong = jnp.argmin(wx * jnp.asarray(GRID)[index], axis=-1)
        flip = odd[..., None] & (jnp.arange(8) == wrong[..., None])
        signs = pack_bits((negative ^ flip)[..., :7].astype(jnp.uint32), 1)
        return {
            "d": d_half,
            "grid": pack_bits(index.astype(jnp.uint32), 8),
            "signs": pack_bits(signs, 7) | s.astype(jnp.uint32) << 28,
        }
