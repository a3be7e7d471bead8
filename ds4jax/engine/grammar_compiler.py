"""Grammars within limits: each is compiled in a process of its own first, and only then in this one.

Grammars come from clients, and some hang, fill memory or overflow the native stack of the process that compiles them.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ds4jax.engine.form import MAX_TEXT, Begin, Either, Form, GrammarError, Pattern, TooHard
from ds4jax.engine.grammar import Grammar, Vocabulary
from ds4jax.errors import Ds4Error
from ds4jax.io.tokenizer import Tokenizer

MAX_NODES, MAX_DEPTH, MAX_REFERENCES = 100_000, 128, 1000  # of a schema
KEPT = 32  # the most grammars that are remembered

PATIENCE = 4
"""How many times `Limits.seconds` a grammar may take if other processes hold the processor most of the time."""
_START_SECONDS = 60.0  # to import and to read the vocabulary
_STACK = 4 << 20  # bytes: less than the threads have that compile what has passed


@dataclasses.dataclass(frozen=True)
class Limits:
    """What compiling one grammar may take.

    seconds: by the clock; up to PATIENCE times as many, while the processor has worked on it for at most half of
    `seconds`. bytes: of memory.
    """

    seconds: float = 2.0
    bytes: int = 512 << 20

    def __str__(self) -> str:
        return f"{self.seconds:g} s and {self.bytes >> 20} MiB"


class GrammarCompiler:
    """Makes grammars of forms, within limits, and remembers the last ones, also those that were refused.

    Thread-safe; one is compiled at a time.
    """

    def __init__(self, tokenizer: Tokenizer, limits: Limits | None = None):
        self._tokenizer, self._limits = tokenizer, limits or Limits()
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._known = collections.OrderedDict[bytes, Grammar | GrammarError]()
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def __call__(self, form: Form, begin: Begin) -> Grammar:
        """Raises GrammarError."""
        check_size(form)
        key = pickle.dumps((form, begin))
        with self._lock:
            if key not in self._known:
                self._known[key] = self._made(form, begin)
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            found = self._known[key]
        if isinstance(found, GrammarError):
            raise found.with_traceback(None)
        return found

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _made(self, form: Form, begin: Begin) -> Grammar | GrammarError:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._tokenizer)
        try:
            self._try(form)
            return Grammar(self._vocabulary, form, begin)
        except GrammarError as error:
            return error

    def _try(self, form: Form) -> None:
        """Compile a form in the other process. Raises GrammarError."""
        for _ in range(2):  # the process may have ended for another reason
            pipe = self._pipe or self._start()
            try:
                pipe.send_bytes(pickle.dumps(form))
                if self._answers(pipe):
                    if wrong := pipe.recv_bytes().decode():
                        raise GrammarError(wrong)
                    return
                break
            except (EOFError, OSError):
                self._stop()
        self._stop()
        raise TooHard(f"grammar: found one that takes more to compile, expected at most {self._limits}")

    def _answers(self, pipe: Connection) -> bool:
        """Whether the process answers within the limits."""
        assert self._process is not None
        began = _processor_seconds(self._process.pid)
        for _ in range(PATIENCE):
            if pipe.poll(self._limits.seconds):
                return True
            if _processor_seconds(self._process.pid) - began > self._limits.seconds / 2:
                break
        return False

    def _start(self) -> Connection:
        self._stop()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            nowhere = subprocess.DEVNULL
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=nowhere, stdout=nowhere, stderr=nowhere
            )
        self._pipe = pipe = Connection(ours.detach())
        try:
            pipe.send_bytes(pickle.dumps((self._tokenizer, self._limits)))
            if pipe.poll(_START_SECONDS):
                pipe.recv_bytes()
                return pipe
        except (EOFError, OSError):
            pass
        self._stop()
        raise Ds4Error("grammar: the process that compiles it first did not start")  # nothing to be remembered

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def _processor_seconds(pid: int) -> float:
    """What a process has computed so far, all its threads together."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = after_name[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def check_size(form: Form) -> None:
    """Raises GrammarError for a form that is too large to try."""
    match form:
        case Pattern(text=text):
            _at_most("grammar", len(text), MAX_TEXT, "characters")
        case Either(first, second):
            check_size(first)
            check_size(second)
        case Mapping():
            _check_schema(form)


def _check_schema(schema: Mapping[str, Any]) -> None:
    nodes = references = 0
    todo: list[tuple[Any, int]] = [(schema, 1)]
    while todo:
        node, depth = todo.pop()
        nodes += 1
        _at_most("json_schema", depth, MAX_DEPTH, "levels")
        _at_most("json_schema", nodes, MAX_NODES, "values")
        if isinstance(node, Mapping):
            references += "$ref" in node
            _at_most("json_schema", references, MAX_REFERENCES, "references")
            node = list(node.values())
        if isinstance(node, list):
            todo += [(inner, depth + 1) for inner in node]


def _at_most(name: str, found: int, expected: int, things: str) -> None:
    if found > expected:
        raise TooHard(f"{name}: found more than {expected} {things}, expected at most that")


# ---- the other process -----------------------------------------------------------------------------------------------
def _serve(pipe: Connection) -> None:
    """Answer every form with what is wrong with it, or ''."""
    tokenizer, limits = pickle.loads(pipe.recv_bytes())
    vocabulary = Vocabulary(tokenizer)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limits.bytes, used + limits.bytes))
    pipe.send_bytes(b"")
    while True:
        try:
            form = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.alarm(int(limits.seconds * PATIENCE) + 2)  # ends this process, should the other one be gone
        try:
            Grammar(vocabulary, form)
            wrong = ""
        except GrammarError as error:
            wrong = str(error)
        signal.alarm(0)
        pipe.send_bytes(wrong.encode())


def main() -> None:
    """Serve the process at the other end of the socket whose number is the argument, until that closes it."""
    pipe = Connection(int(sys.argv[1]))
    threading.stack_size(_STACK)
    thread = threading.Thread(target=_serve, args=(pipe,))
    thread.start()
    thread.join()
    os._exit(0)


if __name__ == "__main__":
    main()
