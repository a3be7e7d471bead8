"""Work that can be interrupted: a file of JSON lines, the first of what it is about, then one for each thing done."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ds4jax.errors import Ds4Error, show
from ds4jax.files import append, sync_folder
from ds4jax.quality.inputs import parse_lines, read_input

if TYPE_CHECKING:
    from ds4jax.engine.model_runner import ModelRunner


class Journal:
    """What has been done, in a file or, without one, in memory alone. The file is locked until `close`.

    Attributes: key (what all of it is about: model, input, settings), records (one for each thing done, in order).
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]):
        """Begin a journal at `path`, or go on with the one that is there; a last line that was cut off is dropped.

        Raises Ds4Error if the file cannot be used, is in use by another process or is about something else.
        """
        self.path, self.key, self.records = path, dict(key), []
        self._lock = _lock(path) if path else None
        try:
            if path is not None:
                self._go_on(path)
        except BaseException:
            self.close()
            raise

    def _go_on(self, path: Path) -> None:
        found, self.records, whole = _read(path)
        try:
            os.truncate(path, whole)
        except OSError as error:
            raise Ds4Error(f"{path}: cannot be written: {error.strerror}") from None
        for name in [*self.key, *(found.keys() - self.key.keys())] if found else []:
            if found.get(name) != self.key.get(name):
                there, here = (show(x.get(name)) for x in (found, self.key))
                raise Ds4Error(f"{path}: {name}: found {there}, expected {here}; another run's, so name another folder")
        if not found:
            self._append(self.key)

    def close(self) -> None:
        """Let other processes have the file."""
        if self._lock is not None:
            self._lock.close()

    @classmethod
    def read(cls, path: Path) -> Journal:
        """A journal as it is, about whatever it is about, also while it grows. Raises Ds4Error if there is none."""
        journal = cls(None, {})
        journal.path, (journal.key, journal.records, _) = path, _read(path)
        if not journal.key:
            raise Ds4Error(f"{path}: found nothing in it, expected a journal")
        return journal

    def add(self, record: dict[str, Any]) -> None:
        """One thing is done; when the call returns, it is on disk. Raises Ds4Error if it cannot be written."""
        self.records.append(record)
        self._append(record)

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            try:
                append(self.path, json.dumps(line, ensure_ascii=False).encode() + b"\n")
            except OSError as error:
                raise Ds4Error(f"{self.path}: cannot be written: {error.strerror}") from None


def _lock(path: Path) -> BinaryIO:
    """The file, made if need be, and locked until it is closed. Raises Ds4Error."""
    new = not path.exists()
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if new:
                sync_folder(path.parent)
            stack.pop_all()
            return file
    except BlockingIOError:
        raise Ds4Error(f"{path}: in use by another process; wait for its end, or name another folder") from None
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be written: {error.strerror}") from None


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The key and the records in a file, without a last line that has no end, and how many bytes they take."""
    data = read_input(path)
    whole = data[: data.rfind(b"\n") + 1]
    lines = [line for _, line in parse_lines(path, whole)]
    return (lines[0], lines[1:], len(whole)) if lines else ({}, [], len(whole))


def model_key(runner: ModelRunner) -> dict[str, Any]:
    """What must be the same of a model for two runs to compute the same numbers: its content and how it is run."""
    from ds4jax.engine.fingerprint import content, fingerprint

    return {**fingerprint(runner), "content": content(runner), "prefill_chunk": runner.settings.prefill_chunk}
