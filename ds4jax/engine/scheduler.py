"""Which sequence computes next: all share the slots of one model runner. No tensors here, and no JAX.

Every step of the engine runs at most one chunk of one prompt, and at least one token of every sequence that decodes:
one beside a chunk, a block of some without. So a running answer never waits for more than one chunk, and a prompt never
waits for answers. Slots are given in order of arrival. Prompts that hold a slot take turns, chunk by chunk, so that a
short one does not wait for the end of a long one.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

from ds4jax.engine.keys import common
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.types import ALIGN


class Scheduler:
    """The order in which sequences compute.

    slots: number of sequences that hold a slot at once. chunk: the most tokens of a prompt in one step.

    Attributes: waiting (without a slot, in order of arrival), prefilling (prompt not computed yet, the next one first),
    decoding (the others).
    """

    def __init__(self, slots: int, chunk: int):
        self.chunk = chunk
        self.waiting: list[Sequence] = []
        self.prefilling: collections.deque[Sequence] = collections.deque()
        self.decoding: list[Sequence] = []
        self._free = list(range(slots))

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences."""
        return iter([*self.waiting, *self.prefilling, *self.decoding])

    def __len__(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def add(self, seq: Sequence) -> None:
        """Let a new sequence wait for a slot."""
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence and free its slot; nothing happens if it is not here."""
        for group in (self.waiting, self.prefilling, self.decoding):
            if seq in group:
                group.remove(seq)
                if seq.slot is not None:
                    self._free.append(seq.slot)
                    seq.slot = None

    def admit(self, start: Callable[[Sequence], int | None]) -> list[Sequence]:
        """Give free slots to waiting sequences in order of arrival; → those that got one.

        start: of a sequence, how many tokens of its prompt need not be computed, or None if it should wait longer;
        sequences behind it may then pass it.
        """
        admitted = []
        for seq in list(self.waiting):
            if not self._free:
                break
            if (computed := start(seq)) is None:
                continue
            self.waiting.remove(seq)
            seq.slot, seq.computed = self._free.pop(0), computed
            (self.prefilling if computed < seq.prompt_len else self.decoding).append(seq)
            admitted.append(seq)
        return admitted

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

    def next_chunk(self) -> tuple[Sequence, int] | None:
        """Whose prompt is next, and up to which position: a mark, a multiple of `chunk` or its end."""
        if not self.prefilling:
            return None
        return (seq := self.prefilling[0]), self._chunk_end(seq)

    def _chunk_end(self, seq: Sequence) -> int:
        ends = {seq.prompt_len, seq.computed // self.chunk * self.chunk + self.chunk, *seq.marks}
        return min(end for end in ends if end > seq.computed)

    def ends_next(self, seq: Sequence) -> bool:
        """Whether the next chunk is the last of its prompt, and no sequence waits for an earlier part of it."""
        return not any(other.leader is seq for other in self.waiting) and self._chunk_end(seq) == seq.prompt_len

    def advance(self, seq: Sequence, computed: int) -> None:
        """Note how many tokens the slot of `seq` holds now. After a chunk, the next prompt has its turn."""
        seq.computed = computed
        if seq in self.prefilling:
            self.prefilling.remove(seq)
            (self.prefilling if computed < seq.prompt_len else self.decoding).append(seq)
