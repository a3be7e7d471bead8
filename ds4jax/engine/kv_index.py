"""What a KV store knows of its folder: entries, found by tokens, and unused files. No JAX and no disk."""

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

    failures: how often in a row it could not be read. pending: unused as yet, as the content of the model is not known.
    """

    path: Path
    key: bytes
    nbytes: int
    used: int
    failures: int = 0
    pending: bool = False

    @property
    def length(self) -> int:
        """How many tokens the snapshot holds the state of."""
        return len(self.key) // 4


class Index:
    """Entries, and unused files, whose bytes count as well. Thread-safe."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []  # sorted by key: an entry stands before all that continue it, and next to them
        self._unused: dict[Path, Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    def __contains__(self, entry: Entry) -> bool:
        """Whether it is an entry or an unused file."""
        with self._lock:
            return entry in self._entries or self._unused.get(entry.path) is entry

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(e.nbytes for e in (*self._entries, *self._unused.values()))

    def longest(self, key: bytes) -> Entry | None:
        """See `keys.longest`."""
        with self._lock:
            return keys.longest(self._entries, key)

    def shared(self, key: bytes) -> int:
        """See `keys.shared`."""
        with self._lock:
            return keys.shared(self._entries, key)

    def insert(self, entry: Entry) -> None:
        """Add an entry, in place of an unused file of the same path."""
        with self._lock:
            self._unused.pop(entry.path, None)
            keys.insert(self._entries, entry)

    def add_unused(self, file: Entry) -> None:
        """Add an unused file."""
        with self._lock:
            self._unused[file.path] = file

    def stop_using(self, entry: Entry) -> bool:
        """Make an entry an unused file. → whether it was in use."""
        with self._lock:
            if there := entry in self._entries:
                self._entries.remove(entry)
                self._unused[entry.path] = entry
        return there

    def remove(self, entry: Entry) -> None:
        """Take out an entry or an unused file, if it is there."""
        self.stop_using(entry)
        with self._lock:
            if self._unused.get(entry.path) is entry:
                del self._unused[entry.path]

    def set_unused_size(self, path: Path, nbytes: int, used: int) -> None:
        """The unused file at `path` has so many bytes now; with 0, there is none."""
        with self._lock:
            self._unused.pop(path, None)
            if nbytes:
                self._unused[path] = Entry(path, b"", nbytes, used)

    def victim(self, new: Entry | None, stuck: Collection[Entry]) -> Entry | None:
        """What has to go first: of the unused files the one used longest ago, else the entry of least value.

        Those pending, which may be entries soon, go after the other unused ones.

        new: an entry that will be there, for the value of others. stuck: what cannot go.
        """
        with self._lock:
            unused, entries = [e for e in self._unused.values() if e not in stuck], self._entries.copy()
        if unused:
            return min(unused, key=lambda e: (e.pending, e.used))
        if new:
            keys.insert(entries, new)
        value = values(entries)
        return min((e for e in entries if e is not new and e not in stuck), key=value.__getitem__, default=None)
