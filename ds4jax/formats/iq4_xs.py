"""IQ4_XS: 4-bit codes of 16 uneven values, a 6-bit scale per 32. Layout: ggml's ``block_iq4_xs``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.formats.base import scaled, unpack
from ds4jax.formats.iq import VALUES
from ds4jax.formats.read_only import ReadOnly
from pallas_kernels.formats.tiles import u32
from pallas_kernels.formats.units import Rows, Units, Words

Array = jax.Array


# ---- in kernels: four words of q are a unit, whose scale all share -------------------------------------------
def _load(rows: Rows, unit: Array):
    block, nth = unit >> 3, (unit & 7).astype(jnp.uint32)
    low, high = rows.at(2, block) >> 4 * nth & 15, rows.at(1, block).astype(jnp.uint32) >> 2 * nth & 3
    return rows.several(3, unit, 4), low | high << 4, rows.at(0, block)


def _words(ready, _, words: Words) -> list[Array]:
    out = []
    for codes in (half for q in ready[0] for half in (q, q >> 16)):
        c, seven, choose = words.constants, codes & u32(0x7777), u32(0x3210) | codes >> 1 & u32(0x4444)
        # A code's lower three bits look up two values, one of codes 0-7 and one of codes 8-15; its upper bit chooses.
        out.append(words.op.bytes(words.op.bytes(c[0], c[1], seven), words.op.bytes(c[2], c[3], seven), choose))
    return out


def _scale(loaded, _) -> Array:
    _, scale, d = loaded
    return d.astype(jnp.float32) * (scale.astype(jnp.float32) - 32)


_UNITS = Units(
    _load,
    _words,
    _scale,
    order=(7, 6, 5, 3, 2, 1, 0, 4),  # a nibble of the low half is one of 16 weights, its neighbour one of the next 16
    constants=tuple(VALUES.astype(np.int8).view(np.uint32).tolist()),
)


@struct.dataclass
class IQ4_XS(ReadOnly):
    """w = (d·(sc − 32))·VALUES[q], in super-blocks of 256 with 8 groups of 32.

    d: float16 per super-block. high: uint16, the upper two bits of each sc. low: uint32, the low four bits of each.
    q: uint32, eight codes per word, of each group in the order of Q4_0.
    """

    ggml_type = GGMLType.IQ4_XS
    planes = {"d": (np.float16, 2), "high": (np.uint16, 2), "low": (np.uint32, 4), "q": (np.uint32, 128)}
    for_matmul, for_experts, for_grouped_gemm = _UNITS.runs, _UNITS.dots, _UNITS.tiles
    d: Array
    high: Array
    low: Array
    q: Array

    @staticmethod
    def _decode(d, high, low, q):
        upper = high.astype(jnp.uint32) >> jnp.arange(0, 16, 2, dtype=jnp.uint32) & 3
        sc = unpack(low, 4) | upper << 4
        return scaled(d, sc.astype(jnp.float32) - 32, jnp.asarray(VALUES)[unpack(q, 4, run=16)])
