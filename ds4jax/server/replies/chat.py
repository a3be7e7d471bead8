"""The answers of Chat Completions, `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds4jax.chat.parser import Event, Finish, TextDelta, ThinkingDelta, ToolCallDelta, ToolCallStarted
from ds4jax.server.conversation import Conversation, Logprob
from ds4jax.server.replies.choices import Choice, ChoicesReply


class ChatChoice(Choice):
    """An answer of Chat Completions.

    The arguments of calls are streamed as they are sampled. Their last brace comes when the call has ended well: a
    client never takes an unfinished call for a complete one.
    """

    def __init__(self, conversation: Conversation, index: int):
        super().__init__(conversation, index)
        self._begun = False

    def on(self, e: Event) -> list[dict[str, Any]]:
        match e:
            case ThinkingDelta(text) if self.ask.summary:
                return self._say({"reasoning_content": text, "reasoning": text})
            case TextDelta(text):
                return self._say({"content": text}, self.conversation.new_logprobs())
            case ToolCallStarted(index, id, name):
                call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                return self._say({"tool_calls": [call]})
            case ToolCallDelta(index, arguments):
                return self._say({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
            case Finish():
                return self._say({}, self.conversation.new_logprobs(), e)
        return []

    def _say(
        self, delta: dict[str, Any], logprobs: list[Logprob] | None = None, finish: Finish | None = None
    ) -> list[dict[str, Any]]:
        head = [] if self._begun else [self.part(self._logprobs([]), delta={"role": "assistant", "content": ""})]
        self._begun = True
        tokens = self.conversation.new_tokens()
        return [*head, self.part(self._logprobs(logprobs or []), finish, tokens, delta=delta)]

    def whole(self) -> dict[str, Any]:
        """The assistant's message; thoughts under DeepSeek's name and under the one of OpenRouter and newer vLLM."""
        message = dict(self.conversation.message)
        thought = message.pop("reasoning_content", None)
        message |= {"reasoning_content": thought, "reasoning": thought} if thought and self.ask.summary else {}
        talk = self.conversation
        return self.part(self._logprobs(talk.logprobs), talk.finish, talk.sampled, message=message)

    def _logprobs(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if self.ask.logprobs is None:
            return None
        return {"content": entries(logprobs), "refusal": None}


class ChatReply(ChoicesReply):
    """An answer of Chat Completions.

    If token ids are asked for, those of the prompt are in the object; in a stream, in the first chunk of each choice.
    """

    id_start, kind, chunk_kind, choice = "chatcmpl-", "chat.completion", "chat.completion.chunk", ChatChoice

    def whole(self) -> dict[str, Any]:
        return super().whole() | self._prompt_ids()

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        begins = any("role" in choice["delta"] for choice in choices)
        return super()._chunk(choices) | (self._prompt_ids() if begins else {})

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.conversation.prompt} if self.ask.token_ids else {}


def entries(logprobs: Sequence[Logprob]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities in OpenAI's form."""
    return [
        _entry(item.token, item.logprob) | {"top_logprobs": [_entry(*top) for top in item.top]} for item in logprobs
    ]


def _entry(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}
