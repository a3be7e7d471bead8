"""How many tokens are drafted at once: decided by what drafts have been worth in this process. No JAX.

A round of n drafts takes longer than a plain step, and appends more tokens. With a_j, the probability that the j-th
draft is accepted if those before it are,

    tokens(n) = 1 + a_1 + a_1·a_2 + … + a_1·…·a_n      a sequence, a round
    rate(n)   = tokens(n) / seconds(n)                 n = 0: a plain step

and the n of the highest rate is next. a_j runs over the last drafts of that place, seconds over the last calls, by how
many sequences there are: more of them make drafts dear, since they leave no idle arithmetic to verify them with.

The estimates need trials, so drafting may fall behind: by no more than LOSS of the time spent on decoding, and the time
of GRACE rounds. If it has, the next calls are plain. While it pauses, what is known of the a_j fades to the optimism
of the start, until a trial is worth its cost. Plain steps are timed anew now and then, too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

_LOG = logging.getLogger(__name__)

LOSS = 0.03
GRACE = 8
HOPE, WEIGHT = 0.7, 2.0
"""What every a_j is taken for at first, and how many drafts this counts for."""
KEPT = 0.995  # of the weight of earlier drafts, from round to round of a sequence
FADING = 0.97  # of it, from plain call to plain call
RECENT = 0.2  # weight of the last call in the running seconds
WARM = 2  # calls of each kind that are not timed: the first ones are slower
EVERY = 64  # calls of one kind, with drafts or without, until the other is tried
POOR, ENOUGH = 0.3, 512
"""A drafter whose first drafts are accepted less often than this, of so many, is likely another model's."""


