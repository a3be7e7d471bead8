"""What `grouped_gemm` needs of a format: tiles of decoded weights, made in the registers of the tensor cores' operand.

Each format has two parts: what a step loads, a step ahead of its use, and the weights (rows, 4, 32) made of it. Where
codes are looked up in a table, that is a part between, and the step loads two steps ahead. What a part passes on must
be new: Triton gives up pipelining x when a value crosses two steps untouched.

The tensor cores take a tile of weights from registers. Of 16 rows, threads 4 r to 4 r + 3 of a warp have rows r and
r + 8; of 16 columns, the first of these threads has 0, 1, 8, 9, the second 2, 3, 10, 11, and so on. But a thread
should load and decode neighbouring words. So the columns of a step are renumbered, those of x too: thread c decodes
the 32 weights w[:, c], in any order that suits it, and columns 16 g + 8 a + 2 c + b of the tile are its weights
4 g + 2 a + b. And rows r and r + 8 are of gate and of up, or of two halves of the tile. Then nothing moves between
threads, if a part of 8 rows per warp is loaded with 16 bytes, or one element, by each thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

Array = jax.Array
Planes = tuple[Array, ...]

STEP = 128  # columns of a step along K


# ---- instructions ----------------------------------------------------------------------------------------------------
def _asm(ptx: str, constraints: str, *args: Array, dtype: Any = jnp.int32) -> Array:
    shape = jnp.broadcast_shapes(*(a.shape for a in args))
    (out,) = plgpu.elementwise_inline_asm(
        ptx,
        args=[jnp.broadcast_to(a, shape) for a in args],
        constraints=constraints,
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, dtype)],
    )
    return out


def _halves(words: Array) -> list[Array]:
    """The two float16 of uint32 words, the low one first."""
    return [lax.bitcast_convert_type(w.astype(jnp.uint16), jnp.float16) for w in (words, words >> 16)]


class Gpu:
    """Instructions that Pallas has no name for. Words are uint32; arguments are broadcast."""

    @staticmethod
    def fma(a: Array, b: Array, c: Array) -> Array:
        """a · b + c in one instruction; the compiler keeps a product and a sum apart."""
        return _asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c, dtype=a.dtype)

    @staticmethod
    def bytes(low: Array, high: Array, which: Array | int) -> Array:
        """Four bytes, each chosen by a nibble 0-7 of the low half of `which` from the eight bytes of low and high."""
        if isinstance(which, int):
            out = _asm(f"prmt.b32 $0, $1, $2, {which};", "=r,r,r", low, high)
        else:
            out = _asm("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", low, high, which)
        return lax.bitcast_convert_type(out, jnp.uint32)

    @staticmethod
    def affine(codes: Array, zero: float, scale: Array, plus: Array | None = None) -> list[Array]:
        """(code - zero) · scale + plus of the two float16 in each word, the low one first, two at a time."""
        minus = int(np.float16(-zero).view(np.uint16)) * 0x10001
        ptx = f".reg .b32 v, s, p; mov.b32 v, {minus}; add.rn.f16x2 v, $1, v; mov.b32 s, {{$2, $2}}; "
        if plus is None:
            out = _asm(f"{{ {ptx} mul.rn.f16x2 $0, v, s; }}", "=r,r,h", codes, scale)
        else:
            ptx += "mov.b32 p, {$3, $3}; "
            out = _asm(f"{{ {ptx} fma.rn.f16x2 $0, v, s, p; }}", "=r,r,h,h", codes, scale, plus)
        return _halves(lax.bitcast_convert_type(out, jnp.uint32))


class Emulation:
    """The same in plain operations, for interpret mode."""

    @staticmethod
    def fma(a, b, c):
        return a * b + c

    @staticmethod
    def bytes(low, high, which):
        places = [jnp.uint32(which) >> 4 * i & 7 for i in range(4)]
        chosen = (jnp.where(n < 4, low, high) >> 8 * (n & 3) & 255 for n in places)
        return functools.reduce(jnp.bitwise_or, (byte << 8 * i for i, byte in enumerate(chosen)))

    @staticmethod
    def affine(codes, zero, scale, plus=None):
        scale, plus = scale.astype(jnp.float32), 0 if plus is None else plus.astype(jnp.float32)
        return [((h.astype(jnp.float32) - zero) * scale + plus).astype(jnp.float16) for h in _halves(codes)]


# ---- what a format sees, and what it gives ---------------------------------------------------------------------------
class Tile(NamedTuple):
    """One step of a program: rows of a matrix, and columns [step · STEP, (step + 1) · STEP) in the format's order.

    load: (plane, columns of the plane) → (rows, columns). table: a ref of the format's. constants: the format's, each
    (1, 4), once for every thread of a row. op: Gpu, or Emulation.
    """

    load: Callable[[int, Array], Array]
    table: Any
    constants: list[Array]
    step: Array
    op: Any

    def columns(self, n: int) -> Array:
        """The columns of this step in a plane that has n of them in STEP weights: int32 (n,)."""
        return self.step * n + jnp.arange(n, dtype=jnp.int32)


def u32(value: int) -> Array:
    return jnp.uint32(value)


def as_float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def split(values: Array) -> list[Array]:
    """(..., n) → n arrays (...). A thread holds whole rows, so that nothing moves."""
    parts = lax.split(values, (1,) * values.shape[-1], axis=values.ndim - 1)
    return [p.reshape(values.shape[:-1]) for p in parts]


def stack(parts: Sequence[Array]) -> Array:
    """2^n arrays (...) → (..., 2^n). Triton joins two at a time, without moving data between threads."""
    if len(parts) == 1:
        return parts[0][..., None]
    even, odd = stack(parts[0::2]), stack(parts[1::2])
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], len(parts))


def shift(words: Array, left: int) -> Array:
    return words << left if left >= 0 else words >> -left


@dataclass(frozen=True)
class Tiles:
    """load, decode: in a kernel, what a step needs, and the weights (rows, 4, 32) of four threads made of it.

    order: (dims, axes); K, reshaped to (blocks, *dims) and transposed to (blocks, *axes), has the kernel's order.
    dtype: of the weights' tile and of x: float16, where two weights are decoded at a time; its 11 bits hold more of a
    weight and all of a bfloat16 x below 65504 that is not tiny.
    look_up: between load and decode, a step ahead: what comes from a table.
    table: words that `look_up` finds in memory, all uint32. constants: words of which a thread needs several at once.
    Of those that a compiler knows, or that all threads share, it makes a new copy for every use; so each is in memory
    once for every thread of a row.
    """

    load: Callable[[Tile], Planes]
    decode: Callable[..., Array]
    order: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: Any = jnp.bfloat16
    look_up: Callable[..., Planes] | None = None
    table: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()

    @property
    def memory(self) -> np.ndarray:
        """table, then each of the constants four times: uint32."""
        return np.concatenate([np.array(self.table, np.uint32), np.repeat(np.array(self.constants, np.uint32), 4)])
