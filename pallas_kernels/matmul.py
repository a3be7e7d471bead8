"""Products of a few rows with quantized matrices: y = x Wᵀ for 1 to 96 rows of x, several W of one input in one call.

Decoding reads every weight once, so its bytes are the bound: Q8_0 has 1.06 bytes a weight, and 4 TB/s feed each of 132
multiprocessors 17 weights a cycle, with some 7 instructions to spend on each. Two methods:

* `vector` (1 or 2 rows): a program multiplies a few matrix rows with x and adds up along K, in float32. A scale is
  applied to the sum over a run of codes that share it, not to every code, and codes meet x in fused multiply-adds,
  which Triton must be told to make. A thread reads a matrix in runs of `RUN` bytes, and x in the same runs, so that no
  value changes threads before the last sum.
* `dot` (more rows): tiles of the matrix become float16 in registers and meet x in the tensor cores, float16, too. With
  few matrix rows K is split as well; a second kernel adds the parts up, always in the same order. From 33 rows on,
  where every program would spend more on x than on its weights, XLA makes x what the tensor cores take (`operand`).

What the kernel needs of a weight format is in `pallas_kernels.formats.runs`.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common, formats
from pallas_kernels.common import Unsupported
from pallas_kernels.formats.runs import RUN, Runs, columns_of
from pallas_kernels.formats.tiles import Emulation, Gpu, split, stack
from pallas_kernels.numerics.norm import inverse_rms, rms_norm
from pallas_kernels.numerics.swiglu import swiglu

Array = jax.Array
Ref = Any

DOT_RUN = 32  # columns that share a scale
TOGETHER = 2  # rows of x that a program of `vector` takes at most
MAX_ROWS = 96
IN_KERNEL = 32  # rows of x that `dot` norms and converts itself


@dataclass(frozen=True)
class Config:
    """rows of a matrix per program; k_block: columns per step; splits: parts of K, added up by a second kernel."""

    method: Literal["vector", "dot"]
    rows: int
    k_block: int
    num_warps: int
    num_stages: int = 1
    splits: int = 1


@dataclass(frozen=True)
class Output:
    """One result (M, n) in `dtype`, from one matrix (n, K); with `clamp` c from two, gate and up:
    silu(min(gate, c)) · clip(up, -c, c)."""

    n: int
    fmt: str
    dtype: str = "bfloat16"
    clamp: float | None = None

    @property
    def matrices(self) -> int:
        return 1 if self.clamp is None else 2


@dataclass(frozen=True)
class Shape:
    """One call: x (m, k), or (m, groups, k) where row block g of each matrix meets x[:, g].

    norm_eps: x is RMS-normed first, with a weight (layers, k) unless norm_weight is False.
    """

    m: int
    k: int
    outputs: tuple[Output, ...]
    x_dtype: str = "bfloat16"
    groups: int = 1
    norm_eps: float | None = None
    norm_weight: bool = False
    layers: int = 2

    def inputs(self, key: Array) -> tuple:
        """x, layer, weights, norm: arguments of `matmul`, such that outputs have about unit scale."""
        keys = iter(jax.random.split(key, 64))
        lead = (self.m, self.groups) if self.groups > 1 else (self.m,)
        x = jax.random.normal(next(keys), (*lead, self.k), jnp.float32).astype(self.x_dtype)
        weights = tuple(
            tuple(
                formats.find(out.fmt).random(next(keys), (self.layers, out.n, self.k), 1 / math.sqrt(self.k))
                for _ in range(out.matrices)
            )
            for out in self.outputs
        )
        norm = 1 + jax.random.normal(next(keys), (self.layers, self.k), jnp.float32) / 4 if self.norm_weight else None
        return x, jnp.full((1,), self.layers - 1, jnp.int32), weights, norm

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any stacks, 1 or 2 rows, or rows padded alike.

        So the product of two rows is the same bits whether each comes alone or with the other.
        """
        return replace(self, m=1 if self.m <= TOGETHER else _padded(self), layers=0)

    @property
    def static(self) -> dict:
        return {"outputs": self.outputs, "norm_eps": self.norm_eps}

    @property
    def weights(self) -> int:
        """Weights read."""
        return sum(out.n * out.matrices * self.k for out in self.outputs)

    @property
    def nbytes(self) -> int:
        x = self.m * self.groups * self.k * jnp.dtype(self.x_dtype).itemsize
        w = sum(formats.find(out.fmt).nbytes(out.n * out.matrices * self.k) for out in self.outputs)
        y = sum(self.m * out.n * jnp.dtype(out.dtype).itemsize for out in self.outputs)
        return x + w + y

    @property
    def flops(self) -> int:
        return 2 * self.m * self.weights


