"""Loading: a model's weights go from its file to the devices slab by slab, never all of them through host memory.

The tree of `weights.abstract` says what to read and where it goes. Threads read file pages and split them into planes,
or read the planes of a folder of `ds4jax checkpoint`; JAX then copies them to the devices. A slab has at most
SLAB_BYTES; IN_FLIGHT of them are being read, split or transferred at a time, each by one thread and then by JAX. A
shard that is larger is allocated first, and its slabs are written into it on its device. Once a slab is split, its file
pages are given back to the system.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import lax

from ds4jax.config import ModelConfig
from ds4jax.formats import FORMATS
from ds4jax.io.checkpoint import Checkpoint, Drafter, open_checkpoint
from ds4jax.io.dialect import without_images_note
from ds4jax.io.drafter import open_drafter
from ds4jax.io.gguf import GGUFFile
from ds4jax.io.packed import PackedFile
from ds4jax.model import residency, weights
from ds4jax.model.weights import Dspark, Weights, WeightSpec
from ds4jax.terminal import meter

# JAX copies what is below 1 GiB into page-locked memory, with one thread for each plane. Small slabs keep this memory,
# and that for the slabs themselves, small: a page that is used for the first time costs more than all of its copies.
SLAB_BYTES = 64 * 2**20
IN_FLIGHT = min(12, 2 * (os.cpu_count() or 1))

Bounds = tuple[tuple[int, int], ...]  # (start, stop) on every axis
Holder = Callable[[str], GGUFFile]  # tensor name → the file that it is in
Structs = tuple[jax.ShapeDtypeStruct, ...]
Device = Any  # `jax.Device`, of which type checkers know nothing


def load(
    source: str | Path | Checkpoint,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
    mtp_path: str | Path | None = None,
    wide: bool = False,
    on_host: bool = False,
) -> tuple[Weights, Checkpoint]:
    """Load a model file; with a mesh, every leaf is sharded as its logical axes say.

    Returns the weights, all of them in place, and the open checkpoint (config, metadata). Beside the weights this needs
    at most SLAB_BYTES * IN_FLIGHT bytes on the devices, and two to three times as many on the host. Raises GGUFError or
    ConfigError. progress: a bar, and what is left out, on stderr. mtp_path: a file with the MTP head, where `source`
    has none. wide: see `weights.abstract`. on_host: routed experts go to the host's pinned memory instead, one stack
    after the other; each is there twice for a moment.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if mtp_path is not None:
        checkpoint = checkpoint.with_mtp(mtp_path)
    if progress and checkpoint.left_out:
        print(without_images_note(checkpoint.left_out), file=sys.stderr)
    tree = weights.abstract(checkpoint.cfg, checkpoint.types, wide=wide)
    w = _load(tree, checkpoint.holder, mesh, progress, on_host)
    if checkpoint.drafter:
        w = dataclasses.replace(w, dspark=_load_drafter(checkpoint.drafter, checkpoint.cfg, mesh, progress))
    return w, checkpoint


def load_drafter(
    path: str | Path, main: Checkpoint, mesh: jax.sharding.Mesh | None = None, progress: bool = False
) -> tuple[Dspark, ModelConfig]:
    """The weights of the DSpark drafter in a file of its own, and the model's config with the drafter's in it.

    main: the model that it drafts for. Raises GGUFError or ConfigError.
    """
    opened = open_drafter(path, main)
    cfg = dataclasses.replace(main.cfg, drafter=opened.cfg)
    return _load_drafter(opened, cfg, mesh, progress), cfg


def _load_drafter(drafter: Drafter, cfg: ModelConfig, mesh: jax.sharding.Mesh | None, progress: bool) -> Dspark:
    return _load(weights.abstract_drafter(cfg, drafter.types), lambda _: drafter.file, mesh, progress)


def _load[Tree: (Weights, Dspark)](
    tree: Tree, holder: Holder, mesh: jax.sharding.Mesh | None, progress: bool, on_host: bool = False
) -> Tree:
    tree = tree if mesh is None else weights.even(tree, mesh)
    every, treedef = jax.tree.flatten(tree)
    specs = [spec for spec in every if not (on_host and residency.hosted(spec))]
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = [[one] * len(jax.tree.leaves(spec.struct())) for spec in specs]
    else:  # refuses what does not divide before anything is read
        shardings = [jax.tree.leaves(spec.shardings(mesh)) for spec in specs]
    shards = [_shards(spec, planes) for spec, planes in zip(specs, shardings, strict=True)]
    size = sum(shard.nbytes for of_leaf in shards for shard in of_leaf)
    size += sum(spec.nbytes for spec in every if spec not in specs)
    with meter(size, "loading", "B", show=progress) as bar:
        _stream(holder, [shard for of_leaf in shards for shard in of_leaf], bar.update)
        leaves = {parts[0]: _leaf(*parts) for parts in zip(specs, shardings, shards, strict=True)}
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            leaves |= {spec: _to_host(holder, spec, pool, bar.update) for spec in every if spec not in leaves}
    return jax.block_until_ready(jax.tree.unflatten(treedef, [leaves[spec] for spec in every]))


