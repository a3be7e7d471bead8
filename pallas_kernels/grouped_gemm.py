"""Products of many rows with quantized matrices, for prefill: routed experts, and single matrices.

A program owns a tile: some rows of x and some of a matrix. It walks along K in steps: loads codes, makes a 16-bit
tile of them in registers, and adds a product on the tensor cores to a float32 sum. One kernel serves both uses: a tile
of rows meets one matrix of a stack, which is the expert of these rows, or the layer.

Experts: pairs (token, slot) are sorted by expert, and the kernel gathers the rows of x and scatters the results by
index, so activations are not copied. Nothing is added atomically: the same input gives the same bits.

Weights are decoded once for all rows of a tile, so tiles are tall; but experts have few rows, most of them none of a
second tile, and a product takes as long for rows that are not there. So the kernel has its loop three times, for tiles
of up to bm / 4, bm / 2 and bm rows. On an H200 that takes 16 % off `gate_up` and 31 % off `down` (4096 tokens).

Bounds, for S tokens of DeepSeek-V4-Flash's layer on an H200: 0.30 S GFLOP (1.9 ms for 4096 at 650 TFLOP/s); 6.4 G
weights to decode once for every bm rows of an expert; x once for every tile of 128 rows of weights (7.7 GB from the L2
cache, 1.4 ms; the codes are 1.9 GB). With 96 rows per expert these are close, so warps that decode and warps that
multiply should share a multiprocessor.

Decoding: a multiprocessor issues 128 lanes of instructions per clock, but at most 64 of integer logic (shifts, masks,
`prmt`), 64 of integer products and 64 of conversions. So the 2-bit formats put codes into the bits of two float16 at a
time, where one instruction each subtracts what the bits mean without a code, and multiplies by the scale. Compiled, a
weight of IQ2_XXS takes 4.7 instructions all told (1.9 of integer logic), one of Q2_K 3.7 (1.2): together 1.0 ms at the
full issue rate of 29 T/s.

What the kernel needs of a weight format is in `pallas_kernels.formats.tiles`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import common, formats
from pallas_kernels.common import SHARED_MEMORY, Unsupported, call
from pallas_kernels.formats.tiles import STEP, Emulation, Gpu, Planes, Tile, Tiles
from pallas_kernels.numerics.swiglu import swiglu

Array = jax.Array
Kind = Literal["gate_up", "down", "linear"]


@dataclass(frozen=True)
class Config:
    """Tile of bm rows of x at most and, for each warp, 16 rows of weights (of gate and up: 8 and 8).

    splits: of K, added up by XLA (linear only). fused: decode tiles in the kernel; otherwise XLA writes the whole
    matrix in bfloat16 and multiplies (linear only).
    """

    bm: int = 128
    num_warps: int = 8
    num_stages: int = 2
    splits: int = 1
    fused: bool = True

    def bn(self, matrices: int) -> int:
        """Columns of the result in a tile."""
        return 16 * self.num_warps // matrices

    @property
    def heights(self) -> list[int]:
        """Rows for which there is a loop, ascending."""
        return [bm for bm in (self.bm // 4, self.bm // 2) if bm >= 16] + [self.bm]


# ---- shapes --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """One call. m tokens; matrices (n, k) in format `fmt`, a stack of `stack` of them: experts, or layers.

    slots: experts of a token. groups: of linear. clamp: of gate_up.
    """

    kind: Kind
    m: int
    n: int
    k: int
    fmt: str
    stack: int
    slots: int = 1
    groups: int = 1
    clamp: float = 10.0

    def inputs(self, key: Array) -> tuple:
        """Arguments of `grouped_gemm`, such that x and the products have about unit scale."""
        keys = jax.random.split(key, 5)
        rows = (self.m * self.slots,) if self.kind == "down" else (self.m,)
        rows += (self.groups,) if self.groups > 1 else ()
        dtype = _tiles(self.fmt).dtype if self.kind == "down" else jnp.bfloat16
        x = jax.random.normal(keys[0], (*rows, self.k), jnp.float32).astype(dtype)
        w = [formats.find(self.fmt).random(key, (self.stack, self.n, self.k), self.k**-0.5) for key in keys[1:3]]
        if self.kind == "linear":
            return x, jnp.full((1,), self.stack - 1, jnp.int32), w[0]
        # Some experts are more popular than others, and a token takes one at most once.
        score = jax.random.normal(keys[3], (self.m, self.stack)) + jax.random.normal(keys[4], (self.stack,)) / 2
        score, ids = lax.top_k(score, self.slots)
        return (x, ids, jax.nn.softmax(score), *w) if self.kind == "gate_up" else (x, ids, w[0])

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stack, and any limit.

        A device that has half of the experts meets as many rows of each as one that has all.
        """
        return replace(self, stack=0, clamp=0.0)

    @property
    def static(self) -> dict[str, Any]:
        extra = {"clamp": self.clamp} if self.kind == "gate_up" else {}
        extra = {"groups": self.groups} if self.kind == "linear" else extra
        return {"kind": self.kind, "fmt": self.fmt, **extra}

    @property
    def matrices(self) -> int:
        return 2 if self.kind == "gate_up" else 1

    @property
    def nbytes(self) -> int:
        """Every expert's codes once, x once, the result once (down: of every pair, written, read, and added up)."""
        read = self.m * self.k * (self.slots if self.kind == "down" else self.groups)
        written = self.m * self.n * {"gate_up": self.slots, "down": 2 * self.slots + 1, "linear": 1}[self.kind]
        weights = self.matrices * self.n * self.k * (1 if self.kind == "linear" else self.stack)
        return 2 * (read + written) + formats.find(self.fmt).nbytes(weights)

    @property
    def flops(self) -> int:
        return 2 * self.m * self.slots * self.matrices * self.n * self.k


