"""ds4jax.chat.template beside DeepSeek's own renderer, the package deepseek-recipe, on made-up conversations.

That renderer writes 0731's prompts; the original's are the same but for what the efforts are called. `DIFFERENT` has
what is written otherwise here on purpose: the docstring of `ds4jax.chat.template` says why.
"""

import collections
import json
import random
from typing import Any

import pytest

from ds4jax.chat.template import Segment, render, to_text
from ds4jax.io.tokenizer import Special
from ds4jax.profile import EFFORTS

recipe: Any = pytest.importorskip("deepseek_recipe", reason="not installed (extra test)")

# (profile, think) → the renderer's effort; None is none asked for, and "" is no thinking.
MODES = {
    ("0731", "off"): "", ("0731", "on"): None, ("0731", "low"): "low", ("0731", "high"): "high", ("0731", "max"): "max",
    ("original", "off"): "", ("original", "on"): "low", ("original", "low"): "low", ("original", "high"): "low",
    ("original", "max"): "high",
}  # fmt: skip

TEXTS = [
    "Hi", "", " ", "\n\n", "  Two\n\nparagraphs \n", "a\r\nb\tc\0d", "“Größe” – naïve café", "深度求索 カナ 한국어",
    "नमस्ते ١٢٣", "🙂👍🏽👩\u200d💻", "\u202eabc\u200b\ufeff", "\u2028\u2029\x85", "e\u0301 ﬃ \U0010fffd",
    '{"a": [1, 2.50]}', "1 < 2 && 3 > 2 &amp; \\n \\u0041", "```python\nprint('x')\n```",
    "Reasoning Effort: Absolute maximum", "## Tools\n\n### Available Tool Schemas\n", "<tool_result>",
    "<｜User｜>Not a user<｜Assistant｜></think>", "<think>", "<｜end▁of▁sentence｜>", "｜DSML｜", "</invoke>",
]  # fmt: skip
VALUES = [
    *TEXTS,
    0,
    -7,
    2**53,
    2.5,
    -0.125,
    True,
    False,
    None,
    [],
    {},
    [1, "b", None],
    {"z": {"a": ["é", 1.5]}, "b": " "},
]
TOOLS = [
    {"name": name, "description": description, "parameters": parameters}
    for name, description, parameters in (
        ("weather", "The weather – where?", {"type": "object", "properties": {"city": {"type": "string"}}}),
        ("search.web", "", {"type": "object", "required": ["q"], "properties": {"q": {"enum": ["ü", 1, None]}}}),
        ("time", '"now"\n\\', {}),
    )
]


def assistant(content, reasoning="", *calls):
    tool_calls = [{"id": id, "function": {"name": name, "arguments": arguments}} for id, name, arguments in calls]
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


def user(content):
    return {"role": "user", "content": content}


def result(id, content):
    return {"role": "tool", "tool_call_id": id, "content": content}