def _to_host(holder: Holder, spec: WeightSpec, pool: ThreadPoolExecutor, advance: Callable[[float], object]) -> Any:
    """A stack in the host's pinned memory."""
    planes, treedef = jax.tree.flatten(spec.struct())
    made = [np.empty(p.shape, p.dtype) for p in planes]
    row_bytes = sum(p.shape[-1] * p.dtype.itemsize for p in planes)

    def read(slab: Bounds) -> None:
        at = tuple(slice(*bounds) for bounds in slab)
        _read_rows(holder, spec, slab, jax.tree.unflatten(treedef, [plane[at] for plane in made]))

    slabs = list(_slabs(planes[0].shape[:-1], row_bytes))
    for _ in pool.map(read, slabs):
        advance(spec.nbytes / len(slabs))
    there = residency.host_memory()
    return jax.block_until_ready(jax.tree.unflatten(treedef, [jax.device_put(plane, there) for plane in made]))


@dataclasses.dataclass
class _Shard:
    """One part of a weight, which some devices hold.

    rows: of the weight, on all axes but the last. columns: of each plane, on the last axis, in which alone planes
    differ. arrays: the planes on each device; None until they are there, or allocated for slabs to be written into.
    """

    spec: WeightSpec
    rows: Bounds
    columns: tuple[slice, ...]
    structs: Structs
    devices: list[Device]
    arrays: list[list[jax.Array]] | None = None

    @property
    def nbytes(self) -> int:
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in self.structs)

    @functools.cached_property
    def slabs(self) -> list[Bounds]:
        """Rows of the shard, read at a time."""
        whole_rows = sum(p.shape[-1] * p.dtype.itemsize for p in jax.tree.leaves(self.spec.struct()))
        return list(_slabs(self.structs[0].shape[:-1], whole_rows))

    @property
    def kinds(self) -> list[tuple[Structs, Structs, Device]]:
        """For each device the arguments of the `_compile` whose programs allocate the shard, and write a slab."""
        lengths = [stop - start for start, stop in self.slabs[0]]
        slab = tuple(jax.ShapeDtypeStruct((*lengths, p.shape[-1]), p.dtype) for p in self.structs)
        return [(self.structs, slab, device) for device in self.devices]


def _shards(spec: WeightSpec, shardings: Sequence[jax.sharding.Sharding]) -> list[_Shard]:
    structs = jax.tree.leaves(spec.struct())
    maps = [s.addressable_devices_indices_map(p.shape) for p, s in zip(structs, shardings, strict=True)]
    # Devices that hold the same part of the weight are served by one read.
    holders: dict[str, list[Device]] = {}
    for device in maps[0]:
        holders.setdefault(str([m[device] for m in maps]), []).append(device)
    out = []
    for devices in holders.values():
        bounds = [
            tuple(s.indices(n)[:2] for s, n in zip(m[devices[0]] or (), p.shape, strict=True))
            for m, p in zip(maps, structs, strict=True)
        ]
        shapes = [tuple(stop - start for start, stop in b) for b in bounds]
        parts = tuple(jax.ShapeDtypeStruct(s, p.dtype) for s, p in zip(shapes, structs, strict=True))
        out.append(_Shard(spec, bounds[0][:-1], tuple(slice(*b[-1]) for b in bounds), parts, devices))
    return out


