"""GGUF file → weights on the devices: file pages → host chunk → its shards, and never the whole model in host memory.

The tree of `weights.abstract` says what to read and where it goes. Each device receives its own shard in slabs of at
most CHUNK_BYTES; once a slab is on its devices, its file pages are given back to the system.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import lax
from tqdm import tqdm

from ds4jax import weights
from ds4jax.checkpoint import Checkpoint, open_checkpoint
from ds4jax.quant import FORMATS
from ds4jax.weights import Weights, WeightSpec

CHUNK_BYTES = 256 * 2**20

Index = tuple[slice, ...]


def load(
    source: str | Path | Checkpoint,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
    mtp_path: str | Path | None = None,
) -> tuple[Weights, Checkpoint]:
    """Load a model file; with a mesh, every leaf is sharded as its logical axes say.

    Returns the weights and the open checkpoint (config, metadata). Raises GGUFError or ConfigError.
    progress: show a bar on stderr. mtp_path: a file with the model's MTP head, where `source` has none.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if mtp_path is not None:
        checkpoint = checkpoint.with_mtp(mtp_path)
    tree = weights.abstract(checkpoint.cfg, checkpoint.types)
    specs, treedef = jax.tree.flatten(tree)
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = [[one] * len(jax.tree.leaves(spec.struct())) for spec in specs]
    else:  # refuses what does not divide before anything is read
        shardings = [jax.tree.leaves(spec.shardings(mesh)) for spec in specs]
    with tqdm(total=weights.nbytes(tree), unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        leaves = [
            _load_leaf(checkpoint, spec, planes, bar.update) for spec, planes in zip(specs, shardings, strict=True)
        ]
    return jax.tree.unflatten(treedef, leaves), checkpoint


def _load_leaf(checkpoint: Checkpoint, spec: WeightSpec, shardings: list, advance: Callable[[int], object]):
    structs, treedef = jax.tree.flatten(spec.struct())
    maps = [s.addressable_devices_indices_map(p.shape) for p, s in zip(structs, shardings, strict=True)]
    # Devices that hold the same part of the weight are served by one read.
    holders: dict[str, list[jax.Device]] = {}
    for device in maps[0]:
        holders.setdefault(str([m[device] for m in maps]), []).append(device)

    shards: list[list[jax.Array]] = [[] for _ in structs]
    for devices in holders.values():
        indices = [_bounds(m[devices[0]], p.shape) for m, p in zip(maps, structs, strict=True)]
        for plane, parts in zip(shards, _load_shard(checkpoint, spec, structs, indices, devices), strict=True):
            plane += parts
    advance(spec.nbytes)
    arrays = [
        jax.make_array_from_single_device_arrays(p.shape, s, parts)
        for p, s, parts in zip(structs, shardings, shards, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _load_shard(checkpoint, spec: WeightSpec, structs, indices, devices) -> list[list[jax.Array]]:
    """One part of a weight onto each of `devices`: per plane, the list of single-device arrays.

    indices: per plane, the (start, stop) of the part on every axis. Planes differ only on the last axis.
    """
    rows = indices[0][:-1]
    row_bytes = sum((i[-1][1] - i[-1][0]) * p.dtype.itemsize for i, p in zip(indices, structs, strict=True))
    shapes = [tuple(stop - start for start, stop in i) for i in indices]
    out: list[list[jax.Array]] | None = None
    for slab in _slabs(tuple(stop - start for start, stop in rows), row_bytes):
        at = tuple(start for start, _ in slab)
        absolute = tuple((start + r[0], stop + r[0]) for (start, stop), r in zip(slab, rows, strict=True))
        planes = [p[..., slice(*i[-1])] for p, i in zip(_read(checkpoint, spec, absolute), indices, strict=True)]
        if planes[0].shape == shapes[0]:  # the part in one piece
            return [[jax.device_put(p, d) for d in devices] for p in planes]
        if out is None:
            out = [
                [jax.device_put(jax.numpy.zeros(s, p.dtype), d) for d in devices]
                for s, p in zip(shapes, structs, strict=True)
            ]
        out = [
            [_write(a, jax.device_put(p, d), (*at, 0)) for a, d in zip(arrays, devices, strict=True)]
            for arrays, p in zip(out, planes, strict=True)
        ]
        jax.block_until_ready(out)  # so that no more than one slab is in flight on the host
    assert out is not None
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, part: jax.Array, at: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_update_slice(whole, part, at)


def _slabs(shape: tuple[int, ...], row_bytes: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Cut an index space of rows into boxes of at most CHUNK_BYTES, as (start, stop) per axis, in file order."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:]) * row_bytes
    if inner > CHUNK_BYTES and len(shape) > 1:
        for i in range(shape[0]):
            for rest in _slabs(shape[1:], row_bytes):
                yield ((i, i + 1), *rest)
        return
    step = max(1, CHUNK_BYTES // max(1, inner))
    for start in range(0, shape[0], step):
        yield ((start, min(start + step, shape[0])), *((0, n) for n in shape[1:]))


def _read(checkpoint: Checkpoint, spec: WeightSpec, rows: tuple[tuple[int, int], ...]) -> list[np.ndarray]:
    """The planes of the given rows (all axes but the last) of a weight, freshly allocated; file pages given back."""
    if not spec.layered:
        return _read_tensor(checkpoint, spec, 0, rows)
    layers = [_read_tensor(checkpoint, spec, layer, rows[1:]) for layer in range(*rows[0])]
    if len(layers) == 1:  # large layers come alone, and stacking would copy them
        return [plane[None] for plane in layers[0]]
    return [np.stack(planes) for planes in zip(*layers, strict=True)]


def _read_tensor(
    checkpoint: Checkpoint, spec: WeightSpec, nth: int, rows: tuple[tuple[int, int], ...]
) -> list[np.ndarray]:
    tensor = spec.tensors[nth]
    file = checkpoint.holder(tensor.name)
    info = file.tensors[tensor.name]
    raw = file.raw(tensor.name)[tuple(slice(*r) for r in rows)]
    i, n = spec.part
    raw = raw[..., raw.shape[-1] * i // n : raw.shape[-1] * (i + 1) // n]
    if not spec.quantized:
        dtype = np.dtype(np.int32) if info.type == GGMLType.I32 else FORMATS[info.type].planes["values"][0]
        planes = [np.array(raw.view(dtype), spec.format)]
    else:
        planes = list(spec.format.from_bytes(raw).values())
    if rows:
        stride = info.nbytes // info.shape[0]
        file.drop_pages(tensor.name, rows[0][0] * stride, rows[0][1] * stride)
    return planes
