"""What clients ask for: the bodies of the four APIs, each read into an `Ask`.

A field that is known is checked; null counts as absent; a field that is not known is ignored, since clients send many.
What is known and cannot be done (two answers at once, a forced tool, earlier responses) is refused.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ds4jax.engine.sampling import Sampling
from ds4jax.server.errors import ApiError

MAX_STOPS, MAX_STOP = 16, 1024  # stop strings, and characters of one
MAX_TOP_LOGPROBS = 20

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request, whichever API it came by.

    model: the name the client used; any will do. stream: whether events are wanted.
    messages: in Chat Completions' form, for `template.render`; or None for a raw `prompt`, text or token ids.
    tools: those the model may call. custom_tools: names of those that take free text; namespaces: (namespace, name) of
        those that have one, by the name that the model sees (Responses).
    think: one of `ds4jax.chat.template.THINK_MODES`.
    schema: what the reply must follow: a JSON schema or "json_object". max_tokens: None for all the room there is.
    logprobs: None, or how many of the likeliest tokens to report beside each token of the text.
    include_usage: a last chunk with the usage (Chat Completions, Completions). summary: thoughts are shown (Responses).
    echo: fields that Responses repeats in its answer.
    """

    model: str
    stream: bool
    sampling: Sampling
    messages: list[Json] | None = None
    prompt: str | list[int] | None = None
    tools: list[Json] | None = None
    custom_tools: frozenset[str] = frozenset()
    namespaces: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    think: str = "on"
    schema: Json | str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    include_usage: bool = False
    summary: bool = False
    echo: Json = dataclasses.field(default_factory=dict)


# ---- Chat Completions ------------------------------------------------------------------------------------------------
def chat(body: Json) -> Ask:
    _refuse(body, n=(1,), modalities=(["text"],), audio=(), functions=(), function_call=(), web_search_options=())
    tools = _get(body, "tools", list)
    if not _tools_on(_get(body, "tool_choice", (str, dict))):
        tools = None
    switch = _get(body, "thinking", (bool, dict))
    if isinstance(switch, dict):
        switch = _choice(switch, "type", ("enabled", "disabled", "adaptive"), where="thinking.") != "disabled"
    if (think := _get(body, "think", bool)) is not None:
        switch = think
    model = _get(body, "model", str, "")
    if switch is None and model == "deepseek-chat" and body.get("reasoning_effort") is None:
        switch = False
    top = _get(body, "top_logprobs", int, 0)
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise _wrong("top_logprobs", top, f"0 to {MAX_TOP_LOGPROBS}")
    return Ask(
        messages=_some(body, "messages", list),
        tools=tools or None,
        think=_think(switch, _get(body, "reasoning_effort", str), "reasoning_effort"),
        schema=_format(_get(body, "response_format", dict), "response_format", nested=True),
        max_tokens=_limit(body, "max_completion_tokens") or _limit(body, "max_tokens"),
        logprobs=top if _get(body, "logprobs", bool, False) else None,
        include_usage=_include_usage(body),
        **_common(body, "stop"),
    )


# ---- Completions -----------------------------------------------------------------------------------------------------
def completions(body: Json) -> Ask:
    """A raw prompt: text after BOS, or token ids as they are. As with OpenAI, 16 tokens unless max_tokens is given."""
    _refuse(body, n=(1,), best_of=(1,), echo=(False,), suffix=("",))
    prompt = _required(body, "prompt", (str, list))
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and (not prompt or any(type(id) is not int for id in prompt)):
        raise ApiError("prompt: found several prompts or none, expected one: a string or a list of token ids")
    logprobs = _get(body, "logprobs", int)
    if logprobs is not None and not 0 <= logprobs <= MAX_TOP_LOGPROBS:
        raise _wrong("logprobs", logprobs, f"0 to {MAX_TOP_LOGPROBS}")
    return Ask(
        prompt=prompt,
        max_tokens=_limit(body, "max_tokens") or 16,
        logprobs=logprobs,
        include_usage=_include_usage(body),
        **_common(body, "stop"),
    )


