"""The protocols, with scripted answers: as the official SDKs see them, and byte by byte where they do not look."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fake_engine import CALL, TOKENIZER, FakeEngine, ids, serving, wait_until_idle

from ds4jax.chat import calls
from ds4jax.chat.calls import Calling
from ds4jax.engine.form import Begin, Either, Pattern
from ds4jax.engine.types import Budget, EngineFailed, Overloaded, Stopping, TooMany
from ds4jax.server.access import LOOPBACK, Keys
from ds4jax.server.app import Options
from ds4jax.server.connections import Limits, most_connections

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
KEYS = Keys.of([("someone", "k")])
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


@contextlib.contextmanager
def clients(script: Any, options: Options | None = None, **engine) -> Iterator[tuple]:
    """(OpenAI client, Anthropic client, httpx client, fake engine) of a server that answers as `script` says."""
    answer: Any = script if callable(script) else lambda _: script
    engine = FakeEngine(answer, **engine)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(engine, options))
        o = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=10))
        a = stack.enter_context(anthropic.Anthropic(base_url=url, api_key="k", max_retries=0, timeout=10))
        yield o, a, stack.enter_context(httpx.Client(base_url=url, timeout=10)), engine


def prompt(engine: FakeEngine, n: int = -1) -> str:
    return TOKENIZER.decode(engine.requests[n].tokens)


def sse(text: str) -> list[tuple[Any, Any]]:
    """(event name, data) of a body of server-sent events; comments as ("", text)."""
    out = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        if "" in lines:
            out.append(("", lines[""]))
        else:
            data = lines["data"]
            out.append((lines.get("event"), data if data == "[DONE]" else json.loads(data)))
    return out


# ---- Chat Completions ------------------------------------------------------------------------------------------------
def test_chat_plain():
    with clients("I think.</think>Hello, world!", cached=3) as (o, _, _, engine):
        done = o.chat.completions.create(model="m", messages=HI)
        assert done.choices[0].message.content == "Hello, world!"
        assert done.choices[0].message.reasoning_content == "I think."
        assert done.choices[0].finish_reason == "stop" and done.model == "m" and done.choices[0].logprobs is None
        usage, n = done.usage, len(ids("I think.</think>Hello, world!")) + 1
        assert usage.prompt_tokens == len(engine.requests[0].tokens) and usage.prompt_tokens_details.cached_tokens == 3
        assert usage.completion_tokens == n and usage.total_tokens == usage.prompt_tokens + n
        assert usage.completion_tokens_details.reasoning_tokens == len(ids("I think.</think>"))
        timings = done.model_extra["timings"]
        assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (3, usage.prompt_tokens - 3, n)
        assert done.system_fingerprint.startswith("ds4jax-")
        assert prompt(engine) == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>"


def test_chat_streamed():
    with clients("I think.</think>Hello!") as (o, _, _, _):
        with o.chat.completions.stream(model="m", messages=HI, stream_options={"include_usage": True}) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert kinds[0] == "chunk" and "content.delta" in kinds and kinds.index("content.done") > kinds.index("chunk")
        assert final.choices[0].message.content == "Hello!" and final.usage.completion_tokens > 0
        chunks = list(o.chat.completions.create(model="m", messages=HI, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.model_extra.get("reasoning_content", "") for c in chunks) == "I think."
        said = [c.choices[0].delta.model_extra for c in chunks]
        assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in said)
        assert chunks[-1].choices[0].finish_reason == "stop"  # no usage unless asked for
        assert [chunk.model_extra.get("timings") for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].model_extra["timings"]["predicted_n"] == final.usage.completion_tokens
        silent = o.chat.completions.create(model="m", messages=HI, extra_body={"include_reasoning": False})
        assert silent.choices[0].message.content == "Hello!" and not silent.choices[0].message.model_extra


def test_timings_measure_the_prompt_and_the_answer():
    with clients("word " * 10, chunks=2, delay=0.05) as (o, _, _, _):
        done = o.chat.completions.create(model="m", messages=HI, max_tokens=5, reasoning_effort="none")
        timings = done.model_extra["timings"]
        # Two chunks of the prompt, then a token each 0.05 s.
        assert 80 < timings["prompt_ms"] < 1000 and 160 < timings["predicted_ms"] < 2000
        assert timings["prompt_per_second"] == pytest.approx(1e3 * timings["prompt_n"] / timings["prompt_ms"])
        assert timings["predicted_per_second"] == pytest.approx(1e3 * 4 / timings["predicted_ms"])


@pytest.mark.parametrize("streamed", [False, True])
def test_chat_two_tool_rounds(streamed):
    """The calls come back as they were sampled, although the client dropped the thoughts and rewrote the JSON."""
    answers = iter(
        [f"First.</think>Looking.\n\n{CALL}", f"Again.</think>{CALL.replace('Oslo', '2>&1')}", "Ok.</think>Done."]
    )
    with clients(lambda _: next(answers)) as (o, _, _, engine):
        messages = list(HI)
        for city in ("Oslo", "2>&1"):
            kwargs = {"model": "m", "messages": messages, "tools": [WEATHER]}
            if streamed:
                with o.chat.completions.stream(**kwargs) as stream:
                    choice = stream.get_final_completion().choices[0]
            else:
                choice = o.chat.completions.create(**kwargs).choices[0]
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": city}
            said = {"role": "assistant", "content": choice.message.content}
            spaced = {"name": "weather", "arguments": json.dumps({"city": city}, indent=1)}
            said["tool_calls"] = [{"id": call.id, "type": "function", "function": spaced}]
            messages += [said, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        done = o.chat.completions.create(model="m", messages=messages, tools=[WEATHER])
        assert done.choices[0].message.content == "Done."
        assert f"<think>First.</think>Looking.\n\n{CALL}<｜end▁of▁sentence｜>" in prompt(engine)
        sampled = [*engine.requests[0].tokens, *ids(f"First.</think>Looking.\n\n{CALL}")]
        assert engine.requests[1].tokens[: len(sampled)] == sampled


def test_a_malformed_call_is_never_whole():
    broken = CALL.replace("</｜DSML｜invoke>", "")
    with clients(lambda _: f"</think>{broken}") as (o, _, http, _):
        body = {"messages": HI, "tools": [WEATHER], "stream": True}
        events = sse(http.post("/v1/chat/completions", json=body).text)
        deltas = [data["choices"][0]["delta"] for _, data in events[:-1]]
        calls = [d["tool_calls"][0]["function"]["arguments"] for d in deltas if "tool_calls" in d]
        with pytest.raises(json.JSONDecodeError):
            json.loads("".join(calls))
        assert "".join(d.get("content", "") for d in deltas) == broken  # as text
        assert events[-2][1]["choices"][0]["finish_reason"] == "stop"
        whole = o.chat.completions.create(model="m", messages=HI, tools=[WEATHER])
        assert whole.choices[0].message.tool_calls is None and whole.choices[0].message.content == broken


def test_a_turn_that_ends_inside_a_call_is_an_error():
    half = CALL[: CALL.index("Oslo") + 2]
    with clients(f"</think>{half}") as (o, a, _, _):
        with pytest.raises(openai.InternalServerError):
            o.chat.completions.create(model="m", messages=HI, tools=[WEATHER])
        with pytest.raises(openai.APIError, match="inside a tool call"):
            list(o.chat.completions.create(model="m", messages=HI, tools=[WEATHER], stream=True))
        tool = {"name": "weather", "input_schema": {"type": "object"}}
        with pytest.raises(anthropic.APIStatusError, match="inside a tool call"):
            list(a.messages.create(model="m", max_tokens=99, messages=HI, tools=[tool], stream=True))
        cut = o.chat.completions.create(model="m", messages=HI, tools=[WEATHER], max_tokens=len(ids(f"</think>{half}")))
        assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.tool_calls is None


def test_chat_options_reach_the_engine():
    with clients("ZQXJ") as (o, _, http, engine):
        done = o.chat.completions.create(
            model="m", messages=HI, reasoning_effort="none", temperature=0.25, top_p=0.5, seed=-1, max_tokens=3,
            stop=["STOP"], logprobs=True, top_logprobs=2,
        )  # fmt: skip
        request = engine.requests[0]
        assert prompt(engine).endswith("<｜Assistant｜></think>") and request.max_tokens == 3 and request.logprobs == 2
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.25, 0.5, 2**32 - 1)
        assert done.choices[0].finish_reason == "length"
        content = done.choices[0].logprobs.content
        assert b"".join(bytes(t.bytes) for t in content) == done.choices[0].message.content.encode() == b"ZQX"
        assert [top.token for top in content[0].top_logprobs] == ["Z", "A"]
        streamed = o.chat.completions.create(
            model="m", messages=HI, reasoning_effort="none", logprobs=True, top_logprobs=0, stream=True
        )
        tokens = [t.token for chunk in streamed for t in chunk.choices[0].logprobs.content]
        assert "".join(tokens) == "ZQXJ"
        asked: Any = {"model": "m", "input": "Hi", "reasoning": {"effort": "none"}, "top_logprobs": 2}
        with o.responses.stream(**asked, include=["message.output_text.logprobs"]) as stream:
            events = list(stream)
        part = events[-1].response.output[0].content[0]
        assert "".join(item.token for item in part.logprobs) == part.text == "ZQXJ"
        assert [top.token for top in part.logprobs[0].top_logprobs] == ["Z", "A"]
        deltas = [
            item.token for event in events if event.type == "response.output_text.delta" for item in event.logprobs
        ]
        assert "".join(deltas) == "ZQXJ" and engine.requests[-1].logprobs == 2
        (whole,) = o.responses.create(**asked).output[0].content
        assert len(whole.logprobs) == 4 and len(events[-1].response.output) == 1
        for body, header in (
            ({"thinking": False}, "</think>"),
            ({"thinking": {"type": "disabled"}}, "</think>"),
            ({"think": True, "model": "deepseek-chat"}, "<think>"),
            ({"model": "deepseek-chat"}, "</think>"),
            ({"model": "deepseek-reasoner"}, "<think>"),
            ({"thinking": {"type": "enabled"}, "unknown": [1]}, "<think>"),
        ):
            assert http.post("/v1/chat/completions", json={"messages": HI, **body}).status_code == 200
            assert prompt(engine).endswith(header)
        http.post("/v1/chat/completions", json={"messages": HI, "tools": [WEATHER], "tool_choice": "none"})
        assert "weather" not in prompt(engine)


def test_json_formats():
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    end = Begin((TOKENIZER.special("think_close"),))
    with clients("t</think>{}") as (o, a, http, engine):
        named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        o.chat.completions.create(model="m", messages=HI, response_format=named)
        assert engine.requests[-1].grammar == (schema, end) and json.dumps(schema) in prompt(engine)
        o.chat.completions.create(
            model="m", messages=HI, response_format={"type": "json_object"}, reasoning_effort="none"
        )
        assert engine.requests[-1].grammar == ("json_object", Begin()) and "Response Format" not in prompt(engine)
        flat = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
        o.responses.create(model="m", input="Hi", text=flat)
        assert engine.requests[-1].grammar == (schema, end)
        for old_or_new in ({"output_config": flat}, {"output_format": flat["format"]}):
            a.messages.create(model="m", max_tokens=9, messages=HI, extra_body=old_or_new)
            assert engine.requests[-1].grammar == (schema, end)
        raw = {"prompt": "x", "guided_regex": "a+"}
        assert http.post("/v1/completions", json=raw).status_code == 200
        assert engine.requests[-1].grammar == (Pattern("regex", "a+"), Begin())  # a raw prompt has no thoughts
        body = {"messages": HI, "tools": [WEATHER], "response_format": named}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        block = calls.grammar(TOKENIZER, [WEATHER], Calling(), begun=False)
        assert engine.requests[-1].grammar == (Either(schema, block), end)


TIME = {"name": "time", "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}}}


@pytest.mark.parametrize(
    ("path", "fields", "calling"),
    [
        ("chat/completions", {"tool_choice": "required"}, Calling(required=True)),
        ("chat/completions", {"tool_choice": "required", "parallel_tool_calls": False},
         Calling(required=True, single=True)),
        ("chat/completions", {"tool_choice": {"type": "function", "function": {"name": "time"}}},
         Calling(required=True, single=True, only=frozenset({"time"}))),
        ("chat/completions", {"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]}}},
         Calling(only=frozenset({"time"}))),
        ("chat/completions", {"parallel_tool_calls": False}, Calling(single=True)),
        ("chat/completions", {"strict": True}, Calling(strict=frozenset({"time"}))),
        ("responses", {"tool_choice": "required"}, Calling(required=True)),
        ("responses", {"tool_choice": {"type": "function", "name": "time"}},
         Calling(required=True, single=True, only=frozenset({"time"}))),
        ("responses", {"tool_choice": {"type": "allowed_tools", "mode": "required",
                                       "tools": [{"type": "function", "name": "time"}]}},
         Calling(required=True, only=frozenset({"time"}))),
        ("responses", {"strict": True, "parallel_tool_calls": False},
         Calling(single=True, strict=frozenset({"time"}))),
        ("messages", {"tool_choice": {"type": "any"}}, Calling(required=True)),
        ("messages", {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
         Calling(required=True, single=True)),
        ("messages", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, Calling(single=True)),
        ("messages", {"tool_choice": {"type": "tool", "name": "time"}},
         Calling(required=True, single=True, only=frozenset({"time"}))),
        ("messages", {"strict": True}, Calling(strict=frozenset({"time"}))),
    ],
)  # fmt: skip
def test_which_calls_are_asked_for(path, fields, calling):
    """Each becomes a grammar: of the whole answer, or from the sampled mark on where a call is the model's choice."""
    functions = [TIME | ({"strict": True} if fields.get("strict") else {}), {"name": "other"}]
    fields = {key: value for key, value in fields.items() if key != "strict"}
    match path:
        case "chat/completions":
            tools = [{"type": "function", "function": function} for function in functions]
            fields |= {"messages": HI}
        case "responses":
            tools = [{"type": "function", **function} for function in functions]
            fields |= {"input": "Hi"}
        case _:
            names = {"name": "name", "parameters": "input_schema", "strict": "strict"}
            tools = [{names[key]: value for key, value in function.items()} for function in functions]
            fields |= {"messages": HI, "max_tokens": 9}
    with clients("t</think>Hi") as (_, _, http, engine):
        assert http.post(f"/v1/{path}", json=fields | {"tools": tools}).status_code == 200
        end, mark = TOKENIZER.special("think_close"), TOKENIZER.special("dsml")
        begin = Begin((end,)) if calling.required else Begin((end, mark), must=False)
        block = calls.grammar(TOKENIZER, tools, calling, begun=not calling.required)
        assert engine.requests[-1].grammar == (block, begin)


