"""2,000 malformed or hostile requests: an error of the right shape, never a failure, and the server serves on."""

from __future__ import annotations

import copy
import json
import random
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_engine import CALL, FakeEngine, serving

from ds4jax.io.tokenizer import Special
from ds4jax.server.app import Options

TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
CALLS = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": "y"}'}}]
# Bodies that are in order, with most of what each API knows.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "t"}]},
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": CALLS},
            {"role": "tool", "tool_call_id": "call_1", "content": "y"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": "auto",
        "thinking": {"type": "enabled"},
        "reasoning_effort": "high",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["a", "b"],
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
    },
    "/v1/completions": {"prompt": "p", "max_tokens": 5, "temperature": 0, "logprobs": 1, "stop": "x", "stream": False},
    "/v1/messages": {
        "model": "m",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "u"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "r", "signature": "s"},
                    {"type": "text", "text": "t"},
                    {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": "y"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "y"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "low"},
        "stop_sequences": ["a"],
        "stream": True,
    },
    "/v1/responses": {
        "model": "m",
        "instructions": "i",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "t"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]},
            {"type": "message", "role": "assistant", "content": "a"},
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}", "status": "completed"},
            {"type": "function_call_output", "call_id": "call_1", "output": "y"},
        ],
        "tools": [{"type": "function", **TOOL}, {"type": "custom", "name": "g"}],
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "text"}},
        "max_output_tokens": 5,
        "stream": True,
    },
}
GOOD["/v1/messages/count_tokens"] = {key: GOOD["/v1/messages"][key] for key in ("system", "messages", "tools")}

# What is never right, whatever the API, by the name of the field.
WRONG: dict[str, list[Any]] = {
    "messages": [None, 1, "x", {}, [], [1], [[]], [{}], [{"role": "user"}], [{"role": "user", "content": 1}],
                 [{"role": "wizard", "content": "x"}], [{"role": None, "content": "x"}],
                 [{"role": "user", "content": [{"type": 1}]}], [{"role": "user", "content": [{"type": "text"}]}]],
    "input": [None, 1, {}, [], [1], [{}], [{"type": "wizardry"}], [{"type": "function_call"}],
              [{"type": "item_reference", "id": "x"}], [{"type": "item_reference", "id": {}}],
              [{"role": "user", "content": [{"type": "wizardry"}]}], [{"role": "user", "content": "x", "status": 1}]],
    "prompt": [None, 1, {}, [], [["a"]], ["a", 1], [-1], [10**9], [1.5], [True], [[1], []]],
    "tools": [1, "x", {}, [1], [{}], [{"type": "function"}], [{"type": "function", "name": 1}], [{"type": "x"}]],
    "tool_choice": [1, [], "sometimes", {}, {"type": "sometimes"}, {"type": "tool"}, {"type": "function"}],
    "stop": [1, {}, [1], [""], "", ["a"] * 99, "x" * 9999],
    "stop_sequences": [1, {}, [1], [""], ["a"] * 99],
    "temperature": [-1, "1", [], True, 10**400],
    "top_p": [-0.1, 2, "1", {}, False],
    "top_k": [-2, 1.5, "1", 2**40],
    "min_p": [-1, 2, "x"],
    "presence_penalty": [-3, 3, "x"],
    "frequency_penalty": [-3, "x", {}],
    "repetition_penalty": [0, -1, 1e9, True],
    "seed": ["x", 1.5, []],
    "max_tokens": [-2, 1.5, "9", [], True],
    "max_completion_tokens": [0, -5, "x"],
    "max_output_tokens": [0, -2, "x", 2.5],
    "stream": [1, "true", {}, []],
    "stream_options": [1, "x", [], {"include_usage": "yes"}],
    "model": [1, [], {}, True],
    "n": [0, 129, "1", -1],
    "logprobs": ["x", [], -1, 99, 1.5],
    "top_logprobs": [-1, 21, "x", 1.5],
    "logit_bias": [1, [], "x", {"x": 1}, {"-1": 1}, {"1": "x"}, {"1": 101}, {"1": None}, {"9" * 50: 1}, {"٣": 1}],
    "thinking": [1, "on", [], {}, {"type": "x"}, {"type": 1}],
    "reasoning_effort": [1, "extreme", [], {}],
    "reasoning": [1, "x", [], {"effort": "x"}, {"effort": 1}, {"summary": 1}],
    "output_config": [1, "x", [], {"effort": "x"}, {"format": 1}, {"format": {"type": "x"}}],
    "response_format": [1, "json", [], {}, {"type": "x"}, {"type": "json_schema"},
                        {"type": "json_schema", "json_schema": {"schema": 1}}],
    "text": [1, "x", [], {"format": {}}, {"format": {"type": "json_schema"}}],
    "instructions": [1, [], {}],
    "system": [1, {}, [1], [{}], [{"type": "text"}]],
    "suffix": ["x", 1],
    "echo": ["x", 1],
    "best_of": [2, "x"],
    "store": [1, "x"],
    "previous_response_id": ["x", 1],
    "conversation": ["x", {}],
    "background": [True],
    "continue_final_message": [True, 1, "x"],
    "add_generation_prompt": [False, 1, "x", []],
}  # fmt: skip
KNOWN = {
    "/v1/chat/completions": "messages tools tool_choice stop temperature top_p top_k min_p seed max_tokens "
    "max_completion_tokens stream stream_options model n top_logprobs logit_bias thinking reasoning_effort "
    "response_format presence_penalty frequency_penalty repetition_penalty continue_final_message "
    "add_generation_prompt",
    "/v1/completions": "prompt stop temperature top_p top_k min_p seed max_tokens stream stream_options model n "
    "logprobs logit_bias suffix echo best_of",
    "/v1/messages": "messages tools tool_choice stop_sequences temperature top_p top_k max_tokens stream model "
    "thinking output_config system",
    "/v1/messages/count_tokens": "messages tools tool_choice thinking output_config system",
    "/v1/responses": "input tools tool_choice temperature top_p max_output_tokens stream model reasoning text "
    "instructions previous_response_id conversation background store",
}
JUNK = [
    None, True, 0, -1, 1.5, 10**30, "", "x", "\x00", "\ud800", "🦙" * 50, [], {}, [[]], {"": {}}, {"type": "text"},
    CALL, {"role": "user", "content": "x"}, "x" * 5000, [None] * 50, *(special.value for special in Special),
]  # fmt: skip