# ---- Messages --------------------------------------------------------------------------------------------------------
def messages(body: Json) -> Ask:
    thinking = _get(body, "thinking", dict)
    switch = None
    if thinking is not None:
        switch = _choice(thinking, "type", ("enabled", "disabled", "adaptive"), where="thinking.") != "disabled"
    output = _get(body, "output_config", dict, {})
    choice = _get(body, "tool_choice", dict)
    tools = _get(body, "tools", list)
    if choice is not None and _choice(choice, "type", ("auto", "none"), where="tool_choice.") == "none":
        tools = None
    history: list[Json] = []
    system = _get(body, "system", (str, list))
    if isinstance(system, list):
        # Claude Code's first block names its version and a number that changes: nothing for the model, and it would
        # make every prompt a new one.
        texts = [_block_text(block, f"system[{i}]") for i, block in enumerate(system)]
        system = "\n\n".join(text for text in texts if not text.startswith("x-anthropic-"))
    if system:
        history.append({"role": "system", "content": system})
    for i, message in enumerate(_some(body, "messages", list)):
        history += _anthropic_message(message, f"messages[{i}]")
    return Ask(
        messages=history,
        tools=tools or None,
        think=_think(switch, _get(output, "effort", str, where="output_config."), "output_config.effort"),
        schema=_format(_get(output, "format", dict, where="output_config."), "output_config.format"),
        max_tokens=_limit(body, "max_tokens"),
        **_common(body, "stop_sequences"),
    )


def _anthropic_message(message: Any, where: str) -> list[Json]:
    """A message in Chat Completions' form; several if it has tool results."""
    _is(message, dict, where)
    role = _choice(message, "role", ("user", "assistant", "system"), where=f"{where}.")
    content = _required(message, "content", (str, list), where=f"{where}.")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    thoughts, parts, calls, results = [], [], [], []
    for i, block in enumerate(content):
        here = f"{where}.content[{i}]"
        kind = _required(_is(block, dict, here), "type", str, where=f"{here}.")
        match role, kind:
            case "assistant", "thinking":
                thoughts.append(_required(block, "thinking", str, where=f"{here}."))
            case "assistant", "redacted_thinking":
                pass
            case "assistant", "tool_use":
                name, id = (_required(block, key, str, where=f"{here}.") for key in ("name", "id"))
                arguments = json.dumps(_required(block, "input", dict, where=f"{here}."), ensure_ascii=False)
                calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
            case "user", "tool_result":
                result = _get(block, "content", (str, list), "", where=f"{here}.")
                id = _required(block, "tool_use_id", str, where=f"{here}.")
                if parts:
                    results.append({"role": "user", "content": parts})
                    parts = []
                results.append({"role": "tool", "tool_call_id": id, "content": result})
            case _, "text":
                parts.append({"type": "text", "text": _block_text(block, here)})
            case "user", "image" | "document" | "search_result":
                parts.append(block)  # the prompt then says that there was one
            case _:
                raise _wrong(f"{here}.type", kind, f"a block that a message of role {role} can have")
    if role == "assistant":
        out: Json = {"role": role, "content": parts}
        return [out | ({"reasoning_content": "".join(thoughts)} if thoughts else {}) | {"tool_calls": calls}]
    return results + ([{"role": role, "content": parts}] if parts or not results else [])


def _block_text(block: Any, where: str) -> str:
    return _required(_is(block, dict, where), "text", str, where=f"{where}.")


# ---- Responses -------------------------------------------------------------------------------------------------------
# Tools that run at OpenAI, and the records of their calls: the model here is not told of them.
_HOSTED_TOOLS = (
    "web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation", "mcp", "local_shell",
    "computer_use_preview", "tool_search",
)  # fmt: skip
_SKIPPED_ITEMS = (
    "compaction", "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "mcp_call",
    "mcp_list_tools",
)  # fmt: skip
_ECHOED = (
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "reasoning", "temperature", "text",
    "tool_choice", "tools", "top_p", "truncation", "user",
)  # fmt: skip


def responses(body: Json) -> Ask:
    _refuse(body, previous_response_id=(), conversation=(), prompt=(), background=(False,), top_logprobs=(0,))
    if (choice := body.get("tool_choice")) not in (None, "auto", "none"):
        raise _wrong("tool_choice", choice, "'auto' or 'none'")
    history: list[Json] = []
    if instructions := _get(body, "instructions", str):
        history.append({"role": "system", "content": instructions})
    items = _some(body, "input", (str, list))
    if isinstance(items, str):
        history.append({"role": "user", "content": items})
    else:
        history += _items(items)
    tools, custom, namespaces = _responses_tools(_get(body, "tools", list, []))
    reasoning = _get(body, "reasoning", dict, {})
    text = _get(body, "text", dict, {})
    summary = _get(reasoning, "summary", str, where="reasoning.")
    return Ask(
        messages=history,
        tools=None if choice == "none" else tools or None,
        custom_tools=custom,
        namespaces=namespaces,
        think=_think(None, _get(reasoning, "effort", str, where="reasoning."), "reasoning.effort"),
        summary=summary not in (None, "none"),
        schema=_format(_get(text, "format", dict, where="text."), "text.format"),
        max_tokens=_limit(body, "max_output_tokens"),
        echo={key: body[key] for key in _ECHOED if body.get(key) is not None},
        **_common(body),
    )