def test_tool_choices_that_cannot_be():
    with clients("t</think>Hi") as (_, _, http, _):
        for fields, found in [
            ({"tool_choice": "required"}, "tool_choice: found that a call is required, expected it only with tools"),
            ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
             "tool_choice: found 'x', expected the name of one of the tools"),
            ({"tools": [WEATHER], "function_call": "auto"},
             'function_call: found "auto", expected nothing: it is not supported'),
        ]:  # fmt: skip
            answer = http.post("/v1/chat/completions", json={"messages": HI} | fields)
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, found)


def test_budgets_of_thoughts_and_tokens_that_end_an_answer():
    close = TOKENIZER.special("think_close")
    for path, fields in [
        ("messages", {"messages": HI, "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 5}}),
        ("chat/completions", {"messages": HI, "thinking": {"type": "enabled", "budget_tokens": 5}}),
        ("chat/completions", {"messages": HI, "reasoning": {"max_tokens": 5}}),
        ("chat/completions", {"messages": HI, "thinking_token_budget": 5, "thinking_budget_tokens": 5}),
    ]:
        with clients("t</think>Hi") as (_, _, http, engine):
            assert http.post(f"/v1/{path}", json=fields).status_code == 200
            assert engine.requests[-1].budget == Budget(5, close)
            off = fields | {"thinking": {"type": "disabled", "budget_tokens": 5}}
            assert http.post(f"/v1/{path}", json=off).status_code == 200 and engine.requests[-1].budget is None
    with clients("t</think>Hi!") as (_, _, http, engine):
        stop = TOKENIZER.encode_text("!")
        body = {"messages": HI, "stop_token_ids": stop}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == "Hi" and answer["choices"][0]["finish_reason"] == "stop"
        assert engine.requests[-1].stop_ids == {TOKENIZER.eos_id, *stop}
        answer = http.post("/v1/chat/completions", json={"messages": HI, "stop_token_ids": [10**9]})
        assert answer.status_code == 400 and "stop_token_ids: found token id 1000000000" in answer.text


def test_fields_that_nobody_knows(caplog):
    body = {"messages": HI, "user": "me", "reasoning": {"mirostat": 2}, "dry_multiplier": 0.5}
    with clients("t</think>Hi") as (_, _, http, _):
        for stream in (False, True):
            answer = http.post("/v1/chat/completions", json=body | {"stream": stream})
            assert (
                answer.headers["warning"] == '199 ds4jax "not known, and ignored: dry_multiplier, reasoning.mirostat"'
            )
        assert "dry_multiplier" in caplog.text
        assert "warning" not in http.post("/v1/chat/completions", json={"messages": HI, "user": "me"}).headers
    with clients("t</think>Hi", Options(strict=True)) as (_, _, http, _):
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and "dry_multiplier: found 0.5, expected nothing" in answer.text
        assert http.post("/v1/chat/completions", json={"messages": HI, "user": "me"}).status_code == 200


@pytest.mark.parametrize(
    ("default", "thinks"),
    [("on", (True, True, True)), ("off", (False, False, False)), ("asked", (True, False, True))],
)
def test_who_thinks_where_nobody_says(default, thinks):
    with clients("t</think>Hi", Options(think_default=default)) as (_, _, http, engine):
        silent = ("chat/completions", {"messages": HI}), ("messages", {"messages": HI, "max_tokens": 9}), (
            "responses", {"input": "Hi"})  # fmt: skip
        for (path, body), expected in zip(silent, thinks, strict=True):
            assert http.post(f"/v1/{path}", json=body).status_code == 200
            assert prompt(engine).endswith("<think>" if expected else "</think>")
        asked = {"messages": HI, "max_tokens": 9, "thinking": {"type": "adaptive"}}
        assert http.post("/v1/messages", json=asked).status_code == 200 and prompt(engine).endswith("<think>")
        rendered = http.post("/apply-template", json={"messages": HI}).json()["prompt"]
        assert rendered.endswith("<think>" if thinks[0] else "</think>")
        thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "So", "signature": ""}]}
        answer = http.post("/v1/messages", json={"messages": [*HI, thought], "max_tokens": 9})
        assert answer.status_code == (200 if thinks[1] else 400)
        assert thinks[1] or answer.json()["error"]["message"].startswith("messages[1].content[0].type: found")


@pytest.mark.parametrize("profile", ["original", "0731"])
def test_efforts_of_both_releases(profile):
    """In all three APIs. The context is small: the first release's highest effort needs 384 K tokens."""
    highest, high = ("", "") if profile == "original" else ("Beyond maximum", "Absolute maximum")
    openings = dict.fromkeys(("medium", "high", "xhigh", None), high) | {"max": highest, "ultra": highest}
    with clients("t</think>Hi", profile=profile) as (_, _, http, engine):
        for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra", None):
            opening = openings.get(effort, "")
            instruction = f"Reasoning Effort: {opening}" if opening else "<｜User｜>"
            for path, body in (
                ("chat/completions", {"messages": HI, "reasoning_effort": effort}),
                ("responses", {"input": "Hi", "reasoning": {"effort": effort}}),
                ("messages", {"messages": HI, "max_tokens": 9, "output_config": {"effort": effort}}),
            ):
                assert http.post(f"/v1/{path}", json=body).status_code == 200
                assert prompt(engine).startswith(f"<｜begin▁of▁sentence｜>{instruction}"), (path, effort)
                assert prompt(engine).endswith("</think>" if effort == "none" else "<think>")
        nothing = http.post("/apply-template", json={"messages": HI}).json()
        switch = http.post("/apply-template", json={"messages": HI, "thinking": {"type": "enabled"}}).json()
        assert nothing == switch == {"prompt": prompt(engine)}  # a switch is no effort
        assert http.get("/props").json()["profile"] == profile


