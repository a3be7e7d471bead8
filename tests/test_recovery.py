"""An exception in a step ends the requests that it belongs to. The engine goes on, and its answers are as before."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading

import pytest
from small import write
from test_async_engine import GREEDY, collect, ids, request

from ds4jax.engine import async_engine
from ds4jax.engine.async_engine import MAX_FAILURES, AsyncEngine
from ds4jax.engine.counters import Counters
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.prefix_cache import PrefixCache
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.types import EngineFailed, Sampling, StepFailed, Token
from ds4jax.errors import Ds4Error
from ds4jax.server.metrics import Metrics
from ds4jax.server.replay import Replay
from ds4jax.settings import Settings

JOBS = [request(n, 12, GREEDY, start=40 * i) for i, n in enumerate((300, 20, 29, 38, 47))]  # three run, two wait


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    path = str(write(tmp_path_factory.mktemp("model")))
    return ModelRunner.load(Settings(path, ctx=512, numerics="plain"), batch=3)


@pytest.fixture(scope="module")
def alone(runner):
    return asyncio.run(answers(AsyncEngine(runner, PrefixCache(0))))


async def answers(engine):
    """The ids of the answer to each of JOBS, all at once, or the error."""
    found = await asyncio.gather(*(collect(engine, job) for job in JOBS), return_exceptions=True)
    out = [x if isinstance(x, BaseException) else ids(x) for x in found]
    if not engine.failed:
        await engine.close()
    return out


class Faults:
    """Makes the calls of a method fail whose numbers are given, from 0."""

    def __init__(self, monkeypatch, target, name, when, after=False):
        self.real, self.when, self.calls, self.after = getattr(target, name), set(when), 0, after
        monkeypatch.setattr(target, name, self)

    def __call__(self, *args, **kwargs):
        now, self.calls = self.calls in self.when, self.calls + 1
        if now and not self.after:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        result = self.real(*args, **kwargs)
        if now:  # what was donated is lost
            raise RuntimeError("INTERNAL: the device was busy")
        return result


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "when"),
    [("prefill", {0}), ("prefill", {2, 3}), ("decode_block", {0}), ("decode_block", {1, 2}), ("take", {0})],
)
def test_others_are_answered_as_ever(runner, alone, monkeypatch, name, when, after, caplog):
    caplog.set_level(logging.CRITICAL)
    engine = AsyncEngine(runner, PrefixCache(2 << 30))
    with monkeypatch.context() as patch:
        faults = Faults(patch, runner, name, when, after)
        found = asyncio.run(answers(engine))
        assert faults.calls > max(when)
    failed = [x for x in found if isinstance(x, StepFailed)]
    assert all(x == y for x, y in zip(found, alone, strict=True) if x not in failed)
    assert 1 <= len(failed) <= 5 and "RESOURCE" not in str(failed[0])
    assert engine.metrics()["failed_steps"] == len(when) and engine.metrics()["failed"] == len(failed)
    assert asyncio.run(answers(AsyncEngine(runner, PrefixCache(0)))) == alone


def test_edited_logits_fail_alone(runner, alone, monkeypatch):
    """The sequences of the step fail; the next ones do not."""
    engine = AsyncEngine(runner, PrefixCache(0))
    with monkeypatch.context() as patch:
        Faults(patch, runner, "choose", {1})
        with pytest.raises(StepFailed):
            asyncio.run(collect(engine, request(20, 9, Sampling(temperature=0.0, logit_bias=((5, 1.0),)))))
    assert asyncio.run(answers(engine)) == alone


def test_a_prefix_that_cannot_be_read_is_computed(runner, alone, monkeypatch):
    class Broken:
        def done(self):
            return True

        def result(self):
            raise OSError(5, "Input/output error")

        def add_done_callback(self, f):
            f(self)

    cache = PrefixCache(2 << 30)
    monkeypatch.setattr(cache, "fetch", lambda key, have: Broken())
    assert asyncio.run(answers(AsyncEngine(runner, cache))) == alone


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), SystemExit(3)])
def test_what_does_not_end_ends_the_engine(runner, monkeypatch, error):
    """Every waiter is told, whatever the exception."""
    engine = AsyncEngine(runner, PrefixCache(0))

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(runner, "prefill", fail)
        jobs = [request(9, 3, start=9 * i) for i in range(3 * MAX_FAILURES + 3)]  # each step takes three with it

        async def every():
            return await asyncio.gather(*(collect(engine, job) for job in jobs), return_exceptions=True)

        found = asyncio.run(every())
    assert all(isinstance(x, StepFailed | EngineFailed) for x in found) and isinstance(found[-1], EngineFailed)
    assert engine.failed
    with pytest.raises(EngineFailed):
        asyncio.run(collect(engine, request(9, 3)))
    runner.reset()


def test_a_full_disk_under_the_trace_loses_lines_only(runner, alone):
    engine = AsyncEngine(runner, PrefixCache(0), trace="/dev/full")
    assert asyncio.run(answers(engine)) == alone
    assert engine.metrics()["lost_trace_lines"] == len(JOBS)


def test_a_trace_that_nobody_reads_stops_nobody(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(Ds4Error, match="trace: .*pipe cannot be written: "):  # and does not wait for a reader
        Counters(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    counters = Counters(pipe)
    seq = Sequence(request(3, 1))
    for _ in range(1000):
        counters.ended(seq, "stop")
    assert 0 < counters.report()["lost_trace_lines"] < 1000
    for line in os.read(reader, 1 << 16).splitlines():
        assert json.loads(line)["prompt_tokens"] == 3
    counters.close()
    os.close(reader)


def test_the_process_of_a_dead_engine_ends():
    """For a supervisor to start it anew; its clients have been told."""
    program = """
