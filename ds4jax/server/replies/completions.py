"""The answers of Completions, `POST /v1/completions`: a raw prompt continued."""

from __future__ import annotations

import itertools
from typing import Any

from ds4jax.chat.parser import Event, TextDelta
from ds4jax.server.conversation import Conversation, Logprob
from ds4jax.server.replies.chat import ending, finish_reason, measured
from ds4jax.server.replies.sse import Reply, event, new_id


class CompletionReply(Reply):
    def __init__(self, conversation: Conversation, model: str):
        super().__init__(conversation, model)
        self.id, self._logprobs_sent, self._offset = new_id("cmpl-"), 0, 0

    def on(self, e: Event) -> bytes:
        return event(self._object(e.text, None)) if isinstance(e, TextDelta) else b""

    def end(self) -> bytes:
        return ending(self, self._object("", finish_reason(self.conversation.finish)))

    def whole(self) -> dict[str, Any]:
        text, finish = self.conversation.message["content"], finish_reason(self.conversation.finish)
        return self._object(text, finish) | measured(self)

    def _object(self, text: str, finish: str | None) -> dict[str, Any]:
        new = self.conversation.logprobs[self._logprobs_sent :]
        self._logprobs_sent += len(new)
        choice = {"text": text, "index": 0, "logprobs": self._logprobs(new), "finish_reason": finish}
        return self.head(self.id, "text_completion") | {"choices": [choice]}

    def _logprobs(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if self.ask.logprobs is None:
            return None
        tokens = [_text(item.token) for item in logprobs]
        *offsets, self._offset = itertools.accumulate(map(len, tokens), initial=self._offset)
        return {
            "tokens": tokens,
            "token_logprobs": [item.logprob for item in logprobs],
            "top_logprobs": [{_text(token): logprob for token, logprob in item.top} for item in logprobs],
            "text_offset": offsets,
        }


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
