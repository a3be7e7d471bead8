"""Request bodies: what is wrong with one is named by its path, with what was found and what was expected."""

import json

import pytest

from ds4jax.engine.form import Pattern
from ds4jax.server.errors import ApiError
from ds4jax.server.schemas import chat, completions, messages, responses

HI = {"messages": [{"role": "user", "content": "Hi"}]}
BLOCKS = [{"type": "thinking", "thinking": "r"}, {"type": "tool_use", "id": "1", "name": "f", "input": "x"}]
PREFIX = {"role": "assistant", "content": "A", "prefix": True}
CALLS = [{"type": "text", "text": "A"}, {"type": "tool_use", "id": "1", "name": "f", "input": {}}]


SAID = {"type": "json_schema", "schema": {}}


def begun(content, **fields):
    """A body that ends in an assistant's message."""
    return {"messages": [*HI["messages"], {"role": "assistant", "content": content}]} | fields


S = {"type": "object"}
FORMS = [
    ({"guided_json": S}, S),
    ({"guided_json": '{"type": "object"}'}, S),
    ({"json_schema": S}, S),
    ({"structured_outputs": {"json": S}}, S),
    ({"structured_outputs": {"json_object": True}}, "json_object"),
    ({"guided_regex": "a+"}, Pattern("regex", "a+")),
    ({"structured_outputs": {"regex": "a+"}}, Pattern("regex", "a+")),
    ({"guided_choice": ["a", 'é"']}, Pattern("lark", 'start: "a" | "é\\""')),
    ({"structured_outputs": {"choice": ["a"]}}, Pattern("lark", 'start: "a"')),
    ({"guided_grammar": 'root ::= "a"'}, Pattern("grammar", 'root ::= "a"')),
    ({"structured_outputs": {"grammar": "g"}}, Pattern("grammar", "g")),
    ({"grammar": "g"}, Pattern("grammar", "g")),
    ({}, None),
]


@pytest.mark.parametrize(("fields", "form"), FORMS)
def test_forms(fields, form):
    assert chat.read(HI | fields).form == completions.read({"prompt": "x"} | fields).form == form