def test_stop_strings():
    with clients("No stop here</think>One STOP two") as (o, a, _, engine):
        done = o.chat.completions.create(model="m", messages=HI, stop="STOP")
        assert done.choices[0].message.content == "One " and done.choices[0].finish_reason == "stop"
        said = a.messages.create(model="m", max_tokens=99, messages=HI, stop_sequences=["two", "STOP"])
        assert (said.stop_reason, said.stop_sequence, said.content[-1].text) == ("stop_sequence", "STOP", "One ")
        assert not engine.running  # the rest is not computed


# ---- the beginning of an answer, given by the client -----------------------------------------------------------------
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("begun", "fields", "said", "end", "thought", "text"),
    [
        # Text without a thought: the answer has begun, also where thinking is on.
        ({"content": "The sky"}, {}, " is blue.", "></think>The sky", "", " is blue."),
        ({"content": "```\n"}, {"reasoning_effort": "none", "stop": "```"}, "x\n```", "></think>```\n", "", "x\n"),
        ({"content": "A", "reasoning_content": "R"}, {}, "B", "><think>R</think>A", "", "B"),
        ({"content": "", "reasoning_content": "R"}, {}, "S</think>B", "><think>R", "S", "B"),
        ({"content": ""}, {}, "S</think>B", "><think>", "S", "B"),
    ],
)
def test_chat_goes_on_with_the_last_message(begun, fields, said, end, thought, text, streamed):
    with clients(said) as (_, _, http, engine):
        last = {"role": "assistant", **begun}
        for body in (
            {"messages": [*HI, last | {"prefix": True}]},
            {"messages": [*HI, last], "continue_final_message": True, "add_generation_prompt": False},
        ):
            answer = http.post("/v1/chat/completions", json=body | fields | {"stream": streamed})
            parts = [answer.json()] if not streamed else [data for _, data in sse(answer.text)[:-1]]
            shown = [part["choices"][0].get("message") or part["choices"][0]["delta"] for part in parts]
            assert "".join(part.get("content") or "" for part in shown) == text
            assert "".join(part.get("reasoning_content") or "" for part in shown) == thought
            assert prompt(engine) == f"<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜{end}"
            told = http.post("/tokenize", json=body | fields).json()
            assert told["tokens"] == list(engine.requests[-1].tokens)
            assert http.post("/apply-template", json=body | fields).json()["prompt"] == prompt(engine)
        # Without a word of it the message is history.
        http.post("/v1/chat/completions", json={"messages": [*HI, last]})
        assert prompt(engine).endswith("<｜end▁of▁sentence｜><｜Assistant｜><think>")


def test_messages_go_on_with_the_last_message():
    thought = {"type": "thinking", "thinking": "R", "signature": "s"}
    with clients(lambda request: "S</think>B" if request.tokens[-1] == ord("R") else " B") as (_, a, _, engine):
        for content, end, blocks in (
            ("A", "></think>A", [" B"]),
            ([thought, {"type": "text", "text": "A"}], "><think>R</think>A", [" B"]),
            ([thought], "><think>R", ["S", "B"]),
        ):
            asked: Any = {"messages": [*HI, {"role": "assistant", "content": content}], "model": "m"}
            done = a.messages.create(max_tokens=99, **asked)
            with a.messages.stream(max_tokens=99, **asked) as stream:
                final = stream.get_final_message()
            for message in (done, final):
                said = [block.thinking if block.type == "thinking" else block.text for block in message.content]
                assert said == blocks and message.stop_reason == "end_turn"
            assert prompt(engine).endswith(f"Hi<｜Assistant｜{end}")
            assert a.messages.count_tokens(**asked).input_tokens == len(engine.requests[-1].tokens)


def test_what_cannot_be_gone_on_with_is_refused():
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    with clients("x") as (_, _, http, engine):
        for last, fields, param in (
            ({"content": "A", "tool_calls": [call]}, {}, "messages[1].tool_calls"),
            ({"content": "A", "reasoning_content": "R"}, {"think": False}, "messages[1].reasoning_content"),
            ({"content": 1}, {}, "messages[1].content"),
        ):
            body = {"messages": [*HI, {"role": "assistant", "prefix": True, **last}], **fields}
            for path in ("/v1/chat/completions", "/tokenize"):
                response = http.post(path, json=body)
                assert response.status_code == 400 and response.json()["error"]["param"] == param
        for path in ("/tokenize", "/apply-template"):
            response = http.post(path, json={"messages": HI, "add_generation_prompt": False})
            assert response.json()["error"]["param"] == "add_generation_prompt"
        response = http.post("/v1/messages", json={"messages": [*HI, {"role": "assistant", "content": "A "}]})
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
        assert not engine.requests


def test_a_format_waits_for_the_end_of_a_thought_that_is_open():
    end = TOKENIZER.special("think_close")
    with clients("{}") as (_, _, http, engine):
        for last, begin in (
            ({"content": "A"}, Begin()),
            ({"content": "A", "reasoning_content": "R"}, Begin()),
            ({"content": "", "reasoning_content": "R"}, Begin((end,))),
        ):
            messages = [*HI, {"role": "assistant", "prefix": True, **last}]
            body = {"messages": messages, "response_format": {"type": "json_object"}}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
            assert engine.requests[-1].grammar == ("json_object", begin)


def test_a_call_after_a_thought_that_was_continued_is_not_repeated_as_sampled():
    """The sampled tokens are only the end of its turn."""
    with clients(f"S</think>{CALL}") as (o, _, _, engine):
        begun = {"role": "assistant", "content": "", "reasoning_content": "R", "prefix": True}
        (call,) = (
            o.chat.completions.create(model="m", messages=[*HI, begun], tools=[WEATHER]).choices[0].message.tool_calls
        )
        whole = {"role": "assistant", "content": None, "reasoning_content": "RS", "tool_calls": [call.model_dump()]}
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        for said in (whole, whole | {"reasoning_content": None}):
            o.chat.completions.create(model="m", messages=[*HI, said, result], tools=[WEATHER])
            assert f"<think>{said['reasoning_content'] or ''}</think>\n\n{CALL}<｜end▁of▁sentence｜>" in prompt(engine)


# ---- Completions -----------------------------------------------------------------------------------------------------
def test_completions():
    with clients("b</think>c STOP") as (o, _, _, engine):
        done = o.completions.create(model="m", prompt="a", max_tokens=99, logprobs=1)
        assert done.choices[0].text == "b</think>c STOP" and prompt(engine) == "<｜begin▁of▁sentence｜>a"
        assert "".join(done.choices[0].logprobs.tokens) == "b</think>c STOP"
        offsets = done.choices[0].logprobs.text_offset
        assert offsets[:3] == [0, 1, 9] and len(offsets) == len(done.choices[0].logprobs.tokens)
        stream = o.completions.create(
            model="m", prompt=[TOKENIZER.bos_id, 97], stop=["STOP"], stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = stream
        assert (
            "".join(c.choices[0].text for c in chunks) == "b</think>c "
            and chunks[-1].choices[0].finish_reason == "stop"
        )
        assert last.usage.prompt_tokens == 2 and engine.requests[-1].max_tokens == 16


def test_several_prompts_with_several_answers_each():
    answers = iter("zero one two three".split())
    with clients(lambda _: next(answers)) as (o, _, http, engine):
        body = {"model": "m", "prompt": ["a", "bb"], "n": 2, "seed": 7, "max_tokens": 99}
        done = o.completions.create(**body)
        assert [(c.index, c.text) for c in done.choices] == list(enumerate("zero one two three".split()))
        assert [len(r.tokens) for r in engine.requests] == [2, 2, 3, 3]
        assert [r.sampling.seed for r in engine.requests] == [7, 8, 7, 8]
        assert done.usage.prompt_tokens == 5  # each prompt once
        assert done.usage.completion_tokens == sum(len(ids(c.text)) + 1 for c in done.choices)
        answers = iter("zero one two three".split())
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = o.completions.create(
            **body | {"prompt": [[TOKENIZER.bos_id, 97], [TOKENIZER.bos_id, 98, 98]]}, **options
        )
        for i, text in enumerate("zero one two three".split()):
            mine = [c.choices[0] for c in chunks if c.choices[0].index == i]
            assert "".join(c.text for c in mine) == text
            assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert last.usage == done.usage and not last.choices
        answers = iter(["</think>zero", "</think>one"])
        chat = o.chat.completions.create(model="m", messages=HI, n=2)
        assert [c.message.content for c in chat.choices] == ["zero", "one"]
        answers = iter(["</think>zero", "</think>one"])
        *chunks, last = sse(http.post("/v1/chat/completions", json={"messages": HI, "n": 2, "stream": True}).text)
        for i, text in enumerate(["zero", "one"]):
            mine = [data["choices"][0] for _, data in chunks if data["choices"][0]["index"] == i]
            assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "stop"
            assert "".join(c["delta"].get("content", "") for c in mine) == text
        assert (
            last[1] == "[DONE]" and chunks[-1][1]["timings"]["predicted_n"] == len(ids("</think>zero</think>one")) + 2
        )
        for wrong in ({"n": 129}, {"n": 0}, {"best_of": 2}, {"prompt": ["a"] * 1025}, {"prompt": [["a"]]}):
            assert http.post("/v1/completions", json={"prompt": "a"} | wrong).status_code == 400, wrong


def test_one_of_several_answers_fails():
    answers = iter(["x" * 100, Overloaded("too many")])
    with clients(lambda _: next(answers), delay=0.01) as (_, _, http, engine):
        assert http.post("/v1/completions", json={"prompt": ["a", "b"]}).status_code == 503
        wait_until_idle(engine)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_prompt_echoed_with_its_log_probabilities(streamed):
    """What lm-eval asks for: the text and its tokens, the prompt's and one more; characters of several tokens, too."""

    def ask(http, **fields):
        body = {"prompt": "aé€", "max_tokens": 2, "echo": True, "logprobs": 1} | fields
        if not streamed:
            return http.post("/v1/completions", json=body).json()["choices"][0]
        parts = [e["choices"][0] for _, e in sse(http.post("/v1/completions", json=body | {"stream": True}).text)[:-1]]
        logprobs = [p["logprobs"] for p in parts if p["logprobs"]]
        together = {key: [x for part in logprobs for x in part[key]] for key in logprobs[0]} if logprobs else None
        return parts[-1] | {"text": "".join(p["text"] for p in parts), "logprobs": together}

    with clients("ü…") as (_, _, http, engine):
        choice = ask(http)
        assert choice["text"] == "aé€ü" and choice["finish_reason"] == "length"
        tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert tokens == ["", "a", "", "é", "", "", "€", "", "ü"]  # BOS is none of the text
        assert offsets == [0, 0, 1, 1, 2, 2, 2, 3, 3]
        assert choice["logprobs"]["token_logprobs"] == [None] + [-1.5] * 6 + [-0.5] * 2
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][1] == {"a": -1.5, "B": -0.25}
        assert all(t in top for t, top in list(zip(tokens, choice["logprobs"]["top_logprobs"], strict=True))[1:])
        assert engine.requests[-1].prompt_logprobs == 1
        choice = ask(http, max_tokens=0, prompt=[TOKENIZER.bos_id, 97, 0xE2])
        assert choice["text"] == "a\ufffd" and choice["logprobs"]["tokens"] == ["", "a", "\ufffd"]
        assert ask(http, logprobs=None, echo=True)["logprobs"] is None
        assert engine.requests[-1].prompt_logprobs is None
        assert ask(http, echo=False, max_tokens=0)["text"] == ""
        assert ask(http, echo=False, logprobs=0)["logprobs"]["top_logprobs"] == [{"": -0.5}, {"ü": -0.5}]
        assert ask(http, prompt=[97], max_tokens=0)["logprobs"]["tokens"] == ["a"]


