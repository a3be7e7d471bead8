"""The body of Chat Completions. Messages and tools are checked where they are rendered, in `ds4jax.chat.template`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from ds4jax.chat.calls import Calling
from ds4jax.server.ask import Ask, Json
from ds4jax.server.schemas import base


class JsonSchema(base.Schema):
    schema_: Json = Field(alias="schema")


class NestedFormat(base.Schema):
    type: Literal["json_schema"]
    json_schema: JsonSchema


type Format = Annotated[base.TextFormat | base.ObjectFormat | NestedFormat, Field(discriminator="type")]


class TemplateKwargs(base.Schema):
    """What vLLM and llama.cpp hand to a chat template: the two names that templates have for the same switch."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class Reasoning(base.Schema):
    effort: base.Effort | None = None
    enabled: bool | None = None
    max_tokens: base.BudgetTokens | None = None


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


class Chat(base.Guided):
    messages: base.Some[Any]
    tools: list[Any] = []
    tool_choice: Literal["auto", "none", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    thinking: bool | base.Thinking | None = None
    think: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateKwargs = TemplateKwargs()
    reasoning: Reasoning = Reasoning()
    reasoning_effort: base.Effort | None = None
    thinking_token_budget: base.BudgetTokens | None = None
    thinking_budget_tokens: base.BudgetTokens | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    response_format: Format | None = None
    max_tokens: base.Limit | None = None
    max_completion_tokens: base.Limit | None = None
    logprobs: bool = False
    top_logprobs: base.TopLogprobs = 0
    stop: base.Stops = []
    stream_options: base.StreamOptions = base.StreamOptions()
    n: base.Answers = 1
    modalities: list[Literal["text"]] = []
    audio: base.Unsupported = None
    functions: base.Unsupported = None
    function_call: base.Unsupported = None
    web_search_options: base.Unsupported = None

    def thinks(self) -> str:
        """The value of `Ask.think`. Raises ApiError if the fields that clients use for it contradict each other."""
        _agreed({"reasoning_effort": self.reasoning_effort, "reasoning.effort": self.reasoning.effort})
        effort = self.reasoning_effort or self.reasoning.effort
        switches = {
            "think": self.think,
            "thinking": self.thinking.on if isinstance(self.thinking, base.Thinking) else self.thinking,
            "enable_thinking": self.enable_thinking,
            "chat_template_kwargs.thinking": self.chat_template_kwargs.thinking,
            "chat_template_kwargs.enable_thinking": self.chat_template_kwargs.enable_thinking,
            "reasoning.enabled": self.reasoning.enabled,
        }
        if effort == "none":
            switches["the effort"] = False
        switch = _agreed(switches)
        if switch is None and effort is None and self.model == "deepseek-chat":
            switch = False
        return base.think(switch, effort)

    def budget(self) -> int | None:
        """The value of `Ask.budget`. Raises ApiError if the fields for it contradict each other."""
        inner = self.thinking.budget_tokens if isinstance(self.thinking, base.Thinking) else None
        return _agreed(
            {
                "thinking.budget_tokens": inner,
                "reasoning.max_tokens": self.reasoning.max_tokens,
                "thinking_token_budget": self.thinking_token_budget,
                "thinking_budget_tokens": self.thinking_budget_tokens,
            }
        )

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


def _agreed[T](said: dict[str, T | None]) -> T | None:
    """What the fields that are given say. Raises ApiError unless it is one thing."""
    given = [(name, value) for name, value in said.items() if value is not None]
    for name, value in given:
        if value != given[0][1]:
            raise base.wrong(name, value, f"{json.dumps(given[0][1])}, which {given[0][0]} says")
    return given[0][1] if given else None


def read(body: Json) -> Ask:
    """The `Ask` of `POST /v1/chat/completions`. Raises Ds4Error."""
    chat = base.parse(Chat, body)
    format = chat.response_format
    return Ask(
        messages=chat.messages,
        continues=chat.continues(),
        n=chat.n,
        tools=chat.tools if chat.tools and chat.tool_choice != "none" else None,
        calling=chat.calling(),
        think=chat.thinks(),
        budget=chat.budget(),
        summary=chat.include_reasoning,
        form=chat.form(format.json_schema.schema_ if isinstance(format, NestedFormat) else base.form_of(format)),
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        stop=base.stops(chat.stop),
        logprobs=chat.top_logprobs if chat.logprobs else None,
        include_usage=chat.stream_options.include_usage,
        **chat.common(),
    )
