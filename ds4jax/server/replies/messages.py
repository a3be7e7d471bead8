"""The answers of Anthropic's Messages, `POST /v1/messages`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ds4jax.chat.parser import Event, Finish, TextDelta, ThinkingDelta, ToolCallFinished
from ds4jax.server.conversation import Conversation, Tick, Usage
from ds4jax.server.errors import ApiError
from ds4jax.server.replies.sse import Reply, event, new_id

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "stop_sequence": "stop_sequence",
}
# Clients send thoughts back and some insist on a signature; nothing here depends on it.
_SIGNATURE = "ds4jax"


class MessagesReply(Reply):
    """An answer of Messages.

    Calls are sent at the end, after all text, each as one block: clients run any block that they got.
    """

    id_prefix = "toolu_"

    def __init__(self, conversations: Sequence[Conversation], model: str):
        super().__init__(conversations, model)
        self.id, self._index, self._open = new_id("msg_"), 0, None
        self._calls: list[ToolCallFinished] = []

    def begin(self) -> bytes:
        return _event("message_start", message=self._message([], None))

    def on(self, e: Event, index: int = 0) -> bytes:
        match e:
            case ThinkingDelta(text):
                out = self._enter("thinking")
                return out + (self._delta("thinking_delta", thinking=text) if self.ask.summary else b"")
            case TextDelta(text):
                return self._enter("text") + self._delta("text_delta", text=text)
            case ToolCallFinished():
                self._calls.append(e)
        return b""

    def end(self) -> bytes:
        delta = _stop(self.conversation.finish)
        out = self._close() + b"".join(map(self._call, self._calls))
        out += _event("message_delta", delta=delta, usage=_usage(self.conversation.usage))
        return out + _event("message_stop")

    def idle(self, tick: Tick) -> bytes:
        return _event("ping")

    def fail(self, error: ApiError) -> bytes:
        return event(error.anthropic(), "error")

    def whole(self) -> dict[str, Any]:
        message, content = self.conversation.message, []
        if thoughts := message.get("reasoning_content"):
            shown = thoughts if self.ask.summary else ""
            content.append({"type": "thinking", "thinking": shown, "signature": _SIGNATURE})
        if text := message["content"]:
            content.append({"type": "text", "text": text})
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = json.loads(function["arguments"])
            content.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
        return self._message(content, self.conversation.finish)

    def _message(self, content: list[dict], finish: Finish | None) -> dict[str, Any]:
        message = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}
        return message | _stop(finish) | {"usage": _usage(self.conversation.usage)}

    # Blocks, one after the other.

    def _enter(self, kind: str) -> bytes:
        if self._open == kind:
            return b""
        out = self._close()
        self._open = kind
        empty = {"thinking": {"thinking": "", "signature": ""}, "text": {"text": ""}}[kind]
        return out + self._start({"type": kind, **empty})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        out = self._delta("signature_delta", signature=_SIGNATURE) if self._open == "thinking" else b""
        self._open = None
        return out + self._stop()

    def _call(self, call: ToolCallFinished) -> bytes:
        out = self._start({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        return out + self._delta("input_json_delta", partial_json=call.arguments) + self._stop()

    def _start(self, block: dict[str, Any]) -> bytes:
        return _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, **delta: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **delta})

    def _stop(self) -> bytes:
        self._index += 1
        return _event("content_block_stop", index=self._index - 1)


def _event(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, kind)


def _stop(finish: Finish | None) -> dict[str, Any]:
    if finish is None:
        return {"stop_reason": None, "stop_sequence": None}
    return {"stop_reason": _STOP_REASONS[finish.reason], "stop_sequence": finish.stop}


def _usage(tokens: Usage) -> dict[str, Any]:
    """The three counts of the input add up to the prompt."""
    return {
        "input_tokens": tokens.prompt - tokens.cached,
        "cache_read_input_tokens": tokens.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": tokens.completion,
    }