def _layer(m: int, fmts: tuple[str, str], stack: int = 256) -> dict[str, Shape]:
    return {
        f"gate_up_{fmts[0].lower()}_{m}": Shape("gate_up", m, 2048, 4096, fmts[0], stack, 6),
        f"down_{fmts[1].lower()}_{m}": Shape("down", m, 4096, 2048, fmts[1], stack, 6),
    }


def _matrix(name: str, n: int, k: int, fmt: str, groups: int = 1) -> dict[str, Shape]:
    return {f"{name}_{m}": Shape("linear", m, n, k, fmt, 2, groups=groups) for m in (64, 2048)}


# DeepSeek-V4-Flash. A quarter of the experts in Q8_0: a stack of 256 would have 2^31 bytes.
SHAPES: dict[str, Shape] = (
    _layer(128, ("IQ2_XXS", "Q2_K"))
    | _layer(512, ("IQ2_XXS", "Q2_K"))
    | _layer(2048, ("IQ2_XXS", "Q2_K"))
    | _layer(4096, ("IQ2_XXS", "Q2_K"))
    | _layer(8192, ("IQ2_XXS", "Q2_K"))
    | _layer(128, ("IQ2_3B", "Q2_K"))
    | _layer(2048, ("IQ2_3B", "Q2_K"))
    | _layer(4096, ("IQ2_3B", "Q2_K"))
    | _layer(2048, ("Q4_K", "Q4_K"))
    | _layer(2048, ("MXFP4", "MXFP4"))
    | _layer(2048, ("Q8_0", "Q8_0"), 64)
    | _matrix("q_b", 32768, 1024, "Q8_0")
    | _matrix("kv", 512, 4096, "Q8_0")
    | _matrix("output_a", 8192, 4096, "Q8_0", groups=8)
    | _matrix("output_b", 4096, 8192, "Q8_0")
    | _matrix("shared_gate", 2048, 4096, "Q8_0")
    | _matrix("shared_gate_q4_k", 2048, 4096, "Q4_K")
    | _matrix("shared_gate_mxfp4", 2048, 4096, "MXFP4")
    | _matrix("compressor", 1024, 4096, "F16")
    | _matrix("compressor_bf16", 1024, 4096, "BF16")
)


# ---- tile sizes ----------------------------------------------------------------------------------------------------
def shared_memory(config: Config) -> int:
    """Bytes of shared memory that a block needs at most: tiles of x in flight, and half the decoded tile.

    Hopper needs the former only; other GPUs hand weights from thread to thread.
    """
    return config.num_stages * config.bm * STEP * 2 + config.num_warps * 16 * STEP


def configs(shape: Shape) -> list[Config]:
    """What a sweep tries: tiles taller than most experts' rows, and splits of K where there are few tiles."""
    n, steps = shape.n // shape.groups, shape.k // STEP
    linear = shape.kind == "linear"
    rows = shape.m * shape.slots // (1 if linear else shape.stack)
    heights = [bm for bm in (32, 64, 128) if min(rows, 256) / 4 < bm <= max(32, 8 * rows)]
    splits = (1, 2, 4, 8) if linear and rows < 512 else (1,)
    out = [Config(fused=False)] if linear else []
    for bm, warps, stages, split in itertools.product(heights, (4, 8, 16), (2,) if linear else (2, 3), splits):
        c = Config(bm, warps, stages, split)
        if shared_memory(c) <= SHARED_MEMORY and n % c.bn(shape.matrices) == 0 and steps % split == 0:
            out.append(c)
    return out


