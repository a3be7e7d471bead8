"""Sparse MLA attention for decode and prefill: window rows and compressed rows, read straight from the FP8 cache.

All heads of a query share one list of rows, which are keys and values at once. So the heads are the M of matrix
products, and a program takes the heads of one query through tiles of rows X with an online softmax:
    S = q·Xᵀ/√D,  p = exp(S − max),  O ← O·exp(old max − max) + p·X.
In prefill that is a program per query. In decode the rows are split over programs (flash-decoding), and a second kernel
adds up their parts in a fixed order, so that results repeat bit for bit. Both end with the sink, which only adds to the
denominator, and with the inverse RoPE of the query's position.

A row is 448 E4M3 codes, a power-of-two scale per 64 of them and 64 RoPE values of float16: 583 bytes. The kernel
decodes it to float16. That is exact except for magnitudes below 2⁻¹⁴, where float16 has a spacing of 2⁻²⁴. Products are
of float16 and add up in float32; of all roundings that of p, to 11 bits, is the largest.

Decode reads 640 rows, 373 kB: not bytes but latencies bound it. Prefill is bound by the tensor cores, with 4·H·D FLOPs
per row and query: 84 MFLOP for 640 rows. On Hopper 64 heads make a warp-group product; fewer take the older one.

Source: arXiv:2307.08691 (FlashAttention-2), arXiv:2205.14135, Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common
from pallas_kernels.numerics import e4m3, rope

Array = jax.Array
Planes = dict[str, Array]  # "codes" E4M3 (..., D - 64), "exponents" uint8 (..., D / 64 - 1), "rope" (..., 64)

BLOCK = e4m3.BLOCK  # dims that share a scale; also the dims of the RoPE part
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """heads: of a query, per program. rows: per tile. splits: programs that share a query's rows."""

    heads: int = 32
    rows: int = 32
    splits: int = 1
    num_warps: int = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """batch sequences, of which each has `queries` new tokens; the first sequence has `context` before them.

    ratio: tokens per compressed row, 0 for none. chosen: entries of a query's list of rows, None to see all of them.
    window: rows of it that a query sees. Up to 8 queries are of decode or verification, and read a ring of 8 rows more;
    more are of prefill.
    """

    batch: int
    queries: int
    context: int
    ratio: int
    chosen: int | None = None
    heads: int = 64
    dim: int = 512
    window: int = 128
    layers: int = 2
    causal: bool = True

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stacks, any number of the rows there may be.

        What counts is how many that may be: `chosen`, or else the capacity. In prefill all calls are alike: a program
        has one query and all its rows.
        """
        if self.batch * self.queries > 32:
            return dataclasses.replace(self, batch=1, queries=64, context=0, ratio=0, chosen=None, layers=0)
        n = (self.context + self.queries) // self.ratio if self.ratio and not self.chosen else 0
        return dataclasses.replace(self, context=common.magnitude(n), layers=0)

    @property
    def static(self) -> dict[str, Any]:
        window = {"width": self.window, "ring": self.queries <= 8, "causal": self.causal}
        return {"ratio": self.ratio, **window, "dtype": jnp.bfloat16}

    @property
    def positions(self) -> list[int]:
        """Tokens before the queries, a little different for each sequence."""
        return [max(self.context - 37 * b, 0) for b in range(self.batch)]

    def inputs(self, key: Array) -> tuple[Any, ...]:
        keys = iter(jax.random.split(key, 16))
        B, T, H, D, W, L = self.batch, self.queries, self.heads, self.dim, self.window, self.layers

        def planes(*lead: int) -> Planes:
            codes = jnp.clip(128 * jax.random.normal(next(keys), (*lead, D - BLOCK), jnp.float32), -448, 448)
            exponents = jax.random.randint(next(keys), (*lead, D // BLOCK - 1), 127 - 9, 127 - 5)
            rope = jax.random.normal(next(keys), (*lead, BLOCK), jnp.float16)
            return {
                "codes": codes.astype(jnp.float8_e4m3fn),
                "exponents": exponents.astype(jnp.uint8),
                "rope": rope,
            }

        position = jnp.array(self.positions, jnp.int32)
        at = position[:, None] + jnp.arange(T, dtype=jnp.int32)
        angle = jax.random.uniform(next(keys), (B, T, BLOCK // 2), jnp.float32, 0, 2 * math.pi)
        q = jax.random.normal(next(keys), (B, T, H, D), jnp.float16)
        sinks = jax.random.normal(next(keys), (L, H), jnp.float32)
        window = planes(L, B, W + 8) if T <= 8 else planes(B, W + T)
        rows = indices = None
        if self.ratio:
            rows = planes(L, B, max((self.context + T) // self.ratio, 1))
        if self.chosen:
            n = (at + 1)[..., None] // self.ratio
            k = jnp.arange(self.chosen, dtype=jnp.int32)
            some = jax.random.randint(next(keys), (B, T, self.chosen), 0, 2**30, jnp.int32) % jnp.maximum(n, 1)
            indices = jnp.where(n <= self.chosen, k, some)
        layers = jnp.full((3,), L - 1, jnp.int32)
        return q, window, rows, indices, position, layers, sinks, jnp.cos(angle), jnp.sin(angle)

    @property
    def rows_read(self) -> int:
        """Rows that all queries together attend to."""
        total = 0
        for p in self.positions:
            for at in range(p, p + self.queries):
                n = (at + 1) // self.ratio if self.ratio else 0
                near = min(at + 1, self.window) if self.causal else min(p, self.window) + self.queries
                total += near + min(n, self.chosen or n)
        return total

    @property
    def nbytes(self) -> int:
        """q and the output, and each row once: per query in decode; in prefill the rows that there are."""
        row = self.dim - BLOCK + self.dim // BLOCK - 1 + 2 * BLOCK
        rows = self.rows_read
        if self.queries > 1:
            n = (self.context + self.queries) // self.ratio if self.ratio else 0
            rows = self.batch * (self.window + self.queries + n)
        return rows * row + 4 * self.batch * self.queries * self.heads * self.dim

    @property
    def flops(self) -> int:
        return 4 * self.heads * self.dim * self.rows_read


SHAPES = {
    "decode window": Shape(1, 1, 28671, 0),
    "decode csa 2k": Shape(1, 1, 2047, 4, 512),
    "decode csa 28k": Shape(1, 1, 28671, 4, 512),
    "decode csa 262k": Shape(1, 1, 262143, 4, 512),
    "decode hca 28k": Shape(1, 1, 28671, 128),
    "decode hca 262k": Shape(1, 1, 262143, 128),
    "decode window, batch 16": Shape(16, 1, 2047, 0),
    "decode csa 2k, batch 16": Shape(16, 1, 2047, 4, 512),
    "decode hca 2k, batch 16": Shape(16, 1, 2047, 128),
    "decode csa 2k, batch 32": Shape(32, 1, 2047, 4, 512),
    "verify 6, csa 2k": Shape(1, 6, 2047, 4, 512),
    "verify 6, hca 28k": Shape(1, 6, 28671, 128),
    "verify 3, csa 2k, batch 16": Shape(16, 3, 2047, 4, 512),
    "draft 5": Shape(1, 5, 2047, 0, causal=False),
    "prefill window": Shape(1, 8192, 20480, 0),
    "prefill csa 2k": Shape(1, 2048, 0, 4, 512),
    "prefill csa 28k": Shape(1, 8192, 20480, 4, 512),
    "prefill hca 28k": Shape(1, 8192, 20480, 128),
}


def configs(shape: Shape) -> list[Config]:
    """Candidates for a sweep; those that `shared_memory` puts above 99 KiB are for Hopper."""
    n = shape.batch * shape.queries
    tiles = [(16, 32, 4), (16, 64, 8), (32, 32, 8), (64, 32, 8), (64, 64, 8), (64, 64, 16)]
    if n <= 32:
        tiles += [(16, 16, 4), (16, 32, 8)]
    sweep = [
        Config(heads, rows, splits, num_warps)
        for heads, rows, num_warps in tiles
        for splits in (1, 2, 4, 8, 10, 16, 20, 32, 40)
        if heads <= shape.heads and (splits == 1 or splits * n <= 64 and splits * rows < 2 * shape.rows_read / n)
    ]
    return list(dict.fromkeys([default_config(shape), *sweep]))


def default_config(shape: Shape) -> Config:
    """Fits into 99 KiB of shared memory on every GPU."""
    n = shape.batch * shape.queries
    if n > 32:
        return Config(heads=min(32, shape.heads))
    return Config(heads=16, splits=min(-(-shape.rows_read // (32 * n)), 32 // n))


def shared_memory(config: Config, dim: int = 512) -> int:
    """Bytes that a block takes on any GPU (as compiled): q, a tile of rows and p, all float16."""
    return 2 * (config.heads * dim + config.rows * dim + config.heads * config.rows)


# ---- the kernels -----------------------------------------------------------------------------------------------------
def _load(planes: tuple, layer: Any, b: Array, row: Array, valid: Array) -> list:
    """Rows `row` (R,) of the planes' refs (L, B, N, ·), 64 dims at a time; nothing is read unless `valid`, a scalar."""
    codes, exponents, rope = planes
    dims = lax.iota(jnp.int32, BLOCK)[None]
    valids = jnp.broadcast_to(valid, (row.size, BLOCK))
    blocks = [
        (
            plgpu.load(codes.at[layer, b, row[:, None], i * BLOCK + dims], mask=valids),
            plgpu.load(exponents.at[layer, b, row, i], mask=jnp.broadcast_to(valid, row.shape)),
        )
        for i in range(exponents.shape[-1])
    ]
    return [*blocks, plgpu.load(rope.at[layer, b, row[:, None], dims], mask=valids)]