import asyncio, sys, time
sys.path.insert(0, "tests")
from fake_engine import FakeEngine
from ds4jax.server.app import Options
from ds4jax.server.replay import Replay
from ds4jax.tools import serve
engine = FakeEngine(lambda _: "Hi")
engine.failed = False
async def main():
    asyncio.get_running_loop().call_later(0.2, lambda: setattr(engine, "failed", True))
    await serve.serve(engine, Options(), Replay(), serve.bind("127.0.0.1", 0), 1.0)
begun = time.perf_counter()
asyncio.run(main())
assert time.perf_counter() - begun < 8
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True)


def test_a_step_that_hangs_shows(runner, monkeypatch):
    """And its end, too."""
    engine, release, hangs = AsyncEngine(runner, PrefixCache(0)), threading.Event(), threading.Event()
    monkeypatch.setattr(async_engine, "STALLED", 0.2)

    def hang(*args, **kwargs):
        hangs.set()
        release.wait()
        return prefill(*args, **kwargs)

    prefill = runner.prefill
    monkeypatch.setattr(runner, "prefill", hang)

    async def main():
        assert engine.problem == ""
        stream = engine.submit(request(9, 3))
        assert await asyncio.to_thread(hangs.wait, 10) and engine.problem == ""
        monkeypatch.setattr(engine, "_longest_step", 0.0)
        await asyncio.sleep(0.3)
        assert engine.problem.startswith("no step has ended for 0 s") and "release.wait()" in engine.stack()
        text = Metrics(engine, Replay()).text().decode()
        assert "ds4jax_works 0.0" in text and "ds4jax_running" not in text and "ds4jax_requests" in text
        monkeypatch.setattr(engine._engine.runner.steps, "compiling", True)
        assert engine.problem == ""
        monkeypatch.setattr(engine._engine.runner.steps, "compiling", False)
        release.set()
        assert len([event async for event in stream if isinstance(event, Token)]) == 3 and engine.problem == ""
        await engine.close()
        assert engine.problem == "the server is stopping" and engine.stack() == "the thread has ended\n"

    asyncio.run(main())
