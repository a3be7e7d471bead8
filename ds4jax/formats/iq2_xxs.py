"""IQ2_XXS: 2 bits a weight; eight weights share an index into a grid. Layout: ggml's ``block_iq2_xxs``."""

from __future__ import annotations

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import Quantized, bits, mean_square, pack_bits, random_bits, random_scales
from ds4jax.formats.search import F16_MAX, error_weights, half, level, normalized, ratio, search, super_scale

Array = jax.Array


def _tables() -> tuple[np.ndarray, np.ndarray]:
    reference = gguf.quants.IQ2_XXS
    reference.init_grid()
    return reference.grid.reshape(256, 8).astype(np.float32), np.frombuffer(reference.ksigns, np.uint8)


# The 256 × 8 grid of magnitudes {8, 25, 43} and the 128 sign bytes (7 bits and their parity), as ggml has them.
GRID, SIGNS = _tables()


@struct.dataclass
class IQ2_XXS(Quantized):
    """w = d·(½ + s)/4 · grid[g] · sign, groups of 32 with a 4-bit scale s, in super-blocks of 256.

    d: float16 per super-block. grid: uint32 per 32 weights, four indices of 8 weights each.
    signs: uint32 per 32 weights, four 7-bit sign sets and s in the top 4 bits.
    """

    ggml_type = GGMLType.IQ2_XXS
    planes = {"d": (np.float16, 2), "grid": (np.uint32, 32), "signs": (np.uint32, 32)}
    largest = F16_MAX * 15.5 / 4 * 43
    d: Array
    grid: Array
    signs: Array

    @staticmethod
    def _decode(d, grid, signs):
        lead = (*d.shape, 8)
        signs = signs.reshape(lead)
        scale = 0.5 + (signs >> 28).astype(jnp.float32)
        scale = d[..., None].astype(jnp.float32) * scale * 0.25
        sets = (signs[..., None] >> jnp.array([0, 7, 14, 21], jnp.uint32)) & 127
        negative = (jnp.asarray(SIGNS)[sets][..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
        magnitude = jnp.asarray(GRID)[bits(grid.reshape(lead), 8)]
        # The reference multiplies by ±1; a zero scale must give its signed zeros too.
        return scale[..., None, None] * magnitude * jnp.where(negative == 0, jnp.float32(1), jnp.float32(-1))

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
