"""A step over a mesh: every device runs it as one alone would, on its own part of the weights and of the cache.

Inside, `ds4jax.sharding` adds up what the devices have found. The sequences of the cache are spread over the data axis
if they can be shared out evenly; then arguments and results that have one entry for each are, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ds4jax.config import ModelConfig
from ds4jax.model import weights
from ds4jax.model.cache import Cache
from ds4jax.sharding import partition_spec, parts, share

WHOLE = PartitionSpec()
FIRST, SECOND, THIRD = (partition_spec((*[None] * i, "sequences")) for i in range(3))
"""Sequences along an array's first axis, its second, its third."""


def spread(
    step: Callable, mesh: Mesh | AbstractMesh | None, cfg: ModelConfig, given: Sequence[Any], found: Sequence[Any]
) -> Callable:
    """step(w, cache, *given) → (*found, cache) over a mesh; without one the step itself.

    given, found: where the sequences are in the other arguments and results, as a PartitionSpec for each.
    """
    if mesh is None:
        return step

    def run(w: Any, cache: Cache, *rest: Any) -> tuple:
        of_cache = partition(cache, mesh)
        in_specs = weights.partition(w, cfg), of_cache, *placed(given, cache, mesh)
        out_specs = *placed(found, cache, mesh), of_cache
        return over(step, mesh, in_specs, out_specs)(w, cache, *rest)

    return run


def over(f: Callable, mesh: Mesh | AbstractMesh, given: Any, found: Any) -> Callable:
    """f on every device of a mesh. given, found: PartitionSpecs of arguments and results."""
    # A Pallas call inside cannot say how its outputs vary over the mesh, so that check is off.
    return jax.shard_map(f, mesh=mesh, in_specs=given, out_specs=found, check_vma=False)


def placed(specs: Sequence[Any], cache: Cache, mesh: Mesh | AbstractMesh) -> Sequence[Any]:
    """The specs of arrays with one entry for each sequence of a cache: WHOLE, unless the sequences are shared out."""
    if _split(cache, mesh):
        return specs
    return jax.tree.map(lambda _: WHOLE, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def partition(cache: Cache, mesh: Mesh | AbstractMesh) -> Any:
    """Where the sequences of a cache are, as a tree of PartitionSpecs."""
    if not _split(cache, mesh):
        return jax.tree.map(lambda _: WHOLE, cache)
    return jax.tree.map(lambda x: SECOND if x.ndim > 1 else FIRST, cache)


def holder(cache: Cache, slot: int, mesh: Mesh | None) -> tuple[Cache, int]:
    """What to read the sequence in a slot from: the part of the cache on a device that has it, and its slot there.

    If it were read from the whole cache, XLA would gather that first. The device is one of this process, which has to
    have one that holds the sequence.
    """
    if mesh is None:
        return cache, slot
    held = share(mesh, cache.batch)
    device = next(d for d in mesh.devices[slot // held].flat if d.process_index == jax.process_index())

    def here(x: jax.Array) -> jax.Array:
        return next(shard.data for shard in x.addressable_shards if shard.device == device)

    return jax.tree.map(here, cache), slot % held


def _split(cache: Cache, mesh: Mesh | AbstractMesh) -> bool:
    n = parts(mesh, "sequences")
    return n > 1 and cache.batch % n == 0
