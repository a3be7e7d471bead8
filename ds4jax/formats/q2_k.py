"""Q2_K: 2-bit codes in groups of 16, with a 4-bit scale and minimum each. Layout: ggml's ``block_q2_K``."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats import k_quant
from ds4jax.formats.base import Quantized, bytes_of, pack_bits, random_bits, unpack, words_of
from ds4jax.formats.search import F16_MAX
from pallas_kernels.formats.dots import KQuant, i32
from pallas_kernels.formats.tiles import Planes, Tile, Tiles, stack, u32

Array = jax.Array


class _Dots(KQuant):
    """Super-blocks of 256: runs of 32 bytes of codes, whose bits 2 j and 2 j + 1 are 32 weights, two groups of 16.

    A unit is half a run: one group for each j.
    """

    unit = 64
    groups = sums = 4
    bits = 2

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
    def group_scales(cls, row, group):
        word = row[1 + group // 2] >> jnp.uint32(16 * (group % 2))
        return i32(word & jnp.uint32(15)), i32(word >> jnp.uint32(4) & jnp.uint32(15))


# Of a block of Q2_K, each of two runs of 8 words holds 128 weights: 32 in bits 0-1 of the bytes, then bits 2-3, 4-5,
# 6-7. A group of 16 weights, which is two bits of four words, has a byte sc | m << 4. A step is half the bits of all
# words; a thread has half the words of a run.
def _load_tile(t: Tile) -> Planes:
    block, run = (t.step >> 1) + jnp.zeros((4,), jnp.int32), jnp.arange(4, dtype=jnp.int32) >> 1
    dm = (t.load(2, 2 * block + i) for i in (0, 1))
    scales = t.load(0, 4 * block + 2 * run + (t.step & 1))
    return *dm, scales, t.load(1, (t.step >> 1) * 16 + jnp.arange(16, dtype=jnp.int32))


def _decode_tile(t: Tile, d: Array, dmin: Array, scales: Array, q: Array) -> Array:
    q = q.reshape(*d.shape, 4) >> ((t.step & 1) * 4).astype(jnp.uint32)
    scales = scales >> ((jnp.arange(4, dtype=jnp.uint32) & 1) * 8)[None, :]
    one, four = t.constants  # a code in bits 0-1 of 1024 adds 1 to it, one in bits 2-3 of 256, too
    sc = t.op.affine(scales & u32(0x000F000F) | one, 1024, d)
    m = t.op.affine(scales & u32(0x00F000F0) | u32(0x54005400), 64, -dmin)
    one, four = one[..., None], four[..., None]
    values = []
    for s, b in itertools.product((0, 1), (0, 1)):
        # Bytes b and b + 2 of each word, two bits from 2 s on.
        code, zero = (q >> 8 * b & u32(0xC000C) | four, 256) if s else (q >> 8 * b & u32(0x30003) | one, 1024)
        values += t.op.affine(code, zero, sc[s][..., None], m[s][..., None])
    return stack(values).reshape(*d.shape, 32)


@struct.dataclass
class Q2_K(Quantized):
    """w = (d·sc)·q − (dmin·m), in super-blocks of 256 with 16 groups of 16.

    scales: uint32, four groups per word, each a byte sc | m << 4. q: uint32, sixteen 2-bit codes per word.
    dm: float16, d and dmin of each super-block.
    """

    ggml_type = GGMLType.Q2_K
    planes = {"scales": (np.uint32, 16), "q": (np.uint32, 64), "dm": (np.float16, 4)}
    largest = F16_MAX * 15
    for_experts = _Dots
    for_grouped_gemm = Tiles(
        _load_tile,
        _decode_tile,
        ((2, 2, 2, 2, 4, 2, 2), (1, 4, 2, 6, 0, 3, 5)),  # run, step, bits, half, word, and two bits of the byte
        dtype=jnp.float16,
        constants=(0x64006400, 0x5C005C00),  # twice the float16 1024, and 256
    )
    scales: Array
    q: Array
    dm: Array

    @staticmethod
    def _decode(scales, q, dm):
        scales = bytes_of(scales)
        # A run of 32 bytes holds eight groups: bits 0-1 of the bytes, then bits 2-3, 4-5, 6-7.
        return k_quant.decode(dm, scales & 15, scales >> 4, unpack(q, 2, run=32))

    @classmethod
    def random(cls, key, shape, std):
        keys, shapes = jax.random.split(key, 3), cls.plane_shapes(shape)
        return cls(
            scales=random_bits(keys[0], shapes["scales"], np.uint32),
            q=random_bits(keys[1], shapes["q"], np.uint32),
            dm=k_quant.random_dm(keys[2], shapes["dm"], std, top=3, top_scale=15),
        )

    @staticmethod
    def quantize_blocks(x, importance):
        d, dmin, sc, m, q = k_quant.quantize_blocks(x, importance, group=16, top=3, top_scale=15)
        # Eight groups share 32 bytes, two for each pair of bits.
        q = pack_bits(jnp.swapaxes(q.reshape(-1, 2, 4, 32), -1, -2), 2)
        return {"scales": words_of(sc | m << 4), "q": words_of(q), "dm": jnp.stack([d, dmin], axis=-1)}
