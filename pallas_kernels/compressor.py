"""The compressors of a layer take in one new token of each sequence: a single launch, the state updated in place.

A token's z and g + ape[t mod R] are stored in slot t mod R of the open window. The token that fills the window closes
it instead, and the window becomes row t div R:

    row = Σ_slots softmax_slots(g) ⊙ z      per channel
    row = row / rms(row) · norm             then RoPE on the last 64 dims; for FP4 also a Hadamard rotation
    codes and exponents of row              E4M3 and float16, or E2M1

HCA pools the 128 tokens of its window. CSA (R = 4) overlaps: a token has two halves, and a row pools the a-halves of
the window before and the b-halves of its own; the a-halves of a closed window are kept for the next. A CSA layer has
two compressors, of rows and of the indexer's keys, and the same launch serves both.

A program takes one sequence of one compressor. What bounds it is latency: two trips to memory, as the token's slot and
its layer must be known first. A token moves 23 kB for both compressors of CSA, 88 kB if it closes a window, and 528 kB
for HCA. These pass through one multiprocessor, as the norm needs all channels and programs do not wait for each other;
to split them would take a second launch, in every step, for what one in 128 does.

Formulas: ds4jax/ops/compress.py, with one token; rows are ds4jax/numerics/rows.py's `Fp8Row` and `Fp4Row`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import common
from pallas_kernels.common import Unsupported
from pallas_kernels.numerics import e2m1, e4m3, rope, scale
from pallas_kernels.numerics.hadamard import hadamard_in_kernel
from pallas_kernels.numerics.norm import inverse_rms

Array = jax.Array

ROPE = 64  # dims that are turned, the last of a row; also what shares a scale in FP8


@dataclass(frozen=True)
class Config:
    """slots: of a window, read together."""

    slots: int
    num_warps: int


class State(NamedTuple):
    """What a compressor keeps: stacks over layers, of ds4jax/ops/compress.py's `Compressed`. D: width of a row.

    rows: planes (L, B, N, ·): E4M3 "codes" (D − 64), uint8 "exponents" (D/64 − 1), float16 "rope" (64); or, of the
        indexer's keys, uint8 "codes" (D/2) of two E2M1 each and uint8 "exponents" (D/32).
    z, g: float32 (L, B, R, D), or 2D if overlapping. Of an open window the slots of its tokens so far mean something.
    prev_z, prev_g: float32 (L, B, R, D), a-halves of the window before, with gates of -inf if there is none;
        (L, B, 0, D) if not overlapping.
    """

    rows: dict[str, Array]
    z: Array
    g: Array
    prev_z: Array
    prev_g: Array


@dataclass(frozen=True)
class Part:
    """One compressor: `dim` values per row, a row per `ratio` tokens."""

    dim: int
    ratio: int
    overlap: bool
    fp4: bool = False

    @property
    def width(self) -> int:
        """Values of a token."""
        return self.dim * (1 + self.overlap)

    @property
    def planes(self) -> dict[str, tuple[int, str]]:
        """Plane → values per row, dtype."""
        if self.fp4:
            return {"codes": (self.dim // 2, "uint8"), "exponents": (self.dim // e2m1.BLOCK, "uint8")}
        nope = self.dim - ROPE
        return {
            "codes": (nope, "float8_e4m3fn"),
            "exponents": (nope // e4m3.BLOCK, "uint8"),
            "rope": (ROPE, "float16"),
        }


CSA = Part(512, 4, overlap=True), Part(128, 4, overlap=True, fp4=True)
HCA = (Part(512, 128, overlap=False),)


@dataclass(frozen=True)
class Shape:
    """A token for each of `batch` sequences, in slot `slot` of its window (-1: the last), or, if None, in various."""

    batch: int
    parts: tuple[Part, ...]
    slot: int | None
    ape: str = "float16"
    rows: int = 64
    layers: int = 2

    in_place = 2, None  # the states

    @property
    def key(self) -> Shape:
        """Of calls that share a tuned config, see `common.Choice`: any slot, any stacks."""
        return replace(self, slot=None, rows=0, layers=0)

    @property
    def static(self) -> dict[str, Any]:
        return {"eps": 1e-6}

    @property
    def positions(self) -> np.ndarray:
        """Tokens before this one, int32 (batch)."""
        R, b = self.parts[0].ratio, np.arange(self.batch, dtype=np.int32)
        return b % self.rows * R + (b * -(-R // 32) - 1 if self.slot is None else self.slot) % R

    def inputs(self, key: Array) -> tuple[Any, ...]:
        """Windows full of random values, whichever slot is next; every second sequence has no window before."""
        keys = iter(jax.random.split(key, 64))
        L, B, N = self.layers, self.batch, self.rows

        def normal(*shape: int) -> Array:
            return jax.random.normal(next(keys), shape, jnp.float32)

        def plane(n: int, dtype: str) -> Array:
            return (4 * jnp.abs(normal(L, B, N, n))).astype(dtype)

        def state(p: Part) -> State:
            rows = {name: plane(*kind) for name, kind in p.planes.items()}
            z, g = (normal(L, B, p.ratio, p.width) for _ in range(2))
            prev_z, prev_g = (normal(L, B, p.ratio if p.overlap else 0, p.dim) for _ in range(2))
            none_before = (jnp.arange(B) % 2 == 1)[:, None, None]
            return State(rows, z, g, prev_z, jnp.where(none_before, -jnp.inf, prev_g))

        new = tuple((normal(B, p.width), normal(B, p.width)) for p in self.parts)
        weights = tuple((normal(L, p.ratio, p.width).astype(self.ape), 1 + normal(L, p.dim) / 8) for p in self.parts)
        angle = jax.random.uniform(next(keys), (B, ROPE // 2), jnp.float32, 0, 2 * math.pi)
        index = jnp.array([L - 1], jnp.int32)
        states = tuple(map(state, self.parts))
        position, active = jnp.asarray(self.positions), jnp.ones(B, jnp.int32)
        return new, weights, states, position, active, jnp.cos(angle), jnp.sin(angle), index, index

    def _count(self, each: Any, closing: Any) -> int:
        """Sum over parts and sequences: each(part) always, closing(part) for a token that fills a window."""
        total = 0
        for p in self.parts:
            closed = int((self.positions % p.ratio == p.ratio - 1).sum())
            total += self.batch * each(p) + closed * closing(p)
        return total

    @property
    def nbytes(self) -> int:
        def token(p: Part) -> int:
            return p.width * (16 + jnp.dtype(self.ape).itemsize)

        def window(p: Part) -> int:
            # Instead of storing the token: the other slots, a-halves of this window and the one before, the row.
            row = sum(n * jnp.dtype(dtype).itemsize for n, dtype in p.planes.values())
            return 8 * ((p.ratio - 2) * p.width + 2 * p.overlap * p.ratio * p.dim) + 4 * p.dim + row

        return self._count(token, window)

    @property
    def flops(self) -> int:
        """An exponential counts as one."""
        return self._count(lambda p: p.width, lambda p: 6 * p.ratio * (1 + p.overlap) * p.dim + 16 * p.dim)


SHAPES = {
    f"{kind}/{batch}{', closing' if slot else ''}": Shape(batch, parts, slot)
    for kind, parts in (("csa", CSA), ("hca", HCA))
    for batch in (1, 16, 32)
    for slot in (0, -1)
} | {"csa/32, various": Shape(32, CSA, None), "hca/32, various": Shape(32, HCA, None)}


# ---- from a pooled row to what is stored; for the kernel and for XLA -------------------------------------------------
def _scaled(even: Array, odd: Array, block: int, exponent: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """Pairs → pairs (n / block, block / 2), divided by their block's power of two, and its biased exponents."""
    even, odd = (x.reshape(-1, block // 2) for x in (even, odd))
    exponents = exponent(jnp.maximum(jnp.abs(even), jnp.abs(odd)).max(1))
    inverse = scale.inverse_power_of_two(exponents)[:, None]
    return even * inverse, odd * inverse, exponents.astype(jnp.uint8)


def _finish(row: Array, norm: Array, cos: Array, sin: Array, eps: float, fp4: bool) -> dict[str, Array]:
    """A pooled row (D/2, 2) and norm → values of its planes. cos, sin (D/2,): the last 32 count.

    FP8: codes and rope both have D values and exponents D/64, as block sizes must be powers of two: the first D − 64 of
    codes count, the last 64 of rope, and all exponents but the last.
    """
    D = row.size
    row = row * inverse_rms((row * row).sum(1).sum(0), D, eps) * norm
    even, odd = (x.reshape(-1) for x in rope.pairs(row))
    inside = lax.iota(jnp.int32, D // 2) >= (D - ROPE) // 2
    turned = rope.rotate_pairs(even, odd, cos, sin)
    even, odd = (jnp.where(inside, new, old) for new, old in zip(turned, (even, odd), strict=True))
    if fp4:
        even, odd = rope.pairs(hadamard_in_kernel(rope.join(even, odd)[None])[0])
        even, odd, exponents = _scaled(even, odd, e2m1.BLOCK, e2m1.exponent)
        codes = e2m1.encode(even, jnp.int32) | e2m1.encode(odd, jnp.int32) << 4
        return {"codes": codes.astype(jnp.uint8).reshape(-1), "exponents": exponents}
    plain = rope.join(even, odd).astype(jnp.float16)
    even, odd, exponents = _scaled(even, odd, e4m3.BLOCK, e4m3.exponent)
    codes = e4m3.encode(rope.join(even, odd)).reshape(D)
    return {"codes": codes, "exponents": exponents, "rope": plain}


# ---- the kernel ------------------------------------------------------------------------------------------------------
def _take_in(part: Part, eps: float, slots: int, b: Array, token: tuple, new: tuple, weights: tuple, old: State, out):
    """Sequence b of one compressor. old and out are refs to the same memory."""
    position, active, cos, sin, layer, nth = token
    R, D, (ape, norm) = part.ratio, part.dim, weights
    j, i, p = layer[0], nth[0], position[b]
    slot, on = lax.rem(p, R), active[b] != 0

    def arrived(slot: Any, channels: Any) -> tuple[Array, Array]:
        z, g = (x[b, channels] for x in new)
        return z, g + ape[j, slot, channels].astype(jnp.float32)

    @pl.when(on & (slot != R - 1))
    def _():
        out.z[i, b, slot], out.g[i, b, slot] = arrived(slot, pl.ds(0, part.width))

    # A thread has the same channels of all slots, so that they are pooled without any exchange; and pairs of them.
    first_half = 2 * lax.broadcasted_iota(jnp.int32, (D // 2, 2), 0) + lax.broadcasted_iota(jnp.int32, (D // 2, 2), 1)
    half = first_half + (part.width - D)

    def read(z: Any, g: Any, first: Any, n: int, channels: Array) -> list[tuple[Array, Array]]:
        return [(z[i, b, first + k, channels], g[i, b, first + k, channels]) for k in range(n)]

    def pool(pooled: tuple, tokens: list) -> tuple:
        high, total, row = pooled
        top = functools.reduce(jnp.maximum, [g for _, g in tokens], high)
        shrink = jnp.exp(high - top)
        total, row = total * shrink, row * shrink
        for z, g in tokens:
            weight = jnp.exp(g - top)
            total, row = total + weight, row + weight * z
        return top, total, row

    @pl.when(on & (slot == R - 1))
    def _():
        zeros = jnp.zeros((D // 2, 2), jnp.float32)
        pooled = zeros - jnp.inf, zeros, zeros
        if R > slots:
            pooled = lax.fori_loop(
                0, R // slots - 1, lambda k, pooled: pool(pooled, read(old.z, old.g, k * slots, slots, half)), pooled
            )
        tokens = [*read(old.z, old.g, R - slots, slots - 1, half), arrived(R - 1, half)]
        if part.overlap:
            tokens += read(old.prev_z, old.prev_g, 0, R, first_half)
            first_halves = [*read(old.z, old.g, 0, R - 1, first_half), arrived(R - 1, first_half)]
        pair = lax.iota(jnp.int32, D // 2) - (D - ROPE) // 2
        c, s = (plgpu.load(x.at[b, pair], mask=pair >= 0, other=0.0) for x in (cos, sin))
        weight = norm[j, first_half]
        _, total, row = pool(pooled, tokens)
        planes = _finish(row / total, weight, c, s, eps, part.fp4)
        for name, x in planes.items():
            plane = out.rows[name]
            (N, n), nth_row = plane.shape[2:], lax.div(p, R)
            # The last n values of rope, the first of the others; the rest lies beyond the end.
            at = (lax.iota(jnp.int32, x.size) + (n if name == "rope" else 0)) & (x.size - 1)
            plgpu.store(plane.at[i, b, nth_row, at], x, mask=(at < n) & (nth_row < N))
        if part.overlap:
            # The norm's sum, for which threads waited for each other, lies between these and the loads.
            for k, (z, g) in enumerate(first_halves):
                out.prev_z[i, b, k, first_half] = z
                out.prev_g[i, b, k, first_half] = g


@functools.cache
def _call(parts: tuple[Part, ...], shapes: Any, eps: float, c: Config, interpret: bool):
    """shapes: leaves and structure of the states."""
    leaves, tree = shapes
    B = leaves[0][0][1]

    def kernel(states, new, weights, token, *out):
        which, b = pl.program_id(0), pl.program_id(1)
        for k, part in enumerate(parts):
            slots = min(c.slots, part.ratio)
            work = functools.partial(_take_in, part, eps, slots, b, token, new[k], weights[k], states[k], out[k])
            if len(parts) == 1:
                work()
            else:
                pl.when(which == k)(work)

    return common.call(
        kernel,
        name="compressor",
        grid=(len(parts), B),
        out_shape=jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]),
        num_warps=c.num_warps,
        num_stages=1,
        aliases={k: k for k in range(len(leaves))},
        rows=B,
        interpret=interpret,
    )


def configs(shape: Shape) -> list[Config]:
    """Candidates of a sweep."""
    if shape.parts[0].ratio <= 8:
        return [Config(shape.parts[0].ratio, warps) for warps in (2, 4, 8)]
    return [Config(slots, warps) for warps in (4, 8, 16) for slots in (8, 16, 32) if slots // warps <= 4]


def default_config(shape: Shape) -> Config:
    return Config(min(32, shape.parts[0].ratio), 8)


def op(
    new: Sequence[tuple[Array, Array]],
    weights: Sequence[tuple[Array, Array]],
    states: Sequence[State],
    position: Array,
    active: Array,
    cos: Array,
    sin: Array,
    layer: Array,
    nth: Array,
    *,
    eps: float,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> tuple[State, ...]:
    """The states of a layer's compressors after one more token of each active sequence.

    new: per compressor z, g: float32 (B, c·D), the token's projections; c = 2 if overlapping, else 1.
    weights: per compressor ape, any float (L, R, c·D), and norm, float32 (L, D). states: see `State`.
    position: int32 (B,), tokens before this one. active: bool or int32 (B,); nothing changes for the others.
    cos, sin: float32 (B, 32) of the RoPE angles of position R · (position div R), the start of the open window.
    layer, nth: int32 (1,), the index into the stacks of weights, and of states.

    The results take the place of `states`, without a copy where the caller donates them and uses them no more. A token
    that closes a window leaves no trace in z and g, which then mean nothing. A row without room is not stored.
    Raises Unsupported.
    """
    parts = _parts(new, weights, states, position, active, cos, sin)
    args = position, active.astype(jnp.int32), cos, sin, layer, nth
    c = common.choose(config or default_config, Shape(position.size, parts, None, weights[0][0].dtype.name))
    for name, value in (("slots", c.slots), ("num_warps", c.num_warps)):
        _check(value > 0 and value & (value - 1) == 0, f"{name} {value}, expected a power of two")
    # What does not overlap has empty arrays, which a kernel does not take.
    full = tuple(s if p.overlap else s._replace(prev_z=None, prev_g=None) for p, s in zip(parts, states, strict=True))
    leaves, tree = jax.tree.flatten(full)
    shapes = tuple((x.shape, x.dtype) for x in leaves), tree
    out = _call(parts, shapes, eps, c, interpret)(full, tuple(map(tuple, new)), tuple(map(tuple, weights)), args)
    return tuple(
        o if p.overlap else o._replace(prev_z=s.prev_z, prev_g=s.prev_g)
        for p, s, o in zip(parts, states, out, strict=True)
    )


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise Unsupported(f"compressor: {what}")


def _parts(new, weights, states, position, active, cos, sin) -> tuple[Part, ...]:
    """The compressors of a call; raises Unsupported if its arguments contradict each other."""
    _check(len(new) == len(weights) == len(states), f"{len(new)} new, {len(weights)} weights, {len(states)} states")
    (B,), parts = position.shape, []
    any_float = ("float32", "float16", "bfloat16")
    for (z, g), (ape, norm), s in zip(new, weights, states, strict=True):
        (R, width), D, N = s.z.shape[2:], norm.shape[-1], next(iter(s.rows.values())).shape[2]
        part = Part(D, R, overlap=width == 2 * D, fp4="rope" not in s.rows)
        least = ROPE if part.fp4 else 2 * ROPE
        _check(D >= least and D & (D - 1) == 0, f"rows of {D}, expected a power of two, {least} at least")
        _check(R >= 2 and R & (R - 1) == 0, f"{R} tokens per row, expected a power of two, 2 at least")
        _check(s.rows.keys() == part.planes.keys(), f"planes {[*s.rows]}, expected {[*part.planes]}")
        width, previous = part.width, (B, R if part.overlap else 0, D)
        expected = {
            "z": (z, (B, width), "float32"),
            "g": (g, (B, width), "float32"),
            "ape": (ape, (R, width), *any_float),
            "norm": (norm, (D,), "float32"),
            "stored z": (s.z, (B, R, width), "float32"),
            "stored g": (s.g, (B, R, width), "float32"),
            "prev_z": (s.prev_z, previous, "float32"),
            "prev_g": (s.prev_g, previous, "float32"),
            "active": (active, (B,), "int32", "bool"),
            "position": (position, (B,), "int32"),
            "cos": (cos, (B, ROPE // 2), "float32"),
            "sin": (sin, (B, ROPE // 2), "float32"),
        } | {name: (s.rows[name], (B, N, n), dtype) for name, (n, dtype) in part.planes.items()}
        for name, (x, shape, *dtypes) in expected.items():
            good = x.shape[-len(shape) :] == shape and x.dtype in dtypes
            _check(good, f"{name} is {x.dtype} {x.shape}, expected {' or '.join(dtypes)} (…, {str(shape)[1:]}")
        parts.append(part)
    return tuple(parts)
