"""Structured output: which tokens a schema, an expression or a grammar allows next, by llguidance; no JAX here."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from ds4jax.engine.form import Form, Pattern
from ds4jax.errors import Ds4Error
from ds4jax.io.tokenizer import Tokenizer


class GrammarError(Ds4Error):
    """A schema that is not valid, or asks for what cannot be enforced."""


class Vocabulary:
    """A tokenizer's tokens in llguidance's form; making it takes a second where the vocabulary is large."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids)
        self._tokenizer = tokenizer
        self.native = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of ordinary text: llguidance asks for them."""
        return self._tokenizer.encode_text(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Grammar:
    """What an answer must be; any number of requests may use it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        form: Form,
        after: int | None = None,
    ):
        """form: see `ds4jax.engine.form.Form`. Raises GrammarError.

        after: the answer is free up to this token, such as the end of the model's thoughts.
        """
        self.after = after
        name = form.kind if isinstance(form, Pattern) else "json_schema"
        try:
            text = _source(form)
        except Exception as error:  # the reader of GBNF raises these
            raise GrammarError(f"{name}: {' '.join(str(error).split())}") from None
        self.start = llguidance.LLMatcher(vocabulary.native, text)
        if not self.start.is_error():
            self.start.compute_bitmask()  # finds out whether there is any answer
        if self.start.is_error():
            raise GrammarError(f"{name}: {_in_a_line(self.start)}")


class Matcher:
    """Follows one answer through a grammar. error: why it cannot go on, or ''."""

    def __init__(self, grammar: Grammar):
        self._matcher, self._after = grammar.start.deep_copy(), grammar.after

    @property
    def error(self) -> str:
        return _in_a_line(self._matcher)

    @property
    def ended(self) -> bool:
        """Whether nothing but EOS can follow."""
        return self._after is None and self._matcher.is_stopped()

    def push(self, token: int) -> None:
        """The answer goes on with this token."""
        if self._after is not None:
            self._after = None if token == self._after else self._after
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def fill(self, allowed: np.ndarray) -> None:
        """Clear the bits of tokens that may not come next: uint32 (⌈V / 32⌉,), all ones. At the end only EOS may."""
        if self._after is None and not self.error:
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(allowed)]
            allowed[: len(mask)] &= mask
            allowed[len(mask) :] = 0


def _source(form: Form) -> str:
    """The grammar in llguidance's own form."""
    match form:
        case Pattern("regex", text):
            return llguidance.LLMatcher.grammar_from_regex(text)
        case Pattern("grammar", text):
            return llguidance.LLMatcher.grammar_from_lark(any_to_lark(text))
        case "json_object":
            form = {"type": "object"}
    # White space as Python's json writes it and no other: llguidance repeats any pattern, and an unsure model would
    # write spaces for ever.
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(_without_one_of(form)),
        overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    )


def _without_one_of(schema: Any) -> Any:
    """The schema with anyOf for each oneOf whose alternatives are different constants, where the two mean the same."""
    if isinstance(schema, list):
        return [_without_one_of(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            out[key] = {name: _without_one_of(inner) for name, inner in value.items()}
        else:  # the values of some keywords are no schemas
            out[key] = value if key in ("const", "enum", "default", "examples") else _without_one_of(value)
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


def _in_a_line(matcher: llguidance.LLMatcher) -> str:
    """What went wrong, if anything did; without the parser's state, which it may be followed by."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())
