"""The body of OpenAI's Responses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ds4jax.chat import calls, template
from ds4jax.chat.calls import Calling
from ds4jax.engine.form import Pattern
from ds4jax.server.ask import Ask, Json
from ds4jax.server.replay import NoteLog
from ds4jax.server.schemas import base
from ds4jax.server.schemas.thinking import Thinks
from ds4jax.server.stored import Stored


# ---- input items -----------------------------------------------------------------------------------------------------
class TextPart(base.Schema):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class Refusal(base.Schema):
    type: Literal["refusal"]
    refusal: str


class Attachment(base.Schema):
    """Something that the model cannot see. Of a call's output the prompt says that it was there."""

    type: Literal["input_image", "input_file", "input_audio", "input_video"]


type Part = Annotated[TextPart | Refusal | Attachment, Field(discriminator="type")]
type Content = str | base.Items[Part]


class Item(base.Schema):
    """Items come back as they were sent, finished or not."""

    status: str = "completed"


class Message(Item):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class Reasoning(Item):
    type: Literal["reasoning"]
    summary: base.Items[TextPart] = []
    content: base.Items[TextPart] = []


class FunctionCall(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str = ""
    arguments: str


class CustomCall(Item):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str = ""
    input: str


class CallOutput(Item):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Content


class Skipped(Item):
    """A record of a tool that runs at OpenAI. The model here is not told of it."""

    type: Literal[
        "compaction", "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call",
        "mcp_call", "mcp_list_tools",
    ]  # fmt: skip


def _message_by_default(item: Any) -> Any:
    return item | {"type": "message"} if isinstance(item, dict) and item.get("type") is None else item


type AnyItem = Annotated[
    Message | Reasoning | FunctionCall | CustomCall | CallOutput | Skipped,
    Field(discriminator="type"),
    BeforeValidator(_message_by_default),
]


# ---- tools -----------------------------------------------------------------------------------------------------------
class Function(base.Schema):
    type: Literal["function"]
    name: str
    description: Any = None
    parameters: Any = None
    strict: bool = False


class GrammarFormat(base.Schema):
    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: str


class Custom(base.Schema):
    """A tool that takes free text."""

    type: Literal["custom"]
    name: str
    description: Any = None
    format: Annotated[base.TextFormat | GrammarFormat, Field(discriminator="type")] | None = None

    def pattern(self) -> Pattern | None:
        """What the text must match."""
        if not isinstance(self.format, GrammarFormat):
            return None
        return Pattern(self.format.syntax, self.format.definition)


class Hosted(base.Schema):
    """A tool that runs at OpenAI. The model here is not told of it."""

    type: Literal[
        "web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation", "mcp", "local_shell",
        "computer_use_preview", "tool_search",
    ]  # fmt: skip


class Namespace(base.Schema):
    type: Literal["namespace"]
    name: str
    tools: base.Items[Annotated[Function | Custom | Hosted, Field(discriminator="type")]]


type Tool = Annotated[Function | Custom | Hosted | Namespace, Field(discriminator="type")]


# ---- the body --------------------------------------------------------------------------------------------------------
class OneTool(base.Schema):
    type: Literal["function", "custom"]
    name: str
    namespace: str = ""

    def called(self) -> str:
        """Its name in the prompt."""
        return _in_namespace(self.namespace, self.name)


class Allowed(base.Schema):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: base.Some[OneTool]


type ToolChoice = Annotated[OneTool | Allowed, Field(discriminator="type")]


class TextOptions(base.Options):
    without_effect = frozenset({"verbosity"})

    format: base.Format | None = None


class Responses(Thinks):
    input: base.Some[AnyItem]
    instructions: str = ""
    tools: base.Items[Tool] = []
    tool_choice: Literal["auto", "none", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    max_output_tokens: base.Limit | None = None
    include: list[str] = []
    top_logprobs: base.TopLogprobs = 0
    previous_response_id: str | None = None
    store: bool = True
    conversation: base.Unsupported = None
    prompt: base.Unsupported = None
    background: Literal[False] = False


LOGPROBS = "message.output_text.logprobs"
"""What `include` has for log-probabilities. Other things that it may name come from tools that run at OpenAI."""

_ECHOED = (
    "instructions", "max_output_tokens", "max_tool_calls", "metadata", "parallel_tool_calls", "previous_response_id",
    "prompt_cache_key", "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store",
    "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
)  # fmt: skip


def read(body: Json, stored: Stored | None = None) -> Ask:
    """The `Ask` of `POST /v1/responses`. stored: earlier responses and items. Raises Ds4Error."""
    stored = Stored(NoteLog(None, 0)) if stored is None else stored
    new = body.get("input")
    if new is None and body.get("previous_response_id") is not None:
        new = []
    if isinstance(new, str):
        new = [{"type": "message", "role": "user", "content": new}] if new else []
    if isinstance(new, list):
        earlier = (
            stored.history(body["previous_response_id"]) if isinstance(body.get("previous_response_id"), str) else []
        )
        body = body | {"input": [*earlier, *(new := list(stored.resolved(new)))]}
    asked = base.parse(Responses, body)
    history: list[Json] = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    history += _as_chat(asked.input)
    if not history:
        raise base.wrong("input", new, "a message, a call or its output")
    tools, custom, namespaces = _tools(asked.tools)
    return Ask(
        messages=history,
        tools=tools if tools and asked.tool_choice != "none" else None,
        custom_tools=custom,
        namespaces=namespaces,
        think=asked.thinks(),
        budget=asked.budget(),
        summary=asked.reasoning.summary != "none" and not asked.reasoning.exclude,
        calling=_calling(asked, tools),
        form=base.form_of(asked.text.format),
        max_tokens=asked.max_output_tokens,
        logprobs=asked.top_logprobs if LOGPROBS in asked.include or asked.top_logprobs else None,
        echo={key: body[key] for key in _ECHOED if body.get(key) is not None},
        keep=new if asked.store and isinstance(new, list) else None,
        **asked.common(),
    )


def _tools(
    tools: list[Function | Custom | Hosted | Namespace],
) -> tuple[list[Json], frozenset[str], dict[str, tuple[str, str]]]:
    """Function tools, and what `Ask` says of custom_tools and namespaces.

    A tool of free text becomes a function of one string; the tools of a namespace come one by one.
    """
    out: list[Json] = []
    custom: set[str] = set()
    namespaces: dict[str, tuple[str, str]] = {}
    for space, tool in _one_by_one(tools):
        if isinstance(tool, Hosted):
            continue
        name = _in_namespace(space, tool.name)
        if space:
            namespaces[name] = space, tool.name
        shown = tool.model_dump(exclude_unset=True) | {"type": "function", "name": name}
        if isinstance(tool, Custom):
            custom.add(name)
            text = {
                "type": "object",
                "properties": {calls.FREE_TEXT: {"type": "string"}},
                "required": [calls.FREE_TEXT],
            }
            shown["parameters"] = text
        out.append(shown)
    return out, frozenset(custom), namespaces


def _calling(asked: Responses, tools: list[Json]) -> Calling:
    """The value of `Ask.calling`. Raises ApiError."""
    texts = {
        _in_namespace(space, tool.name): pattern
        for space, tool in _one_by_one(asked.tools)
        if isinstance(tool, Custom) and (pattern := tool.pattern())
    }
    single = not asked.parallel_tool_calls
    match asked.tool_choice:
        case OneTool() as tool:
            calling = base.calling(tools, "required", [tool.called()], single=True)
        case Allowed(mode=mode, tools=allowed):
            calling = base.calling(tools, mode, [tool.called() for tool in allowed], single)
        case choice:
            calling = base.calling(tools, choice, None, single)
    return dataclasses.replace(calling, texts=texts)


def _one_by_one(
    tools: list[Function | Custom | Hosted | Namespace],
) -> Iterator[tuple[str, Function | Custom | Hosted]]:
    """Every tool with the name of its namespace, or with ""."""
    for tool in tools:
        if isinstance(tool, Namespace):
            yield from ((tool.name, inner) for inner in tool.tools)
        else:
            yield "", tool


def _in_namespace(namespace: str, name: str) -> str:
    return f"{namespace}__{name}" if namespace else name


def _as_chat(items: list[Message | Reasoning | FunctionCall | CustomCall | CallOutput | Skipped]) -> list[Json]:
    """Messages in Chat Completions' form. Raises ApiError for one that is not all text.

    What the assistant thought, said and called in one turn becomes one message.
    """
    out: list[Json] = []
    turn: Json | None = None  # the assistant's, while it goes on

    def assistant(after_speech: bool) -> Json:
        """The assistant's current message; a new one if it already speaks or calls, unless `after_speech`."""
        nonlocal turn
        if turn is None or not after_speech and (turn["content"] or "tool_calls" in turn):
            turn = {"role": "assistant", "content": ""}
            out.append(turn)
        return turn

    for i, item in enumerate(items):
        match item:
            case Message(role="assistant", content=content):
                assistant(after_speech=False)["content"] = _text(content, f"input[{i}].content")
            case Message(role=role, content=content):
                turn = None
                out.append({"role": role, "content": _text(content, f"input[{i}].content")})
            case Reasoning():
                thought = assistant(after_speech=False)
                text = "\n\n".join(part.text for part in (*item.summary, *item.content))
                thought["reasoning_content"] = thought.get("reasoning_content", "") + text
            case FunctionCall() | CustomCall():
                function = {"name": _in_namespace(item.namespace, item.name), "arguments": _arguments(item)}
                call = {"id": item.call_id, "type": "function", "function": function}
                assistant(after_speech=True).setdefault("tool_calls", []).append(call)
            case CallOutput():
                turn = None
                output = _text(item.output, f"input[{i}].output", traces=True)
                out.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    return out


def _arguments(call: FunctionCall | CustomCall) -> str:
    if isinstance(call, FunctionCall):
        return call.arguments
    return json.dumps({calls.FREE_TEXT: call.input}, ensure_ascii=False)


def _text(content: Content, where: str, traces: bool = False) -> str:
    """The text of parts. traces: whether others leave a trace; if not, they raise an ApiError."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        match part:
            case TextPart(text=text) | Refusal(refusal=text):
                texts.append(text)
            case Attachment(type=kind) if traces:
                texts.append(template.unsupported(kind.removeprefix("input_")))
            case Attachment(type=kind):
                raise base.unseen(f"{where}[{i}]", kind)
    return "\n\n".join(texts)
