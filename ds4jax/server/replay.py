"""Turns with tool calls as they were sampled, so that the next prompt repeats them token by token.

A client sends back the JSON of a call, not the tokens that said it. Rendered anew these may differ, and the prompt
would part there from what is cached.

Turns are kept in memory, and with a folder also in a log file beside the prefixes of the engine. The log is a list of
lines, each with its own checksum, so damage costs the lines that it touches and a kill at most the last one. SQLite has
no checksums, and damage to one of its pages can cost the whole database.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from pathlib import Path
from typing import Any, Self

from ds4jax.chat.template import SampledTurn
from ds4jax.engine.kv_store import KVStore
from ds4jax.files import append, write_whole

MAX_BYTES = 64 << 20
"""Bytes that turns take, at most."""
SHARE = 16
"""Turns take at most this fraction of the budget of a folder."""

log = logging.getLogger(__name__)


def split_budget(nbytes: int) -> tuple[int, int]:
    """The budget of a folder as that of its prefixes and that of its turns, in bytes."""
    turns = min(nbytes // SHARE, MAX_BYTES)
    return nbytes - turns, turns


class Replay:
    """Remembers turns with tool calls by the id of their first call. Thread-safe. notes: where it does."""

    def __init__(self, notes: NoteLog | None = None):
        """notes: where turns are kept, by default in memory."""
        self.notes = NoteLog(None, MAX_BYTES) if notes is None else notes

    @classmethod
    def beside(cls, store: KVStore | None, room: int) -> Self:
        """A memory that lasts as long as the prefixes in `store`, if there is one. room: bytes of its file."""
        if store is None:
            return cls()
        return cls(NoteLog(store.notes, room, store.seed))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.notes.nbytes

    def remember(self, turn: SampledTurn) -> None:
        """Keep a turn. On disk, if it is to be there, when this returns."""
        value = {"thinking": turn.thinking, "message": turn.message, "ids": list(turn.ids)}
        self.notes.put(f"turn:{turn.message['tool_calls'][0]['id']}", value)

    def recall(self, messages: list[Any]) -> dict[str, SampledTurn]:
        """What is remembered of the turns with calls in `messages`, by the id of each one's first call."""
        out = {}
        for message in messages:
            try:
                id = message["tool_calls"][0]["id"]
            except (TypeError, LookupError):  # no calls, or nothing the renderer will take
                continue
            if isinstance(id, str) and (note := self.notes.get(f"turn:{id}")):
                out[id] = SampledTurn(note["thinking"], note["message"], tuple(note["ids"]))
        return out


class NoteLog:
    """A table of small JSON values: in memory, and in a file to which each new one is appended as a line.

    A line is the checksum of the rest, keyed with the seed, and [key, value]; of lines with the same key the last one
    counts. When the file would exceed half its room it is written anew with the values used last, at most a quarter of
    the room: the old and the new file together never exceed it.
    """

    def __init__(self, path: Path | None, room: int, seed: bytes = b""):
        """path: the file, in a folder that is there, or None for memory alone. room: bytes, at most. seed: of the
        checksums; lines with another one count as damaged."""
        self._path, self._room, self._seed = path, room, seed
        self._lines: dict[str, bytes] = {}  # least recently used first
        self._lock = threading.Lock()
        self._size, damaged = 0, 0
        data = b""
        if path is not None:
            with contextlib.suppress(OSError):
                path.with_name(f"{path.name}.tmp").unlink()  # of a process that was killed
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
        self._size = len(data)
        *lines, torn = data.split(b"\n")
        for line in lines:
            checksum, _, text = line.partition(b" ")
            if checksum == self._checksum(text):
                self._set(json.loads(text)[0], line + b"\n")
            else:
                damaged += 1
        damaged += bool(torn)
        if damaged:
            log.warning("%s: %d damaged notes; deleted", path, damaged)
        self._stale = bool(damaged)  # whether the file must be written anew before it can grow
        if self._stale or self._size > room // 2:
            self._rewrite()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return 0 if self._path is None else self._size

    def get(self, key: str) -> Any:
        """The value kept under `key`, or None."""
        with self._lock:
            if key not in self._lines:
                return None
            self._set(key, line := self._lines[key])
        return json.loads(line.partition(b" ")[2])[1]

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value under `key`, in place of an older one. Values used longest ago make room."""
        text = json.dumps([key, value]).encode()
        line = self._checksum(text) + b" " + text + b"\n"
        if len(line) > self._room // 4:
            log.info("note %s of %d bytes exceeds the budget, %d bytes", key, len(line), self._room // 4)
            return
        with self._lock:
            same = self._lines.get(key) == line
            self._set(key, line)
            if self._stale or self._size + len(line) > self._room // 2:
                self._rewrite()
            elif not same:
                self._append(line)

    def _checksum(self, text: bytes) -> bytes:
        return hashlib.blake2b(text, digest_size=32, key=self._seed).hexdigest().encode()

    def _set(self, key: str, line: bytes) -> None:
        self._lines.pop(key, None)
        self._lines[key] = line

    def _append(self, line: bytes) -> None:
        try:
            if self._path is not None:
                append(self._path, line)
        except OSError as e:
            log.warning("%s: note not saved: %s", self._path, e)
            self._stale = True
        self._size += len(line)

    def _rewrite(self) -> None:
        """Write the file anew; if that fails, the next note tries again, and this process has its notes in memory."""
        excess = sum(map(len, self._lines.values())) - self._room // 4
        while excess > 0:
            excess -= len(self._lines.pop(next(iter(self._lines))))
        lines = list(self._lines.values())
        try:
            if self._path is not None:
                write_whole(self._path, lines)
            self._size, self._stale = sum(map(len, lines)), False
        except OSError as e:
            log.warning("%s: notes not saved: %s", self._path, e)
            self._stale = True
