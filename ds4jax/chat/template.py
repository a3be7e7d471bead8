"""The prompt format: chat messages become segments of trusted control tokens and plain text.

The layout follows the reference encoder, published with the model; where that and the published Jinja templates differ,
or do something unwise, a comment says what is done here. Only text written in this file becomes control tokens.
Whatever comes from a client (messages, tool schemas, tool names and arguments, results) stays plain text, also where it
spells a control token.

DeepSeek's later renderer, the package deepseek-recipe 0.2.0, writes the same text and control tokens, except:

- As the reference encoder does, and that package does not: with thinking off there are no earlier thoughts, even beside
  tools; the thought of a last turn stays; a call without parameters has a blank line; calls keep their order, whatever
  their ids; results stay where results are among a user's texts, those of unknown calls as if they were of the first;
  empty texts are joined by blank lines too; a tool is shown as the client gave it; numbers are written as by Python.
- As neither does: only the leading system messages come first; thoughts stay beside results of tools that are no longer
  declared; a continued text without a thought stands after ``</think>`` alone; empty arguments are none; closing tags
  within results and arguments are escaped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ds4jax.errors import Ds4Error, show
from ds4jax.io.tokenizer import Special, Tokenizer
from ds4jax.profile import effort_prefix

Segment = str | Special | int
"""One piece of a prompt: plain text, a trusted control token, or a token of a turn that is repeated as sampled."""


@dataclasses.dataclass(frozen=True)
class SampledTurn:
    """An assistant turn with tool calls: the message that the client got, and the tokens that were sampled for it.

    Clients send back the message, not the tokens, and to render it anew may give others: keys in another order, numbers
    spelled otherwise, a different cut into tokens. `render` takes the tokens where the message is still the same.

    thinking: whether the generation header before it opened a thought.
    message: OpenAI-style and plain JSON, as `ds4jax.chat.parser.message` makes it.
    ids: the sampled tokens after the generation header, the closing tag of the calls included, without EOS.
    """

    thinking: bool
    message: Mapping[str, Any]
    ids: tuple[int, ...]


# The tool-call markup ("DSML"); its tag names are ordinary text around one control token.
CALLS_OPEN, CALLS_CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
INVOKE_OPEN, INVOKE_CLOSE = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
PARAMETER_OPEN, PARAMETER_CLOSE = '<｜DSML｜parameter name="', "</｜DSML｜parameter>"
RESULT_OPEN, RESULT_CLOSE = "<tool_result>", "</tool_result>"
RAW_PARAMETER = "arguments"  # the one parameter of a call whose arguments are not a JSON object

_TOOLS_HEAD = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""  # noqa: E501
_TOOLS_TAIL = "\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
_RESPONSE_FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


TEXT_ONLY = "'text': the model sees no images and reads no files"
"""What is expected of a part of a message."""


def unsupported(kind: str) -> str:
    """What the model reads where a tool's result has a part that is not text, as in the reference."""
    return f"[Unsupported {kind}]"


def render_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """The ids of a chat prompt: `render` with its options, then BPE.

    Raises Ds4Error as `render` does, and if the vocabulary lacks a control token.
    """
    return to_ids(tokenizer, render(messages, **options))


def to_ids(tokenizer: Tokenizer, segments: Sequence[Segment]) -> list[int]:
    """Token ids of a rendered prompt. Raises Ds4Error if the vocabulary lacks one of its control tokens."""
    return tokenizer.encode_segments(tokenizer.special(s) if isinstance(s, Special) else s for s in segments)


