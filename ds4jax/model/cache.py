"""The KV cache: one pytree for a batch of sequences, each at its own position.

Per layer: a ring of the last rows; layers of ratio R also hold one compressed row per R tokens, and a ring of the
projections that the next ones are made of. Layers of one kind are stacked along axis 0; axis 1 is the sequence.

The last tokens, up to SPARE of `ds4jax.ops.ring`, are taken back by setting `length`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from ds4jax.config import CSA_RATIO, HCA_RATIO, ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.model.residency import Residents
from ds4jax.numerics import rows as num
from ds4jax.numerics.precision import wide
from ds4jax.ops.compress import Compressed, slots
from ds4jax.ops.ring import SPARE

# Snapshots hold a multiple of this many rows, so that few shapes are ever compiled.
SNAPSHOT_ROWS = 64


@struct.dataclass
class Cache:
    """length: tokens seen by each sequence. window: planes (L, B, W + SPARE, ·), rings.

    `window` has more layers after the model's: the window of the MTP head's block, and one for each stage of the
    drafter, if these are there.
    csa, index: layers of ratio 4 (`index` holds the indexer's keys). hca: layers of ratio 128.
    carry: the streams of the last token, (1, B, N·E), which the MTP head joins with the next one; None without a head.
    experts: those that are on the device, of a model whose routed experts are in host memory. They belong to no
    sequence: no snapshot has them, and what takes or puts a sequence leaves them as they are.
    """

    length: Int32[Array, "B"]
    window: num.Rows
    csa: Compressed
    index: Compressed
    hca: Compressed
    carry: Float[Array, "1 B N*E"] | None = None
    experts: Residents | None = None

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    def of_ratio(self, ratio: int) -> Compressed:
        """What layers of that ratio keep of their compressed rows."""
        return {CSA_RATIO: self.csa, HCA_RATIO: self.hca}[ratio]


def abstract(cfg: ModelConfig, numerics: num.Numerics, dtype, batch: int, ctx: int) -> Cache:
    """Shapes and dtypes of a cache for `batch` sequences of up to `ctx` tokens, as `jax.ShapeDtypeStruct`s."""
    if batch < 1 or ctx < 1:
        raise ConfigError(f"cache: batch {batch} and ctx {ctx} must both be at least 1")
    kv, key = num.kv_row(cfg, numerics, dtype), num.index_row(cfg, numerics, dtype)
    # What is still to be compressed is float32 whatever the compute dtype, unless that is wider.
    state_dtype = wide(jnp.dtype(dtype))

    def rows(fmt: num.RowFormat, layers: int, n: int) -> Any:
        return {k: jax.ShapeDtypeStruct((layers, batch, n, w), dt) for k, (w, dt) in fmt.planes().items()}

    def compressed(fmt: num.RowFormat, ratio: int) -> Compressed:
        layers, width = len(cfg.layers_of_ratio(ratio)), fmt.dim * (2 if ratio == CSA_RATIO else 1)
        state: Any = jax.ShapeDtypeStruct((layers, batch, slots(ratio), width), state_dtype)
        return Compressed(rows(fmt, layers, max(1, ctx // ratio)), z=state, g=state)

    length: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
    carry: Any = jax.ShapeDtypeStruct((1, batch, cfg.n_streams * cfg.embed_dim), jnp.dtype(dtype))
    return Cache(
        length=length,
        window=rows(kv, cfg.stages.stop, cfg.window + SPARE),
        csa=compressed(kv, CSA_RATIO),
        index=compressed(key, CSA_RATIO),
        hca=compressed(kv, HCA_RATIO),
        carry=carry if cfg.n_mtp else None,
    )


def nbytes(tree: Any) -> int:
    """Bytes of a cache, of its abstract form, or of a part."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def empty(cfg: ModelConfig, numerics: num.Numerics, dtype, batch: int, ctx: int, sharding=None) -> Cache:
    """A cache of sequences of length 0. sharding: of all leaves, e.g. `sharding.replicated(mesh)`."""
    make = functools.partial(zeros, cfg, numerics, dtype, batch, ctx)
    # Placed explicitly, because a step returns it so, and a step compiled for one placement would not fit the other.
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.jit(make, out_shardings=sharding)()


def zeros(cfg: ModelConfig, numerics: num.Numerics, dtype, batch: int, ctx: int) -> Cache:
    """`empty` within a larger program."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract(cfg, numerics, dtype, batch, ctx))


def reset(cache: Cache, which: Bool[Array, "B"]) -> Cache:
    """Set the sequences marked in `which` to length 0; their old rows become unreachable."""
    return dataclasses.replace(cache, length=jnp.where(which, 0, cache.length))


def take(cache: Cache, slots: Int32[Array, "R"]) -> Cache:
    """The sequences in some slots as a cache of their own. Within a larger program."""

    def of(x: Array) -> Array:
        if len(slots) == 1:  # a slice is copied faster than rows are gathered
            return lax.dynamic_slice_in_dim(x, slots[0], 1, _sequences(x))
        return jnp.take(x, slots, _sequences(x), unique_indices=True, mode="clip")

    return with_experts(jax.tree.map(of, with_experts(cache, None)), cache.experts)


def put(cache: Cache, slots: Int32[Array, "R"], part: Cache) -> Cache:
    """The cache with the sequences of `part` in some slots, all different. Within a larger program."""

    def set(x: Array, y: Array) -> Array:
        if len(slots) == 1:
            return lax.dynamic_update_slice_in_dim(x, y, slots[0], _sequences(x))
        return x.at[(slice(None),) * _sequences(x) + (slots,)].set(y, unique_indices=True, mode="promise_in_bounds")

    return with_experts(jax.tree.map(set, with_experts(cache, None), with_experts(part, None)), part.experts)


def with_experts(cache: Cache, experts: Residents | None) -> Cache:
    """The same sequences, with other experts on the device."""
    return dataclasses.replace(cache, experts=experts)


def _sequences(x: Array) -> int:
    """The axis of the sequences: 1, but 0 in `length`."""
    return min(1, x.ndim - 1)


def capacity(cache: Cache) -> int | None:
    """The longest sequence that the compressed rows have room for, or None without layers that compress."""
    per_kind = []
    for kind, ratio in ((cache.csa, CSA_RATIO), (cache.hca, HCA_RATIO)):
        plane = next(iter(kind.rows.values()))
        if plane.shape[0]:
            per_kind.append((plane.shape[2] + 1) * ratio - 1)
    return min(per_kind, default=None)


# ---- snapshots: one sequence's state, exact and no larger than its length needs --------------------------------------
def _map_sequence(fn, fn_rows, *caches: Cache) -> Cache:
    """Apply fn(*leaves) to leaves of axes (L, B, ...), fn_rows(*leaves, ratio) to compressed rows."""

    def compressed(ratio, *cs: Compressed) -> Compressed:
        rows = jax.tree.map(lambda *r: fn_rows(*r, ratio), *(c.rows for c in cs))
        return Compressed(rows, z=fn(*(c.z for c in cs)), g=fn(*(c.g for c in cs)))

    return Cache(
        length=fn(*(c.length[None] for c in caches))[0],
        window=jax.tree.map(fn, *(c.window for c in caches)),
        csa=compressed(CSA_RATIO, *(c.csa for c in caches)),
        index=compressed(CSA_RATIO, *(c.index for c in caches)),
        hca=compressed(HCA_RATIO, *(c.hca for c in caches)),
        carry=jax.tree.map(fn, *(c.carry for c in caches)),
    )


def snapshot(cache: Cache, slot: int) -> Cache:
    """The state of sequence `slot` as a cache of batch 1 with only the rows in use (rounded up)."""
    return _snapshot(cache, jnp.int32(slot), _rows_in_use(int(cache.length[slot])))


def _rows_in_use(length: int) -> tuple[tuple[int, int], ...]:
    return tuple((r, -(-(length // r) // SNAPSHOT_ROWS) * SNAPSHOT_ROWS) for r in (CSA_RATIO, HCA_RATIO))


@functools.partial(jax.jit, static_argnames="rows")
def _snapshot(cache: Cache, slot: Array, rows) -> Cache:
    def take(x):
        return lax.dynamic_slice_in_dim(x, slot, 1, axis=1)

    return _map_sequence(take, lambda x, ratio: take(x[:, :, : dict(rows)[ratio]]), cache)


@functools.partial(jax.jit, donate_argnums=0)
def restore(cache: Cache, slot: int | Array, saved: Cache) -> Cache:
    """`cache` (donated) with sequence `slot` set to a snapshot. The cache must have room for the snapshot's rows."""

    def put(x, s):
        return lax.dynamic_update_slice_in_dim(x, s, slot, axis=1)

    def put_rows(x, s, ratio):
        n = min(x.shape[2], s.shape[2])  # a snapshot's rows are rounded up, a cache's capacity is not
        start = (0, slot, 0, 0)
        return lax.dynamic_update_slice(x, s[:, :, :n], start)

    return with_experts(_map_sequence(put, put_rows, cache, saved), cache.experts)


@functools.partial(jax.jit, donate_argnums=0)
def clear(cache: Cache, slot: int | Array) -> Cache:
    """`cache` (donated) with zeros in sequence `slot`. Old rows are unreachable anyway, but for NaN: 0 · NaN is NaN."""

    def zero(x: Array) -> Array:
        return x.at[(slice(None),) * _sequences(x) + (slot,)].set(0)

    return with_experts(jax.tree.map(zero, with_experts(cache, None)), cache.experts)


def fork(cache: Cache, source: int, target: int) -> Cache:
    """`cache` (donated) with sequence `target` an exact copy of sequence `source`."""
    return restore(cache, target, snapshot(cache, source))
