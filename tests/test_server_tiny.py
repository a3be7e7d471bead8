"""The server over the embedded model: SDKs, tools in two rounds, reuse, formats, a short soak and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import load  # noqa: E402
import soak  # noqa: E402
from serving import LISTENING  # noqa: E402

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
(ALARM,) = [r for r in json.loads((ROOT / "tests/tiny/tool_requests.json").read_text()) if r["name"] == "create_alarm"][
    :1
]
FUNCTIONS = [tool["function"] for tool in ALARM["tools"]]


# The tests' own XLA flags would make it slow, and every chunk length takes seconds to compile.
CONFIG = {"model": "tiny", "ctx": 1024, "batch": 4, "prefill_chunk": 32}


@contextlib.contextmanager
def server(*flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, process) of `python -m ds4jax.serve`."""
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.writelines(f"{key} = {json.dumps(value)}\n" for key, value in CONFIG.items())
        config.flush()
        command = [sys.executable, "-m", "ds4jax.serve", "--port=0", f"--config={config.name}", *flags]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        assert process.stderr
        found = next(filter(None, map(LISTENING.search, process.stderr)), None)
    assert found, f"the server ended with status {process.wait()}"
    try:
        reader = threading.Thread(target=process.stderr.read)  # or the pipe fills up
        reader.start()
        yield found[1], process
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server() as (url, _):
        yield url


@pytest.fixture(scope="module")
def o(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def a(url) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0, timeout=60) as client:
        yield client


def test_questions(o, a):
    for effort in ("none", "low"):
        chat = o.chat.completions.create(model="m", messages=FRANCE, temperature=0, reasoning_effort=effort)
        assert chat.choices[0].message.content == "The capital of France is Paris."
        assert (chat.usage.completion_tokens_details.reasoning_tokens > 0) == (effort == "low")
        reasoning = {"effort": effort, "summary": "auto"}
        with o.responses.stream(model="m", input=FRANCE, temperature=0, reasoning=reasoning) as stream:
            final = stream.until_done().get_final_response()
        assert final.output_text == "The capital of France is Paris." and len(final.output) == 1 + (effort == "low")
        thinking = {"type": "disabled" if effort == "none" else "adaptive"}
        extra = {"temperature": 0, "thinking": thinking}
        with a.messages.stream(model="m", max_tokens=99, messages=FRANCE, extra_body=extra) as stream:
            said = stream.get_final_message()
        assert said.content[-1].text == "The capital of France is Paris." and len(said.content) == 1 + (effort == "low")
    raw = o.completions.create(model="m", prompt="import numpy as", temperature=0, max_tokens=2)
    assert raw.choices[0].text.startswith(" np")


def test_tools_chat(o):
    messages = [{"role": "user", "content": ALARM["request"]}]
    for _ in range(2):
        with o.chat.completions.stream(model="m", messages=messages, tools=ALARM["tools"], temperature=0) as stream:
            message = stream.get_final_completion().choices[0].message
        (call,) = message.tool_calls
        assert call.function.name == ALARM["name"] and json.loads(call.function.arguments) == ALARM["arguments"]
        messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "{}"}]
        done = o.chat.completions.create(model="m", messages=messages, tools=ALARM["tools"], temperature=0)
        assert done.choices[0].finish_reason == "stop" and done.usage.prompt_tokens_details.cached_tokens >= 256
        messages.append(done.choices[0].message.model_dump(exclude_none=True))
        messages.append({"role": "user", "content": ALARM["request"]})


@pytest.mark.slow
def test_tools_responses(o):
    items = [{"role": "user", "content": ALARM["request"]}]
    tools = [{"type": "function", **function} for function in FUNCTIONS]
    for _ in range(2):
        with o.responses.stream(model="m", input=items, tools=tools, temperature=0) as stream:
            output = stream.until_done().get_final_response().output
        assert json.loads(output[-1].arguments) == ALARM["arguments"]
        items += [item.model_dump(exclude_none=True) for item in output]
        items.append({"type": "function_call_output", "call_id": output[-1].call_id, "output": "{}"})
        done = o.responses.create(model="m", input=items, tools=tools, temperature=0)
        assert done.output_text and done.usage.input_tokens_details.cached_tokens >= 256
        items += [item.model_dump(exclude_none=True) for item in done.output]
        items.append({"role": "user", "content": ALARM["request"]})