def _finish(values: Sequence[Array], out: Output) -> Array:
    """float32 products with an output's one or two matrices → the output."""
    if out.clamp is None:
        return values[0].astype(out.dtype)
    gate, up = values
    return swiglu(gate, up, out.clamp).astype(out.dtype)


# ---- kernel ----------------------------------------------------------------------------------------------------------
class _Tile(NamedTuple):
    """A program's share: rows of the matrices of one output, against the columns of x from `first` on."""

    matrices: Sequence[Sequence[Ref]]
    layer: Array
    row: Array  # the first
    rows: int
    first: Array
    x: Callable[[Array, Array], Array]  # token and column numbers → x
    weight: Callable[[Array], Array | None]  # column numbers → weight of the norm


def _steps(shape: Shape, config: Config, step: Callable, sums: Any) -> Any:
    """Add up `step(offset, sums)` over a split's columns."""
    n = shape.k // config.splits // config.k_block
    if n == 1:
        return step(np.int32(0), sums)
    return lax.fori_loop(0, n, lambda i, sums: step(i * config.k_block, sums), sums)


def _inputs(xs: Sequence[Array], weight: Sequence[Array | None]) -> list[Array]:
    """x of a piece's columns (C, c), times the norm's weight if there is one → float32, split in columns (C,)."""
    xs = [x.astype(jnp.float32) if w is None else x.astype(jnp.float32) * w for x, w in zip(xs, weight, strict=True)]
    return [column for x in xs for column in split(x)]


