"""The answers of OpenAI's Responses, `POST /v1/responses`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from ds4jax.chat.parser import Event, TextDelta, ThinkingDelta, ToolCallFinished
from ds4jax.server.ask import Ask
from ds4jax.server.conversation import Conversation, Tick, Usage
from ds4jax.server.errors import ApiError
from ds4jax.server.replies.chat import entries
from ds4jax.server.replies.sse import Reply, event, new_id
from ds4jax.server.stored import Stored

Item = dict[str, Any]


class ResponsesReply(Reply):
    """An answer of Responses: output items, one after the other.

    They are thoughts (if a summary was asked for), text and, at the end, calls. The arguments of a call come in one
    delta.
    """

    def __init__(self, conversations: Sequence[Conversation], model: str):
        super().__init__(conversations, model)
        self._head = _head(self.ask, model)
        self._events, self._output = _Numbered(), []
        self._item: Item | None = None  # the one that is being written
        self._text: list[str] = []  # of it
        self._calls: list[ToolCallFinished] = []

    def begin(self) -> bytes:
        return self._events("response.created", response=self._response("in_progress"))

    def idle(self, tick: Tick) -> bytes:
        return self._events("response.in_progress", response=self._response("in_progress"))

    def on(self, e: Event, index: int = 0) -> bytes:
        match e:
            case ThinkingDelta(text) if self.ask.summary:
                out = self._enter("reasoning")
                self._text.append(text)
                return out + self._part("reasoning_summary_text.delta", delta=text)
            case TextDelta(text):
                out = self._enter("message")
                self._text.append(text)
                return out + self._part(
                    "output_text.delta", delta=text, logprobs=entries(self.conversation.new_logprobs())
                )
            case ToolCallFinished():
                self._calls.append(e)
        return b""

    def end(self) -> bytes:
        cut = self.conversation.finish.reason == "length" and not self._calls
        out = self._close("incomplete" if cut else "completed")
        out += b"".join(self._call(call.id, call.name, call.arguments) for call in self._calls)
        self._whole = self._final()
        return out + self._events(f"response.{self._whole['status']}", response=self._whole)

    def fail(self, error: ApiError) -> bytes:
        return self._events("response.failed", response=_failed(self._response("failed"), error))

    def whole(self) -> dict[str, Any]:
        message = self.conversation.message
        if self.ask.summary and (thoughts := message.get("reasoning_content")):
            self.on(ThinkingDelta(thoughts))
        if message["content"]:
            self.on(TextDelta(message["content"]))
        for i, call in enumerate(message.get("tool_calls", ())):
            self.on(ToolCallFinished(i, call["id"], **call["function"]))
        self.end()
        return self._whole

    @classmethod
    def failed(cls, ask: Ask, model: str, error: ApiError) -> bytes:
        """The events of a request that failed before there was a conversation."""
        events, head = _Numbered(), _head(ask, model)
        head |= {"output": [], "usage": None}
        created = events("response.created", response=head | {"status": "in_progress"})
        return created + events("response.failed", response=_failed(head, error))

    def _response(self, status: str, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._head | {"status": status, "output": list(self._output), "usage": usage}

    def _final(self) -> dict[str, Any]:
        cut = self.conversation.finish.reason == "length"
        response = self._response("incomplete" if cut else "completed", _usage(self.conversation.usage))
        if cut:
            return response | {"incomplete_details": {"reason": "max_output_tokens"}}
        return response | {"completed_at": int(time.time())}

    def keep(self, stored: Stored) -> None:
        if self.ask.keep is not None:
            stored.keep(self._whole, self.ask.keep)

    # Items.

    def _enter(self, kind: str) -> bytes:
        if self._item and self._item["type"] == kind:
            return b""
        out = self._close()
        if kind == "reasoning":
            item = {"id": new_id("rs_"), "type": "reasoning", "summary": []}
        else:
            item = {
                "id": new_id("msg_"),
                "type": "message",
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
        return out + self._open(item) + self._part(f"{_PART[kind]}_part.added", part=_part(kind, ""))

    def _close(self, status: str = "completed") -> bytes:
        if self._item is None:
            return b""
        kind, text = self._item["type"], "".join(self._text)
        part = _part(kind, text, entries(self.conversation.logprobs))  # calls come last, so there is one text
        if kind == "reasoning":
            out = self._part("reasoning_summary_text.done", text=text)
            done = self._item | {"summary": [part]}
        else:
            out = self._part("output_text.done", text=text, logprobs=part["logprobs"])
            done = self._item | {"status": status, "content": [part]}
        return out + self._part(f"{_PART[kind]}_part.done", part=part) + self._done(done)

    def _call(self, id: str, name: str, arguments: str) -> bytes:
        if name in self.ask.custom_tools:
            kind, key, value, prefix = "custom_tool_call", "input", _free_text(arguments), "ctc_"
            deltas = "custom_tool_call_input"
        else:
            kind, key, value, prefix = "function_call", "arguments", arguments, "fc_"
            deltas = "function_call_arguments"
        space, name = self.ask.namespaces.get(name, (None, name))
        item = {"id": new_id(prefix), "type": kind, "status": "in_progress", "call_id": id, "name": name, key: ""}
        item |= {"namespace": space} if space else {}
        out = self._open(item)
        out += self._in_item(f"{deltas}.delta", delta=value)
        out += self._in_item(f"{deltas}.done", **({key: value, "name": name} if key == "arguments" else {key: value}))
        return out + self._done(item | {"status": "completed", key: value})

    def _open(self, item: Item) -> bytes:
        self._item, self._text = item, []
        return self._events("response.output_item.added", output_index=len(self._output), item=item)

    def _done(self, item: Item) -> bytes:
        out = self._events("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._item = None
        return out

    def _in_item(self, event_name: str, **data: Any) -> bytes:
        assert self._item is not None
        return self._events(f"response.{event_name}", item_id=self._item["id"], output_index=len(self._output), **data)

    def _part(self, name: str, **data: Any) -> bytes:
        """An event about the item's only part."""
        assert self._item is not None
        return self._in_item(name, **{_INDEX[self._item["type"]]: 0}, **data)


