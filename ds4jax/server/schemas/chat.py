"""The body of Chat Completions. Messages and tools are checked where they are rendered, in `ds4jax.chat.template`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ds4jax.chat.calls import Calling
from ds4jax.server.ask import Ask, Json
from ds4jax.server.schemas import base
from ds4jax.server.schemas.thinking import Thinks


class Function(base.Schema):
    type: Literal["function"]
    function: base.Named


class AllowedTools(base.Schema):
    mode: Literal["auto", "required"]
    tools: base.Some[Function]


class Allowed(base.Schema):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


type ToolChoice = Annotated[Function | Allowed, Field(discriminator="type")]


class Chat(base.Choosing, Thinks):
    messages: base.Some[Any]
    tools: list[Any] = []
    tool_choice: Literal["auto", "none", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    max_tokens: base.Limit | None = None
    max_completion_tokens: base.Limit | None = None
    logprobs: bool = False
    top_logprobs: base.TopLogprobs = 0
    return_progress: bool = False  # llama.cpp's
    modalities: list[Literal["text"]] = []
    audio: base.Unsupported = None
    functions: base.Unsupported = None
    function_call: base.Unsupported = None
    web_search_options: base.Unsupported = None

    def thinks(self) -> str:
        return super().thinks() or ("off" if self.model == "deepseek-chat" else "")

    def shows_thoughts(self) -> bool:
        """The value of `Ask.summary`. Raises ApiError if the two fields for it contradict each other."""
        if self.reasoning.exclude and self.include_reasoning:
            raise base.wrong("reasoning.exclude", True, "false, as include_reasoning is true")
        return self.include_reasoning is not False and not self.reasoning.exclude

    def top(self) -> int | None:
        """The value of `Ask.logprobs`. Raises ApiError for a number of them where none are wanted."""
        if self.top_logprobs and not self.logprobs:
            raise base.wrong("top_logprobs", self.top_logprobs, "logprobs: true beside it")
        return self.top_logprobs if self.logprobs else None

    def calling(self) -> Calling:
        """The value of `Ask.calling`. Raises ApiError."""
        single = not self.parallel_tool_calls
        match self.tool_choice:
            case Function(function=function):
                return base.calling(self.tools, "required", [function.name], single=True)
            case Allowed(allowed_tools=allowed):
                names = [tool.function.name for tool in allowed.tools]
                return base.calling(self.tools, allowed.mode, names, single)
            case choice:
                return base.calling(self.tools, choice, None, single)

    def continues(self) -> bool:
        """The value of `Ask.continues`: DeepSeek's `prefix` of the last message, or vLLM's continue_final_message.

        Raises ApiError for a message that cannot be continued, and if add_generation_prompt says otherwise.
        """
        last = self.messages[-1]
        for i, message in enumerate(self.messages):
            prefix = message.get("prefix") if isinstance(message, dict) else None
            if not isinstance(prefix, bool | None):
                raise base.wrong(f"messages[{i}].prefix", prefix, "true or false")
            if prefix and (message is not last or message.get("role") != "assistant"):
                raise base.wrong(
                    f"messages[{i}].prefix", prefix, "it on the last message only, if that is the assistant's"
                )
        if not isinstance(last, dict):
            return False  # refused where it is rendered
        if self.continue_final_message and last.get("role") != "assistant":
            raise base.wrong("continue_final_message", True, "false: the last message is not the assistant's")
        out = self.continue_final_message or bool(last.get("prefix"))
        if self.add_generation_prompt is out:
            expected = "false: the last message is continued" if out else "true, or continue_final_message"
            raise base.wrong("add_generation_prompt", out, expected)
        return out


def read(body: Json) -> Ask:
    """The `Ask` of `POST /v1/chat/completions`. Raises Ds4Error."""
    chat = base.parse(Chat, body)
    return Ask(
        messages=chat.messages,
        continues=chat.continues(),
        n=chat.n,
        tools=chat.tools if chat.tools and chat.tool_choice != "none" else None,
        calling=chat.calling(),
        think=chat.thinks(),
        budget=chat.budget(),
        summary=chat.shows_thoughts(),
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        logprobs=chat.top(),
        progress=chat.return_progress,
        **chat.common(),
    )
