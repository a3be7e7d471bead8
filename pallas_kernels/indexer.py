"""Scores of the lightning indexer: score_i = Σ_heads w_h · relu(q_h · κ_i), the keys κ read as E2M1 codes.

A program decodes a block of keys once, 68 bytes each, to bfloat16 (exact: E2M1 times a power of two) and then takes
some queries in turn: its keys are the M of a matrix product and the heads of a query or two the N, so that the sum over
heads stays within the four threads that share an accumulator row. Keys that no query sees are not read, and get no
score: what is written does not grow with the room that there is for keys.

Decoding of one sequence reads 68 bytes a key, 4.3 µs of an H200 at 262,144 keys, and takes as long on its tensor cores,
16 kFLOP a key, and in decoding, some 8 instructions a value; below some 50,000 keys the launch is what it costs.
Prefill is bound by the tensor cores: 8192 queries after 20,480 tokens, 0.8 TFLOP, 1.2 ms at 70 % of their rate.

Formulas: ds4jax/ops/index.py, `scores` and `visible`; the planes are those of ds4jax/numerics/rows.py, `Fp4Row`.
"""

from __future__ import annotations

import functools
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
from pallas_kernels.numerics import e2m1
from pallas_kernels.numerics.scale import power_of_two

Array = jax.Array

BLOCK = e2m1.BLOCK  # dims that share a scale


@dataclass(frozen=True)
class Config:
    """keys, queries: what a program takes. together: queries of one product, which divides `queries`."""

    keys: int
    queries: int
    together: int
    num_warps: int
    num_stages: int = 2