def test_the_end_of_an_answer_is_the_last_of_its_log_probabilities():
    """Evaluations count on a token of the answer behind those of the prompt, whichever it is."""
    with clients("") as (_, _, http, _):
        body = {"prompt": "a", "max_tokens": 1, "echo": True, "logprobs": 1}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        assert choice["logprobs"]["tokens"] == ["", "a", ""] and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("said", "stop", "shown"),
    [
        ("Hello STO…", ["STO…P"], "Hello STO…"),  # half a stop string, at the end
        ("Hello STOP there", ["STOP"], "Hello "),
        ("Hello  ", [], "Hello  "),  # space that is held back, in case calls follow
        (f"Hello\n\n{CALL}", [], "Hello"),
        ("Hello <｜DSML｜tool_", [], "Hello"),
        ("H</think>i", [], "Hi"),
    ],
)
def test_log_probabilities_spell_the_text(said, stop, shown, streamed):
    with clients(f"</think>{said}") as (_, _, http, _):
        body = {"messages": HI, "logprobs": True, "top_logprobs": 2, "stop": stop, "tools": [WEATHER]}
        answer = http.post("/v1/chat/completions", json=body | {"stream": streamed})
        parts = [answer.json()["choices"][0]] if not streamed else [e["choices"][0] for _, e in sse(answer.text)[:-1]]
        tokens = [t for p in parts for t in p["logprobs"]["content"]]
        spelled = bytes(byte for t in tokens for byte in t["bytes"]).decode().replace("</think>", "")
        assert spelled == "".join(p.get("delta", p.get("message")).get("content") or "" for p in parts) == shown
        assert all(t["token"] in [top["token"] for top in t["top_logprobs"]] for t in tokens)


# ---- Messages --------------------------------------------------------------------------------------------------------
ANTHROPIC_WEATHER = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}


def test_messages_plain():
    with clients("I think.</think>Hello!", cached=3) as (_, a, _, engine):
        system = [{"type": "text", "text": "x-anthropic-billing: 1"}, {"type": "text", "text": "Be brief."}]
        done = a.messages.create(model="m", max_tokens=99, system=system, messages=HI)
        thinking, text = done.content
        assert (thinking.thinking, text.text, done.stop_reason) == ("I think.", "Hello!", "end_turn")
        n = len(engine.requests[0].tokens)
        assert done.usage.input_tokens == n - 3 and done.usage.cache_read_input_tokens == 3
        assert prompt(engine).startswith("<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi")
        count = a.messages.count_tokens(model="m", system=system, messages=HI)
        assert count.input_tokens == n


def test_messages_streamed():
    with clients("I think.</think>Hello!") as (_, a, http, _):
        with a.messages.stream(model="m", max_tokens=99, messages=HI) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == final.content[1].text == "Hello!" and final.content[0].thinking == "I think."
        assert final.content[0].signature and final.stop_reason == "end_turn" and final.usage.output_tokens > 0
        thinking: Any = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
        with a.messages.stream(model="m", max_tokens=99, messages=HI, thinking=thinking) as stream:
            streamed = stream.get_final_message()
        whole = a.messages.create(model="m", max_tokens=99, messages=HI, thinking=thinking)
        for said in (streamed, whole):
            assert [block.type for block in said.content] == ["thinking", "text"]
            assert said.content[0].thinking == "" and said.content[0].signature and said.content[1].text == "Hello!"
        body = {"messages": HI, "stream": True, "max_tokens": 99}
        events = sse(http.post("/v1/messages?beta=true", json=body).text)
        assert all(name == data["type"] for name, data in events)
        kinds = [(data["type"], data.get("index")) for _, data in events]
        compact = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
        assert compact == [
            ("message_start", None),
            ("content_block_start", 0), ("content_block_delta", 0), ("content_block_stop", 0),
            ("content_block_start", 1), ("content_block_delta", 1), ("content_block_stop", 1),
            ("message_delta", None), ("message_stop", None),
        ]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_two_tool_rounds(streamed):
    answers = iter([f"First.</think>Looking.\n\n{CALL}", f"Again.</think>{CALL}", "Ok.</think>Done."])
    with clients(lambda _: next(answers)) as (_, a, _, engine):
        messages = list(HI)
        for _ in range(2):
            kwargs = {"model": "m", "max_tokens": 999, "messages": messages, "tools": [ANTHROPIC_WEATHER]}
            if streamed:
                with a.messages.stream(**kwargs) as stream:
                    done = stream.get_final_message()
            else:
                done = a.messages.create(**kwargs)
            assert done.stop_reason == "tool_use"
            call = done.content[-1]
            assert call.id.startswith("toolu_") and call.name == "weather" and call.input == {"city": "Oslo"}
            kept = [block.model_dump(exclude_none=True) for block in done.content if block.type != "thinking"]
            result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
            messages += [{"role": "assistant", "content": kept}, {"role": "user", "content": [result]}]
        messages[-1]["content"].append({"type": "text", "text": "And?"})
        done = a.messages.create(model="m", max_tokens=99, messages=messages, tools=[ANTHROPIC_WEATHER])
        assert done.content[-1].text == "Done."
        sampled = [*engine.requests[0].tokens, *ids(f"First.</think>Looking.\n\n{CALL}")]
        assert engine.requests[1].tokens[: len(sampled)] == sampled
        assert "<tool_result>sunny</tool_result>\n\nAnd?<｜Assistant｜>" in prompt(engine)


# ---- Responses -------------------------------------------------------------------------------------------------------
RESPONSES_WEATHER = {"type": "function", **WEATHER["function"]}


def test_responses_plain():
    with clients("I think.</think>Hello!", cached=3) as (o, _, _, engine):
        done = o.responses.create(model="m", input="Hi", instructions="Be brief.", reasoning={"summary": "auto"})
        assert done.output_text == "Hello!" and done.status == "completed"
        assert [item.type for item in done.output] == ["reasoning", "message"]
        assert done.output[0].summary[0].text == "I think."
        assert done.usage.input_tokens_details.cached_tokens == 3
        assert done.usage.output_tokens_details.reasoning_tokens == len(ids("I think.</think>"))
        assert prompt(engine).startswith("<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi")
        cut = o.responses.create(model="m", input="Hi", max_output_tokens=2)
        assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_responses_streamed():
    with clients("I think.</think>Hello!") as (o, _, http, _):
        with o.responses.stream(model="m", input="Hi", reasoning={"summary": "auto"}) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert text == final.output_text == "Hello!"
        body = {"input": "Hi", "stream": True, "reasoning": {"summary": "auto"}}
        events = sse(http.post("/v1/responses", json=body).text)
        assert all(name == data["type"] for name, data in events)
        assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
        names = [name.removeprefix("response.") for name, _ in events]
        compact = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
        assert compact == [
            "created",
            "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
            "reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done",
            "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
            "output_item.done", "completed",
        ]  # fmt: skip
        hidden = sse(http.post("/v1/responses", json={"input": "Hi", "stream": True}).text)
        assert not any("reasoning_summary" in name for name, _ in hidden)


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_two_tool_rounds(streamed):
    answers = iter([f"First.</think>Looking.\n\n{CALL}", f"Again.</think>{CALL}", "Ok.</think>Done."])
    with clients(lambda _: next(answers)) as (o, _, _, engine):
        items: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
        for _ in range(2):
            kwargs = {"model": "m", "input": items, "tools": [RESPONSES_WEATHER]}
            if streamed:
                with o.responses.stream(**kwargs) as stream:
                    kinds = [event.type for event in stream]
                    done = stream.get_final_response()
                assert kinds.count("response.function_call_arguments.delta") == 1
            else:
                done = o.responses.create(**kwargs)
            call = done.output[-1]
            assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Oslo"}
            items += [item.model_dump(exclude_none=True) for item in done.output]
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
        done = o.responses.create(model="m", input=items, tools=[RESPONSES_WEATHER])
        assert done.output_text == "Done."
        sampled = [*engine.requests[0].tokens, *ids(f"First.</think>Looking.\n\n{CALL}")]
        assert engine.requests[1].tokens[: len(sampled)] == sampled


