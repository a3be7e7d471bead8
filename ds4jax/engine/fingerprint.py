"""What must agree for a stored state to be the one that this process would compute, and the store of such states."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np

import ds4jax
from ds4jax.engine import compile_cache
from ds4jax.engine.kv_store import KVStore
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.snapshot import LAYOUT
from ds4jax.errors import Ds4Error
from ds4jax.io import content_hash
from ds4jax.io.checkpoint import Checkpoint
from ds4jax.io.gguf import GGUFFile
from ds4jax.io.synthetic import Synthetic
from ds4jax.model.tensors import tensor_table
from ds4jax.settings import Settings

log = logging.getLogger(__name__)


def open_store(folder: str | Path, budget_bytes: int, runner: ModelRunner) -> KVStore:
    """The store of a runner's states in `folder`. Raises Ds4Error as `KVStore` does.

    It is ready at once if the content of the model's files is known, which takes reading all of them once; else they
    are read in the background, and it is ready then. If one of them has changed since it was loaded, it stays unused.
    """
    files, store = _files(runner.checkpoint), KVStore(folder, budget_bytes, fingerprint(runner), None, runner.fits)
    with _unused_if_it_fails(store):
        hashes = [file.content or content_hash.lookup(file.path, file.status) for file in files]
        if None not in hashes:
            store.begin(" ".join(map(str, hashes)))
        else:
            threading.Thread(target=_begin_later, args=(store, files), name="content", daemon=True).start()
    return store


@contextlib.contextmanager
def _unused_if_it_fails(store: KVStore) -> Iterator[None]:
    """What makes a store ready is done inside; an error, such as a thread that cannot start, leaves it unused."""
    try:
        yield
    except (Ds4Error, OSError, RuntimeError) as e:
        if not store.closed:
            log.warning("%s: prefixes on disk are not used: %s", store.folder, e)


def _begin_later(store: KVStore, files: list[GGUFFile]) -> None:
    size = sum(file.status.st_size for file in files) / 1e9
    log.warning("%s: prefixes on disk are used once the model's %.1f GB have been read for a hash", store.folder, size)
    with _unused_if_it_fails(store):
        hashes = (file.content or content_hash.compute(file.path, file.status, lambda: store.closed) for file in files)
        store.begin(" ".join(hashes))
        if store.ready:
            log.warning("%s: %d prefixes on disk are in use from now on", store.folder, len(store))


def fingerprint(runner: ModelRunner) -> dict[str, str | int]:
    """Config, metadata (its tokenizer included) and types of the model, numerics, kind of device, layout of snapshots.

    Not the mesh: a sequence's state is the same on all, up to the order of sums.

    The content of the model's files is not in it: see `open_store`.
    """
    settings = runner.settings
    return {
        "model": _model(runner.checkpoint),
        "numerics": settings.numerics,
        "dtype": settings.dtype,
        "kernels": settings.kernels,
        "drafter": type(runner.steps.drafter).__name__,
        "device": jax.devices()[0].device_kind,
        "layout": LAYOUT,
    }


def content(runner: ModelRunner) -> str:
    """What tells the model's files from any others: a small file's hash, a large one's size and time of modification.

    Reading a large one whole would take minutes. Raises Ds4Error if a file has changed since it was opened.
    """
    said = []
    for file in _files(runner.checkpoint):
        status = file.status
        if file.content:
            said.append(file.content)
            continue
        large = status.st_size > content_hash.AT_ONCE
        said.append(f"{status.st_size} {status.st_mtime_ns}" if large else content_hash.compute(file.path, status))
    return ", ".join(said)


def of_hosts(settings: Settings, source: Checkpoint | Synthetic, batch: int | None) -> dict[str, Any]:
    """What all processes of one server must have alike, by names that a user knows, before a device is used.

    batch: number of slots, or None. The model's files may have other names and times elsewhere; of a large one, pieces
    are compared.
    """
    given = dataclasses.asdict(settings)
    for key in ("model", "draft"):  # places of files
        del given[key]
    content = " ".join(file.content or content_hash.sample(file.path, file.status) for file in _files(source))
    return {
        "ds4jax": f"{ds4jax.__version__}, sources {compile_cache.sources().hex()[:12]}",
        "jax": f"{jax.__version__}, jaxlib {jaxlib.version.__version__}",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **given,
        "max_seqs": settings.batch if batch is None else batch,
        "the model file's content": hashlib.sha256(f"{_model(source)} {content}".encode()).hexdigest()[:16],
    }


def of_runner(runner: ModelRunner) -> dict[str, Any]:
    """What all processes of one server must have alike once the model is loaded."""
    return {
        "the kind of device": jax.local_devices()[0].device_kind,
        "experts in the wide layout": runner.steps.wide,
        "drafts": runner.steps.draft_counts[-1] if runner.steps.draft_counts else 0,
        "lengths of chunks": str(sorted(runner.steps.prefill_sizes)),
    }


def _model(source: Checkpoint | Synthetic) -> str:
    digest = hashlib.blake2b(repr(source.cfg).encode(), digest_size=16)
    if isinstance(source, Synthetic):
        types = [(spec.name, int(source.types(spec))) for spec in tensor_table(source.cfg)]
        digest.update(repr((types, source.seed)).encode())
        return digest.hexdigest()
    for key, value in sorted(source.file.metadata.items()):
        digest.update(repr((key, value.tolist() if isinstance(value, np.ndarray) else value)).encode())
    drafter = source.drafter.file.tensors if source.drafter else {}
    for info in [*(source.holder(name).info(name) for name in sorted(source.types)), *drafter.values()]:
        digest.update(repr((info.name, info.shape, int(info.type))).encode())
    return digest.hexdigest()


def _files(source: Checkpoint | Synthetic) -> list[GGUFFile]:
    """What a model is loaded from; a synthetic one, which its seed describes, from nothing."""
    if isinstance(source, Synthetic):
        return []
    files = source.file, source.mtp_file, source.drafter.file if source.drafter else None
    return [part for file in files if file for part in file.parts]
