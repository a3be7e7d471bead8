"""The answers of Completions, `POST /v1/completions`: raw prompts continued."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ds4jax.chat.parser import Event, Finish, TextDelta
from ds4jax.server.conversation import Conversation, Logprob
from ds4jax.server.replies.choices import Choice, ChoicesReply


class CompletionChoice(Choice):
    """An answer of Completions; the prompt comes first if it was asked for, in a stream with the first token.

    If token ids are asked for, those of the prompt are in the choice; in a stream, in its first part.
    """

    def __init__(self, conversation: Conversation, index: int):
        super().__init__(conversation, index)
        self._offset, self._echoes, self._begun = 0, self.ask.echo_prompt, False

    def on(self, e: Event) -> list[dict[str, Any]]:
        if not isinstance(e, TextDelta | Finish):
            return []
        said, finish = (e.text, None) if isinstance(e, TextDelta) else ("", e)
        talk = self.conversation
        return [*self._echo(), self._part(said, talk.new_logprobs(), finish, talk.new_tokens())]

    def whole(self) -> dict[str, Any]:
        talk = self.conversation
        text, logprobs = talk.message["content"], talk.logprobs
        if self._echoes:
            text, logprobs = talk.prompt_text + text, talk.prompt_logprobs + logprobs
        return self._part(text, logprobs, talk.finish, talk.sampled)

    def _echo(self) -> list[dict[str, Any]]:
        if not self._echoes:
            return []
        self._echoes = False
        return [self._part(self.conversation.prompt_text, self.conversation.prompt_logprobs)]

    def _part(
        self, text: str, logprobs: list[Logprob], finish: Finish | None = None, tokens: Sequence[int] = ()
    ) -> dict[str, Any]:
        ids = {} if self._begun or not self.ask.token_ids else {"prompt_token_ids": self.conversation.prompt}
        self._begun = True
        return self.part(self._logprobs(logprobs), finish, tokens, text=text) | ids

    def _logprobs(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if self.ask.logprobs is None:
            return None
        *offsets, self._offset = itertools.accumulate((len(item.text) for item in logprobs), initial=self._offset)
        return {
            "tokens": [item.text for item in logprobs],
            "token_logprobs": [item.logprob for item in logprobs],
            "top_logprobs": [_top(item) for item in logprobs],
            "text_offset": offsets,
        }


class CompletionReply(ChoicesReply):
    id_start, kind, chunk_kind, choice = "cmpl-", "text_completion", "text_completion", CompletionChoice


def _top(item: Logprob) -> dict[str, float] | None:
    """The likeliest tokens by their text, the token itself among them; as bytes where there is no such text."""
    if item.logprob is None:
        return None
    out = {item.text: item.logprob}
    for token, logprob in item.top:
        if token != item.token:
            text = token.decode("utf-8", "replace")
            spelled = "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
            out[spelled if "\ufffd" in text or text in out else text] = logprob
    return out