def test_json_object_with_a_schema():
    for format, form in (
        ({"type": "json_object", "schema": S}, S),
        ({"type": "json_object"}, "json_object"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": S}}, S),
        ({"type": "text"}, None),
    ):
        fields = {"response_format": format}
        assert chat.read(HI | fields).form == completions.read({"prompt": "x"} | fields).form == form


def test_unknown_settings_are_named_wherever_they_are():
    for api, body, ignored in (
        (chat, HI | {"reasoning": {"x": 1}, "user": "u", "y": {"z": 2}}, {"reasoning.x": 1, "y": {"z": 2}}),
        (chat, HI | {"chat_template_kwargs": {"x": None, "y": 0}}, {"chat_template_kwargs.y": 0}),
        (chat, HI | {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": S, "x": 1}}},
         {"response_format.json_schema.x": 1}),
        (completions, {"prompt": "a", "stream_options": {"x": 1, "include_usage": True, "include_obfuscation": True}},
         {"stream_options.x": 1}),
        (completions, {"prompt": "a", "structured_outputs": {"json": S, "x": 1}}, {"structured_outputs.x": 1}),
        (responses, {"input": "a", "text": {"verbosity": "low", "format": {"type": "text", "x": 1}}},
         {"text.format.x": 1}),
        (messages, HI | {"output_config": {"x": 1}, "thinking": {"type": "enabled", "y": 2}},
         {"output_config.x": 1, "thinking.y": 2}),
    ):  # fmt: skip
        assert api.read(body).ignored == ignored


@pytest.mark.parametrize(
    ("api", "body", "message"),
    [
        (chat, {}, "messages: found nothing, expected a value"),
        (chat, HI | {"max_tokens": None, "n": None, "unknown": 1}, None),
        (chat, {"messages": []}, "messages: found [], expected at least 1 item"),
        (chat, HI | {"temperature": "1"}, 'temperature: found "1", expected a number'),
        (chat, HI | {"temperature": True}, "temperature: found true, expected a number"),
        (chat, HI | {"top_p": 1.5}, "top_p: found 1.5, expected at most 1"),
        (chat, HI | {"max_tokens": 0}, "max_tokens: found 0, expected at least 1"),
        (chat, HI | {"n": 200}, "n: found 200, expected at most 128"),
        (chat, HI | {"audio": {}}, "audio: found {}, expected nothing: it is not supported"),
        (chat, HI | {"stop": 1}, "stop: found 1, expected a string or a list"),
        (chat, HI | {"stop": ["a", 1]}, "stop[1]: found 1, expected a string"),
        (chat, HI | {"thinking": {"type": "x"}},
         "thinking.type: found \"x\", expected 'enabled', 'disabled' or 'adaptive'"),
        (chat, HI | {"tool_choice": {"type": "function"}},
         "tool_choice.function: found nothing, expected a value"),
        (chat, HI | {"tool_choice": "any"},
         "tool_choice: found \"any\", expected 'auto', 'none' or 'required' or an object"),
        (chat, HI | {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
         "response_format.json_schema.schema: found 1, expected an object"),
        (chat, HI | {"logit_bias": {"1": 200}}, "logit_bias: found 200, expected a number from -100 to 100"),
        (chat, HI | {"guided_json": "{"},
         'guided_json: found "{", expected a JSON schema of at most 1000000 characters'),
        (chat, HI | {"guided_choice": []}, "guided_choice: found [], expected at least 1 item"),
        (chat, HI | {"response_format": {"type": "json_object"}, "guided_regex": "a"},
         "guided_regex: found beside response_format, expected one of them"),
        (completions, {"prompt": "x", "grammar": "g", "structured_outputs": {"choice": ["a"]}},
         "structured_outputs.choice: found beside grammar, expected one of them"),
        (completions, {"prompt": "x", "response_format": {"type": "json_object"}, "guided_choice": ["a"]},
         "guided_choice: found beside response_format, expected one of them"),
        (chat, HI | {"top_logprobs": 2}, "top_logprobs: found 2, expected logprobs: true beside it"),
        (chat, HI | {"include_reasoning": True, "reasoning": {"exclude": True}},
         "reasoning.exclude: found true, expected false, as include_reasoning is true"),
        (messages, HI | {"thinking": {"type": "enabled"}, "output_config": {"effort": "none"}},
         'output_config.effort: found "none", expected an effort: the model is to think, as thinking says'),
        (responses, {"input": [{"type": "compaction"}]},
         'input: found [{"type": "compaction"}], expected a message, a call or its output'),
        (completions, {"prompt": [["a"]]}, 'prompt[0][0]: found "a", expected an integer'),
        (completions, {"prompt": [1, 2.5]}, "prompt[0]: found 1, expected a string or a list"),
        (completions, {"prompt": 5}, "prompt: found 5, expected a list"),
        (completions, {"prompt": []}, "prompt: found [], expected at least 1 item"),
        (completions, {"prompt": ["a"] * 100, "n": 100},
         "n: found 100 prompts, 100 answers each, expected 1024 answers at most"),
        (messages, {"messages": [{"role": "x", "content": ""}]},
         "messages[0].role: found \"x\", expected 'user', 'assistant', 'system'"),
        (messages, {"messages": [{"role": "assistant", "content": BLOCKS}]},
         'messages[0].content[1].input: found "x", expected an object'),
        (messages, {"messages": [{"role": "user", "content": [{}]}]},
         "messages[0].content[0].type: found nothing, expected a value"),
        (messages, HI | {"output_config": {"effort": 1}},
         "output_config.effort: found 1, "
         "expected 'none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max' or 'ultra'"),
        (messages, HI | {"output_format": SAID, "output_config": {"format": SAID | {"schema": {"type": "null"}}}},
         f"output_format: found {json.dumps(SAID)}, expected what output_config.format says, or nothing"),
        (chat, {"messages": [PREFIX, *HI["messages"]]},
         "messages[0].prefix: found true, expected it on the last message only, if that is the assistant's"),
        (chat, {"messages": [HI["messages"][0] | {"prefix": True}]},
         "messages[0].prefix: found true, expected it on the last message only, if that is the assistant's"),
        (chat, {"messages": [PREFIX | {"prefix": 1}]}, "messages[0].prefix: found 1, expected true or false"),
        (chat, HI | {"continue_final_message": True},
         "continue_final_message: found true, expected false: the last message is not the assistant's"),
        (chat, begun("A", continue_final_message=True, add_generation_prompt=True),
         "add_generation_prompt: found true, expected false: the last message is continued"),
        (chat, {"messages": [PREFIX], "add_generation_prompt": True},
         "add_generation_prompt: found true, expected false: the last message is continued"),
        (chat, begun("A", add_generation_prompt=False),
         "add_generation_prompt: found false, expected true, or continue_final_message"),
        (chat, HI | {"add_generation_prompt": "x"}, 'add_generation_prompt: found "x", expected true or false'),
        (messages, begun("A "),
         'messages[1].content: found "A ", expected no white space at the end of a message that is continued'),
        (messages, begun([{"type": "text", "text": "A"}, {"type": "text", "text": "\n"}]),
         'messages[1].content: found "A\\n\\n\\n", expected no white space at the end of a message that is continued'),
        (messages, begun(CALLS),
         'messages[1].content[1].type: found "tool_use", expected no calls in a message that is continued'),
        (messages, begun(BLOCKS[:1], thinking={"type": "disabled"}),
         'messages[1].content[0].type: found "thinking", expected no thought to go on from, with thinking off'),
        (responses, {"input": ""}, "input: found [], expected at least 1 item"),
        (responses, {"input": "Hi", "previous_response_id": "r"},
         "previous_response_id: found 'r', expected that of a response that is stored"),
        (responses, {"input": [{"type": "item_reference", "id": "x"}]},
         "input[0].id: found 'x', expected the id of an item that is stored"),
        (responses, {"input": [{"type": "function_call", "call_id": "1", "name": "f"}]},
         "input[0].arguments: found nothing, expected a value"),
        (responses, {"input": "Hi", "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]},
         "tools[0].tools[0].name: found nothing, expected a value"),
    ],
)  # fmt: skip
def test_errors(api, body, message):
    if message is None:
        api.read(body)
        return
    with pytest.raises(ApiError) as error:
        api.read(body)
    assert str(error.value) == message
    assert error.value.param == message.partition(": ")[0] and error.value.status == 400


def test_a_long_list_of_wrong_values_is_one_error():
    with pytest.raises(ApiError, match=r"^messages\[0\]: found 1, expected an object$"):
        messages.read({"messages": [1] * 1_000_000})


@pytest.mark.parametrize(
    ("fields", "think"),
    [
        ({}, ""),
        ({"enable_thinking": False}, "off"),
        ({"chat_template_kwargs": {"thinking": False}}, "off"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": True}, "on"),
        ({"reasoning": {"enabled": False}}, "off"),
        ({"reasoning": {"effort": "max"}}, "max"),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "medium"}, "high"),
        ({"reasoning": {"effort": "none"}, "thinking": {"type": "disabled"}}, "off"),
        ({"reasoning_effort": "high", "reasoning": {"effort": "high", "enabled": True}}, "high"),
        ({"thinking": True, "enable_thinking": False},
         "enable_thinking: found false, expected true, which thinking says"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}},
         'reasoning.effort: found "high", expected "low", which reasoning_effort says'),
        ({"chat_template_kwargs": {"reasoning_effort": "max", "thinking": True}}, "max"),
        ({"think": True, "reasoning_effort": "none"},
         'reasoning_effort: found "none", expected an effort: the model is to think, as think says'),
        ({"reasoning": {"effort": "high", "enabled": False}},
         'reasoning.effort: found "high", expected "none": the model is not to think, as reasoning.enabled says'),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}, "thinking": {"type": "disabled"}},
         'chat_template_kwargs.reasoning_effort: found "low", expected "none": the model is not to think, '
         "as thinking says"),
    ],
)  # fmt: skip
def test_every_spelling_of_the_thinking_switch(fields, think):
    if ": " in think:
        for read, body in ((chat.read, HI), (responses.read, {"input": "Hi"})):
            with pytest.raises(ApiError) as error:
                read(body | fields)
            assert str(error.value) == think and error.value.param == think.partition(": ")[0]
    else:
        assert chat.read(HI | fields).think == responses.read({"input": "Hi"} | fields).think == think


