"""The body of Chat Completions. Messages and tools are checked where they are rendered, in `ds4jax.chat.template`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ds4jax.server.ask import Ask, Json
from ds4jax.server.schemas import base


class JsonSchema(base.Schema):
    schema_: Json = Field(alias="schema")


class NestedFormat(base.Schema):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class Chat(base.Body):
    messages: base.Some[Any]
    tools: list[Any] = []
    tool_choice: Literal["auto", "none"] = "auto"
    thinking: bool | base.Thinking | None = None
    think: bool | None = None
    reasoning_effort: base.Effort | None = None
    response_format: Annotated[base.PlainFormat | NestedFormat, Field(discriminator="type")] | None = None
    max_tokens: base.Limit | None = None
    max_completion_tokens: base.Limit | None = None
    logprobs: bool = False
    top_logprobs: base.TopLogprobs = 0
    stop: base.Stops = []
    stream_options: base.StreamOptions = base.StreamOptions()
    n: Literal[1] = 1
    modalities: list[Literal["text"]] = []
    audio: base.Unsupported = None
    functions: base.Unsupported = None
    function_call: base.Unsupported = None
    web_search_options: base.Unsupported = None

    def switch(self) -> bool | None:
        """Whether to think, or None if none of the fields says so that clients use for it."""
        if self.think is not None:
            return self.think
        if isinstance(self.thinking, base.Thinking):
            return self.thinking.on
        if self.thinking is None and self.model == "deepseek-chat" and self.reasoning_effort is None:
            return False
        return self.thinking


def read(body: Json) -> Ask:
    """The `Ask` of `POST /v1/chat/completions`. Raises Ds4Error."""
    chat = base.parse(Chat, body)
    match chat.response_format:
        case NestedFormat(json_schema=named):
            schema = named.schema_
        case base.PlainFormat(type="json_object"):
            schema = "json_object"
        case _:
            schema = None
    return Ask(
        messages=chat.messages,
        tools=chat.tools if chat.tools and chat.tool_choice != "none" else None,
        think=base.think(chat.switch(), chat.reasoning_effort),
        schema=schema,
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        stop=base.stops(chat.stop),
        logprobs=chat.top_logprobs if chat.logprobs else None,
        include_usage=chat.stream_options.include_usage,
        **chat.common(),
    )
