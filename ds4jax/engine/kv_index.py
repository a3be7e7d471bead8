"""What a KV store knows of its folder: entries, found by tokens, and other files that count. No JAX and no disk."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection
from pathlib import Path

from ds4jax.engine import keys
from ds4jax.engine.eviction import values


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
    """One snapshot in a store. key: its tokens as bytes, u32 each. used: last use, nanoseconds since 1970.

    failures: how often in a row it could not be read.
    """

    path: Path
    key: bytes
    nbytes: int
    used: int
    failures: int = 0

    @property
    def length(self) -> int:
        """How many tokens the snapshot holds the state of."""
        return len(self.key) // 4


class Index:
    """Entries, and files *aside*: those that count but are not used. Thread-safe."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []  # sorted by key: an entry stands before all that continue it, and next to them
        self._aside: dict[Path, Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    def __contains__(self, entry: Entry) -> bool:
        """Whether it is an entry or aside."""
        with self._lock:
            return entry in self._entries or self._aside.get(entry.path) is entry

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(e.nbytes for e in (*self._entries, *self._aside.values()))

    def longest(self, key: bytes) -> Entry | None:
        """See `keys.longest`."""
        with self._lock:
            return keys.longest(self._entries, key)

    def shared(self, key: bytes) -> int:
        """See `keys.shared`."""
        with self._lock:
            return keys.shared(self._entries, key)

    def insert(self, entry: Entry) -> None:
        """Add an entry, in place of a file aside of the same path."""
        with self._lock:
            self._aside.pop(entry.path, None)
            keys.insert(self._entries, entry)

    def count(self, file: Entry) -> None:
        """Add a file aside."""
        with self._lock:
            self._aside[file.path] = file

    def set_aside(self, entry: Entry) -> bool:
        """Put an entry aside. → whether it was one."""
        with self._lock:
            if there := entry in self._entries:
                self._entries.remove(entry)
                self._aside[entry.path] = entry
        return there

    def remove(self, entry: Entry) -> None:
        """Take out an entry or a file aside, if it is there."""
        self.set_aside(entry)
        with self._lock:
            if self._aside.get(entry.path) is entry:
                del self._aside[entry.path]

    def recount(self, path: Path, nbytes: int, used: int) -> None:
        """A file that is no entry has so many bytes now; with 0, there is none."""
        with self._lock:
            self._aside.pop(path, None)
            if nbytes:
                self._aside[path] = Entry(path, b"", nbytes, used)

    def victim(self, new: Entry | None, stuck: Collection[Entry]) -> Entry | None:
        """What has to go first: of the files aside the one used longest ago, else the entry of least value.

        new: an entry that will be there, for the value of others. stuck: what cannot go.
        """
        with self._lock:
            aside, entries = [e for e in self._aside.values() if e not in stuck], self._entries.copy()
        if aside:
            return min(aside, key=lambda e: e.used)
        if new:
            keys.insert(entries, new)
        value = values(entries)
        return min((e for e in entries if e is not new and e not in stuck), key=value.__getitem__, default=None)