def test_when_the_last_message_is_continued():
    for body, continues in (
        (HI, False),
        (begun("A"), False),
        (begun("A", add_generation_prompt=True, continue_final_message=False), False),
        (begun("A", continue_final_message=True), True),
        (begun("A", continue_final_message=True, add_generation_prompt=False), True),
        ({"messages": [PREFIX]}, True),
        ({"messages": [PREFIX], "add_generation_prompt": False}, True),
        ({"messages": [PREFIX | {"prefix": False}]}, False),
        ({"messages": [PREFIX | {"prefix": None}]}, False),
        (HI | {"add_generation_prompt": True}, False),
        ({"messages": [*HI["messages"], "x"], "continue_final_message": True}, False),
    ):
        assert chat.read(body).continues == continues, body
    assert not messages.read(HI).continues and messages.read(begun("A")).continues
    assert messages.read(begun("")).continues  # nothing to go on from: a turn from its beginning
    assert not messages.read({"messages": [*begun("A ")["messages"], *HI["messages"]]}).continues
    for content in ([{"type": "redacted_thinking"}], [BLOCKS[0], {"type": "text", "text": "A"}]):
        assert messages.read(begun(content)).continues


def test_values_that_mean_none_or_the_likeliest():
    asked = chat.read(HI | {"top_k": -1, "top_p": 0, "max_tokens": -1, "ignore_eos": True})
    assert (asked.sampling.top_k, asked.sampling.temperature, asked.max_tokens) == (0, 0.0, None)
    assert asked.sampling.min_tokens == 2**31 - 1 and chat.read(HI | {"min_tokens": 3}).sampling.min_tokens == 3
    assert completions.read({"prompt": "a", "max_tokens": -1}).max_tokens is None
    assert chat.read(HI | {"max_tokens": 5, "max_completion_tokens": -1}).max_tokens == 5
