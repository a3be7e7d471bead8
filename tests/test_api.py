"""The text-level Python API, with scripted answers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import CALL, FakeEngine

from ds4jax import Answer, Model, Piece
from ds4jax.errors import Ds4Error

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def script(request) -> str | Exception:
    said = FakeEngine.said(request)
    if "long" in said:
        return "</think>" + "word " * 1000
    if "weather" in said:
        return f"Look.</think>\n\n{CALL}"
    return Ds4Error("broken") if "fail" in said else f"Hm.</think>You said {said}."


@pytest.fixture
def model() -> Iterator[tuple[Model, Any]]:
    engine: Any = FakeEngine(script)
    with Model.of(engine) as model:
        yield model, engine
    assert engine.closed and not engine.running


def test_answers(model):
    m, engine = model
    answer = m.chat("Hi", system="Be brief.", temperature=0.5, seed=7, max_tokens=99)
    assert isinstance(answer, Answer) and str(answer) == answer.text == "You said Hi." and answer.reasoning == "Hm."
    assert (answer.finish, answer.completion_tokens > 5, answer.prompt_tokens > 5) == ("stop", True, True)
    (request,) = engine.requests
    assert (request.sampling.temperature, request.sampling.seed, request.max_tokens) == (0.5, 7, 99)
    assert m.decode(request.tokens).endswith("Be brief.<｜User｜>Hi<｜Assistant｜><think>")
    turns = [{"role": "user", "content": "Hi"}, answer.message, {"role": "user", "content": "And?"}]
    assert m.chat(turns, think="off").text.endswith("You said And?.")
    for _ in range(2):
        m.chat("Hi")
    assert len({request.sampling.seed for request in engine.requests[-2:]}) == 2
    (call,) = m.chat("the weather?", tools=[TOOL]).message["tool_calls"]
    assert call["function"]["name"] == "weather"


def test_log_probabilities_and_raw_prompts(model):
    m, engine = model
    answer = m.chat("Hi", logprobs=2, think="off")
    assert answer.logprobs[0].logprob == -0.5 and len(answer.logprobs[0].top) == 2
    assert sum(len(one.text) for one in answer.logprobs) == len(answer.text)
    assert m.complete([65, 66], max_tokens=3).completion_tokens == 3 and list(engine.requests[-1].tokens) == [65, 66]
    assert m.complete("AB", max_tokens=1).finish == "length" and m.decode(m.encode("é")) == "é"


def test_batches_keep_their_order(model):
    m, _ = model
    assert [answer.text for answer in m.batch(["a", "b", "c"])] == ["You said a.", "You said b.", "You said c."]
    with pytest.raises(Ds4Error, match="broken"):
        m.batch(["a", "fail", "long"])


def test_streams(model):
    m, engine = model
    pieces = list(m.stream("Hi"))
    assert "".join(piece.text for piece in pieces) == "You said Hi." and pieces[0] == Piece(
        reasoning=pieces[0].reasoning
    )
    assert "".join(piece.reasoning for piece in pieces) == "Hm."
    engine._delay = 0.001
    stream = m.stream("long")
    assert next(stream).text
    stream.close()
    m.chat("Hi")
    assert not engine.running
    with pytest.raises(Ds4Error, match="broken"):
        list(m.stream("fail"))


def test_in_an_event_loop(model):
    m, engine = model

    async def both() -> tuple[list[str], str]:
        one, two = await asyncio.gather(m.chat_async("a"), m.chat_async("b"))
        batch = await m.batch_async(["c"])
        text = "".join([piece.text async for piece in m.stream_async("d")])
        return [one.text, two.text, batch[0].text], text

    assert asyncio.run(both()) == (["You said a.", "You said b.", "You said c."], "You said d.")


def test_what_is_wrong_is_said(model):
    m, _ = model
    end = m.tokenizer.vocab_size
    for wrong in -1, end, 10**12:
        with pytest.raises(Ds4Error, match=f"found (token id )?{wrong}, expected 0 to {end - 1}"):
            m.complete([65, wrong])
        with pytest.raises(Ds4Error, match=f"found {wrong}, expected 0 to {end - 1}"):
            m.decode([wrong])
    with pytest.raises(Ds4Error, match="found the argument 'temprature', expected some of"):
        m.chat("Hi", temprature=1)
    with pytest.raises(Ds4Error, match="found the argument 'system', expected some of (?!.*system)"):
        m.complete("Hi", system="Be brief.")
    with pytest.raises(Ds4Error, match="temperature: found -1"):
        m.chat("Hi", temperature=-1)
    with pytest.raises(Ds4Error, match="too long"):
        m.chat("x" * 5000)
    with pytest.raises(Ds4Error, match="think"):
        m.chat("Hi", think="hard")
    m.close()
    with pytest.raises(Ds4Error, match="closed"):
        m.chat("Hi")


def test_the_package_is_cheap_to_import():
    code = "import ds4jax, sys; assert not {'jax', 'numpy', 'starlette'} & set(sys.modules); ds4jax.Model"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError):
        from ds4jax import Modle  # type: ignore # noqa: F401
