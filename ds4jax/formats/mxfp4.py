"""MXFP4: E2M1 values with one power of two per 32 (OCP Microscaling Formats 1.0). Layout: ggml's ``block_mxfp4``."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax import lax

from ds4jax.formats.base import Quantized, random_bits, random_exponents, unpack, words_of
from ds4jax.formats.search import INVERTIBLE, error_weights, normalized, search
from pallas_kernels.formats import runs
from pallas_kernels.formats.dots import OneScale, signed_bytes
from pallas_kernels.formats.runs import WORDS, Runs, nibble, read, words_of_run
from pallas_kernels.formats.tiles import Planes, Tile, Tiles, as_float, shift, stack, u32
from pallas_kernels.numerics import e2m1

Array = jax.Array


def _load_run(planes, layer, rows, first, n, run, interpret):
    e, q = planes
    words, index = words_of_run(q, layer, rows, first, n)
    block = lax.div(first, np.int32(32)) + lax.iota(jnp.int32, n // 32)
    exponent = read(e, layer, rows, block)
    first_column = lax.div(index, np.int32(4)) * 32 + lax.rem(index, np.int32(4)) * 4

    def decode(_):
        scale = lax.bitcast_convert_type(exponent.astype(jnp.int32) << 23, jnp.float32) * np.float32(e2m1.HALF_SCALE)
        return [runs.Piece([e2m1.half(nibble(words, i)).astype(jnp.float32) for i in range(8)], scale)]

    return runs.Loaded([[first_column + i // 2 + i % 2 * 16 for i in range(8)]], decode)


class _Dots(OneScale):
    """w = 2^(e − 127) · E2M1: byte i of a block's sixteen has weight i in its low and weight 16 + i in its high nibble.

    Bytes are twice the E2M1 values, 0 to 12. A group is the low or the high half of every word.
    """

    unit = 32
    groups = 2
    values = tuple(int(2 * v) for v in e2m1.VALUES)

    @classmethod
    def order(cls, k):
        u, half, i, byte, nibble = np.ix_(np.arange(k // 32), *(np.arange(n) for n in (2, 4, 2, 2)))
        return (u * 32 + 4 * i + 2 * half + byte + 16 * nibble).reshape(-1, cls.unit)

    @classmethod
    def load(cls, refs, tile):
        e, q = refs
        # 2^(e - 128): the exponent field of a float32; e = 0 (2^-127 at most) counts as zero.
        e = tile.at(e, tile.units).astype(jnp.int32)
        return tile.quads(q), lax.bitcast_convert_type(e << 23, jnp.float32) * 0.5

    @classmethod
    def codes(cls, words, group, program):
        codes = words >> jnp.uint32(16 * group)

        def bytes_(sign: int) -> Array:
            both = (signed_bytes(*(sign * v for v in cls.values[i:][:4])) for i in (0, 4))
            return program.op.lookup(codes & jnp.uint32(0x7777), *(jnp.full(words.shape, b, jnp.int32) for b in both))

        # Byte i of the positive ones, or of the negative ones (4 + i) where the nibble's sign bit is set.
        return program.op.lookup(
            jnp.uint32(0x3210) | codes >> jnp.uint32(1) & jnp.uint32(0x4444), bytes_(1), bytes_(-1)
        )


# A block of MXFP4 is four words: 16 weights in the low nibbles, 16 in the high ones.
def _load_tile(t: Tile) -> Planes:
    return t.load(0, t.columns(4)), t.load(1, t.columns(16))


def _decode_tile(t: Tile, e: Array, q: Array) -> Array:
    q = q.reshape(*e.shape, 4)
    # E2M1 bits within a float16 make 2^-14 times the value, the subnormal one included.
    scale = as_float(jnp.minimum(e.astype(jnp.uint32) + 14, 254) << 23)[..., None]
    values = {}
    for b, h in itertools.product((0, 1), (0, 1)):
        n = 8 * b + 4 * h
        pair = shift(q, 9 - n) & u32(0x0E000E00) | shift(q, 12 - n) & u32(0x80008000)  # of bytes b and b + 2
        for byte, half in (b, pair), (b + 2, pair >> 16):
            value = lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
            values[byte, h] = (value * scale).astype(jnp.bfloat16)
    return stack([values[key] for key in sorted(values)]).reshape(*e.shape, 32)


@struct.dataclass
class MXFP4(Quantized):
    """w = 2^(e − 127) · E2M1(q). e: uint8 per 32 weights, biased by 127. q: uint32, eight codes per word.

    Codes of a block: bytes 0-15 hold weights 0-15 in their low and 16-31 in their high nibbles.
    """

    ggml_type = GGMLType.MXFP4
    planes = {"e": (np.uint8, 1), "q": (np.uint32, 16)}
    largest = INVERTIBLE
    for_matmul = Runs(_load_run, run=8 * WORDS)
    for_experts = _Dots
    # Block, nibble, word, byte.
    for_grouped_gemm = Tiles(_load_tile, _decode_tile, ((4, 2, 4, 4), (2, 3, 0, 1)))
    e: Array
    q: Array

    @staticmethod
    def _decode(e, q):
        return e2m1.decode_scaled(unpack(q, 4, run=16), e.astype(jnp.int32))

    @classmethod
    def random(cls, key, shape, std):
        of_e, of_q = jax.random.split(key)
        shapes = cls.plane_shapes(shape)
        e = random_exponents(of_e, shapes["e"], std / math.sqrt(np.mean(np.square(e2m1.VALUES))))
        return cls(e=e, q=random_bits(of_q, shapes["q"], np.uint32))

    @staticmethod
    def quantize_blocks(x, importance):
        x, unit = normalized(x)
        w = error_weights(x, importance)

        def code(step):
            halfway = (e2m1.VALUES[1:] + e2m1.VALUES[:-1]) / 2
            return jnp.sum(jnp.abs(x)[..., None] > step[..., None, None] * halfway, axis=-1)

        # The largest magnitude lies in [1, 2): a step of ¼ puts it at 4 to 8, where 6 is the top.
        def evaluate(step):
            step = jnp.broadcast_to(step, unit.shape)
            error = jnp.abs(x) - step[..., None] * jnp.asarray(e2m1.VALUES)[code(step)]
            return jnp.sum(w * error**2, axis=-1), step

        (step,) = search(evaluate, np.array([1 / 4, 1 / 2, 1 / 8], np.float32))
        magnitude = code(step)
        # The biased exponent of unit · step. Below the format's range, the weights are 0.
        of_unit, of_step = (lax.bitcast_convert_type(v, jnp.int32) >> 23 for v in (unit, step))
        e = of_unit + of_step - 127
        magnitude = jnp.where(e[..., None] < 0, 0, magnitude).astype(jnp.uint32)
        codes = magnitude | ((x < 0) & (magnitude > 0)).astype(jnp.uint32) << 3
        return {"e": jnp.maximum(e, 0), "q": words_of(codes[:, :16] | codes[:, 16:] << 4)}