def default_config(shape: Shape) -> Config:
    """By counting: rows of an expert decide bm, and a large product is worth a decoded copy of the matrix."""
    if shape.kind == "linear":
        if shape.m >= 512 or shape.n // shape.groups % 64 or shape.k % STEP:
            return Config(fused=False)
        blocks = shape.n // 64 * -(-shape.m // 64)
        fitting = [s for s in (1, 2, 4, 8) if shape.k // STEP % s == 0]
        splits = next((s for s in fitting if blocks * s >= 264), fitting[-1])
        return Config(64, 4, 2, splits)
    rows = shape.m * shape.slots / shape.stack
    if rows <= 32:
        return Config(32 if rows <= 8 else 64, 8)
    return Config(128, 16 if common.is_hopper() else 8)  # other GPUs lack the registers for 16


# ---- formats -------------------------------------------------------------------------------------------------------
def _tiles(fmt: str) -> Tiles:
    return formats.needs(fmt, "grouped_gemm")


def arrange(x: Array, fmt: str) -> Array:
    """x (..., K) with its columns in the order in which a kernel meets those of a matrix in `fmt`."""
    (dims, axes), lead = _tiles(fmt).order, x.ndim - 1
    if x.shape[-1] % math.prod(dims):
        raise Unsupported(f"columns for {fmt}: found {x.shape[-1]}, expected a multiple of {math.prod(dims)}")
    x_ = x.reshape(*x.shape[:-1], -1, *dims)
    return x_.transpose(*range(lead + 1), *(lead + 1 + a for a in axes)).reshape(x.shape)


def _operand(x: Array, fmt: str) -> Array:
    """x as the kernel takes it."""
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"x: found {x.dtype}, expected bfloat16")
    return arrange(x, fmt).astype(_tiles(fmt).dtype)


# ---- which rows meet which matrix ----------------------------------------------------------------------------------
class Routing(NamedTuple):
    """Pairs (token, slot) in order of their expert, and of their number among equals.

    order: int32 (P,), the pair at each place; pair = token · slots + slot. counts: int32 (experts,), places that each
    expert has. Pairs of experts outside [0, experts) come last and have no place in `counts`.
    """

    order: Array
    counts: Array


def route(ids: Array, n_experts: int) -> Routing:
    """ids: int32 (S, slots), the expert of every pair."""
    ids = ids.reshape(-1)
    expert = jnp.where((ids >= 0) & (ids < n_experts), ids, n_experts)
    bits = max(1, (ids.size - 1).bit_length())
    if n_experts + 1 << bits > 2**31:
        raise Unsupported(f"routing: {ids.size} pairs among {n_experts} experts, expected a product below 2^31")
    # One sort of one array: the expert in the upper bits, the pair in the lower ones.
    order = jnp.sort(expert << bits | jnp.arange(ids.size, dtype=jnp.int32)) & ((1 << bits) - 1)
    counts = (expert[:, None] == jnp.arange(n_experts, dtype=jnp.int32)).sum(0, dtype=jnp.int32)
    return Routing(order, counts)