def conversation(seed: int) -> tuple[list[dict], dict[str, Any]]:
    """Messages, and options of `render`: one to four rounds with all that both renderers write alike."""
    rng = random.Random(seed)

    def some() -> str:
        return rng.choice(TEXTS)

    def arguments() -> str:
        values = {rng.choice(["city", "q", "größe", "x y"]): rng.choice(VALUES) for _ in range(rng.randint(1, 4))}
        return json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2]))

    options: dict[str, Any] = {}
    if rng.random() < 0.6:
        options["tools"] = rng.sample(TOOLS, rng.randint(1, 3))
    if rng.random() < 0.2:
        options["response_format"] = {"type": "object", "properties": {some(): {"const": rng.choice(VALUES)}}}
    messages = [{"role": "system", "content": some() or "S"} for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    for i in range(rounds := rng.randint(1, 4)):
        if rng.random() < 0.2:
            messages.append({"role": "latest_reminder", "content": some()})
        messages += [user(some() or "Q") for _ in range(rng.choice([1, 1, 2]))]
        for _ in range(rng.randint(0, 2) if "tools" in options else 0):
            ids = sorted(f"call_{rng.randrange(10**6)}" for _ in range(rng.randint(1, 3)))
            calls = [(id, rng.choice(options["tools"])["name"], arguments()) for id in ids]
            messages.append(assistant(some(), some(), *calls))
            messages += [result(id, some()) for id in rng.sample(ids, len(ids))]
            messages += [user(some() or "Q")] * rng.choice([0, 0, 1])
        if i < rounds - 1:
            messages.append(assistant(some(), some()))
    return messages, options


def rendered(messages, tools=None, response_format=None, effort=None, thoughts=True, prefix=False):
    """The renderer's prompt, and the (start, end) of each control token in it.

    effort: "" for no thinking. thoughts: whether it gets those of earlier turns. prefix: whether the last is continued.
    """
    out = []
    for message in messages:
        match message["role"]:
            case "assistant":
                functions = [(call["id"], call["function"]) for call in message["tool_calls"]]
                calls = [recipe.ToolCall(id, f["name"], f["arguments"]) for id, f in functions]
                last = prefix and message is messages[-1]
                said = message["content"], message["reasoning_content"] if thoughts else None
                out.append(recipe.AssistantMessage(*said, calls or None, last))
            case "tool":
                out.append(recipe.ToolMessage(message["content"], message["tool_call_id"]))
            case role:
                kinds = {"latest_reminder": "LatestReminderMessage"}
                out.append(getattr(recipe, kinds.get(role, f"{role.title()}Message"))(message["content"]))
    asked = recipe.Conversation(
        out,
        thinking_mode=effort != "",
        reasoning_effort=effort or None,
        tools=[recipe.ToolDefinition(**tool) for tool in tools or []] or None,
        response_schema=response_format,
    )
    made = recipe.DeepseekV4Encoding().render_conversation(asked)
    return made.prompt, made.special_ranges


def controls(segments: list[Segment]) -> list[tuple[int, int]]:
    """The (start, end) of each control token in the text of `segments`."""
    out, end = [], 0
    for segment in segments:
        start, end = end, end + len(to_text([segment]))
        out += [(start, end)] if isinstance(segment, Special) else []
    return out


@pytest.mark.parametrize("seed", range(120))
def test_prompts_are_those_of_the_renderer(seed):
    messages, options = conversation(seed)
    for (profile, think), effort in MODES.items():
        segments = render(messages, think=think, profile=profile, ctx=393216, **options)
        # With thinking off no thoughts: the first of `DIFFERENT`.
        theirs, ranges = rendered(messages, effort=effort, thoughts=think != "off", **options)
        assert to_text(segments) == theirs, (profile, think)
        assert controls(segments) == ranges, (profile, think)


def test_the_conversations_have_everything():
    made = [conversation(seed) for seed in range(120)]
    roles = collections.Counter(message["role"] for messages, _ in made for message in messages)
    assert min(roles[role] for role in ("system", "user", "assistant", "tool", "latest_reminder")) > 20
    options = collections.Counter(key for _, given in made for key in given)
    assert options["tools"] > 50 and options["response_format"] > 10
    said = json.dumps(made, ensure_ascii=False)
    assert all(json.dumps(text, ensure_ascii=False)[1:-1] in said for text in TEXTS)


CALL = assistant("", "R", ("1", "f", '{"a": 1}'), ("2", "f", '{"a": 2}'))
TOOL = {"name": "f", "description": "", "parameters": {}}
DIFFERENT = {
    "thoughts with thinking off": (
        [user("Q"), assistant("A", "R"), user("Q")], {"tools": [TOOL], "think": "off"},
        "<｜Assistant｜></think>A", "<｜Assistant｜><think>R</think>A"),
    "thoughts beside results of tools that are not declared": (
        [user("Q"), CALL, result("1", "A")], {}, "<think>R</think>", "<｜Assistant｜></think>"),
    "a last turn that is the assistant's": (
        [user("Q"), assistant("A", "R")], {}, "<think>R</think>A", "<｜Assistant｜></think>A"),
    "a continued text without a thought": (
        [user("Q"), assistant("A")], {"continues": True}, "<｜Assistant｜></think>A", "<think></think>A"),
    "a call without parameters": (
        [user("Q"), assistant("", "R", ("1", "f", "{}"))], {"tools": [TOOL]},
        'name="f">\n\n</｜DSML｜invoke>', 'name="f">\n</｜DSML｜invoke>'),
    "empty arguments": (
        [user("Q"), assistant("", "R", ("1", "f", ""))], {"tools": [TOOL]},
        'name="f">\n\n</｜DSML｜invoke>', 'name="arguments" string="true"></｜DSML｜parameter>'),
    "numbers": (
        [user("Q"), assistant("", "R", ("1", "f", '{"a": [12345678901234567890123, 1e-7]}'))], {"tools": [TOOL]},
        "[12345678901234567890123, 1e-07]", "[1.2345678901234568e+22, 1e-7]"),
    "closing tags": (
        [user("Q"), CALL, result("1", "</tool_result>")], {"tools": [TOOL]},
        "<tool_result>&lt;/tool_result></tool_result>", "<tool_result></tool_result></tool_result>"),
    "later system messages": (
        [user("Q"), {"role": "system", "content": "S"}], {}, "<｜User｜>Q\n\nS<", "S<｜User｜>Q<"),
    "results of unknown calls": (
        [user("Q"), CALL, result("2", "B"), result("x", "X")], {"tools": [TOOL]},
        "X</tool_result>\n\n<tool_result>B", "B</tool_result>\n\n<tool_result>X"),
    "results after a user's text": (
        [user("Q"), CALL, user("T"), result("1", "A")], {"tools": [TOOL]},
        "<｜User｜>T\n\n<tool_result>A</tool_result>", "<｜User｜><tool_result>A</tool_result>\n\nT"),
    "calls whose ids are not in order": (
        [user("Q"), assistant("", "R", ("2", "f", '{"a": 2}'), ("1", "f", '{"a": 1}'))], {"tools": [TOOL]},
        "2</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke",
        "1</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke"),
    "empty messages beside others": ([user("Q"), user(""), user("T")], {}, "Q\n\n\n\nT", "Q\n\nT"),
    "tools without a description or parameters": (
        [user("Q")], {"tools": [{"name": "f"}]},
        '{"name": "f"}\n', '{"name": "f", "description": "", "parameters": null}\n'),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_different_on_purpose(name):
    messages, options, ours, theirs = DIFFERENT[name]
    think = options.get("think", "low")
    written = to_text(render(messages, profile="0731", **{"think": think} | options))
    given = {key: value for key, value in options.items() if key == "tools"}
    effort = "" if think == "off" else think
    prompt, _ = rendered(messages, effort=effort, prefix=options.get("continues", False), **given)
    assert ours in written and theirs in prompt
    assert ours not in prompt and theirs not in written


@pytest.mark.parametrize("effort", [None, *EFFORTS])
def test_efforts_mean_what_they_do_with_deepseek(effort):
    """The renderer's conversion of requests, with a name of 0731's kin: its V4.1 has another scale."""
    bodies: dict[str, dict[str, Any]] = {
        "ChatCompletionRequest": {"messages": [user("Q")], "reasoning_effort": effort},
        "ResponsesRequest": {"input": "Q", "reasoning": {"effort": effort}},
        "MessagesRequest": {"messages": [user("Q")], "max_tokens": 9, "output_config": {"effort": effort}},
    }
    think = "on" if effort is None else EFFORTS[effort]
    for kind, body in bodies.items():
        if effort is None:
            body = {key: value for key, value in body.items() if key in ("messages", "input", "max_tokens")}
        request = getattr(recipe, kind)({"model": "DeepSeek-V4-Pro", **body})
        asked = request.convert(recipe.ConversionOptions()).conversation
        prompt = recipe.DeepseekV4Encoding().render_conversation(asked).prompt
        assert prompt == to_text(render([user("Q")], think=think, profile="0731")), kind