_INDEX = {"reasoning": "summary_index", "message": "content_index"}
_PART = {"reasoning": "reasoning_summary", "message": "content"}


def _part(kind: str, text: str, logprobs: Sequence[Item] = ()) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "summary_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


class _Numbered:
    """Events with their names, numbered from 0."""

    def __init__(self):
        self._n = -1

    def __call__(self, name: str, /, **data: Any) -> bytes:
        self._n += 1
        return event({"type": name, "sequence_number": self._n, **data}, name)


def _head(ask: Ask, model: str) -> dict[str, Any]:
    """The fields that a response has from the beginning; those that the request gave are repeated."""
    sampling, echo = ask.sampling, ask.echo
    tool = {"description": None, "parameters": None, "strict": False}
    fields = {
        "background": False,
        "completed_at": None,
        "conversation": None,
        "error": None,
        "frequency_penalty": sampling.frequency_penalty,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "presence_penalty": sampling.presence_penalty,
        "previous_response_id": None,
        "prompt": None,
        "prompt_cache_key": None,
        "prompt_cache_retention": None,
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": sampling.temperature,
        "tool_choice": "auto",
        "top_logprobs": 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": None,
        **echo,
        "reasoning": {"effort": None, "summary": None} | echo.get("reasoning", {}),
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | echo.get("text", {}),
        "tools": [tool | given if given["type"] == "function" else given for given in echo.get("tools", [])],
    }
    return {"id": new_id("resp_"), "object": "response", "created_at": int(time.time()), "model": model} | fields


def _failed(response: dict[str, Any], error: ApiError) -> dict[str, Any]:
    code = error.code or ("server_error" if error.status >= 500 else "invalid_prompt")
    return response | {"status": "failed", "error": {"code": code, "message": error.message}}


def _free_text(arguments: str) -> str:
    """The input of a tool of free text: its one parameter, or whatever the model wrote instead."""
    value = json.loads(arguments)
    return value["input"] if isinstance(value.get("input"), str) else arguments


def _usage(tokens: Usage) -> dict[str, Any]:
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.prompt + tokens.completion,
    }
