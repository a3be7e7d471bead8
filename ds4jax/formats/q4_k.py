"""Q4_K: 4-bit codes in groups of 32, with a 6-bit scale and minimum each. Layout: ggml's ``block_q4_K``."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax import lax

from ds4jax.formats import k_quant
from ds4jax.formats.base import Quantized, random_bits, unpack, words_of
from ds4jax.formats.search import F16_MAX
from pallas_kernels.formats import runs
from pallas_kernels.formats.dots import KQuant, i32
from pallas_kernels.formats.runs import WORDS, Runs, nibble, read, words_of_run
from pallas_kernels.formats.tiles import Planes, Tile, Tiles, as_float, shift, stack, u32

Array = jax.Array


def _load_run(planes, layer, rows, first, n, run, interpret):
    dm, scales, q = planes
    words, index = words_of_run(q, layer, rows, first, n)
    start = lax.div(first, np.int32(8)) + lax.iota(jnp.int32, n // 8 // WORDS) * WORDS
    block = lax.div(start, np.int32(32))
    pair = lax.rem(lax.div(start, np.int32(8)), np.int32(4))  # which two of the 8 groups
    d, dmin = (read(dm, layer, rows, block * 2 + i) for i in (0, 1))
    word = [read(scales, layer, rows, block * 3 + i) for i in range(3)]
    first_column = lax.div(index, np.int32(8)) * 64 + lax.rem(index, np.int32(8)) * 4
    columns = [[first_column + high * 32 + b for b in range(4)] for high in (0, 1)]

    def piece(high):
        shift = ((pair * 2 + high) % 4 * 8).astype(jnp.uint32)
        lo_sc, lo_m, rest = (w >> shift for w in word)
        upper = pair >= 2
        sc = jnp.where(upper, (rest & 15) | (lo_sc >> 2 & 48), lo_sc & 63).astype(jnp.float32)
        m = jnp.where(upper, (rest >> 4 & 15) | (lo_m >> 2 & 48), lo_m & 63).astype(jnp.float32)
        codes = [nibble(words, 2 * b + high).astype(jnp.float32) for b in range(4)]
        return runs.Piece(codes, d.astype(jnp.float32) * sc, dmin.astype(jnp.float32) * m)

    return runs.Loaded(columns, lambda _: [piece(0), piece(1)])


class _Dots(KQuant):
    """Super-blocks of 256: runs of 32 bytes of codes, the low nibbles one group of 32, the high ones the next.

    A unit is half a run: 16 weights of each group.
    """

    unit = 32
    groups = sums = 2
    bits = 4
    rows = 1

    @classmethod
    def order(cls, k):
        u, n, c = np.ix_(np.arange(k // 32), np.arange(2), np.arange(16))
        return (u // 2 * 64 + u % 2 * 16 + 32 * n + c).reshape(-1, cls.unit)

    @classmethod
    def load(cls, refs, tile):
        dm, scales, q = refs
        block, run = tile.units >> 3, tile.units >> 1 & 3
        sc, m = k_quant.scales_of_two([tile.at(scales, block * 3 + i) for i in range(3)], run)
        return tile.quads(q), sc, m, *tile.pair(dm, block)

    @classmethod
    def group_scales(cls, row, group):
        return tuple(i32(word >> jnp.uint32(8 * group) & jnp.uint32(255)) for word in row[1:3])


# Of a block of Q4_K, a run of 8 words holds 64 weights: 32 in the low nibbles and 32 in the high, each with a scale and
# a minimum. A step is two runs; a thread has half the words of one.
def _load_tile(t: Tile) -> Planes:
    block = (t.step >> 1) + jnp.zeros((4,), jnp.int32)
    dm, scales = (t.load(0, 2 * block + i) for i in (0, 1)), (t.load(1, 3 * block + i) for i in range(3))
    return *dm, *scales, t.load(2, t.columns(16))


def _decode_tile(t: Tile, d: Array, dmin: Array, low_sc: Array, low_m: Array, high: Array, q: Array) -> Array:
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
        code = as_float(shift(q, 19 - 4 * h - 8 * b) & u32(0x780000) | u32(0x41800000))
        values.append(t.op.fma(code, *terms[h]).astype(jnp.bfloat16))
    return stack(values).reshape(*d.shape, 32)


@struct.dataclass
class Q4_K(Quantized):
    """w = (d·sc)·q − (dmin·m), in super-blocks of 256 with 8 groups of 32.

    dm: float16, d and dmin of each super-block. scales: uint32, three words (12 bytes) of 6-bit sc and m.
    q: uint32, eight 4-bit codes per word.
    """

    ggml_type = GGMLType.Q4_K
    planes = {"dm": (np.float16, 4), "scales": (np.uint32, 12), "q": (np.uint32, 128)}
    largest = F16_MAX * 63
    for_matmul = Runs(_load_run, run=8 * WORDS)
    for_experts = _Dots
    # Run, nibble, half, word, byte.
    for_grouped_gemm = Tiles(_load_tile, _decode_tile, ((2, 2, 2, 4, 4), (3, 4, 0, 2, 1)))
    dm: Array
    scales: Array
    q: Array

    @staticmethod
    def _decode(dm, scales, q):
        # A run of 32 bytes holds two groups: the low nibbles, then the high ones.
        return k_quant.decode(dm, *k_quant.scales_and_minima(scales), unpack(q, 4, run=32))

    @classmethod
    def random(cls, key, shape, std):
        keys, shapes = jax.random.split(key, 3), cls.plane_shapes(shape)
        return cls(
            dm=k_quant.random_dm(keys[0], shapes["dm"], std, top=15, top_scale=63),
            scales=random_bits(keys[1], shapes["scales"], np.uint32),
            q=random_bits(keys[2], shapes["q"], np.uint32),
        )

    @staticmethod
    def quantize_blocks(x, importance):
        d, dmin, sc, m, q = k_quant.quantize_blocks(x, importance, group=32, top=15, top_scale=63)
        # The layout is that of `k_quant.scales_and_minima`.
        low, high = (v[:, :4] | v[:, 4:] >> 4 << 6 for v in (sc, m))
        rest = sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4
        q = q.reshape(-1, 4, 2, 32)
        return {
            "dm": jnp.stack([d, dmin], axis=-1),
            "scales": words_of(jnp.concatenate([low, high, rest], axis=-1)),
            "q": words_of(q[:, :, 0] | q[:, :, 1] << 4),
        }
