"""The body of Anthropic's Messages. Tools are checked where they are rendered, in `ds4jax.chat.template`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from ds4jax.chat import template
from ds4jax.chat.calls import Calling
from ds4jax.server.ask import Ask, Json
from ds4jax.server.schemas import base, thinking


# ---- content blocks --------------------------------------------------------------------------------------------------
class Text(base.Schema):
    type: Literal["text"]
    text: str


class SystemText(base.Schema):
    text: str


class Image(base.Schema):
    """Something that the model cannot see. Of a tool's result the prompt says that it was there."""

    type: Literal["image"]


class Document(base.Schema):
    """A document. The model reads it if it is text."""

    type: Literal["document"]
    source: dict[str, Any] = {}
    title: str = ""
    context: str = ""


class SearchResult(base.Schema):
    type: Literal["search_result"]
    source: str
    title: str
    content: base.Items[Text]


type Readable = Annotated[Text | Image | Document | SearchResult, Field(discriminator="type")]


class Blocks(base.Schema):
    content: base.Items[Readable]


class ToolResult(base.Schema):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Any] = ""


class Thought(base.Schema):
    type: Literal["thinking"]
    thinking: str


class RedactedThought(base.Schema):
    type: Literal["redacted_thinking"]


class ToolUse(base.Schema):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


# ---- messages --------------------------------------------------------------------------------------------------------
class User(base.Schema):
    role: Literal["user"]
    content: (
        str | base.Items[Annotated[Text | Image | Document | SearchResult | ToolResult, Field(discriminator="type")]]
    )


class Assistant(base.Schema):
    role: Literal["assistant"]
    content: str | base.Items[Annotated[Text | Thought | RedactedThought | ToolUse, Field(discriminator="type")]]


class System(base.Schema):
    role: Literal["system"]
    content: str | base.Items[Text]


type Message = Annotated[User | Assistant | System, Field(discriminator="role")]


class OutputConfig(base.Options):
    effort: thinking.Effort | None = None
    format: base.Format | None = None


class Thinking(thinking.Thinking):
    """display: with "omitted", the reply says that there was a thought, and not what it was."""

    display: Literal["summarized", "omitted"] = "summarized"


class Choice(base.Schema):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool = False


class OneTool(base.Schema):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


type ToolChoice = Annotated[Choice | OneTool, Field(discriminator="type")]


class Messages(base.Body):
    messages: base.Some[Message]
    system: str | base.Items[SystemText] = ""
    tools: list[Any] = []
    tool_choice: ToolChoice = Choice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    output_format: base.Format | None = None  # the name of output_config.format in Anthropic's beta
    max_tokens: base.Limit | None = None
    stop_sequences: base.Stops = []

    def format(self) -> base.Format | None:
        """What the answer must be. Raises ApiError if the two fields for it contradict each other."""
        old, new = self.output_format, self.output_config.format
        if old and new and old != new:
            found = old.model_dump(mode="json", by_alias=True)
            raise base.wrong("output_format", found, "what output_config.format says, or nothing")
        return new or old

    def thinks(self) -> str:
        """The value of `Ask.think`. As with Anthropic, an effort does not turn on thoughts that are disabled.

        Raises ApiError for an effort of "none" where thinking is enabled.
        """
        switch, effort = self.thinking and self.thinking.on, self.output_config.effort
        if switch and effort == "none":
            raise base.wrong("output_config.effort", effort, "an effort: the model is to think, as thinking says")
        return thinking.think(switch, effort)

    def system_text(self) -> str:
        """The system prompt.

        Claude Code's first block names its version and a number that changes: nothing for the model, and it would make
        every prompt a new one.
        """
        if isinstance(self.system, str):
            return self.system
        return "\n\n".join(block.text for block in self.system if not block.text.startswith("x-anthropic-"))

    def calling(self) -> Calling:
        """The value of `Ask.calling`. Raises ApiError."""
        choice = self.tool_choice
        if isinstance(choice, OneTool):
            return base.calling(self.tools, "required", [choice.name], single=True)
        kind = "required" if choice.type == "any" else choice.type
        return base.calling(self.tools, kind, None, choice.disable_parallel_tool_use)


