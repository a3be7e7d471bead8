"""Which snapshots go first when room is needed: those of least value.

A snapshot's value is tokens / bytes · 2^(−age / 6 h), where age is the time since its last use: what it saves, for what
it costs, and how likely it is to be asked for. A snapshot is superseded if just one branch of snapshots continues it
and the next on that branch was used no earlier: who comes back will ask for that one. It then counts as a day older.
At a fork, as after a system prompt that conversations share, it keeps its full value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

HALF_LIFE = 6 * 3600
"""Seconds without use that halve a snapshot's value."""
SUPERSEDED = 24 * 3600
"""Seconds by which a snapshot counts as older once a continuation has taken its place."""


class Kept(Protocol):
    """A snapshot that may have to go. key: see `keys`; length: tokens; used: last use, nanoseconds since any moment."""

    key: bytes
    used: int

    @property
    def length(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def values[T: Kept](entries: Sequence[T]) -> dict[T, float]:
    """The binary logarithm of each entry's value, but for a term that is the same for all. entries: sorted by key.

    The logarithm is finite at any age, and with it the order does not depend on the time.
    """
    nexts: dict[T, list[T]] = {e: [] for e in entries}  # entry → those that continue it, with none in between
    chain: list[T] = []  # the entries that the last one continues, and itself
    for e in entries:
        while chain and not e.key.startswith(chain[-1].key):
            chain.pop()
        if chain:
            nexts[chain[-1]].append(e)
        chain.append(e)

    last = max((e.used for e in entries), default=0)  # a difference of integers is exact, whatever clock they are of

    def value(e: T) -> float:
        superseded = len(nexts[e]) == 1 and nexts[e][0].used >= e.used
        return math.log2(e.length / e.nbytes) + ((e.used - last) / 1e9 - superseded * SUPERSEDED) / HALF_LIFE

    return {e: value(e) for e in entries}
