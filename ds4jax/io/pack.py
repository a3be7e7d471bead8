"""A GGUF file → a folder of its planes in Orbax's format, which any mesh loads its parts of; `io.packed` reads it.

Group after group is read, split into planes, written by Orbax, read back and compared, so that memory has the largest
group two or three times at most, not the model. What is complete of a group is noted beside it; an interrupted
conversion goes on with the first group that is not, if it is one of the same files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from ds4jax.errors import Ds4Error, GGUFError, show
from ds4jax.files import sync_folder, write_whole
from ds4jax.formats import FORMATS
from ds4jax.io import content_hash
from ds4jax.io.checkpoint import Checkpoint
from ds4jax.io.gguf import GGUFFile
from ds4jax.io.packed import HEADERS, MANIFEST, UNFINISHED, VERSION, Manifest, PackedFile, open_plane, sha256, shared
from ds4jax.terminal import Progress, meter

Sources = dict[str, list[dict[str, Any]]]  # of a `Manifest`

_DONE = "done"  # folder of what is noted of complete groups, until all are
_LOCK = ".lock"
_MARGIN = 2**28  # bytes of disk beyond the planes: headers, trees, manifest
_CHUNKS = 8  # that a large matrix is cut into
_LEAST_CHUNK = 2**20  # bytes


def pack(source: Checkpoint, folder: str | Path, progress: bool = False) -> Manifest:
    """Write a model, with its MTP head or drafter if there is one, to a folder; go on where it was interrupted.

    If the folder is complete and of the same files, nothing is done. progress: a bar on stderr. Raises Ds4Error if the
    folder has anything else in it or the disk has no room, or if what is read back is not what was written.
    """
    folder = Path(folder).expanduser().absolute()
    files = {"model": source.file, "mtp": source.mtp_file, "drafter": source.drafter and source.drafter.file}
    files = {role: file for role, file in files.items() if file}
    for file in files.values():
        if isinstance(file, PackedFile):
            raise GGUFError(f"{file.path.parent}: found a folder of `ds4jax checkpoint`, expected a GGUF file")
    try:
        if folder.exists() and not folder.is_dir():
            raise Ds4Error(f"{folder}: found a file, expected a folder to write to")
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            return _pack(files, folder, progress)
    except OSError as error:
        raise Ds4Error(f"{folder}: cannot be written: {error.strerror or error}") from error


def _pack(files: dict[str, GGUFFile], folder: Path, progress: bool) -> Manifest:
    if (folder / MANIFEST).exists():
        manifest = Manifest.read(folder)
        _check_same(folder, manifest.sources, _sources(files, progress))
        manifest.check_sizes(folder)
        _clear(folder)
        return manifest
    begun = folder / UNFINISHED
    known = _LOCK, f"{UNFINISHED}.tmp"  # the latter of a process that was killed at once
    if not begun.exists() and (found := sorted(p.name for p in folder.iterdir() if p.name not in known)):
        raise Ds4Error(f"{folder}: found {show(found[0])} in it, expected an empty folder")
    sources = _sources(files, progress)
    if begun.exists():
        _check_same(folder, _noted(begun), sources)
    else:
        write_whole(begun, [json.dumps({"version": VERSION, "sources": sources}).encode()])
    (folder / _DONE).mkdir(exist_ok=True)
    manifest = Manifest(sources, {role: {} for role in files}, _headers(files, folder))
    groups = [(role, *group) for role, file in files.items() for group in _groups(file).items()]
    total = sum(file.info(name).nbytes for file in files.values() for name in file.tensors)
    with meter(total, "converting", "B", show=progress) as bar:
        for role, group, names in groups:
            note = folder / _DONE / f"{role}.{group}.json"
            made = _complete(note, folder)
            if made is None:
                _check_disk(folder, total - int(bar.n))
                made = _write(files[role], names, folder / role / group, bar)
                write_whole(note, [json.dumps(made).encode()])
            else:
                bar.update(sum(files[role].info(name).nbytes for name in names))
            manifest.tensors[role].update(made["tensors"])
            manifest.files.update(made["files"])
    manifest.write(folder)
    _clear(folder)
    return manifest


def _clear(folder: Path) -> None:
    """Remove what a complete folder no longer needs; a process may have been killed before it did."""
    (folder / UNFINISHED).unlink(missing_ok=True)
    shutil.rmtree(folder / _DONE, ignore_errors=True)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While the block runs, no other process converts to the folder. Raises Ds4Error if one does."""
    with open(folder / _LOCK, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Ds4Error(f"{folder}: another process is converting to it") from None
        yield


def _sources(files: dict[str, GGUFFile], progress: bool) -> Sources:
    """The files that a folder is made of, for `Manifest`."""

    def describe(part: GGUFFile) -> dict[str, Any]:
        digest = content_hash.lookup(part.path, part.status)
        if digest is None:
            if progress:
                print(f"reading {part.path} for its hash", file=sys.stderr, flush=True)
            digest = content_hash.compute(part.path, part.status)
        return {"name": part.path.name, "size": part.status.st_size, "hash": digest}

    return {role: [describe(part) for part in file.parts] for role, file in files.items()}


def _noted(begun: Path) -> Sources:
    """The files of an interrupted conversion. Raises GGUFError if that was another version's."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(begun.read_bytes())
        if said["version"] == VERSION:
            return said["sources"]
    raise GGUFError(f"{begun}: found no conversion of version {VERSION}, expected one; choose an empty folder")


def _check_same(folder: Path, found: Sources, expected: Sources) -> None:
    if found != expected:
        names = ", ".join(part["name"] for parts in found.values() for part in parts)
        wanted = ", ".join(part["name"] for parts in expected.values() for part in parts)
        same = " with the same content" if names == wanted else ""
        raise GGUFError(f"{folder}: found a conversion of {names}, expected one of {wanted}{same}")


def _headers(files: dict[str, GGUFFile], folder: Path) -> dict[str, dict[str, Any]]:
    """Copies what files have before their tensors; → `Manifest.files` of these copies."""
    (folder / HEADERS).mkdir(exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for part in (part for file in files.values() for part in file.parts):
        name = f"{HEADERS}/{part.path.name}"
        if name in found:
            raise GGUFError(f"{part.path}: found two files of this name, expected different ones")
        with GGUFFile.open(part.path, part=True) as plain:
            end = min((t.offset for t in plain.tensors.values()), default=part.status.st_size)
        with open(part.path, "rb") as file:
            data = file.read(end)
        write_whole(folder / name, [data], mode=0o666)
        found[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return found


def _groups(file: GGUFFile) -> dict[str, list[str]]:
    """Group → the tensors in it, as `io.packed` says."""
    found: dict[str, list[str]] = {}
    for name, info in file.tensors.items():
        layer = re.match(r"(?:blk|mtp)\.\d+(?=\.)", name)
        group = layer[0] if layer and len(info.shape) < 3 else name.removesuffix(".weight")
        found.setdefault(group, []).append(name)
    return found


def _complete(note: Path, folder: Path) -> dict[str, Any] | None:
    """What is noted of a group, if it is there and complete."""
    try:
        made = json.loads(note.read_bytes())
        Manifest({}, {}, made["files"]).check_sizes(folder)
    except (OSError, ValueError, GGUFError):
        return None
    return made


def _check_disk(folder: Path, need: int) -> None:
    if (free := shutil.disk_usage(folder).free) < need + _MARGIN:
        raise Ds4Error(f"{folder}: found {free:,} bytes free on its disk, expected {need + _MARGIN:,}")


def _write(file: GGUFFile, names: list[str], place: Path, bar: Progress) -> dict[str, Any]:
    """Write a group as an Orbax checkpoint, and compare it with what was written; → what the manifest says of it.

    Raises GGUFError if it is not the same, and Ds4Error if it cannot be written.
    """
    import orbax.checkpoint as ocp

    for left in (place, *place.parent.glob(f"{place.name}.orbax-checkpoint-tmp*")):
        shutil.rmtree(left, ignore_errors=True)
    tree = {}
    for name in names:
        tree[file.info(name).name] = _planes(file, name)
        bar.update(file.info(name).nbytes)
    chunks = {name: {plane: _chunks(x, ocp) for plane, x in planes.items()} for name, planes in tree.items()}
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # it warns of small chunks, and logs what is raised here
    try:
        with ocp.PyTreeCheckpointer(use_zarr3=True, use_compression=False) as checkpointer:
            checkpointer.save(place, tree, save_args=chunks)
    except ValueError as error:  # tensorstore's, with the system's words at its end
        what = ": ".join(str(error).split("\n")[0].split(": ")[-2:])
        raise Ds4Error(f"{place}: cannot be written: {what}") from error
    context = shared()

    def described(tensor: str, plane: str, written: np.ndarray) -> dict[str, Any]:
        found = open_plane(place, tensor, plane, context).read().result()
        if not np.array_equal(_bytes(found), _bytes(written)):
            raise GGUFError(f"{place}: tensor {show(tensor)}: found another plane {plane!r} than was written")
        return _described(written)

    every = [(tensor, plane, x) for tensor, planes in tree.items() for plane, x in planes.items()]
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    for part in {path.parent for path in paths}:
        sync_folder(part)
    tensors: dict[str, dict[str, Any]] = {tensor: {"group": place.name, "planes": {}} for tensor in tree}
    with ThreadPoolExecutor() as pool:
        for (tensor, plane, _), about in zip(every, pool.map(lambda one: described(*one), every), strict=True):
            tensors[tensor]["planes"][plane] = about
        digests = list(pool.map(sha256, paths))
    root = place.parent.parent
    found = {
        str(path.relative_to(root)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    return {"tensors": tensors, "files": found}


def _planes(file: GGUFFile, name: str) -> dict[str, np.ndarray]:
    """A tensor's planes, in memory."""
    info = file.info(name)
    if info.type == GGMLType.I32:
        return {"values": np.array(file.array(name))}
    planes = FORMATS[info.type].from_bytes(file.raw(name))
    file.drop_pages(name)
    return planes


def _chunks(plane: np.ndarray, ocp: Any) -> Any:
    """Orbax's arguments for a plane: a chunk for each expert; some of a large matrix; else one."""
    if plane.ndim == 3:
        return ocp.SaveArgs(shard_axes=(0,))
    size = max(plane.nbytes // _CHUNKS, _LEAST_CHUNK)
    return ocp.SaveArgs(chunk_byte_size=size) if plane.nbytes > size else ocp.SaveArgs()


def _bytes(plane: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(plane).reshape(-1).view(np.uint8)


def _described(plane: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(_bytes(plane).data).hexdigest()
    return {"dtype": plane.dtype.name, "shape": list(plane.shape), "nbytes": plane.nbytes, "sha256": digest}
