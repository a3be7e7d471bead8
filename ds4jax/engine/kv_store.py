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

An entry is a file named by a hash of fingerprint and tokens. Integers are little-endian:

    magic "ds4jaxKV", u32 version, u32 J, u32 T
    J bytes of JSON: fingerprint, checksum (its name), planes {name: [dtype, shape, offset in the data]}, data (bytes
        of it), extra
    T token ids, u32 each
    checksum of all before
    zeros up to a multiple of 64, then the data: planes in C order, each padded with zeros to a multiple of 64
    checksum of all before

The first checksum lets a store open without reading the data. A file's time of modification is the entry's last use.

The entry of least value goes first when room is needed. Its value is tokens / bytes · 2^(−age / 6 h), where age is the
time since its last use: what it saves, for what it costs, and how likely it is to be asked for. An entry is superseded
if just one branch of entries continues it and the next on that branch was used no earlier: who comes back will ask for
that one. It then counts as a day older. At a fork, as after a system prompt that conversations share, it keeps its full
value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ds4jax.engine.keys import insert, key_of, longest, shared
from ds4jax.errors import Ds4Error

HALF_LIFE = 6 * 3600
"""Seconds without use that halve an entry's value."""
SUPERSEDED = 24 * 3600
"""Seconds by which an entry counts as older once a continuation has taken its place."""
NOTES_SHARE = 16
"""Notes have this fraction of the budget, and at most MAX_NOTES bytes."""
MAX_NOTES = 64 << 20

_MAGIC, _VERSION = b"ds4jaxKV", 1
_PREAMBLE = struct.Struct("<8sIII")
_ALIGN = 64
_CHECKSUM, _DIGEST = "blake2b-256", 32
_OURS = re.compile(r"[0-9a-f]{32}\.kv")
_LEFTOVER = re.compile(r"([0-9a-f]{32}\.kv|notes-[0-9a-f]{32}\.log)\.tmp")

log = logging.getLogger(__name__)


class _Damaged(Exception):
    """What is wrong with a file of ours."""


