"""Routed experts for 1 to 32 tokens: gate and up with their activation, then down with the sum over a token's experts.

Decoding reads each chosen expert once; with 2-bit weights the instructions, not the bytes, are the bound: while 4 TB/s
bring one IQ2_XXS weight, 132 multiprocessors issue two instructions a lane, one of them integer logic. Hence:

* Activations become 16-bit fixed point, one scale per `Dots.unit` of weights (`pack`; its rounding is 2e-5 of the
  norm). `dp2a` multiplies two of them with two 8-bit weights, so that a weight costs half an instruction and no
  conversion to float; sums in int32 are exact and meet their scales once per unit.
* Weights become four signed bytes per word: K-quants by shift and mask, IQ2_XXS and MXFP4 by `prmt`, which looks up
  four 3-bit codes in eight bytes at once. For IQ2_XXS a code is two bits of magnitude, from a table of the 256 grid
  entries as nibbles, and the sign. A multiplication spreads a set of seven signs over the nibbles, another one adds up
  their parity, which is the eighth.
* A thread holds the same units of every row it works on, so activations are loaded once per program and nothing
  changes threads before the last sum over a row. `pack` puts them in the order in which words yield their weights.

What the kernels need of a weight format is in `pallas_kernels.formats.dots`.

Formulas: ds4jax/ops/experts.py. Integer dot products for such formats: llama.cpp's ``vecdotq.cuh``, which
takes 8-bit activations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import common, formats
from pallas_kernels.common import Unsupported
from pallas_kernels.formats.dots import Dots, Emulation, Gpu, Program
from pallas_kernels.numerics.swiglu import swiglu

Array = jax.Array
Ref = Any
Stage = Literal["gate_up", "down"]

MAX_TOKENS = 32
FIXED = 32767  # the largest fixed-point activation


@dataclass(frozen=True)
class Config:
    """A program has `num_warps` warps; each takes `rows` rows of a matrix, one after the other.

    tokens: how many tokens of one expert a program of gate_up serves at most; experts with more are read again.
    """

    num_warps: int = 4
    rows: int = 2
    tokens: int = 1


# ---- shapes ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """One call of a stage for `tokens` tokens that use `used` of `experts` experts each; matrices are (n, k)."""

    stage: Stage
    fmt: str
    tokens: int
    k: int
    n: int
    experts: int = 256
    used: int = 6
    clamp: float = 10.0

    def inputs(self, key: Array) -> tuple:
        """The arguments of `gate_up` or `down`: distinct experts per token, outputs of about unit scale."""
        keys = jax.random.split(key, 5)
        ids = jnp.argsort(jax.random.uniform(keys[0], (self.tokens, self.experts)), axis=-1)[:, : self.used]
        ids = ids.astype(jnp.int32)

        def matrix(key: Array) -> tuple[Array, ...]:
            return formats.find(self.fmt).random(key, (self.experts, self.n, self.k), self.k**-0.5)

        if self.stage == "down":
            return jax.random.normal(keys[1], (self.tokens * self.used, self.k)), ids, matrix(keys[2])
        x = jax.random.normal(keys[1], (self.tokens, self.k))
        weights = jax.random.uniform(keys[4], ids.shape, jnp.float32, 0.1, 0.4)
        return x, ids, weights, matrix(keys[2]), matrix(keys[3])

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stacks, and any limit."""
        return replace(self, experts=0, clamp=0.0)

    @property
    def static(self) -> dict:
        """Keyword arguments of `experts` besides the arrays."""
        return {"stage": self.stage, "fmt": self.fmt} | ({"clamp": self.clamp} if self.stage == "gate_up" else {})

    @property
    def touched(self) -> float:
        """Expected number of distinct experts."""
        return self.experts * (1 - (1 - self.used / self.experts) ** self.tokens)

    @property
    def matrices(self) -> int:
        return 2 if self.stage == "gate_up" else 1

    @property
    def nbytes(self) -> int:
        """Weights of the experts touched, activations, results."""
        pairs = self.tokens * self.used
        rows = (self.tokens, pairs) if self.stage == "gate_up" else (pairs, self.tokens)
        matrix = formats.find(self.fmt).nbytes(self.n * self.k)
        return round(self.touched * self.matrices * matrix) + 4 * (rows[0] * self.k + rows[1] * self.n)

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.used * self.matrices * self.n * self.k


