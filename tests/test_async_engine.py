"""The engine: streams equal solo runs, whatever else runs; cancelled ones leave nothing; bad requests are refused."""

import asyncio
import dataclasses
import json
import logging
import random
import re
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from small import CFG, write

from ds4jax.engine import async_engine, compile_cache
from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.engine.form import Begin
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.prefix_cache import PrefixCache
from ds4jax.engine.types import (
    ContextOverflow,
    EngineFailed,
    Finished,
    Overloaded,
    Prefilled,
    Request,
    Sampling,
    Started,
    StepFailed,
    Stopping,
    Token,
    TooMany,
)
from ds4jax.errors import Ds4Error
from ds4jax.io import synthetic
from ds4jax.server.metrics import Metrics
from ds4jax.server.replay import Replay
from ds4jax.settings import Settings

ROOT = Path(__file__).parents[1]
GREEDY = Sampling(temperature=0.0)
TOKENS = np.random.default_rng(5).integers(2, CFG.vocab_size, 700).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def runner(path):
    return ModelRunner.load(Settings(path, ctx=512, numerics="plain"), batch=3)


@pytest.fixture
def engine(runner, tmp_path):
    engine = AsyncEngine(runner, PrefixCache(2 << 30), trace=tmp_path / "trace")
    yield engine
    asyncio.run(engine.close())


def request(n, max_tokens, sampling=GREEDY, start=0, **rest):
    return Request(TOKENS[start : start + n], max_tokens, sampling, stop_ids=frozenset(), **rest)


async def collect(engine, request):
    return [event async for event in engine.generate(request)]


def ids(events):
    return [event.id for event in events if isinstance(event, Token)]


def test_events_in_order(engine):
    events = asyncio.run(collect(engine, request(300, 3)))
    assert events[0] == Started(0, 300)
    done = [event.done for event in events if isinstance(event, Prefilled)]
    assert done == sorted(set(done)) and done[-1] == 300 and {e.total for e in events[1 : len(done) + 1]} == {300}
    assert [type(event) for event in events[len(done) + 1 :]] == [Token] * 3 + [Finished]
    assert events[-1] == Finished("length")


def test_streams_together_equal_each_alone_with_company_that_comes_and_goes(engine):
    rng = random.Random(7)
    params = [GREEDY, Sampling(seed=4), Sampling(temperature=0.6, top_k=20, seed=9)]
    jobs = [request(rng.randrange(1, 300), rng.randrange(1, 40), rng.choice(params), i * 20) for i in range(16)]
    alone = [ids(asyncio.run(collect(engine, job))) for job in jobs]

    async def leave_early(job, events):
        seen = []
        async for event in engine.generate(job):
            seen.append(event)
            if len(seen) >= events:
                break
        return ids(seen)

    async def together():
        leaving = [i for i in range(16) if i % 3 == 0]
        tasks = [leave_early(job, 1 + i % 7) if i in leaving else collect(engine, job) for i, job in enumerate(jobs)]
        return await asyncio.gather(*tasks)

    for i, (expected, found) in enumerate(zip(alone, asyncio.run(together()), strict=True)):
        found = found if i % 3 == 0 else ids(found)
        assert found == expected[: len(found)] and (i % 3 == 0 or len(found) == len(expected))


def test_a_stream_that_is_cancelled_leaves_nothing(engine):
    async def main():
        streams = [engine.submit(request(200, 300)) for _ in range(8)]  # three run, five wait
        await anext(streams[0])
        for stream in streams:
            await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(streams[0])
        return await collect(engine, request(5, 2))

    assert asyncio.run(main())[-1] == Finished("length")
    metrics = engine.metrics()
    assert metrics["waiting"] == metrics["prefilling"] == metrics["decoding"] == 0
    assert (metrics["cancelled"], metrics["finished"]) == (8, 1)


def test_an_end_token_is_reported(engine):
    free_run = ids(asyncio.run(collect(engine, request(9, 12))))
    end = free_run[5]
    events = asyncio.run(collect(engine, Request(TOKENS[:9], 12, GREEDY, stop_ids=frozenset([end]))))
    assert ids(events) == free_run[: free_run.index(end) + 1] and events[-1] == Finished("stop")


def test_an_answer_ends_where_the_context_does(engine):
    events = asyncio.run(collect(engine, request(507, 99)))
    assert len(ids(events)) == 5 and events[-1] == Finished("length")