@dataclass(frozen=True)
class Shape:
    """T queries, at consecutive positions from `position` on, of each of B sequences over N stored keys."""

    batch: int
    queries: int
    keys: int
    position: int
    heads: int = 64
    dim: int = 128
    layers: int = 2
    ratio: int = 4

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any number of visible keys."""
        return replace(self, keys=common.magnitude(self.keys), position=0, layers=0)

    @property
    def static(self) -> dict[str, Any]:
        return {"ratio": self.ratio}

    def inputs(self, key: Array) -> tuple[Array, ...]:
        """Queries and keys of variance near 1. Each sequence is 5 tokens behind the last."""
        q_key, w_key, code_key, scale_key = jax.random.split(key, 4)
        B, T, N, L = self.batch, self.queries, self.keys, self.layers
        # Codes of all 16 values have variance 8.6; scales of 1/4 and 1/2 bring it to 1.
        values = jnp.asarray(np.concatenate([e2m1.VALUES, -e2m1.VALUES]) / 4, jnp.bfloat16)
        q = values[jax.random.randint(q_key, (B, T, self.heads, self.dim), 0, 16)]
        weight = jax.random.normal(w_key, (B, T, self.heads)) / self.heads
        codes = jax.random.bits(code_key, (L, B, N, self.dim // 2), jnp.uint8)
        exponents = jax.random.randint(scale_key, (L, B, N, self.dim // BLOCK), 125, 127).astype(jnp.uint8)
        position = self.position + jnp.arange(T, dtype=jnp.int32) - 5 * jnp.arange(B, dtype=jnp.int32)[:, None]
        return q, weight, codes, exponents, position, jnp.array([L - 1], jnp.int32)

    def _seen(self) -> int:
        """Visible pairs of query and key."""
        position = self.position + np.arange(self.queries) - 5 * np.arange(self.batch)[:, None]
        return int(np.minimum((position + 1) // self.ratio, self.keys).sum())

    @property
    def nbytes(self) -> int:
        last = self.position + self.queries - 5 * np.arange(self.batch)
        read = int(np.minimum(last // self.ratio, self.keys).sum()) * (self.dim // 2 + self.dim // BLOCK)
        return read + self.batch * self.queries * self.heads * (2 * self.dim + 4) + 4 * self._seen()

    def defined(self, score: Array, inputs: tuple[Array, ...]) -> Array:
        """What the result says: the scores with -inf in place of those that say nothing."""
        key = jnp.arange(self.keys, dtype=jnp.int32)
        return jnp.where((key + 1) * self.ratio <= inputs[4][..., None] + 1, score, -jnp.inf)

    @property
    def flops(self) -> int:
        return 2 * self.heads * self.dim * self._seen()


# Contexts of 2k, 28k, 256k and 1M tokens; a decoded token, several sequences, drafts to verify, blocks of a prefill.
SHAPES = {
    "decode 2k": Shape(1, 1, 512, 2047),
    "decode 28k": Shape(1, 1, 7168, 28671),
    "decode 28k of 256k": Shape(1, 1, 65536, 28671),
    "decode 256k": Shape(1, 1, 65536, 262143),
    "decode 1M": Shape(1, 1, 262144, 1048575),
    "decode 16 × 2k": Shape(16, 1, 544, 2047),
    "decode 32 × 28k": Shape(32, 1, 7168, 28671),
    "verify 4 at 28k": Shape(1, 4, 7168, 28668),
    "prefill 128 at 28k": Shape(1, 128, 7168, 28544),
    "prefill 1024 at 28k": Shape(1, 1024, 7168, 27648),
    "prefill 1024 at 256k": Shape(1, 1024, 65536, 261120),
}


def _decoded(codes: Array, exponents: Array) -> Array:
    """codes (n, D/32, 16), exponents (n, D/32) → bfloat16 (n, D)."""
    factor = (power_of_two(exponents) * e2m1.HALF_SCALE)[:, :, None]
    wide = codes.astype(jnp.int32)
    # The low nibbles, then the high ones.
    values = [(e2m1.half(c).astype(jnp.float32) * factor).astype(jnp.bfloat16) for c in (wide & 15, wide >> 4)]
    return jnp.stack(values, axis=-1).reshape(codes.shape[0], -1)


def _kernel(q, weight, codes, exponents, position, layer, score, *, ratio: int, c: Config):
    """Refs of whole arrays: q (B, T·H, D), weight (B, T·H), codes (L, B, N, D/32, 16), the others as `op` has them."""
    b, first = pl.program_id(2), pl.program_id(1) * c.queries
    H = q.shape[1] // position.shape[1]
    start, nth = pl.program_id(0) * c.keys, layer[0]
    rows, stored = pl.ds(start, c.keys), start + lax.iota(jnp.int32, c.keys) < score.shape[-1]

    def loaded(t: Array) -> tuple[Array, Array]:
        heads = pl.ds(t * H, c.together * H)
        return q[b, heads], weight[b, heads]

    latest = jnp.max(position[b, pl.ds(first, c.queries)])

    @pl.when((start + 1) * ratio <= latest + 1)
    def _():
        # The loop is pipelined, but what a single product takes would be loaded only when the keys are decoded.
        alone = loaded(first) if c.queries == c.together else None
        scales = plgpu.load(exponents.at[nth, b, rows], mask=stored[:, None], other=0)
        keys = _decoded(plgpu.load(codes.at[nth, b, rows], mask=stored[:, None, None], other=0), scales)

        def body(i: Array, _: None) -> None:
            t = first + i * c.together
            query, w = alone or loaded(t)
            dots = jnp.dot(keys, query.T, preferred_element_type=jnp.float32)
            terms = (jnp.maximum(dots, 0.0) * w).reshape(c.keys, c.together, H)
            plgpu.store(score.at[b, pl.ds(t, c.together), rows], jnp.sum(terms, axis=2).T, mask=stored[None])

        lax.fori_loop(0, c.queries // c.together, body, None)


@functools.cache
def _call(B: int, T: int, N: int, ratio: int, c: Config, interpret: bool):
    return common.call(
        functools.partial(_kernel, ratio=ratio, c=c),
        name="indexer_scores",
        grid=(pl.cdiv(N, c.keys), T // c.queries, B),
        out_shape=jax.ShapeDtypeStruct((B, T, N), jnp.float32),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        rows=B * T,
        interpret=interpret,
    )


def _dividing(T: int, most: int) -> int:
    """The largest power of two up to `most` that divides T."""
    return min(T & -T, most)


def configs(shape: Shape) -> list[Config]:
    """Candidates of a sweep."""
    if shape.queries < 16:
        each = _dividing(shape.queries, 16)
        return [Config(keys, each, 1, warps) for keys in (32, 64, 128) for warps in (4, 8)]
    return [
        Config(keys, _dividing(shape.queries, most), together, warps)
        for keys, together, warps in ((128, 1, 4), (128, 1, 8), (128, 2, 8), (256, 1, 8))
        for most in (16, 32, 64)
    ]


def default_config(shape: Shape) -> Config:
    if shape.queries < 16:
        # Enough programs for every multiprocessor; beyond that larger ones, which read the queries less often.
        keys = 64 if shape.batch * shape.keys < 2**16 else 128
        return Config(keys, _dividing(shape.queries, 16), 1, 4)
    return Config(128, _dividing(shape.queries, 32), 2, 8)


def op(
    q: Array,
    weight: Array,
    codes: Array,
    exponents: Array,
    position: Array,
    layer: Array,
    *,
    ratio: int = 4,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> Array:
    """Scores of the stored keys of a layer that a query sees; in place of the others there is anything.

    q: bfloat16 (B, T, H, D), rotated and rounded to E2M1 times powers of two. weight: float32 (B, T, H).
    codes: uint8 (L, B, N, D/2), byte i holding dims 2i (low nibble) and 2i + 1; exponents: uint8 (L, B, N, D/32), of
    powers of two, biased by 127, at most 240. position: int32 (B, T); key i is seen from position (i + 1)·ratio - 1 on.
    layer: int32 (1,), which of the L. → float32 (B, T, N). Sums are float32; the order of the heads' sum is fixed.
    Raises Unsupported.
    """
    B, T, H, D = q.shape
    L, _, N, _ = codes.shape
    if q.dtype != jnp.bfloat16:
        raise Unsupported(f"indexer: queries are {q.dtype}, expected bfloat16")
    for name, n in (("heads", H), ("dims", D)):
        if n < BLOCK or n & (n - 1):
            raise Unsupported(f"indexer: {n} {name}, expected a power of two, {BLOCK} at least")
    c = common.choose(config or default_config, Shape(B, T, N, 0, H, D, L, ratio))
    if T % c.queries:
        raise Unsupported(f"indexer: {T} queries, expected a multiple of the {c.queries} that a program takes")
    q, weight = q.reshape(B, T * H, D), weight.reshape(B, T * H)
    codes = codes.reshape(L, B, N, D // BLOCK, BLOCK // 2)
    return _call(B, T, N, ratio, c, interpret)(q, weight, codes, exponents, position, layer)