def read(body: Json, think_default: str = "on") -> Ask:
    """The `Ask` of `POST /v1/messages`. think_default: its `think` where the body does not say. Raises Ds4Error."""
    asked = base.parse(Messages, body)
    system = asked.system_text()
    think = asked.thinks() or think_default
    last = asked.messages[-1]
    if continues := isinstance(last, Assistant):
        _check_continued(last, f"messages[{len(asked.messages) - 1}].content", think)
    history = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(asked.messages):
        history += _as_chat(message, f"messages[{i}].content")
    return Ask(
        messages=history,
        continues=continues,
        tools=asked.tools if asked.tools and asked.tool_choice.type != "none" else None,
        calling=asked.calling(),
        think=think,
        budget=asked.thinking.budget_tokens if asked.thinking else None,
        summary=asked.thinking is None or asked.thinking.display != "omitted",
        form=base.form_of(asked.format()),
        max_tokens=asked.max_tokens,
        stop=base.stops(asked.stop_sequences),
        **asked.common(),
    )


def _check_continued(message: Assistant, where: str, think: str) -> None:
    """Raises ApiError unless the model can go on with a message. White space at the end is refused as at Anthropic."""
    texts = [message.content] if isinstance(message.content, str) else []
    for i, block in enumerate([] if isinstance(message.content, str) else message.content):
        match block:
            case ToolUse():
                raise base.wrong(f"{where}[{i}].type", block.type, "no calls in a message that is continued")
            case Thought(thinking=thought) if thought and think == "off":
                raise base.wrong(f"{where}[{i}].type", block.type, "no thought to go on from, with thinking off")
            case Text():
                texts.append(block.text)
    text = "\n\n".join(texts)
    if text != text.rstrip():
        raise base.wrong(where, text[-20:], "no white space at the end of a message that is continued")


def _as_chat(message: User | Assistant | System, where: str) -> list[Json]:
    """A message in Chat Completions' form; several if it has tool results. Raises ApiError for what is not text."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if isinstance(message, User):
        return _user(message.content, where)
    if isinstance(message, System):
        return [{"role": message.role, "content": [block.model_dump() for block in message.content]}]
    thoughts, parts, calls = [], [], []
    for block in message.content:
        match block:
            case Thought(thinking=text):
                thoughts.append(text)
            case Text():
                parts.append(block.model_dump())
            case ToolUse(id=id, name=name, input=arguments):
                function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
                calls.append({"id": id, "type": "function", "function": function})
    out: Json = {"role": message.role, "content": parts, "tool_calls": calls}
    return [out | ({"reasoning_content": "".join(thoughts)} if thoughts else {})]


def _user(content: list[Text | Image | Document | SearchResult | ToolResult], where: str) -> list[Json]:
    out: list[Json] = []
    for i, block in enumerate(content):
        if isinstance(block, ToolResult):
            out.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block.content)})
            continue
        part = _part(block, f"{where}[{i}]")
        if out and out[-1]["role"] == "user":
            out[-1]["content"].append(part)
        else:
            out.append({"role": "user", "content": [part]})
    return out or [{"role": "user", "content": []}]


def _result(content: str | list[Any]) -> str | list[Any]:
    """A tool's result: parts in Chat Completions' form, which are checked where they are rendered."""
    if isinstance(content, str):
        return content
    readable = "document", "search_result"
    return [
        _part(base.parse(Blocks, {"content": [part]}).content[0])
        if isinstance(part, dict) and part.get("type") in readable
        else part
        for part in content
    ]


def _part(block: Text | Image | Document | SearchResult, where: str | None = None) -> Json:
    """A block in Chat Completions' form: as text, if it has any.

    where: its place in a message, where all has to be text, or else it raises an ApiError; None in a tool's result.
    """
    match block:
        case Image(type=kind):
            return _unread(kind, where)
        case Document(title=title, context=context):
            if (text := _written(block.source, where and f"{where}.source")) is None:
                return _unread(block.type, where)
            texts = [title, context, text]
        case SearchResult(title=title, source=source):
            texts = [f"{title}\n{source}".strip(), *(inner.text for inner in block.content)]
        case _:
            return block.model_dump()
    return {"type": "text", "text": "\n\n".join(filter(None, texts))}


def _unread(kind: str, where: str | None) -> Json:
    """A block that is not text, as `_part` has it."""
    if where is not None:
        raise base.unseen(where, kind)
    return {"type": kind}


def _written(source: Json, where: str | None) -> str | None:
    """The text of a document, if it is one of text. where: of the source, see `_part`."""
    match source:
        case {"type": "text", "data": str(text)} | {"type": "content", "content": str(text)}:
            return text
        case {"type": "content", "content": list(blocks)}:
            read = base.parse(Blocks, {"content": blocks}).content
            parts = [_part(block, where and f"{where}.content[{i}]") for i, block in enumerate(read)]
            return "\n\n".join(part["text"] if "text" in part else template.unsupported(part["type"]) for part in parts)
    return None