def test_tools_messages(a):
    messages = [{"role": "user", "content": ALARM["request"]}]
    tools = [{"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in FUNCTIONS]
    for _ in range(2):
        kwargs = {"model": "m", "max_tokens": 300, "messages": messages, "tools": tools}
        kwargs["extra_body"] = {"temperature": 0}  # which the SDK no longer knows
        with a.messages.stream(**kwargs) as stream:
            said = stream.get_final_message()
        assert said.stop_reason == "tool_use" and said.content[-1].input == ALARM["arguments"]
        counted = a.messages.count_tokens(**{key: kwargs[key] for key in ("model", "messages", "tools")})
        assert said.usage.input_tokens + said.usage.cache_read_input_tokens == counted.input_tokens
        result = {"type": "tool_result", "tool_use_id": said.content[-1].id, "content": "{}"}
        messages += [{"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
        done = a.messages.create(**kwargs)
        assert done.stop_reason == "end_turn" and done.usage.cache_read_input_tokens >= 256
        messages.append({"role": "assistant", "content": done.content})
        messages.append({"role": "user", "content": ALARM["request"]})


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


def is_weather(arguments: Any) -> bool:
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return arguments.keys() - {"days"} == {"city", "unit"} and arguments["unit"] in ("C", "F")


def test_calls_that_are_forced(o, a):
    """The question asks for none of the tools; the temperature is that of a user who sets none."""
    chat_tools: Any = [{"type": "function", "function": f} for f in [WEATHER, *FUNCTIONS]]
    for choice, effort in (("required", "none"), ({"type": "function", "function": {"name": "weather"}}, "low")):
        done = o.chat.completions.create(
            model="m", messages=FRANCE, tools=chat_tools, tool_choice=choice, reasoning_effort=effort, max_tokens=700
        )
        calls = done.choices[0].message.tool_calls or []
        assert calls and done.choices[0].finish_reason == "tool_calls", done
        assert all(is_weather(call.function.arguments) for call in calls if call.function.name == "weather")
        assert choice == "required" or [call.function.name for call in calls] == ["weather"]
        assert not done.choices[0].message.content
    flat: Any = [{"type": "function", "strict": True, **f} for f in [WEATHER, *FUNCTIONS]]
    with o.responses.stream(
        model="m", input="Hi", tools=flat, tool_choice={"type": "function", "name": "weather"}
    ) as stream:
        (call,) = [item for item in stream.until_done().get_final_response().output if item.type == "function_call"]
    assert call.name == "weather" and is_weather(call.arguments)
    theirs: Any = [{"name": f["name"], "input_schema": f["parameters"]} for f in [WEATHER, *FUNCTIONS]]
    with a.messages.stream(
        model="m", max_tokens=700, messages=FRANCE, tools=theirs, tool_choice={"type": "tool", "name": "weather"}
    ) as stream:
        said = stream.get_final_message()
    (use,) = [block for block in said.content if block.type == "tool_use"]
    assert said.stop_reason == "tool_use" and use.name == "weather" and is_weather(use.input)


def test_a_thought_within_its_budget(o):
    for budget in (0, 5):
        done = o.chat.completions.create(
            model="m", messages=FRANCE, max_tokens=60, extra_body={"thinking_token_budget": budget}, temperature=0
        )
        assert done.usage.completion_tokens_details.reasoning_tokens <= budget + 1  # and the token that ends it
        assert done.choices[0].message.content


def test_json_schema(o):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for effort in ("none", "low"):
        done = o.chat.completions.create(
            model="m", messages=FRANCE, response_format=form, temperature=0, reasoning_effort=effort
        )
        value = json.loads(done.choices[0].message.content)
        assert value.keys() == {"city", "n"} and value["city"] in ("Paris", "Rome") and 1 <= value["n"] <= 9
    with pytest.raises(openai.BadRequestError):
        form["json_schema"]["schema"] = {"type": "wizardry"}
        o.chat.completions.create(model="m", messages=FRANCE, response_format=form)


def test_grammars_end(o):
    """An unsure model wrote white space until its limit."""

    def closed(value):
        return {"type": "object", "properties": {"ok": value}, "required": ["ok"], "additionalProperties": False}

    for value in (closed({"type": "boolean"}), {"oneOf": [{"const": "a"}, {"const": 2}]}):
        form = {"type": "json_object", "schema": closed(value)}
        done = o.chat.completions.create(
            model="m", messages=FRANCE, response_format=form, temperature=0, reasoning_effort="none", max_tokens=60
        )
        assert done.choices[0].finish_reason == "stop", done.choices[0].message.content[-80:]
        assert json.loads(done.choices[0].message.content)["ok"] in ("a", 2, {"ok": True}, {"ok": False})
    for extra, texts in (
        ({"guided_choice": ["red", "green"]}, ("red", "green")),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, {f"{n:03}" for n in range(1000)}),
        ({"grammar": 'root ::= "x" "y"'}, ("xy",)),
    ):
        raw = o.completions.create(model="m", prompt="A colour: ", temperature=0, max_tokens=20, extra_body=extra)
        assert raw.choices[0].text in texts
        chat = o.chat.completions.create(model="m", messages=FRANCE, temperature=0, extra_body=extra)
        assert chat.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="grammar: "):
        o.completions.create(model="m", prompt="x", extra_body={"grammar": "root ::= nothing"})


def test_logprobs(o):
    done = o.chat.completions.create(
        model="m", messages=FRANCE, temperature=0, reasoning_effort="none", logprobs=True, top_logprobs=3
    )
    tokens = done.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == done.choices[0].message.content
    assert all(t.top_logprobs[0].bytes == t.bytes and t.logprob == t.top_logprobs[0].logprob <= 0 for t in tokens)


def test_a_port_in_use_is_refused_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "ds4jax.serve", f"--port={taken.getsockname()[1]}"]
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 1 and run.stderr.startswith("error: port ") and run.stderr.count("\n") == 1


def test_an_empty_key_is_refused():
    for flags, key in ((["--api_key="], "k"), ([], "")):
        command = [sys.executable, "-m", "ds4jax.serve", *flags]
        env = os.environ | {"PYTHONPATH": str(ROOT), "DS4JAX_API_KEY": key}
        run = subprocess.run(command, capture_output=True, text=True, env=env)
        assert run.returncode == 1 and run.stderr.startswith("error: api_key: ") and run.stderr.count("\n") == 1


@pytest.mark.slow
def test_short_soak(url):
    """scripts/soak.py does it for as long as one likes."""
    report = asyncio.run(soak.soak(url, seconds=5, streams=12, requests=6, seed=1))
    assert report["equal"] >= 10 and report["given up"] >= 5


@pytest.mark.slow
def test_short_chaos():
    """scripts/chaos.py does it for as long as one likes: things fail, it is killed, and no answer is wrong or lost."""
    command = [sys.executable, ROOT / "scripts" / "chaos.py", "--minutes=0.6", "--streams=8", "--kill_every=8"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report["equal"] > 0 and report["kills"] > 0 and report["starts"] == report["kills"] + 1


def test_load_and_reuse(url):
    report: dict[str, Any] = asyncio.run(load.load(url, streams=3, prompt=990, answer=12, long=500))
    assert 6 < report["tokens"] <= 36 and report["decode_tokens_per_second"] > 0
    assert 0 < report["longest_gap_before_seconds"] and 0 < report["longest_gap_beside_long_prompt_seconds"]
    assert report["first_token_seconds"] >= 10 * report["first_token_seconds_again"]
    assert report["computed_again_of_30_changed"] <= 128 + 30


@pytest.mark.slow
def test_sigterm_ends_in_order_and_a_restart_goes_on(tmp_path):
    """What runs may finish; what is cut off is told; a restarted server has the prefix."""
    body = {"prompt": "import numpy as np\n" * 40, "temperature": 0, "stream": True, "max_tokens": 700}
    body |= {"stream_options": {"include_usage": True}}

    def cached(url: str) -> int:
        text = httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 3}, timeout=60).text
        usage = json.loads([line for line in text.splitlines() if line.startswith("data: {")][-1][6:])["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    def terminated(url: str, process: subprocess.Popen, n: int) -> list[str]:
        """The rest of an answer of n tokens during which the server is told to stop."""
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"max_tokens": n}, timeout=60) as response:
            lines = response.iter_lines()
            next(line for line in lines if '"text":"' in line and '"text":""' not in line)
            process.send_signal(signal.SIGTERM)
            rest = list(filter(None, lines))
        assert process.wait(30) in (0, -signal.SIGTERM)
        return rest

    with server("--grace=30", f"--kv_dir={tmp_path}") as (url, process):
        assert cached(url) == 0
        assert terminated(url, process, 40)[-1] == "data: [DONE]"
    with server("--grace=0.2", f"--kv_dir={tmp_path}") as (url, process):
        assert cached(url) >= 128
        start = time.monotonic()
        assert "the server is stopping" in terminated(url, process, 700)[-1] and time.monotonic() - start < 15
    assert any(path.suffix == ".kv" for path in tmp_path.iterdir())
