"""The body of Chat Completions. Messages and tools are checked where they are rendered, in `ds4jax.chat.template`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ds4jax.server.ask import Ask, Json
from ds4jax.server.schemas.base import (
    Body,
    Effort,
    Limit,
    PlainFormat,
    Schema,
    Some,
    Stops,
    StreamOptions,
    Thinking,
    TopLogprobs,
    Unsupported,
    parse,
    stops,
    think,
)


class JsonSchema(Schema):
    schema_: Json = Field(alias="schema")


class NestedFormat(Schema):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class Chat(Body):
    messages: Some[Any]
    tools: list[Any] = []
    tool_choice: Literal["auto", "none"] = "auto"
    thinking: bool | Thinking | None = None
    think: bool | None = None
    reasoning_effort: Effort | None = None
    response_format: Annotated[PlainFormat | NestedFormat, Field(discriminator="type")] | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0
    stop: Stops = []
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    modalities: list[Literal["text"]] = []
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    web_search_options: Unsupported = None

    def switch(self) -> bool | None:
        """Whether to think, or None if none of the fields says so that clients use for it."""
        if self.think is not None:
            return self.think
        if isinstance(self.thinking, Thinking):
            return self.thinking.type != "disabled"
        if self.thinking is None and self.model == "deepseek-chat" and self.reasoning_effort is None:
            return False
        return self.thinking


def read(body: Json) -> Ask:
    """The `Ask` of `POST /v1/chat/completions`. Raises Ds4Error."""
    chat = parse(Chat, body)
    match chat.response_format:
        case NestedFormat(json_schema=named):
            schema = named.schema_
        case PlainFormat(type="json_object"):
            schema = "json_object"
        case _:
            schema = None
    return Ask(
        messages=chat.messages,
        tools=chat.tools if chat.tools and chat.tool_choice != "none" else None,
        think=think(chat.switch(), chat.reasoning_effort),
        schema=schema,
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        stop=stops(chat.stop),
        logprobs=chat.top_logprobs if chat.logprobs else None,
        include_usage=chat.stream_options.include_usage,
        **chat.common(),
    )
