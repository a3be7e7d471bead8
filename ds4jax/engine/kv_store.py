"""Snapshots of the KV cache on disk, found by the tokens they were computed from. No JAX here.

    with KVStore(folder, 50 << 30, {"model": "…", "numerics": "official", "layout": 1}) as store:
        store.put(tokens, planes, extra)
        while entry := store.longest(prompt):           # the longest snapshot that `prompt` begins with
            if (loaded := store.load(entry)) is not None:
                planes, extra = loaded
                break

What is served is bit for bit what was put, by a store of the same fingerprint: each file has a checksum. A file comes
into being by a rename, after its bytes are on disk, so a process may be killed at any moment and loses at most what it
was writing. Trouble with a file is never an error here, but a warning in the log, and the snapshot is computed anew.

An entry is a file, see `kv_file`, named by a hash of fingerprint and tokens. Its time of modification is the entry's
last use. The entry of least value goes first when room is needed, see `eviction`.

Why the index is not a database: each file says itself what it holds, so there is no second record of it that could
disagree after a crash, and a damaged file costs only its own entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.engine import kv_file
from ds4jax.engine.eviction import values
from ds4jax.engine.keys import insert, key_of, longest, shared
from ds4jax.engine.kv_file import Damaged, Foreign, digest
from ds4jax.errors import Ds4Error
from ds4jax.files import write_whole

_OURS = re.compile(r"[0-9a-f]{32}\.kv")
_LEFTOVER = re.compile(r"[0-9a-f]{32}\.kv\.tmp")

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
    """One snapshot in a store. key: its tokens as bytes, u32 each. used: last use, nanoseconds since 1970."""

    path: Path
    key: bytes
    nbytes: int
    used: int

    @property
    def length(self) -> int:
        """How many tokens the snapshot holds the state of."""
        return len(self.key) // 4


class KVStore:
    """A folder of snapshots that only this process uses.

    Methods may be called from several threads; `put` in one does not hold up `longest` and `load` in others.
    """

    def __init__(self, folder: str | Path, budget_bytes: int, fingerprint: Mapping[str, str | int]):
        """Opens the store in `folder`, made if need be, and deletes what is damaged or beyond the budget.

        budget_bytes: what the files of this fingerprint may take together, at any time. fingerprint: all that must
            agree for a snapshot to be the state this process would compute. Entries of others are left alone.
            `seed` is a hash of it.

        Raises Ds4Error if `folder` is not a directory, cannot be used or is in use.
        """
        self.folder, self.budget = Path(folder), budget_bytes
        self._fingerprint = dict(sorted(fingerprint.items()))
        self.seed = digest(json.dumps(self._fingerprint).encode())
        self._entries: list[Entry] = []  # sorted by key: an entry stands before all that continue it, and next to them
        self._bytes = 0  # of entries on disk
        self._lock = threading.Lock()  # guards the two above; never held while data is read or written
        self._writing = threading.Lock()
        self._open = contextlib.ExitStack()
        try:
            self._lock_folder()
            self._clean()
            self._scan()
        except OSError as e:
            self.close()
            raise Ds4Error(f"{self.folder}: cannot be used as a store of snapshots: {e.strerror or e}") from e
        except BaseException:
            self.close()
            raise

    def _lock_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError as e:
            raise Ds4Error(f"{self.folder}: a directory for snapshots is expected here, found a file") from e
        lock = self._open.enter_context(open(self.folder / "lock", "ab"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Ds4Error(f"{self.folder}: in use by another process; give each server a folder of its own") from e

    def _clean(self) -> None:
        for name in os.listdir(self.folder):
            if _LEFTOVER.fullmatch(name):
                (self.folder / name).unlink()

    def _scan(self) -> None:
        now, foreign = time.time_ns(), []
        with os.scandir(self.folder) as files:
            paths = [Path(f) for f in files if _OURS.fullmatch(f.name) and f.is_file(follow_symlinks=False)]
        for path in sorted(paths):
            try:
                key, head, size, stat = kv_file.read_head(path)
                self._check(path, key, head)
                if size != stat.st_size:
                    raise Damaged(f"it has {stat.st_size} bytes, expected {size}")
            except Foreign as e:
                foreign.append((path, e))
            except Damaged as e:
                log.warning("%s: %s; deleted", path, e)
                path.unlink()
            except OSError as e:
                log.warning("%s: skipped, it cannot be read: %s", path, e)
            else:
                # A clock that was set back must not leave entries that seem to be used in the future.
                self._insert(Entry(path, key, stat.st_size, min(stat.st_mtime_ns, now)))
        if foreign:
            others = f" (and {len(foreign) - 1} more files)" if len(foreign) > 1 else ""
            log.warning("%s%s: left alone and not used: %s", foreign[0][0], others, foreign[0][1])
        self._evict(0)

    def close(self) -> None:
        """Let other processes have the folder."""
        self._open.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- what is there ------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._bytes

    def longest(self, tokens: Sequence[int] | np.ndarray) -> Entry | None:
        """The entry with the most tokens among those that `tokens` begins with (or equals), if there is one."""
        with self._lock:
            return longest(self._entries, key_of(tokens))

    def shared(self, tokens: Sequence[int] | np.ndarray) -> int:
        """How many tokens, at most, `tokens` and any entry have in common at their beginnings."""
        with self._lock:
            return shared(self._entries, key_of(tokens)) // 4

    def load(self, entry: Entry) -> tuple[dict[str, np.ndarray], Any] | None:
        """Planes (read-only) and `extra` of an entry, as they were put; counts as a use of it.

        None if it is gone or was found damaged: then it is no longer in the store, so ask `longest` again.
        """
        try:
            key, head, planes = kv_file.read(entry.path, entry.nbytes)
            self._check(entry.path, key, head)
            if key != entry.key:
                raise Damaged("it holds other tokens than before")
        except Damaged as e:
            log.warning("%s: %s; deleted", entry.path, e)
            with contextlib.suppress(OSError):
                self._drop(entry)
            return None
        except (Foreign, OSError) as e:
            if self._forget(entry):  # otherwise it was evicted in the meantime
                log.warning("%s: skipped, it cannot be read: %s", entry.path, e)
            return None
        self._touch(entry)
        return planes, head["extra"]

    # ---- what comes and goes ------------------------------------------------------------------------------------
    def put(self, tokens: Sequence[int] | np.ndarray, planes: Mapping[str, np.ndarray], extra: Any = None) -> bool:
        """Store the state after `tokens`, on disk when this returns. → whether the store has it now.

        planes: arrays of any shape and of any numeric dtype of NumPy or ml_dtypes, in native byte order. extra: JSON.
        If these tokens are stored already, only their last use is renewed. What exceeds the budget is not stored; nor
        is anything if the disk is full or fails (a warning says so).
        """
        if not len(tokens):
            raise ValueError("a snapshot needs at least one token")
        key = key_of(tokens)
        with self._writing:
            present = self.longest(tokens)
            if present and present.key == key:
                self._touch(present)
                return True
            pieces = kv_file.pieces_of(self._fingerprint, key, planes, extra)
            size = sum(map(len, pieces)) + kv_file.DIGEST
            if size > self.budget:
                log.info("a snapshot of %d bytes exceeds the budget for them, %d bytes", size, self.budget)
                return False
            entry = Entry(self._path(key), key, size, time.time_ns())
            try:
                self._evict(size, entry)
                write_whole(entry.path, kv_file.with_checksum(pieces), entry.used)
            except OSError as e:
                log.warning("%s: snapshot not saved: %s", entry.path, e)
                with contextlib.suppress(OSError):
                    entry.path.unlink()  # it is there if only the folder could not be synced
                return False
            self._insert(entry)
            return True

    def _evict(self, size: int, new: Entry | None = None) -> None:
        """Deletes entries until there is room for `size` more bytes, those of `new`."""
        while self._bytes + size > self.budget and self._entries:
            with self._lock:
                entries = self._entries.copy()
            if new:
                insert(entries, new)
            value = values(entries)
            victim = min((e for e in entries if e is not new), key=value.__getitem__)
            log.info("%s: evicted, %d tokens", victim.path, victim.length)
            self._drop(victim)

    def _insert(self, entry: Entry) -> None:
        with self._lock:
            insert(self._entries, entry)
            self._bytes += entry.nbytes

    def _forget(self, entry: Entry) -> bool:
        """Takes an entry out of the index. → whether it was there."""
        with self._lock:
            if there := entry in self._entries:
                self._entries.remove(entry)
        return there

    def _drop(self, entry: Entry) -> None:
        """Deletes an entry. What cannot be deleted still counts as taken."""
        if self._forget(entry):
            entry.path.unlink(missing_ok=True)
            with self._lock:
                self._bytes -= entry.nbytes

    def _touch(self, entry: Entry) -> None:
        entry.used = time.time_ns()
        with contextlib.suppress(OSError):
            os.utime(entry.path, ns=(entry.used, entry.used))

    # ---- files --------------------------------------------------------------------------------------------------
    def _path(self, key: bytes) -> Path:
        return self.folder / f"{digest(self.seed, key).hex()[:32]}.kv"

    def _check(self, path: Path, key: bytes, head: dict[str, Any]) -> None:
        found = head["fingerprint"]
        for what in sorted(found.keys() | self._fingerprint):
            if found.get(what) != self._fingerprint.get(what):
                raise Foreign(f"{what} is {found.get(what)!r}, here {self._fingerprint.get(what)!r}")
        if path != self._path(key):
            raise Damaged("its name does not fit its tokens")
