"""Routed experts in host memory, of which the device holds some.

All of them lie in pinned host memory. The device has slots with room for one expert each. A pass of few tokens, as in
decoding and verification, brings what it lacks into the slots of those that are worth least, and reads slots. A pass of
more tokens needs most experts of a layer: it leaves the slots as they are, and puts each layer together in a buffer,
from slots and, once for all its tokens, from host memory.

Either way the same code multiplies the same matrices in the same order as with all experts on the device, so the
results are the same bit for bit.

What an expert is worth joins how often and how recently it was used (LRFU, Lee et al., IEEE Transactions on Computers
50(12), 2001): log2 Σ 2^(t / HALF_LIFE) over the passes t that used it. That number need not be changed as time goes by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32

from ds4jax.config import ModelConfig
from ds4jax.model.weights import Stack, SwiGLU, Weights, WeightSpec
from ds4jax.ops.experts import Experts
from ds4jax.ops.weight import Weight
from pallas_kernels.experts import MAX_TOKENS

HALF_LIFE = 256
"""Passes after which a use counts half as much."""


@struct.dataclass
class Pool:
    """Slots for the experts of some layers, see `Kind`.

    experts: `SwiGLU` of matrices (slots, ·, ·). slot: which one holds an expert, -1 if none does. holds: the expert in
    each slot, numbered through all layers, -1 if it is empty. worth: of each expert, as above. layers: the model's
    layer numbers.
    """

    experts: SwiGLU
    slot: Int32[Array, "layers experts"]
    holds: Int32[Array, "slots"]
    worth: Float[Array, "layers experts"]
    layers: tuple[int, ...] = struct.field(pytree_node=False)


@struct.dataclass
class Residents:
    """The experts on the device. passes: so far. counts: experts that passes of few tokens found there, and lacked."""

    pools: tuple[Pool, ...]
    passes: Int32[Array, ""]
    counts: UInt32[Array, "2"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Layers that share a pool: their matrices lie in the same stacks, and so are of the same types.

    Kernels address all slots together as they address a stack, and there are no more slots than experts in one.
    matrices: the stacks, of gate, up and down.
    """

    layers: tuple[int, ...]
    matrices: tuple[WeightSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(m.nbytes // (m.shape[0] * m.shape[1]) for m in self.matrices)


def kinds(tree: Weights, cfg: ModelConfig) -> list[Kind]:
    """The kinds of layers in `weights.abstract`, by their first layer."""
    found: dict[tuple[WeightSpec, ...], list[int]] = {}
    for layer in range(cfg.n_layers):
        found.setdefault(tuple(f.at(layer).stack for f in _families(tree.ffn.experts)), []).append(layer)
    return [Kind(tuple(layers), matrices) for matrices, layers in found.items()]


def _families(experts: SwiGLU) -> tuple[Stack, Stack, Stack]:
    return experts.gate, experts.up, experts.down


def hosted(spec: WeightSpec) -> bool:
    """Whether a leaf of `weights.abstract` has routed experts, which belong in host memory."""
    return spec.tensors[0].family.startswith("ffn.experts.")


def with_experts(w: Weights, experts: Any) -> Weights:
    """Weights with other routed experts."""
    return dataclasses.replace(w, ffn=dataclasses.replace(w.ffn, experts=experts))


def host_memory() -> jax.sharding.Sharding:
    """Pinned memory of the host, which the first device reads directly."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")


def total(tree: Weights, cfg: ModelConfig) -> int:
    """Bytes of all routed experts of the model's layers."""
    return sum(len(kind.layers) * cfg.n_experts * kind.nbytes for kind in kinds(tree, cfg))


def on_host(tree: Weights) -> int:
    """Bytes of what is in host memory: all routed experts, those of an MTP head among them."""
    return sum(spec.nbytes for spec in jax.tree.leaves(tree) if hosted(spec))


def whole_layer(tree: Weights, cfg: ModelConfig) -> int:
    """Bytes of the largest layer's experts: the buffer of a pass of many tokens."""
    return max(cfg.n_experts * kind.nbytes for kind in kinds(tree, cfg))


def least(tree: Weights, cfg: ModelConfig) -> int:
    """The fewest bytes that `slots_in` takes: with them every layer has room for the experts of a token."""
    scarce = min(len(kind.layers) for kind in kinds(tree, cfg)) * cfg.n_experts
    return -(-total(tree, cfg) * cfg.n_experts_used // scarce) + _besides(cfg)


def _besides(cfg: ModelConfig) -> int:
    """Bytes, at most, of all that `Residents` have beside experts: the tables and the counters."""
    return 12 * cfg.n_layers * cfg.n_experts + 12


def slots_in(tree: Weights, cfg: ModelConfig, nbytes: int) -> tuple[int, ...]:
    """How many slots each of `kinds` gets of so many bytes for residents: the same part of its experts, at most all.

    What is left by rounding down goes to the first kinds, a slot each.
    """
    left, found = nbytes - _besides(cfg), kinds(tree, cfg)
    part = min(1.0, left / total(tree, cfg))
    slots = [max(1, int(part * len(kind.layers) * cfg.n_experts)) for kind in found]
    left -= sum(n * kind.nbytes for n, kind in zip(slots, found, strict=True))
    for i, kind in enumerate(found):
        if slots[i] < len(kind.layers) * cfg.n_experts and kind.nbytes <= left:
            slots[i], left = slots[i] + 1, left - kind.nbytes
    return tuple(slots)


def abstract(tree: Weights, cfg: ModelConfig, slots: Sequence[int]) -> Residents:
    """`jax.ShapeDtypeStruct`s of the residents, with so many slots for each of `kinds`."""

    def of(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def pool(kind: Kind, slots: int) -> Pool:
        def plane(p: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((slots, *p.shape[2:]), p.dtype)

        experts = SwiGLU(*(jax.tree.map(plane, m.struct()) for m in kind.matrices))
        shape = len(kind.layers), cfg.n_experts
        return Pool(experts, of(shape, jnp.int32), of((slots,), jnp.int32), of(shape, jnp.float32), kind.layers)

    pools = tuple(pool(kind, n) for kind, n in zip(kinds(tree, cfg), slots, strict=True))
    return Residents(pools, of((), jnp.int32), of((2,), jnp.uint32))


def fill(of: Residents, host: SwiGLU) -> Residents:
    """Residents of the shapes `of` that hold as many of the first experts of every layer. Within a larger program."""

    def pool(p: Pool) -> Pool:
        n_layers, n = p.slot.shape
        slots = len(p.holds)
        number = jnp.arange(slots, dtype=jnp.int32)
        layer, expert = number % n_layers, number // n_layers
        experts = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), p.experts)
        for i, of_model in enumerate(p.layers):
            count = -(-(slots - i) // n_layers)
            every = jnp.arange(count, dtype=jnp.int32)
            experts = _copied(host, of_model, experts, every, every * n_layers + i, count)
        slot = jnp.full((n_layers, n), -1, jnp.int32).at[layer, expert].set(number)
        worth = jnp.full((n_layers, n), -jnp.inf, jnp.float32)
        return Pool(experts, slot, layer * n + expert, worth, p.layers)

    return Residents(tuple(map(pool, of.pools)), jnp.int32(0), jnp.zeros((2,), jnp.uint32))


def _copied(host: SwiGLU, layer: int, to: SwiGLU, experts: Array, places: Array, count: Array | int) -> SwiGLU:
    """Matrices `to` (slots, ·, ·) after the first `count` of a layer's `experts` were copied to `places` in them."""

    def one(i: Array, to: SwiGLU) -> SwiGLU:
        def copy(weight: Weight, matrix: Any) -> Any:
            def plane(source: Array, target: Array) -> Array:
                at = (weight.nth, experts[i], *[0] * (source.ndim - 2))
                # XLA copies slices of what lies in host memory, if nothing else is done to them there.
                found = lax.dynamic_slice(source, at, (1, 1, *source.shape[2:]))
                found = jax.device_put(found, jax.memory.Space.Device)
                return lax.dynamic_update_slice_in_dim(target, found[0], places[i], 0)

            return jax.tree.map(plane, weight.stack, matrix)

        made = [copy(f.at(layer), m) for f, m in zip(_families(host), (to.gate, to.up, to.down), strict=True)]
        return SwiGLU(*made)

    return lax.fori_loop(0, count, one, to)


def takes_few(rows: int, used: int, experts: int, slots: int) -> bool:
    """Whether a pass of so many rows with `used` experts each reads slots. Others put whole layers together."""
    return rows <= MAX_TOKENS and rows * used <= min(experts, slots)


class Held:
    """The routed experts of one pass, in place of the weights' own. What the pass brings in, `residents` gives.

    host: the stacks in host memory. before: the residents before the pass.
    """

    def __init__(self, host: SwiGLU, before: Residents):
        self._host, self._before = host, before
        self._pools, self._counts = list(before.pools), before.counts

    def at(self, layer: int) -> LayerHeld:
        """A layer's experts."""
        number = next(i for i, pool in enumerate(self._pools) if layer in pool.layers)
        return LayerHeld(self, layer, number)

    def residents(self) -> Residents:
        """After the pass."""
        return Residents(tuple(self._pools), self._before.passes + 1, self._counts)


@dataclasses.dataclass
class LayerHeld:
    """A layer of `Held`. number: of its pool."""

    held: Held
    layer: int
    number: int

    @property
    def _pool(self) -> Pool:
        return self.held._pools[self.number]

    @property
    def in_slots(self) -> Experts:
        """The matrices (slots, ·, ·)."""
        return _experts(self._pool.experts)

    def bring(self, ids: Int32[Array, "S k"], h: Float[Array, "S E"]) -> tuple[Experts, Int32[Array, "S k"]]:
        """Bring the tokens' experts `ids` to the device; → matrices, and the experts' numbers among them (S, k).

        ids: -1 where there is no token. h: the experts' input. Nothing is brought before h is computed: by then the
        layers before have read what they need of the slots, which may therefore be overwritten in place.
        """
        ids, _ = lax.optimization_barrier((ids, h))
        (S, k), n = ids.shape, self._pool.slot.shape[1]
        few = takes_few(S, k, n, len(self._pool.holds))
        return self._into_slots(ids) if few else self._whole(ids)

    def _times(self, ids: Array, n: int) -> Array:
        """How many tokens go to each of the n experts."""
        return jnp.zeros((n + 1,), jnp.int32).at[jnp.where(ids < 0, n, ids)].add(1)[:n]

    def _used(self, times: Array) -> Array:
        """What the experts of all the pool's layers are worth after this use."""
        pool, now = self._pool, self.held._before.passes.astype(jnp.float32) / HALF_LIFE
        own = pool.layers.index(self.layer)
        before = pool.worth[own]
        uses = jnp.log2(jnp.maximum(times, 1).astype(jnp.float32))
        return pool.worth.at[own].set(jnp.where(times > 0, jnp.logaddexp2(before, now + uses), before))

    def _whole(self, ids: Array) -> tuple[Experts, Array]:
        """The layer's matrices: every expert that a token goes to at its own number; at other numbers, any."""
        pool, own = self._pool, self._pool.layers.index(self.layer)
        row = pool.slot[own]
        times = self._times(ids, len(row))
        lacking = (times > 0) & (row < 0)
        place = jnp.where((times > 0) & (row >= 0), row, 0)
        experts = jax.tree.map(lambda p: p[place], pool.experts)
        which = _first(lacking, len(row))
        experts = _copied(self.held._host, self.layer, experts, which, which, lacking.sum())
        self.held._pools[self.number] = dataclasses.replace(pool, worth=self._used(times))
        return _experts(experts), ids

    def _into_slots(self, ids: Array) -> tuple[Experts, Array]:
        """The slots, once the experts that were in none have taken the places of those that are worth least."""
        pool, own = self._pool, self._pool.layers.index(self.layer)
        (n_layers, n), most = pool.slot.shape, min(ids.size, self._pool.slot.shape[1])
        times = self._times(ids, n)
        lacking = (times > 0) & (pool.slot[own] < 0)
        count, worth = lacking.sum(dtype=jnp.int32), self._used(times)

        held = jnp.maximum(pool.holds, 0)
        wanted = (held // n == own) & (times[held % n] > 0)
        of_slot = jnp.where(pool.holds < 0, -jnp.inf, jnp.where(wanted, jnp.inf, worth.reshape(-1)[held]))
        places = lax.top_k(-of_slot, most)[1].astype(jnp.int32)
        which = _first(lacking, most)
        real, nowhere = jnp.arange(most, dtype=jnp.int32) < count, n_layers * n
        gone = jnp.where(real & (pool.holds[places] >= 0), pool.holds[places], nowhere)
        come = jnp.where(real, own * n + which, nowhere)
        slot = pool.slot.reshape(-1).at[gone].set(-1, mode="drop").at[come].set(places, mode="drop")
        slot = slot.reshape(n_layers, n)
        holds = pool.holds.at[jnp.where(real, places, len(pool.holds))].set(come, mode="drop")
        experts = _copied(self.held._host, self.layer, pool.experts, which, places, count)
        self.held._pools[self.number] = Pool(experts, slot, holds, worth, pool.layers)
        asked = (times > 0).sum(dtype=jnp.uint32)
        self.held._counts += jnp.stack([asked - count.astype(jnp.uint32), count.astype(jnp.uint32)])
        return _experts(experts), jnp.where(ids < 0, -1, slot[own][jnp.maximum(ids, 0)])


def _first(which: Array, most: int) -> Array:
    """The numbers of the first `most` that are true, ascending; 0 after them."""
    return jnp.nonzero(which, size=most, fill_value=0)[0].astype(jnp.int32)


def _experts(matrices: SwiGLU) -> Experts:
    """As the op takes them: a stack of one layer."""
    stacked = (Weight(jax.tree.map(lambda p: p[None], m), 0) for m in (matrices.gate, matrices.up, matrices.down))
    return Experts(*stacked)
