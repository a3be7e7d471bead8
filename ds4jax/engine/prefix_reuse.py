"""Prefix reuse: where a sequence starts, and which snapshots are taken of it while it runs.

A snapshot is taken at the marks of a prompt, at its end, at the last multiples of 128 in an answer, and of a sequence
that is to be suspended, which later goes on from it. Snapshots are copied from the device in pieces, one for each step
of the engine, so that no answer waits for a long one. Before the first piece is copied the sequence must not go on, nor
another start in its slot; after that it may.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ds4jax.engine.keys import key_of
from ds4jax.engine.prefix_cache import PrefixCache, Snapshot, positions
from ds4jax.engine.scheduler import Scheduler
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.types import ALIGN

if TYPE_CHECKING:
    from ds4jax.engine.model_runner import ModelRunner, Sampled
    from ds4jax.engine.snapshot import Planes

_LOG = logging.getLogger(__name__)

READ_SECONDS = 10.0
"""How long a sequence waits for a snapshot from disk."""
LATE = 64
"""Tokens by which an answer may be past its end when the reader's decision to end it arrives."""


@dataclasses.dataclass
class _Due:
    """A snapshot of the first `end` tokens of a sequence that is being taken.

    pieces: of `ModelRunner.take`. following: what was sampled after a whole prompt; None unless these are one.
    begun: whether the first piece is copied. leaves: whether the sequence is to be suspended.
    """

    seq: Sequence
    end: int
    pieces: Iterator[Planes | None]
    following: Sampled | None
    begun: bool = False
    leaves: bool = False


