"""The k highest of N scores per row, as indices in ascending order; of equal scores the first ones.

A program holds a row of up to `block` scores in registers. Their bits, read as integers that order as the floats do,
are bisected for the k-th highest: each step counts the scores at or above a middle, and stops as soon as they are k. A
prefix sum then gives each chosen score its place in the output. Longer rows are cut into blocks that choose k each, and
the same kernel chooses among what is left; as all lists stay in ascending order, so do ties. A row may have room for
more than a query sees: blocks beyond that do nothing, and where k or fewer are left there is nothing to choose.

Bytes bound nothing here: 262,144 scores are 1 MB. The time goes to launches (1.5 µs each), to some 18 steps of the
bisection, each a reduction over the program (0.15 µs), and to the prefix sum.

Formula: ds4jax/ops/topk.py, which leaves the choice to `lax.top_k` (a full sort when k is 512).
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

Array = jax.Array

# The prefix sum counts two kinds of scores in the halves of an int32.
MAX_BLOCK = 2**15


@dataclass(frozen=True)
class Config:
    """block: scores that one program takes, a power of two."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class Shape:
    """Rows of n scores, of which each sees the first `visible` and fewer."""

    rows: int
    n: int
    visible: int
    k: int = 512

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any number of visible scores."""
        return replace(self, n=common.magnitude(self.n), visible=0)

    @property
    def static(self) -> dict[str, Any]:
        return {"k": self.k}

    def inputs(self, key: Array) -> tuple[Array, ...]:
        """Normal deviates, rounded in every other row so that many are equal; inf where no row should look.

        Rows see 0, 1, 2, … scores fewer.
        """
        score = jax.random.normal(key, (self.rows, self.n))
        row, column = (lax.broadcasted_iota(jnp.int32, score.shape, axis) for axis in (0, 1))
        score = jnp.where(row % 2 == 1, jnp.round(score * 8) / 8, score)
        visible = jnp.maximum(self.visible - jnp.arange(self.rows, dtype=jnp.int32), 0)
        return jnp.where(column < visible[:, None], score, jnp.inf), visible

    @property
    def nbytes(self) -> int:
        return 4 * self.rows * (self.visible + self.k)

    @property
    def flops(self) -> int:
        return 0


# Contexts of 4k, 28k, 256k and 1M tokens; a decoded token, several sequences, blocks of a prefill.
SHAPES = {
    "decode 4k": Shape(1, 1024, 1000),
    "decode 28k": Shape(1, 7168, 7100),
    "decode 28k of 256k": Shape(1, 65536, 7100),
    "decode 256k": Shape(1, 65536, 65536),
    "decode 1M": Shape(1, 262144, 262144),
    "decode 16 × 2k": Shape(16, 544, 512),
    "decode 32 × 28k": Shape(32, 7168, 7100),
    "few visible": Shape(4, 7168, 300),
    "prefill 1024 at 28k": Shape(1024, 7168, 7168),
    "prefill 1024 at 256k": Shape(1024, 65536, 65536),
}


def _ordered(bits: Any) -> Any:
    """Bits of a float32 → an int32 that orders as the floats do, -0 before 0. Those of positive floats do already."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


LOWEST = int(_ordered(np.float32(-np.inf).view(np.int32)))


