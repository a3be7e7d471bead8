"""What a user types: messages of one or several lines, at a terminal with history and completion, or in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ds4jax.terminal import is_terminal

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document

QUOTES = '"""'
"""Around a message of several lines."""

type AskUser = Callable[[str], str | None]
"""Asks for a message, which begins with a text; → None at the end of the input. Ctrl-C raises KeyboardInterrupt."""


def asker(history: Path, words: dict[str, tuple[str, ...]], paths: Iterable[str]) -> AskUser:
    """How to ask: with line editing if the input and the output are a terminal, else line by line.

    history: a file of what was typed. words: commands, and what may follow each. paths: commands that a path follows.
    """
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        return _edited(history, words, frozenset(paths))
    return _plain


def unfinished(text: str) -> bool:
    """Whether QUOTES are open, so that the message goes on after the end of the line."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def unquoted(text: str) -> str:
    """A message without the QUOTES around it, if it has some."""
    stripped = text.strip()
    return stripped[3:].removesuffix(QUOTES).strip("\r\n") if stripped.startswith(QUOTES) else text


def _plain(begin: str) -> str | None:
    """Read a line, or several in QUOTES. Without line editing, `begin` is not offered."""
    try:
        text = input("> " if sys.stdin.isatty() else "")
        while unfinished(text):
            text += "\n" + input("… " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return text


def _edited(history: Path, words: dict[str, tuple[str, ...]], paths: frozenset[str]) -> AskUser:
    """prompt_toolkit: Enter sends, Alt+Enter or a pasted text begins a new line, Tab completes commands and paths."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter
    from prompt_toolkit.data_structures import Size
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output.vt100 import Vt100_Output

    class Commands(Completer):
        """Completes a command at the beginning of a message, and what follows it."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            command, space, rest = document.text_before_cursor.partition(" ")
            if not command.startswith("/"):
                return
            if not space:
                yield from WordCompleter(list(words), WORD=True).get_completions(document, complete_event)
            elif command in paths:
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            else:
                following = WordCompleter(list(words.get(command, ())))
                yield from following.get_completions(Document(rest), complete_event)

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    def size() -> Size:
        columns, rows = shutil.get_terminal_size()
        return Size(rows, columns)

    history.touch(mode=0o600)
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="… ",
        history=FileHistory(str(history)),
        completer=Commands(),
        complete_while_typing=False,
        key_bindings=keys,
        # Not to ask where the cursor is: the terminal's answer would come among what is typed, and from some never.
        output=Vt100_Output(sys.stdout, size, term=os.environ.get("TERM"), enable_cpr=False),
    )

    def ask(begin: str) -> str | None:
        try:
            return session.prompt(default=begin)
        except EOFError:
            return None

    return ask
