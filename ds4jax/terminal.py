"""What is shown on a terminal, or in a log: dimmed text, text of others made harmless, the progress of long work."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self

from tqdm import tqdm

EVERY = 10.0
"""Seconds from line to line."""
_HARMLESS = {code: "␛" if code == 0x1B else "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}

type Progress = tqdm | Lines
"""What `meter` gives: `update(n)` counts up, `n` is the count; it ends with the block, or by `close`."""


def meter(total: float, what: str, unit: str, *, show: bool = True, delay: float = 0.0) -> Progress:
    """A bar on stderr, or lines if that is no terminal.

    unit: "B" for bytes. delay: seconds before anything is shown; with one, the bar goes away at its end.
    """
    if not show or is_terminal(sys.stderr):
        scale = unit == "B"
        return tqdm(total=total, desc=what, unit=unit, unit_scale=scale, leave=not delay, delay=delay, disable=not show)
    return Lines(total, what, unit, delay)


def counted[T](items: Iterable[T], bar: Progress) -> Iterator[T]:
    """The items; each is counted on the bar when the next one is asked for."""
    for item in items:
        yield item
        bar.update()


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal on which the cursor can be moved, as it cannot with TERM=dumb."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def has_colours(stream: Any) -> bool:
    """Whether text in a stream may be coloured or dimmed: on a terminal, unless NO_COLOR is set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def dimming(stream: Any) -> tuple[str, str]:
    """What dims the text that follows, and what ends it; nothing in a stream without colours."""
    return ("\x1b[2m", "\x1b[0m") if has_colours(stream) else ("", "")


def harmless(text: str) -> str:
    """A text without control characters, by which it could command a terminal."""
    return text.translate(_HARMLESS)


class Lines:
    """Progress as lines on stderr, since carriage returns spoil a log.

    ``loading: 3.2 of 80.8 MiB`` every EVERY seconds, and at the end unless there was a delay.
    """

    def __init__(self, total: float, what: str, unit: str, delay: float):
        self.n, self._total, self._what, self._unit, self._delay = 0.0, total, what, unit, delay
        self._postfix, self._said, self._next = "", -1.0, time.monotonic() + (delay or EVERY)

    def update(self, n: float = 1) -> None:
        self.n += n
        if time.monotonic() >= self._next:
            self._say()

    def set_postfix_str(self, s: str) -> None:
        self._postfix = f", {s}"

    def close(self) -> None:
        if self.n != self._said and not self._delay:
            self._say()

    def _say(self) -> None:
        self._said, self._next = self.n, time.monotonic() + EVERY
        factor, unit, digits = (2.0**-20, "MiB", 1) if self._unit == "B" else (1, f"{self._unit}s", 0)
        n, total = (f"{x * factor:.{digits}f}" for x in (self.n, self._total))
        print(f"{self._what}: {n} of {total} {unit}{self._postfix}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
