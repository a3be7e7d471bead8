"""Hyper-connections between two sub-layers, in two kernels: what one returned becomes what the next one reads.

    X'_k = post_k y + Σ_j C[j, k] X_j           the previous sub-layer's output joins the N streams
    m = fn · X' / rms(X')                       of all N·E values
    pre, post', C' = functions of m             sigmoids, Sinkhorn; post' and C' are for the next boundary
    h = rms(Σ_i pre_i X'_i) · norm              what the next sub-layer reads

`expand` makes X' by slices of E, with each slice's part of fn · X' and of ΣX'². `collapse` adds the parts up in a fixed
order and goes on from there: a program makes a token's h, and another its post' and C', whose 39 normalisations, each
waiting for the one before, take as long as all of h. For many tokens XLA makes X', and `project` the products.

Bytes: fn, 0.8 MB, and a token's streams in and out, 64 kB in bfloat16: 0.2 µs of an H200 for one token. So launches and
latency are what it costs, 2 to 4 µs a kernel. Formulas: ds4jax/ops/mhc.py.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common
from pallas_kernels.common import Unsupported
from pallas_kernels.numerics.norm import inverse_rms, rms_norm

Array = jax.Array

MANY = 64  # tokens, from which on XLA makes X'
PARTS = 32  # values that a slice leaves per token: up to 31 of fn · X', then ΣX'²


@dataclass(frozen=True)
class Config:
    """tokens, columns: what a program of `expand` takes. mixed: tokens per program that makes post and C.

    slices: if not 0, `expand` is replaced by XLA's and by `project`, whose programs take this share of N·E.
    """

    tokens: int
    columns: int
    warps: int
    collapse_warps: int
    mixed: int = 1
    slices: int = 0


@dataclass(frozen=True)
class Numbers:
    """The constants of the model: epsilons of the norms and of the hyper-connections, and normalisations of C."""

    norm_eps: float = 1e-6
    hc_eps: float = 1e-6
    iterations: int = 20


@dataclass(frozen=True)
class Shape:
    """One boundary for `tokens` tokens. first: nothing to expand yet. head: the output head follows, with pre alone."""

    tokens: int
    first: bool = False
    head: bool = False
    streams: int = 4
    dim: int = 4096
    dtype: str = "bfloat16"
    layers: int = 3

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stacks."""
        return replace(self, layers=0)

    @property
    def static(self) -> dict[str, Any]:
        return {}

    @property
    def rows(self) -> int:
        """Rows of fn."""
        return self.streams if self.head else 2 * self.streams + self.streams**2

    def inputs(self, key: Array) -> tuple:
        """Streams of different sizes around 1; fn · X'/rms is of order 1."""
        keys = iter(jax.random.split(key, 8))
        S, N, E, L, M, dtype = self.tokens, self.streams, self.dim, self.layers, self.rows, self.dtype

        def normal(*shape: int) -> Array:
            return jax.random.normal(next(keys), shape)

        X = (normal(S, N, E) * (1 + jnp.arange(N, dtype=jnp.float32))[:, None]).astype(dtype)
        C = jax.nn.softmax(normal(S, N, N), -1)
        mixed = None if self.first else (normal(S, E).astype(dtype), 1 + jnp.tanh(normal(S, N)), C)
        fn = (normal(L, M, N * E) * (N * E) ** -0.5).astype(jnp.float16)
        scale = jnp.full((L, 1 if self.head else 3), 1.5)
        return X, mixed, fn, normal(L, M), scale, 1 + 0.1 * normal(L, E), jnp.array([L - 1], jnp.int32)

    @property
    def nbytes(self) -> int:
        N, E, itemsize = self.streams, self.dim, jnp.dtype(self.dtype).itemsize
        values = N * E if self.first else 2 * N * E + E
        return 2 * self.rows * N * E + self.tokens * itemsize * (values + E)

    @property
    def flops(self) -> int:
        N, E = self.streams, self.dim
        return 2 * self.tokens * N * E * (self.rows + 2 + (0 if self.first else N + 1))


