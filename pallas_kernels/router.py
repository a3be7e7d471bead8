"""Router: logits of the experts → the k experts of each token and their weights.

    s = sqrt(softplus(logits))
    ids = the k highest of s + bias, or those that a table has for the token; -1 where there is no token
    weight = s at ids, over their sum, times a constant

A program makes one token's choice with one warp. It finds the highest score k times: scores become integers that order
as they do, because a warp has one instruction for the maximum of integers. Weights are computed from the logits of the
chosen experts, read again, so that both ways of choosing end alike.

Bytes: 1 kB of logits per token and 1 kB of bias. So it is a launch, two loads that wait for each other (the layer's
number, the bias), and k times two reductions: 2 to 3 µs. Further programs can pack the activations for the experts in
the meantime, which saves the launch of `experts.pack`. Formula: ds4jax/ops/route.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common, experts
from pallas_kernels.common import Unsupported

Array = jax.Array

MAX_EXPERTS = 512
LOWEST = -(2**31)  # below every score


@dataclass(frozen=True)
class Config:
    """num_warps: of a program, which makes one token's choice or packs some of its activations."""

    num_warps: int = 1


@dataclass(frozen=True)
class Shape:
    """k of `experts` for each of `tokens`. vocab: of the table, in a layer that routes by token id; otherwise 0.

    fmt: if not None, `dim` activations of each token are packed for it. gaps: some rows are no tokens.
    """

    tokens: int
    vocab: int = 0
    experts: int = 256
    k: int = 6
    norm: bool = True
    scale: float = 1.5
    layers: int = 3
    fmt: str | None = None
    dim: int = 4096
    gaps: bool = False

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stacks, with gaps or without."""
        return replace(self, layers=0, gaps=False)

    @property
    def static(self) -> dict[str, Any]:
        return {"k": self.k, "norm": self.norm, "scale": self.scale, "fmt": self.fmt}

    def inputs(self, key: Array) -> tuple:
        """Logits of both signs. A token's experts are distinct. The bias is of the size of the scores' differences."""
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[3], (self.tokens, self.dim), jnp.bfloat16) if self.fmt else None
        logits = 2 * jax.random.normal(keys[0], (self.tokens, self.experts))
        layer = jnp.array([self.layers - 1], jnp.int32)
        real = jnp.arange(self.tokens, dtype=jnp.int32) % 3 if self.gaps else None
        if not self.vocab:
            return logits, 0.3 * jax.random.normal(keys[1], (self.layers, self.experts)), None, layer, x, real
        first = jax.random.randint(keys[1], (self.layers, self.vocab, 1), 0, self.experts)
        table = (first + jnp.arange(self.k, dtype=jnp.int32) * (self.experts // self.k)) % self.experts
        return logits, table, jax.random.randint(keys[2], (self.tokens,), 0, self.vocab), layer, x, real

    @property
    def nbytes(self) -> int:
        packed = 4 * self.tokens * self.dim if self.fmt else 0
        if self.vocab:
            return 4 * self.tokens * (1 + 4 * self.k) + packed
        return 4 * (self.tokens * (self.experts + 2 * self.k) + self.experts) + packed

    @property
    def flops(self) -> int:
        return 0


SHAPES = {
    "1": Shape(1),
    "16": Shape(16),
    "32": Shape(32),
    "1 and pack": Shape(1, fmt="IQ2_XXS"),
    "32 and pack": Shape(32, fmt="IQ2_XXS"),
    "16 and pack": Shape(16, fmt="IQ2_XXS"),
    "1 by token": Shape(1, vocab=129280),
    "1 by token and pack": Shape(1, vocab=129280, fmt="IQ2_XXS"),
    "16 by token and pack": Shape(16, vocab=129280, fmt="IQ2_XXS"),
    "16 with gaps and pack": Shape(16, fmt="IQ2_XXS", gaps=True),
    "16 by token with gaps": Shape(16, vocab=129280, gaps=True),
    "32 by token": Shape(32, vocab=129280),
    "prefill 8192": Shape(8192),
    "prefill 8192 by token": Shape(8192, vocab=129280),
}


def _score(logit: Array) -> Array:
    """sqrt(softplus), exact to float32's rounding at both ends: exp does not overflow, log1p keeps what is small."""
    return jnp.sqrt(jnp.maximum(logit, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logit))))


def _highest(score: Array, expert: Array, exists: Array, place: Array, k: int) -> Array:
    """The experts (P,) of the k highest scores, the highest first, of equal ones the lowest expert; -1 from k on."""
    bits = lax.bitcast_convert_type(score, jnp.int32)
    left = jnp.where(exists, bits ^ (bits >> 31 & 0x7FFFFFFF), LOWEST)

    def choose(i, carry):
        left, ids = carry
        best = jnp.min(jnp.where(left == jnp.max(left), expert, MAX_EXPERTS))
        return jnp.where(expert == best, LOWEST, left), jnp.where(place == i, best, ids)

    return lax.fori_loop(0, k, choose, (left, jnp.full_like(place, -1)))[1]


