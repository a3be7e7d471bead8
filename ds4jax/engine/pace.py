"""How long the chunk of a prompt may be while answers wait for it: as long as a target for the gaps in them allows.

What a chunk takes is known from the last one of its length, unless a shorter or longer one shows that this call was
slow by accident: the time neither falls nor rises faster than the length. A length that has not been measured is
guessed to take in proportion to the nearest that has. A chunk that is too short reads all weights for a few tokens, so
none is chosen with which a prompt would advance less than three quarters as fast as with the best: a target that asks
for more is missed.
"""

from __future__ import annotations

from collections.abc import Sequence

LEAST_RATE = 0.75
"""Of the tokens per second of the best length."""


class Pace:
    """The longest chunk for a target.

    sizes: the lengths that chunks are padded to, ascending. target: seconds between two tokens of an answer.
    """

    def __init__(self, sizes: Sequence[int], target: float):
        self._sizes, self._target = sizes, target
        self._seconds: dict[int, float] = {}

    def took(self, tokens: int, seconds: float) -> None:
        """Note how long a chunk of so many tokens took."""
        size = next((size for size in self._sizes if size >= tokens), None)
        if size:
            self._seconds[size] = seconds

    def longest(self, decode_seconds: float) -> int:
        """Tokens of a chunk that, with a token of each answer after it, takes no longer than the target."""
        guess = {size: self._guess(size) for size in self._sizes}
        best = max(size / seconds if seconds else 0.0 for size, seconds in guess.items())
        fast = [size for size in self._sizes if size >= LEAST_RATE * best * guess[size]]
        return max((size for size in fast if guess[size] + decode_seconds <= self._target), default=fast[0])

    def _guess(self, size: int) -> float:
        """Seconds that a chunk of this length takes; 0 if none has been measured."""
        if not self._seconds:
            return 0.0
        if size in self._seconds:
            return min(seconds * max(1, size / other) for other, seconds in self._seconds.items())
        nearest = min(self._seconds, key=lambda other: max(size / other, other / size))
        return self._guess(nearest) * size / nearest