SHAPES = {
    "1": Shape(1),
    "1 first": Shape(1, first=True),
    "1 head": Shape(1, head=True, layers=1),
    "4": Shape(4),
    "16": Shape(16),
    "16 first": Shape(16, first=True),
    "16 head": Shape(16, head=True, layers=1),
    "32": Shape(32),
    "1 float32": Shape(1, dtype="float32"),
    "prefill 2048": Shape(2048, first=True),
    "prefill 8192": Shape(8192, first=True),
}


def _expand(X, *refs, mixes: bool, c: Config):
    """Refs: X (S, N, E), if `mixes` y (S, E), post (S, N), C (S, N, N); fn (L, M, N, E), layer; → X' if `mixes`, parts.

    parts: float32 (slices, S, PARTS).
    """
    inputs = 5 if mixes else 2
    (*boundary, fn, layer), (*X_new, parts) = refs[:inputs], refs[inputs:]
    S, N, _ = X.shape
    M = fn.shape[1]
    p, first = pl.program_id(0), pl.program_id(1) * c.tokens
    columns, column = pl.ds(p * c.columns, c.columns), p * c.columns + lax.iota(jnp.int32, c.columns)
    output = lax.iota(jnp.int32, PARTS)
    rows = layer[0], output[:, None]
    f = [plgpu.load(fn.at[*rows, k, column[None]], mask=(output < M)[:, None], other=0) for k in range(N)]

    def token(s, _):
        x = [X[s, k, columns].astype(jnp.float32) for k in range(N)]
        if boundary:
            y, post, C = boundary
            new = y[s, columns].astype(jnp.float32)
            mixed = [post[s, k] * new + sum(C[s, j, k] * x[j] for j in range(N)) for k in range(N)]
            x = [m.astype(X.dtype) for m in mixed]
            for k in range(N):
                X_new[0][s, k, columns] = x[k]
            x = [v.astype(jnp.float32) for v in x]
        products = sum(f[k].astype(jnp.float32) * x[k] for k in range(N))
        squares = sum(v * v for v in x)
        parts[p, s] = jnp.where(output == M, jnp.sum(squares), jnp.sum(products, axis=1))

    lax.fori_loop(first, jnp.minimum(first + c.tokens, S), token, None)


