"""Files of texts, questions and vectors that a user names: their bytes, and the JSON in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds4jax.errors import Ds4Error, show
from ds4jax.files import LARGE, read_small


def read_input(path: Path) -> bytes:
    """The bytes of a file. Raises Ds4Error if it cannot be read."""
    try:
        return read_small(path, LARGE)
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(where: Path | str, data: bytes) -> Any:
    """A JSON value. Raises Ds4Error that begins with `where` if it is none, or has half a surrogate pair for text."""
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise Ds4Error(f"{where}: not JSON: {error}") from None


def parse_lines(path: Path, data: bytes) -> list[tuple[str, dict[str, Any]]]:
    """JSON lines → (file and number of the line, object). Raises Ds4Error naming the first line that is none."""
    lines = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        value = parse_json(where, line)
        if not isinstance(value, dict):
            raise Ds4Error(f"{where}: found {show(value)}, expected an object")
        lines.append((where, value))
    return lines
