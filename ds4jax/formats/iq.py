"""What the IQ formats share: tables of ggml, read from the gguf package, and signs that are kept apart from magnitudes.

A few neighbouring weights, four or eight, share an index into a grid of magnitudes; each has a bit for its sign.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from pallas_kernels.formats.dots import signed_bytes
from pallas_kernels.formats.tiles import u32
from pallas_kernels.formats.units import Units, Words

Array = jax.Array

# The 128 sets of eight signs with an even number of minus signs: byte i is i and, on top, its parity.
SIGNS = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)

# The 16 values of the codes of IQ4_NL and IQ4_XS.
VALUES = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)


def grid_of(ggml_type: GGMLType) -> np.ndarray:
    """The grid of a format: float32 (points, weights of a point)."""
    reference = getattr(gguf.quants, ggml_type.name)
    reference.init_grid()
    return np.asarray(reference.grid, np.float32).reshape(reference.grid_shape)


def sign_bytes(words: Array) -> Array:
    """uint32 (..., n) of four 7-bit numbers of SIGNS each, lowest first → those bytes (..., 4 n)."""
    sets = (words[..., None] >> jnp.array([0, 7, 14, 21], jnp.uint32)) & 127
    return jnp.asarray(SIGNS)[sets].reshape(*words.shape[:-1], -1)


def signed_points(grid: np.ndarray, index: Array, signs: Array) -> Array:
    """Weights in units of their scale: points of a grid at index (..., n), with the signs of bytes (..., weights / 8).

    Bit i of a byte is set where weight i of its eight is negative. → float32 (..., weights).
    """
    negative = (signs[..., None] >> jnp.arange(8, dtype=signs.dtype)) & 1
    sign = jnp.where(negative == 0, jnp.float32(1), jnp.float32(-1))
    return (jnp.asarray(grid)[index].reshape(sign.shape) * sign).reshape(*signs.shape[:-1], -1)


# ---- in kernels ----------------------------------------------------------------------------------------------
# Eight weights are a word of eight nibbles: two bits of magnitude, of MAGNITUDES, and the sign. Nibble n is weight
# NIBBLES[n] of the eight, the order that `spread` gives.
MAGNITUDES = (8, 25, 43)
NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def spread(sets: Array) -> Array:
    """Seven signs b in bits 0-6 → bit 2 of each nibble; the eighth, in nibble 7, makes their number even."""
    # Copies of b at every seventh bit have b_i at bit 8 i and b_(i+4) at bit 8 i + 4; here two bits up.
    # A multiplication adds them up in the last nibble.
    signs = sets * jnp.uint32(0x00204081 << 2) & jnp.uint32(0x04444444)
    return signs | (signs * jnp.uint32(0x11111111) & jnp.uint32(0x40000000))


def spread_all(signs: Array) -> Array:
    """Eight signs in bits 0-7 → bit 2 of each nibble."""
    return (signs & 127) * u32(0x00204081 << 2) & u32(0x04444444) | (signs & 128) << 23


def nibbles(fields: np.ndarray) -> np.ndarray:
    """(n, 8) fields of eight weights → uint32 (n,), in nibbles."""
    return np.sum(fields[:, NIBBLES].astype(np.uint32) << 4 * np.arange(8, dtype=np.uint32), axis=1, dtype=np.uint32)


def grid_codes(grid: np.ndarray) -> np.ndarray:
    """A grid of MAGNITUDES, (points, 8) → uint32 (points,), their numbers in nibbles 0-2."""
    return nibbles(np.searchsorted(MAGNITUDES, grid))


# The signed bytes of codes 0-3 and of codes 4-7, the negative ones: a word each, for `prmt`.
SIGNED = tuple(int(signed_bytes(*(sign * m for m in MAGNITUDES)).view(np.uint32)) for sign in (1, -1))
IN_NIBBLES = (7, 6, 5, 4, 3, 1, 0, 2)  # NIBBLES, as `Units.order`


def signed_words(codes: Array, words: Words) -> list[Array]:
    """Eight codes in nibbles → two words of signed bytes, with the constants SIGNED."""
    low, high = words.constants
    return [words.op.bytes(low, high, half) for half in (codes, codes >> 16)]


def scale_of_16(loaded, group: int) -> Array:
    """d·(½ + s)/4 in a kernel that has loaded (codes, word, d), where nibble `group` of the word is s."""
    _, scales, d = loaded
    return d.astype(jnp.float32) * ((scales >> 4 * group & 15).astype(jnp.float32) * 0.25 + 0.125)


def units_of_points(load: Callable, look_up: Callable, grid: np.ndarray, spread: Callable, step: int = 32) -> Units:
    """Units of four points of eight weights, two a group with a scale of its own: `scale_of_16`.

    load, step: see `Units`. look_up: → the codes and the signs of each point. spread: signs → bit 2 of each nibble.
    """

    def words(ready, group: int, words: Words) -> list[Array]:
        return [w for codes, signs in ready[2 * group :][:2] for w in signed_words(codes | spread(signs), words)]

    return Units(
        load, words, scale_of_16, groups=2, order=IN_NIBBLES, look_up=look_up, table=tuple(grid_codes(grid).tolist()),
        constants=SIGNED, step=step,
    )  # fmt: skip