class Speculation:
    """The choice between plain steps and rounds of drafts, and the record of both.

    counts: how many tokens may be drafted at once, ascending. Attributes: chosen (of the last call, 0 if plain), rounds
    (of a sequence each), tried and accepted (drafts by place, since the start), lost (seconds behind plain decoding).
    """

    def __init__(self, counts: Sequence[int]):
        self.counts, most = list(counts), max(counts)
        self.chosen, self.rounds, self.lost, self._spent = 0, 0, 0.0, 0.0
        self.tried, self.accepted = [0] * most, [0] * most
        self._tried, self._accepted = [WEIGHT] * most, [WEIGHT * HOPE] * most
        self._seconds: dict[tuple[int, int], float] = {}  # by n and `_size`
        self._calls: dict[int, int] = {}  # by n
        self._alike, self._warned = 0, False  # how many calls in a row were of the last kind

    def choose(self, sequences: int, free: int | None = None) -> int:
        """How many tokens to draft at once in the next call, 0 for none.

        free: how many of the sequences may go on by more than one token, by default all.
        """
        free = sequences if free is None else free
        return self._best(sequences, free) if free else 0

    def _best(self, sequences: int, free: int) -> int:
        size = _size(sequences)
        plain = self._seconds.get((0, size))
        if plain is None or self._is_behind(size):
            return 0

        def rate(n: int) -> float:
            return (free * self.tokens(n) + sequences - free) / self.ratio(n, size)

        best = max(self.counts, key=rate)
        pays = rate(best) > sequences
        if self._alike < EVERY:
            return best if pays else 0
        if self.chosen:
            return 0
        most = self.counts[-1]
        return most if self.ratio(most, size) < 1 + most else 0  # otherwise it never pays

    def _is_behind(self, size: int) -> bool:
        return self.lost > LOSS * self._spent + GRACE * self._seconds.get((0, size), 0.0)

    def tokens(self, n: int) -> float:
        """What a round of n drafts is expected to append to a sequence."""
        return 1 + sum(math.prod(self.rates[: j + 1]) for j in range(n))

    @property
    def rates(self) -> list[float]:
        """The a_j."""
        return [a / t for a, t in zip(self._accepted, self._tried, strict=True)]

    def ratio(self, n: int, size: int) -> float:
        """How many plain steps a round of n drafts takes; of what was not measured, as near as that can be told."""
        known = {
            (m, s): seconds / self._seconds[0, s]
            for (m, s), seconds in self._seconds.items()
            if m and (0, s) in self._seconds
        }
        if not known:
            return 1.0
        m, s = min(known, key=lambda key: (key[1] != size, key[0] != n, abs(math.log2(key[1] / size)), abs(key[0] - n)))
        return 1 + (known[m, s] - 1) * n / m if m != n else known[m, s]

    def plain(self, sequences: int, steps: int, seconds: float) -> None:
        """A call of so many plain steps has taken so long."""
        self._time(0, sequences, seconds / steps)
        self._spent += seconds
        self._follow(0)
        for j in range(len(self._tried)):
            self._fade(j, FADING)

    def ran(self, sequences: int, n: int, kept: Sequence[Sequence[int]], room: Sequence[int], seconds: float) -> None:
        """A call has run rounds of n drafts.

        kept: how many tokens each round appended to each sequence. room: how many the call might append to each.
        """
        self._time(n, sequences, seconds / max(1, len(kept)))
        self._follow(n)
        left = list(room)
        for of_round in kept:
            for i, appended in enumerate(of_round):
                if appended:
                    self._judge(appended - 1, min(n, left[i] - 1))
                    left[i] -= appended
        self._spent += seconds
        plain = self._seconds.get((0, _size(sequences)))
        if plain is not None and self._calls[n] > WARM:
            appended = sum(map(sum, kept)) / sequences
            self.lost = max(0.0, self.lost + seconds - appended * plain)
        self._warn()

    def _judge(self, accepted: int, drafted: int) -> None:
        """Of a round of one sequence: how many drafts were accepted, of those that there was room for."""
        self.rounds += 1
        for j in range(min(accepted + 1, drafted)):
            self._fade(j, KEPT)
            self._tried[j] += 1
            self.tried[j] += 1
            self._accepted[j] += j < accepted
            self.accepted[j] += j < accepted

    def _follow(self, n: int) -> None:
        self._alike = self._alike + 1 if bool(n) == bool(self.chosen) else 1
        self.chosen = n

    def _fade(self, j: int, kept: float) -> None:
        self._tried[j] = WEIGHT + kept * (self._tried[j] - WEIGHT)
        self._accepted[j] = WEIGHT * HOPE + kept * (self._accepted[j] - WEIGHT * HOPE)

    def _time(self, n: int, sequences: int, seconds: float) -> None:
        self._calls[n] = self._calls.get(n, 0) + 1
        if self._calls[n] > WARM:
            key = n, _size(sequences)
            before = self._seconds.get(key, seconds)
            self._seconds[key] = before + RECENT * (seconds - before)

    def _warn(self) -> None:
        if not self._warned and self.tried[0] >= ENOUGH and self.accepted[0] < POOR * self.tried[0]:
            self._warned = True
            _LOG.warning(
                "drafts: found %d of %d first ones accepted, expected most of them: the drafter may be another model's",
                self.accepted[0],
                self.tried[0],
            )

    def __str__(self) -> str:
        """How many drafts were accepted, in all and by place."""
        places = ", ".join(f"{a / t:.2f}" for a, t in zip(self.accepted, self.tried, strict=True) if t)
        said = f"{sum(self.accepted)} of {sum(self.tried)} accepted in {self.rounds} rounds"
        return f"{said}; by place {places}" if places else said

    def report(self) -> dict[str, Any]:
        """For metrics."""
        return {
            "draft_tokens": self.chosen,
            "draft_rounds": self.rounds,
            "drafted_tokens": sum(self.tried),
            "accepted_tokens": sum(self.accepted),
            "drafts_by_place": list(zip(self.tried, self.accepted, strict=True)),
        }

    def table(self) -> dict[tuple[int, int], float]:
        """Seconds of a round of n drafts, or of a plain step, by n and how many sequences there were at most."""
        return dict(sorted(self._seconds.items()))


def _size(sequences: int) -> int:
    """Sequences, rounded up to a power of two."""
    return 1 << max(0, sequences - 1).bit_length()
