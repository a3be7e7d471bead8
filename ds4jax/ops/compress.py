"""Compressors: pool every window of R tokens into one row, by a softmax over the tokens, per channel.

    z = W_kv h,  g = W_gate h + ape[t mod R]
    row_i = rope(rms(Σ_t softmax_t(g) ⊙ z) · norm),  at position i·R

R = 128 (HCA): the 128 tokens of the window. R = 4 (CSA) overlaps: z and g have two halves, a and b; row i pools the
a-halves of window i - 1 and the b-halves of window i. The indexer has a compressor of its own, of the same kind.
DeepSeek-V4 report: section 2.3.1, eqs. 9 to 12 (CSA); section 2.3.2, eqs. 20 to 23 (HCA).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int32

from ds4jax.config import CSA_RATIO
from ds4jax.implementation import Implementation
from ds4jax.numerics import rows as num
from ds4jax.numerics.precision import lookup
from ds4jax.ops import rope, tuned
from ds4jax.ops.norm import Norm
from ds4jax.ops.weight import Weight, same_layer
from pallas_kernels import compressor as kernel


@struct.dataclass
class Compressed:
    """What one kind of compressor keeps, for all layers that have one.

    rows: planes (L, B, rows, ·), row i made from tokens i·R … i·R + R − 1 (and, overlapping, the R before them).
    z, g: values and gates of the open window's tokens; token t lies at t mod R. float32 at least.
    prev_z, prev_g: the a-halves of the last closed window (R = 0 unless overlapping).
    """

    rows: num.Rows
    z: Float[Array, "L B R c*D"]
    g: Float[Array, "L B R c*D"]
    prev_z: Float[Array, "L B R D"]
    prev_g: Float[Array, "L B R D"]


class Compressor(NamedTuple):
    """One compressor of a layer, and what it is fed.

    z, g: its projections of the new tokens, before the gates' bias. ape: that bias, a matrix (R, c·D). norm: of its
    rows. row: how these are stored. is_index: whether they are index keys, which pass the Hadamard matrix.
    """

    z: Float[Array, "S c*D"]
    g: Float[Array, "S c*D"]
    ape: Weight
    norm: Norm
    row: num.RowFormat
    is_index: bool = False


def compress(
    compressors: Sequence[Compressor],
    states: Sequence[Compressed],
    length: Int32[Array, "B"],
    n: Int32[Array, "B"],
    angles: rope.Angles,
    nth: int | Array,
    *,
    ratio: int,
    freq: np.ndarray | None,
    numerics: num.Numerics,
    implementation: Implementation = "xla",
) -> list[Compressed]:
    """Take T new tokens into the compressors of a layer: store the rows of windows that close, keep the open window.

    length, n: tokens before these, and how many of the T are real. nth: the layer among those of its ratio,
    in every state. freq: see `rope.frequencies`. The kernel takes one token of each sequence, `official` rows and a
    bias in F32, F16 or BF16; for T > 1 the formula is computed in XLA. Raises Unsupported.
    """
    B, T, _ = angles.cos.shape
    if implementation == "xla" or T > 1:
        return [
            _formula(c, kept, length, n, angles, nth, ratio, freq, numerics)
            for c, kept in zip(compressors, states, strict=True)
        ]
    layer = same_layer(*(w for c in compressors for w in (c.ape, c.norm.weight)))
    moved = kernel.op(
        [(c.z, c.g) for c in compressors], [(c.ape.values, c.norm.weight.stack) for c in compressors],
        [kernel.State(s.rows, s.z, s.g, s.prev_z, s.prev_g) for s in states], length, n, angles.row_cos,
        angles.row_sin, jnp.array([layer], jnp.int32), jnp.array([nth], jnp.int32), eps=compressors[0].norm.eps,
        config=tuned.tiles(kernel), interpret=implementation == "pallas_interpret",
    )  # fmt: skip
    return [dataclasses.replace(s, **m._asdict()) for s, m in zip(states, moved, strict=True)]


def pool(z: Float[Array, "*s slots D"], g: Float[Array, "*s slots D"]) -> Float[Array, "*s D"]:
    """Σ over slots of softmax(g) ⊙ z."""
    return jnp.sum(z * jax.nn.softmax(g, axis=-2), axis=-2)


def _formula(
    c: Compressor, kept: Compressed, length: Array, n: Array, angles: rope.Angles, nth: int | Array, ratio: int,
    freq: np.ndarray | None, numerics: num.Numerics,
) -> Compressed:  # fmt: skip
    B, R, dtype, D = length.shape[0], ratio, kept.z.dtype, c.row.dim
    z, g = new = values(c, length, ratio, dtype)
    T = z.shape[1]

    # Lay the open window and the new tokens out from the window's start: slot j is the token at position first·R + j.
    first, filled = lax.div(length, np.int32(R)), lax.rem(length, np.int32(R))
    windows = -(-T // R)  # at most this many can close

    def lay_out(state: Array, new: Array) -> Array:
        slots = jnp.pad(state[nth], ((0, 0), (0, windows * R), (0, 0)))
        return jax.vmap(lambda s, x, at: lax.dynamic_update_slice_in_dim(s, x, at, axis=0))(slots, new, filled)

    z, g = lay_out(kept.z, z), lay_out(kept.g, g)
    closed = lax.div(filled + n, np.int32(R))  # windows that these tokens close, per sequence

    def split(x: Array) -> Array:
        return x[:, : windows * R].reshape(B, windows, R, -1)

    if R == CSA_RATIO:
        prev_z = jnp.concatenate([kept.prev_z[nth], z[..., :D]], axis=1)
        prev_g = jnp.concatenate([kept.prev_g[nth], g[..., :D]], axis=1)
        slots_z = jnp.concatenate([split(prev_z), split(z[..., D:])], axis=2)
        slots_g = jnp.concatenate([split(prev_g), split(g[..., D:])], axis=2)
    else:
        slots_z, slots_g = split(z), split(g)

    row = c.norm(pool(slots_z, slots_g))
    window = jnp.arange(windows, dtype=jnp.int32)
    index = first[:, None] + window
    if windows > 1:
        assert freq is not None
        cos, sin = rope.cos_sin(index * R, freq, row.dtype)
    else:
        cos, sin = angles.row_cos[:, None], angles.row_sin[:, None]
    row = rope.turn(row, cos, sin)
    row = num.index_rotation(row, numerics) if c.is_index else row

    capacity = next(iter(kept.rows.values())).shape[2]
    target = jnp.where(window < closed[:, None], index, capacity + window)  # out of range: dropped
    at = nth, jnp.arange(B, dtype=jnp.int32)[:, None], target
    rows = jax.tree.map(
        lambda kept, new: kept.at[at].set(new, mode="drop", unique_indices=True), kept.rows, c.row.encode(row)
    )
    return keep(dataclasses.replace(kept, rows=rows), nth, *new, length, n, ratio)


def values(
    c: Compressor, length: Int32[Array, "B"], ratio: int, dtype
) -> tuple[Float[Array, "B T c*D"], Float[Array, "B T c*D"]]:
    """z and g of new tokens that come after `length` others, as an open window holds them."""
    z, g = (x.reshape(len(length), -1, x.shape[-1]).astype(dtype) for x in (c.z, c.g))
    position = length[:, None] + jnp.arange(z.shape[1], dtype=jnp.int32)
    return z, g + lookup(c.ape.value.dequantize(dtype), lax.rem(position, np.int32(ratio)))


def keep(
    kept: Compressed, layers: int | Array | slice, z: Float[Array, "*L B T c*D"], g: Float[Array, "*L B T c*D"],
    length: Int32[Array, "B"], n: Int32[Array, "B"], ratio: int,
) -> Compressed:  # fmt: skip
    """The state with the first n of T new tokens in the open window and, overlapping, in the one before.

    layers: one layer, or a slice of them. z, g: of `values`, with an axis of layers if these are several.
    """
    B, T, D = *z.shape[-3:-1], kept.prev_z.shape[-1]
    t = jnp.arange(T, dtype=jnp.int32)
    window, slot = (f(length[:, None] + t, np.int32(ratio)) for f in (lax.div, lax.rem))
    before, last = lax.div(length, np.int32(ratio)), lax.div(length + n, np.int32(ratio))
    batch = jnp.arange(B, dtype=jnp.int32)[:, None]

    def put(state: Array, layers: Any, new: Array, into: Array) -> Array:
        """state with the tokens of window `into`."""
        stays = (t < n[:, None]) & (window == into[:, None])
        at = layers, batch, jnp.where(stays, slot, ratio + t)  # out of range: dropped
        return state.at[at].set(new, mode="drop", unique_indices=True)

    state = {"z": put(kept.z, layers, z, last), "g": put(kept.g, layers, g, last)}
    if ratio == CSA_RATIO:
        for name, old, new in (("z", kept.z, z), ("g", kept.g, g)):
            prev = getattr(kept, f"prev_{name}")
            opened = jnp.where((last > before)[:, None, None], old[layers][..., :D], prev[layers])
            prev = prev.at[layers].set(opened)
            state[f"prev_{name}"] = put(prev, layers, new[..., :D], jnp.where(last > before, last - 1, -1))
    return dataclasses.replace(kept, **state)