def _vector(shape: Shape, config: Config, fmt: str, tile: _Tile, token: Array, interpret: bool):
    """Sums along K, of `_together` tokens from `token` on: products (R,) per matrix and token, Σ x² per token."""
    n, tokens, fma = config.k_block, range(_together(shape)), (Emulation if interpret else Gpu).fma
    runs, run = _runs(fmt), _run_of(fmt)
    rows = [(planes, tile.row + r) for planes in tile.matrices for r in range(tile.rows)]

    def add(pieces, xs, total):
        for piece, x in zip(pieces, xs, strict=True):
            codes = [code for c in piece.codes for code in split(c)]
            y = codes[0] * x[0]
            for code, column in zip(codes[1:], x[1:], strict=True):
                y = fma(code, column, y)
            total = total + y if piece.scale is None else fma(y, piece.scale, total)
            if piece.minimum is not None:
                total -= piece.minimum * functools.reduce(operator.add, x)
        return total

    def step(offset, sums):
        totals, squares = sums
        start = tile.first + offset
        # All loads come before all arithmetic, so that many are on their way at once.
        loaded = [runs.load(planes, tile.layer, row, start, n, run, interpret) for planes, row in rows]
        columns = loaded[0].columns
        weight = [[tile.weight(c) for c in of_piece] for of_piece in columns]
        xs = [[[tile.x(token + t, c) for c in of_piece] for of_piece in columns] for t in tokens]
        plain = [tile.x(token + t, columns_of(start, n, run)).astype(jnp.float32) for t, _ in enumerate(squares)]
        squares = [s + (x * x).sum(-1) for s, x in zip(squares, plain, strict=True)]
        xs = [[_inputs(x, w) for x, w in zip(of_token, weight, strict=True)] for of_token in xs]
        pieces = [row.decode("float32") for row in loaded]
        return [
            [add(p, x, t) for x, t in zip(xs, ts, strict=True)] for p, ts in zip(pieces, totals, strict=True)
        ], squares

    zeros = jnp.zeros((n // (runs.run or run),), jnp.float32)
    squares = [jnp.zeros((n // run,), jnp.float32) for _ in tokens if shape.norm_eps is not None]
    totals, squares = _steps(shape, config, step, ([[zeros for _ in tokens] for _ in rows], squares))
    matrices = [totals[i : i + tile.rows] for i in range(0, len(rows), tile.rows)]
    products = [[stack([row[t] for row in matrix]).sum(0) for t in tokens] for matrix in matrices]
    return products, [s.sum() for s in squares]


class Operand(NamedTuple):
    """How the tensor cores take x and a format's weights: dtype, and whether in the order of one-byte codes."""

    dtype: str
    narrow: bool


def _operand_of(fmt: str) -> Operand:
    runs = _runs(fmt)
    assert runs.dot is not None  # `check` refuses it
    return Operand(runs.dot, runs.narrow)


def operand(x: Array, kind: Operand, weight: Array | None) -> Array:
    """x (…, k), times the weight of its norm if there is one, as the tensor cores take it."""
    x = x if weight is None else x.astype(jnp.float32) * weight
    return _ordered(x.astype(kind.dtype), kind)


def _ordered(a: Array, kind: Operand) -> Array:
    """Columns (…, k): for one-byte codes such that a thread has 8 neighbours, which it reads at once."""
    return a.reshape(*a.shape[:-1], -1, 4, 4, 2).swapaxes(-3, -2).reshape(a.shape) if kind.narrow else a


def _dot(shape: Shape, config: Config, fmt: str, tile: _Tile, tokens: Array, interpret: bool):
    """Tensor cores, all tokens at once (their numbers (T,)): products (R, T) per matrix, Σ x² (T,) for a norm."""
    kind, n, rows = _operand_of(fmt), config.k_block, tile.row + lax.iota(jnp.int32, tile.rows)

    def load(columns):
        x, weight = tile.x(tokens[:, None], columns.reshape(1, -1)), tile.weight(columns.reshape(1, -1))
        return x if _is_ready(shape, "dot") else operand(x, kind, weight)

    def add(piece, columns, total):
        for codes, of_codes in zip(piece.codes, columns, strict=True):
            w = codes if piece.scale is None else codes * piece.scale[..., None]
            w = w if piece.minimum is None else w - piece.minimum[..., None]
            w = _ordered(w.reshape(tile.rows, -1).astype(kind.dtype), kind)
            total += lax.dot_general(w, load(of_codes), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return total

    def step(offset, sums):
        products, squares = sums
        start, totals = tile.first + offset, []
        for planes, total in zip(tile.matrices, products, strict=True):
            loaded = _runs(fmt).load(planes, tile.layer, rows, start, n, DOT_RUN, interpret)
            for piece, columns in zip(loaded.decode(kind.dtype), loaded.columns, strict=True):
                total = add(piece, columns, total)
            totals.append(total)
        if squares is not None:
            x = tile.x(tokens[:, None], columns_of(start, n, n)).astype(jnp.float32)
            squares += (x * x).sum(-1)
        return totals, squares

    products = [jnp.zeros((tile.rows, tokens.size), jnp.float32) for _ in tile.matrices]
    squares = None if shape.norm_eps is None else jnp.zeros((tokens.size,), jnp.float32)
    return _steps(shape, config, step, (products, squares))


@functools.cache
def _build(shape: Shape, config: Config, interpret: bool) -> Callable:
    """The call for static `shape` and `config`.

    → per output (m, n), or with splits partial products (splits, matrices, m, n), float32, for `_combine`.
    """
    group_rows = [out.n // shape.groups for out in shape.outputs]
    tile_rows = [math.gcd(config.rows, n) for n in group_rows]
    programs = [out.n // rows for out, rows in zip(shape.outputs, tile_rows, strict=True)]
    padded, together = _padded(shape), _together(shape)
    kinds = _operands(shape) if _is_ready(shape, config.method) else []

    def kernel(layer, xs, weights, norm, *ys):
        program, split, block = (pl.program_id(i) for i in range(3))

        def work(nth: int, start: int):
            n_rows, fmt = tile_rows[nth], shape.outputs[nth].fmt
            first_row = (program - start) * n_rows
            group = () if shape.groups == 1 else (lax.div(first_row, np.int32(group_rows[nth])),)
            rows = first_row + lax.iota(jnp.int32, n_rows)
            x = xs[kinds.index(_operand_of(fmt)) if kinds else 0]
            tile = _Tile(
                matrices=weights[nth],
                layer=common.entry(layer, nth),
                row=first_row,
                rows=n_rows,
                first=split * (shape.k // config.splits),
                x=lambda token, columns: x[token, *group, columns],
                weight=lambda columns: None if norm is None else norm[common.entry(layer, len(weights)), columns],
            )
            if config.method == "vector":
                token = block * together
                products, squares = _vector(shape, config, fmt, tile, token, interpret)
                for t in range(together):
                    inverse = None if shape.norm_eps is None else inverse_rms(squares[t], shape.k, shape.norm_eps)
                    store(nth, [p[t] for p in products], inverse, token + t, rows, None)
            else:
                tokens = lax.iota(jnp.int32, padded)
                # Rows beyond the last repeat it; their products are not stored.
                products, squares = _dot(shape, config, fmt, tile, jnp.minimum(tokens, shape.m - 1), interpret)
                inverse = None if shape.norm_eps is None else inverse_rms(squares, shape.k, shape.norm_eps)[None]
                real = None if shape.m == padded else jnp.broadcast_to(tokens < shape.m, (n_rows, padded))
                store(nth, products, inverse, tokens[None], rows[:, None], real)

        def store(nth, values, inverse, token, rows, mask):
            out = shape.outputs[nth]
            values = values if inverse is None else [v * inverse for v in values]
            if config.splits == 1:
                return plgpu.store(ys[nth].at[token, rows], _finish(values, out), mask=mask)
            for i, v in enumerate(values):
                plgpu.store(ys[nth].at[split, i, token, rows], v, mask=mask)

        _share(program, programs, work)

    if config.splits == 1:
        out_shape = [jax.ShapeDtypeStruct((shape.m, out.n), out.dtype) for out in shape.outputs]
    else:
        out_shape = [
            jax.ShapeDtypeStruct((config.splits, out.matrices, shape.m, out.n), jnp.float32) for out in shape.outputs
        ]
    blocks = shape.m // together if config.method == "vector" else 1
    return common.call(
        kernel,
        name=f"matmul_{shape.k}_{sum(out.n for out in shape.outputs)}",  # what a profile shows
        grid=(sum(programs), config.splits, blocks),
        out_shape=out_shape,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        rows=shape.m,
        interpret=interpret,
    )


def _share(program: Array, programs: Sequence[int], work: Callable[[int, int], None]) -> None:
    """Call work(i, first) in the programs first … first + programs[i] − 1."""
    first = 0
    for i, n in enumerate(programs):
        if len(programs) == 1:
            work(i, first)
        else:
            pl.when((program >= first) & (program < first + n))(functools.partial(work, i, first))
        first += n


@functools.cache
def _combine(shape: Shape, splits: int, interpret: bool) -> Callable:
    """The second stage of products split along K: partial products, added up in order, → per output (m, n)."""
    columns = [math.gcd(256, out.n) for out in shape.outputs]
    programs = [out.n // c for out, c in zip(shape.outputs, columns, strict=True)]

    def kernel(partials, *ys):
        program, token = pl.program_id(0), pl.program_id(1)

        def work(nth: int, first: int):
            out, at = shape.outputs[nth], pl.ds((program - first) * columns[nth], columns[nth])
            parts = [[partials[nth][s, i, token, at] for s in range(splits)] for i in range(out.matrices)]
            ys[nth][token, at] = _finish([functools.reduce(operator.add, p) for p in parts], out)

        _share(program, programs, work)

    return common.call(
        kernel,
        name=f"matmul_combine_{shape.k}_{sum(out.n for out in shape.outputs)}",
        grid=(sum(programs), shape.m),
        out_shape=[jax.ShapeDtypeStruct((shape.m, out.n), out.dtype) for out in shape.outputs],
        num_warps=2,
        num_stages=1,
        rows=shape.m,
        interpret=interpret,
    )


# ---- op --------------------------------------------------------------------------------------------------------------
def matmul(
    x: Array,
    layer: Array,
    weights: Sequence[Sequence[Sequence[Array]]],
    norm: Array | None = None,
    *,
    outputs: tuple[Output, ...],
    norm_eps: float | None = None,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Products of x with matrices of one layer: an array (m, n) for each of `outputs`, summed in float32.

    x: (m, k), or (m, groups, k) where row block g of each matrix meets x[:, g]; bfloat16, float16 or float32; m ≤ 96.
    layer: int32 (1,), or one number per output and then the norm's, if there is one, where stacks count differently.
    weights: per output its one or two matrices, each the planes of a stack, (layers, n, ·).
    norm, norm_eps: with norm_eps x is RMS-normed first and multiplied by its layer of norm, float32 (layers, k).

    `dot` has x and weights in float16 (BF16: bfloat16): x, and x times the norm's weight, must lie within its ±65504.
    Raises Unsupported for anything else, and for a config that does not fit.
    """
    shape = _shape(x, layer, weights, norm, outputs, norm_eps)
    config = common.choose(config or default_config, shape)
    check(shape, config)
    weights = tuple(
        tuple((*planes, *_tables(out.fmt)) for planes in w) for out, w in zip(outputs, weights, strict=True)
    )
    xs = [x]
    if _is_ready(shape, config.method):
        weight = None if norm is None else norm[common.entry(layer, len(weights))]
        normed = x if norm_eps is None else rms_norm(x.astype(jnp.float32), norm_eps)
        xs = [operand(normed, kind, weight) for kind in _operands(shape)]
        shape, norm = replace(shape, norm_eps=None, norm_weight=False), None
    ys = _build(shape, config, interpret)(layer, xs, weights, norm)
    return tuple(ys if config.splits == 1 else _combine(shape, config.splits, interpret)(ys))


def _require(condition: bool, what: str, found: Any, expected: Any) -> None:
    if not condition:
        raise Unsupported(f"{what}: found {found}, expected {expected}")


def _shape(x, layer, weights, norm, outputs, norm_eps) -> Shape:
    """The description of a call; raises Unsupported if its arguments contradict each other."""

    _require(
        x.ndim in (2, 3) and 1 <= x.shape[0] <= MAX_ROWS, "shape of x", x.shape, f"1 to {MAX_ROWS} rows, groups, k"
    )
    _require(x.dtype in ("bfloat16", "float16", "float32"), "dtype of x", x.dtype, "bfloat16, float16 or float32")
    m, groups, k = x.shape[0], x.shape[1] if x.ndim == 3 else 1, x.shape[-1]
    _require(
        layer.dtype == jnp.int32 and layer.shape in ((1,), (len(outputs) + (norm is not None),)),
        "layer",
        layer.shape,
        "int32 (1,) or one per output and norm",
    )
    _require(len(weights) == len(outputs), "outputs", len(weights), f"{len(outputs)} entries of weights")
    for out, matrices in zip(outputs, weights, strict=True):
        fmt = formats.find(out.fmt, "matmul")
        _require(len(matrices) == out.matrices, f"matrices of {out}", len(matrices), out.matrices)
        _require(k % fmt.block == 0, "k", k, f"a multiple of {fmt.block} ({out.fmt})")
        _require(out.n % groups == 0, f"n of {out}", out.n, f"a multiple of the {groups} groups")
        expected = [(p.shape, p.dtype) for p in fmt.structs((out.n, k))]
        for planes in matrices:
            found = [(p.shape[1:], p.dtype) for p in planes]
            _require(found == expected, f"planes of {out}", found, expected)
    if norm is not None:
        _require(norm_eps is not None, "norm_eps", None, "a number, as there is a norm")
        _require(
            norm.shape[1:] == (k,) and norm.dtype == jnp.float32,
            "norm",
            f"{norm.shape} {norm.dtype}",
            f"float32 (·, {k})",
        )
    return Shape(m, k, outputs, x.dtype.name, groups, norm_eps, norm is not None)


def check(shape: Shape, config: Config) -> None:
    """Raises Unsupported if `config` does not fit `shape`."""

    for what in ("rows", "k_block"):
        n = getattr(config, what)
        _require(n > 0 and n & (n - 1) == 0, what, n, "a power of two")
    step = _k_step(shape, config.method)
    _require(config.k_block % step == 0, "k_block", config.k_block, f"a multiple of {step}")
    _require(
        shape.k % (config.splits * config.k_block) == 0,
        "splits · k_block",
        (config.splits, config.k_block),
        f"a divisor of {shape.k}",
    )
    _require(config.splits == 1 or not _norms(shape, config.method), "splits", config.splits, "1 with a norm")
    if config.method == "vector":
        return
    _require(shape.x_dtype != "float32", "dtype of x", shape.x_dtype, "bfloat16 or float16 for dot")
    for out in shape.outputs:
        _require(_runs(out.fmt).dot is not None, "format", out.fmt, "another for dot")
        rows = math.gcd(config.rows, out.n // shape.groups)
        _require(rows >= 16, f"rows of {out} in a tile", rows, "at least 16 for dot")
    shared = shared_memory(shape, config)
    _require(shared <= common.SHARED_MEMORY, "shared memory", shared, f"at most {common.SHARED_MEMORY} bytes")


def shared_memory(shape: Shape, config: Config) -> int:
    """Bytes that a block of `dot` needs: num_stages − 1 tiles of everything it reads, and x once more in 16 bits."""
    x, ready = _padded(shape) * config.k_block, _is_ready(shape, "dot")
    norm = 4 * config.k_block if shape.norm_weight and not ready else 0
    tiles = []
    for out in shape.outputs:
        rows = math.gcd(config.rows, out.n // shape.groups)
        tiles.append(formats.find(out.fmt).nbytes(out.matrices * rows * config.k_block))
    again = 0 if ready and config.num_stages > 1 else 2 * x
    return (config.num_stages - 1) * (max(tiles) + 2 * x + norm) + again


def _is_ready(shape: Shape, method: str) -> bool:
    """Whether the kernel gets x as the tensor cores take it, from `operand`."""
    return method == "dot" and shape.m > IN_KERNEL


def _norms(shape: Shape, method: str) -> bool:
    """Whether the kernel norms x, for which a program needs all its columns."""
    return shape.norm_eps is not None and not _is_ready(shape, method)


def _operands(shape: Shape) -> list[Operand]:
    return list(dict.fromkeys(_operand_of(out.fmt) for out in shape.outputs))


def _padded(shape: Shape) -> int:
    """Rows of x in a tile of `dot`."""
    return max(16, pl.next_power_of_2(shape.m))


def _k_step(shape: Shape, method: str) -> int:
    """Columns of which a step takes a multiple."""
    return max(128 if method == "vector" else 64, *(formats.find(out.fmt).block for out in shape.outputs))


def _run(shape: Shape) -> int:
    """Columns that a thread holds together, in the output that has the most."""
    return max(_runs(out.fmt).run or _run_of(out.fmt) for out in shape.outputs)


def _run_of(fmt: str) -> int:
    """Columns of a run of RUN bytes, in the last plane."""
    return RUN // jnp.dtype(formats.find(fmt).planes[-1][0]).itemsize


def _runs(fmt: str) -> Runs:
    return formats.needs(fmt, "matmul")


def _tables(fmt: str) -> list[Array]:
    """What the format looks up in memory, if anything."""
    return [jnp.array(table, jnp.uint32)] if (table := _runs(fmt).table) else []


def _together(shape: Shape) -> int:
    """Rows of x that a program of `vector` takes."""
    return max(t for t in range(1, TOGETHER + 1) if shape.m % t == 0)


def _programs(shape: Shape, rows: int) -> int:
    return sum(out.n // math.gcd(rows, out.n // shape.groups) for out in shape.outputs)


def _power_of_two(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def default_config(shape: Shape) -> Config:
    """What is used without a tuned config: some blocks for each of 132 multiprocessors, 16 KiB or so for each block.

    With few rows of x, a block of `dot` loads one step at a time; with many, its loads run ahead of its products. Which
    is faster was measured on an H200 with 16, 64 and 96 rows: benchmarks/h200-2026-11-28-rows.
    """
    columns = _power_of_two(shape.k)
    if _takes_dot(shape) and shape.m > TOGETHER:
        return _default_dot(shape, columns)
    rows = 4
    while rows > 1 and _programs(shape, rows) < 528:
        rows //= 2
    few = _programs(shape, 1) < 264
    num_warps = max(1, min(16 if few else 4, columns // (32 * _run(shape) * (1 if few else 2))))
    return Config("vector", rows, min(columns, 16384 if few else 4096), num_warps)


def _default_dot(shape: Shape, columns: int) -> Config:
    if not _is_ready(shape, "dot"):
        rows, k_block, programs, num_warps, num_stages = 64, 256, 264, 4, 1
    elif _padded(shape) <= 64:
        rows, k_block, programs, num_warps, num_stages = 64, 128, 256, 4, 3
    else:
        rows, k_block, programs, num_warps, num_stages = 128, 128, 128, 8, 3
    k_block, splits = min(columns, max(k_block, _k_step(shape, "dot"))), 1
    while (
        not _norms(shape, "dot")
        and _programs(shape, rows) * splits < programs
        and columns // splits > max(512, k_block)
    ):
        splits *= 2
    config = Config("dot", rows, k_block, num_warps, num_stages, splits)
    while config.num_stages > 1 and shared_memory(shape, config) > common.SHARED_MEMORY:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def _takes_dot(shape: Shape) -> bool:
    rows = (out.n // shape.groups for out in shape.outputs)
    dots = (_runs(out.fmt).dot for out in shape.outputs)
    return shape.x_dtype != "float32" and not any(n % 16 for n in rows) and all(dots)


def configs(shape: Shape) -> list[Config]:
    """Candidates for a sweep, the default first."""
    columns, run, out = _power_of_two(shape.k), _run(shape), [default_config(shape)]
    if shape.m <= TOGETHER or not _takes_dot(shape):
        tokens, few = _together(shape), _programs(shape, 1) < 264
        for rows, num_warps, chunks in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
            k_block, loads = 32 * run * num_warps * chunks, rows * chunks
            sensible = 4 <= loads <= 8 if num_warps < 16 else few and rows == 1
            if sensible and k_block <= columns and loads * tokens <= 16 and (few or _programs(shape, rows) >= 264):
                out.append(Config("vector", rows, k_block, num_warps))
    if shape.m >= 2 and _takes_dot(shape):
        k_blocks = [n for n in (64, 128, 256) if n % _k_step(shape, "dot") == 0]
        every_split = (1,) if _norms(shape, "dot") else (1, 2, 4, 8, 16)
        tiles = itertools.product(((64, 4), (128, 4), (128, 8)), k_blocks, every_split, (1, 2, 3, 4))
        for (rows, num_warps), k_block, splits, num_stages in tiles:
            config = Config("dot", rows, k_block, num_warps, num_stages, splits=splits)
            programs = _programs(shape, rows) * splits
            fits = k_block * splits <= columns and shared_memory(shape, config) <= common.SHARED_MEMORY
            if fits and 32 <= programs and (splits == 1 or programs <= 1056):
                out.append(config)
    return list(dict.fromkeys(out))


def _shapes() -> dict[str, Shape]:
    """The products of DeepSeek-V4-Flash with 1 to 96 tokens, in the calls of ds4jax/model."""
    latent = Output(1024, "Q8_0"), Output(512, "Q8_0", "float32")  # q_a, kv
    csa = tuple(Output(n, "F16", "float32") for n in (1024, 1024, 256, 256, 64))  # compressor, indexer's, head weights
    hca = tuple(Output(512, "F16", "float32") for _ in range(2))
    q_b, index_q = Output(32768, "Q8_0"), Output(8192, "F16", "float32")
    shared, router = Output(2048, "Q8_0", clamp=10.0), Output(256, "F16", "float32")
    norm = {"norm_eps": 1e-6, "norm_weight": True}
    out = {}
    for m in (1, 4, 16, 32, 64, 96):
        out |= {
            f"q_a+kv/{m}": Shape(m, 4096, latent),
            f"csa/{m}": Shape(m, 4096, csa),
            f"hca/{m}": Shape(m, 4096, hca),
            f"q_b/{m}": Shape(m, 1024, (q_b,), **norm),
            **({"q_b+index/1": Shape(1, 1024, (q_b, index_q), **norm)} if m == 1 else {}),
            f"index q_b/{m}": Shape(m, 1024, (index_q,), **norm),
            f"o_a/{m}": Shape(m, 4096, (Output(8192, "Q8_0"),), groups=8),
            f"o_b/{m}": Shape(m, 8192, (Output(4096, "Q8_0"),)),
            f"shared gate+up/{m}": Shape(m, 4096, (shared,)),
            f"router/{m}": Shape(m, 4096, (router,)),
            f"shared down/{m}": Shape(m, 2048, (Output(4096, "Q8_0", "float32"),)),
            f"mhc/{m}": Shape(m, 16384, (Output(24, "F16", "float32"),), "float32", norm_eps=1e-6),
            f"head/{m}": Shape(m, 4096, (Output(129280, "Q8_0", "float32"),), layers=1),
        }
    return out


SHAPES = _shapes()
