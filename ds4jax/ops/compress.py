"""Compressors: pool every window of R tokens into one row, by a softmax over the tokens, per channel.

    z = W_kv h,  g = W_gate h + ape[t mod R]
    row_i = rope(rms(Σ_t softmax_t(g) ⊙ z) · norm),  at position i·R

R = 128 (HCA): the 128 tokens of the window. R = 4 (CSA) overlaps: z and g have two halves, a and b; row i pools the
a-halves of window i - 1 and the b-halves of window i. The indexer has a compressor of its own, of the same kind.
DeepSeek-V4 report: section 2.3.1, eqs. 9 to 12 (CSA); section 2.3.2, eqs. 20 to 23 (HCA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
from ds4jax.ops import ring, rope, tuned
from ds4jax.ops.linear import layers
from ds4jax.ops.norm import Norm
from ds4jax.ops.weight import Weight
from pallas_kernels import compressor as kernel


@struct.dataclass
class Compressed:
    """What one kind of compressor keeps, for all layers that have one.

    rows: planes (L, B, rows, ·), row i made from tokens i·R … i·R + R − 1 (and, overlapping, the R before them).
    z, g: rings of the values and gates of the last tokens: of a window and, overlapping, of the one before. float32 at
    least.
    """

    rows: num.Rows
    z: Float[Array, "L B slots c*D"]
    g: Float[Array, "L B slots c*D"]


def slots(ratio: int) -> int:
    """The length of the rings of a compressor."""
    return ratio * (2 if ratio == CSA_RATIO else 1) + ring.SPARE


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
    numerics: num.Numerics,
    implementation: Implementation = "xla",
) -> list[Compressed]:
    """Take T new tokens into the compressors of a layer: store the rows of windows that close, and z and g.

    length, n: tokens before these, and how many of the T are real. nth: the layer among those of its ratio, in every
    state. The kernel takes up to SPARE tokens of each sequence, `official` rows and a bias in F32, F16 or BF16; for
    more the formula is computed in XLA. Raises Unsupported.
    """
    T = angles.cos.shape[1]
    if implementation == "xla" or T > ring.SPARE:
        return [
            _formula(c, kept, length, n, angles, nth, ratio, numerics)
            for c, kept in zip(compressors, states, strict=True)
        ]
    numbers = layers(*(w.nth for c in compressors for w in (c.ape, c.norm.weight)))
    moved = kernel.op(
        [(c.z, c.g) for c in compressors], [(c.ape.values, c.norm.weight.stack) for c in compressors],
        [kernel.State(s.rows, s.z, s.g) for s in states], length, n, angles.row_cos, angles.row_sin,
        numbers, jnp.array([nth], jnp.int32), eps=compressors[0].norm.eps,
        config=tuned.tiles(kernel), interpret=implementation == "pallas_interpret",
    )  # fmt: skip
    return [Compressed(**m._asdict()) for m in moved]


def pool(z: Float[Array, "*s slots D"], g: Float[Array, "*s slots D"]) -> Float[Array, "*s D"]:
    """Σ over slots of softmax(g) ⊙ z."""
    return jnp.sum(z * jax.nn.softmax(g, axis=-2), axis=-2)


def fed(c: Compressor, length: Int32[Array, "B"], ratio: int, dtype) -> ring.Planes:
    """z and g of the new tokens, (B, T, c·D), as their rings keep them: in `dtype`, the gates with their bias."""
    z, g = (x.reshape(len(length), -1, x.shape[-1]).astype(dtype) for x in (c.z, c.g))
    position = length[:, None] + jnp.arange(z.shape[1], dtype=jnp.int32)
    return {"z": z, "g": g + lookup(c.ape.value.dequantize(dtype), lax.rem(position, np.int32(ratio)))}


def _formula(
    c: Compressor, kept: Compressed, length: Array, n: Array, angles: rope.Angles, nth: int | Array, ratio: int,
    numerics: num.Numerics,
) -> Compressed:  # fmt: skip
    B, R, D = length.shape[0], ratio, c.row.dim
    new = fed(c, length, ratio, kept.z.dtype)

    # Lay the windows that are read out, from the start of the first one: what there is of them, and the new tokens.
    first, filled = lax.div(length, np.int32(R)), lax.rem(length, np.int32(R))
    windows = angles.row_cos.shape[1]  # at most this many can close
    before = R if R == CSA_RATIO else 0  # tokens of the window before the first that can close

    def lay_out(old: Array, new: Array) -> Array:
        room = jnp.pad(old, ((0, 0), (0, windows * R), (0, 0)))
        return jax.vmap(lambda s, x, at: lax.dynamic_update_slice_in_dim(s, x, at, axis=0))(room, new, before + filled)

    old = ring.rows({"z": kept.z, "g": kept.g}, nth, first * R - before, before + R)
    z, g = (lay_out(old[name], new[name]) for name in ("z", "g"))
    index = first[:, None] + jnp.arange(windows, dtype=jnp.int32)
    closed = jnp.arange(windows, dtype=jnp.int32) < lax.div(filled + n, np.int32(R))[:, None]

    def split(x: Array) -> Array:
        return x[:, : windows * R].reshape(B, windows, R, -1)

    slots_z, slots_g = (split(x[:, before:, -D:]) for x in (z, g))
    if before:
        # A gate of -inf gives what there is before the first window no weight.
        earlier = jnp.where(index[..., None, None] > 0, split(g[..., :D]), -jnp.inf)
        slots_z = jnp.concatenate([split(z[..., :D]), slots_z], axis=2)
        slots_g = jnp.concatenate([earlier, slots_g], axis=2)

    row = rope.turn(c.norm(pool(slots_z, slots_g)), angles.row_cos, angles.row_sin)
    row = num.index_rotation(row, numerics) if c.is_index else row
    capacity = next(iter(kept.rows.values())).shape[2]
    target = jnp.where(closed, index, capacity + jnp.arange(windows, dtype=jnp.int32))  # out of range: dropped
    at = nth, jnp.arange(B, dtype=jnp.int32)[:, None], target
    rows = jax.tree.map(
        lambda kept, new: kept.at[at].set(new, mode="drop", unique_indices=True), kept.rows, c.row.encode(row)
    )
    return Compressed(rows, **ring.store(new, {"z": kept.z, "g": kept.g}, nth, length, n))