def test_decoding_goes_on_during_a_long_prefill(engine):
    async def main():
        short = engine.submit(request(10, 400))
        while not isinstance(await anext(short), Token):
            pass
        chunks = [e async for e in engine.generate(request(500, 1, start=100)) if isinstance(e, Prefilled)]
        n, seen = len(chunks), engine.metrics()["generated_tokens"]
        await short.aclose()
        return n, seen

    chunks, tokens = asyncio.run(main())
    assert chunks >= 4 and tokens >= chunks


def test_an_answer_waits_for_a_chunk_or_for_a_snapshot(engine, runner, monkeypatch):
    """Not for both; and a prompt given up when a snapshot of it is due takes that along."""
    work = []

    def log(name):
        function = getattr(runner, name)
        monkeypatch.setattr(runner, name, lambda *args: work.append(name) or function(*args))

    def pieces(*args):
        for planes in take(*args):
            work.append("take")
            yield planes

    for name in ("prefill", "decode_block"):
        log(name)
    take = runner.take
    monkeypatch.setattr(runner, "take", pieces)

    async def main():
        answer = engine.submit(request(5, 400))
        while not isinstance(await anext(answer), Token):
            pass
        await collect(engine, request(450, 1, start=100))
        steps = " ".join(work).split("decode_block")[1:]
        given_up = engine.submit(request(450, 1, start=200))
        while not isinstance(await anext(given_up), Prefilled):
            pass
        await given_up.aclose()
        await answer.aclose()
        await collect(engine, request(5, 1))
        return [step.split() for step in steps]

    steps = asyncio.run(main())
    assert ["prefill"] in steps and ["take"] in steps and all(len(step) <= 1 for step in steps)
    assert not engine._engine._reuse.busy and not len(engine._engine)


@pytest.mark.parametrize(
    "tokens, max_tokens, kind, problem",
    [
        ([1] * 512, 1, ContextOverflow, r"prompt: found 512 tokens, expected at most 511 \(ctx is 512\)"),
        ([], 1, Ds4Error, "prompt: found 0 tokens"),
        ([1, CFG.vocab_size], 1, Ds4Error, f"found token id {CFG.vocab_size}"),
        ([1], -1, Ds4Error, "max_tokens: found -1"),
    ],
)
def test_requests_that_cannot_run(engine, tokens, max_tokens, kind, problem):
    with pytest.raises(kind, match=problem):
        asyncio.run(collect(engine, Request(tokens, max_tokens, GREEDY)))


def test_too_many_requests_are_refused(runner):
    engine = AsyncEngine(runner, PrefixCache(2 << 30), max_waiting=2)

    async def main():
        streams = [engine.submit(request(100, 400)) for _ in range(9)]
        with pytest.raises(Overloaded, match="2 requests are waiting"):
            await anext(streams[-1])
        await engine.close()
        with pytest.raises(Stopping):
            async for _ in streams[0]:
                pass

    asyncio.run(main())


def test_a_client_with_too_many_waiting_is_refused_and_others_are_not(runner):
    engine = AsyncEngine(runner, PrefixCache(2 << 30), waiting_per_client=2)

    async def main():
        streams = [engine.submit(request(100, 300, client="ann")) for _ in range(9)]
        for stream in streams[5:]:  # three have slots and two wait
            with pytest.raises(TooMany, match="2 requests of this key are waiting already"):
                await anext(stream)
        other = engine.submit(request(50, 3, client="bob"))
        for stream in streams:
            stream.cancel()
        assert len([event async for event in other if isinstance(event, Token)]) == 3
        await engine.close()

    asyncio.run(main())


