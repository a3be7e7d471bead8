"""What an answer must be, in words that need no grammar engine. No JAX here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from ds4jax.errors import Ds4Error

MAX_TEXT = 1_000_000  # characters of a regular expression or a grammar


class GrammarError(Ds4Error):
    """A schema that is not valid, or asks for what cannot be enforced."""


class TooHard(GrammarError):
    """A schema or grammar that is larger, or takes more to compile, than it may."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What a text must match from end to end: a regular expression (Rust's syntax), or a grammar in Lark or GBNF.

    kind: "grammar" finds out which of the two it is; "lark" is a grammar that llguidance reads as it is.
    """

    kind: Literal["regex", "grammar", "lark"]
    text: str


@dataclasses.dataclass(frozen=True)
class Either:
    """One form or the other."""

    first: Form
    second: Form


type Form = Mapping[str, Any] | Literal["json_object"] | Pattern | Either
"""What an answer must be: JSON of a schema, any JSON object, text that matches a pattern, or one of two forms."""


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where in an answer its form begins.

    after: tokens, such as the end of a thought, that must have come in this order, with anything between them. Until
    then the answer is free. must: whether the answer cannot end before the form has begun.
    """

    after: tuple[int, ...] = ()
    must: bool = True


def quoted(text: str) -> str:
    """A string in Lark, which is one of JSON without raw control characters."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def unanchored(expression: str) -> str:
    """A regular expression without ^ at its beginning and $ at its end, where it has to match the whole text anyhow."""
    text = expression.removeprefix("^")
    before = text.removesuffix("$")
    backslashes = len(before) - len(before.rstrip("\\"))
    return text if backslashes % 2 else before  # after an odd number, the last $ is a character


def llguidance_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema in llguidance's dialect.

    White space is as Python's json writes it and no other: llguidance repeats any pattern, and an unsure model would
    write spaces for ever.
    """
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return without_one_of(schema) | {"x-guidance": spaces}


def without_one_of(schema: Any) -> Any:
    """The schema with anyOf for each oneOf whose alternatives are different constants, where the two mean the same."""
    if isinstance(schema, list):
        return [without_one_of(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            out[key] = {name: without_one_of(inner) for name, inner in value.items()}
        else:  # the values of some keywords are no schemas
            out[key] = value if key in ("const", "enum", "default", "examples") else without_one_of(value)
    if "anyOf" not in out and _are_different_constants(out.get("oneOf")):
        out["anyOf"] = out.pop("oneOf")
    return out


def _are_different_constants(alternatives: Any) -> bool:
    if not isinstance(alternatives, list) or not all(isinstance(one, dict) for one in alternatives):
        return False
    constants = [[one["const"]] if "const" in one else one.get("enum") for one in alternatives]
    if not all(isinstance(some, list) and _are_scalars(some) for some in constants):
        return False
    # To Python, 1 is True.
    sets: list[set[Any]] = [{(type(value) is bool, value) for value in some} for some in constants]
    return len(set().union(*sets)) == sum(map(len, sets))


def _are_scalars(values: list[Any]) -> bool:
    return not any(isinstance(value, dict | list) for value in values)