def wrong_values(rng: random.Random) -> tuple[str, bytes]:
    path = rng.choice(list(KNOWN))
    key = rng.choice(KNOWN[path].split())
    return path, json.dumps(GOOD[path] | {key: rng.choice(WRONG[key])}).encode()


def bad_json(rng: random.Random) -> tuple[str, bytes]:
    path = rng.choice(list(GOOD))
    body = json.dumps(GOOD[path]).encode()
    cut = body[: rng.randrange(len(body))]
    n = rng.choice((257, 5000, 200_000))
    return path, rng.choice(
        (
            cut,
            body + b"}",
            body[:-1] + b', "x": NaN}',
            body[:-1] + b', "x": 1e999}',
            body[:-1] + b', "x": "\xff"}',
            body[:-1] + b', "x": ' + b"[" * n + b"]" * n + b"}",
            body[:-1] + b', "x": ' + b'{"":' * n + b"1" + b"}" * n + b"}",
            body[:-1] + b', "x": ' + b"9" * 5000 + b"}",
            rng.choice((b"[]", b"1", b'"x"', b"null", b"", b"\x00", b"\xef\xbb\xbf{}", body.decode().encode("utf-16"))),
            rng.randbytes(rng.randrange(1, 300)),
        )
    )


def changed(rng: random.Random) -> tuple[str, bytes]:
    """A good body with one or two of its nodes replaced or gone: it may still be one."""
    path = rng.choice(list(GOOD))
    body = copy.deepcopy(GOOD[path])
    for _ in range(rng.randint(1, 2)):
        places = list(_places(body))
        node, key = rng.choice(places)
        if rng.random() < 0.3:
            del node[key]
        else:
            node[key] = copy.deepcopy(rng.choice(JUNK))
    return path, json.dumps(body).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def check(path: str, response: httpx.Response, statuses: range | tuple[int, ...]) -> None:
    assert response.status_code in statuses, (path, response.request.content[:2000], response.text)
    if response.status_code != 200:
        error = response.json()
        if path.startswith("/v1/messages"):
            assert error.keys() == {"type", "error"} and error["type"] == "error"
            assert error["error"].keys() == {"type", "message"}
        else:
            assert error.keys() == {"error"} and error["error"].keys() == {"message", "type", "param", "code"}
        assert error["error"]["type"] and isinstance(error["error"]["message"], str)
        assert len(error["error"]["message"]) < 1000 and "Traceback" not in response.text


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[httpx.Client, FakeEngine]]:
    engine = FakeEngine(lambda _: f"r</think>Hello {CALL}", ctx=8192)
    with serving(engine, Options(max_body=2 << 20)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, engine


@pytest.mark.parametrize("path", GOOD)
def test_the_good_ones_are_good(server, path):
    client, _ = server
    check(path, client.post(path, json=GOOD[path]), (200,))


@pytest.mark.parametrize(
    ("make", "n", "statuses"), [(wrong_values, 800, (400,)), (bad_json, 400, (400, 413)), (changed, 800, (200, 400))]
)
def test_two_thousand_hostile_requests(server, make, n, statuses):
    client, engine = server
    rng = random.Random(make.__name__)
    for _ in range(n):
        path, body = make(rng)
        check(path, client.post(path, content=body), statuses)
    for path in GOOD:
        check(path, client.post(path, json=GOOD[path]), (200,))
    assert not engine.running


def test_wrong_paths_methods_and_sizes(server):
    client, _ = server
    rng = random.Random(0)
    for _ in range(100):
        method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "POST"))
        path = rng.choice((*GOOD, "/v1/nothing", "/v1/messages/x", "/v1/chat", "/%00", "/v1/models/../x", "//"))
        response = client.request(method, path, content=b"{" * rng.randrange(3))
        check(urlsplit(str(response.url)).path, response, range(400, 500))
    for path in GOOD:
        check(path, client.post(path, content=b" " * (3 << 20)), (413,))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_hardly_http(server):
    client, _ = server
    host, port = client.base_url.host, client.base_url.port
    head = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\n"
    for raw in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GARBAGE\r\n\r\n",
        head + b"Content-Length: -1\r\n\r\n{}",
        head + b"Content-Length: 10\r\n\r\n{",  # and gone
        head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        head + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        head + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ):
        with socket.create_connection((host, port), timeout=5) as s:
            s.sendall(raw)
            s.settimeout(0.2)
            try:
                s.recv(100)
            except OSError:
                pass
    check("/v1/messages", client.post("/v1/messages", json=GOOD["/v1/messages"]), (200,))