def tile_map(counts: Array, pairs: int, bm: int, first: int = 0) -> Array:
    """Cuts each expert's rows into tiles of bm: int32 (3, tiles), of matrix, first row, and rows (0: nothing to do).

    first: the matrix of the first expert.

    The number of tiles is static, large enough for every distribution of `pairs` rows.
    """
    n_experts = counts.shape[0]
    tiles = -(-counts // bm)
    last = jnp.cumsum(tiles)
    t = jnp.arange(pairs // bm + min(n_experts, pairs), dtype=jnp.int32)
    expert = jnp.minimum((last <= t[:, None]).sum(-1, dtype=jnp.int32), n_experts - 1)
    offset = (t - (last - tiles)[expert]) * bm  # within the expert's rows
    rows = jnp.clip(counts[expert] - offset, 0, bm)
    return jnp.stack([first + expert, (jnp.cumsum(counts) - counts)[expert] + offset, rows])


# ---- the kernel ----------------------------------------------------------------------------------------------------
def _kernel(x, tiles, source, target, columns, factor, table, *refs, fmt, matrices, steps, clamp, config, interpret):
    """One tile: some rows of one matrix, or of gate and up, times rows source[...] of x, to rows target[...] of out."""
    c = config
    *planes, out = refs
    form, each = _tiles(fmt), len(planes) // matrices
    planes = [planes[i * each : (i + 1) * each] for i in range(matrices)]
    column, tile, split = (pl.program_id(i) for i in range(3))
    expert, start, rows = tiles[0, tile], tiles[1, tile], tiles[2, tile]

    def multiply(bm: int) -> None:
        # A tile that is not full repeats its last row: read again, computed again, and written again with equal bits.
        place = start + jnp.minimum(jnp.arange(bm, dtype=jnp.int32), rows - 1)
        row, row_out = source[place], target[place]
        half = 8 * c.num_warps
        n = [column * c.bn(matrices) + i * half + jnp.arange(half, dtype=jnp.int32) for i in range(3 - matrices)]
        parts = [(mine, columns[m]) for mine in planes for m in n]
        thread = jnp.arange(4, dtype=jnp.int32)
        constants = [table[i + thread][None, :] for i in range(len(form.table), len(form.memory), 4)]
        op = Emulation if interpret else Gpu
        first = split * (steps // c.splits)
        last = first + steps // c.splits - 1

        def weights(i):
            for mine, row_w in parts:
                load = functools.partial(lambda mine, r, p, k: mine[p][expert, r[:, None], k[None, :]], mine, row_w)
                yield Tile(load, table, constants, i, op)

        def load(i):
            """What has to be there a step before it is looked up."""
            return [form.load(t) if form.look_up else () for t in weights(jnp.minimum(i, last))]

        def ready(i, loaded):
            """What `decode` needs."""
            tiles = zip(weights(jnp.minimum(i, last)), loaded, strict=True)
            return [form.look_up(t, *mine) if form.look_up else form.load(t) for t, mine in tiles]

        def step(i, carry):
            total, codes, coming = carry
            x_tile = x[row[:, None], (i * STEP + jnp.arange(STEP, dtype=jnp.int32))[None, :]]
            w = [form.decode(t, *mine) for t, mine in zip(weights(i), codes, strict=True)]
            # The codes of the next steps arrive while the tensor cores work.
            codes, coming = ready(i + 1, coming), load(i + 2)
            w = jnp.stack(w, -1).reshape(c.num_warps, 8, 4, 8, 2, 2, 2).transpose(0, 6, 1, 3, 4, 2, 5)
            w = w.reshape(2 * half, STEP)
            return total + jnp.dot(w, x_tile.T, preferred_element_type=jnp.float32), codes, coming

        total = jnp.zeros((2 * half, bm), jnp.float32)
        total, *_ = lax.fori_loop(first, last + 1, step, (total, ready(first, load(first)), load(first + 1)))
        y = jnp.unstack(total.reshape(c.num_warps, 2, 8, bm).transpose(0, 2, 3, 1), axis=-1)
        if clamp is not None:
            y = [swiglu(y[0], y[1], clamp)]
        for part, m in zip(y, n, strict=True):
            part = part.reshape(half, bm)
            if clamp is not None:
                part = part * factor[place][None, :]
            out[split, row_out[:, None], m[None, :]] = part.astype(out.dtype).T

    for low, bm in itertools.pairwise([0, *c.heights]):
        pl.when((rows > low) & (rows <= bm))(functools.partial(multiply, bm))


@functools.cache
def _call(
    k: int, tiles: int, out: jax.ShapeDtypeStruct, fmt: str, matrices: int, clamp, config: Config, interpret: bool
):
    return call(
        functools.partial(
            _kernel, fmt=fmt, matrices=matrices, steps=k // STEP, clamp=clamp, config=config, interpret=interpret
        ),
        name=f"grouped_{k}_{out.shape[2]}",  # what a profile shows
        grid=(out.shape[2] // config.bn(matrices), tiles, config.splits),
        out_shape=out,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )  # fmt: skip


def _multiply(
    x: Array, tiles: Array, source: Array, target: Array, matrices: tuple[Planes, ...], fmt: str, *,
    config: Config, interpret: bool, columns: Array | None = None, factor: Array | None = None,
    clamp: float | None = None, dtype: Any = jnp.bfloat16,
) -> Array:  # fmt: skip
    """(rows, N) in `dtype`: row target[p] is row source[p] of x times a matrix, for the places p in `tiles`.

    x: in the format's dtype, its columns arranged. columns: int32 (N,), the rows of the matrix in order
    of the output's columns.
    """
    (_, n, _), k = matrices[0][0].shape, x.shape[-1]
    form = _tiles(fmt)
    if x.dtype != form.dtype:
        raise Unsupported(f"x for {fmt}: found {x.dtype}, expected {jnp.dtype(form.dtype)}")
    for planes in matrices:
        expected = formats.find(fmt).structs((planes[0].shape[0], n, k))
        if [(p.shape, p.dtype) for p in planes] != [(p.shape, p.dtype) for p in expected]:
            raise Unsupported(f"planes of {fmt} {(n, k)}: found {planes}, expected {expected}")
    bn, bk = config.bn(len(matrices)), STEP * config.splits
    if n % bn or k % bk:
        raise Unsupported(f"matrix: found {n} × {k}, expected multiples of {bn} and {bk}")
    if columns is None:
        columns = jnp.arange(n, dtype=jnp.int32)
    if factor is None:
        factor = jnp.zeros((1,), jnp.float32)
    dtype = jnp.dtype(dtype)
    out = jax.ShapeDtypeStruct((config.splits, target.shape[0], n), dtype if config.splits == 1 else jnp.float32)
    f = _call(k, tiles.shape[1], out, fmt, len(matrices), clamp, config, interpret)
    planes = [p for planes in matrices for p in planes]
    table = jnp.asarray(form.memory if form.memory.size else np.zeros(1, np.uint32))
    y = f(x, tiles, source, target, columns, factor, table, *planes)
    return y[0] if config.splits == 1 else y.sum(0).astype(dtype)


# ---- ops -----------------------------------------------------------------------------------------------------------
def gate_up(
    x: Array, weight: Array, routing: Routing, gate: Planes, up: Planes, *, fmt: str, clamp: float, config: Config,
    columns: Array | None = None, dtype: Any = jnp.bfloat16, first: int = 0, interpret: bool = False,
) -> Array:  # fmt: skip
    """weight · silu(min(x Gᵀ, clamp)) · clip(x Uᵀ, -clamp, clamp) of every pair, (P, N) in routing's order, in `dtype`.

    x: bfloat16 (S, K). weight: float32 (S, slots). gate, up: planes (matrices, N, ...), where that of the first expert
    is number `first`. columns: int32 (N,), an order of the result's columns. Rows of pairs without an expert are
    undefined.
    """
    pairs = weight.size
    return _multiply(
        _operand(x, fmt), tile_map(routing.counts, pairs, config.bm, first),
        routing.order // weight.shape[1], jnp.arange(pairs, dtype=jnp.int32), (gate, up), fmt,
        columns=columns, factor=weight.reshape(-1)[routing.order], clamp=clamp, dtype=dtype, config=config,
        interpret=interpret,
    )  # fmt: skip


def down(
    h: Array, ids: Array, routing: Routing, planes: Planes, *, fmt: str, config: Config, first: int = 0,
    interpret: bool = False,
) -> Array:  # fmt: skip
    """Σ over the slots of h Wᵀ, bfloat16 (S, N). h: (P, K) in the format's dtype and routing's order, columns arranged.

    planes, first: as for `gate_up`. The sum has a fixed order, so it repeats bit for bit.
    """
    n_experts, n = routing.counts.shape[0], planes[0].shape[1]
    places = jnp.arange(ids.size, dtype=jnp.int32)
    tiles = tile_map(routing.counts, ids.size, config.bm, first)
    y = _multiply(h, tiles, places, routing.order, (planes,), fmt, config=config, interpret=interpret)
    y = y.reshape(*ids.shape, n).astype(jnp.float32)
    return jnp.where(((ids >= 0) & (ids < n_experts))[..., None], y, 0).sum(1).astype(jnp.bfloat16)


def experts(
    x: Array, ids: Array, weight: Array, gate: Planes, up: Planes, down_: Planes, *, fmts: tuple[str, str, str],
    clamp: float, n_experts: int | None = None, first: tuple[int, int, int] = (0, 0, 0),
    config: common.Choice[Config, Shape] | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """Σ over the slots of weight · expert(x), bfloat16 (S, E).

    x: bfloat16 (S, E). ids: int32 (S, slots); an expert outside 0 … n_experts - 1 adds nothing. weight: float32
    (S, slots). fmts: of gate, up and down. n_experts, first: of the planes' matrices (by default all of them), and
    which is the first of each. Where gate and up differ in these, each has a kernel of its own, and the rest is XLA's.
    """
    n_experts, n = n_experts or gate[0].shape[0], gate[0].shape[1]
    (s, k), slots = x.shape, ids.shape[1]

    def choose(kind: Kind, n: int, k: int, fmt: str) -> Config:
        return common.choose(config or default_config, Shape(kind, s, n, k, fmt, n_experts, slots))

    routing = route(ids, n_experts)
    columns = arrange(jnp.arange(n, dtype=jnp.int32), fmts[2])  # as `down` wants them
    dtype = _tiles(fmts[2]).dtype
    if (fmts[0], first[0]) == (fmts[1], first[1]):
        h = gate_up(
            x, weight, routing, gate, up, fmt=fmts[0], clamp=clamp, columns=columns, dtype=dtype, first=first[0],
            config=choose("gate_up", n, k, fmts[0]), interpret=interpret,
        )  # fmt: skip
    else:
        places = jnp.arange(ids.size, dtype=jnp.int32)
        made = []
        for planes, fmt, at in zip((gate, up), fmts[:2], first[:2], strict=True):
            tile = choose("down", n, k, fmt)  # as for any single matrix
            tiles = tile_map(routing.counts, ids.size, tile.bm, at)
            product = _multiply(
                _operand(x, fmt), tiles, routing.order // slots, places, (planes,), fmt, columns=columns,
                dtype=jnp.float32, config=tile, interpret=interpret,
            )  # fmt: skip
            made.append(product)
        h = (swiglu(made[0], made[1], clamp) * weight.reshape(-1)[routing.order][:, None]).astype(dtype)
    return down(
        h, ids, routing, down_, fmt=fmts[2], first=first[2], config=choose("down", k, n, fmts[2]), interpret=interpret
    )


def linear(
    x: Array, layer: Array, planes: Planes, *, fmt: str, groups: int = 1, dtype: Any = None,
    config: common.Choice[Config, Shape] | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """x W[layer]ᵀ, (M, N) in `dtype`, by default x's. x: bfloat16 (M, K), or (M, groups, K) where group g meets rows
    [g · N/groups, (g + 1) · N/groups). layer: int32 (1,). planes: (layers, N, ...).
    """
    layers, n, _ = planes[0].shape
    m, k = x.shape[0], x.shape[-1]
    config = common.choose(config or default_config, Shape("linear", m, n, k, fmt, layers, groups=groups))
    if not config.fused:
        raise Unsupported(f"linear: found {config}, which leaves the product to XLA, expected fused=True")
    # Group g takes every groups-th row of x seen as (M · groups, K).
    planes = tuple(p.reshape(layers * groups, n // groups, p.shape[-1]) for p in planes)
    t = jnp.arange(-(-m // config.bm) * groups, dtype=jnp.int32)
    group, start = t % groups, t // groups * config.bm
    tiles = jnp.stack([layer[0] * groups + group, group * m + start, jnp.minimum(m - start, config.bm)])
    rows = (jnp.arange(m, dtype=jnp.int32) * groups + jnp.arange(groups, dtype=jnp.int32)[:, None]).reshape(-1)
    x = _operand(x.reshape(m * groups, k), fmt)
    dtype = dtype or jnp.bfloat16
    y = _multiply(x, tiles, rows, rows, (planes,), fmt, config=config, dtype=dtype, interpret=interpret)
    return y.reshape(m, n)


def grouped_gemm(
    *args: Any, kind: Kind, fmt: str, config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False, **static: Any,
) -> Array:  # fmt: skip
    """One op by name, with `Shape.inputs` and `Shape.static`, for tests, sweeps and benchmarks.

    gate_up: x, ids, weight, gate, up → (P, N), sorted by expert. down: h (P, K) sorted by expert, in the format's
    dtype, its columns arranged, ids, planes → (S, N). linear: x, layer, planes → (M, N).
    """
    if kind == "linear":
        return linear(*args, fmt=fmt, config=config, interpret=interpret, **static)
    x, ids, *rest = args
    n_experts, n, _ = rest[-1][0].shape
    shape = Shape(kind, ids.shape[0], n, x.shape[1], fmt, n_experts, ids.shape[1])
    config = common.choose(config or default_config, shape)
    routing, f = route(ids, n_experts), {"fmt": fmt, "config": config, "interpret": interpret}
    if kind == "down":
        return down(x, ids, routing, *rest, **f)
    return gate_up(x, rest[0], routing, *rest[1:], **f, **static)
