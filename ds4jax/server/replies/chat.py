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
            case ThinkingDelta(text):
                return self._chunk({"reasoning_content": text})
            case TextDelta(text):
                new = self.conversation.logprobs[self._logprobs_sent :]
                self._logprobs_sent += len(new)
                return self._chunk({"content": text}, logprobs=new)
            case ToolCallStarted(index, id, name):
                call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                return self._chunk({"tool_calls": [call]})
            case ToolCallDelta(index, arguments):
                return self._chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
        return b""

    def end(self) -> bytes:
        out = self._chunk({}, finish_reason(self.conversation.finish))
        if self.ask.include_usage:
            out += event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(self.conversation.usage)})
        return out + DONE

    def whole(self) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": self.conversation.message,
            "logprobs": self._logprobs(self.conversation.logprobs),
            "finish_reason": finish_reason(self.conversation.finish),
        }
        return self._head("chat.completion") | {"choices": [choice], "usage": usage(self.conversation.usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict, finish: str | None = None, logprobs: list[Logprob] | None = None) -> bytes:
        head = b"" if self._begun else self._choice({"role": "assistant", "content": ""}, None, [])
        self._begun = True
        return head + self._choice(delta, finish, logprobs or [])

    def _choice(self, delta: dict, finish: str | None, logprobs: list[Logprob]) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": finish}
        return event(self._head("chat.completion.chunk") | {"choices": [choice]})

    def _logprobs(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if self.ask.logprobs is None:
            return None
        content = [
            _entry(item.token, item.logprob) | {"top_logprobs": [_entry(*top) for top in item.top]} for item in logprobs
        ]
        return {"content": content, "refusal": None}


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}


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
