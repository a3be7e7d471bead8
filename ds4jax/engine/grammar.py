"""Structured output: which tokens a schema, an expression or a grammar allows next, by llguidance; no JAX here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from ds4jax.engine.form import Begin, Either, Form, GrammarError, Pattern, llguidance_schema, unanchored
from ds4jax.io.tokenizer import Tokenizer

_AT_ONCE = Begin()
# Beside those that llguidance has for the work of a step: a state takes one or two kB.
_LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000)


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

    def __init__(self, vocabulary: Vocabulary, form: Form, begin: Begin = _AT_ONCE):
        """Raises GrammarError."""
        self.begin, self.eos_id = begin, vocabulary.eos_token_id
        name = "json_schema"
        if isinstance(form, Pattern):
            name = "regex" if form.kind == "regex" else "grammar"
        try:
            text = _source(form)
        except Exception as error:  # the reader of GBNF raises these
            raise GrammarError(f"{name}: {' '.join(str(error).split())}") from None
        # log_level=0: it must not write to stderr itself, where a pipe that nobody reads would block it.
        self.start = llguidance.LLMatcher(vocabulary.native, text, log_level=0, limits=_LIMITS)
        if not self.start.is_error():
            self.start.compute_bitmask()  # finds out whether there is any answer
        if self.start.is_error():
            raise GrammarError(f"{name}: {_in_a_line(self.start)}")


class Matcher:
    """Follows one answer through a grammar. error: why it cannot go on, or ''."""

    def __init__(self, grammar: Grammar):
        self.grammar, self._matcher = grammar, grammar.start.deep_copy()
        self._awaited = list(grammar.begin.after)  # tokens that must come before the grammar begins

    @property
    def error(self) -> str:
        return _in_a_line(self._matcher)

    @property
    def ended(self) -> bool:
        """Whether nothing but EOS can follow."""
        return not self._awaited and self._matcher.is_stopped()

    def push(self, token: int) -> None:
        """The answer goes on with this token."""
        if self._awaited:
            if token == self._awaited[0]:
                self._awaited.pop(0)
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def fill(self, allowed: np.ndarray) -> None:
        """Clear the bits of tokens that may not come next: uint32 (⌈V / 32⌉,), all ones. At the end only EOS may."""
        if self._awaited:
            if self.grammar.begin.must:
                eos = self.grammar.eos_id
                allowed[eos // 32] &= ~np.uint32(1 << eos % 32)
        elif not self.error:
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(allowed)]
            allowed[: len(mask)] &= mask
            allowed[len(mask) :] = 0


def _source(form: Form) -> str:
    """The grammar in llguidance's own form."""
    match form:
        case Pattern("regex", text):
            return llguidance.LLMatcher.grammar_from_regex(unanchored(text))
        case Pattern("grammar", text):
            return llguidance.LLMatcher.grammar_from_lark(any_to_lark(text))
        case Pattern("lark", text):
            return llguidance.LLMatcher.grammar_from_lark(text)
        case Either(first, second):
            parts = [_part(first) | {"name": "first"}, _part(second) | {"name": "second"}]
            return json.dumps({"grammars": [{"lark_grammar": "start: @first | @second"}, *parts]})
        case "json_object":
            return _source({"type": "object"})
        case Mapping():
            return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(llguidance_schema(form)))
    raise TypeError(form)


def _part(form: Form) -> dict[str, Any]:
    """A form as one entry of llguidance's `grammars`; `_source` gives JSON or Lark."""
    text = _source(form)
    return json.loads(text)["grammars"][0] if text.startswith("{") else {"lark_grammar": text}


def _in_a_line(matcher: llguidance.LLMatcher) -> str:
    """What went wrong, if anything did; without the parser's state, which it may be followed by."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())
