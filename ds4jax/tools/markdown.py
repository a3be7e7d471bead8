"""An answer on a terminal: thoughts dimmed, Markdown as it comes; elsewhere plain text."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from ds4jax.terminal import dimming, harmless, has_colours

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown

_LEAST = 0.05
"""Seconds from drawing to drawing, at least: more if drawing would take over a fifth of the time."""


class Answer:
    """An answer that is being shown on stdout: `think` and `say` as it comes, then `end`."""

    def __init__(self):
        self._dim, self._plain = dimming(sys.stdout)
        self._thinks = False
        self._markdown = _MarkdownStream() if has_colours(sys.stdout) else None

    def think(self, text: str) -> None:
        self._thinks = True
        print(end=self._dim + harmless(text) + self._plain, flush=True)

    def say(self, text: str) -> None:
        if self._thinks:
            self._thinks = False
            print("\n", flush=True)
        if self._markdown:
            self._markdown.push(harmless(text))
        else:
            print(end=harmless(text), flush=True)

    def end(self) -> None:
        """Show what is left of it; also to be called where it was interrupted."""
        if self._markdown and not self._thinks:
            self._markdown.end()
        else:
            print(flush=True)


class _MarkdownStream:
    """Markdown that grows: blocks that are complete are printed once, the last one is drawn anew as it grows.

    While a block is higher than the terminal, only its end is drawn.
    """

    def __init__(self):
        self._text = ""  # of the blocks that are not printed yet
        self._printed = False  # whether any block is
        self._next = 0.0  # when to draw again
        self._console: Console | None = None
        self._live: Live | None = None

    def push(self, text: str) -> None:
        self._text += text
        if (began := time.monotonic()) >= self._next:
            self._draw()
            now = time.monotonic()
            self._next = now + max(_LEAST, 4 * (now - began))

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
        if self._text.strip():
            self._print(self._text)

    def _draw(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.segment import SegmentLines

        if self._console is None or self._live is None:
            self._console = Console(file=sys.stdout)
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        done = _complete(self._text)
        if done:
            self._print(self._text[:done])
            self._text = self._text[done:]
        lines = self._console.render_lines(_rendered(self._text), pad=False)[-max(1, self._console.height - 3) :]
        self._live.update(SegmentLines([[]] * self._printed + lines, new_lines=True), refresh=True)

    def _print(self, text: str) -> None:
        from rich.console import Console

        console = self._console or Console(file=sys.stdout)
        if self._printed:
            console.print()
        console.print(_rendered(text))
        self._printed = True


def _rendered(text: str) -> Markdown:
    from rich.markdown import Markdown

    return Markdown(text.strip("\n"), code_theme="ansi_dark", hyperlinks=False)


def _complete(text: str) -> int:
    """How many characters of a Markdown text are blocks that do not change any more: all but the last one."""
    from markdown_it import MarkdownIt

    starts = [token.map[0] for token in MarkdownIt().enable("table").parse(text) if token.map and not token.level]
    return sum(map(len, text.splitlines(keepends=True)[: starts[-1]])) if starts else 0
