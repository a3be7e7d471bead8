"""Between the projections and attention, of a few tokens: queries and the new window rows, in one kernel.

    q     each head over its root mean square, then RoPE on its last 64 dims
    kv    RMS norm with weight, RoPE, then E4M3 with a power-of-two scale per 64 dims, written into the window's ring

The two have nothing in common but RoPE's angles and that they are small: of each token one program makes the row, the
others heads of q. All arithmetic is float32. Index queries are not here: `queries` makes them, before q is projected.

Bytes: 200 kB a token, 0.05 µs of an H200. So it is a launch and one wait for loads: 2 µs. Formulas:
ds4jax/ops/latent.py; the row is that of ds4jax/numerics/rows.py, `Fp8Row`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common
from pallas_kernels.common import Unsupported
from pallas_kernels.numerics import e4m3, rope
from pallas_kernels.numerics.norm import rms_norm
from pallas_kernels.queries import Config, angles, attention_heads

Array = jax.Array
Planes = dict[str, Array]  # "codes" E4M3 (..., D - 64), "exponents" uint8 (..., D / 64 - 1), "rope" float16 (..., 64)

BLOCK = e4m3.BLOCK  # dims of a row that share a scale; also the dims of the RoPE part


@dataclass(frozen=True)
class Shape:
    """`tokens` new tokens of each of `batch` sequences. window: slots of a ring."""

    batch: int
    tokens: int = 1
    heads: int = 64
    dim: int = 512
    window: int = 136
    layers: int = 2
    dtype: str = "bfloat16"

    in_place = 8, 1  # the window

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stacks."""
        return replace(self, window=0, layers=0)

    @property
    def static(self) -> dict[str, Any]:
        return {"eps": 1e-6}

    def inputs(self, key: Array) -> tuple[Any, ...]:
        """Every third sequence is inactive, another has a token less than it may. Positions are around a ring's end."""
        keys = iter(jax.random.split(key, 8))
        B, T, D, L, W = self.batch, self.tokens, self.dim, self.layers, self.window

        def normal(*shape: int) -> Array:
            return jax.random.normal(next(keys), shape)

        q, kv = 2 * normal(B * T, self.heads * D), 3 * normal(B * T, D)
        angle = jax.random.uniform(next(keys), (B, T, BLOCK // 2), jnp.float32, 0, 2 * math.pi)
        sequence = jnp.arange(B, dtype=jnp.int32)
        window = {
            "codes": normal(L, B, W, D - BLOCK).astype(jnp.float8_e4m3fn),
            "exponents": jnp.full((L, B, W, D // BLOCK - 1), 127, jnp.uint8),
            "rope": normal(L, B, W, BLOCK).astype(jnp.float16),
        }
        norm, layers = 1 + 0.1 * normal(L + 1, D), jnp.array([L, L - 1], jnp.int32)
        n = jnp.array([T, max(T - 1, 1), 0], jnp.int32)
        at = W - 1 + 7 * sequence, n[sequence % 3]
        return (
            q.astype(self.dtype),
            kv.astype(self.dtype),
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
        return self.batch * self.tokens * ((itemsize + 2) * self.heads * self.dim + row)

    @property
    def flops(self) -> int:
        return self.batch * self.tokens * 4 * (self.heads + 1) * self.dim


SHAPES = {
    "1": Shape(1),
    "16": Shape(16),
    "32": Shape(32),
    "1 float32": Shape(1, dtype="float32"),
    "1, 6 tokens": Shape(1, 6),
    "16, 3 tokens": Shape(16, 3),
}


# ---- the kernel ------------------------------------------------------------------------------------------------------
def _kernel(
    q, kv, norm, cos, sin, position, n, layers, _codes, _exponents, _rope, queries, codes, exponents, rope_plane,
    *, eps: float, c: Config,
):  # fmt: skip
    """Grid (programs, S): of each token one program of the row, then those of heads of q.

    Refs: q (S, H, D), kv, norm, cos, sin, position, n, layers, three planes; → queries, the planes in place.
    """
    program, s = pl.program_id(0), pl.program_id(1)
    tokens = q.shape[0] // position.shape[0]
    b, t = (s, 0) if tokens == 1 else (lax.div(s, np.int32(tokens)), lax.rem(s, np.int32(tokens)))

    # What a program needs is loaded at its start, so that it waits once.
    def make_queries() -> None:
        heads = pl.ds((program - 1) * c.heads, c.heads)
        x, turn = q[s, heads], angles(cos, sin, s, q.shape[2])
        queries[s, heads] = attention_heads(x, turn, eps).astype(queries.dtype)

    def make_row() -> None:
        x, turn, at, layer = kv[s], angles(cos, sin, s, kv.shape[1]), position[b] + t, common.entry(layers, 1)
        stored, weight = n[b] > t, norm[common.entry(layers, 0)]
        blocks = rope.rotate(rms_norm(x.astype(jnp.float32)[None], eps) * weight, *turn).reshape(-1, BLOCK)
        place = layer, b, lax.rem(at, codes.shape[2])
        block, dim = (lax.broadcasted_iota(jnp.int32, blocks.shape, axis) for axis in (0, 1))
        nope, number = block < codes.shape[3] // BLOCK, lax.broadcasted_iota(jnp.int32, (blocks.shape[0], 1), 0)
        code, exponent = e4m3.encode_blocks(blocks)
        plgpu.store(codes.at[*place, block * BLOCK + dim], code, mask=nope & stored)
        plgpu.store(exponents.at[*place, number], exponent[:, None], mask=(number < exponents.shape[3]) & stored)
        plgpu.store(rope_plane.at[*place, dim], blocks.astype(rope_plane.dtype), mask=~nope & stored)

    pl.when(program == 0)(make_row)
    pl.when(program > 0)(make_queries)


@functools.cache
def _call(S: int, H: int, D: int, planes: tuple, eps: float, c: Config, interpret: bool):
    """planes: shape and dtype of each."""
    queries = jax.ShapeDtypeStruct((S, H, D), jnp.float16)
    return common.call(
        functools.partial(_kernel, eps=eps, c=c),
        name="latent",
        grid=(1 + H // c.heads, S),
        out_shape=[queries, *(jax.ShapeDtypeStruct(*plane) for plane in planes)],
        num_warps=c.num_warps,
        num_stages=1,
        aliases={8: 1, 9: 2, 10: 3},
        rows=S,
        interpret=interpret,
    )


def configs(shape: Shape) -> list[Config]:
    """Candidates of a sweep."""
    return [Config(heads, warps) for heads in (1, 2, 4, 8) for warps in (1, 2, 4) if heads >= warps]


def default_config(shape: Shape) -> Config:
    return Config() if shape.batch * shape.tokens < 8 else Config(2)


def op(
    q: Array,
    kv: Array,
    norm: Array,
    cos: Array,
    sin: Array,
    position: Array,
    n: Array,
    layers: Array,
    window: Planes,
    *,
    eps: float = 1e-6,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> tuple[Array, Planes]:
    """Queries float16 (B, T, H, D), and the window with these tokens' rows.

    q (B·T, H·D), kv (B·T, D): the projections of T tokens of each of B sequences, of any float dtype. norm: float32
    (L, D), the weight of kv's RMS norm. cos, sin: float32 (B, T, 32), of RoPE's angles. position: int32 (B,), of the
    first, not negative. n: int32 (B,), how many of the T are stored. layers: int32 (2,), the index into norm and that
    into the window; (1,) if they are equal. window: planes (L', B, slots, ·), of which row position mod slots is
    written; T is at most that many. Donate them, or XLA copies them first. Raises Unsupported.
    """
    B, T, _ = cos.shape
    S, D = kv.shape
    H, blocks = q.shape[1] // D, D // BLOCK
    if D % BLOCK or blocks < 2 or blocks & (blocks - 1):
        raise Unsupported(f"latent: heads of {D}, expected {BLOCK} times a power of two, {2 * BLOCK} at least")
    if q.shape[1] % D:
        raise Unsupported(f"latent: q of {q.shape[1]} columns, expected a multiple of {D}")
    found = {k: (x.shape[-1], x.dtype.name) for k, x in window.items()}
    expected = {"codes": (D - BLOCK, "float8_e4m3fn"), "exponents": (blocks - 1, "uint8"), "rope": (BLOCK, "float16")}
    if found != expected:
        raise Unsupported(f"latent: planes {found}, expected {expected}")
    if B * T != S or cos.shape != (B, T, BLOCK // 2) or sin.shape != cos.shape:
        raise Unsupported(f"latent: cos {cos.shape} and sin {sin.shape}, expected (B, T, {BLOCK // 2}), B·T = {S}")
    c = common.choose(config or default_config, Shape(B, T, H, D, dtype=q.dtype.name))
    if H % c.heads:
        raise Unsupported(f"latent: {H} heads, expected a multiple of {c.heads}")
    planes = [window[k] for k in expected]
    call = _call(S, H, D, tuple((x.shape, x.dtype.name) for x in planes), eps, c, interpret)
    cos, sin = (x.reshape(S, -1) for x in (cos, sin))
    queries, *planes = call(q.reshape(S, H, D), kv, norm, cos, sin, position, n, layers, *planes)
    return queries.reshape(B, T, H, D), dict(zip(expected, planes, strict=True))
