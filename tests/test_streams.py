"""Whatever the model answers, each API's stream says the same as its object, and log-probabilities and ids spell it."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
from fake_engine import CALL, TOKENIZER, FakeEngine, ids, serving
from test_server import ANTHROPIC_WEATHER, BROKEN, HI, RESPONSES_WEATHER, WEATHER, sse

PIECES = [
    "word ",
    "é",
    "€",
    "👩‍👩‍👧",
    "\ufeff",
    "\u2028",
    "  ",
    "\n\n",
    "\t",
    "<",
    "<｜DSML｜",
    "</think>",
    "<think>",
    "STOP",
    "ST",
    "{}",
]
PIECES += [CALL, f"\n\n{CALL}", CALL[:-30], CALL.replace("</｜DSML｜tool_calls>", BROKEN + "</｜DSML｜tool_calls>")]


def answer(rng: random.Random) -> str:
    """What the model says: a thought or none, and some of PIECES; perhaps without the token that ends an answer."""
    thought = rng.choice(["", "Hm.</think>", "é</think>", "never ends "])
    return thought + "".join(rng.choices(PIECES, k=rng.randrange(6))) + rng.choice(["", "", "…"])


def stops(rng: random.Random, said: str) -> list[str]:
    """Stop strings: some occur in the answer, also at its end, others only begin to."""
    at = rng.randrange(len(said) + 1)
    some = [said[at : at + rng.randrange(1, 5)], said[-2:], said[-1:] + "!", "STOP", "€"]
    return [text for text in rng.sample(some, rng.randrange(3)) if text]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the parts of a choice in a stream say together, or an object's choice alone; calls without their ids."""
    out: dict[str, Any] = {"text": "", "thought": "", "calls": [], "ids": [], "logprobs": [], "finish": None}
    for part in parts:
        assert out["finish"] is None, "nothing follows the last part"
        said = part.get("delta", part.get("message", part))
        out["text"] += said.get("content", said.get("text")) or ""
        assert said.get("reasoning") == said.get("reasoning_content")
        out["thought"] += said.get("reasoning") or ""
        for call in said.get("tool_calls") or []:
            if "id" in call:
                out["calls"].append(dict(call["function"]))
            else:
                out["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        out["ids"] += part.get("token_ids", [])
        logprobs = part["logprobs"] or {}
        out["logprobs"] += [t["bytes"] for t in logprobs.get("content", [])]
        out["logprobs"] += zip(logprobs.get("tokens", []), logprobs.get("text_offset", []), strict=True)
        out["finish"] = part["finish_reason"]
    # A call that was cut has only its beginning in a stream; such calls are not compared.
    out["calls"] = [call for call in out["calls"] if call["arguments"].endswith("}") and is_json(call["arguments"])]
    return out


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def choices_agree(http, path: str, body: dict[str, Any], said: str) -> None:
    body = body | {"return_token_ids": True}
    whole = http.post(path, json=body)
    events = sse(http.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text)
    if whole.status_code == 500:  # the model ended its turn inside a call
        assert "inside a tool call" in whole.text and events[-1][1]["error"]["message"] in whole.text
        return
    assert whole.status_code == 200, whole.text
    assert events[-1] == (None, "[DONE]") and not events[-2][1]["choices"]
    done, chunks = whole.json(), [data for _, data in events[:-2]]
    assert done["usage"] == events[-2][1]["usage"]
    assert done["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in done["choices"])
    for choice in done["choices"]:
        mine = [c["choices"][0] | c for c in chunks if c["choices"][0]["index"] == choice["index"]]
        a, b = joined([choice]), joined(mine)
        assert a == b, (a, b)
        prompts = [part["prompt_token_ids"] for part in mine if "prompt_token_ids" in part]
        assert prompts == [(choice | done)["prompt_token_ids"]]
        assert a["ids"] == [*ids(said), TOKENIZER.eos_id][: len(a["ids"])]
        if body["logprobs"] is None or body["logprobs"] is False:
            continue
        if path == "/v1/chat/completions":
            check_spelling(a["text"], a["logprobs"], a["calls"])
        else:
            check_spelling(a["text"], [token.encode() for token, _ in a["logprobs"]], [])
            assert all((token + "?").startswith(a["text"][at:][: len(token)]) for token, at in a["logprobs"])


def check_spelling(text: str, tokens: list[Any], calls: list[Any]) -> None:
    """The tokens with log-probabilities spell the text. A stop string may cut the last one; a call ends them."""
    spelled = b"".join(map(bytes, tokens)).decode("utf-8", "replace")
    before = b"".join(map(bytes, tokens[:-1])).decode("utf-8", "ignore")
    assert spelled.startswith(text) and len(before) <= len(text) or calls and text.startswith(spelled), (text, spelled)


def messages_agree(http, body: dict[str, Any]) -> None:
    whole = http.post("/v1/messages", json=body)
    events = sse(http.post("/v1/messages", json=body | {"stream": True}).text)
    if whole.status_code == 500:
        assert events[-1][0] == "error" and events[-1][1] == whole.json()
        return
    assert whole.status_code == 200, whole.text
    blocks: list[dict[str, Any]] = []
    is_open = False
    for name, data in events[1:-2]:
        assert name == data["type"] and (name == "content_block_start") is not is_open
        match name:
            case "content_block_start":
                assert data["index"] == len(blocks)
                blocks.append(data["content_block"] | ({"input": ""} if "input" in data["content_block"] else {}))
                is_open = True
            case "content_block_delta":
                kind, text = data["delta"].values()
                key = kind.removesuffix("_delta").removesuffix("_json")
                blocks[-1][key] += text
            case "content_block_stop":
                is_open = False
    assert [name for name, _ in events[-2:]] == ["message_delta", "message_stop"] and not is_open
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"])
    done, last = whole.json(), events[-2][1]
    assert events[0][1]["message"].keys() == done.keys()
    assert [block | {"id": 0} for block in blocks] == [block | {"id": 0} for block in done["content"]]
    assert last["delta"] == {key: done[key] for key in ("stop_reason", "stop_sequence")}
    assert last["usage"] == done["usage"]


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        changing = {"id", "item_id", "call_id", "created_at", "completed_at"}
        return {key: without_ids(inner) for key, inner in value.items() if key not in changing}
    return [without_ids(inner) for inner in value] if isinstance(value, list) else value


def responses_agree(http, body: dict[str, Any]) -> None:
    whole = http.post("/v1/responses", json=body)
    events = [data for _, data in sse(http.post("/v1/responses", json=body | {"stream": True}).text)]
    assert [data["sequence_number"] for data in events] == list(range(len(events)))
    if whole.status_code == 500:
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["message"] == whole.json()["error"]["message"]
        return
    assert whole.status_code == 200, whole.text
    final = events[-1]["response"]
    assert without_ids(final) == without_ids(whole.json()) and events[-1]["type"] == f"response.{final['status']}"
    for kind, key in (
        ("output_text", "text"),
        ("reasoning_summary_text", "text"),
        ("function_call_arguments", "arguments"),
    ):
        deltas: dict[str, str] = {}
        for data in events:
            if data["type"] == f"response.{kind}.delta":
                deltas[data["item_id"]] = deltas.get(data["item_id"], "") + data["delta"]
        assert deltas == {data["item_id"]: data[key] for data in events if data["type"] == f"response.{kind}.done"}
    for i, item in enumerate(final["output"]):
        (done,) = [data for data in events if data["type"] == "response.output_item.done" and data["output_index"] == i]
        assert done["item"] == item
        if item["type"] == "message":
            (part,) = item["content"]
            spelled = bytes(byte for token in part["logprobs"] for byte in token["bytes"]).decode("utf-8", "replace")
            assert (
                part["text"] == spelled or part["text"].startswith(spelled) and "function_call" in str(final["output"])
            )


def check(http, rng: random.Random, said: str) -> None:
    common: dict[str, Any] = {"min_p": 0.1} if rng.random() < 0.5 else {}
    most = rng.choice([None, rng.randrange(1, len(ids(said)) + 3)])
    thinks = rng.random() < 0.7
    stop, logprobs, n = stops(rng, said), rng.choice([None, 0, 2]), rng.randrange(1, 4)
    effort = {} if thinks else {"effort": "none"}
    several = {"n": n, "stop": stop, "max_tokens": most} | common
    chat = {"messages": HI, "reasoning": effort, "logprobs": logprobs is not None, "top_logprobs": logprobs or None}
    choices_agree(http, "/v1/chat/completions", chat | several | rng.choice([{}, {"tools": [WEATHER]}]), said)
    raw = {"prompt": rng.choice(["a€", ["", "bé"]]), "logprobs": logprobs, "echo": rng.random() < 0.5}
    choices_agree(http, "/v1/completions", raw | several | {"max_tokens": most or 99}, said)
    thinking = {"thinking": {"type": "enabled" if thinks else "disabled"}, "stop_sequences": stop}
    messages_agree(http, {"messages": HI, "max_tokens": most, "tools": [ANTHROPIC_WEATHER]} | thinking | common)
    reasoning = {"reasoning": effort | {"summary": "auto"}, "include": ["message.output_text.logprobs"]}
    responses_agree(http, {"input": "Hi", "max_output_tokens": most, "tools": [RESPONSES_WEATHER]} | reasoning | common)


@pytest.mark.parametrize("seed", [0])
def test_streams_and_objects_agree(seed, rounds=20):
    rng, said = random.Random(seed), [""]
    with serving(FakeEngine(lambda _: said[0])) as url, httpx.Client(base_url=url, timeout=10) as http:
        for _ in range(rounds):
            said[0] = answer(rng)
            check(http, rng, said[0])