class _Foreign(Exception):
    """Why an undamaged file is not for this store."""


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
    """A folder of snapshots and notes that only this process uses.

    Methods may be called from several threads; `put` in one does not hold up `longest` and `load` in others.
    """

    def __init__(self, folder: str | Path, budget_bytes: int, fingerprint: Mapping[str, str | int]):
        """Opens the store in `folder`, made if need be, and deletes what is damaged or beyond the budget.

        budget_bytes: what the files of this fingerprint may take together, at any time. fingerprint: all that must
            agree for a snapshot to be the state this process would compute. Entries of others are left alone.

        Raises Ds4Error if `folder` is not a directory, cannot be used or is in use.
        """
        self.folder, self.budget = Path(folder), budget_bytes
        self._fingerprint = dict(sorted(fingerprint.items()))
        self._seed = _digest(json.dumps(self._fingerprint).encode())
        self._entries: list[Entry] = []  # sorted by key: an entry stands before all that continue it, and next to them
        self._bytes = 0  # of entries on disk
        self._lock = threading.Lock()  # guards the two above; never held while data is read or written
        self._writing = threading.Lock()
        self._open = contextlib.ExitStack()
        try:
            self._lock_folder()
            self._clean()
            notes_room = min(budget_bytes // NOTES_SHARE, MAX_NOTES)
            self._room = budget_bytes - notes_room
            self._notes = _Notes(self.folder / f"notes-{self._seed.hex()[:32]}.log", notes_room, self._seed)
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
                key, stat = self._read_head(path)
            except _Foreign as e:
                foreign.append((path, e))
            except _Damaged as e:
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
        """Bytes on disk, of entries and notes."""
        return self._bytes + self._notes.size

    def longest(self, tokens: Sequence[int]) -> Entry | None:
        """The entry with the most tokens among those that `tokens` begins with (or equals), if there is one."""
        with self._lock:
            return longest(self._entries, key_of(tokens))

    def shared(self, tokens: Sequence[int]) -> int:
        """How many tokens, at most, `tokens` and any entry have in common at their beginnings."""
        with self._lock:
            return shared(self._entries, key_of(tokens)) // 4

    def load(self, entry: Entry) -> tuple[dict[str, np.ndarray], Any] | None:
        """Planes (read-only) and `extra` of an entry, as they were put; counts as a use of it.

        None if it is gone or was found damaged: then it is no longer in the store, so ask `longest` again.
        """
        try:
            buffer = _read(entry.path, entry.nbytes)
            key, head, start = _parse(buffer)
            self._check(entry.path, key, head)
            planes = _planes(head["planes"], buffer[start : start + head["data"]])
            if key != entry.key:
                raise _Damaged("it holds other tokens than before")
        except _Damaged as e:
            log.warning("%s: %s; deleted", entry.path, e)
            with contextlib.suppress(OSError):
                self._drop(entry)
            return None
        except (_Foreign, OSError) as e:
            if self._forget(entry):  # otherwise it was evicted in the meantime
                log.warning("%s: skipped, it cannot be read: %s", entry.path, e)
            return None
        self._touch(entry)
        return planes, head["extra"]

    # ---- what comes and goes ------------------------------------------------------------------------------------
    def put(self, tokens: Sequence[int], planes: Mapping[str, np.ndarray], extra: Any = None) -> bool:
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
            pieces = _pieces(self._fingerprint, key, planes, extra)
            size = sum(map(len, pieces)) + _DIGEST
            if size > self._room:
                log.info("a snapshot of %d bytes exceeds the budget for them, %d bytes", size, self._room)
                return False
            entry = Entry(self._path(key), key, size, time.time_ns())
            try:
                self._evict(size, entry)
                _write(entry.path, pieces, entry.used)
            except OSError as e:
                log.warning("%s: snapshot not saved: %s", entry.path, e)
                with contextlib.suppress(OSError):
                    entry.path.unlink()  # it is there if only the folder could not be synced
                return False
            self._insert(entry)
            return True

    def put_note(self, key: str, value: Any) -> None:
        """Keep a JSON value under `key`, in place of an older one; least recently used notes make room."""
        self._notes.put(key, value)

    def note(self, key: str) -> Any:
        """The value kept under `key`, or None."""
        return self._notes.get(key)

    def _evict(self, size: int, new: Entry | None = None) -> None:
        """Deletes entries until there is room for `size` more bytes, those of `new`."""
        while self._bytes + size > self._room and self._entries:
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
        return self.folder / f"{_digest(self._seed, key).hex()[:32]}.kv"

    def _read_head(self, path: Path) -> tuple[bytes, os.stat_result]:
        with open(path, "rb") as f:
            stat = os.fstat(f.fileno())
            preamble = f.read(_PREAMBLE.size)
            rest = f.read(min(_head_size(preamble), stat.st_size) - len(preamble))
        key, head, start = _parse_head(preamble + rest)
        self._check(path, key, head)
        if (size := start + head["data"] + _DIGEST) != stat.st_size:
            raise _Damaged(f"it has {stat.st_size} bytes, expected {size}")
        return key, stat

    def _check(self, path: Path, key: bytes, head: dict[str, Any]) -> None:
        found = head["fingerprint"]
        for what in sorted(found.keys() | self._fingerprint):
            if found.get(what) != self._fingerprint.get(what):
                raise _Foreign(f"{what} is {found.get(what)!r}, here {self._fingerprint.get(what)!r}")
        if path != self._path(key):
            raise _Damaged("its name does not fit its tokens")


def values(entries: Sequence[Any]) -> dict[Any, float]:
    """The binary logarithm of each entry's value (see the top), but for a term that is the same for all.

    entries: `Entry`, or what has its key, length, nbytes and used; sorted by key. The logarithm is finite at any age,
    and with it the order does not depend on the time.
    """
    nexts: dict[Any, list[Any]] = {e: [] for e in entries}  # entry → those that continue it, with none in between
    chain: list[Any] = []  # the entries that the last one continues, and itself
    for e in entries:
        while chain and not e.key.startswith(chain[-1].key):
            chain.pop()
        if chain:
            nexts[chain[-1]].append(e)
        chain.append(e)

    def value(e: Any) -> float:
        superseded = len(nexts[e]) == 1 and nexts[e][0].used >= e.used
        return math.log2(e.length / e.nbytes) + (e.used / 1e9 - superseded * SUPERSEDED) / HALF_LIFE

    return {e: value(e) for e in entries}


# ---- the file format ----------------------------------------------------------------------------------------------
def _digest(*pieces: bytes | memoryview, key: bytes = b"") -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST, key=key)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _pieces(fingerprint: dict, key: bytes, planes: Mapping[str, np.ndarray], extra: Any) -> list[bytes | memoryview]:
    """A file's content, without the last checksum."""
    table: dict[str, tuple[str, tuple[int, ...], int]] = {}
    data: list[bytes | memoryview] = []
    offset = 0
    for name, plane in planes.items():
        plane = np.asarray(plane, order="C")
        if plane.dtype.hasobject or plane.dtype.fields or _dtype(plane.dtype.name) != plane.dtype:
            raise TypeError(f"plane {name}: a numeric dtype in native byte order is expected, found {plane.dtype!r}")
        table[name] = plane.dtype.name, plane.shape, offset
        data += [plane.reshape(-1).view(np.uint8).data, bytes(-plane.nbytes % _ALIGN)]
        offset += len(data[-2]) + len(data[-1])
    head = {"fingerprint": fingerprint, "checksum": _CHECKSUM, "planes": table, "data": offset, "extra": extra}
    text = json.dumps(head).encode()
    before = [_PREAMBLE.pack(_MAGIC, _VERSION, len(text), len(key) // 4), text, key]
    size = sum(map(len, before)) + _DIGEST
    return [*before, _digest(*before), bytes(-size % _ALIGN), *data]


def _head_size(preamble: bytes | memoryview) -> int:
    """Bytes up to and with the first checksum."""
    if len(preamble) < _PREAMBLE.size:
        raise _Damaged(f"it has {len(preamble)} bytes")
    magic, _, text, tokens = _PREAMBLE.unpack_from(preamble)
    if magic != _MAGIC:
        raise _Damaged(f"it begins with {magic!r}, expected {_MAGIC!r}")
    return _PREAMBLE.size + text + 4 * tokens + _DIGEST


def _parse_head(file: bytes | memoryview) -> tuple[bytes, dict[str, Any], int]:
    """Of a file's beginning: tokens, JSON, and where the data starts."""
    size = _head_size(file)
    before, checksum = file[: size - _DIGEST], file[size - _DIGEST : size]
    if _digest(before) != bytes(checksum):
        raise _Damaged("the checksum of its head is wrong")
    _, version, text, _ = _PREAMBLE.unpack_from(file)
    if version != _VERSION:  # the layout of the head is for all versions
        raise _Foreign(f"its format is version {version}, here {_VERSION}")
    end = _PREAMBLE.size + text
    return bytes(before[end:]), json.loads(bytes(before[_PREAMBLE.size : end])), size + -size % _ALIGN


def _parse(buffer: np.ndarray) -> tuple[bytes, dict[str, Any], int]:
    """`_parse_head` of a whole file, uint8 (bytes,), all of which is checked."""
    file = buffer.data
    if _digest(file[:-_DIGEST]) != bytes(file[-_DIGEST:]):
        raise _Damaged("its checksum is wrong")
    return _parse_head(file)


def _planes(table: dict[str, Any], data: np.ndarray) -> dict[str, np.ndarray]:
    """Views of the data, uint8 (bytes,)."""
    planes = {}
    for name, (dtype, shape, offset) in table.items():
        dtype = _dtype(dtype)
        planes[name] = data[offset : offset + dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape)
    return planes


def _read(path: Path, size: int) -> np.ndarray:
    """The `size` bytes of a file, read-only uint8 (size,), aligned as in the file."""
    memory = np.empty(size + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    buffer = memory[start : start + size]
    with open(path, "rb") as f:
        if (n := f.readinto(buffer.data)) != size or f.read(1):
            raise _Damaged(f"its size is not {size} bytes any more, {n} of them were read")
    buffer.flags.writeable = False
    return buffer


def _write(path: Path, pieces: Iterable[bytes | memoryview], used: int | None = None) -> None:
    """Makes a file of the pieces or leaves no trace; of an entry, last `used` then, with their checksum behind them."""
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        # Snapshots tell what was talked about, so they are for their owner only.
        with open(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
            digest = hashlib.blake2b(digest_size=_DIGEST)
            for piece in pieces:
                f.write(piece)
                digest.update(piece)
            if used is not None:
                f.write(digest.digest())
            f.flush()
            if used is not None:
                os.utime(f.fileno(), ns=(used, used))
            os.fsync(f.fileno())
        os.replace(tmp, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- notes --------------------------------------------------------------------------------------------------------
class _Notes:
    """A table of small JSON values: in memory, and in a file to which each new one is appended as a line.

    A line is the checksum of the rest, keyed with the fingerprint, and [key, value]; of lines with the same key the
    last one counts. size: bytes of the file. When it would exceed half the room it is written anew with the notes used
    last, at most a quarter: old and new file together never exceed the room.
    """

    def __init__(self, path: Path, room: int, seed: bytes):
        self._path, self._room, self._seed = path, room, seed
        self._lines: dict[str, bytes] = {}  # least recently used first
        self._lock = threading.Lock()
        self.size, damaged = 0, 0
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            self.size = len(data)
            *lines, torn = data.split(b"\n")
            damaged = bool(torn)
            for line in lines:
                checksum, _, text = line.partition(b" ")
                if checksum == self._checksum(text):
                    self._set(json.loads(text)[0], line + b"\n")
                else:
                    damaged += 1
        if damaged:
            log.warning("%s: %d damaged notes; deleted", path, damaged)
        self._stale = bool(damaged)  # whether the file must be written anew before it can grow
        if self._stale or self.size > room // 2:
            self._rewrite()

    def _checksum(self, text: bytes) -> bytes:
        return _digest(text, key=self._seed).hex().encode()

    def _set(self, key: str, line: bytes) -> None:
        self._lines.pop(key, None)
        self._lines[key] = line

    def get(self, key: str) -> Any:
        with self._lock:
            if key not in self._lines:
                return None
            self._set(key, line := self._lines[key])
        return json.loads(line.partition(b" ")[2])[1]

    def put(self, key: str, value: Any) -> None:
        text = json.dumps([key, value]).encode()
        line = self._checksum(text) + b" " + text + b"\n"
        if len(line) > self._room // 4:
            log.info("note %s of %d bytes exceeds the budget, %d bytes", key, len(line), self._room // 4)
            return
        with self._lock:
            same = self._lines.get(key) == line
            self._set(key, line)
            if self._stale or self.size + len(line) > self._room // 2:
                self._rewrite()
            elif not same:
                self._append(line)

    def _append(self, line: bytes) -> None:
        try:
            with open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as f:
                f.write(line)
                f.flush()
                os.fsync(f.fileno())
            if not self.size:
                _sync_folder(self._path.parent)
        except OSError as e:
            log.warning("%s: note not saved: %s", self._path, e)
            self._stale = True
        self.size += len(line)

    def _rewrite(self) -> None:
        """Writes the file anew; if that fails, the next note tries again, and this process has its notes in memory."""
        excess = sum(map(len, self._lines.values())) - self._room // 4
        while excess > 0:
            excess -= len(self._lines.pop(next(iter(self._lines))))
        lines = list(self._lines.values())
        try:
            _write(self._path, lines)
            self.size, self._stale = sum(map(len, lines)), False
        except OSError as e:
            log.warning("%s: notes not saved: %s", self._path, e)
            self._stale = True
