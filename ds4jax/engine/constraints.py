"""What a request changes in the logits before a token is drawn: biases, penalties, a grammar. No JAX here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ds4jax.engine.grammar import Matcher
    from ds4jax.sampling import Edits, Sampling


class Constraints:
    """The edits of one sequence, which follow its tokens: `push` each one."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], stop_ids: Iterable[int], matcher: Matcher | None):
        self._sampling, self._stop_ids, self.matcher = sampling, sorted(stop_ids), matcher
        self._bias, self._answer = dict(sampling.logit_bias), Counter[int]()
        self._seen = dict.fromkeys(prompt if sampling.repetition_penalty != 1 else ())  # an ordered set

    @property
    def error(self) -> str:
        """Why the answer cannot go on, or ''."""
        return self.matcher.error if self.matcher else ""

    def push(self, token: int) -> None:
        """The answer goes on with this token."""
        self._answer[token] += 1
        self._seen[token] = None
        if self.matcher:
            self.matcher.push(token)

    def entries(self) -> tuple[list[int], list[float], list[float]]:
        """Ids, and by what their logits are to be divided (see `sampling.Edits`) and what is to be added."""
        s = self._sampling
        early = self._stop_ids if self._answer.total() < s.min_tokens else []
        ids = list({**dict.fromkeys(self._bias), **self._seen, **dict.fromkeys(early)})
        repeat = [s.repetition_penalty if i in self._seen else 1.0 for i in ids]
        add = [
            self._bias.get(i, 0.0) - s.presence_penalty * (i in self._answer) - s.frequency_penalty * self._answer[i]
            for i in ids
        ]
        return ids, repeat, [-np.inf if i in early else x for i, x in zip(ids, add, strict=True)]


def edits(rows: Sequence[Constraints | None], vocab: int) -> Edits:
    """The edits of a batch, as numpy arrays; None for a sequence without."""
    from ds4jax.sampling import Edits

    entries = [row.entries() if row else ([], [], []) for row in rows]
    size = 16
    while size < max(len(ids) for ids, _, _ in entries):  # few shapes, because each is compiled
        size *= 4
    shape = len(rows), size
    ids, repeat, add = np.full(shape, vocab, np.int32), np.ones(shape, np.float32), np.zeros(shape, np.float32)
    allowed = np.full((len(rows), -(-vocab // 32)), 2**32 - 1, np.uint32)
    for i, (row, (row_ids, row_repeat, row_add)) in enumerate(zip(rows, entries, strict=True)):
        n = len(row_ids)
        ids[i, :n], repeat[i, :n], add[i, :n] = row_ids, row_repeat, row_add
        if row and row.matcher:
            row.matcher.fill(allowed[i])
    return Edits(ids, repeat, add, allowed)
