"""The compressors of a layer take in a few new tokens of each sequence: a single launch, the state updated in place.

The z and g + ape[t mod R] of token t are stored in rings. The token that fills a window of R tokens closes it, and the
window becomes row t div R:

    row = Σ_slots softmax_slots(g) ⊙ z      per channel
    row = row / rms(row) · norm             then RoPE on the last 64 dims; for FP4 also a Hadamard rotation
    codes and exponents of row              E4M3 and float16, or E2M1

HCA pools the 128 tokens of its window. CSA (R = 4) overlaps: a token has two halves, and a row pools the a-halves of
the window before and the b-halves of its own. A CSA layer has two compressors, of rows and of the indexer's keys, and
the same launch serves both.

Of each sequence and compressor one program stores the tokens and one makes the row of each window that they may close;
it reads new tokens as they come, not from the ring. What bounds it is latency: two trips to memory, as the tokens'
slots and their layer must be known first. A token moves 23 kB for both compressors of CSA, 65 kB more if it closes a
window, and 526 kB for HCA. These pass through one multiprocessor, as the norm needs all channels and programs do not
wait for each other; to split them would take a second launch, in every step, for what one in 128 does.

Formulas: ds4jax/ops/compress.py; rows are ds4jax/numerics/rows.py's `Fp8Row` and `Fp4Row`.
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
    z, g: float32 (L, B, slots, D), or 2D if overlapping: rings, token t in slot t mod slots.
    """

    rows: dict[str, Array]
    z: Array
    g: Array


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
    def pooled(self) -> int:
        """Tokens that a row is made of."""
        return self.ratio * (1 + self.overlap)

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
    """`tokens` for each of `batch` sequences, the first in place `slot` of its window (-1: the last), or, if None, in
    various."""

    batch: int
    parts: tuple[Part, ...]
    slot: int | None
    tokens: int = 1
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
        """Rings full of random values, whichever slot is next. The first sequence has no window before."""
        keys = iter(jax.random.split(key, 64))
        L, B, N = self.layers, self.batch, self.rows

        def normal(*shape: int) -> Array:
            return jax.random.normal(next(keys), shape, jnp.float32)

        def plane(n: int, dtype: str) -> Array:
            return (4 * jnp.abs(normal(L, B, N, n))).astype(dtype)

        def state(p: Part) -> State:
            rows = {name: plane(*kind) for name, kind in p.planes.items()}
            return State(rows, *(normal(L, B, p.pooled + 8, p.width) for _ in range(2)))

        new = tuple(tuple(normal(B * self.tokens, p.width) for _ in range(2)) for p in self.parts)
        weights = tuple((normal(L, p.ratio, p.width).astype(self.ape), 1 + normal(L, p.dim) / 8) for p in self.parts)
        windows = pl.cdiv(self.tokens, self.parts[0].ratio)
        angle = jax.random.uniform(next(keys), (B, windows, ROPE // 2), jnp.float32, 0, 2 * math.pi)
        index = jnp.array([L - 1], jnp.int32)
        states = tuple(map(state, self.parts))
        position, n = jnp.asarray(self.positions), jnp.full((B,), self.tokens, jnp.int32)
        return new, weights, states, position, n, jnp.cos(angle), jnp.sin(angle), index, index

    def closed(self, part: Part) -> int:
        """Windows that the tokens close."""
        return int(((self.positions % part.ratio + self.tokens) // part.ratio).sum())

    @property
    def nbytes(self) -> int:
        total = 0
        for p in self.parts:
            token = p.width * (16 + jnp.dtype(self.ape).itemsize)
            row = sum(n * jnp.dtype(dtype).itemsize for n, dtype in p.planes.values())
            window = 8 * (p.pooled - 1) * p.dim + 4 * p.dim + row
            total += self.batch * self.tokens * token + self.closed(p) * window
        return total

    @property
    def flops(self) -> int:
        """An exponential counts as one."""
        return sum(
            self.batch * self.tokens * p.width + self.closed(p) * (6 * p.pooled + 16) * p.dim for p in self.parts
        )  # fmt: skip


SHAPES = {
    f"{kind}/{batch}{', closing' if slot else ''}": Shape(batch, parts, slot)
    for kind, parts in (("csa", CSA), ("hca", HCA))
    for batch in (1, 16, 32)
    for slot in (0, -1)
} | {
    "csa/32, various": Shape(32, CSA, None),
    "hca/32, various": Shape(32, HCA, None),
    "csa/1, 6 tokens": Shape(1, CSA, 2, 6),
    "csa/16, 3 tokens": Shape(16, CSA, None, 3),
    "hca/1, 6 tokens": Shape(1, HCA, -3, 6),
    "hca/16, 3 tokens": Shape(16, HCA, None, 3),
}


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
def _store(part: Part, T: int, b: Array, token: tuple, new: tuple, ape: Any, out: Any) -> None:
    """Put the T tokens of sequence b into the rings of one compressor. out: refs, a State of them."""
    position, n, _, _, (j, _), nth = token
    i, p, real = nth[0], position[b], n[b]
    channels = lax.iota(jnp.int32, part.width)
    tokens = []  # all are loaded before any is stored
    for t in range(T):
        z, g = (x[b * T + t, channels] for x in new)
        tokens.append((z, g + ape[j, lax.rem(p + t, np.int32(part.ratio)), channels].astype(jnp.float32)))
    for t, values in enumerate(tokens):
        slot, stored = lax.rem(p + t, np.int32(out.z.shape[2])), jnp.broadcast_to(t < real, channels.shape)
        for ring, x in zip((out.z, out.g), values, strict=True):
            plgpu.store(ring.at[i, b, slot, channels], x, mask=stored)


def _close(
    part: Part, T: int, eps: float, slots: int, b: Array, w: Array | int, token: tuple, new: tuple, weights: tuple,
    old: Any, rows: dict[str, Any],
) -> None:  # fmt: skip
    """Make the row of window w, counted from the one that the first token goes into, if the tokens close it.

    old: refs, a State of them. rows: refs of the planes of rows.
    """
    position, n, cos, sin, (j, of_norm), nth = token
    R, D, length, (ape, norm) = part.ratio, part.dim, old.z.shape[2], weights
    i, p = nth[0], position[b]
    filled = lax.rem(p, np.int32(R))
    start = p - filled + w * R  # the position of the window's first token

    # A thread has the same channels of all tokens, so that they are pooled without any exchange; and pairs of them.
    first_half = 2 * lax.broadcasted_iota(jnp.int32, (D // 2, 2), 0) + lax.broadcasted_iota(jnp.int32, (D // 2, 2), 1)
    half = first_half + (part.width - D)

    def read(first: Array, k: Any, channels: Array, *, is_old: bool, is_new: bool) -> tuple[Array, Array]:
        """z and g of token k of the window that begins at position `first`; of which it is known that it may be old,
        so that the ring has it, or new."""
        slot = lax.rem(first + length, np.int32(length)) + k
        slot = slot if length % R == 0 else jnp.where(slot < length, slot, slot - length)
        t, found = first + k - p, []
        for ring, x in zip((old.z, old.g), new, strict=True):
            stored, here = ring.at[i, b, slot, channels], x.at[b * T + t, channels]
            if is_old and is_new:
                found.append(
                    plgpu.load(stored, mask=jnp.broadcast_to(t < 0, channels.shape), other=0.0)
                    + plgpu.load(here, mask=jnp.broadcast_to(t >= 0, channels.shape), other=0.0)
                )
            else:
                found.append(plgpu.load(stored if is_old else here))
        z, g = found
        if is_new:
            bias = ape[j, k, channels].astype(jnp.float32)
            g = g + (jnp.where(t >= 0, bias, 0.0) if is_old else bias)
        return z, g

    def pool(pooled: tuple, tokens: list) -> tuple:
        high, total, row = pooled
        top = functools.reduce(jnp.maximum, [g for _, g in tokens], high)
        shrink = jnp.exp(high - top)
        total, row = total * shrink, row * shrink
        for z, g in tokens:
            weight = jnp.exp(g - top)
            total, row = total + weight, row + weight * z
        return top, total, row

    @pl.when(filled + n[b] >= (w + 1) * R)
    def _():
        several = T > R  # windows that may close: then any but the last token may be old or new
        zeros = jnp.zeros((D // 2, 2), jnp.float32)
        pooled = zeros - jnp.inf, zeros, zeros
        at_end = min(R, pl.cdiv(T, slots) * slots)  # of these some may be new
        if R > at_end:
            pooled = lax.fori_loop(
                0,
                (R - at_end) // slots,
                lambda m, pooled: pool(
                    pooled, [read(start, m * slots + k, half, is_old=True, is_new=False) for k in range(slots)]
                ),
                pooled,
            )
        tokens = [
            read(start, k, half, is_old=k < R - 1, is_new=several or k >= R - T) for k in range(R - at_end, R)
        ]  # fmt: skip
        if part.overlap:
            before = [read(start - R, k, first_half, is_old=True, is_new=several) for k in range(R)]
            # A gate of -inf gives what there is before the first window no weight.
            tokens += [(z, jnp.where(start > 0, g, -jnp.inf)) for z, g in before]
        pair = lax.iota(jnp.int32, D // 2) - (D - ROPE) // 2
        c, s = (plgpu.load(x.at[b, w, pair], mask=pair >= 0, other=0.0) for x in (cos, sin))
        weight = norm[of_norm, first_half]
        _, total, row = pool(pooled, tokens)
        planes = _finish(row / total, weight, c, s, eps, part.fp4)
        for name, x in planes.items():
            plane = rows[name]
            (N, n_values), nth_row = plane.shape[2:], lax.div(start, np.int32(R))
            # The last n_values of rope, the first of the others; the rest lies beyond the end.
            at = (lax.iota(jnp.int32, x.size) + (n_values if name == "rope" else 0)) & (x.size - 1)
            plgpu.store(plane.at[i, b, nth_row, at], x, mask=(at < n_values) & (nth_row < N))


@functools.cache
def _call(parts: tuple[Part, ...], T: int, shapes: Any, eps: float, c: Config, interpret: bool):
    """shapes: leaves and structure of the states."""
    leaves, tree = shapes
    B, windows = leaves[0][0][1], pl.cdiv(T, parts[0].ratio)

    def kernel(states, new, weights, tokens, layer, nth, *out):
        which, b, task = (pl.program_id(axis) for axis in range(3))
        w = 0 if windows == 1 else task - 1

        def token(k: int) -> tuple:
            return *tokens, [common.entry(layer, i) for i in (2 * k, 2 * k + 1)], nth

        def store(k: int) -> None:
            _store(parts[k], T, b, token(k), new[k], weights[k][0], out[k])

        def close(k: int) -> None:
            slots = min(c.slots, parts[k].ratio)
            _close(parts[k], T, eps, slots, b, w, token(k), new[k], weights[k], states[k], out[k].rows)

        for k in range(len(parts)):
            mine = True if len(parts) == 1 else which == k
            pl.when(mine & (task == 0))(functools.partial(store, k))
            pl.when(mine & (task > 0))(functools.partial(close, k))

    return common.call(
        kernel,
        name="compressor",
        grid=(len(parts), B, 1 + windows),
        out_shape=jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]),
        num_warps=c.num_warps,
        num_stages=1,
        aliases={k: k for k in range(len(leaves))},
        rows=B * T,
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
    n: Array,
    cos: Array,
    sin: Array,
    layer: Array,
    nth: Array,
    *,
    eps: float,
    config: common.Choice[Config, Shape] | None = None,
    interpret: bool = False,
) -> tuple[State, ...]:
    """The states of a layer's compressors after the first n of T more tokens of each sequence.

    new: per compressor z, g: float32 (B·T, c·D), the tokens' projections; c = 2 if overlapping, else 1.
    weights: per compressor ape, any float (L, R, c·D), and norm, float32 (L, D). states: see `State`; their rings have
    room for T tokens more than for the c·R that a row is made of.
    position, n: int32 (B,), tokens before these, and how many of the T are real. cos, sin: float32 (B, ⌈T / R⌉, 32) of
    the RoPE angles of the positions at which windows start, from the one that the first token goes into.
    layer, nth: int32 (1,), the index into the stacks of weights, and of states; layer (2·compressors,) where the stacks
    count differently, ape before norm.

    The results take the place of `states`, without a copy where the caller donates them and uses them no more. A row
    without room is not stored. Raises Unsupported.
    """
    parts = _parts(new, weights, states, position, n, cos, sin)
    T = len(new[0][0]) // len(position)
    c = common.choose(config or default_config, Shape(len(position), parts, None, T, weights[0][0].dtype.name))
    for name, value in (("slots", c.slots), ("num_warps", c.num_warps)):
        _check(value > 0 and value & (value - 1) == 0, f"{name} {value}, expected a power of two")
    leaves, tree = jax.tree.flatten(tuple(states))
    call = _call(parts, T, (tuple((x.shape, x.dtype) for x in leaves), tree), eps, c, interpret)
    tokens = position, n, cos, sin
    return call(tuple(states), tuple(map(tuple, new)), tuple(map(tuple, weights)), tokens, layer, nth)


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise Unsupported(f"compressor: {what}")


def _parts(new, weights, states, position, n, cos, sin) -> tuple[Part, ...]:
    """The compressors of a call; raises Unsupported if its arguments contradict each other."""
    _check(len(new) == len(weights) == len(states), f"{len(new)} new, {len(weights)} weights, {len(states)} states")
    (B,), S, parts = position.shape, len(new[0][0]), []
    T = S // B
    any_float = ("float32", "float16", "bfloat16")
    for (z, g), (ape, norm), s in zip(new, weights, states, strict=True):
        (R, width), D, N = ape.shape[1:], norm.shape[-1], next(iter(s.rows.values())).shape[2]
        part, slots = Part(D, R, overlap=width == 2 * D, fp4="rope" not in s.rows), s.z.shape[2]
        least = ROPE if part.fp4 else 2 * ROPE
        _check(D >= least and D & (D - 1) == 0, f"rows of {D}, expected a power of two, {least} at least")
        _check(R >= 2 and R & (R - 1) == 0, f"{R} tokens per row, expected a power of two, 2 at least")
        _check(s.rows.keys() == part.planes.keys(), f"planes {[*s.rows]}, expected {[*part.planes]}")
        room = part.pooled + T
        _check(slots >= room, f"rings of {slots}, expected {room} at least for rows of {part.pooled} and {T} tokens")
        width, angles = part.width, (B, pl.cdiv(T, R), ROPE // 2)
        expected = {
            "z": (z, (B * T, width), "float32"),
            "g": (g, (B * T, width), "float32"),
            "ape": (ape, (R, width), *any_float),
            "norm": (norm, (D,), "float32"),
            "stored z": (s.z, (B, slots, width), "float32"),
            "stored g": (s.g, (B, slots, width), "float32"),
            "n": (n, (B,), "int32"),
            "position": (position, (B,), "int32"),
            "cos": (cos, angles, "float32"),
            "sin": (sin, angles, "float32"),
        } | {name: (s.rows[name], (B, N, n), dtype) for name, (n, dtype) in part.planes.items()}
        for name, (x, shape, *dtypes) in expected.items():
            good = x.shape[-len(shape) :] == shape and x.dtype in dtypes
            _check(good, f"{name} is {x.dtype} {x.shape}, expected {' or '.join(dtypes)} (…, {str(shape)[1:]}")
        parts.append(part)
    return tuple(parts)