def to_text(segments: Sequence[Segment]) -> str:
    """A rendered prompt as one string, to look at and not to tokenize: control tokens spelled, sampled ones as [id]."""
    return "".join(s if isinstance(s, str) else s.value if isinstance(s, Special) else f"[{s}]" for s in segments)


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    think: str = "on",
    profile: str = "original",
    ctx: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
    add_generation_header: bool = True,
    continues: bool = False,
    replay: Mapping[str, SampledTurn] | None = None,
) -> list[Segment]:
    """The prompt for a conversation.

    messages: OpenAI-style dicts. Roles: system, developer, user, assistant (with reasoning_content and tool_calls),
        tool (with tool_call_id) and latest_reminder. Content is a string or a list of parts of text; in a tool's result
        a part of another kind is said to have been there.
    think: one of `ds4jax.profile.THINK_MODES`.  profile, ctx: see `ds4jax.profile.effort_prefix`.
    tools: function tools as the Chat Completions, Responses or Messages API has them; see `normalise_tools`.
    response_format: a JSON value, put into the prompt as the schema that the reply must follow.
    add_generation_header: whether to end with the opening of the assistant's next turn.
    continues: whether to end inside the last message instead, an assistant's without calls, so that the model goes on
        with it: with its text, or with its thought if it has no text. An empty message is a generation header. The text
        of a message without a thought stands as after no thought, also where thinking is on.
    replay: turns as sampled, by the id of each of their calls. Such a turn is repeated token by token if its message is
        unchanged and its header was the same; reasoning that the client left out is then there again.
    Raises Ds4Error naming the message or tool, what was found and what was expected.
    """
    prefix = effort_prefix(think, profile, ctx)
    system, turns = _turns(messages)
    thinking = think != "off"
    begun = _Assistant("", "", [])  # what there is of the turn that the prompt ends in
    if continues:
        begun = _continued(messages, think)
        turns.pop()

    out: list[Segment] = [Special.BOS, prefix, system]
    if tools:
        schemas = "".join(_json(tool) + "\n" for tool in normalise_tools(tools))
        out += ["\n\n", *_markup(_TOOLS_HEAD), schemas, _TOOLS_TAIL]  # the blank line stays without system text too
    if response_format is not None:
        out += [_RESPONSE_FORMAT, _json(response_format)]

    # Reasoning is dropped before the last user turn, unless tools are in play (the templates' rule, which also counts
    # results in the history; the reference looks at declared tools only).
    last_user = max((i for i, turn in enumerate(turns) if isinstance(turn, _User)), default=-1)
    results = any(isinstance(block, _Result) for turn in turns if isinstance(turn, _User) for block in turn.blocks)
    call_order: dict[str, int] = {}
    for i, turn in enumerate(turns):
        match turn:
            case _User():
                out += [Special.USER, "\n\n".join(_in_call_order(turn.blocks, call_order))]
            case _Reminder():
                out += [Special.LATEST_REMINDER, turn.text]
            case _Assistant():
                out.append(Special.ASSISTANT)
                keep = bool(thinking and (tools or results or i > last_user))
                if sampled := _as_sampled(turn, keep, replay or {}):
                    out += [Special.THINK_OPEN if keep else Special.THINK_CLOSE, *sampled.ids, Special.EOS]
                else:
                    out += [Special.THINK_OPEN, turn.reasoning] if keep else []
                    out += [Special.THINK_CLOSE, turn.content, *_render_calls(turn.calls), Special.EOS]
                if turn.calls:
                    call_order = {call.id: n for n, call in enumerate(turn.calls) if call.id is not None}
    if add_generation_header or continues:
        inside = thinking and not begun.content
        out.append(Special.ASSISTANT)
        out += [Special.THINK_OPEN, begun.reasoning] if inside or begun.reasoning else []
        out += [] if inside else [Special.THINK_CLOSE, begun.content]
    return [segment for segment in out if segment != ""]


def opens_thought(messages: Sequence[Mapping[str, Any]], *, think: str = "on", continues: bool = False) -> bool:
    """Whether the prompt that `render` writes ends inside a thought. Raises Ds4Error if `continues` cannot be done."""
    has_text = continues and bool(_continued(messages, think).content)
    return think != "off" and not has_text