def _responses_tools(tools: Sequence[Any]) -> tuple[list[Json], frozenset[str], dict[str, tuple[str, str]]]:
    """Function tools, and what `Ask` says of custom_tools and namespaces. A tool of free text becomes a function of one
    string; the tools of a namespace come one by one."""
    out, custom, namespaces = [], [], {}

    def add(tool: Any, where: str, space: str | None) -> None:
        kind = _required(_is(tool, dict, where), "type", str, where=f"{where}.")
        if kind in _HOSTED_TOOLS:
            return
        name = _required(tool, "name", str, where=f"{where}.")
        if kind == "namespace" and space is None:
            for i, inner in enumerate(_required(tool, "tools", list, where=f"{where}.")):
                add(inner, f"{where}.tools[{i}]", name)
            return
        shown = _in_namespace(space, name)
        if space is not None:
            namespaces[shown] = space, name
        if kind == "custom":
            custom.append(shown)
            schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
            tool = {"description": tool.get("description"), "parameters": schema}
        elif kind != "function":
            raise _wrong(f"{where}.type", kind, "function, custom or namespace")
        out.append(tool | {"type": "function", "name": shown})

    for i, tool in enumerate(tools):
        add(tool, f"tools[{i}]", None)
    return out, frozenset(custom), namespaces


def _in_namespace(namespace: str | None, name: str) -> str:
    return f"{namespace}__{name}" if namespace else name


def _items(items: Sequence[Any]) -> list[Json]:
    """Messages in Chat Completions' form. What the assistant thought, said and called in one turn is one message."""
    out: list[Json] = []
    turn: Json | None = None  # the assistant's, while it goes on

    def assistant(fresh: bool) -> Json:
        nonlocal turn
        if turn is None or fresh:
            turn = {"role": "assistant", "content": ""}
            out.append(turn)
        return turn

    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = _get(_is(item, dict, where), "type", str, "message", where=f"{where}.")
        if (status := item.get("status")) not in (None, "completed"):
            raise _wrong(f"{where}.status", status, "'completed'")
        match kind:
            case "message":
                role = _choice(item, "role", ("user", "assistant", "system", "developer"), where=f"{where}.")
                text = _item_text(_required(item, "content", (str, list), where=f"{where}."), f"{where}.content")
                if role == "assistant":
                    said = turn is not None and (turn["content"] or "tool_calls" in turn)
                    assistant(fresh=bool(said))["content"] = text
                else:
                    turn = None
                    out.append({"role": role, "content": text})
            case "reasoning":
                parts = [*_get(item, "summary", list, [], f"{where}."), *_get(item, "content", list, [], f"{where}.")]
                said = turn is not None and (turn["content"] or "tool_calls" in turn)
                thought = assistant(fresh=bool(said))
                thought["reasoning_content"] = thought.get("reasoning_content", "") + _item_text(parts, where)
            case "function_call" | "custom_tool_call":
                name, id = (_required(item, key, str, where=f"{where}.") for key in ("name", "call_id"))
                key = "arguments" if kind == "function_call" else "input"
                arguments = _required(item, key, str, where=f"{where}.")
                if key == "input":
                    arguments = json.dumps({"input": arguments}, ensure_ascii=False)
                name = _in_namespace(_get(item, "namespace", str, where=f"{where}."), name)
                call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                assistant(fresh=False).setdefault("tool_calls", []).append(call)
            case "function_call_output" | "custom_tool_call_output":
                turn = None
                id = _required(item, "call_id", str, where=f"{where}.")
                output = _required(item, "output", (str, list), where=f"{where}.")
                result = _item_text(output, f"{where}.output")
                out.append({"role": "tool", "tool_call_id": id, "content": result})
            case _ if kind not in _SKIPPED_ITEMS:
                raise _wrong(f"{where}.type", kind, "a message, reasoning, a function call or its output")
    return out


_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def _item_text(content: str | list, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        _choice(_is(part, dict, f"{where}[{i}]"), "type", _TEXT_PARTS, where=f"{where}[{i}].")
        texts.append(_block_text(part, f"{where}[{i}]"))
    return "\n\n".join(texts)


# ---- what they share -------------------------------------------------------------------------------------------------
def _common(body: Json, stop: str | None = None) -> Json:
    """The fields that mean the same everywhere: model, stream, stop strings and sampling."""
    stops = _get(body, stop, (str, list), []) if stop else []
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP for s in stops):
        raise ApiError(f"{stop}: expected at most {MAX_STOPS} strings of 1 to {MAX_STOP} characters", param=stop)
    return {
        "model": _get(body, "model", str, ""),
        "stream": _get(body, "stream", bool, False),
        "stop": tuple(stops),
        "sampling": _sampling(body),
    }


