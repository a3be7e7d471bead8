"""The prefix cache: snapshots of sequences, for prompts that begin with the same tokens. In memory and on disk; no JAX.

A compressed state cannot be rewound, so a prompt starts at the last position that it shares with an earlier sequence
and at which a snapshot was taken. Such positions are multiples of 128, where no window is open; `positions` chooses
them. A *complete* prompt is also kept where it ends, with its logits, for the same prompt again.

A snapshot is what the sequence had, bit for bit. What of it was decoded, token by token, may differ in its last bits
from what prefill, which adds up in another order, would compute from the same tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ds4jax.engine import keys
from ds4jax.engine.eviction import values
from ds4jax.engine.kv_store import KVStore
from ds4jax.engine.types import ALIGN

TAIL = 30
"""A prompt whose last TAIL tokens change is computed anew from at most ALIGN tokens before them."""
MAX_WRITES = 8  # snapshots that may wait for the disk; each holds memory beyond the budget

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Snapshot:
    """The state after the tokens of `key`. used: last use, nanoseconds of a clock that nobody sets.

    logits (V,): those that follow a complete prompt, else None.
    """

    key: bytes
    planes: dict[str, np.ndarray]
    logits: np.ndarray | None = None
    used: int = dataclasses.field(default_factory=time.monotonic_ns)
    on_disk: bool = False

    @property
    def length(self) -> int:
        """How many tokens it holds the state of."""
        return len(self.key) // 4

    @property
    def nbytes(self) -> int:
        rest = 0 if self.logits is None else self.logits.nbytes
        return len(self.key) + rest + sum(plane.nbytes for plane in self.planes.values())


def positions(prompt: int, chunk: int, shared: int) -> set[int]:
    """Where to take snapshots while a prompt is computed.

    Near its end, for the same prompt with another tail; at chunk · 2^i, so that a prompt of which only the beginning is
    the same saves half of that at least; and where it parts from what is known, which shares `shared` tokens with it.
    """
    last = max(0, prompt - TAIL) // ALIGN * ALIGN
    marks, double = {last, min(shared, last) // ALIGN * ALIGN}, max(chunk, ALIGN)
    while double < last:
        marks.add(double)
        double *= 2
    return marks - {0}


class PrefixCache:
    """Snapshots within a budget of memory, in front of a `KVStore` that may be there. For one thread.

    Prompts are given as keys (see `ds4jax.engine.keys`).
    """

    def __init__(self, budget_bytes: int, store: KVStore | None = None):
        """budget_bytes: of memory. store: takes what is evicted, and what `save` is called for."""
        self.budget, self.store = budget_bytes, store
        self.nbytes = 0
        self._aligned: list[Snapshot] = []  # sorted by key
        self._complete: collections.OrderedDict[bytes, Snapshot] = collections.OrderedDict()  # oldest use first
        self._complete_bytes = 0
        self._reader, self._writer = (ThreadPoolExecutor(1, f"prefix-{name}") for name in ("reader", "writer"))
        self._writes: set[Future] = set()

    def __len__(self) -> int:
        return len(self._aligned) + len(self._complete)

    def find(self, key: bytes) -> Snapshot | None:
        """The longest snapshot in memory to start a prompt from: complete, or shorter than the prompt."""
        if found := self._complete.get(key):
            self._complete.move_to_end(key)
        else:
            found = keys.longest(self._aligned, key[:-4])
        if found:
            found.used = time.monotonic_ns()
        return found

    def shared(self, key: bytes) -> int:
        """How many tokens a prompt has in common with anything known."""
        on_disk = self.store.shared(keys.tokens_of(key)) if self.store is not None else 0
        return max(on_disk, keys.shared(self._aligned, key) // 4)

    def put(self, snapshot: Snapshot) -> None:
        """Keep a snapshot; what is worth least makes room."""
        if snapshot.logits is not None:
            if (old := self._complete.pop(snapshot.key, None)) is not None:
                self._count(old, -1)
            self._complete[snapshot.key] = snapshot
        else:
            present = keys.longest(self._aligned, snapshot.key)
            if present and present.key == snapshot.key:
                present.used = snapshot.used
                return
            keys.insert(self._aligned, snapshot)
        self._count(snapshot, 1)
        while self._complete_bytes > self.budget // 4:  # they save little: at most 127 tokens more than the others do
            self._count(self._complete.popitem(last=False)[1], -1)
        while self.nbytes > self.budget and self._aligned:
            value = values(self._aligned)
            victim = min(self._aligned, key=value.__getitem__)
            self._aligned.remove(victim)
            self._count(victim, -1)
            self.save(victim)

    def discard(self, key: bytes) -> None:
        """Forget what is in memory of the beginnings of a sequence."""

        def of_it(snapshot: Snapshot) -> bool:
            return key.startswith(snapshot.key)

        for snapshot in [*filter(of_it, self._aligned), *filter(of_it, self._complete.values())]:
            if snapshot.logits is None:
                self._aligned.remove(snapshot)
            else:
                del self._complete[snapshot.key]
            self._count(snapshot, -1)

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot to disk, in the background. Without a store, or if too many wait already, it is not kept."""
        self._writes = {write for write in self._writes if not write.done()}
        if self.store is not None and not snapshot.on_disk and len(self._writes) < MAX_WRITES:
            snapshot.on_disk = True
            self._writes.add(self._writer.submit(self._write, snapshot))

    def fetch(self, key: bytes, more_than: int) -> Future[Snapshot | None] | None:
        """Start to read the longest snapshot on disk that a prompt begins with, if it is longer than `more_than`."""
        if self.store is None or not (entry := self.store.longest(keys.tokens_of(key[:-4]))):
            return None
        return self._reader.submit(self._read, key[:-4], more_than) if entry.length > more_than else None

    def close(self, save: bool) -> None:
        """Wait for the disk. save: write what is in memory too, the most valuable last: it is the last to make room."""
        if save and self.store is not None:
            value = values(self._aligned)
            for snapshot in sorted(self._aligned, key=value.__getitem__):
                if not snapshot.on_disk:
                    snapshot.on_disk = True
                    self._writer.submit(self._write, snapshot)
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()
        if self.store is not None:
            self.store.close()

    def _count(self, snapshot: Snapshot, sign: int) -> None:
        self.nbytes += sign * snapshot.nbytes
        if snapshot.logits is not None:
            self._complete_bytes += sign * snapshot.nbytes

    def _write(self, snapshot: Snapshot) -> None:
        assert self.store is not None
        try:
            # One that is not there, as the disk failed or the store is not ready, is written later.
            snapshot.on_disk = self.store.put(keys.tokens_of(snapshot.key), snapshot.planes)
        except Exception:
            log.exception("a snapshot of %d tokens was not saved", snapshot.length)

    def _read(self, key: bytes, more_than: int) -> Snapshot | None:
        assert self.store is not None
        while (entry := self.store.longest(keys.tokens_of(key))) and entry.length > more_than:
            if (loaded := self.store.load(entry)) is not None:
                return Snapshot(entry.key, loaded[0], on_disk=True)
            key = entry.key[:-4]
        return None
