"""Rings: the newest rows of every sequence, that of position p in slot p mod the ring's length.

A ring has SPARE slots more than a token reads rows. So up to SPARE tokens are stored before any of them reads, and they
are taken back by the sequence's length alone: nothing that they have overwritten is read again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

SPARE = 8

Planes = dict[str, Array]  # rings (L, B, slots, ·), or rows (B, T, ·)


def store(
    new: Planes, ring: Planes, layer: int | Array | slice, length: Int32[Array, "B"], n: Int32[Array, "B"]
) -> Planes:
    """The rings with the first n of T new rows in them, or the last of these, if there are more than slots.

    new: of one layer (B, T, ·), of several (L', B, T, ·). length: the position of the first.
    """
    (B, T), slots = next(iter(new.values())).shape[-3:-1], next(iter(ring.values())).shape[2]
    t, batch = jnp.arange(T, dtype=jnp.int32)[None], jnp.arange(B, dtype=jnp.int32)[:, None]
    if T > slots:
        t = jnp.clip(n[:, None] - slots, 0, T - slots) + t[:, :slots]
        new = jax.tree.map(lambda x: x[..., batch, t, :], new)
    kept = (t < n[:, None]) & (t >= n[:, None] - slots)
    slot = jnp.where(kept, lax.rem(length[:, None] + t, np.int32(slots)), slots)  # out of range: dropped
    at = layer, batch, slot
    return jax.tree.map(lambda ring, x: ring.at[at].set(x, mode="drop"), ring, new)


def rows(ring: Planes, layer: int | Array, first: Int32[Array, "B"], n: int) -> Planes:
    """The rows of positions first … first + n - 1, which are not older than the ring; (B, n, ·).

    Those before position 0 mean nothing.
    """
    B, slots = len(first), next(iter(ring.values())).shape[2]
    slot = jnp.mod(first[:, None] + jnp.arange(n, dtype=jnp.int32), np.int32(slots))
    batch = jnp.arange(B, dtype=jnp.int32)[:, None]
    return jax.tree.map(lambda x: x[layer, batch, slot], ring)


def positions(newest: Int32[Array, "B"], slots: int) -> Int32[Array, "B slots"]:
    """The position that each slot of a ring holds if the newest row is that of position `newest`; negative if none."""
    return newest[:, None] - jnp.mod(newest[:, None] - jnp.arange(slots, dtype=jnp.int32), np.int32(slots))
