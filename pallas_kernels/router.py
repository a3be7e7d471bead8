"""Router: logits of the experts → the k experts of each token and their weights.

    s = sqrt(softplus(logits))
    ids = the k highest of s + bias, or those that a table has for the token
    weight = s at ids, over their sum, times a constant

A program makes one token's choice with one warp. It finds the highest score k times: scores become integers that order
as they do, because a warp has one instruction for the maximum of integers. Weights are computed from the logits of the
chosen experts, read again, so that both ways of choosing end alike.

Bytes: 1 kB of logits per token and 1 kB of bias. So it is a launch, two loads that wait for each other (the layer's
number, the bias), and k times two reductions: 2 to 3 µs. Source: ds4jax/model/moe.py, `route`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common
from pallas_kernels.common import Implementation, Unsupported

Array = jax.Array

MAX_EXPERTS = 512
LOWEST = -(2**31)  # below every score


@dataclass(frozen=True)
class Config:
    """num_warps: of a program, which makes one token's choice."""

    num_warps: int = 1


@dataclass(frozen=True)
class Shape:
    """k of `experts` for each of `tokens`. vocab: of the table, in a layer that routes by token id; otherwise 0."""

    tokens: int
    vocab: int = 0
    experts: int = 256
    k: int = 6
    norm: bool = True
    scale: float = 1.5
    layers: int = 3

    @property
    def static(self) -> dict[str, Any]:
        return {"k": self.k, "norm": self.norm, "scale": self.scale}

    def inputs(self, key: Array) -> tuple[Array, ...]:
        """Logits of both signs. A token's experts are distinct. The bias is of the size of the scores' differences."""
        keys = jax.random.split(key, 4)
        logits = 2 * jax.random.normal(keys[0], (self.tokens, self.experts))
        layer = jnp.array([self.layers - 1], jnp.int32)
        if not self.vocab:
            return logits, 0.3 * jax.random.normal(keys[1], (self.layers, self.experts)), None, layer
        first = jax.random.randint(keys[1], (self.layers, self.vocab, 1), 0, self.experts)
        table = (first + jnp.arange(self.k, dtype=jnp.int32) * (self.experts // self.k)) % self.experts
        return logits, table, jax.random.randint(keys[2], (self.tokens,), 0, self.vocab), layer

    @property
    def nbytes(self) -> int:
        if self.vocab:
            return 4 * self.tokens * (1 + 4 * self.k)
        return 4 * (self.tokens * (self.experts + 2 * self.k) + self.experts)

    @property
    def flops(self) -> int:
        return 0


SHAPES = {
    "1": Shape(1),
    "16": Shape(16),
    "32": Shape(32),
    "1 by token": Shape(1, vocab=129280),
    "32 by token": Shape(32, vocab=129280),
    "prefill 8192": Shape(8192),
    "prefill 8192 by token": Shape(8192, vocab=129280),
}


def reference(
    logits: Array, table: Array, tokens: Array | None, layer: Array, *, k: int, norm: bool, scale: float
) -> tuple[Array, Array]:
    """What `op` computes, in XLA."""
    s, table = _score(logits), table[layer[0]]
    ids = lax.top_k(s + table, k)[1] if tokens is None else table[tokens]
    weight = jnp.take_along_axis(s, ids, axis=-1)
    return ids, (weight / weight.sum(-1, keepdims=True) if norm else weight) * scale


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


def _kernel(*refs, k: int, norm: bool, scale: float):
    """Refs: logits (S, n), table, tokens (S,) unless the table is a bias, layer; → ids (S, k), weights (S, k)."""
    logits, table, *tokens, layer, ids_out, weight_out = refs
    s, nth, n = pl.program_id(0), layer[0], logits.shape[1]
    place = lax.iota(jnp.int32, pl.next_power_of_2(k))
    used = place < k
    if tokens:
        ids = plgpu.load(table.at[nth, tokens[0][s], place], mask=used, other=0)
    else:
        expert = lax.iota(jnp.int32, pl.next_power_of_2(n))
        exists = expert < n
        logit = plgpu.load(logits.at[s, expert], mask=exists, other=0)
        bias = plgpu.load(table.at[nth, expert], mask=exists, other=0)
        ids = _highest(_score(logit) + bias, expert, exists, place, k)
    weight = jnp.where(used, _score(plgpu.load(logits.at[s, ids], mask=used, other=0)), 0)
    if norm:
        weight = weight / jnp.sum(weight)
    plgpu.store(ids_out.at[s, place], ids, mask=used)
    plgpu.store(weight_out.at[s, place], weight * scale, mask=used)


@functools.cache
def _call(S: int, k: int, norm: bool, scale: float, c: Config, interpret: bool):
    return common.call(
        functools.partial(_kernel, k=k, norm=norm, scale=scale),
        name="router",
        grid=(S,),
        out_shape=[jax.ShapeDtypeStruct((S, k), jnp.int32), jax.ShapeDtypeStruct((S, k), jnp.float32)],
        num_warps=c.num_warps,
        num_stages=1,
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
    *,
    k: int,
    norm: bool,
    scale: float,
    implementation: Implementation = "pallas",
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The experts of each token and what they count: int32 (S, k) and float32 (S, k).

    logits: float32 (S, n), no NaN. Without tokens, table is the bias, float32 (L, n): the experts of the k highest
    scores with bias, as `lax.top_k` orders them. With tokens, int32 (S,) within 0 … V - 1, it is int32 (L, V, k): the
    experts of each token id. layer: int32 (1,), which of the L. The weights are scores without bias, over their sum if
    `norm`, times `scale`. Raises Unsupported.
    """
    S, n = logits.shape
    expected = ("float32", (n,)) if tokens is None else ("int32", table.shape[1:2] + (k,))
    if (found := (table.dtype.name, table.shape[1:])) != expected:
        raise Unsupported(f"router: the table of a layer is {found}, expected {expected}")
    if logits.dtype != jnp.float32:
        raise Unsupported(f"router: logits are {logits.dtype}, expected float32")
    if not 0 < k <= n <= MAX_EXPERTS:
        raise Unsupported(f"router: {k} of {n} experts, expected 1 to all of at most {MAX_EXPERTS}")
    if implementation == "xla":
        return reference(logits, table, tokens, layer, k=k, norm=norm, scale=scale)
    chosen_by = (table,) if tokens is None else (table, tokens)
    return tuple(_call(S, k, norm, scale, config or Config(), interpret)(logits, *chosen_by, layer))