def _decode(loaded: list) -> Array:
    """What `_load` gives → (R, D) float16."""
    *blocks, rope = loaded
    x = []
    for codes, exponents in blocks:
        x.append(e4m3.decode_blocks(codes, exponents, jnp.float16))
    x.append(rope.astype(jnp.float16))
    while len(x) > 1:  # Triton has no concatenation, but a stack of two; this one moves no data between threads
        pairs = zip(x[::2], x[1::2], strict=True)
        x = [jnp.stack(pair, axis=-1).transpose(0, 2, 1).reshape(pair[0].shape[0], -1) for pair in pairs]
    return x[0]


def _finish(
    high: Array, total: Array, acc: Array, sink: Array, cos: Any, sin: Any, b: Any, t: Any, start: Any, D: int
) -> Array:
    """Normalise acc (H, d), dims start … start + d of the heads, and turn back what of it is in the RoPE part.

    high, total (H,): the highest score and the sum of 2^(score − high), with scores in units of log 2. sink (H,).
    """
    sink = sink.astype(jnp.float32) * LOG2E
    top = jnp.maximum(high, sink)
    weight = jnp.exp2(high - top)
    o = (acc * (weight / (total * weight + jnp.exp2(sink - top)))[:, None]).astype(jnp.float16)
    # Here a program's threads exchange what they hold, through shared memory; that is why o is float16 by now.
    even, odd = (x.astype(jnp.float32) for x in rope.pairs(o))
    pair = start // 2 + lax.iota(jnp.int32, even.shape[1]) - (D - BLOCK) // 2
    c = plgpu.load(cos.at[b, t, pair], mask=pair >= 0, other=1.0)
    s = plgpu.load(sin.at[b, t, pair], mask=pair >= 0, other=0.0)
    return rope.join(*rope.rotate_pairs(even, odd, c, -s))


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is fixed for a compiled kernel. N: compressed rows at most, of the stack or of a query's list."""

    B: int
    T: int
    H: int
    D: int
    W: int
    N: int
    ratio: int
    slots: int  # of the ring; 0 if the window's rows come in order
    causal: bool
    gathered: bool
    dtype: Any
    c: Config

    def shares(self, position: Array, t: Array) -> tuple[Array, Array, Array, Array]:
        """Of the query at position + t: window rows, compressed rows, tiles of both, tiles per program."""
        at = position + t
        n_w = jnp.minimum(at + 1, self.W) if self.causal else jnp.minimum(position + self.T, self.W + self.T)
        n = jnp.minimum((at + 1) // self.ratio, self.N) if self.ratio else jnp.int32(0)
        tiles = pl.cdiv(n_w, self.c.rows) + pl.cdiv(n, self.c.rows)
        return n_w, n, tiles, pl.cdiv(tiles, self.c.splits)


def _attend(st: _Static, q, position, layers, sinks, cos, sin, window, rows, indices, out) -> None:
    """Grid (B·T, H / heads, splits). out: refs of o (B, T, H, D), or of the parts that `_combine` takes."""
    c = st.c
    i, split = pl.program_id(0), pl.program_id(2)
    b, t = i // st.T, i % st.T
    heads = pl.ds(pl.program_id(1) * c.heads, c.heads)
    n_w, n, tiles, each = st.shares(position[b], t)
    lo, hi = split * each, jnp.minimum(split * each + each, tiles)
    query = q[b, t, heads, :].astype(jnp.float16)
    number = lax.iota(jnp.int32, c.rows)

    def attend(carry: tuple, planes: tuple, layer: Any, n: Array, row_of: Any, lo: Array, hi: Array) -> tuple:
        """Tiles lo … hi of a list of n rows; row_of: numbers (R,) in the list, and whether to look → rows."""

        def index(j: Array) -> Array:
            return row_of(jnp.minimum(j * c.rows + number, n - 1), j < hi)

        def load(index: Array, j: Array) -> list:
            return _load(planes, layer, b, index, j < hi)

        def tile(j: Array, carry: tuple) -> tuple:
            high, total, acc, x, following = carry
            # The next tile's rows, and the list of those after them, are under way during this tile's products.
            loaded, following = load(following, j + 1), index(j + 2)

            def softmax() -> tuple:
                s = jnp.dot(query, x.T, preferred_element_type=jnp.float32) * (LOG2E / math.sqrt(st.D))
                s = jnp.where(j * c.rows + number < n, s, -jnp.inf)
                top = jnp.maximum(high, s.max(1))
                shrink, p = jnp.exp2(high - top), jnp.exp2(s - top[:, None])
                return top, total * shrink + p.sum(1), shrink, p.astype(jnp.float16)

            # Always true. Without it Triton sees two chained products and gives every row of S to all warp groups.
            no_tile = high, total, jnp.ones_like(total), jnp.zeros((c.heads, c.rows), jnp.float16)
            high, total, shrink, p = lax.cond(j < hi, softmax, lambda: no_tile)
            acc = acc * shrink[:, None] + jnp.dot(p, x, preferred_element_type=jnp.float32)
            # Decoded rows cross the loop, not loaded ones: otherwise Triton makes a second, transposed copy of them.
            return high, total, acc, _decode(loaded), following

        first = _decode(load(index(lo), lo))
        return lax.fori_loop(lo, hi, tile, (*carry, first, index(lo + 1)))[:3]

    carry = (
        jnp.full((c.heads,), -jnp.inf, jnp.float32),
        jnp.zeros((c.heads,), jnp.float32),
        jnp.zeros((c.heads, st.D), jnp.float32),
    )
    tiles_w = pl.cdiv(n_w, c.rows)
    # The window from the newest row back.
    newest = t if st.causal else st.T - 1
    if st.slots:
        last = lax.rem(position[b] + newest, np.int32(st.slots))

        def near(k: Array, _: Array) -> Array:
            return jnp.where(k > last, last - k + st.slots, last - k)
    else:

        def near(k: Array, _: Array) -> Array:
            return st.W + newest - k

    layer = common.entry(layers, 0) if st.slots else 0
    carry = attend(carry, window, layer, n_w, near, lo, jnp.minimum(hi, tiles_w))
    if st.ratio:

        def far(k: Array, look: Array) -> Array:
            if not st.gathered:
                return k
            return plgpu.load(indices.at[b, t, k], mask=jnp.broadcast_to(look, k.shape), other=0)

        carry = attend(carry, rows, common.entry(layers, 1), n, far, jnp.maximum(lo, tiles_w) - tiles_w, hi - tiles_w)
    high, total, acc = carry
    if c.splits == 1:
        sink = sinks[common.entry(layers, 2), heads]
        out[0][b, t, heads, :] = _finish(high, total, acc, sink, cos, sin, b, t, 0, st.D).astype(st.dtype)
        return

    @pl.when(lo < hi)
    def _():
        for ref, x in zip(out, (high, total), strict=False):
            ref[i, split, heads] = x
        out[2][i, split, heads, :] = acc


def _combine(st: _Static, position, layers, sinks, cos, sin, highs, totals, accs, o) -> None:
    """Grid (B·T, H, D / 64). Parts, of which some are not used: highs, totals (B·T, S, H), accs (B·T, S, H, D)."""
    i, h, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    b, t = i // st.T, i % st.T
    _, _, tiles, each = st.shares(position[b], t)
    split = lax.iota(jnp.int32, pl.next_power_of_2(st.c.splits))
    used = split * each < tiles
    high = plgpu.load(highs.at[i, split, h], mask=used, other=-jnp.inf)
    total = plgpu.load(totals.at[i, split, h], mask=used, other=0.0)
    dims = block * BLOCK + lax.iota(jnp.int32, BLOCK)[None]
    acc = plgpu.load(
        accs.at[i, split[:, None], h, dims], mask=jnp.broadcast_to(used[:, None], (split.size, BLOCK)), other=0.0
    )
    top = high.max(0)
    weight = jnp.exp2(high - top)
    total, acc = (total * weight).sum(0), (acc * weight[:, None]).sum(0)
    sink = sinks[common.entry(layers, 2), h]
    one = _finish(top[None], total[None], acc[None], sink[None], cos, sin, b, t, block * BLOCK, st.D)
    o[b, t, h, pl.ds(block * BLOCK, BLOCK)] = one.reshape(BLOCK).astype(st.dtype)


@functools.cache
def _calls(st: _Static, interpret: bool) -> tuple:
    """The first kernel, and the second, or None."""
    c, S = st.c, st.c.splits

    def first(q, position, layers, sinks, cos, sin, *rest):
        planes, out = rest[: 6 if st.ratio else 3], rest[-1:] if S == 1 else rest[-3:]
        indices = rest[6] if st.gathered else None
        _attend(st, q, position, layers, sinks, cos, sin, planes[:3], planes[3:], indices, out)

    o = jax.ShapeDtypeStruct((st.B, st.T, st.H, st.D), st.dtype)
    part = jax.ShapeDtypeStruct((st.B * st.T, S, st.H), jnp.float32)
    call = functools.partial(common.call, num_stages=1, rows=st.B * st.T, interpret=interpret)
    attend = call(
        first,
        name="mla_attend",
        grid=(st.B * st.T, st.H // c.heads, S),
        out_shape=(o,) if S == 1 else (part, part, jax.ShapeDtypeStruct((*part.shape, st.D), jnp.float32)),
        num_warps=c.num_warps,
    )
    combine = call(
        functools.partial(_combine, st),
        name="mla_combine",
        grid=(st.B * st.T, st.H, st.D // BLOCK),
        out_shape=o,
        num_warps=1 if S <= 16 else 2,
    )
    return attend, combine if S > 1 else None


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise common.Unsupported(f"mla: {what}")


def op(
    q: Array,
    window: Planes,
    rows: Planes | None,
    indices: Array | None,
    position: Array,
    layers: Array,
    sinks: Array,
    cos: Array,
    sin: Array,
    *,
    ratio: int,
    width: int,
    ring: bool,
    causal: bool = True,
    dtype: Any = None,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> Array:
    """Attention of queries q (B, T, H, D) at positions `position` + 0 … T - 1 → (B, T, H, D), turned back by RoPE.

    window: with `ring` the stack of rings (L, B, slots, ·), position p at p mod slots, with the T rows of these tokens
        and `width` before them; otherwise (B, width + T, ·) with the row of position `position` - width + j at j.
    width: rows of the window that a query sees, its own included. causal: if not, all queries see the T rows and
        `width` before them.
    rows: compressed rows (L', B, N, ·), None if ratio 0. A query at position p sees the first (p + 1) // ratio of them,
    indices: or, if not None, of the rows that it chose, int32 (B, T, K), and K at most. Each lies within 0 … N - 1.
    position: int32 (B,). layers: int32 (3,), the index into the stacks window (unused without ring), rows and sinks; or
    (1,) if all are equal.
    sinks (L'', H). cos, sin: float32 (B, T, 32) of the queries' RoPE angles. dtype: of the output, by default q's.
    In prefill q is best float16, the kernel's own type: 64 heads of it then go from memory to the tensor cores as they
    are. Another type is cast before the kernel. Raises Unsupported.
    """
    dtype = jnp.dtype(dtype or q.dtype)
    B, T, H, D = q.shape
    blocks = D // BLOCK
    if not ring:
        window = {k: x[None] for k, x in window.items()}
    stacks = [window] if rows is None else [window, rows]
    for planes in stacks:
        found = {k: (x.shape[-1], str(x.dtype)) for k, x in planes.items()}
        expected = {"codes": (D - BLOCK, "float8_e4m3fn"), "exponents": (blocks - 1, "uint8")}
        _check(
            all(found.get(k) == v for k, v in expected.items()) and found.get("rope", (0,))[0] == BLOCK,
            f"found planes {found}, expected {expected} and {BLOCK} values of rope",
        )
    _check(D % BLOCK == 0 and blocks & (blocks - 1) == 0, f"head dim {D}, expected {BLOCK} times a power of two")
    _check((rows is None) == (ratio == 0), f"ratio {ratio} {'without' if rows is None else 'with'} compressed rows")
    _check(indices is None or ratio > 0, "indices without compressed rows")
    W, stored = width, window["codes"].shape[2]
    least = W + T if not causal else W + T - 1
    _check(stored >= least if ring else stored == W + T, f"{stored} rows of a window, of which {T} queries see {width}")
    N = 0 if rows is None else rows["codes"].shape[2] if indices is None else indices.shape[-1]
    context = max(ratio * N - T, 0) if ratio else B * W  # with which all rows are seen
    shape = Shape(B, T, context, ratio, None if indices is None else N, H, D, W)
    config = common.choose(config or default_config, shape)
    for name, least in (("heads", 16), ("rows", 16), ("num_warps", 1)):
        value = getattr(config, name)
        _check(value >= least and value & (value - 1) == 0, f"{name} {value}, expected a power of two from {least} on")
    _check(H % config.heads == 0, f"{H} heads, expected a multiple of {config.heads}")
    _check(config.splits >= 1, f"{config.splits} splits, expected at least 1")

    slots = stored if ring else 0
    st = _Static(B, T, H, D, W, N, ratio, slots, causal, indices is not None, dtype, config)
    attend, combine = _calls(st, interpret)
    common_args = position, layers, sinks, cos, sin
    flat = [planes[k] for planes in stacks for k in ("codes", "exponents", "rope")]
    parts = attend(q.astype(jnp.float16), *common_args, *flat, *([] if indices is None else [indices]))
    return parts[0] if combine is None else combine(*common_args, *parts)
