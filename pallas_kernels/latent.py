"""Between the projections and attention, in decode: queries, the new window row and index queries, in one kernel.

    q     each head over its root mean square, then RoPE on its last 64 dims
    kv    RMS norm with weight, RoPE, then E4M3 with a power-of-two scale per 64 dims, written into the window's ring
    qi    RoPE, the Hadamard matrix over sqrt(n), then rounding to E2M1 with a power-of-two scale per 32 dims

The three have nothing in common but RoPE's angles and that they are small: programs are dealt out to heads of qi, to
the row, and to heads of q. All arithmetic is float32. The Hadamard matrix is applied as butterflies, bit by bit of a
dim's number: the values that meet lie in one thread, and between two stages threads exchange what they hold.

Bytes: 280 kB for a sequence, 0.07 µs of an H200. So it is a launch, one wait for loads, and the butterflies' exchanges:
2 to 3 µs. Formulas: ds4jax/ops/latent.py; the row and the rounding are those of
ds4jax/numerics/rows.py, `Fp8Row` and `Fp4Row`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common
from pallas_kernels.common import Unsupported
from pallas_kernels.numerics import e2m1, e4m3, rope
from pallas_kernels.numerics.hadamard import hadamard_in_kernel
from pallas_kernels.numerics.norm import rms_norm

Array = jax.Array
Planes = dict[str, Array]  # "codes" E4M3 (..., D - 64), "exponents" uint8 (..., D / 64 - 1), "rope" float16 (..., 64)

BLOCK = e4m3.BLOCK  # dims of a row that share a scale; also the dims of the RoPE part
INDEX_BLOCK = e2m1.BLOCK  # dims of an index query that share a scale


@dataclass(frozen=True)
class Config:
    """heads, index_heads: of q and of qi, per program."""

    heads: int = 1
    index_heads: int = 1
    num_warps: int = 1


@dataclass(frozen=True)
class Shape:
    """A new token of each of `batch` sequences. index_heads: 0 in a layer that does not choose its rows."""

    batch: int
    index_heads: int = 0
    heads: int = 64
    dim: int = 512
    index_dim: int = 128
    window: int = 128
    layers: int = 2
    dtype: str = "bfloat16"

    in_place = 9, 1  # the window

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stacks."""
        return replace(self, window=0, layers=0)

    @property
    def static(self) -> dict[str, Any]:
        return {"eps": 1e-6, "index_dim": self.index_dim}

    def inputs(self, key: Array) -> tuple[Any, ...]:
        """Every third sequence is inactive. Positions are around the window's end."""
        keys = iter(jax.random.split(key, 8))
        B, D, L, W = self.batch, self.dim, self.layers, self.window

        def normal(*shape: int) -> Array:
            return jax.random.normal(next(keys), shape)

        q, kv = 2 * normal(B, self.heads * D), 3 * normal(B, D)
        qi = normal(B, self.index_heads * self.index_dim).astype(self.dtype) if self.index_heads else None
        angle = jax.random.uniform(next(keys), (B, BLOCK // 2), jnp.float32, 0, 2 * math.pi)
        sequence = jnp.arange(B, dtype=jnp.int32)
        window = {
            "codes": normal(L, B, W, D - BLOCK).astype(jnp.float8_e4m3fn),
            "exponents": jnp.full((L, B, W, D // BLOCK - 1), 127, jnp.uint8),
            "rope": normal(L, B, W, BLOCK).astype(jnp.float16),
        }
        norm, layers = 1 + 0.1 * normal(L + 1, D), jnp.array([L, L - 1], jnp.int32)
        at = W - 1 + 7 * sequence, (sequence % 3 != 2).astype(jnp.int32)
        return (
            q.astype(self.dtype),
            kv.astype(self.dtype),
            qi,
            norm,
            jnp.cos(angle),
            jnp.sin(angle),
            *at,
            layers,
            window,
        )

    @property
    def nbytes(self) -> int:
        itemsize = jnp.dtype(self.dtype).itemsize
        row = self.dim - BLOCK + self.dim // BLOCK - 1 + 2 * BLOCK + (itemsize + 4) * self.dim + 4 * BLOCK
        return self.batch * ((itemsize + 2) * (self.heads * self.dim + self.index_heads * self.index_dim) + row)

    @property
    def flops(self) -> int:
        index = self.index_heads * self.index_dim * self.index_dim.bit_length()
        return self.batch * (4 * (self.heads + 1) * self.dim + index)


SHAPES = {
    "1": Shape(1),
    "1 csa": Shape(1, 64),
    "16": Shape(16),
    "16 csa": Shape(16, 64),
    "32": Shape(32),
    "32 csa": Shape(32, 64),
    "1 csa float32": Shape(1, 64, dtype="float32"),
}


# ---- the kernel ------------------------------------------------------------------------------------------------------
def _kernel(*refs, inputs: int, index_programs: int, eps: float, c: Config):
    """Grid (programs, B): programs of heads of qi, if there are any, then one of the row, then those of heads of q.

    Refs: q (B, H, D), kv, norm, cos, sin, position, active, layers, three planes, qi (B, Hi, Di); → queries, the planes
    in place, index queries.
    """
    q, kv, norm, cos, sin, position, active, layers, _, _, _, *qi = refs[:inputs]
    queries, codes, exponents, rope_plane, *index_queries = refs[inputs:]
    program, b = pl.program_id(0), pl.program_id(1)

    # What a program needs is loaded at its start, so that it waits once.
    def angles(n: int) -> tuple[Array, Array]:
        """cos and sin of the n / 2 pairs of a head, (1, n / 2); those before the RoPE part stay as they are."""
        pair = lax.broadcasted_iota(jnp.int32, (1, n // 2), 1) - (n - BLOCK) // 2
        load = functools.partial(plgpu.load, mask=pair >= 0)
        return load(cos.at[b, pair], other=1.0), load(sin.at[b, pair], other=0.0)

    def make_queries() -> None:
        heads = pl.ds((program - index_programs - 1) * c.heads, c.heads)
        x, turn = q[b, heads], angles(q.shape[2])
        queries[b, heads] = rope.rotate(rms_norm(x.astype(jnp.float32), eps), *turn).astype(queries.dtype)

    def make_row() -> None:
        x, turn, at, layer = kv[b], angles(kv.shape[1]), position[b], common.entry(layers, 1)
        stored, weight = active[b] != 0, norm[common.entry(layers, 0)]
        blocks = rope.rotate(rms_norm(x.astype(jnp.float32)[None], eps) * weight, *turn).reshape(-1, BLOCK)
        place = layer, b, lax.rem(at, codes.shape[2])
        block, dim = (lax.broadcasted_iota(jnp.int32, blocks.shape, axis) for axis in (0, 1))
        nope, number = block < codes.shape[3] // BLOCK, lax.broadcasted_iota(jnp.int32, (blocks.shape[0], 1), 0)
        code, exponent = e4m3.encode_blocks(blocks)
        plgpu.store(codes.at[*place, block * BLOCK + dim], code, mask=nope & stored)
        plgpu.store(exponents.at[*place, number], exponent[:, None], mask=(number < exponents.shape[3]) & stored)
        plgpu.store(rope_plane.at[*place, dim], blocks.astype(rope_plane.dtype), mask=~nope & stored)

    def make_index_queries() -> None:
        heads = pl.ds(program * c.index_heads, c.index_heads)
        x, turn = qi[0][b, heads], angles(qi[0].shape[2])
        x = hadamard_in_kernel(rope.rotate(x.astype(jnp.float32), *turn))
        rounded = e2m1.rounded(x.reshape(c.index_heads, -1, INDEX_BLOCK)).reshape(x.shape)
        index_queries[0][b, heads] = rounded.astype(jnp.bfloat16)

    if qi:
        pl.when(program < index_programs)(make_index_queries)
    pl.when(program == index_programs)(make_row)
    pl.when(program > index_programs)(make_queries)


@functools.cache
def _call(B: int, H: int, D: int, index: tuple[int, int], planes: tuple, eps: float, c: Config, interpret: bool):
    """index: heads and dims of the index queries. planes: shape and dtype of each."""
    Hi, Di = index
    programs, inputs = Hi // c.index_heads, 12 if Hi else 11
    queries = jax.ShapeDtypeStruct((B, H, D), jnp.float16)
    index_queries = [jax.ShapeDtypeStruct((B, Hi, Di), jnp.bfloat16)] if Hi else []
    return common.call(
        functools.partial(_kernel, inputs=inputs, index_programs=programs, eps=eps, c=c),
        name="latent",
        grid=(programs + 1 + H // c.heads, B),
        out_shape=[queries, *(jax.ShapeDtypeStruct(*plane) for plane in planes), *index_queries],
        num_warps=c.num_warps,
        num_stages=1,
        aliases={8: 1, 9: 2, 10: 3},
        interpret=interpret,
    )


def configs(shape: Shape) -> list[Config]:
    """Candidates of a sweep."""
    sizes = [(heads, index) for heads in (1, 2, 4, 8) for index in ((1, 2, 4, 8) if shape.index_heads else (1,))]
    return [Config(heads, index, warps) for heads, index in sizes for warps in (1, 2, 4) if max(heads, index) >= warps]


def default_config(shape: Shape) -> Config:
    return Config() if shape.batch < 8 else Config(2, 2)


def op(
    q: Array,
    kv: Array,
    qi: Array | None,
    norm: Array,
    cos: Array,
    sin: Array,
    position: Array,
    active: Array,
    layers: Array,
    window: Planes,
    *,
    eps: float = 1e-6,
    index_dim: int = 128,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> tuple[Array, Planes, Array | None]:
    """Queries float16 (B, 1, H, D), the window with this token's rows, index queries bfloat16 (B, 1, Hi, Di) or None.

    q (B, H·D), kv (B, D) and, if the layer chooses its rows, qi (B, Hi·Di), Di being `index_dim`: the projections of
    one token of each of B sequences, of any float dtype. norm: float32 (L, D), the weight of kv's RMS norm. cos, sin:
    float32 (B, 32), of RoPE's angles. position: int32 (B,), not negative. active: int32 (B,), 0 for a sequence that
    stores nothing. layers: int32 (2,), the index into norm and that into the window; (1,) if they are equal.
    window: planes (L', B, W, ·), of which row position mod W is written; donate them, or XLA copies them first.
    Raises Unsupported.
    """
    B, D = kv.shape
    H, Hi = q.shape[1] // D, 0 if qi is None else qi.shape[1] // index_dim
    blocks = D // BLOCK
    if D % BLOCK or blocks < 2 or blocks & (blocks - 1):
        raise Unsupported(f"latent: heads of {D}, expected {BLOCK} times a power of two, {2 * BLOCK} at least")
    if q.shape[1] % D or (qi is not None and qi.shape[1] % index_dim):
        widths = [x.shape[1] for x in (q, qi) if x is not None]
        raise Unsupported(f"latent: q (and qi) of {widths} columns, expected multiples of {D} (and {index_dim})")
    if Hi and (index_dim < BLOCK or index_dim & (index_dim - 1)):
        raise Unsupported(f"latent: index queries of {index_dim}, expected a power of two, {BLOCK} at least")
    found = {k: (x.shape[-1], x.dtype.name) for k, x in window.items()}
    expected = {"codes": (D - BLOCK, "float8_e4m3fn"), "exponents": (blocks - 1, "uint8"), "rope": (BLOCK, "float16")}
    if found != expected:
        raise Unsupported(f"latent: planes {found}, expected {expected}")
    if cos.shape != (B, BLOCK // 2) or sin.shape != cos.shape:
        raise Unsupported(f"latent: cos {cos.shape} and sin {sin.shape}, expected {(B, BLOCK // 2)}")
    c = common.choose(config or default_config, Shape(B, Hi, H, D, index_dim, dtype=q.dtype.name))
    if H % c.heads or Hi % c.index_heads:
        raise Unsupported(f"latent: {H} heads and {Hi} of the index, expected multiples of {c.heads}, {c.index_heads}")
    planes = [window[k] for k in expected]
    call = _call(B, H, D, (Hi, index_dim), tuple((x.shape, x.dtype.name) for x in planes), eps, c, interpret)
    index = [] if qi is None else [qi.reshape(B, Hi, index_dim)]
    args = q.reshape(B, H, D), kv, norm, cos, sin, position, active, layers, *planes, *index
    queries, codes, exponents, rope, *index_queries = call(*args)
    window = {"codes": codes, "exponents": exponents, "rope": rope}
    return queries[:, None], window, index_queries[0][:, None] if index_queries else None
