"""The answers of Chat Completions, `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from ds4jax.chat.parser import Event, Finish, TextDelta, ThinkingDelta, ToolCallDelta, ToolCallStarted
from ds4jax.server.conversation import Conversation, Logprob, Usage
from ds4jax.server.replies.sse import Reply, event, new_id

DONE = b"data: [DONE]\n\n"


class ChatReply(Reply):
    """An answer of Chat Completions.

    The arguments of calls are streamed as they are sampled. Their last brace comes when the whole block has ended well:
    a client never takes an unfinished call for a complete one.
    """

    def __init__(self, conversation: Conversation, model: str):
        super().__init__(conversation, model)
        self.id, self._logprobs_sent, self._begun = new_id("chatcmpl-"), 0, False

    def on(self, e: Event) -> bytes:
        match e:
            case ThinkingDelta(text) if self.ask.summary:
                return self._say({"reasoning_content": text, "reasoning": text})
            case TextDelta(text):
                new = self.conversation.logprobs[self._logprobs_sent :]
                self._logprobs_sent += len(new)
                return self._say({"content": text}, new)
            case ToolCallStarted(index, id, name):
                call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                return self._say({"tool_calls": [call]})
            case ToolCallDelta(index, arguments):
                return self._say({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
        return b""

    def _say(self, delta: dict, logprobs: list[Logprob] | None = None) -> bytes:
        return self._role() + event(self._chunk(delta, logprobs=logprobs))

    def _role(self) -> bytes:
        """The chunk before the first one that says something."""
        if self._begun:
            return b""
        self._begun = True
        return event(self._chunk({"role": "assistant", "content": ""}))

    def end(self) -> bytes:
        return self._role() + ending(self, self._chunk({}, finish_reason(self.conversation.finish)))

    def whole(self) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": self._message(),
            "logprobs": self._logprobs(self.conversation.logprobs),
            "finish_reason": finish_reason(self.conversation.finish),
        }
        return self.head(self.id, "chat.completion") | {"choices": [choice]} | measured(self)

    def _message(self) -> dict[str, Any]:
        """The assistant's message; thoughts under DeepSeek's name and under the one of OpenRouter and newer vLLM."""
        message = dict(self.conversation.message)
        thought = message.pop("reasoning_content", None)
        return message | ({"reasoning_content": thought, "reasoning": thought} if thought and self.ask.summary else {})

    def _chunk(self, delta: dict, finish: str | None = None, logprobs: list[Logprob] | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": self._logprobs(logprobs or []), "finish_reason": finish}
        return self.head(self.id, "chat.completion.chunk") | {"choices": [choice]}

    def _logprobs(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if self.ask.logprobs is None:
            return None
        content = [
            _entry(item.token, item.logprob) | {"top_logprobs": [_entry(*top) for top in item.top]} for item in logprobs
        ]
        return {"content": content, "refusal": None}


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}


def ending(reply: Reply, last: dict[str, Any]) -> bytes:
    """The end of a stream of OpenAI's chunks: `last` and, if tokens are to be counted, one with no choice but these."""
    if reply.ask.include_usage:
        return event(last) + event(last | {"choices": []} | measured(reply)) + DONE
    return event(last | {"timings": reply.conversation.timings}) + DONE


def measured(reply: Reply) -> dict[str, Any]:
    return {"usage": usage(reply.conversation.usage), "timings": reply.conversation.timings}


def finish_reason(finish: Finish) -> str:
    return "stop" if finish.reason == "stop_sequence" else finish.reason


def usage(tokens: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
        "completion_tokens_details": {"reasoning_tokens": tokens.reasoning},
    }