_NUMBER = (int, float)
_BIAS = 100.0  # as with OpenAI: the largest logit_bias
# What `Sampling` does not bound itself: a number beyond float32 would only fail on the device.
_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
}


def _sampling(body: Json) -> Sampling:
    values = {key: _number(body.get(key), key, *bounds) for key, bounds in _RANGES.items() if body.get(key) is not None}
    if (top_k := _get(body, "top_k", int)) is not None:
        values["top_k"] = top_k
    bias = _get(body, "logit_bias", dict, {})
    for id in bias:
        if not (id.isascii() and id.isdecimal() and len(id) < 10):
            raise ApiError(f"logit_bias: found {id[:40]!r}, expected token ids", param="logit_bias")
    if bias:
        values["logit_bias"] = tuple((int(id), _number(v, "logit_bias", -_BIAS, _BIAS)) for id, v in bias.items())
    # Any integer is a seed to OpenAI; without one, answers differ.
    seed = _get(body, "seed", int)
    return Sampling(**values, seed=secrets.randbits(32) if seed is None else seed % 2**32)


def _number(value: Any, where: str, low: float, high: float) -> float:
    if not low <= _is(value, _NUMBER, where) <= high:
        raise _wrong(where, value, f"{low:g} to {high:g}")
    return float(value)


_EFFORTS = {"minimal": "on", "low": "on", "medium": "on", "high": "high", "xhigh": "high", "max": "max", "none": "off"}


def _think(switch: bool | None, effort: str | None, where: str) -> str:
    if effort is not None and effort not in _EFFORTS:
        raise _wrong(where, effort, ", ".join(_EFFORTS))
    return "off" if switch is False else _EFFORTS[effort or "low"]


def _tools_on(choice: str | Json | None) -> bool:
    if choice not in (None, "auto", "none"):
        raise _wrong("tool_choice", choice, "'auto' or 'none'")
    return choice != "none"


def _format(value: Json | None, where: str, nested: bool = False) -> Json | str | None:
    """What `Ask.schema` says. nested: the schema lies in an object "json_schema", as in Chat Completions."""
    kind = (
        "text" if value is None else _choice(value, "type", ("text", "json_object", "json_schema"), where=f"{where}.")
    )
    if kind != "json_schema":
        return None if kind == "text" else kind
    if nested:
        value, where = _required(value, "json_schema", dict, where=f"{where}."), f"{where}.json_schema"
    return _required(value, "schema", dict, where=f"{where}.")


def _include_usage(body: Json) -> bool:
    return _get(_get(body, "stream_options", dict, {}), "include_usage", bool, False, where="stream_options.")


def _limit(body: Json, key: str) -> int | None:
    limit = _get(body, key, int)
    if limit is not None and limit < 1:
        raise _wrong(key, limit, "at least 1")
    return limit


_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _is(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = "a number" if kinds == _NUMBER else " or ".join(_NAMES[k] for k in kinds)
        found = "nothing" if value is None else _NAMES[type(value)]
        raise ApiError(f"{where}: found {found}, expected {expected}", param=where)
    return value


def _get(body: Json, key: str, kind: type | tuple[type, ...], default: Any = None, where: str = "") -> Any:
    value = body.get(key)
    return default if value is None else _is(value, kind, where + key)


def _some(body: Json, key: str, kind: type | tuple[type, ...]) -> Any:
    """A field that must be there, and not empty."""
    if not (value := _required(body, key, kind)):
        raise _wrong(key, value, "at least one message")
    return value


def _required(body: Json, key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    return _is(body.get(key), kind, where + key)


def _choice(body: Json, key: str, choices: Sequence[str], where: str = "") -> str:
    value = _required(body, key, str, where)
    if value not in choices:
        raise _wrong(where + key, value, ", ".join(choices))
    return value


def _refuse(body: Json, **allowed: Sequence[Any]) -> None:
    """Refuses fields that mean more than is done here; absent, null and the values given are harmless."""
    for key, values in allowed.items():
        value = body.get(key)
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            expected = " or ".join(map(repr, values)) or "nothing: it is not supported"
            raise _wrong(key, value, expected)


def _wrong(where: str, found: Any, expected: str) -> ApiError:
    return ApiError(f"{where}: found {json.dumps(found, ensure_ascii=False):.80}, expected {expected}", param=where)