def test_closing_ends_though_a_step_hangs(runner, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    engine, release = AsyncEngine(runner, PrefixCache(2 << 30)), threading.Event()

    async def main():
        engine.submit(request(9, 3))
        await asyncio.sleep(0.2)
        await asyncio.wait_for(engine.close(grace=0.1), 5)

    with monkeypatch.context() as patch:
        patch.setattr(async_engine, "CLOSING", 0.2)
        patch.setattr(runner, "prefill", lambda *args: release.wait() and sys.exit())
        asyncio.run(main())
        release.set()
        engine._thread.join()
    runner.reset()


def test_closing_with_grace_lets_answers_end(runner):
    engine = AsyncEngine(runner, PrefixCache(2 << 30))

    async def main():
        stream = engine.submit(request(10, 20))
        await anext(stream)
        await engine.close(grace=60)
        with pytest.raises(Stopping):
            await anext(engine.submit(request(1, 1)))
        return [event async for event in stream]

    events = asyncio.run(main())
    assert len(ids(events)) == 20 and events[-1] == Finished("length")


def test_a_failure_reaches_every_stream(runner, monkeypatch):
    engine = AsyncEngine(runner, PrefixCache(2 << 30))

    def fail(*_):
        raise RuntimeError("no device")

    async def main():
        monkeypatch.setattr(runner, "decode_block", fail)
        streams = [engine.submit(request(5, 5)) for _ in range(5)]
        for stream in [*streams, engine.submit(request(5, 5))]:
            with pytest.raises(StepFailed, match="goes on: RuntimeError"):
                async for _ in stream:
                    pass
        monkeypatch.undo()
        assert len(ids(await collect(engine, request(5, 5)))) == 5
        await engine.close()

    asyncio.run(main())


def test_a_failure_while_closing_reaches_its_stream(runner, monkeypatch):
    engine = AsyncEngine(runner, PrefixCache(2 << 30))

    def fail(*_):
        raise RuntimeError("no device")

    async def main():
        stream = engine.submit(request(100, 400))
        while not isinstance(await anext(stream), Token) or engine.metrics()["generated_tokens"] < 30:
            pass
        monkeypatch.setattr(runner, "take", fail)
        await engine.close()
        with pytest.raises(EngineFailed, match="no device"):
            async for _ in stream:
                pass

    asyncio.run(main())


def test_running_sequences_use_the_cache(engine):
    async def main():
        stream = engine.submit(request(100, 400))
        while not isinstance(await anext(stream), Token):
            pass
        busy = engine.metrics()
        assert (busy["running"], busy["waiting"]) == (1, 0)
        assert 100 * 100 / (3 * 512) <= busy["cache_use_percent"] < 100
        assert [seq is None for seq in engine.slots()] == [False, True, True]
        stream.cancel()

    asyncio.run(main())


def test_the_dashboard_names_metrics_that_there_are(engine):
    shown = set(re.findall(r"\b(?:ds4jax|process)_\w+", (ROOT / "docs/grafana.json").read_text()))
    metrics = Metrics(engine, Replay())
    metrics.request("/v1/chat/completions", 200)
    metrics._successes.labels("stop")
    text = metrics.text().decode()
    assert len(shown) > 20 and not [name for name in shown if not re.search(rf"^{name}[ {{]", text, re.MULTILINE)]
    gauges = re.findall(r"^# TYPE (\S+) gauge$", text, re.MULTILINE)
    assert gauges and not [name for name in gauges if name.endswith("_count")]


def test_metrics_and_trace(runner, tmp_path):
    engine = AsyncEngine(runner, PrefixCache(2 << 30), trace=tmp_path / "trace")
    before = engine.metrics()
    for _ in range(2):
        asyncio.run(collect(engine, request(9, 4)))
    after = engine.metrics()
    assert after["requests"] == after["finished"] == 2
    times = {name: (sum(found.counts), found.total) for name, found in after["histograms"].items()}
    assert times["time_to_first_token_seconds"][0] == times["request_queue_time_seconds"][0] == 2
    assert times["inter_token_latency_seconds"][0] == 2 * 3  # behind the first token
    assert 0 < times["request_queue_time_seconds"][1] < times["time_to_first_token_seconds"][1]
    assert times["inter_token_latency_seconds"][1] > 0
    assert after["prompt_tokens"] == 18 and after["generated_tokens"] == 8
    assert after["decode_tokens"] - before["decode_tokens"] == 6
    asyncio.run(engine.close())
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert [(x["reason"], x["prompt_tokens"], x["generated_tokens"]) for x in lines] == [("length", 9, 4)] * 2
    assert all(0 <= x["queued_seconds"] <= x["first_token_seconds"] <= x["seconds"] for x in lines)


# ---- what requests change in the logits ------------------------------------------------------------------------------
def test_log_probabilities_beside_the_same_tokens(engine):
    plain = [Sampling(seed=3), GREEDY]
    free = [ids(asyncio.run(collect(engine, request(40, 8, params)))) for params in plain]

    async def main():
        return await asyncio.gather(
            *(collect(engine, request(40, 8, params, logprobs=n)) for n, params in enumerate(plain, 2))
        )

    for n, events, expected in zip((2, 3), asyncio.run(main()), free, strict=True):
        tokens = [event for event in events if isinstance(event, Token)]
        assert [token.id for token in tokens] == expected and {len(token.top) for token in tokens} == {n}
        assert all(token.logprob == dict(token.top).get(token.id, token.logprob) for token in tokens)
        assert all(token.logprob is not None and token.logprob < 0 for token in tokens)
        assert n == 2 or all(token.top[0][0] == token.id for token in tokens)


def test_edits_apply_from_the_first_token_to_the_last(engine):
    always = Sampling(temperature=0.0, logit_bias=((77, 1000.0),))
    assert ids(asyncio.run(collect(engine, request(20, 5, always)))) == [77] * 5
    never_twice = Sampling(temperature=0.0, logit_bias=((77, 1000.0),), presence_penalty=1000.0)
    assert ids(asyncio.run(collect(engine, request(20, 5, never_twice)))).count(77) == 1
    assert ids(asyncio.run(collect(engine, request(200, 5, always)))) == [77] * 5
    assert ids(asyncio.run(collect(engine, request(200, 5, always)))) == [77] * 5  # from the kept logits, too


def test_an_answer_in_a_schema(engine):
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    grammar = engine.grammar(schema, Begin())

    async def main():
        answers = [Request(TOKENS[:n], 60, Sampling(seed=n, min_p=0.0), grammar=grammar) for n in (10, 20, 30, 200)]
        return await asyncio.gather(*(collect(engine, answer) for answer in answers), collect(engine, request(9, 60)))

    *answers, free = asyncio.run(main())
    for events in answers:
        text = engine.tokenizer.decode(ids(events)[:-1])
        assert events[-1] == Finished("length") or json.loads(text)["n"] in (1, 22), text
    assert sum(events[-1] == Finished("stop") for events in answers) >= 3
    assert ids(free) == ids(asyncio.run(collect(engine, request(9, 60))))


@pytest.mark.parametrize(
    "rest, problem",
    [
        ({"logprobs": 21}, "logprobs: found 21, expected 0 to 20"),
        ({"sampling": Sampling(logit_bias=((384, 1.0),))}, "logit_bias: found token id 384, expected 0 to 383"),
    ],
)
def test_edits_that_cannot_be(engine, rest, problem):
    with pytest.raises(Ds4Error, match=problem):
        asyncio.run(collect(engine, Request(**{"tokens": [1], "max_tokens": 1, "sampling": GREEDY} | rest)))


# ---- opening ---------------------------------------------------------------------------------------------------------
def test_nothing_is_compiled_once_it_is_open(path, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(compile_cache, "keep_compilations", lambda: None)
    settings = Settings(path, ctx=2048, numerics="plain", prefill_chunk=128)
    engine = AsyncEngine.open(settings, max_seqs=2, kv_dir=tmp_path / "kv", kv_budget_bytes=1 << 28)

    async def main():
        prompts = [TOKENS[:n] for n in (1, 33, 140, 500)] + [TOKENS * 2]
        for tokens in [*prompts, *prompts]:
            yield await collect(engine, Request(tokens, 3, Sampling(seed=1), stop_ids=frozenset(), logprobs=1))

    async def every():
        return [events async for events in main()]

    jax.config.update("jax_log_compiles", True)
    try:
        found = asyncio.run(every())
    finally:
        jax.config.update("jax_log_compiles", False)
        asyncio.run(engine.close())
    assert "Compiling" not in caplog.text
    assert [events[0].cached_tokens for events in found[5:]] == [0, 0, 140, 500, 1400]
    assert engine.metrics()["disk_prefixes"] > 0
    with pytest.raises(Stopping):
        asyncio.run(collect(engine, request(1, 1)))


def test_a_folder_in_use_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelRunner, "compile", lambda *_: None)
    settings = Settings(path, ctx=64, numerics="plain")
    engine = AsyncEngine.open(settings, kv_dir=tmp_path)
    with pytest.raises(Ds4Error, match="in use by another process"):
        AsyncEngine.open(settings, kv_dir=tmp_path)
    asyncio.run(engine.close())
    engine = AsyncEngine.open(settings, kv_dir=tmp_path)
    asyncio.run(engine.close())


def test_a_model_of_random_weights_answers(path, monkeypatch):
    monkeypatch.setattr(ModelRunner, "compile", lambda *_: None)
    monkeypatch.setitem(synthetic.SHAPES, "small", dataclasses.replace(CFG, vocab_size=400))
    engine = AsyncEngine.open(Settings(path, ctx=64, numerics="plain", prefill_chunk=32), synthetic="small")
    events = asyncio.run(collect(engine, Request(engine.tokenizer.encode_raw("Hi"), 3, GREEDY)))
    assert engine.model_name == "synthetic-small" and engine.tokenizer.vocab_size == 400
    assert engine.tokenizer.decode([399]) == "<unused 399>" and isinstance(events[-1], Finished)
    asyncio.run(engine.close())
