"""Which sequence computes next: all share the slots of one model runner. No tensors here, and no JAX.

Every step of the engine runs at most one chunk of one prompt, and at least one token of every sequence that decodes:
one beside a chunk, a block of some without. So a running answer never waits for more than one chunk, and a prompt never
waits for answers.

Slots are shared fairly between clients: the one who holds the fewest is next. Among a client's prompts the short ones,
those that lack no more than a chunk, pass the long ones, and so they do when prompts that hold a slot take turns, chunk
by chunk. If no slot is free, one is taken from a client who has two more than the next one, or from a long prompt of a
client who would not have it back at once. That sequence is suspended and goes on later where it was. What has begun
never waits for ever: no more than MAX_PASSED sequences pass one before it computes again, and no more than every other
chunk goes out of turn.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Iterator

from ds4jax.engine.keys import common
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.types import ALIGN

MAX_PASSED = 8
"""Sequences that get a slot before one that came earlier, until that one computes."""

LEAST = 32
"""Tokens that a sequence computes before its slot goes to another client."""

Start = Callable[[Sequence], int | None]
"""How many tokens of a sequence's prompt need not be computed, or None if it should wait longer. It may note what it
found."""


class Scheduler:
    """The order in which sequences compute.

    slots: number of sequences that hold a slot at once. chunk: the most tokens of a prompt in one step. per_client:
    the most slots that a client has, or None. passes_marks: whether the last chunk of a prompt may pass a mark.

    Attributes: waiting (without a slot, in order of arrival), prefilling (prompt not computed yet, in turn), decoding
    (the others).
    """

    def __init__(self, slots: int, chunk: int, per_client: int | None = None, passes_marks: bool = False):
        self.chunk, self._per_client, self._passes_marks = chunk, per_client, passes_marks
        self.waiting: list[Sequence] = []
        self.prefilling: collections.deque[Sequence] = collections.deque()
        self.decoding: list[Sequence] = []
        self._free = list(range(slots))
        self._arrivals = 0
        self._out_of_turn = False  # whether the last chunk was

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences."""
        return iter([*self.waiting, *self.prefilling, *self.decoding])

    def __len__(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def add(self, seq: Sequence) -> None:
        """Let a new sequence wait for a slot."""
        seq.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence and free its slot; nothing happens if it is not here."""
        for group in (self.waiting, self.prefilling, self.decoding):
            if seq in group:
                group.remove(seq)
                if seq.slot is not None:
                    self._free.append(seq.slot)
                    seq.slot = None

    def admit(self, start: Start) -> list[Sequence]:
        """Give free slots to waiting sequences; → those that got one. Where one should wait longer, others pass it."""
        admitted = []
        while self._free and (found := self._first(start)):
            seq, computed = found
            self.waiting.remove(seq)
            for other in self.waiting:
                other.passed += other.arrival < seq.arrival
            seq.slot, seq.computed, seq.begun_at = self._free.pop(0), computed, computed
            (self.prefilling if computed < seq.prompt_len else self.decoding).append(seq)
            admitted.append(seq)
        return admitted

    def _first(self, start: Start) -> tuple[Sequence, int] | None:
        """Which waiting sequence has the next slot, and what `start` says of it."""
        found = ((seq, start(seq)) for seq in self._queue())
        return next(((seq, computed) for seq, computed in found if computed is not None), None)

    def _queue(self) -> list[Sequence]:
        """Those that wait and may have a slot, the next one first."""
        held = self._held()

        def turn(seq: Sequence) -> tuple[bool, int, int, int]:
            patient = seq.passed >= MAX_PASSED
            rank = 0 if patient else 2 if self._is_long(seq) else 1
            return not (patient and seq.suspended), held[seq.client], rank, seq.arrival

        most = self._per_client
        return sorted((seq for seq in self.waiting if most is None or held[seq.client] < most), key=turn)

    def _held(self) -> collections.Counter[str]:
        """How many slots each client has."""
        return collections.Counter(seq.client for seq in (*self.prefilling, *self.decoding))

    def _is_long(self, seq: Sequence) -> bool:
        return seq.prompt_len - max(seq.known, seq.computed) > self.chunk

    def victim(self, start: Start) -> Sequence | None:
        """Who should give its slot to one that waits, if none is free. `admit` then gives it to that one."""
        able = (seq for seq in self._queue() if seq.disk_read is None or seq.disk_read.done())
        if self._free or (seq := next(able, None)) is None:
            return None
        held = self._held()
        client, most = held.most_common(1)[0]
        if most - held[seq.client] >= 2:
            theirs = [
                other
                for other in (*self.prefilling, *self.decoding)
                if other.client == client and other.computed - other.begun_at >= LEAST
            ]
            found = min(theirs, key=lambda other: other.computed, default=None)  # the least to copy
        elif not self._is_long(seq) or seq.passed >= MAX_PASSED:
            longs = [
                other
                for other in self.prefilling
                if self._is_long(other) and other.passed < MAX_PASSED
                if other.client == seq.client or held[other.client] > held[seq.client]
            ]
            found = max(longs, key=lambda other: other.prompt_len - other.computed, default=None)
        else:
            return None
        return found if found and start(seq) is not None else None

    def suspend(self, seq: Sequence) -> None:
        """Let a sequence that has a slot wait for one again, in the place that it had by its arrival."""
        self.remove(seq)
        bisect.insort(self.waiting, seq, key=lambda other: other.arrival)

    def should_wait(self, seq: Sequence, have: int) -> bool:
        """Whether a prompt that is being computed will soon save `seq` more than the `have` tokens it has.

        If so, the other prompt is marked at the position up to which the two agree; if they are equal, `seq` can start
        at its end. A sequence waits for at most one other, since what that one computes may be evicted before `seq`
        gets a slot.
        """
        for other in self.prefilling if seq.leader is None else [seq.leader] * (seq.leader in self.prefilling):
            target = seq.prompt_len if seq.key == other.key else self._parting(seq, other)
            if target > max(have, other.computed) or have < other.deferred_mark <= target:
                seq.leader = other
                other.marks.add(target)
                return True
        return False

    def _parting(self, seq: Sequence, other: Sequence) -> int:
        """The last multiple of ALIGN up to which two prompts agree; one token at least is left of the first."""
        return min(common(seq.key, other.key) // 4, seq.prompt_len - 1) // ALIGN * ALIGN

    def next_chunk(self, most: int | None = None) -> tuple[Sequence, int] | None:
        """Whose prompt is next, and up to which position: a mark, a multiple of `chunk` or its end.

        The last chunk passes one mark (`passed_mark`), unless another sequence waits for it.

        most: a multiple of ALIGN, of which a multiple will do, too.
        """
        if not self.prefilling:
            return None
        seq = self.prefilling[0]
        if not self._out_of_turn:
            seq = next((other for other in self.prefilling if not self._is_long(other)), seq)
        return seq, self._chunk_end(seq, most)

    def _chunk_end(self, seq: Sequence, most: int | None = None) -> int:
        whole = seq.computed // self.chunk * self.chunk + self.chunk
        longest = {whole} if most is None else {whole, seq.computed // most * most + most}
        first, *rest = sorted(end for end in {seq.prompt_len, *longest, *seq.marks} if end > seq.computed)
        passes = self._passes_marks and first not in longest and not self._is_awaited(seq)
        return seq.prompt_len if passes and rest[:1] == [seq.prompt_len] else first

    def passed_mark(self, seq: Sequence, end: int) -> int | None:
        """The mark inside the next chunk, if it ends at `end`."""
        return next((mark for mark in sorted(seq.marks) if seq.computed < mark < end), None)

    def _is_awaited(self, seq: Sequence) -> bool:
        """Whether a sequence waits for an earlier part of this one's prompt."""
        return any(other.leader is seq for other in self.waiting)

    def ends_next(self, seq: Sequence) -> bool:
        """Whether the next chunk is the last of its prompt, and no sequence waits for an earlier part of it."""
        return not self._is_awaited(seq) and self._chunk_end(seq) == seq.prompt_len

    def advance(self, seq: Sequence, computed: int) -> None:
        """Note how many tokens the slot of `seq` holds now. After a chunk, the next prompt has its turn."""
        seq.computed, seq.passed = computed, 0
        if seq in self.prefilling:
            self._out_of_turn = seq is not self.prefilling[0]
            self.prefilling.remove(seq)
            (self.prefilling if computed < seq.prompt_len else self.decoding).append(seq)