class PrefixReuse:
    """Connects the sequences of an engine with a prefix cache. Without one, every prompt is computed whole."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, cache: PrefixCache | None):
        self.cache = cache
        self._runner, self._scheduler = runner, scheduler
        self._due: collections.deque[_Due] = collections.deque()

    # ---- where a sequence starts -------------------------------------------------------------------------------------
    def arrive(self, seq: Sequence, wake: Callable[[], None]) -> None:
        """Look up a new sequence. wake: called, in another thread, when a snapshot has been read from disk."""
        if self.cache is None:
            return
        seq.marks = positions(seq.prompt_len, self._scheduler.chunk, self.cache.shared(seq.key))
        if seq.request.prompt_logprobs is not None:  # every token of it has to be computed
            return
        found = self.cache.find(seq.key)
        seq.known = found.length if found else 0
        seq.disk_read = self.cache.fetch(seq.key, seq.known)
        if seq.disk_read:
            seq.disk_read.add_done_callback(lambda _: wake())

    def start(self, seq: Sequence) -> int | None:
        """How many tokens of its prompt a waiting sequence can start with now, or None if it had better wait."""
        if seq.suspended:
            return seq.suspended.length
        if self.cache is None or seq.request.prompt_logprobs is not None:
            return 0
        if seq.disk_read:
            if not seq.disk_read.done() and time.perf_counter() - seq.submitted_at < READ_SECONDS:
                return None
            read, seq.disk_read = seq.disk_read, None
            try:
                seq.base = read.result(timeout=0)
            except Exception:
                _LOG.exception("a prefix cannot be read from disk, and is computed instead")
            if seq.base:
                seq.known = seq.base.length
                self.cache.put(seq.base)
        if seq.leader and self._scheduler.should_wait(seq, 0):
            return None
        found = self.cache.find(seq.key)
        if found and (seq.base is None or found.length > seq.base.length):
            seq.base = found
        have = seq.base.length if seq.base else 0
        return None if self._scheduler.should_wait(seq, have) else have

    # ---- which snapshots are taken -----------------------------------------------------------------------------------
    def prefilled(self, seq: Sequence, sampled: Sampled, passed: int | None = None) -> None:
        """The chunk of a prompt that ends at `seq.computed` has run. sampled: what follows it. passed: a mark in it."""
        if self.cache is None:
            return
        end = seq.computed
        complete = end == seq.prompt_len
        if passed is not None:
            seq.deferred_mark, seq.mark_state = passed, sampled.state
        if not complete and end in seq.marks and self._scheduler.ends_next(seq):
            # The snapshot of the whole prompt will have the same compressed rows, and a few more.
            seq.deferred_mark, seq.mark_state = end, self._runner.state(seq.held_slot)
        elif end in seq.marks or complete and end >= ALIGN:
            self._take(seq, end, following=sampled if complete else None)

    def decoded(self, seq: Sequence) -> None:
        """A token of the answer has been computed."""
        if self.cache is not None and seq.computed % ALIGN == 0:
            seq.tails.append((seq.computed, self._runner.state(seq.held_slot)))

    def end(self, seq: Sequence, cancelled: bool) -> None:
        """The sequence ends. What was computed of it is kept up to the last position that will be asked for again.

        An answer that its reader has cancelled may be past the position at which the reader stopped reading.
        """
        if self.cache is None:
            return
        if seq.suspended or seq.slot is None:
            return self._keep_suspended(seq)
        due = any(due.seq is seq and not due.leaves for due in self._due)
        if not due and seq.cached < seq.computed < seq.prompt_len:
            if seq.computed % ALIGN == 0:  # a prompt that was interrupted
                seq.tails.append((seq.computed, {}))
        if len(seq.tails) == 2 and not (cancelled and seq.computed - seq.tails[-1][0] < LATE):
            seq.tails.popleft()
        for end, state in seq.tails:
            self._take(seq, end, state)
        if seq.latest and not due and not seq.tails:  # otherwise it is saved when the last one is taken
            self.cache.save(seq.latest)

    def suspend(self, seq: Sequence) -> None:
        """The sequence is to give up its slot, and to go on later where it is now."""
        self._take(seq, seq.computed, leaves=True)

    def discard(self, seq: Sequence) -> None:
        """Nothing is to be kept of a sequence, which is about to end: its state is wrong."""
        self._due = collections.deque(due for due in self._due if due.seq is not seq)
        seq.tails.clear()
        seq.latest = None
        if self.cache is not None:
            self.cache.discard(key_of(seq.tokens))

    def forget(self) -> None:
        """Give up the snapshots that are being taken: what they are of is lost."""
        self._due.clear()

    # ---- taking them -------------------------------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """Whether a snapshot is being taken: until it is, no sequence gets a slot."""
        return bool(self._due)

    def must_rest(self) -> set[Sequence]:
        """Sequences that must not go on: they leave, or the first piece of a snapshot of theirs is not copied."""
        return {due.seq for due in self._due if due.leaves or not due.begun}

    def take_piece(self) -> bool:
        """Copy a piece of the first snapshot that is due; → whether there was one."""
        if not self._due:
            return False
        due = self._due[0]
        planes, due.begun = next(due.pieces), True
        if planes is None:
            return True
        self._due.popleft()
        seq = due.seq
        if due.leaves:
            seq.suspended = Snapshot(key_of(seq.tokens[: due.end]), planes)
            if seq in self._scheduler:
                self._scheduler.suspend(seq)
            else:
                self._keep_suspended(seq)
            return True
        assert self.cache is not None  # nothing else is taken without one
        kept = {} if due.following and due.end not in seq.marks else {due.end: planes}
        if due.following:
            self.cache.put(Snapshot(key_of(seq.tokens[: due.end]), planes, due.following.logits))
            if seq.mark_state is not None:
                kept[seq.deferred_mark] = self._runner.earlier(planes, seq.deferred_mark, seq.mark_state)
                seq.mark_state = None
        for end, planes in sorted(kept.items()):
            seq.latest = Snapshot(key_of(seq.tokens[:end]), planes)
            self.cache.put(seq.latest)
        if seq.latest and seq not in self._scheduler:
            self.cache.save(seq.latest)
        return True

    def _keep_suspended(self, seq: Sequence) -> None:
        """Keep the state of a sequence that has ended while it was suspended, or before."""
        if self.cache is not None and (state := seq.suspended) is not None and state.length % ALIGN == 0:
            self.cache.put(state)
            seq.latest = state
        if self.cache is not None and seq.latest:
            self.cache.save(seq.latest)

    def _take(
        self,
        seq: Sequence,
        end: int,
        state: Planes | None = None,
        following: Sampled | None = None,
        leaves: bool = False,
    ) -> None:
        """Begin a snapshot of the first `end` tokens: of the slot as it is now, or was when `state` was taken."""
        self._due.append(_Due(seq, end, self._runner.take(seq.held_slot, end, state), following, leaves=leaves))
