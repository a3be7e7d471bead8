"""Many queries a block at a time, which bounds what their scores take of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

QUERY_BLOCK = 128


def in_blocks(
    f: Callable[..., jax.Array], queries: Any, shared: Callable[[int], Any], at_once: int | None
) -> jax.Array:
    """f(queries, shared(start)) for the queries start … start + QUERY_BLOCK - 1, put together again.

    queries: a tree of arrays (B, T, ·). shared: what else a block needs, a tree of arrays. f: → (B, t, ·) for t
    queries. at_once: how many blocks are computed side by side, None for one. Up to QUERY_BLOCK queries are one call;
    more must be a multiple of it, or ValueError.
    """
    T = jax.tree.leaves(queries)[0].shape[1]
    if T <= QUERY_BLOCK:
        return f(queries, shared(0))
    if T % QUERY_BLOCK:
        raise ValueError(f"{T} tokens: more than {QUERY_BLOCK} must be padded to a multiple of it")
    starts = range(0, T, QUERY_BLOCK)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], len(starts), QUERY_BLOCK, *x.shape[2:]), 1, 0)

    others = jax.tree.map(lambda *xs: jnp.stack(xs), *map(shared, starts))
    out = lax.map(lambda args: f(*args), (jax.tree.map(split, queries), others), batch_size=at_once)
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], T, *out.shape[3:])