def test_responses_custom_tools():
    call = CALL.replace("weather", "patch").replace('"city"', '"input"').replace("Oslo", "*** Begin")
    answers = iter([f"</think>{call}", "</think>Done."])
    with clients(lambda _: next(answers)) as (o, _, _, engine):
        tools = [{"type": "custom", "name": "patch", "description": "Patches files"}, {"type": "web_search"}]
        with o.responses.stream(model="m", input="Hi", tools=tools) as stream:
            kinds = [event.type for event in stream]
            done = stream.get_final_response()
        assert "response.custom_tool_call_input.delta" in kinds
        (item,) = done.output
        assert (item.type, item.name, item.input) == ("custom_tool_call", "patch", "*** Begin")
        said = item.model_dump(exclude_none=True)
        output = {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "ok"}
        o.responses.create(model="m", input=[*HI, said, output], tools=tools)
        assert f"{call}<｜end▁of▁sentence｜><｜User｜><tool_result>ok</tool_result>" in prompt(engine)
        assert "web_search" not in prompt(engine)


def test_responses_namespaces():
    call = CALL.replace("weather", "agents__weather")
    answers = iter([f"</think>{call}", "</think>Done."])
    with clients(lambda _: next(answers)) as (o, _, _, engine):
        tools = [{"type": "namespace", "name": "agents", "description": "d", "tools": [RESPONSES_WEATHER]}]
        (item,) = o.responses.create(model="m", input="Hi", tools=tools).output
        assert (item.type, item.namespace, item.name) == ("function_call", "agents", "weather")
        output = {"type": "function_call_output", "call_id": item.call_id, "output": "ok"}
        o.responses.create(model="m", input=[*HI, item.model_dump(exclude_none=True), output], tools=tools)
        assert f"{call}<｜end▁of▁sentence｜><｜User｜><tool_result>ok</tool_result>" in prompt(engine)


def test_stored_responses_are_gone_on_from():
    answers = iter(["I think.</think>One.", "</think>Two.", "</think>Three.", "</think>Four."])
    with clients(lambda _: next(answers)) as (o, _, http, engine):
        first = o.responses.create(model="m", input="1?", instructions="Be brief.", reasoning={"summary": "auto"})
        assert o.responses.retrieve(first.id) == first and first.store and first.completed_at >= first.created_at
        second = o.responses.create(model="m", input="2?", previous_response_id=first.id)
        assert second.previous_response_id == first.id and "Be brief." not in prompt(engine)
        said = "<｜begin▁of▁sentence｜><｜User｜>1?<｜Assistant｜></think>One.<｜end▁of▁sentence｜><｜User｜>2?"
        assert prompt(engine).startswith(said)
        (stream,) = [e for e in o.responses.create(model="m", input="3?", previous_response_id=second.id, stream=True)][
            -1:
        ]
        assert "Two.<｜end▁of▁sentence｜><｜User｜>3?" in prompt(engine)
        assert o.responses.retrieve(stream.response.id).output_text == "Three."
        (item,) = o.responses.input_items.list(second.id).data
        assert item.content[0].text == "2?" and item.id
        references = [
            {"type": "item_reference", "id": item["id"]} for item in (item.to_dict(), *first.to_dict()["output"])
        ]
        o.responses.create(model="m", input=[*references, {"role": "user", "content": "4?"}], store=False)
        assert "<｜User｜>2?<｜Assistant｜></think>One.<｜end▁of▁sentence｜><｜User｜>4?" in prompt(engine)
        o.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            o.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="expected that of a response that is stored"):
            o.responses.create(model="m", input="?", previous_response_id=second.id)
        assert http.get(f"/responses/{second.id}").json()["id"] == second.id
        assert http.get(f"/v1/responses/{second.id}?stream=true").status_code == 400


def test_a_response_that_is_not_to_be_stored_is_not():
    with clients("</think>x") as (o, _, _, _):
        done = o.responses.create(model="m", input="Hi", store=False)
        assert not done.store
        with pytest.raises(openai.NotFoundError):
            o.responses.retrieve(done.id)


def test_responses_have_every_field():
    """Those that the schema of Open Responses requires, whatever the request has of an object."""
    required = (
        "id object created_at completed_at status incomplete_details model previous_response_id instructions output "
        "error tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty "
        "top_logprobs temperature reasoning user usage max_output_tokens max_tool_calls store background service_tier "
        "metadata safety_identifier prompt_cache_key"
    ).split()
    with clients("</think>x") as (_, _, http, _):
        body = {
            "input": "Hi",
            "tools": [RESPONSES_WEATHER],
            "text": {"verbosity": "low"},
            "reasoning": {"effort": "low"},
        }
        bodies = [http.post("/v1/responses", json=body | {"metadata": {"a": "b"}}).json()]
        events = sse(http.post("/v1/responses", json=body | {"stream": True, "user": "me"}).text)
        bodies += [data["response"] for _, data in events if "response" in data]
        for response in bodies:
            assert response.keys() >= set(required)
            assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
            assert response["reasoning"] == {"effort": "low", "summary": None}
            assert response["tools"][0].keys() >= {"type", "name", "description", "parameters", "strict"}
        assert bodies[0]["metadata"] == {"a": "b"} and bodies[-1]["user"] == "me" and bodies[1]["completed_at"] is None