def _leaf(spec: WeightSpec, shardings: Sequence[jax.sharding.Sharding], shards: list[_Shard]):
    """The weight of which `shards`, all loaded, are the parts."""
    structs, treedef = jax.tree.flatten(spec.struct())
    planes = zip(*(arrays for shard in shards for arrays in shard.arrays or ()), strict=True)
    arrays = [
        jax.make_array_from_single_device_arrays(p.shape, s, list(parts))
        for p, s, parts in zip(structs, shardings, planes, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def _stream(holder: Holder, shards: list[_Shard], advance: Callable[[float], object]) -> None:
    """Load all shards. advance: called with the number of bytes whenever some have arrived."""
    small = [shard for shard in shards if len(shard.slabs) == 1]
    large = [shard for shard in shards if len(shard.slabs) > 1]
    pending: collections.deque[tuple[_Shard, Bounds, Future]] = collections.deque()

    def finish_one() -> None:
        shard, slab, future = pending.popleft()
        pieces = future.result()
        if shard.arrays is None:
            shard.arrays = pieces
        else:
            at = np.array([start for start, _ in slab], np.int32)
            for i, kind in enumerate(shard.kinds):
                _, write = programs[kind]
                shard.arrays[i] = write(shard.arrays[i], pieces[i], at)
        jax.block_until_ready(pieces)
        advance(shard.nbytes / len(shard.slabs))

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        kinds = list(dict.fromkeys(kind for shard in large for kind in shard.kinds))
        programs = dict(zip(kinds, pool.map(lambda kind: _compile(*kind), kinds), strict=True))
        # What stays comes first, so that slabs, which come and go, leave no holes in the device's memory.
        for shard in large:
            shard.arrays = [programs[kind][0]() for kind in shard.kinds]
        for shard in small + large:
            for slab in shard.slabs:
                if len(pending) == IN_FLIGHT:
                    finish_one()
                pending.append((shard, slab, pool.submit(_read, holder, shard, slab)))
        while pending:
            finish_one()


def _compile(whole: Structs, slab: Structs, device: Device) -> tuple[Callable, Callable]:
    """Programs for planes on a device: () → zeros, and (planes, those of a slab, where they go) → planes, in place."""
    here = jax.sharding.SingleDeviceSharding(device)

    def write(planes, parts, at):
        at = (*at, jnp.int32(0))
        return [lax.dynamic_update_slice(plane, part, at) for plane, part in zip(planes, parts, strict=True)]

    zeros = jax.jit(lambda: [jnp.zeros(p.shape, p.dtype) for p in whole], out_shardings=here)
    at = jax.ShapeDtypeStruct((len(slab[0].shape) - 1,), np.int32)
    args = [p.update(sharding=here) for p in whole], [p.update(sharding=here) for p in slab], at
    return zeros.lower().compile(), jax.jit(write, donate_argnums=0).lower(*args).compile()


def _slabs(shape: tuple[int, ...], row_bytes: int) -> Iterator[Bounds]:
    """Cut an index space of rows into boxes of at most SLAB_BYTES, in file order, all of one shape.

    So that this is possible, the last of a run begins before the end of the one before it.
    """
    if not shape:
        yield ()
        return
    n, others = shape[0], shape[1:]
    inner = math.prod(others) * row_bytes
    if inner > SLAB_BYTES and others:
        for i in range(n):
            for rest in _slabs(others, row_bytes):
                yield ((i, i + 1), *rest)
        return
    most = max(1, SLAB_BYTES // max(1, inner))
    step = -(-n // -(-n // most))
    for start in range(0, n, step):
        start = min(start, n - step)
        yield ((start, start + step), *((0, size) for size in others))


def _read(holder: Holder, shard: _Shard, slab: Bounds) -> list[list[jax.Array]]:
    """A slab of a shard: for each of its devices the planes, on their way there; file pages given back."""
    spec = dataclasses.replace(shard.spec, format=shard.spec.stored)
    rows = tuple((start + first, stop + first) for (start, stop), (first, _) in zip(slab, shard.rows, strict=True))
    structs, treedef = jax.tree.flatten(spec.struct())
    # Fresh memory for every slab: on a CPU, JAX may go on using it as it is.
    fresh = np.zeros if spec.missing else np.empty
    planes = [fresh((*(stop - start for start, stop in rows), p.shape[-1]), p.dtype) for p in structs]
    _read_rows(holder, spec, rows, jax.tree.unflatten(treedef, planes))
    if spec != shard.spec:
        whole = [jax.device_put(jax.tree.unflatten(treedef, planes), device) for device in shard.devices]
        made = (jax.tree.leaves(_repack(shard.spec.format)(w)) for w in whole)
        return [[p[..., columns] for p, columns in zip(planes, shard.columns, strict=True)] for planes in made]
    planes = [plane[..., columns] for plane, columns in zip(planes, shard.columns, strict=True)]
    return [[jax.device_put(plane, device) for plane in planes] for device in shard.devices]


@functools.cache
def _repack(fmt: Any) -> Callable:
    """The `repack` of a wide format, compiled: it runs on the device, where the fewer bytes of the file go."""
    return jax.jit(fmt.repack)


def _read_rows(holder: Holder, spec: WeightSpec, rows: Bounds, out) -> None:
    """Rows of a weight into `out`, its planes on the host; those of a layered one lie in several tensors."""
    if not spec.layered:
        return _read_tensor(holder, spec, 0, rows, out)
    for i, nth in enumerate(range(*rows[0])):
        _read_tensor(holder, spec, nth, rows[1:], jax.tree.map(lambda plane, i=i: plane[i], out))


def _read_tensor(holder: Holder, spec: WeightSpec, nth: int, rows: Bounds, out) -> None:
    """Rows of the nth tensor of a weight into `out`, its planes on the host. Experts that no file has are left out."""
    name = spec.tensors[nth].name
    file = holder(name)
    info = file.tensors[name]
    if spec.missing:
        (first, stop), *inner = rows
        rows = ((first, max(first, min(stop, info.shape[0]))), *inner)
        out = jax.tree.map(lambda plane: plane[: rows[0][1] - first], out)
        if rows[0][1] == first:
            return
    if isinstance(file, PackedFile):
        return file.read(name, rows, vars(out) if spec.quantized else {"values": out}, spec.part)
    stride = info.nbytes // info.shape[0]
    span = (rows[0][0] * stride, rows[0][1] * stride) if rows else (0, info.nbytes)
    file.will_need(name, *span)
    raw = file.raw(name)[tuple(slice(*r) for r in rows)]
    i, n = spec.part
    raw = raw[..., raw.shape[-1] * i // n : raw.shape[-1] * (i + 1) // n]
    if isinstance(spec.format, np.dtype):
        out[...] = raw.view(np.int32 if info.type == GGMLType.I32 else FORMATS[info.type].planes["values"][0])
    else:
        spec.format.split(raw, vars(out))
    file.drop_pages(name, *span)
