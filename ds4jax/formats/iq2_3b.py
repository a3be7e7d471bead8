"""IQ2_3B: the weights of IQ2_XXS as 3-bit codes, which kernels decode without a table. Made at load, in no file.

IQ2_XXS takes 2.06 bits a weight, this 3.19. A code is two bits of magnitude and the sign. Eight codes in the nibbles of
a word leave every fourth bit; in three words these are the three bits of eight codes more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import Quantized, bits, pack_bits, scaled
from ds4jax.formats.iq import MAGNITUDES, NIBBLES, SIGNED, spread
from ds4jax.formats.iq2_xxs import (
    GRID_CODES,
    IQ2_XXS,
    NIBBLE_BYTES,
    TILE_ORDER,
    NibbleDots,
    scale_of_tile,
    values_of_tile,
)
from pallas_kernels.formats.dots import i32
from pallas_kernels.formats.tiles import Planes, Tile, Tiles, u32

Array = jax.Array

# By code: magnitudes, then their negatives. Codes 3 and 7 do not occur.
_VALUES = np.array([*MAGNITUDES, 0, *(-m for m in MAGNITUDES), 0], np.float32)


def _codes(words: tuple[Array, ...], i: int) -> Array:
    """The i-th eight of the 32 codes in three words, in nibbles whose bit 3 is 0."""
    if i < 3:
        return words[i] & u32(0x77777777)
    fourth = [words[j] >> 3 - j & u32(0x11111111 << j) for j in range(3)]
    return fourth[0] | fourth[1] | fourth[2]


class _Dots(NibbleDots):
    signed = 0

    @classmethod
    def table(cls):
        return np.repeat(np.array(SIGNED, np.uint32), 64)

    @classmethod
    def load(cls, refs, tile):
        d, *words, scales = refs
        units = tile.units
        shift = (4 * (units & 7)).astype(jnp.uint32)
        return *(tile.at(w, units) for w in words), tile.at(scales, units >> 3) >> shift, tile.at(d, units >> 3)

    @classmethod
    def codes(cls, row, i, program):
        return _codes(row[:3], i)

    @classmethod
    def scale(cls, row):
        *_, s, d = row
        return i32(s & u32(15)), d


def _load_tile(t: Tile) -> Planes:
    column = t.columns(4)
    words = (t.load(i, column) for i in (1, 2, 3))
    s = t.load(4, column >> 3) >> (4 * (column & 7)).astype(jnp.uint32)[None, :]
    return t.load(0, column >> 3), s & 15, *words


def _decode_tile(t: Tile, d: Array, s: Array, *words: Array) -> Array:
    return values_of_tile(t, scale_of_tile(t, s, d), [_codes(words, i) for i in range(4)])


@struct.dataclass
class IQ2_3B(Quantized):
    """w = d·(½ + s)/4 · magnitude · sign, groups of 32 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. codes0, codes1, codes2: uint32 per 32 weights, see `_codes`; nibble n of eight is weight
    NIBBLES[n] of the eight. scales: uint32 per super-block, s of each group in a nibble.
    """

    ggml_type = GGMLType.IQ2_XXS  # of the file
    stored = IQ2_XXS
    planes = {
        "d": (np.float16, 2), "codes0": (np.uint32, 32), "codes1": (np.uint32, 32), "codes2": (np.uint32, 32),
        "scales": (np.uint32, 4),
    }  # fmt: skip
    for_experts = _Dots
    for_grouped_gemm = Tiles(_load_tile, _decode_tile, TILE_ORDER, dtype=jnp.float16, constants=NIBBLE_BYTES)
    d: Array
    codes0: Array
    codes1: Array
    codes2: Array
    scales: Array

    @staticmethod
    def _decode(d, codes0, codes1, codes2, scales):
        words = codes0, codes1, codes2
        nibbles = jnp.stack([bits(_codes(words, i), 4)[..., np.argsort(NIBBLES)] for i in range(4)], axis=-2)
        values = jnp.asarray(_VALUES)[nibbles]
        s = bits(scales, 4).reshape(*d.shape[:-1], -1)
        return scaled(d, (s.astype(jnp.float32) + 0.5) / 4, values.reshape(*d.shape[:-1], -1))

    @classmethod
    def repack(cls, w: IQ2_XXS) -> IQ2_3B:
        grid, signs = w.grid, w.signs
        sets = (jnp.asarray(GRID_CODES)[grid >> 8 * i & 255] | spread(signs >> 7 * i & 127) for i in range(4))
        *codes, last = sets
        words = (c | (last >> j & u32(0x11111111)) << 3 for j, c in enumerate(codes))
        scales = (signs >> 28).reshape(*signs.shape[:-1], -1, 8)
        return cls(w.d, *words, scales=pack_bits(scales, 4))

    @classmethod
    def random(cls, key, shape, std):
        return cls.repack(IQ2_XXS.random(key, shape, std))
