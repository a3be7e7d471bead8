"""Q8_0: 8-bit codes, one scale per 32 weights. Layout: ggml (``ggml-common.h``, ``block_q8_0``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import GGMLQuantizationType as GGMLType
from jax import lax
from jax.experimental.pallas import triton as plgpu

from ds4jax.formats.base import Quantized, random_bits, random_scales
from ds4jax.formats.search import F16_MAX
from pallas_kernels.formats import runs
from pallas_kernels.formats.dots import OneScale
from pallas_kernels.formats.runs import Runs, blocks_of, columns_of, read
from pallas_kernels.formats.tiles import STEP, Planes, Tile, Tiles, stack

Array = jax.Array


def _from_int8(q: Array, dtype: str, interpret: bool) -> Array:
    """int8 → float32 or float16, four at once.

    The conversion instruction runs at 16 a cycle, which is fewer than memory delivers. A byte q + 128 put into the low
    bits of the float 2^23 (or the half 2^10) makes 2^23 + 128 + q: a byte permutation and a subtraction.
    """
    if interpret:
        return q.astype(dtype)
    if dtype == "float32":
        put = "".join(f"prmt.b32 ${i}, u, 0x4B000000, 0x744{i}; sub.f32 ${i}, ${i}, 0f4B000080; " for i in range(4))
        asm, constraints = f"{{ .reg .b32 u; xor.b32 u, $4, 0x80808080; {put}}}", "=&f,=&f,=&f,=&f,r"
    else:
        pairs = enumerate(("0x4140", "0x4342"))
        put = "".join(f"prmt.b32 ${i}, u, 0x64646464, {p}; sub.f16x2 ${i}, ${i}, v; " for i, p in pairs)
        asm = f"{{ .reg .b32 u, v; mov.b32 v, 0x64806480; xor.b32 u, $2, 0x80808080; {put}}}"
        constraints = "=&r,=&r,r"
    out = [jax.ShapeDtypeStruct(q.shape, dtype)]
    return plgpu.elementwise_inline_asm(asm, args=[q], constraints=constraints, pack=4, result_shape_dtypes=out)[0]


def _load_run(planes, layer, rows, first, n, run, interpret):
    d, q = planes
    columns = columns_of(first, n, run)
    codes = read(q, layer, rows, columns)
    scale = read(d, layer, rows, blocks_of(first, n, run, 32))
    return runs.Loaded([[columns]], lambda t: [runs.Piece([_from_int8(codes, t, interpret)], scale.astype(t))])


class _Dots(OneScale):
    """w = d·q, blocks of 32; a unit is half a block."""

    unit = 16
    groups = 1

    @classmethod
    def order(cls, k):
        return np.arange(k).reshape(-1, cls.unit)

    @classmethod
    def load(cls, refs, tile):
        d, q = refs
        return tile.quads(q), tile.at(d, tile.units >> 1).astype(jnp.float32)

    @classmethod
    def codes(cls, words, group, program):
        return words


def _load_tile(t: Tile) -> Planes:
    c = jnp.arange(4, dtype=jnp.int32)
    d = (t.load(0, 4 * t.step + 2 * i + (c >> 1)) for i in (0, 1))
    return *d, *(t.load(1, STEP * t.step + 64 * i + jnp.arange(64, dtype=jnp.int32)) for i in (0, 1))


def _decode_tile(t: Tile, *planes: Array) -> Array:
    w = [
        q.astype(jnp.float32).reshape(-1, 4, 16) * d.astype(jnp.float32)[..., None]
        for d, q in zip(planes[:2], planes[2:], strict=True)
    ]
    return stack([v.astype(jnp.bfloat16) for v in w]).swapaxes(2, 3).reshape(-1, 4, 32)


@struct.dataclass
class Q8_0(Quantized):
    """w = d·q. d: float16 per 32 weights. q: int8."""

    ggml_type = GGMLType.Q8_0
    planes = {"d": (np.float16, 2), "q": (np.int8, 32)}
    largest = F16_MAX * 127
    for_matmul = Runs(_load_run, narrow=True)
    for_experts = _Dots
    # Part, thread, and four bits of sixteen neighbours.
    for_grouped_gemm = Tiles(_load_tile, _decode_tile, ((2, 4, 4, 2, 2), (0, 2, 3, 1, 4)))
    d: Array
    q: Array

    @staticmethod
    def _decode(d, q):
        return q.astype(jnp.float32) * d.astype(jnp.float32)

    @classmethod
    def random(cls, key, shape, std):
        of_d, of_q = jax.random.split(key)
        shapes = cls.plane_shapes(shape)
        d = random_scales(of_d, shapes["d"], std / (np.arange(-128, 128) ** 2).mean() ** 0.5)
        return cls(d=d.astype(jnp.float16), q=random_bits(of_q, shapes["q"], np.int8))

    @staticmethod
    def quantize_blocks(x, importance):
        """Rounds to nearest, with ggml's own roundings, bit for bit; `importance` is not used."""
        # The compiler would multiply by 1/127 if the divisor were the same for all blocks, and the barrier keeps it
        # from merging the two divisions.
        largest = jnp.max(jnp.abs(x), axis=-1)
        d = lax.optimization_barrier(largest / jnp.where(largest > 0, 127.0, 1.0))
        inverse = jnp.where(d == 0, 0.0, 1 / d)
        return {"d": d, "q": lax.round(x * inverse[..., None], lax.RoundingMethod.AWAY_FROM_ZERO)}
