"""One sequence's state in host memory: taken from a cache's slot, exact, and put back into any slot.

A snapshot is a dict of arrays, those of `cache.Cache` by name, with axes (layers, 1, ...): compressed rows only as many
as the sequence has, and no open windows where none is open.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax import lax

from ds4jax import cache as kv
from ds4jax.cache import Cache
from ds4jax.config import CSA_RATIO, HCA_RATIO

Planes = dict[str, np.ndarray]

LAYOUT = 1  # of planes; changes with whatever makes an older snapshot another state
SMALLEST_ROOM = 1024  # tokens; copies are made of one of few sizes, because each size is compiled


def room(length: int) -> int:
    """Tokens whose rows are copied between device and host for a sequence of `length`: a power of two."""
    return max(SMALLEST_ROOM, 1 << (length - 1).bit_length())


def take(cache: Cache, slot: int, length: int, state: Planes | None = None) -> Planes:
    """The sequence in `slot` as it is after `length` tokens, or as it was then: with what `state` gave at that time."""
    saved = jax.device_get(_take(cache, np.int32(slot), room(length)))
    planes = {}
    for path, x in jax.tree_util.tree_leaves_with_path(saved):
        if ratio := _ratio(path):
            planes[_name(path)] = np.ascontiguousarray(x[:, :, : length // ratio])
        elif length % HCA_RATIO or not _open_window(path):
            planes[_name(path)] = np.asarray(x)
    return planes | (state or {})


def state(cache: Cache, slot: int) -> Planes:
    """What later tokens will overwrite of a sequence whose length is a multiple of 128: all but the compressed rows."""
    leaves = jax.device_get(_state(cache, np.int32(slot)))
    return {_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(leaves)}


def put(cache: Cache, slot: int, planes: Planes) -> Cache:
    """`cache` (donated) with the sequence in `slot` set to a snapshot, for which it must have room."""
    length = int(planes["length"][0])

    def padded(path, x: jax.Array) -> np.ndarray:
        ratio, saved = _ratio(path), planes.get(_name(path))
        if saved is not None and not ratio:
            return saved
        shape = [n if axis != min(1, x.ndim - 1) else 1 for axis, n in enumerate(x.shape)]
        if ratio:
            shape[2] = min(x.shape[2], room(length) // ratio)
        out = np.zeros(shape, x.dtype)
        if ratio:
            out[:, :, : length // ratio] = saved
        return out

    return kv.restore(cache, slot, jax.tree_util.tree_map_with_path(padded, cache))


def rooms(ctx: int) -> list[int]:
    """All values of `room` up to that of ctx."""
    return [SMALLEST_ROOM << i for i in range((room(ctx) // SMALLEST_ROOM).bit_length())]


def compile(cache: Cache, tokens: int) -> Cache:
    """Compile `take`, `state` and `put` for lengths of that room; → `cache` (donated) as it was."""
    state(cache, 0)
    saved = jax.device_get(_take(cache, np.int32(0), tokens))
    for _ in range(2):  # where a step left the cache, and where another `put` did: JAX tells them apart
        cache = kv.restore(cache, 0, saved)
    return cache


@functools.partial(jax.jit, static_argnames="tokens")
def _take(cache: Cache, slot: jax.Array, tokens: int) -> Cache:
    def leaf(path, x: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(x, slot, 1, axis=min(1, x.ndim - 1))
        return x[:, :, : tokens // ratio] if (ratio := _ratio(path)) else x

    return jax.tree_util.tree_map_with_path(leaf, cache)


@jax.jit
def _state(cache: Cache, slot: jax.Array) -> Cache:
    def leaf(path, x: jax.Array) -> jax.Array | None:
        if _ratio(path) or _open_window(path):
            return None
        return lax.dynamic_slice_in_dim(x, slot, 1, axis=min(1, x.ndim - 1))

    return jax.tree_util.tree_map_with_path(leaf, cache)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _ratio(path: tuple[Any, ...]) -> int | None:
    """Tokens per compressed row, in a plane of such rows."""
    kind, _, rest = _name(path).partition(".")
    return (HCA_RATIO if kind == "hca" else CSA_RATIO) if rest.startswith("rows.") else None


def _open_window(path: tuple[Any, ...]) -> bool:
    return _name(path).endswith((".z", ".g"))