def _shapes() -> dict[str, Shape]:
    out = {}
    pairs = ("IQ2_XXS", "Q2_K"), ("IQ2_3B", "Q2_K"), ("Q4_K", "Q4_K"), ("MXFP4", "MXFP4"), ("Q8_0", "Q8_0")
    for gate_up_fmt, down_fmt in pairs:
        for tokens in (1, 2, 3, 4, 6, 16, 32) if down_fmt == "Q2_K" else (1, 16):
            out[f"gate_up {gate_up_fmt} {tokens}"] = Shape("gate_up", gate_up_fmt, tokens, k=4096, n=2048)
            out[f"down {down_fmt} {tokens}"] = Shape("down", down_fmt, tokens, k=2048, n=4096)
    return out


SHAPES: dict[str, Shape] = _shapes()


# ---- ops -------------------------------------------------------------------------------------------------------------
def experts(*arrays, stage: Stage, **options) -> Array:
    """`gate_up` or `down`, by name."""
    return (gate_up if stage == "gate_up" else down)(*arrays, **options)


def gate_up(
    x: Array,
    ids: Array,
    weights: Array,
    gate: Sequence[Array],
    up: Sequence[Array],
    *,
    fmt: str,
    clamp: float,
    first: Array | None = None,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> Array:
    """silu(min(g, clamp)) · clip(u, -clamp, clamp) · weight for each token and each of its experts.

    x (S, K) float, or what `pack` makes of it for `fmt`; ids (S, k) int32, negative where the expert is held elsewhere;
    weights (S, k) float32; planes of gate and up, each (experts, F, K) in `fmt`. first: int32 (1,), the number among
    these experts that id 0 has, by default 0. Returns float32 (S·k, F), the pairs of a token one after the other, zeros
    for experts held elsewhere. Raises Unsupported.
    """
    packed = x.ndim == 3
    (S, k), K = ids.shape, x.shape[2] * _dots(fmt).unit if packed else x.shape[1]
    _, F = _check(fmt, K, S, gate)
    if _check(fmt, K, S, up)[1] != F:
        raise Unsupported(f"gate_up: found gate {gate[0].shape} and up {up[0].shape}, expected equal shapes")
    config = common.choose(config or default_config, Shape("gate_up", fmt, S, K, F, used=k))
    _check_config(config, F)
    table = _dots(fmt).table()
    tables = () if table is None else (jnp.asarray(table),)
    f = _gate_up(fmt, S, k, K, F, clamp, config, interpret)
    x = x if packed else pack(x, fmt=fmt, interpret=interpret)
    groups = _groups(ids) if min(config.tokens, S) > 1 else ()
    return f(x, ids.reshape(-1), _first(first), weights.reshape(-1), *groups, *gate, *up, *tables)


def down(
    act: Array,
    ids: Array,
    planes: Sequence[Array],
    plus: Array | None = None,
    *,
    fmt: str,
    first: Array | None = None,
    dtype: Any = jnp.float32,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> Array:
    """Σ over a token's experts of W act, in the order of `ids`, and what `plus` adds: (S, E) in `dtype`.

    act (S·k, F) float, as `gate_up` returns it, zeros for experts held elsewhere; ids and first as there; planes
    (experts, E, F) in `fmt`; plus: float32 (S, E) or None. Sums are float32. Raises Unsupported.
    """
    (S, k), F = ids.shape, act.shape[1]
    _, E = _check(fmt, F, S, planes)
    config = common.choose(config or default_config, Shape("down", fmt, S, F, E, used=k))
    _check_config(config, E)
    table = _dots(fmt).table()
    tables = () if table is None else (jnp.asarray(table),)
    f = _down(fmt, S, k, F, E, plus is not None, jnp.dtype(dtype), config, interpret)
    act = pack(act, fmt=fmt, interpret=interpret)
    return f(act, ids.reshape(-1), _first(first), *([] if plus is None else [plus]), *planes, *tables)


def pack(x: Array, *, fmt: str, interpret: bool = False) -> Array:
    """Activations (S, K) as 16-bit fixed point in the order of a format's weights, int32 (S, words, units).

    Of each unit: unit / 4 words of the first two values of each four, as many of the other two, the sums of its groups,
    the scale (the bits of a float32).
    """
    packing = Packing(fmt, x.shape[1])
    return _pack(packing, len(x), interpret)(x, packing.order)


def _check(fmt: str, K: int, S: int, planes: Sequence[Array]) -> tuple[int, int]:
    """(experts, rows) of a matrix (…, K), or Unsupported."""
    Packing(fmt, K)
    if not 1 <= S <= MAX_TOKENS:
        raise Unsupported(f"tokens: found {S}, expected 1 to {MAX_TOKENS}")
    found = [(p.dtype.name, p.shape[2:]) for p in planes]
    expected = [(p.dtype.name, p.shape) for p in formats.find(fmt).structs((K,))]
    if found != expected:
        raise Unsupported(f"{fmt} planes of rows of {K} values: found {found}, expected {expected}")
    n_experts, rows, _ = planes[0].shape
    return n_experts, rows


def _check_config(config: Config, n: int) -> None:
    if n % (config.num_warps * config.rows):
        raise Unsupported(f"rows: found {n}, expected a multiple of {config.num_warps} · {config.rows}, see {config}")


def _first(first: Array | None) -> Array:
    return jnp.zeros((1,), jnp.int32) if first is None else first


def _groups(ids: Array) -> tuple[Array, Array]:
    """Of each pair, how many pairs before it have the same expert, and the next one that has it, or how many there are.

    Both are a reduction with nothing after it, so that XLA makes them in one kernel.
    """
    ids = ids.reshape(-1)
    n = jnp.arange(ids.size, dtype=jnp.int32)
    same = ids[:, None] == ids[None, :]
    rank = (same & (n[None, :] < n[:, None])).sum(1, dtype=jnp.int32)
    return rank, jnp.where(same & (n[None, :] > n[:, None]), n[None, :], ids.size).min(1)


# ---- kernels ---------------------------------------------------------------------------------------------------------
def _dots(fmt: str) -> type[Dots]:
    return formats.needs(fmt, "experts")


@functools.cache
def _order(fmt: str, K: int) -> np.ndarray:
    """int32 (4, fours, units): the columns of four activations that meet four weights of a word."""
    order = _dots(fmt).order(K).astype(np.int32)
    return np.ascontiguousarray(order.reshape(len(order), -1, 4).T)


@dataclass(frozen=True)
class Packing:
    """`pack` as a part of a kernel: `programs` programs of one warp make a token's. Raises Unsupported."""

    fmt: str
    K: int

    def __post_init__(self):
        _dots(self.fmt)
        if self.K < 256 or self.K & (self.K - 1):
            raise Unsupported(f"columns: found {self.K}, expected a power of two, 256 at least")

    @property
    def shape(self) -> tuple[int, int]:
        """Of a token: words, units."""
        form = _dots(self.fmt)
        return form.unit // 2 + form.sums + 1, self.K // form.unit

    @property
    def order(self) -> Array:
        """int32 (4, fours, units): the columns of four activations that meet four weights of a word."""
        return jnp.asarray(_order(self.fmt, self.K))

    @property
    def block(self) -> int:
        """Units per program."""
        return min(self.shape[1], 8)

    @property
    def programs(self) -> int:
        return self.shape[1] // self.block

    def run(self, x: Ref, order: Ref, out: Ref, s: Array, program: Array) -> None:
        """Refs: x (S, K), order, out (S, words, units)."""
        here, row = pl.ds(program * self.block, self.block), 0
        for part in self.parts(*(x[s, order[i, :, here]] for i in range(4))):
            out[s, pl.ds(row, len(part)), here] = part
            row += len(part)

    def parts(self, *fours: Array) -> list[Array]:
        """Of fours of activations the first, the second, … (fours, units) → words, sums if there are any, scales."""
        fours = tuple(x.astype(jnp.float32) for x in fours)
        largest = functools.reduce(jnp.maximum, map(jnp.abs, fours)).max(0, keepdims=True)
        factor = jnp.where(largest > 0, FIXED / largest, 0.0)
        fixed = [_round(x * factor) for x in fours]
        groups = _dots(self.fmt).sums
        sums = [functools.reduce(jnp.add, fixed).reshape(groups, -1, largest.shape[1]).sum(1)] if groups else []
        words = [a & 0xFFFF | b << 16 for a, b in (fixed[:2], fixed[2:])]
        return [*words, *sums, lax.bitcast_convert_type(largest * (1 / FIXED), jnp.int32)]


@functools.cache
def _pack(packing: Packing, S: int, interpret: bool):
    def kernel(x, order, out):
        packing.run(x, order, out, pl.program_id(0), pl.program_id(1))

    return common.call(
        kernel,
        name=f"pack_{packing.fmt}",
        grid=(S, packing.programs),
        out_shape=jax.ShapeDtypeStruct((S, *packing.shape), jnp.int32),
        num_warps=1,
        num_stages=1,
        rows=S,
        interpret=interpret,
    )


def _round(x: Array) -> Array:
    """The nearest int32 of float32 values below 2^22: adding 1.5 · 2^23 leaves it in the low bits of the sum."""
    return lax.bitcast_convert_type(x + jnp.float32(1.5 * 2**23), jnp.int32) - 0x4B400000


@functools.cache
def _gate_up(fmt: str, S: int, k: int, K: int, F: int, clamp: float, config: Config, interpret: bool):
    planes, warps, tokens = len(formats.find(fmt).planes), config.num_warps, min(config.tokens, S)

    def kernel(x, ids, first_expert, weights, *rest):
        n_groups = 2 if tokens > 1 else 0
        groups, rest = rest[:n_groups], rest[n_groups:]
        gate, up, (*table, out) = rest[:planes], rest[planes : 2 * planes], rest[2 * planes :]
        program = Program(_dots(fmt), K, config, Emulation if interpret else Gpu, *table)
        pair, first = pl.program_id(0), pl.program_id(1) * warps * config.rows
        starts = [first + warps * i for i in range(config.rows)]

        def serve(pairs: list[Array]) -> None:
            rows = [(refs, start) for start in starts for refs in (gate, up)]
            dots = iter(program.sweep(1, lambda _: expert, rows, x, lambda _: [p // k for p in pairs]))
            for start in starts:
                for p, *both in zip(pairs, next(dots), next(dots), strict=True):
                    g, u = (part.sum(1) for part in both)
                    out[p, pl.ds(start, warps)] = swiglu(g, u, clamp) * weights[p]

        held, expert = ids[pair] >= 0, ids[pair] + first_expert[0]

        @pl.when(~held)
        def _():
            for start in starts:
                out[pair, pl.ds(start, warps)] = jnp.zeros((warps,), jnp.float32)

        # Of the pairs of one expert every tokens-th serves itself and those that follow.
        pairs = [pair]
        while len(pairs) < tokens:
            pairs.append(jnp.where(pairs[-1] < S * k, groups[1][jnp.minimum(pairs[-1], S * k - 1)], S * k))
        found = sum((p < S * k).astype(jnp.int32) for p in pairs)
        serves = held & (groups[0][pair] % tokens == 0) if tokens > 1 else held
        for n in range(1, tokens + 1):
            pl.when(serves & (found == n) if tokens > 1 else serves)(functools.partial(serve, pairs[:n]))

    return common.call(
        kernel,
        name=f"experts_gate_up_{fmt}",
        grid=(S * k, F // (warps * config.rows)),
        out_shape=jax.ShapeDtypeStruct((S * k, F), jnp.float32),
        num_warps=warps,
        num_stages=1,
        rows=S,
        interpret=interpret,
    )


@functools.cache
def _down(fmt: str, S: int, k: int, F: int, E: int, adds: bool, dtype: np.dtype, config: Config, interpret: bool):
    planes, warps = len(formats.find(fmt).planes), config.num_warps

    def kernel(act, ids, first_expert, *rest):
        plus, rest = (rest[0], rest[1:]) if adds else (None, rest)
        refs, (*table, out) = rest[:planes], rest[planes:]
        program = Program(_dots(fmt), F, config, Emulation if interpret else Gpu, *table)
        s, first = pl.program_id(0), pl.program_id(1) * warps * config.rows
        starts, zero = [first + warps * i for i in range(config.rows)], first_expert[0]

        def expert(i):
            return jnp.maximum(ids[s * k + i], 0) + zero

        def put(start: Array, total: Array) -> None:
            here = s, pl.ds(start, warps)
            out[here] = (total if plus is None else total + plus[here]).astype(dtype)

        def serve() -> None:
            totals = program.sweep(k, expert, [(refs, start) for start in starts], act, lambda i: [s * k + i])
            for start, (total,) in zip(starts, totals, strict=True):
                put(start, total.sum(1))

        if S == 1:
            return serve()
        # Of several tokens some may be none, and have no experts.
        some = functools.reduce(jnp.maximum, (ids[s * k + i] for i in range(k))) >= 0
        pl.when(some)(serve)

        @pl.when(~some)
        def _():
            for start in starts:
                put(start, jnp.zeros((warps,), jnp.float32))

    return common.call(
        kernel,
        name=f"experts_down_{fmt}",
        grid=(S, E // (warps * config.rows)),
        out_shape=jax.ShapeDtypeStruct((S, E), dtype),
        num_warps=warps,
        num_stages=1,
        rows=S,
        interpret=interpret,
    )


# ---- tiles -----------------------------------------------------------------------------------------------------------
def configs(shape: Shape) -> list[Config]:
    """Candidates for a sweep."""
    out = []
    for num_warps in (2, 4, 8):
        for rows in (1, 2, 4):
            for tokens in (1,) if shape.stage == "down" or shape.tokens == 1 else (1, 2, 4):
                out.append(Config(num_warps, rows, tokens))
    return [c for c in out if shape.n % (c.num_warps * c.rows) == 0]


def default_config(shape: Shape) -> Config:
    tokens = 2 if shape.stage == "gate_up" and shape.tokens > 1 else 1
    rows = 1 if shape.n % 8 else 2 if tokens == 1 else _dots(shape.fmt).rows
    return Config(num_warps=math.gcd(shape.n, 4), rows=rows, tokens=tokens)
