"""How many sequences a decoding call computes: no more than decode, as far as there are programs for it.

The program that computes every slot is always there. One for fewer sequences is compiled in the background once calls
that it would have served have taken long enough, so that a server with many slots answers a single user as fast as one
with a single slot. Which program computes a sequence may change the last bits of its logits.
"""

from __future__ import annotations

import collections
import sys
import threading
from collections.abc import Callable

WORTH_SECONDS = 60.0
"""Decoding time after which a program that computes fewer sequences is compiled. That takes a minute or two, in which
the others are slower."""


class CallSizes:
    """Chooses, for each call, the smallest program.

    There are programs for 1, 2, 4, … sequences, and for all `batch`. prepare: compiles the one for so many, in another
    thread, and says whether its calls fit into memory.
    """

    def __init__(self, batch: int, prepare: Callable[[int], bool]):
        self._batch, self._prepare = batch, prepare
        self._ready = {batch}
        # By how many sequences a program would be for: seconds of calls that it would have served.
        self._seconds: dict[int, float] = collections.defaultdict(float)
        self._tried: set[int] = set()
        self._busy = False

    def of(self, sequences: int) -> int:
        """How many sequences the call for so many computes."""
        return min(size for size in self._ready if size >= sequences)

    def took(self, sequences: int, seconds: float) -> None:
        """Note that a call for so many sequences took so long; starts to compile a program if that is worth it."""
        fewest = min(self._batch, 1 << max(sequences - 1, 0).bit_length())
        if fewest in self._ready or fewest in self._tried:
            return
        self._seconds[fewest] += seconds
        if self._seconds[fewest] >= WORTH_SECONDS and not self._busy:
            self._tried.add(fewest)
            self._busy = True
            threading.Thread(target=self._make, args=(fewest,), name="call-sizes", daemon=True).start()

    def _make(self, size: int) -> None:
        try:
            if self._prepare(size):
                self._ready.add(size)
        except Exception as error:  # the others still serve
            sys.stderr.write(f"decoding: no program for {size} sequences: {error}\n")
        finally:
            self._busy = False
