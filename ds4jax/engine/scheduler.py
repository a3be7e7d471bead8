"""Who computes next: sequences share the slots of one runner. No JAX here, no tensors: only token ids and positions.

Every step of the engine runs at most one chunk of one prompt, and a token (without a chunk: a few) of every sequence
that is past its prompt. So a running answer never waits for more than one chunk, and a prompt never for answers. Slots
are given in order of arrival; prompts that hold one take turns, chunk by chunk, so that a short one does not wait for a
long one to end.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator

from ds4jax.engine.keys import common, key_of

ALIGN = 128
"""Positions at which a sequence's state can be saved and reused: there every window of every compressor is closed."""


@dataclasses.dataclass(eq=False)
class Job:
    """One sequence: its token ids, first the prompt, `prompt` of them, then the answer.

    marks: positions in the prompt at which a chunk has to end. slot: where it runs, None while it waits. done: tokens
    that its slot holds. Once done ≥ prompt it decodes. key: the prompt's. leader: the job whose prompt it waits for.
    later: a mark that is kept with the whole prompt only, or 0.
    """

    tokens: list[int]
    prompt: int
    marks: set[int] = dataclasses.field(default_factory=set)
    slot: int | None = None
    done: int = 0
    key: bytes = dataclasses.field(init=False)
    leader: Job | None = None
    later: int = 0

    def __post_init__(self):
        self.key = key_of(self.tokens[: self.prompt])


class Scheduler:
    """The order of things among jobs.

    slots: sequences at once. chunk: tokens of a prompt at once, at most.
    waiting: jobs without a slot, in order of arrival. prefilling: jobs whose prompt is not done, the next one first.
    decoding: the others.
    """

    def __init__(self, slots: int, chunk: int):
        self.chunk = chunk
        self.waiting: list[Job] = []
        self.prefilling: collections.deque[Job] = collections.deque()
        self.decoding: list[Job] = []
        self._free = list(range(slots))

    def __iter__(self) -> Iterator[Job]:
        """All jobs."""
        return iter([*self.waiting, *self.prefilling, *self.decoding])

    def __len__(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def add(self, job: Job) -> None:
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Forget a job and free its slot; nothing happens if it is not here."""
        for jobs in (self.waiting, self.prefilling, self.decoding):
            if job in jobs:
                jobs.remove(job)
                if job.slot is not None:
                    self._free.append(job.slot)
                    job.slot = None

    def admit(self, start: Callable[[Job], int | None]) -> list[Job]:
        """Give free slots to waiting jobs in order of arrival; → those that got one.

        start(job): how many tokens of the prompt it need not compute, or None if it should wait a while longer; those
        after it then go first.
        """
        admitted = []
        for job in list(self.waiting):
            if not self._free:
                break
            if (done := start(job)) is None:
                continue
            self.waiting.remove(job)
            job.slot, job.done = self._free.pop(0), done
            (self.prefilling if done < job.prompt else self.decoding).append(job)
            admitted.append(job)
        return admitted

    def should_wait(self, job: Job, have: int) -> bool:
        """Whether a prompt that is being computed will soon be worth more to `job` than the `have` tokens it has.

        If so, that prompt is marked where the two part, or `job` is the same prompt and can start where that one ends.
        A job waits for one other at most: what comes of it may be lost again before it is its turn.
        """
        for other in self.prefilling if job.leader is None else [job.leader] * (job.leader in self.prefilling):
            target = job.prompt if job.key == other.key else self._parting(job, other)
            if target > max(have, other.done) or have < other.later <= target:
                job.leader = other
                other.marks.add(target)
                return True
        return False

    def _parting(self, job: Job, other: Job) -> int:
        return min(common(job.key, other.key) // 4, job.prompt - 1) // ALIGN * ALIGN

    def next_chunk(self) -> tuple[Job, int] | None:
        """Whose prompt is next, and up to which position: a mark, a multiple of `chunk` or its end."""
        if not self.prefilling:
            return None
        return (job := self.prefilling[0]), self._chunk_end(job)

    def _chunk_end(self, job: Job) -> int:
        ends = {job.prompt, job.done // self.chunk * self.chunk + self.chunk, *job.marks}
        return min(end for end in ends if end > job.done)

    def ends_next(self, job: Job) -> bool:
        """Whether the next chunk is the last of its prompt, and nobody waits for what there is before it."""
        return not any(other.leader is job for other in self.waiting) and self._chunk_end(job) == job.prompt

    def advance(self, job: Job, done: int) -> None:
        """The slot of `job` holds this many tokens now. After a chunk, the next prompt has its turn."""
        job.done = done
        if job in self.prefilling:
            self.prefilling.remove(job)
            (self.prefilling if done < job.prompt else self.decoding).append(job)
