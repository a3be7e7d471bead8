"""Token sequences as keys: bytes, four for each token. Sorted, a sequence stands before all that continue it."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Keyed(Protocol):
    """Something that is found by its tokens."""

    key: bytes


def key_of(tokens: Sequence[int] | np.ndarray) -> bytes:
    """Token ids → little-endian u32 each."""
    return np.asarray(tokens, "<u4").tobytes()


def tokens_of(key: bytes) -> np.ndarray:
    """The token ids of a key, u32."""
    return np.frombuffer(key, "<u4")


def common(a: bytes, b: bytes) -> int:
    """Bytes of the tokens with which both begin."""
    n = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, "<u4", n) != np.frombuffer(b, "<u4", n)
    return 4 * (int(differ.argmax()) if differ.any() else n)


def insert[T: Keyed](entries: list[T], entry: T) -> None:
    """Into a sorted list."""
    bisect.insort(entries, entry, key=operator.attrgetter("key"))


def longest[T: Keyed](entries: Sequence[T], key: bytes) -> T | None:
    """The entry with the most tokens among those that `key` begins with (or equals). entries: sorted."""
    # An entry that `key` begins with stands before it, and between the two only others that begin with it.
    # So the nearest entry before `key` has the same beginning at least as far as the one wanted goes.
    while i := bisect.bisect_right(entries, key, key=operator.attrgetter("key")):
        near = entries[i - 1]
        if key.startswith(near.key):
            return near
        key = key[: common(key, near.key)]
    return None


def shared(entries: Sequence[Keyed], key: bytes) -> int:
    """The most bytes of tokens with which `key` and any entry begin. entries: sorted."""
    i = bisect.bisect_right(entries, key, key=operator.attrgetter("key"))
    return max((common(key, near.key) for near in entries[max(0, i - 1) : i + 1]), default=0)
