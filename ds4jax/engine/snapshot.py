"""One sequence's state in host memory: taken from a cache's slot, exact, and put back into any slot.

A snapshot is a dict of arrays, those of `cache.Cache` by name, with axes (layers, 1, ...): compressed rows only as many
as the sequence has, and of the compressors' rings no more than its next tokens read, where its length is a multiple
of 128.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from ds4jax.config import CSA_RATIO, HCA_RATIO
from ds4jax.model.cache import Cache, with_experts
from ds4jax.ops.compress import slots

Planes = dict[str, np.ndarray]

LAYOUT = 2  # of planes; changes with whatever makes an older snapshot another state
SMALLEST_ROOM = 1024  # tokens; copies are made of one of few sizes, because each size is compiled
ZERO = np.int32(0)  # indices are of one type, with 64-bit numbers enabled, too
PIECE = 32768  # tokens whose rows are copied at once, at most: others wait for that


def room(length: int) -> int:
    """Tokens whose rows are copied between device and host for `length` of them: a power of two."""
    return max(SMALLEST_ROOM, 1 << (length - 1).bit_length())


def take(
    cache: Callable[[], Cache], slot: int, length: int, state: Planes | None = None
) -> Generator[Planes | None, None, None]:
    """Copy the first `length` tokens' state of the sequence in `slot` to host memory, in pieces.

    Yields None after each piece, and the planes after the last. After the first piece the sequence may grow. cache:
    gives the cache as it is then. state: if the sequence is longer than `length`, what `state` gave at that length.
    """
    planes = dict(state) if state else jax.device_get(_state(cache(), np.int32(slot), _aligned(length)))
    for name, x in _leaves(cache()):
        if ratio := _ratio(name):
            planes[name] = np.empty((x.shape[0], 1, length // ratio, x.shape[3]), x.dtype)
    for start, tokens in _pieces(length):
        if start:
            yield None
        first = _first(cache(), start, tokens)
        for name, x in jax.device_get(_rows(cache(), np.int32(slot), first, tokens)).items():
            rest = planes[name][:, :, first[name] :]
            rest[:, :, : x.shape[2]] = x[:, :, : rest.shape[2]]
    yield planes


def state(cache: Cache, slot: int) -> Planes:
    """The planes that later tokens will overwrite, of a sequence whose length is a multiple of 128.

    These are all but the compressed rows.
    """
    return jax.device_get(_state(cache, np.int32(slot), True))


def state_within(cache: Cache) -> dict[str, jax.Array]:
    """`state` of a cache of one sequence, on the device. Within a larger program."""
    return _state(cache, ZERO, True)


def state_names(cache: Cache) -> list[str]:
    """The planes of `state`. cache: or its abstract form."""
    return [name for name, x in _leaves(cache) if not _ratio(name) and _needed(name, x.shape, True) is not None]


def earlier(planes: Planes, length: int, state: Planes) -> Planes:
    """A snapshot of the first `length` tokens, from a longer one and from what `state` gave at that length.

    Compressed rows are only ever added, so its rows are the first of the longer one.
    """
    rows = {name: x[:, :, : length // _ratio(name)] for name, x in planes.items() if _ratio(name)}
    return state | rows


def put(cache: Cache, slot: int, planes: Planes) -> Cache:
    """`cache` (donated) with the sequence in `slot` set to a snapshot, for which it must have room."""
    leaves = dict(_leaves(cache))
    state, length = {}, int(planes["length"][0])
    for name, x in leaves.items():
        if not _ratio(name):
            state[name] = np.zeros(_one(x), x.dtype)
            if (part := _needed(name, x.shape, _aligned(length))) is not None:
                state[name][part] = planes[name]
    cache = _put(cache, np.int32(slot), {}, state)
    for start, tokens in _pieces(length):
        first, rows = _first(cache, start, tokens), {}
        for name, at in first.items():
            layers, _, capacity, dim = leaves[name].shape
            n = _size(name, capacity, tokens)
            saved = planes[name][:, :, at : at + n]
            rows[name] = np.zeros((layers, 1, n, dim), saved.dtype)
            rows[name][:, :, : saved.shape[2]] = saved
        cache = _put(cache, np.int32(slot), first, rows)
    return cache


def fits(cache: Cache, length: int, planes: Planes) -> bool:
    """Whether planes have the names, shapes, dtypes and the length of a snapshot of `length` tokens for `cache`."""
    expected = {}
    for name, x in _leaves(cache):
        if ratio := _ratio(name):
            expected[name] = (x.shape[0], 1, length // ratio, x.shape[3]), x.dtype
        elif (part := _needed(name, x.shape, _aligned(length))) is not None:
            expected[name] = np.broadcast_to(np.zeros((), bool), _one(x))[part].shape, x.dtype
    return {name: (x.shape, x.dtype) for name, x in planes.items()} == expected and planes["length"][0] == length


def rooms(ctx: int) -> list[int]:
    """All values of `room` for pieces of a sequence of up to ctx tokens."""
    return [SMALLEST_ROOM << i for i in range((room(min(ctx, PIECE)) // SMALLEST_ROOM).bit_length())]


def compile(cache: Cache, parts: Sequence[Cache], tokens: int) -> Cache:
    """Compile `take`, `state` and `put` for pieces of that room; → `cache` (donated) as it was.

    parts: what sequences are taken from: the cache itself, or on a mesh what each device holds of it.
    """
    slot, first, rest, rows = np.int32(0), _first(cache, 0, tokens), {}, {}
    for part in reversed(parts):  # the first comes last: slot 0 is put back from there
        state(part, 0)
        rest, rows = jax.device_get((_state(part, slot, False), _rows(part, slot, first, tokens)))
    for _ in range(2):  # where a step left the cache, and where another `put` did: JAX tells them apart
        cache = _put(_put(cache, slot, {}, rest), slot, first, rows)
    return cache


# ---- pieces ----------------------------------------------------------------------------------------------------------
def _pieces(length: int) -> list[tuple[int, int]]:
    """The first token of each piece, and the room for it."""
    return [(start, room(min(PIECE, length - start))) for start in range(0, length, PIECE)]


def _size(name: str, capacity: int, tokens: int) -> int:
    """Compressed rows of a piece."""
    return min(tokens // _ratio(name), capacity)


def _first(cache: Cache, start: int, tokens: int) -> dict[str, np.int32]:
    """The first compressed row of a piece, by name: at the end of the cache, one that the piece before has, too."""
    rows = [(name, x.shape[2]) for name, x in _leaves(cache) if _ratio(name)]
    return {name: np.int32(min(start // _ratio(name), n - _size(name, n, tokens))) for name, n in rows}


@functools.partial(jax.jit, static_argnames="tokens")
def _rows(cache: Cache, slot: jax.Array, first: dict[str, jax.Array], tokens: int) -> dict[str, jax.Array]:
    """The compressed rows of one piece of a sequence, by plane."""
    leaves, out = dict(_leaves(cache)), {}
    for name, at in first.items():
        layers, _, capacity, dim = leaves[name].shape
        size = layers, 1, _size(name, capacity, tokens), dim
        out[name] = lax.dynamic_slice(leaves[name], (ZERO, slot, at, ZERO), size)
    return out


@functools.partial(jax.jit, static_argnames="aligned")
def _state(cache: Cache, slot: jax.Array, aligned: bool) -> dict[str, jax.Array]:
    """The planes of one sequence that are not compressed rows. aligned: see `_needed`."""
    rest = [(name, x, _needed(name, x.shape, aligned)) for name, x in _leaves(cache) if not _ratio(name)]
    return {
        name: lax.dynamic_slice_in_dim(x, slot, 1, _axis(x))[part] for name, x, part in rest if part is not None
    }  # fmt: skip


@functools.partial(jax.jit, donate_argnums=0)
def _put(cache: Cache, slot: jax.Array, first: dict[str, jax.Array], planes: dict[str, jax.Array]) -> Cache:
    """Write planes from `_state`, or from `_rows` at the rows `first`, into a slot of the cache."""

    def leaf(path, x: jax.Array) -> jax.Array:
        name = _name(path)
        if name not in planes:
            return x
        at: list[np.int32 | jax.Array] = [ZERO] * x.ndim
        at[_axis(x)] = slot
        if name in first:
            at[2] = first[name]
        return lax.dynamic_update_slice(x, planes[name], at)

    return jax.tree_util.tree_map_with_path(leaf, cache)


# ---- leaves ----------------------------------------------------------------------------------------------------------
def _leaves(cache: Cache) -> list[tuple[str, jax.Array]]:
    """What a cache has of sequences, by name: all but experts."""
    leaves = jax.tree_util.tree_leaves_with_path(with_experts(cache, None))
    return [(_name(path), x) for path, x in leaves]


def _axis(x: jax.Array) -> int:
    """Of the sequence: 1, but 0 in `length`."""
    return min(1, x.ndim - 1)


def _one(x: jax.Array) -> tuple[int, ...]:
    """The shape of one sequence's part."""
    return tuple(1 if axis == _axis(x) else n for axis, n in enumerate(x.shape))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _ratio(name: str) -> int:
    """Tokens per compressed row, in a plane of such rows; 0 in others."""
    kind, _, rest = name.partition(".")
    return (HCA_RATIO if kind == "hca" else CSA_RATIO) if rest.startswith("rows.") else 0


def _aligned(length: int) -> bool:
    """Whether no window is open."""
    return length % HCA_RATIO == 0


def _needed(name: str, shape: tuple[int, ...], aligned: bool) -> tuple[Any, ...] | None:
    """What later tokens need of a plane that has no compressed rows, as an index; None for nothing.

    aligned: whether the sequence's length is a multiple of 128. Then it is, of the compressors' rings, the first halves
    of the last 4 tokens where windows overlap. They are in the last slots, as there are 16.
    """
    if not (aligned and name.endswith((".z", ".g"))):
        return (...,)
    return None if name.startswith("hca.") else (..., slice(-CSA_RATIO, None), slice(shape[-1] // 2))


assert HCA_RATIO % slots(CSA_RATIO) == 0
