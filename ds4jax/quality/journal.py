"""Work that can be interrupted: a file of JSON lines, the first of what it is about, then one for each thing done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax.errors import Ds4Error, show
from ds4jax.files import append
from ds4jax.quality.inputs import parse_lines, read_input

if TYPE_CHECKING:
    from ds4jax.engine.model_runner import ModelRunner


class Journal:
    """What has been done, in a file or, without one, in memory alone.

    Attributes: key (what all of it is about: model, input, settings), records (one for each thing done, in order).
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]):
        """Begin a journal at `path`, or go on with the one that is there; a last line that was cut off is dropped.

        Raises Ds4Error if the file cannot be used or is about something else.
        """
        self.path, self.key, self.records = path, dict(key), []
        if path is None:
            return
        if path.exists():
            found, self.records = _read(path)
            for name in [*key, *(found.keys() - key.keys())]:
                if found.get(name) != self.key.get(name):
                    there, here = (show(x.get(name)) for x in (found, self.key))
                    raise Ds4Error(
                        f"{path}: {name}: found {there}, expected {here}; another run's, so name another folder"
                    )
            if found:
                return
        self._append(self.key)

    @classmethod
    def read(cls, path: Path) -> Journal:
        """A journal as it is, about whatever it is about. Raises Ds4Error if there is none."""
        journal = cls(None, {})
        journal.path, (journal.key, journal.records) = path, _read(path)
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


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The key and the records in a file, from which a last line without an end is cut."""
    data = read_input(path)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        try:
            os.truncate(path, len(whole))
        except OSError as error:
            raise Ds4Error(f"{path}: cannot be written: {error.strerror}") from None
    lines = [line for _, line in parse_lines(path, whole)]
    return (lines[0], lines[1:]) if lines else ({}, [])


def model_key(runner: ModelRunner) -> dict[str, Any]:
    """What must be the same of a model for two runs to compute the same numbers: its content and how it is run."""
    from ds4jax.engine.fingerprint import content, fingerprint

    return {**fingerprint(runner), "content": content(runner), "prefill_chunk": runner.settings.prefill_chunk}
