"""What a request changes in the logits before a token is drawn: biases, penalties, a grammar. No JAX here."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ds4jax.engine.grammar import Matcher
    from ds4jax.engine.sampling import Edits
    from ds4jax.engine.types import Budget, Request, Sampling


EDITS = 256
"""Tokens of each sequence whose logits are edited at once."""


class Constraints:
    """The edits of one sequence, which follow its tokens: `push` each one.

    ids, repeat, add: tokens, by what their logits are to be divided (see `sampling.Edits`), and what is to be added.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int],
        stop_ids: Iterable[int],
        matcher: Matcher | None,
        budget: Budget | None = None,
    ):
        self._sampling, self.matcher = sampling, matcher
        self._budget = budget  # of the thought, while it goes on
        self.ids: list[int] = []
        self.repeat: list[float] = []
        self.add: list[float] = []
        self._place: dict[int, int] = {}  # of a token in the three
        self._answer = Counter[int]()
        for token, bias in sampling.logit_bias:
            self.add[self._entry(token)] += bias
        if sampling.repetition_penalty != 1:
            for token in prompt:
                self.repeat[self._entry(token)] = sampling.repetition_penalty
        self._ends = [self._entry(token) for token in (sorted(stop_ids) if sampling.min_tokens else ())]
        self._penalises = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1

    @property
    def error(self) -> str:
        """Why the answer cannot go on, or ''."""
        return self.matcher.error if self.matcher else ""

    @property
    def forbidden(self) -> list[int]:
        """Which of the entries are tokens that must not come yet. Where a grammar ends, so does the answer."""
        if self.matcher and self.matcher.ended:
            return []
        return self._ends if self._ends and self._answer.total() < self._sampling.min_tokens else []

    @property
    def free(self) -> float:
        """How many tokens, one at least, may be drawn before the next one whose logits are edited."""
        if self.matcher or self.ids or self._penalises:
            return 1
        return max(1, self._budget.tokens - self._answer.total()) if self._budget else math.inf

    def push(self, token: int) -> None:
        """The answer goes on with this token."""
        self._answer[token] += 1
        if self._penalises:
            place = self._entry(token)
            self.repeat[place] = self._sampling.repetition_penalty
            self.add[place] -= self._sampling.frequency_penalty
            if self._answer[token] == 1:
                self.add[place] -= self._sampling.presence_penalty
        if self._budget and token == self._budget.close:
            self._budget = None
        if self.matcher:
            self.matcher.push(token)

    def fill(self, allowed: np.ndarray) -> None:
        """Clear the bits of tokens that may not come next: uint32 (⌈V / 32⌉,), all ones."""
        if self._budget and self._answer.total() >= self._budget.tokens:
            word, bit = divmod(self._budget.close, 32)
            allowed[:] = 0
            allowed[word] = 1 << bit
        elif self.matcher:
            self.matcher.fill(allowed)

    def _entry(self, token: int) -> int:
        if token not in self._place:
            self._place[token] = len(self.ids)
            self.ids.append(token)
            self.repeat.append(1.0)
            self.add.append(0.0)
        return self._place[token]


def constraints_of(request: Request, prompt: Iterable[int], stop_ids: Iterable[int]) -> Constraints | None:
    """The constraints of a request, or None if the tokens that are sampled on the device will do."""
    asked = request.sampling.edits_logits, request.logprobs is not None, request.grammar, request.budget
    if not any(asked):
        return None
    matcher = None
    if request.grammar:
        from ds4jax.engine.grammar import Matcher

        matcher = Matcher(request.grammar)
    return Constraints(request.sampling, prompt, stop_ids, matcher, request.budget)


def edits(rows: Sequence[Constraints | None], vocab: int) -> list[Edits]:
    """The edits of a batch, as numpy arrays, to be made one after the other; None for a sequence without.

    Each has EDITS ids, because each other number of them would have to be compiled. The last one has the tokens that
    are allowed; those before it allow all.
    """
    from ds4jax.engine.sampling import Edits

    pieces = max(1, *(-(-len(row.ids) // EDITS) if row else 0 for row in rows))
    shape = len(rows), pieces * EDITS
    ids, repeat, add = np.full(shape, vocab, np.int32), np.ones(shape, np.float32), np.zeros(shape, np.float32)
    every = np.full((len(rows), -(-vocab // 32)), 2**32 - 1, np.uint32)
    allowed = every.copy()
    for i, row in enumerate(rows):
        if row:
            n = len(row.ids)
            ids[i, :n], repeat[i, :n], add[i, :n] = row.ids, row.repeat, row.add
            add[i, row.forbidden] = -np.inf
            row.fill(allowed[i])
    starts = range(0, pieces * EDITS, EDITS)
    parts = [Edits(*(x[:, i : i + EDITS] for x in (ids, repeat, add)), allowed=every) for i in starts]
    return [*parts[:-1], dataclasses.replace(parts[-1], allowed=allowed)]
