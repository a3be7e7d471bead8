"""Snapshots of the KV cache on disk, found by the tokens they were computed from. No JAX here.

    with KVStore(folder, 50 << 30, {"model": "…", "numerics": "official", "layout": 1}) as store:
        store.put(tokens, planes, extra)
        if entry := store.longest(prompt):              # the longest snapshot that `prompt` begins with
            if (loaded := store.load(entry)) is not None:
                planes, extra = loaded

What is served is bit for bit what was put, by a store of the same fingerprint: each file has a checksum. A file comes
into being by a rename, after its bytes are on disk, so a process may be killed at any moment and loses at most what it
was writing. Trouble with a file is never an error here, but a warning in the log, and the snapshot is computed anew.

An entry is a file, see `kv_file`, named by a hash of fingerprint and tokens. Its time of modification is the entry's
last use. All files of stores in the folder count, of any fingerprint. When room is needed, those that cannot be used
here go first, the one used longest ago before the others, then the entry of least value, see `eviction`. Before the
content of the model's file is known, those of this model in all else, which may be of use, are the last to go.

Why the index is not a database: each file says itself what it holds, so there is no second record of it that could
disagree after a crash, and a damaged file costs only its own entry.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.engine import kv_file
from ds4jax.engine.keys import key_of
from ds4jax.engine.kv_file import Damaged, Foreign, digest
from ds4jax.engine.kv_folder import lock_folder
from ds4jax.engine.kv_index import Entry, Index
from ds4jax.errors import Ds4Error, show
from ds4jax.files import write_whole

_ENTRY = re.compile(r"[0-9a-f]{32}\.kv")
_NOTES = re.compile(r"notes-[0-9a-f]{32}\.log")
MAX_FAILURES = 3
"""Times in a row that a file cannot be read before it is left alone."""
_BUSY = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}  # these pass, and say nothing about the file

log = logging.getLogger(__name__)


class KVStore:
    """A folder of snapshots that only this process uses.

    Methods may be called from several threads; `put` in one does not hold up `longest` and `load` in others.

    Attributes: folder, budget (bytes), seed (a hash of the fingerprint), notes (a file for what else is to be kept as
    long; it does not count, those of other fingerprints do), ready (whether entries are found and stored).
    """

    def __init__(
        self,
        folder: str | Path,
        budget_bytes: int,
        fingerprint: Mapping[str, str | int],
        content_hash: str | None = "",
        fits: Callable[[int, dict[str, np.ndarray]], bool] = lambda length, planes: True,
    ):
        """Opens the store in `folder`, made if need be, and deletes what is damaged or beyond the budget.

        budget_bytes: what all snapshots in the folder may take together, at any time. fingerprint: all that must agree
            for a snapshot to be the state this process would compute, but for `content_hash`, of the model's file; if
            that is None, the store is not ready before `begin`. fits: whether planes can be a state of so many tokens.

        Raises Ds4Error if `folder` is not a directory, is open to others, cannot be used or is in use.
        """
        self.folder, self.budget, self.ready = Path(folder), budget_bytes, False
        self.seed = digest(json.dumps(dict(sorted(fingerprint.items()))).encode())
        self.notes = self.folder / f"notes-{self.seed.hex()[:32]}.log"
        self._fingerprint, self._fits = {**fingerprint}, fits
        self._index = Index()
        self._found: list[tuple[Entry, dict[str, Any]]] = []  # what `begin` has to look at
        self._skipped: list[tuple[Path, Exception]] = []  # and to report
        self._writing = threading.Lock()  # held while files come and go
        self._epoch = time.time_ns() - time.monotonic_ns()  # the clock may be set while the store is open
        try:
            self._lock_file = lock_folder(self.folder)
            try:
                self._scan()
            except BaseException:
                self._lock_file.close()
                raise
        except OSError as e:
            raise Ds4Error(f"{self.folder}: cannot be used as a store of snapshots: {e.strerror or e}") from e
        if content_hash is None:
            self._keep_budget()
        else:
            self.begin(content_hash)

    def _scan(self) -> None:
        with os.scandir(self.folder) as files:
            files = sorted((f for f in files if not f.is_dir(follow_symlinks=False)), key=lambda f: f.name)
        entries = []
        for file in files:
            path, name = Path(file), file.name.removesuffix(".tmp")
            if not (_ENTRY.fullmatch(name) or _NOTES.fullmatch(name)) or path == self.notes:
                continue
            if file.name != name:  # left by a process that was killed
                try:
                    path.unlink()
                    continue
                except OSError as e:
                    log.warning("%s: cannot be deleted: %s", path, e)
            elif file.is_symlink():
                continue
            stat = file.stat(follow_symlinks=False)
            entries.append(entry := Entry(path, b"", stat.st_size, stat.st_mtime_ns))
            self._index.add_unused(entry)
            if _ENTRY.fullmatch(file.name):
                self._read_head(entry)
        # Of times that the clock, which was set back, has not reached, the order is kept. What is used now is later.
        now = self._now()
        ahead = [e for e in entries if e.used > now]
        for i, entry in enumerate(sorted(ahead, key=lambda e: e.used, reverse=True)):
            self._touch(entry, now - 1000 * i)

    def _read_head(self, entry: Entry) -> None:
        try:
            entry.key, head, size = kv_file.read_head(entry.path)
            if size != entry.nbytes:
                raise Damaged(f"it has {entry.nbytes} bytes, expected {size}")
        except Damaged as e:
            self._delete_or_warn(entry, str(e))
        except (Foreign, OSError) as e:
            self._skipped.append((entry.path, e))
        else:
            found = head["fingerprint"]
            entry.pending = {**found, "content": ""} == {**self._fingerprint, "content": ""}
            self._found.append((entry, found))

    def begin(self, content_hash: str) -> None:
        """Use the entries of models of this content; the store is ready then, unless it is closed."""
        with self._writing:
            if self.closed:
                return
            self._fingerprint = dict(sorted({**self._fingerprint, "content": content_hash}.items()))
            self._content_digest = digest(json.dumps(self._fingerprint).encode())
            for entry, fingerprint in self._found:
                if entry not in self._index:  # it had to make room
                    continue
                entry.pending = False
                try:
                    self._check(entry.path, entry.key, fingerprint)
                except Foreign as e:
                    self._skipped.append((entry.path, e))
                except Damaged as e:
                    self._delete_or_warn(entry, str(e))
                else:
                    self._index.insert(entry)
            self._found = []
            if self._skipped:
                (path, why), more = self._skipped[0], len(self._skipped) - 1
                others = f" (and {more} more files)" if more else ""
                log.warning("%s%s: skipped, and deleted when room is needed: %s", path, others, why)
            self._keep_budget()
            self.ready = True

    def _keep_budget(self) -> None:
        try:
            self._make_room(0)
        except OSError as e:
            log.warning("%s: found %d bytes, which exceed the budget: %s", self.folder, self.nbytes, e)

    @property
    def closed(self) -> bool:
        """Whether other processes may have the folder."""
        return self._lock_file.closed

    def close(self) -> None:
        """Let other processes have the folder."""
        with self._writing:
            self.ready = False
            self._lock_file.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- what is there ------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        """Number of entries."""
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, those of other fingerprints included."""
        return self._index.nbytes

    def longest(self, tokens: Sequence[int] | np.ndarray) -> Entry | None:
        """The entry with the most tokens among those that `tokens` begins with (or equals), if there is one."""
        return self._index.longest(key_of(tokens))

    def shared(self, tokens: Sequence[int] | np.ndarray) -> int:
        """How many tokens, at most, `tokens` and any entry have in common at their beginnings."""
        return self._index.shared(key_of(tokens)) // 4

    def load(self, entry: Entry) -> tuple[dict[str, np.ndarray], Any] | None:
        """Planes (read-only) and `extra` of an entry, as they were put; counts as a use of it.

        None if it is gone, was found damaged or does not fit: then it is no longer in the store. Also if it cannot be
        read: then it is, until that happens for the third time in a row; so ask `longest` for a shorter one.
        """
        try:
            key, head, planes = kv_file.read(entry.path, entry.nbytes)
            self._check(entry.path, key, head["fingerprint"])
            if key != entry.key:
                raise Damaged("it holds other tokens than before")
            if not self._fits(entry.length, planes):
                raise Foreign("its planes are not the state of so many tokens of this model")
        except Damaged as e:
            with self._writing:
                self._delete_or_warn(entry, str(e))
        except FileNotFoundError:
            if self._index.stop_using(entry):  # otherwise it was evicted in the meantime
                self._index.remove(entry)
                log.warning("%s: it is gone", entry.path)
        except Foreign as e:
            log.warning("%s: skipped: %s", entry.path, e)
            self._index.stop_using(entry)
        except (OSError, MemoryError) as e:
            entry.failures += isinstance(e, OSError) and e.errno not in _BUSY
            log.warning("%s: skipped, it cannot be read: %s", entry.path, e)
            if entry.failures == MAX_FAILURES:
                self._index.stop_using(entry)
        else:
            entry.failures = 0
            self._touch(entry, self._now())
            return planes, head["extra"]
        return None

    # ---- what comes and goes ------------------------------------------------------------------------------------
    def put(self, tokens: Sequence[int] | np.ndarray, planes: Mapping[str, np.ndarray], extra: Any = None) -> bool:
        """Store the state after `tokens`, on disk when this returns. → whether the store has it now.

        planes: arrays of any shape and of any numeric dtype of NumPy or ml_dtypes, in native byte order. extra: JSON.
        If these tokens are stored already, only their last use is renewed. What exceeds the budget is not stored; nor
        is anything if the disk is full or fails (a warning says so), nor before the store is ready.
        """
        if not len(tokens):
            raise ValueError("a snapshot needs at least one token")
        key = key_of(tokens)
        with self._writing:
            if not self.ready:
                return False
            present = self.longest(tokens)
            if present and present.key == key:
                self._touch(present, self._now())
                return True
            pieces = kv_file.pieces_of(self._fingerprint, key, planes, extra)
            size = sum(map(len, pieces)) + kv_file.DIGEST
            if size > self.budget:
                log.info("a snapshot of %d bytes exceeds the budget for them, %d bytes", size, self.budget)
                return False
            entry = Entry(self._path(key), key, size, self._now())
            try:
                self._make_room(size, entry)
                write_whole(entry.path, kv_file.with_checksum(pieces), entry.used)
            except OSError as e:
                log.warning("%s: snapshot not saved: %s", entry.path, e)
                self._count_leftovers(entry)
                return False
            self._index.set_unused_size(_tmp(entry.path), 0, 0)  # of an earlier attempt
            self._index.insert(entry)
            return True

    def _make_room(self, size: int, new: Entry | None = None) -> None:
        """Deletes files until there is room for `size` more bytes, those of `new`.

        Raises OSError if too much of it cannot be deleted, when all that can be is.
        """
        stuck: dict[Entry, OSError] = {}
        while self.nbytes + size > self.budget:
            victim = self._index.victim(new, stuck)
            if victim is None:
                raise next(iter(stuck.values()))
            try:
                self._delete(victim)
            except OSError as e:
                stuck[victim] = e
            else:
                log.info("%s: evicted, %d tokens", victim.path, victim.length)

    def _delete(self, entry: Entry) -> None:
        """Deletes a file, or raises OSError; then it still counts."""
        if entry not in self._index:  # the name may have become another's
            return
        served = self._index.stop_using(entry)
        try:
            entry.path.unlink(missing_ok=True)
        except OSError:
            if served:
                self._index.insert(entry)
            raise
        self._index.remove(entry)

    def _delete_or_warn(self, entry: Entry, why: str) -> None:
        """Deletes a file that is of no use. One that cannot be deleted is not used any more."""
        try:
            self._delete(entry)
            log.warning("%s: %s; deleted", entry.path, why)
        except OSError as e:
            log.warning("%s: %s; it cannot be deleted: %s", entry.path, why, e)
            self._index.stop_using(entry)

    def _count_leftovers(self, entry: Entry) -> None:
        """Counts what a failed attempt to write an entry has left."""
        for path in (entry.path, _tmp(entry.path)):
            try:
                size = path.lstat().st_size
            except FileNotFoundError:
                size = 0
            except OSError:
                size = entry.nbytes
            self._index.set_unused_size(path, size, entry.used)

    def _now(self) -> int:
        return self._epoch + time.monotonic_ns()

    def _touch(self, entry: Entry, used: int) -> None:
        entry.used = used
        with contextlib.suppress(OSError):
            os.utime(entry.path, ns=(used, used), follow_symlinks=False)

    # ---- files --------------------------------------------------------------------------------------------------
    def _path(self, key: bytes) -> Path:
        return self.folder / f"{digest(self._content_digest, key).hex()[:32]}.kv"

    def _check(self, path: Path, key: bytes, found: dict[str, Any]) -> None:
        """Raises Foreign or Damaged unless a file with this key and fingerprint is ours."""
        for what in sorted(found.keys() | self._fingerprint):
            if found.get(what) != self._fingerprint.get(what):
                raise Foreign(f"{what} is {show(found.get(what))}, here {self._fingerprint.get(what)!r}")
        if path != self._path(key):
            raise Damaged("its name does not fit its tokens")


def _tmp(path: Path) -> Path:
    """The name under which `files.write_whole` writes a file."""
    return path.with_name(f"{path.name}.tmp")