def normalise_tools(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the prompt shows of each tool, as JSON, its keys in this order.

    Chat Completions (``{"type": "function", "function": {...}}``): the `function` object as it is. Responses (the same
    keys without the nesting) and Messages (`input_schema`): name, description and parameters, as far as given.
    Raises Ds4Error for anything else, such as hosted tools.
    """
    _check("tools", tools, list | tuple, "a list")
    out = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        _check(where, tool, Mapping, "an object")
        if "function" in tool:
            where += ".function"
            function = tool["function"]
            _check(where, function, Mapping, "an object")
        else:
            schema = "input_schema" if "input_schema" in tool else "parameters"
            types = ("function", "custom") if schema == "input_schema" else ("function",)
            if tool.get("type", "function") not in types:
                raise Ds4Error(
                    f"{where}.type: found {show(tool['type'])}, expected 'function', or a tool with input_schema"
                )
            keys = {"name": "name", "description": "description", "parameters": schema}
            function = {key: tool[source] for key, source in keys.items() if source in tool}
        _check(f"{where}.name", function.get("name"), str, "a string")
        out.append(function)
    return out


# Messages, checked and grouped into the turns of the prompt.


@dataclasses.dataclass
class _Result:
    call_id: str
    text: str


@dataclasses.dataclass
class _User:
    blocks: list[str | _Result]


@dataclasses.dataclass
class _Reminder:
    text: str


@dataclasses.dataclass
class _Call:
    id: str | None
    name: str
    parameters: dict[str, Any]


@dataclasses.dataclass
class _Assistant:
    reasoning: str
    content: str
    calls: list[_Call]


def _turns(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[_User | _Assistant | _Reminder]]:
    """The leading system text, and the turns after it.

    Only the leading run of system messages is system text: to hoist later ones, as the templates do, would change the
    prompt's beginning in mid-conversation and make every cached prefix useless. They become text of a user turn.
    `developer` is treated as system.
    """
    _check("messages", messages, list | tuple, "a list")
    if not messages:
        raise Ds4Error("messages: found none, expected at least one")
    system: list[str] = []
    turns: list[_User | _Assistant | _Reminder] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        _check(where, message, Mapping, "an object")
        role = message.get("role")
        last = turns[-1] if turns else None
        if isinstance(last, _Reminder) and role not in ("user", "tool", "system", "developer"):
            raise Ds4Error(f"{where}.role: found {role!r} after latest_reminder, expected a user turn")
        match role:
            case "system" | "developer" if not turns:
                system.append(_text(message, where))
            case "system" | "developer" | "user" | "tool":
                text = _text(message, where)
                if role == "tool":
                    _check(f"{where}.tool_call_id", message.get("tool_call_id"), str, "a string")
                block = _Result(message["tool_call_id"], text) if role == "tool" else text
                if isinstance(last, _User):
                    last.blocks.append(block)
                else:
                    turns.append(_User([block]))
            case "assistant":
                turns.append(_assistant(message, where))
            case "latest_reminder":
                # Only before a user turn: after one, the reference would put the assistant's header in front of it.
                if isinstance(last, _User) or i + 1 == len(messages):
                    raise Ds4Error(f"{where}.role: found latest_reminder, expected it only just before a user turn")
                turns.append(_Reminder(_text(message, where)))
            case _:
                expected = "system, developer, user, assistant, tool or latest_reminder"
                raise Ds4Error(f"{where}.role: found {role!r}, expected {expected}")
    return "\n\n".join(system), turns


def _text(message: Mapping[str, Any], where: str, optional: bool = False) -> str:
    """A message's content: a string, or the text of its parts, joined by blank lines.

    What a tool found is not the client's to choose: other parts of it leave a trace, as in the reference.
    """
    where, content = f"{where}.content", message.get("content")
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    _check(where, content, list | tuple, "a string or a list of parts")
    assert content is not None
    texts = []
    for i, part in enumerate(content):
        _check(f"{where}[{i}]", part, Mapping, "an object")
        _check(f"{where}[{i}].type", part.get("type"), str, "a string")
        if (kind := part["type"]) in ("text", "refusal"):
            _check(f"{where}[{i}].{kind}", part.get(kind), str, "a string")
            texts.append(part[kind])
        elif message.get("role") == "tool":
            texts.append(unsupported(kind))
        else:
            raise Ds4Error(f"{where}[{i}].type: found {show(kind)}, expected {TEXT_ONLY}")
    return "\n\n".join(texts)


def _assistant(message: Mapping[str, Any], where: str) -> _Assistant:
    name = _reasoning_field(message)
    reasoning, refusal = message.get(name), message.get("refusal")
    _check(f"{where}.{name}", reasoning, str | None, "a string")
    _check(f"{where}.refusal", refusal, str | None, "a string")
    if message.get("function_call") is not None:
        raise Ds4Error(f"{where}.function_call: found one, expected tool_calls in its place")
    text = _text(message, where, optional=True) or refusal or ""
    return _Assistant(reasoning or "", text, _calls(message, where))


def _reasoning_field(message: Mapping[str, Any]) -> str:
    """The field in which a message has its thought: DeepSeek's name, or OpenRouter's."""
    return "reasoning_content" if message.get("reasoning_content") is not None else "reasoning"


def _continued(messages: Sequence[Mapping[str, Any]], think: str) -> _Assistant:
    """The last message, which the model is to go on with."""
    where, message = f"messages[{len(messages) - 1}]", messages[-1]
    _check(where, message, Mapping, "an object")
    if message.get("role") != "assistant":
        raise Ds4Error(f"{where}.role: found {message.get('role')!r}, expected 'assistant', to be continued")
    turn = _assistant(message, where)
    if turn.calls:
        raise Ds4Error(f"{where}.tool_calls: found {len(turn.calls)}, expected none in a message that is continued")
    if turn.reasoning and think == "off":
        raise Ds4Error(
            f"{where}.{_reasoning_field(message)}: found a thought to go on from, expected none with thinking off"
        )
    return turn


def _calls(message: Mapping[str, Any], where: str) -> list[_Call]:
    """An assistant message's tool calls, their arguments parsed."""
    calls = message.get("tool_calls") or []
    _check(f"{where}.tool_calls", calls, list | tuple, "a list")
    out = []
    for i, call in enumerate(calls):
        here = f"{where}.tool_calls[{i}]"
        _check(here, call, Mapping, "an object")
        _check(f"{here}.id", call.get("id"), str | None, "a string")
        function = call.get("function")
        _check(f"{here}.function", function, Mapping, "an object")
        _check(f"{here}.function.name", function.get("name"), str, "a string")
        arguments = function.get("arguments")
        _check(f"{here}.function.arguments", arguments, str | Mapping, "a JSON string or an object")
        out.append(_Call(call.get("id"), function["name"], _parameters(arguments)))
    return out


def _parameters(arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call; arguments that are not a JSON object become one string parameter."""
    if not isinstance(arguments, str):
        arguments = _json(dict(arguments))
    try:
        # Clients send "" for a call without parameters.
        parsed = read_json(arguments) if arguments.strip() else {}
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {RAW_PARAMETER: arguments}


def read_json(text: str) -> Any:
    """A JSON value that can be written again as JSON; raises ValueError for any other text.

    That rules out what json.loads alone would take: NaN, Infinity, and floats that become infinite, such as 1e400. It
    also rules out what Python cannot hold: nesting deeper than its stack, integers of more than 4300 digits.
    """

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(number)
        return value

    try:
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _check(where: str, value: object, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise Ds4Error(f"{where}: found {'nothing' if value is None else type(value).__name__}, expected {expected}")


# Rendering of the parts.


@functools.cache
def _markup(text: str) -> tuple[Segment, ...]:
    """Segments of a constant of this file: the control tokens spelled in it become trusted ones."""
    parts = re.split("(" + "|".join(re.escape(special.value) for special in Special) + ")", text)
    return tuple(Special(part) if i % 2 else part for i, part in enumerate(parts))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def escape(text: str, closing_tag: str, escaped: str = "&lt;") -> str:
    """Escape the `<` of every `closing_tag` inside a text that stands before that tag."""
    return text.replace(closing_tag, escaped + closing_tag[1:])


def _as_sampled(turn: _Assistant, thinking: bool, replay: Mapping[str, SampledTurn]) -> SampledTurn | None:
    """The sampled turn that a client sent back, if it had the same header and the client changed nothing."""
    sampled = replay.get(turn.calls[0].id or "") if turn.calls else None
    if sampled is None or sampled.thinking != thinking:
        return None
    said = _assistant(sampled.message, "replay")
    return sampled if dataclasses.replace(turn, reasoning=turn.reasoning or said.reasoning) == said else None


def _render_calls(calls: Sequence[_Call]) -> list[Segment]:
    if not calls:
        return []
    out: list[Segment] = ["\n\n", *_markup(CALLS_OPEN + "\n")]
    for call in calls:
        out += [*_markup(INVOKE_OPEN), call.name, '">\n']
        for key, value in call.parameters.items():
            if isinstance(value, str):
                is_string, text = "true", escape(value, PARAMETER_CLOSE)
            else:
                is_string, text = "false", escape(_json(value), PARAMETER_CLOSE, "\\u003c")
            head = f'{key}" string="{is_string}">'
            out += [*_markup(PARAMETER_OPEN), head, text, *_markup(PARAMETER_CLOSE + "\n")]
        if not call.parameters:
            out.append("\n")
        out += _markup(INVOKE_CLOSE + "\n")
    return [*out, *_markup(CALLS_CLOSE)]


def _in_call_order(blocks: Sequence[str | _Result], call_order: Mapping[str, int]) -> list[str]:
    """The texts of a user turn: results in the order of their calls, in the places results have among the blocks.

    Results of unknown calls count as results of the first one.
    """
    results = sorted(
        (block for block in blocks if isinstance(block, _Result)), key=lambda result: call_order.get(result.call_id, 0)
    )
    ordered = iter(results)
    return [
        block if isinstance(block, str) else RESULT_OPEN + escape(next(ordered).text, RESULT_CLOSE) + RESULT_CLOSE
        for block in blocks
    ]
