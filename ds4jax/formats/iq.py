"""What the IQ formats share: tables of ggml, read from the gguf package, and signs that are kept apart from magnitudes.

A few neighbouring weights, four or eight, share an index into a grid of magnitudes; each has a bit for its sign.
"""

from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

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