def test_what_responses_send_comes_back():
    """Items of any status, cut calls, refusals; what the model cannot see of a tool's result leaves a trace."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "A"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "status": "incomplete", "encrypted_content": None},
        {"role": "assistant", "status": "incomplete", "content": [{"type": "refusal", "refusal": "No"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a', "status": "incomplete"},
        {"type": "function_call_output", "call_id": "c", "status": "in_progress",
         "output": [{"type": "input_text", "text": "R"}, {"type": "input_file", "file_id": "f"}]},
    ]  # fmt: skip
    with clients("</think>x") as (o, _, _, engine):
        o.responses.create(model="m", input=items)
        text = prompt(engine)
        assert "A<｜Assistant｜>" in text and "</think>No" in text and '{"a</｜DSML' in text
        assert "<tool_result>R\n\n[Unsupported file]</tool_result>" in text
        o.chat.completions.create(
            model="m", messages=[*HI, {"role": "assistant", "content": [items[2]["content"][0]]}, *HI]
        )
        assert "</think>No<｜end▁of▁sentence｜>" in prompt(engine)
        refused = {"role": "assistant", "content": None, "refusal": "No"}
        o.chat.completions.create(model="m", messages=[*HI, refused, *HI])
        assert "</think>No<｜end▁of▁sentence｜>" in prompt(engine)
        called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
        with pytest.raises(
            openai.BadRequestError, match=r"messages\[1\].function_call: found one, expected tool_calls"
        ):
            o.chat.completions.create(model="m", messages=[*HI, called, *HI])


def test_documents_of_text_are_read():
    found = {
        "type": "search_result",
        "source": "https://x",
        "title": "T",
        "content": [{"type": "text", "text": "found"}],
    }
    plain = {
        "type": "document",
        "title": "D",
        "source": {"type": "text", "media_type": "text/plain", "data": "written"},
    }
    blocks = {"type": "content", "content": [{"type": "text", "text": "inner"}, {"type": "image", "source": {}}]}
    scan = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
    with clients("</think>x") as (_, a, http, engine):
        result = {"type": "tool_result", "tool_use_id": "t", "content": [found, {"type": "image", "source": {}}]}
        result["content"] += [{"type": "document", "source": blocks}, scan]
        asked = [plain, found, result]
        call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
        a.messages.create(
            model="m", max_tokens=9,
            messages=[*HI, {"role": "assistant", "content": [call]}, {"role": "user", "content": asked}],
        )  # fmt: skip
        said = "T\nhttps://x\n\nfound\n\n"
        seen = f"{said}[Unsupported image]\n\ninner\n\n[Unsupported image]\n\n[Unsupported document]"
        assert f"D\n\nwritten\n\n{said}<tool_result>{seen}</tool_result>" in prompt(engine)
        wrong = {"messages": [{"role": "user", "content": [found | {"content": [{"type": "text"}]}]}], "max_tokens": 9}
        assert http.post("/v1/messages", json=wrong).status_code == 400


def test_what_the_model_cannot_see_is_refused():
    """By all APIs, naming the part: an answer about an image that was not seen would be made up."""
    scan = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
    inside = {"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": {}}]}}
    cases = [
        ("chat/completions", "messages", {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, ""),
        ("chat/completions", "messages", {"type": "input_audio", "input_audio": {}}, ""),
        ("responses", "input", {"type": "input_image", "image_url": "x"}, ""),
        ("responses", "input", {"type": "input_file", "file_id": "x"}, ""),
        ("messages", "messages", {"type": "image", "source": {}}, ""),
        ("messages", "messages", scan, ""),
        ("messages", "messages", inside, ".source.content[0]"),
    ]
    with clients("</think>x") as (_, _, http, _):
        for path, field, part, place in cases:
            text = {"type": "input_text" if field == "input" else "text", "text": "What is this?"}
            body = {field: [{"role": "user", "content": [text, part]}], "model": "m", "max_tokens": 9}
            reply = http.post(f"/v1/{path}", json=body)
            message = reply.json()["error"]["message"]
            assert reply.status_code == 400
            assert message.startswith(f"{field}[0].content[1]{place}.type: found ")
            assert message.endswith("expected 'text': the model sees no images and reads no files")
        reply = http.post("/v1/completions", json={"prompt": [{"type": "image_url"}], "max_tokens": 9})
        assert reply.status_code == 400 and reply.json()["error"]["message"].startswith("prompt[0]: found {")


# ---- calls in blocks that are malformed or cut -----------------------------------------------------------------------
BROKEN = '<｜DSML｜invoke name="weather">\nBergen</｜DSML｜invoke>'
INSIDE, CLOSING = CALL.rsplit("\n", 1)


def chat_turn(o, a, streamed, messages, max_tokens=999):
    """(text, arguments of finished calls, reason, the messages to go on with) of a turn; so below."""
    kwargs = {"model": "m", "messages": messages, "tools": [WEATHER], "max_tokens": max_tokens}
    said: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    if streamed:
        for chunk in o.chat.completions.create(**kwargs, stream=True):
            (choice,) = chunk.choices
            said["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert call.index == len(said["tool_calls"])
                    said["tool_calls"].append({"id": call.id, "type": "function", "function": call.function.to_dict()})
                else:
                    said["tool_calls"][call.index]["function"]["arguments"] += call.function.arguments
        if choice.finish_reason == "length":  # the last one may be a beginning
            said["tool_calls"] = [call for call in said["tool_calls"] if call["function"]["arguments"].endswith("}")]
    else:
        (choice,) = o.chat.completions.create(**kwargs).choices
        said = choice.message.model_dump(include=said.keys())
    calls = said["tool_calls"] or []
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in calls]
    arguments = [json.loads(call["function"]["arguments"]) for call in calls]
    return said["content"] or "", arguments, choice.finish_reason, [*messages, said, *results]


def messages_turn(o, a, streamed, messages, max_tokens=999):
    kwargs = {"model": "m", "messages": messages, "tools": [ANTHROPIC_WEATHER], "max_tokens": max_tokens}
    if streamed:
        with a.messages.stream(**kwargs) as stream:
            done = stream.get_final_message()
    else:
        done = a.messages.create(**kwargs)
    content = [block.model_dump(exclude_none=True) for block in done.content if block.type != "thinking"]
    kinds = [block["type"] for block in content]
    assert kinds == ["text"] * kinds.count("text") + ["tool_use"] * kinds.count("tool_use")
    results = [
        {"type": "tool_result", "tool_use_id": b["id"], "content": "sunny"} for b in content if b["type"] == "tool_use"
    ]
    return (
        "".join(block["text"] for block in content if block["type"] == "text"),
        [block["input"] for block in content if block["type"] == "tool_use"], done.stop_reason,
        [*messages, {"role": "assistant", "content": content}, {"role": "user", "content": results}],
    )  # fmt: skip


def responses_turn(o, a, streamed, messages, max_tokens=999):
    kwargs = {"model": "m", "input": messages, "tools": [RESPONSES_WEATHER], "max_output_tokens": max_tokens}
    if streamed:
        with o.responses.stream(**kwargs) as stream:
            events = list(stream)
        done = events[-1].response
    else:
        done = o.responses.create(**kwargs)
    calls = [item for item in done.output if item.type == "function_call"]
    assert all(item.status == "completed" for item in calls)
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    said = [item.model_dump(exclude_none=True) for item in done.output]
    return done.output_text, [json.loads(call.arguments) for call in calls], done.status, [*messages, *said, *results]


TURNS = {"chat": chat_turn, "messages": messages_turn, "responses": responses_turn}
CALLS_MADE = {"chat": "tool_calls", "messages": "tool_use", "responses": "completed"}
CUT = {"chat": "length", "messages": "max_tokens", "responses": "incomplete"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("before", ["", "Looking."])
@pytest.mark.parametrize(
    ("block", "rest"),
    [
        (f"{INSIDE}\n{BROKEN}\n{CLOSING}", BROKEN),
        (f"{INSIDE}\n{BROKEN}", BROKEN),  # the model ended its turn in the block
        (f"{INSIDE}\n</｜DSML｜tool_", ""),
    ],
)
@pytest.mark.parametrize("api", TURNS)
def test_a_call_with_a_malformed_sibling(api, block, rest, before, streamed):
    """It is made. The rest is text; sent back, the turn is what was sampled."""
    answers = iter([f"T</think>{before}\n\n{block}", "T</think>Done."])
    with clients(lambda _: next(answers)) as (o, a, _, engine):
        text, calls, reason, messages = TURNS[api](o, a, streamed, HI)
        assert (text, calls, reason) == ("\n\n".join(filter(None, (before, rest))), [{"city": "Oslo"}], CALLS_MADE[api])
        text, calls, _, _ = TURNS[api](o, a, streamed, messages)
        assert (text, calls) == ("Done.", [])
        first, second = (request.tokens for request in engine.requests)
        sampled = [*first, *ids(f"T</think>{before}\n\n{block}"), TOKENIZER.eos_id]
        assert second[: len(sampled)] == sampled


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("api", TURNS)
def test_a_block_cut_by_the_limit(api, streamed):
    """Calls that are whole are delivered, wherever it is; of the rest nothing is shown."""
    whole, said = f"T</think>Looking.\n\n{INSIDE}", "T</think>Looking.\n\n<"
    after = f"{whole}\n{BROKEN}"
    with clients(f"{after}{INSIDE}") as (o, a, _, _):
        for n in (len(ids(said)) + 1, len(ids(said)) + 5, len(ids(whole)) - 1):
            got = TURNS[api](o, a, streamed, HI, max_tokens=n)
            assert got[:3] == ("Looking.", [], CUT[api])
        for n in (len(ids(whole)), len(ids(whole)) + 3, len(ids(after)) - 2, len(ids(after)) + 9):
            got = TURNS[api](o, a, streamed, HI, max_tokens=n)
            assert got[:3] == ("Looking.", [{"city": "Oslo"}], CUT[api])


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_end_with_the_first_call(streamed):
    with clients(f"</think>Hello\n\n{INSIDE}\n{BROKEN}\n{CLOSING}") as (_, _, http, _):
        body = {"messages": HI, "logprobs": True, "tools": [WEATHER], "stream": streamed}
        answer = http.post("/v1/chat/completions", json=body)
        parts = [answer.json()["choices"][0]] if not streamed else [e["choices"][0] for _, e in sse(answer.text)[:-1]]
        assert "".join(t["token"] for p in parts for t in p["logprobs"]["content"]).endswith("Hello")


# ---- streams: first event, keep-alives, disconnects, failures --------------------------------------------------------
STREAMS = {  # a body, what the first event says, a sign of life
    "/v1/chat/completions": ({"messages": HI}, b'"role":"assistant"', b": prefill "),
    "/v1/completions": ({"prompt": "Hi"}, b'"text":"x"', b": prefill "),
    "/v1/messages": ({"messages": HI}, b"event: message_start", b"event: ping"),
    "/v1/responses": ({"input": "Hi"}, b"event: response.created", b"event: response.in_progress"),
}


def test_who_asks_is_told_how_much_of_a_prompt_is_read():
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "return_progress": True}
    with clients("</think>x", Options(keep_alive=0.05), chunks=3, delay=0.15, cached=1) as (_, _, http, _):
        reply = http.post("/v1/chat/completions", json=body)
    lines = reply.text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    reports = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert reports and all(not chunk["choices"] for chunk in chunks if "prompt_progress" in chunk)
    assert all(one["cache"] <= 1 and 0 <= one["processed"] < one["total"] for one in reports)
    assert [one["processed"] for one in reports] == sorted(one["processed"] for one in reports)
    assert reports[-1]["processed"] > 0 and "warning" not in reply.headers


@pytest.mark.parametrize("path", STREAMS)
def test_headers_and_signs_of_life_come_before_the_prefill_and_the_answer_after_it(path):
    """Benchmarks take the first chunk with choices for the first token."""
    body, first, alive = STREAMS[path]
    with clients("x", Options(keep_alive=0.05), chunks=2, delay=0.2) as (_, _, http, _):
        with http.stream("POST", path, json=body | {"stream": True}) as response:
            begun, chunks, seen = time.perf_counter(), [], []
            for chunk in response.iter_raw():
                chunks.append(chunk)
                seen.append(time.perf_counter() - begun)
        # From the admission: two chunks of the prompt and two tokens, 0.2 seconds each.
        assert seen[-1] > 0.6
        assert sum(alive in chunk for chunk in chunks) > 2
        (at,) = (i for i, chunk in enumerate(chunks) if first in chunk)
        if b"event: " in first:
            assert at == 0
        else:
            assert seen[at] > 0.4 and not any(b"choices" in chunk for chunk in chunks[:at])


def test_signs_of_life_while_what_is_said_is_hidden():
    """Thoughts that nobody asked for, and calls that are not whole yet, take long too."""
    with clients(f"{'Hm. ' * 20}</think>{CALL}", Options(keep_alive=0.03), delay=0.004) as (_, _, http, _):
        body = {"input": "Hi", "stream": True, "tools": [RESPONSES_WEATHER]}
        names = [name for name, _ in sse(http.post("/v1/responses", json=body).text)]
        assert names[1:4] == ["response.in_progress"] * 3
        body = {"messages": HI, "stream": True, "tools": [ANTHROPIC_WEATHER], "thinking": {"type": "disabled"}}
        names = [name for name, _ in sse(http.post("/v1/messages", json=body).text)]
        assert names.count("ping") >= 3


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_engine(path, stream):
    body, _, _ = STREAMS[path]
    with clients("word " * 500, delay=0.02) as (_, _, http, engine):
        with contextlib.suppress(httpx.ReadTimeout):
            with http.stream("POST", path, json=body | {"stream": stream}, timeout=0.5) as response:
                next(response.iter_raw())
        wait_until_idle(engine)
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("1024 requests are waiting already"), 503, "overloaded_error"),
        (Stopping("the server is stopping"), 503, "overloaded_error"),
        (TooMany("3 requests of this key are waiting already"), 429, "rate_limit_error"),
        (EngineFailed("secret"), 500, "api_error"),
        (RuntimeError("secret"), 500, "api_error"),
    ],
)
def test_failures_of_the_engine(error, status, kind):
    with clients(lambda _: error) as (_, _, http, _):
        for path, (body, _, _) in STREAMS.items():
            for stream in (False, True):
                response = http.post(path, json=body | {"stream": stream})
                assert response.status_code == status and "secret" not in response.text
                error_type = response.json()["error"]["type"]
                assert error_type == (kind if path == "/v1/messages" or status == 429 else "server_error")
                assert response.headers.get("retry-after") == ("1" if status in (429, 503) else None)


def test_health_and_readiness():
    with clients("x") as (_, _, http, engine):
        assert http.get("/health").json() == http.get("/ready").json() == {"status": "ok", "model": "fake"}
        engine.full = True
        assert http.get("/health").status_code == 200 and http.get("/ready").status_code == 503
        engine.full, engine.problem = False, "no step has ended for 71 s"
        for path in ("/health", "/ready", "/ping"):
            assert (response := http.get(path)).status_code == 503
            assert response.json() == {"status": "error", "error": engine.problem}


def test_requests_bear_the_name_of_their_key():
    keys = Keys.of([("ann", "a-key"), ("bob", "b-key")])
    with clients("x", Options(keys=keys)) as (_, _, http, engine):
        for path, (body, _, _) in STREAMS.items():
            for key in ("a-key", "b-key"):
                http.post(path, json=body, headers={"authorization": f"Bearer {key}"})
        assert [request.client for request in engine.requests] == ["ann", "bob"] * len(STREAMS)
        assert http.get("/ready").status_code == 200


def test_overflow_is_named_as_agents_expect():
    with clients("x", ctx=64) as (o, a, http, engine):
        long = [{"role": "user", "content": "word " * 200}]
        n = a.messages.count_tokens(model="m", messages=long).input_tokens
        with pytest.raises(openai.BadRequestError) as e:
            o.chat.completions.create(model="m", messages=long)
        assert e.value.code == "context_length_exceeded"
        with pytest.raises(anthropic.BadRequestError, match=f"prompt is too long: {n} tokens > 63 maximum"):
            a.messages.create(model="m", max_tokens=5, messages=long, stream=True)
        events = sse(http.post("/v1/responses", json={"input": "word " * 200, "stream": True}).text)
        assert [name for name, _ in events] == ["response.created", "response.failed"]
        assert events[1][1]["response"]["error"]["code"] == "context_length_exceeded"
        assert http.post("/v1/responses", json={"input": "word " * 200}).status_code == 400
        huge = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 10**7}]})
        assert huge.status_code == 400 and huge.elapsed.total_seconds() < 2  # refused by its size
        assert not engine.requests


# ---- the rest --------------------------------------------------------------------------------------------------------
def test_models_health_metrics():
    with clients("Hi") as (o, a, http, engine):
        (model,) = o.models.list()
        assert model.id == "fake" and model.context_length == 4096 and o.models.retrieve("any/name").id == "any/name"
        assert a.models.list().data[0].id == "fake"
        assert http.get("/health").json()["status"] == "ok"
        o.chat.completions.create(model="m", messages=HI)
        text = http.get("/metrics").text
        for line in (
            'ds4jax_http_requests_total{path="/v1/chat/completions",status="200"} 1.0',
            "ds4jax_waiting 0.0",
            "ds4jax_generated_tokens_total 7.0",
            "ds4jax_draft_tokens 2.0",
            'ds4jax_drafts_accepted_total{place="2"} 3.0',
            'ds4jax_time_to_first_token_seconds_bucket{le="0.1"} 0.0',
            'ds4jax_time_to_first_token_seconds_bucket{le="1.0"} 1.0',
            'ds4jax_time_to_first_token_seconds_bucket{le="+Inf"} 1.0',
            "ds4jax_time_to_first_token_seconds_sum 0.5",
            'ds4jax_request_success_total{finished_reason="stop"} 1.0',
            f"ds4jax_request_prompt_tokens_sum {len(engine.requests[0].tokens)}.0",
            "ds4jax_request_generation_tokens_sum 3.0",
            "ds4jax_e2e_request_latency_seconds_count 1.0",
        ):
            assert line in text


def test_paths_of_other_base_urls():
    with clients("Hi") as (_, _, http, _):
        aliases = {
            "/v1/chat/completions": ["/chat/completions"],
            "/v1/completions": ["/completions", "/beta/completions"],
            "/v1/messages": ["/messages", "/anthropic/v1/messages"],
            "/v1/responses": ["/responses"],
        }
        for canonical, path in [(name, alias) for name, others in aliases.items() for alias in others]:
            assert http.post(path, json=STREAMS[canonical][0]).status_code == 200, path
            assert f'path="{canonical}",status="200"' in http.get("/metrics").text
        assert http.post("/anthropic/v1/messages", json={}).json()["type"] == "error"
        assert http.post("/anthropic/v1/messages/count_tokens", json={"messages": HI}).json()["input_tokens"] > 0
        for path in ("/v1/models", "/models", "/beta/models", "/anthropic/v1/models"):
            (model,) = http.get(path).json()["data"]
            assert model["max_model_len"] == 4096 and model["root"] == model["id"]
            assert http.get(f"{path}/x").json()["id"] == "x"
        assert http.get("/ping").status_code == 200 and http.get("/version").json()["version"]


def test_tokens():
    with clients("Hi") as (o, _, http, engine):
        bos, eos = TOKENIZER.bos_id, TOKENIZER.eos_id
        end = "<｜end▁of▁sentence｜>"
        told = http.get("/tokenizer_info").json()
        assert told["eos_token"] == end and told["bos_token"] == "<｜begin▁of▁sentence｜>"

        def tokenize(**body):
            return http.post("/tokenize", json=body).json()["tokens"]

        assert tokenize(prompt="a") == [bos, 97] == tokenize(content="a", add_special=True)  # vLLM's and llama.cpp's
        assert tokenize(prompt="a", add_special_tokens=False) == [97] == tokenize(content="a")
        assert tokenize(content=f"a{end}") == [97, eos] and eos not in tokenize(content=end, parse_special=False)
        assert tokenize(content="é", with_pieces=True) == [{"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]
        full = http.post("/tokenize", json={"messages": HI, "return_token_strs": True}).json()
        o.chat.completions.create(model="m", messages=HI)
        assert full["tokens"] == list(engine.requests[-1].tokens) and full["count"] == len(full["tokens"])
        assert "".join(full["token_strs"]) == prompt(engine) and full["max_model_len"] == 4096
        assert http.post("/apply-template", json={"messages": HI}).json()["prompt"] == prompt(engine)
        assert http.post("/detokenize", json={"tokens": full["tokens"]}).json()["prompt"] == prompt(engine)
        counted = http.post("/v1/responses/input_tokens", json={"input": "Hi"}).json()
        assert counted == {"object": "response.input_tokens", "input_tokens": full["count"]}
        for path, body in (
            ("tokenize", {}),
            ("tokenize", {"prompt": "a", "content": "a"}),
            ("detokenize", {"tokens": [-1]}),
        ):
            assert http.post(f"/{path}", json=body).status_code == 400


def test_properties_and_slots_as_llama_cpp_shows_them():
    with clients("Hi") as (o, _, http, engine):
        o.chat.completions.create(model="m", messages=HI, temperature=0.5, max_tokens=9)
        props = http.get("/props").json()
        assert props["total_slots"] == 2 and props["default_generation_settings"]["n_ctx"] == 4096
        free, busy = http.get("/slots").json()
        assert not free["is_processing"] and busy["is_processing"] and busy["params"]["temperature"] == 0.5
        assert busy["n_prompt_tokens"] == len(engine.requests[-1].tokens)


def test_api_key_and_cors():
    with clients("Hi", Options(keys=KEYS, cors=("*",))) as (o, a, http, _):
        assert o.chat.completions.create(model="m", messages=HI).choices
        assert a.messages.create(model="m", max_tokens=9, messages=HI).content
        for path, (body, _, _) in STREAMS.items():
            for headers in ({}, {"authorization": "Bearer x"}, {"x-api-key": "ключ".encode()}):
                response = http.post(path, json=body, headers=headers | {"origin": "https://x.example"})
                assert response.status_code == 401 and response.json()["error"]["message"]
                assert response.headers["access-control-allow-origin"] == "*"
        assert http.get("/metrics").status_code == 401 and http.get("/health").status_code == 200
        assert http.get("/").status_code == 200
        both = {"x-api-key": "other", "authorization": "Bearer k"}
        assert http.get("/v1/models", headers=both).status_code == 200
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key,content-type"}
        preflight = http.options("/v1/messages", headers={"origin": "https://x.example", **asked})
        assert preflight.status_code == 200 and "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-origin"] == "*"
        assert preflight.headers["access-control-allow-headers"] == "x-api-key,content-type"
    with clients("Hi") as (_, _, http, _):
        assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": "null"}).headers


def test_limits():
    with clients("Hi", Options(max_body=2000, max_depth=20)) as (_, _, http, _):
        for path, (body, _, _) in STREAMS.items():
            large = http.post(path, json=body | {"x": "y" * 2000})
            chunked = http.post(path, content=iter([b"{", b" " * 3000]))
            deep = http.post(path, content=b'{"x":' + b"[" * 20 + b"]" * 20 + b"}")
            packed = http.post(path, content=b"", headers={"content-encoding": "gzip"})
            codes = [response.status_code for response in (large, chunked, deep, packed)]
            assert codes == [413, 413, 400, 415]
            assert http.post(path, json=body | {"x": json.loads("[" * 19 + "]" * 19)}).status_code == 200


# ---- what a reader of the code found ---------------------------------------------------------------------------------
def test_log_probabilities_come_with_their_own_chunk():
    """Also where tokens come faster than chunks are read."""
    body = {"messages": HI, "reasoning_effort": "none", "logprobs": True, "stream": True}
    with clients("Hello you") as (_, _, http, _):
        lines = http.post("/v1/chat/completions", json=body).text.splitlines()
        chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
        for chunk in chunks:
            spelled = "".join(item["token"] for item in chunk["logprobs"]["content"])
            assert spelled == (chunk["delta"].get("content") or "")


def test_log_probabilities_of_marks_that_are_text():
    body = {"messages": HI, "reasoning_effort": "none", "logprobs": True, "stop": "STOP"}
    with clients("x</think><｜DSML｜y STOP z") as (_, _, http, _):
        (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
        spelled = "".join(item["token"] for item in choice["logprobs"]["content"])
        assert spelled == choice["message"]["content"] == "x<｜DSML｜y "


def test_a_token_that_ends_an_answer_inside_a_call_cuts_it():
    stop = TOKENIZER.encode_text("O")
    begun = CALL.partition("slo")[0] + "s"
    with clients(f"</think>Here\n\n{begun}") as (_, _, http, _):
        for path, body in (
            ("chat/completions", {"messages": HI, "tools": [WEATHER]}),
            ("messages", {"messages": HI, "max_tokens": 99, "tools": [{"name": "weather", "input_schema": {}}]}),
        ):
            answer = http.post(f"/v1/{path}", json=body | {"stop_token_ids": stop})
            assert answer.status_code == 200 and "Here" in answer.text and "DSML" not in answer.text


def test_one_answer_of_several_may_end_inside_a_call():
    good, bad = "</think>Fine", "</think>Text\n\n<｜DSML｜tool_calls>\n"
    answers = itertools.cycle((good, bad))
    with clients(lambda _: next(answers)) as (_, _, http, _):
        body = {"messages": HI, "tools": [WEATHER], "n": 2}
        choices = http.post("/v1/chat/completions", json=body).json()["choices"]
        assert sorted(choice["message"]["content"] for choice in choices) == ["Fine", "Text"]
        assert {choice["finish_reason"] for choice in choices} == {"stop"}


@pytest.mark.parametrize(
    "function",
    [
        {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": 5}}}},
        {"name": "f", "parameters": {"type": "object", "required": [["a"]]}},
        {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string", "maxLength": "x"}}}},
        {"name": "f", "parameters": {"type": "object", "properties": [], "required": 3}},
        {"name": 'a"b'},
        {"name": ""},
    ],
)
def test_tools_that_cannot_be_forced_are_refused(function):
    with clients("</think>Hi", real_grammars=True) as (_, _, http, _):
        body = {"messages": HI, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("tools: ")


def test_the_wrong_one_of_several_is_named():
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}
    good = {"name": "g", "parameters": {"type": "object"}, "strict": True}
    wrong = {"name": "w", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}, "strict": True}
    with clients("</think>Hi", real_grammars=True) as (_, _, http, _):
        for functions, fields, start in (
            ([good], {"response_format": bad}, "json_schema: "),
            ([good, wrong], {}, "tools: w: "),
            ([good, {}], {"parallel_tool_calls": False}, "tools[1].function.name"),
        ):
            tools = [{"type": "function", "function": function} for function in functions]
            answer = http.post("/v1/chat/completions", json={"messages": HI, "tools": tools} | fields)
            assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(start), answer.text


def test_other_names_of_paths_and_fields():
    with clients("</think>Hi", Options(strict=True, keys=KEYS)) as (_, _, http, _):
        assert http.get("/v1/health").status_code == 200
        key = {"authorization": "Bearer k"}
        assert http.post("/beta/chat/completions", json={"messages": HI}, headers=key).status_code == 200
        body = {"messages": HI, "add_special_tokens": False, "return_token_strs": True}
        assert http.post("/tokenize", json=body, headers=key).status_code == 200
        both = {"messages": HI, "ignore_eos": True, "stop_token_ids": [5]}
        assert http.post("/v1/chat/completions", json=both, headers=key).status_code == 400
        body = {"messages": HI, "thinking_budget_tokens": -1}
        assert http.post("/v1/chat/completions", json=body, headers=key).status_code == 200


def test_unknown_fields_cannot_write_lines_of_the_log(caplog):
    with clients("</think>Hi") as (_, _, http, _):
        http.post("/v1/chat/completions", json={"messages": HI, "a\nERROR fake": 1})
        assert "a\\nERROR fake" in caplog.text and "a\nERROR fake" not in caplog.text


def test_responses_of_odd_items_are_stored():
    items = [
        {"role": "user", "content": "Hi", "id": None},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "id": 7},
        {"type": "function_call_output", "call_id": "1", "output": "x", "content": "y"},
    ]
    with clients("</think>Hi") as (_, _, http, _):
        answer = http.post("/v1/responses", json={"input": items}).json()
        listed = http.get(f"/v1/responses/{answer['id']}/input_items").json()
        assert all(isinstance(item["id"], str) for item in listed["data"]) and listed["first_id"]
        more = http.post("/v1/responses", json={"previous_response_id": answer["id"]})
        assert more.status_code == 200 and more.json()["output"]


def test_references_are_counted_each_time():
    """A few bytes may not stand for gigabytes."""
    with clients("</think>Hi") as (_, _, http, engine):
        big = {"type": "web_search_call", "id": "big", "blob": "x" * 10**6}  # nothing of it is in the prompt
        http.post("/v1/responses", json={"input": [big, {"role": "user", "content": "Hi", "id": "hi"}], "store": True})
        assert http.post("/v1/responses", json={"input": [{"id": "hi"}] * 50}).status_code == 200
        response = http.post("/v1/responses", json={"input": [{"id": "hi"}, *[{"id": "big"}] * 9]})
        assert response.status_code == 413 and "by reference" in response.json()["error"]["message"]
        long = http.post("/v1/responses", json={"input": "x", "previous_response_id": "r" * 10**6})
        assert long.status_code == 400 and len(long.content) < 1000


def test_a_schema_as_text_has_a_limit():
    with clients("{}") as (_, _, http, _):
        body = {"messages": [{"role": "user", "content": "Hi"}], "guided_json": "[" + "{}," * 400_000 + "{}]"}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400 and "at most 1000000 characters" in response.json()["error"]["message"]


def test_input_items_come_in_pages():
    with clients("</think>Hi") as (_, _, http, _):
        words = [{"role": "user", "content": text} for text in "abcdefg"]
        path = f"/v1/responses/{http.post('/v1/responses', json={'input': words}).json()['id']}/input_items"

        def page(**query):
            found = http.get(path, params=query).json()
            return "".join(item["content"][0]["text"] for item in found["data"]), found["has_more"], found["last_id"]

        assert page()[:2] == ("gfedcba", False) and page(order="asc")[:2] == ("abcdefg", False)
        text, more, last = page(order="asc", limit=3)
        assert (text, more) == ("abc", True) and page(order="asc", limit=4, after=last)[:2] == ("defg", False)
        for wrong in ({"order": "up"}, {"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"after": "item_x"}):
            assert (response := http.get(path, params=wrong)).status_code == 400, wrong
            assert response.json()["error"]["param"] in wrong


LOCAL = Options(hosts=LOOPBACK)


@pytest.mark.parametrize(
    ("flags", "key", "expected"),
    [
        ([], None, {}),
        (["--strict", "--think_default=asked"], None, {"strict": True, "think_default": "asked"}),
        (
            ["--api_key=flag", "--cors", "--keep_alive=3"],
            "other",
            {"keys": Keys.of([("default", "flag")]), "cors": ("*",), "keep_alive": 3.0},
        ),
        (["--think_default=off"], "environs", {"keys": Keys.of([("default", "environs")]), "think_default": "off"}),
        (
            ["--cors_origins=https://a.example,https://b.example:8", "--max_body_mb=3", "--body_timeout=4"],
            None,
            {"cors": ("https://a.example", "https://b.example:8"), "max_body": 3 << 20, "body_timeout": 4.0},
        ),
        (["--allowed_hosts=a.example"], None, {"hosts": (*LOOPBACK, "a.example")}),
        (["--host=0.0.0.0"], None, {"hosts": ()}),
        (["--host=0.0.0.0", "--allowed_hosts=a"], None, {"hosts": (*LOOPBACK, "a")}),
        (["--host=127.0.0.2"], None, {}),
        (
            ["--max_connections=7", "--head_timeout=1", "--idle_timeout=2", "--write_timeout=3"],
            None,
            {"limits": Limits(7, 1.0, 2.0, 3.0)},
        ),
    ],
)
@pytest.mark.parametrize("failed", [False, True])
def test_flags_become_options(monkeypatch, flags, key, expected, failed):
    """And the exit status says whether the engine has failed."""
    from ds4jax.engine.async_engine import AsyncEngine
    from ds4jax.tools import serve

    engine, seen = FakeEngine(lambda _: "Hi"), []
    engine.failed = failed

    async def served(engine, options, replay, listener, grace, limits):
        listener.close()
        seen.append((options, limits))

    monkeypatch.setattr(AsyncEngine, "open", lambda *args, **kwargs: engine)
    monkeypatch.setattr(serve, "serve", served)
    monkeypatch.delenv("DS4JAX_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("DS4JAX_API_KEY", key)
    serve.FLAGS.unparse_flags()
    for name in serve.FLAGS:
        serve.FLAGS[name].unparse()
    serve.FLAGS(["serve", "--port=0", *flags])
    assert serve.main() == (1 if failed else 0)
    options, limits = seen.pop()
    assert limits == expected.get("limits", Limits(most_connections()))
    assert options == dataclasses.replace(LOCAL, **{k: v for k, v in expected.items() if k != "limits"})