def _route(logits, table, tokens, layer, real, ids_out, weight_out, *, s: Array, k: int, norm: bool, scale: float):
    """Refs: logits (S, n), table, tokens (S,) or None, layer, real (S,) or None; → ids, weights (S, k), of token s."""
    nth, n = layer[0], logits.shape[1]
    place = lax.iota(jnp.int32, pl.next_power_of_2(k))
    used = place < k
    if tokens is not None:
        ids = plgpu.load(table.at[nth, tokens[s], place], mask=used, other=0)
    else:
        expert = lax.iota(jnp.int32, pl.next_power_of_2(n))
        exists = expert < n
        logit = plgpu.load(logits.at[s, expert], mask=exists, other=0)
        bias = plgpu.load(table.at[nth, expert], mask=exists, other=0)
        ids = _highest(_score(logit) + bias, expert, exists, place, k)
    weight = jnp.where(used, _score(plgpu.load(logits.at[s, ids], mask=used, other=0)), 0)
    if norm:
        weight = weight / jnp.sum(weight)
    ids = ids if real is None else jnp.where(real[s] > 0, ids, -1)
    plgpu.store(ids_out.at[s, place], ids, mask=used)
    plgpu.store(weight_out.at[s, place], weight * scale, mask=used)


@functools.cache
def _call(
    S: int, by_token: bool, gaps: bool, packing: experts.Packing | None, k: int, c: Config, interpret: bool, **static
):
    """Arguments: logits, table, tokens if `by_token`, layer, real if `gaps`; and with a packing x, order."""

    def kernel(logits, table, *refs):
        tokens, layer, *rest = refs if by_token else (None, *refs)
        real, *rest = rest if gaps else (None, *rest)
        *to_pack, ids, weight = rest if packing is None else [*rest[:2], rest[4], *rest[2:4]]
        s, program = pl.program_id(0), pl.program_id(1)
        route = functools.partial(_route, logits, table, tokens, layer, real, ids, weight, s=s, k=k, **static)
        if packing is None:
            route()
        else:
            lax.cond(program == 0, route, functools.partial(packing.run, *to_pack, s, program - 1))

    out = [jax.ShapeDtypeStruct((S, k), jnp.int32), jax.ShapeDtypeStruct((S, k), jnp.float32)]
    return common.call(
        kernel,
        name="router",
        grid=(S, 1 + (0 if packing is None else packing.programs)),
        out_shape=out if packing is None else [*out, jax.ShapeDtypeStruct((S, *packing.shape), jnp.int32)],
        num_warps=c.num_warps,
        num_stages=1,
        rows=S,
        interpret=interpret,
    )


def configs(shape: Shape) -> list[Config]:
    """Candidates of a sweep."""
    return [Config(warps) for warps in (1, 2, 4)]


def default_config(shape: Shape) -> Config:
    return Config()


def op(
    logits: Array,
    table: Array,
    tokens: Array | None,
    layer: Array,
    x: Array | None = None,
    real: Array | None = None,
    *,
    k: int,
    norm: bool,
    scale: float,
    fmt: str | None = None,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The experts of each token and what they count: int32 (S, k) and float32 (S, k); with x, `experts.pack` of it.

    logits: float32 (S, n), no NaN. Without tokens, table is the bias, float32 (L, n): the experts of the k highest
    scores with bias, as `lax.top_k` orders them. With tokens, int32 (S,) within 0 … V - 1, it is int32 (L, V, k): the
    experts of each token id. layer: int32 (1,), which of the L. The weights are scores without bias, over their sum if
    `norm`, times `scale`. x: float (S, K), to be packed for format `fmt` on the way. real: int32 (S,), 0 where
    there is no token: its experts are -1, for which `experts` and `grouped_gemm` compute nothing. Raises Unsupported.
    """
    S, n = logits.shape
    expected = ("float32", (n,)) if tokens is None else ("int32", table.shape[1:2] + (k,))
    if (found := (table.dtype.name, table.shape[1:])) != expected:
        raise Unsupported(f"router: the table of a layer is {found}, expected {expected}")
    if logits.dtype != jnp.float32:
        raise Unsupported(f"router: logits are {logits.dtype}, expected float32")
    if not 0 < k <= n <= MAX_EXPERTS:
        raise Unsupported(f"router: {k} of {n} experts, expected 1 to all of at most {MAX_EXPERTS}")
    packing = None if x is None else experts.Packing(str(fmt), x.shape[1])
    shape = Shape(S, 0 if tokens is None else table.shape[1], n, k, norm, scale, fmt=fmt)
    shape = shape if x is None else replace(shape, dim=x.shape[1])
    config = common.choose(config or default_config, shape)
    call = _call(S, tokens is not None, real is not None, packing, k, config, interpret, norm=norm, scale=scale)
    given = [arg for arg in (logits, table, tokens, layer, real) if arg is not None]
    return tuple(call(*given, *(() if packing is None else (x, packing.order))))