def _project(X, fn, layer, parts, *, c: Config):
    """`_expand`'s parts from X' (S, N·E), for many tokens: products in the tensor cores. fn (L, M, N·E)."""
    S, K = X.shape
    M = fn.shape[1]
    p, nth = pl.program_id(0), layer[0]
    # The last block of tokens overlaps the one before, and writes the same.
    tokens = pl.ds(jnp.minimum(pl.program_id(1) * c.tokens, S - c.tokens), c.tokens)
    output, steps = lax.iota(jnp.int32, PARTS), K // c.slices // c.columns

    def step(i, carry):
        dots, squares = carry
        start = (p * steps + i) * c.columns
        column = start + lax.iota(jnp.int32, c.columns)
        x = X[tokens, pl.ds(start, c.columns)]
        f = plgpu.load(fn.at[nth, output[:, None], column[None]], mask=(output < M)[:, None], other=0)
        f, wide = f.astype(jnp.float32), x.astype(jnp.float32)
        if X.dtype == jnp.bfloat16:
            # A float16 is the sum of two bfloat16, so that products are exact. A float32 keeps 16 bits.
            high = f.astype(jnp.bfloat16)
            for part in (high, (f - high.astype(jnp.float32)).astype(jnp.bfloat16)):
                dots += jnp.dot(x, part.T, preferred_element_type=jnp.float32)
        else:
            dots += jnp.dot(wide, f.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        return dots, squares + jnp.sum(wide * wide, axis=1)

    zeros = jnp.zeros((c.tokens, PARTS), jnp.float32), jnp.zeros(c.tokens, jnp.float32)
    dots, squares = lax.fori_loop(0, steps, step, zeros)
    parts[p, tokens] = jnp.where(output == M, squares[:, None], dots)


def _collapse(X, parts, base, scale, norm, layer, h, *mixture, numbers: Numbers, c: Config):
    """Refs: X' (S, N, E), parts; → h (S, E), and post (S, N), C (S, N, N) unless the head follows."""
    (of_base, of_scale, of_norm), (S, N, E), M = (common.entry(layer, i) for i in (1, 2, 3)), X.shape, base.shape[1]

    def mixed(dots: Array, squares: Array, which: int, index) -> Array:
        r = inverse_rms(jnp.sum(squares, axis=0), N * E, numbers.norm_eps)
        m = jnp.sum(dots, axis=0)
        return m * r.reshape(*r.shape, *(1,) * (m.ndim - r.ndim)) * scale[of_scale, which] + base[of_base, index]

    # What a program needs is loaded at its start, so that it waits once.
    def collapse(s: Array) -> None:
        dots, squares = [parts[:, s, k] for k in range(N)], parts[:, s, M]
        x, weight = [X[s, k].astype(jnp.float32) for k in range(N)], norm[of_norm]
        pre = [jax.nn.sigmoid(mixed(m, squares, 0, k)) + numbers.hc_eps for k, m in enumerate(dots)]
        u = functools.reduce(operator.add, map(operator.mul, pre, x)).astype(X.dtype).astype(jnp.float32)
        h[s] = (rms_norm(u, numbers.norm_eps) * weight).astype(h.dtype)

    def mix(first: Array) -> None:
        tokens, of_post, of_C = pl.ds(first, c.mixed), pl.ds(N, N), pl.ds(2 * N, N * N)
        dots_post, dots_C, squares = parts[:, tokens, of_post], parts[:, tokens, of_C], parts[:, tokens, M]
        post, C_out = mixture
        post[tokens] = 2 * jax.nn.sigmoid(mixed(dots_post, squares, 1, of_post))
        C = mixed(dots_C, squares, 2, of_C).reshape(c.mixed, N, N)
        C = jnp.exp(C - jnp.max(C, axis=2, keepdims=True))
        C = C / jnp.sum(C, axis=2, keepdims=True) + numbers.hc_eps

        def normalised(C: Array, axis: int) -> Array:
            return C / (jnp.sum(C, axis=axis, keepdims=True) + numbers.hc_eps)

        def rows_then_columns(_, C: Array) -> Array:
            return normalised(normalised(C, 2), 1)

        C_out[tokens] = lax.fori_loop(0, numbers.iterations - 1, rows_then_columns, normalised(C, 1))

    program = pl.program_id(0)
    if mixture:
        # The longer work first. The last block of tokens overlaps the one before, and writes the same.
        blocks = pl.cdiv(S, c.mixed)
        start = jnp.minimum(program * c.mixed, S - c.mixed)
        lax.cond(program < blocks, lambda: mix(start), lambda: collapse(program - blocks))
    else:
        collapse(program)


@functools.cache
def _products(S: int, N: int, E: int, dtype, mixes: bool, c: Config, interpret: bool):
    """The call of `_project` or `_expand`."""
    slices = c.slices or E // c.columns
    parts = jax.ShapeDtypeStruct((slices, S, PARTS), jnp.float32)
    new = [jax.ShapeDtypeStruct((S, N, E), dtype)] if mixes and not c.slices else []
    return common.call(
        functools.partial(_project, c=c) if c.slices else functools.partial(_expand, mixes=mixes, c=c),
        name="hyper_project" if c.slices else "hyper_expand",
        grid=(slices, pl.cdiv(S, c.tokens)),
        out_shape=[*new, parts],
        num_warps=c.warps,
        num_stages=3 if c.slices else 1,
        rows=S,
        interpret=interpret,
    )


@functools.cache
def _collapsed(S: int, N: int, E: int, dtype, head: bool, numbers: Numbers, c: Config, interpret: bool):
    """The call of `_collapse`."""
    mixture = [jax.ShapeDtypeStruct((S, N), jnp.float32), jax.ShapeDtypeStruct((S, N, N), jnp.float32)]
    return common.call(
        functools.partial(_collapse, numbers=numbers, c=c),
        name="hyper_collapse",
        grid=(S if head else S + pl.cdiv(S, c.mixed),),
        out_shape=[jax.ShapeDtypeStruct((S, E), dtype), *([] if head else mixture)],
        num_warps=c.collapse_warps,
        num_stages=1,
        rows=S,
        interpret=interpret,
    )


def configs(shape: Shape) -> list[Config]:
    """Candidates of a sweep."""
    if shape.tokens < MANY:
        sizes = [(t, columns) for t in (1, 2, 4) if t <= shape.tokens for columns in (32, 64, 128)]
        return [Config(t, columns, warps, collapse) for t, columns in sizes for warps in (4, 8) for collapse in (4, 8)]
    return [
        Config(t, columns, 4, collapse, 32, slices)
        for t in (64, 128)
        for columns in (64, 128)
        for slices in (4, 8, 16)
        for collapse in (4, 8)
    ]


def default_config(shape: Shape) -> Config:
    columns = min(128, shape.dim)
    if shape.tokens < MANY:
        return Config(1 if shape.tokens < 8 else 4, columns, 4, 4)
    return Config(64, min(64, shape.dim), 4, 4, 32, 4 if shape.tokens > 2048 else 8)


def op(
    X: Array,
    mixed: tuple[Array, Array, Array] | None,
    fn: Array,
    base: Array,
    scale: Array,
    norm: Array,
    layer: Array,
    *,
    numbers: Numbers = Numbers(),  # noqa: B008 (frozen)
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array | None, Array | None]:
    """X (S, N, E) → X' (S, N, E), h (S, E), post' (S, N), C' (S, N, N); post' and C' are float32.

    mixed: the previous sub-layer's output y (S, E) in X's dtype, and float32 post (S, N) and C (S, N, N) of the
    boundary before it; None where X' is X: before the first sub-layer, and from MANY tokens on, for which XLA adds the
    output in one pass.
    fn: (L, 2N + N², N·E), base: (L, 2N + N²), scale: (L, 3), norm: (L, E), of which the layer's are used; fn has any
    float dtype, the others are float32. The head has fn (L, N, N·E), base (L, N), scale (L, 1), and no post', C'.
    layer: int32 (1,), or (4,) where the stacks of fn, base, scale and norm count differently. Sums are float32, in a
    fixed order. Raises Unsupported.
    """
    S, N, E = X.shape
    L, M, K = fn.shape
    c = common.choose(config or default_config, Shape(S, mixed is None, M == N, N, E, X.dtype.name))
    if N & (N - 1) or E & (E - 1):
        raise Unsupported(f"hyper: {N} streams of {E}, expected powers of two")
    if K != N * E or M not in (N, 2 * N + N * N) or M >= PARTS:
        rows = f"{2 * N + N * N} (or {N} for the head), and fewer than {PARTS},"
        raise Unsupported(f"hyper: fn is {M} x {K}, expected {rows} rows of {N * E}")
    each, of = (K // c.slices, f"each of {c.slices} slices of {K}") if c.slices else (E, f"{E} columns")
    if each % c.columns or K % max(c.slices, 1):
        raise Unsupported(f"hyper: {of}, expected a multiple of the {c.columns} that a program takes")
    if c.slices and mixed is not None:
        raise Unsupported(f"hyper: an output to add to the streams of {S} tokens in {c.slices} slices, expected None")
    if S < (needed := max(c.mixed, c.tokens if c.slices else 1)):
        raise Unsupported(f"hyper: {S} tokens, expected at least the {needed} that a program takes")
    products = _products(S, N, E, X.dtype, mixed is not None, c, interpret)
    if c.slices:
        (parts,) = products(X.reshape(S, K), fn, layer)
    else:
        *new, parts = products(X, *(mixed or ()), fn.reshape(L, M, N, E), layer)
        X = new[0] if new else X
    h, *mixture = _collapsed(S, N, E, X.dtype, M == N, numbers, c, interpret)(X, parts, base, scale, norm, layer)
    post, C = mixture or (None, None)
    return X, h, post, C
