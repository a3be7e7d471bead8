"""A hash of a model file's whole content, computed once for each file and kept in the user's cache. No JAX here.

It is the SHA-256 of the SHA-256 of each 64 MiB, so that several threads can compute it. What is kept is believed as
long as size, times, inode and device of the file are the same. The time of the last change of the inode, which nobody
can set, is among them: a file that was written and given its old time of modification is hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from ds4jax.errors import Ds4Error
from ds4jax.files import write_whole
from ds4jax.paths import cache_dir

AT_ONCE = 1 << 30
"""Bytes of a file that is hashed whenever it is asked for, in a second or so: its hash is not kept."""
PIECE = 64 << 20
"""Bytes that are hashed as one."""
SAMPLES, BLOCK = 1024, 4096
"""Blocks that `sample` reads, and their bytes."""
THREADS = 4
"""Threads that hash; a core of 2024 does about 1.2 GB/s."""
_READ = 1 << 20  # bytes that are read at once, which stay in a core's cache

log = logging.getLogger(__name__)


class Changed(Ds4Error):
    """A file is not the one that was opened."""


def lookup(path: Path, status: os.stat_result) -> str | None:
    """The hash of the file at `path`, if it is kept or the file is small. status: of the file as it was opened.

    Raises Changed if another file is there, and OSError if it cannot be read.
    """
    if status.st_size <= AT_ONCE:
        return compute(path, status)
    _check(path, status)
    try:
        kept = json.loads(_place(path).read_bytes())
    except (Ds4Error, OSError, ValueError):
        return None
    found = kept.pop("hash", None) if isinstance(kept, dict) else None
    return found if kept == _identity(path, status) and isinstance(found, str) else None


def sample(path: Path, status: os.stat_result) -> str:
    """A hash of the size and of SAMPLES evenly spaced blocks of the file at `path`, first and last ones among them.

    Two files of one size that differ only between the blocks have the same. status: of the file as it was opened.
    Raises Changed if another file is there, and OSError if it cannot be read.
    """
    _check(path, status)
    digest, last = hashlib.sha256(str(status.st_size).encode()), max(0, status.st_size - BLOCK)
    with open(path, "rb", buffering=0) as file:
        for i in range(SAMPLES):
            digest.update(os.pread(file.fileno(), BLOCK, last * i // (SAMPLES - 1)))
    return digest.hexdigest()


def compute(path: Path, status: os.stat_result, stopped: Callable[[], bool] = lambda: False) -> str:
    """Hash the file at `path`, and keep the hash of a large one. status: of the file as it was opened.

    stopped: asked now and then, whether to give up. Raises Changed if another file is there or it changes meanwhile,
    InterruptedError if stopped, and OSError if it cannot be read.
    """
    _check(path, status)
    digests = _digests(path, status.st_size, stopped)
    _check(path, status)
    found = hashlib.sha256(b"".join(digests)).hexdigest()
    if status.st_size > AT_ONCE:
        try:
            write_whole(_place(path), [json.dumps({**_identity(path, status), "hash": found}).encode()])
        except (Ds4Error, OSError) as e:
            log.warning("%s: its hash is not kept, so the next start computes it again: %s", path, e)
    return found


def _digests(path: Path, size: int, stopped: Callable[[], bool]) -> list[bytes]:
    """The SHA-256 of each piece, by this thread and as many others as can be started, up to THREADS.

    They end with the process, unlike those of a pool, and at once if one of them fails.
    """
    starts = iter(range(0, size, PIECE))  # of all threads
    digests: dict[int, bytes] = {}
    errors: list[BaseException] = []

    def ended() -> bool:
        return bool(errors) or stopped()

    def work() -> None:
        try:
            with open(path, "rb", buffering=0) as file:
                buffer = memoryview(bytearray(_READ))
                for start in starts:
                    digests[start] = _digest(file.fileno(), start, min(start + PIECE, size), buffer, ended)
        except BaseException as e:
            errors.append(e)

    threads: list[threading.Thread] = []
    with contextlib.suppress(RuntimeError):  # there are too many threads already
        while len(threads) < THREADS - 1:
            thread = threading.Thread(target=work, name="content", daemon=True)
            thread.start()
            threads.append(thread)
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [digests[start] for start in sorted(digests)]


def _digest(fd: int, start: int, end: int, buffer: memoryview, stopped: Callable[[], bool]) -> bytes:
    """The SHA-256 of bytes [start, end)."""
    digest = hashlib.sha256()
    while start < end:
        if stopped():
            raise InterruptedError(f"stopped at byte {start}")
        if not (n := os.preadv(fd, [buffer[: end - start]], start)):
            raise Changed(f"it ends at byte {start}, expected {end} or more")
        digest.update(buffer[:n])
        start += n
    return digest.digest()


def _check(path: Path, status: os.stat_result) -> None:
    if _identity(path, os.stat(path)) != _identity(path, status):
        raise Changed(f"{path}: it was replaced or changed after it was opened")


def _identity(path: Path, status: os.stat_result) -> dict[str, str | int]:
    names = "st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev"
    return {"path": str(path.resolve()), **{name: getattr(status, name) for name in names}}


def _place(path: Path) -> Path:
    """Where a file's hash is kept. Raises Ds4Error without a cache directory."""
    return cache_dir() / f"content-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
