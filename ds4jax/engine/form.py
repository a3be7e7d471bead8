"""What an answer must be, in words that need no grammar engine. No JAX here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What a text must match from end to end: a regular expression (Rust's syntax), or a grammar in Lark or GBNF."""

    kind: Literal["regex", "grammar"]
    text: str


type Form = Mapping[str, Any] | Literal["json_object"] | Pattern
"""What an answer must be: JSON of a schema, any JSON object, or text that matches a pattern."""
