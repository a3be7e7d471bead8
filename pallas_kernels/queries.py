"""Queries from projections: those of the indexer, and attention's where a call has many tokens.

    attention   each head over its root mean square, then RoPE on its last 64 dims; float16
    indexer     RoPE, the Hadamard matrix over √n, then rounding to E2M1 with a power-of-two scale per 32 dims; bfloat16

A program takes some heads of a token. All arithmetic is float32. The Hadamard matrix is applied as butterflies, bit by
bit of a dim's number: the values that meet lie in one thread, and between two stages threads exchange what they hold.

Bytes are the bound for many tokens: of 4096, attention's queries are 268 MB in and as many out, 0.13 ms of an H200. For
one token it is a launch, one wait for loads, and the butterflies' exchanges. Formulas: ds4jax/ops/latent.py and
ds4jax/ops/index.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common
from pallas_kernels.common import Unsupported
from pallas_kernels.numerics import e2m1, rope
from pallas_kernels.numerics.hadamard import hadamard_in_kernel
from pallas_kernels.numerics.norm import rms_norm

Array = jax.Array
Kind = Literal["attention", "index"]

ROPE = 64  # dims of a head that are turned, the last ones
DTYPES: dict[Kind, Any] = {"attention": jnp.float16, "index": jnp.bfloat16}  # of the queries


@dataclass(frozen=True)
class Config:
    """heads: of a token, per program."""

    heads: int = 1
    num_warps: int = 1


@dataclass(frozen=True)
class Shape:
    """`heads` heads of `dim` of each of `tokens` tokens, projected in `dtype`."""

    kind: Kind
    tokens: int
    heads: int = 64
    dim: int = 128
    dtype: str = "float32"

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any number of tokens near this one."""
        return Shape(self.kind, common.magnitude(self.tokens), self.heads, self.dim, self.dtype)

    @property
    def static(self) -> dict[str, Any]:
        return {"kind": self.kind, "dim": self.dim, "eps": 1e-6}

    def inputs(self, key: Array) -> tuple[Array, ...]:
        x_key, angle_key = jax.random.split(key)
        x = 2 * jax.random.normal(x_key, (self.tokens, self.heads * self.dim))
        angle = jax.random.uniform(angle_key, (self.tokens, ROPE // 2), jnp.float32, 0, 2 * math.pi)
        return x.astype(self.dtype), jnp.cos(angle), jnp.sin(angle)

    @property
    def nbytes(self) -> int:
        return self.tokens * (self.heads * self.dim * (jnp.dtype(self.dtype).itemsize + 2) + 4 * ROPE)

    @property
    def flops(self) -> int:
        return self.tokens * self.heads * self.dim * (4 if self.kind == "attention" else self.dim.bit_length())


SHAPES = {
    "index 1": Shape("index", 1),
    "index 16": Shape("index", 16),
    "index 32": Shape("index", 32),
    "index 4096": Shape("index", 4096),
    "attention 4": Shape("attention", 4, 64, 512, "bfloat16"),
    "attention 4096": Shape("attention", 4096, 64, 512, "bfloat16"),
}


# ---- the kernel ------------------------------------------------------------------------------------------------------
def angles(cos: Any, sin: Any, row: Array, n: int) -> tuple[Array, Array]:
    """From refs (S, ROPE / 2), cos and sin of the n / 2 pairs of a head, (1, n / 2); the first dims do not turn."""
    pair = lax.broadcasted_iota(jnp.int32, (1, n // 2), 1) - (n - ROPE) // 2
    load = functools.partial(plgpu.load, mask=pair >= 0)
    return load(cos.at[row, pair], other=1.0), load(sin.at[row, pair], other=0.0)


def attention_heads(x: Array, turn: tuple[Array, Array], eps: float) -> Array:
    """Heads (m, n), projected → float32 queries."""
    return rope.rotate(rms_norm(x.astype(jnp.float32), eps), *turn)


def _index_heads(x: Array, turn: tuple[Array, Array]) -> Array:
    x = hadamard_in_kernel(rope.rotate(x.astype(jnp.float32), *turn))
    return e2m1.rounded(x.reshape(x.shape[0], -1, e2m1.BLOCK)).reshape(x.shape)


def _kernel(x, cos, sin, out, *, kind: Kind, eps: float, c: Config):
    """Grid (S, H / heads). Refs: x (S, H, D), cos, sin; → queries."""
    s, heads = pl.program_id(0), pl.ds(pl.program_id(1) * c.heads, c.heads)
    value, turn = x[s, heads], angles(cos, sin, s, x.shape[2])
    queries = attention_heads(value, turn, eps) if kind == "attention" else _index_heads(value, turn)
    out[s, heads] = queries.astype(out.dtype)


@functools.cache
def _call(kind: Kind, S: int, H: int, D: int, eps: float, c: Config, interpret: bool):
    return common.call(
        functools.partial(_kernel, kind=kind, eps=eps, c=c),
        name=f"queries_{kind}",
        grid=(S, H // c.heads),
        out_shape=jax.ShapeDtypeStruct((S, H, D), DTYPES[kind]),
        num_warps=c.num_warps,
        num_stages=1,
        interpret=interpret,
    )


def configs(shape: Shape) -> list[Config]:
    """Candidates of a sweep."""
    heads = [n for n in (1, 2, 4, 8, 16) if shape.heads % n == 0]
    return [Config(n, warps) for n in heads for warps in (1, 2, 4, 8) if 256 <= n * shape.dim // warps <= 2048]


def default_config(shape: Shape) -> Config:
    if shape.tokens < 8:
        return Config()
    heads = math.gcd(shape.heads, max(1, 2048 // shape.dim))
    return Config(heads, max(1, heads * shape.dim // 1024))


def op(
    x: Array,
    cos: Array,
    sin: Array,
    *,
    kind: Kind,
    dim: int,
    eps: float = 1e-6,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> Array:
    """Queries (S, H, D), D being `dim`; in float16 for attention, in bfloat16 for the indexer.

    x: (S, H·D), the projection of S tokens, of any float dtype. cos, sin: float32 (S, 32), of RoPE's angles. eps: of
    attention's norm. Raises Unsupported.
    """
    S, width = x.shape
    if dim < ROPE or dim & (dim - 1):
        raise Unsupported(f"queries: heads of {dim}, expected a power of two, {ROPE} at least")
    if width % dim:
        raise Unsupported(f"queries: {width} columns, expected a multiple of {dim}")
    if cos.shape != (S, ROPE // 2) or sin.shape != cos.shape:
        raise Unsupported(f"queries: cos {cos.shape} and sin {sin.shape}, expected {(S, ROPE // 2)}")
    c = common.choose(config or default_config, Shape(kind, S, width // dim, dim, x.dtype.name))
    if width // dim % c.heads:
        raise Unsupported(f"queries: {width // dim} heads, expected a multiple of {c.heads}")
    return _call(kind, S, width // dim, dim, eps, c, interpret)(x.reshape(S, -1, dim), cos, sin)