def _kernel(*refs, k: int, passes: int, cut: int, block: int, last: bool):
    """Refs: visible (R,), score (R, n), its numbers (R, n) unless they are 0, 1, …; → numbers (R, k·blocks), and scores
    unless `last`. passes: before this one, over blocks of `cut`."""
    visible, score, *numbers, out = refs if last else refs[:-1]
    r, part = pl.program_id(0), pl.program_id(1)
    width = jnp.maximum(visible[r], 1)
    for _earlier in range(passes):
        width = pl.cdiv(width, cut) * k

    def number(column: Array, mask: Array) -> Array:
        return plgpu.load(numbers[0].at[r, column], mask=mask) if numbers else column

    @pl.when((part == 0) & (width <= k))
    def _():
        column = lax.iota(jnp.int32, pl.next_power_of_2(k))
        plgpu.store(out.at[r, column], number(column, column < k), mask=column < k)

    @pl.when((part * block < width) & (width > k))
    def _():
        column = part * block + lax.iota(jnp.int32, block)
        value = plgpu.load(score.at[r, pl.ds(part * block, block)], mask=column < width, other=-jnp.inf)
        bits = _ordered(lax.bitcast_convert_type(value, jnp.int32))

        def count(least: Array) -> Array:
            return jnp.sum((bits >= least).astype(jnp.int32))

        # The k-th highest lies in [low, high): at least k are at or above `low`, fewer at or above `high`. A block may
        # hold more than what is seen, as -inf, and the way from there to the other scores is long.
        seen = bits > LOWEST
        found = jnp.sum(seen.astype(jnp.int32))
        enough = found >= k
        low = jnp.where(enough, jnp.min(jnp.where(seen, bits, 2**31 - 1)), LOWEST)
        high = jnp.where(enough, jnp.max(bits), LOWEST) + 1

        def step(state):
            low, high, _ = state
            middle = low + lax.shift_right_logical(high - low, 1)  # as unsigned, the difference does not overflow
            found = count(middle)
            return jnp.where(found >= k, middle, low), jnp.where(found >= k, high, middle), found

        def unsettled(state):
            low, high, found = state
            return (high - low != 1) & (found != k)

        threshold, _, _ = lax.while_loop(unsettled, step, (low, high, found))  # just k seen: nothing to bisect

        above, equal = bits > threshold, bits == threshold
        wanted = k - count(threshold + 1)  # of those equal to the threshold, the first ones
        before = jnp.cumsum(above.astype(jnp.int32) + (equal.astype(jnp.int32) << 16))
        above_before = (before & 0xFFFF) - above.astype(jnp.int32)
        equal_before = lax.shift_right_logical(before, 16) - equal.astype(jnp.int32)
        chosen = above | equal & (equal_before < wanted)
        place = part * k + above_before + jnp.minimum(equal_before, wanted)
        plgpu.store(out.at[r, place], number(column, chosen), mask=chosen)
        if not last:
            plgpu.store(refs[-1].at[r, place], value, mask=chosen)


@functools.cache
def _call(rows: int, n: int, k: int, passes: int, c: Config, interpret: bool):
    """One pass, after as many, over rows of n scores."""
    block = min(c.block, pl.next_power_of_2(n))
    blocks = pl.cdiv(n, block)
    shape = rows, blocks * k
    out = [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)]
    return common.call(
        functools.partial(_kernel, k=k, passes=passes, cut=c.block, block=block, last=blocks == 1),
        name="topk",
        grid=(rows, blocks),
        out_shape=out[0] if blocks == 1 else out,
        num_warps=c.num_warps,
        num_stages=1,
        rows=rows,
        interpret=interpret,
    )


def configs(shape: Shape) -> list[Config]:
    """Candidates of a sweep."""
    blocks = [b for b in (1024, 2048, 4096, 8192, 16384) if b >= 2 * shape.k and b < 2 * shape.n]
    return [Config(b, warps) for b in blocks for warps in (4, 8, 16) if 8 <= b // (32 * warps) <= 64]


def default_config(shape: Shape) -> Config:
    if shape.n > 2**17:
        return Config(16384, 16)  # two passes for 262,144 scores, not three
    return Config(8192, 8 if shape.rows < 128 else 16)


def op(
    score: Array,
    visible: Array,
    *,
    k: int,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> Array:
    """score: float32 (R, N), no NaN → int32 (R, k), the indices of the k highest of each row, ascending.

    visible: int32 (R,), how many scores of each row count, the first ones. The same set as `lax.top_k`'s with -inf in
    place of the others: of equal scores the first, -0 below 0, -inf only if there is nothing else. Raises Unsupported.
    """
    rows, n = score.shape
    c = common.choose(config or default_config, Shape(rows, n, n, k))
    if score.dtype != jnp.float32:
        raise Unsupported(f"topk: scores are {score.dtype}, expected float32")
    if not 0 < k <= n:
        raise Unsupported(f"topk: k is {k}, expected 1 to the {n} scores of a row")
    if not 2 * k <= c.block <= MAX_BLOCK or c.block & (c.block - 1):
        raise Unsupported(f"topk: blocks of {c.block}, expected a power of two from {2 * k} (2 k) to {MAX_BLOCK}")
    lists, passes = [score], 0
    while True:
        n = lists[0].shape[1]
        out = _call(rows, n, k, passes, c, interpret)(visible, *lists)
        if n <= c.block:
            return out
        numbers, score = out
        lists, passes = [score, numbers], passes + 1
