"""Structured output: which tokens a JSON schema allows next. The grammar engine is llguidance; no JAX here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import llguidance
import numpy as np

from ds4jax.errors import Ds4Error
from ds4jax.io.tokenizer import Tokenizer

# Between the parts of an answer: a line break and an indentation at most. An unsure model writes spaces for ever.
WHITESPACE = r"\n? {0,16}"


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
        schema: Mapping[str, Any] | Literal["json_object"],
        after: int | None = None,
    ):
        """JSON of a schema, or any JSON object. Raises GrammarError.

        after: the answer is free up to this token, such as the end of the model's thoughts.
        """
        self.after = after
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps({"type": "object"} if schema == "json_object" else schema),
                overrides={"whitespace_pattern": WHITESPACE},
            )
        except (TypeError, ValueError) as error:
            raise GrammarError(f"json_schema: {error}") from None
        self.start = llguidance.LLMatcher(vocabulary.native, text)
        if not self.start.is_error():
            self.start.compute_bitmask()  # finds out whether there is any answer
        if self.start.is_error():
            raise GrammarError(f"json_schema: {_in_a_line(self.start)}")


class Matcher:
    """Follows one answer through a grammar. error: why it cannot go on, or ''."""

    def __init__(self, grammar: Grammar):
        self._matcher, self._after = grammar.start.deep_copy(), grammar.after

    @property
    def error(self) -> str:
        return _in_a_line(self._matcher)

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


def _in_a_line(matcher: llguidance.LLMatcher) -> str:
    """What went wrong, if anything did; without the parser's state, which it may be followed by."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())
