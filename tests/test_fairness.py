"""Sequences that are suspended, or whose numbers overflow: their answers and all others are as if alone."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CFG, write

from ds4jax.engine.engine import Engine
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.prefix_cache import PrefixCache
from ds4jax.engine.types import (
    Budget,
    Failed,
    Finished,
    Overloaded,
    Prefilled,
    Request,
    Sampling,
    Scored,
    StepFailed,
    Token,
)
from ds4jax.settings import Settings

SIZES = [32, 128]
TOKENS = np.random.default_rng(5).integers(2, CFG.vocab_size, 900).tolist()


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    path = str(write(tmp_path_factory.mktemp("model")))
    return ModelRunner.load(Settings(path, ctx=512, numerics="plain"), batch=2)


def request(n, max_tokens, start=0, client="", **rest):
    sampling = Sampling(seed=n)
    return Request(TOKENS[start : start + n], max_tokens, sampling, frozenset(), client=client, **rest)


class Run:
    """An engine whose requests come at certain steps, and what each one was told."""

    def __init__(self, runner, cache=None, **limits):
        self.engine, self.events, self.order = Engine(runner, cache, sizes=SIZES, **limits), {}, []

    def add(self, request):
        self.events[request] = events = []

        def emit(event):
            events.append(event)
            if isinstance(event, Finished | Failed):
                self.order.append(request)

        self.engine.add(request, emit)

    def run(self, coming):
        """coming: requests by the step before which they come."""
        step = 0
        while coming or len(self.engine):
            for request in coming.pop(step, ()):
                self.add(request)
            self.engine.step()
            step += 1
        return self

    def until_answering(self, requests):
        """Step until each of some requests has a token."""
        while not all(map(self.ids, requests)):
            self.engine.step()

    def ids(self, request):
        return [event.id for event in self.events[request] if isinstance(event, Token)]

    def count(self, name):
        return self.engine.counters.report()[name]


_ALONE: dict[Request, list[int]] = {}


def alone(runner, request, again=False):
    """The ids of the answer. again: even if they are known."""
    if again or request not in _ALONE:
        _ALONE[request] = Run(runner).run({0: [request]}).ids(request)
    return _ALONE[request]


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_short_prompt_takes_the_slot_of_a_long_one_which_goes_on(runner, cached):
    longs = [request(400, 5, 40 * i) for i in range(3)]
    longs[1] = request(400, 5, 40, prompt_logprobs=0)
    shorts = [request(20, 4, 400), request(30, 4, 450)]
    run = Run(runner, PrefixCache(1 << 30) if cached else None).run({0: longs, 2: shorts[:1], 4: shorts[1:]})
    assert run.count("suspended") >= 2 and set(run.order[:2]) == set(shorts)
    for each in longs + shorts:
        assert run.ids(each) == alone(runner, each)
        done = [event.done for event in run.events[each] if isinstance(event, Prefilled)]
        assert done == sorted(set(done))  # nothing is computed twice
    scored = [token for event in run.events[longs[1]] if isinstance(event, Scored) for token in event.tokens]
    assert [token.id for token in scored] == list(longs[1].tokens[1:])


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_new_client_takes_a_slot_of_one_who_has_two(runner, cached):
    many = [request(9 + i, 200, i, "a") for i in range(3)]
    few = [request(40 + i, 9, i, "b") for i in range(2)]
    run = Run(runner, PrefixCache(1 << 30) if cached else None).run({0: many, 5: few})
    assert run.order[:2] == few and run.count("suspended") == 1
    for each in many + few:
        assert run.ids(each) == alone(runner, each)


def test_a_suspended_sequence_can_be_cancelled_and_the_engine_recovers_with_one(runner):
    many = [request(200 + i, 100, i, "a") for i in range(2)]
    few = request(40, 50, 0, "b")
    run = Run(runner, PrefixCache(1 << 30))

    def suspend():
        """Let `many` run and `few` take a slot; → the sequence that had it."""
        for each in many:
            run.add(each)
        run.until_answering(many)
        run.add(few)
        run.until_answering([few])
        (suspended,) = [seq for seq in run.engine.scheduler if seq.suspended]
        return suspended

    suspended = suspend()
    run.engine.recover(StepFailed("lost"))
    assert len(run.engine) == 1 and suspended in run.engine.scheduler
    run.run({})
    assert run.ids(suspended.request) == alone(runner, suspended.request)
    run.engine.cancel(suspend())
    run.run({})
    assert run.ids(few) == alone(runner, few)


def test_what_a_suspended_prompt_had_computed_is_kept(runner):
    run = Run(runner, cache := PrefixCache(1 << 30))
    longs = [request(500, 5, 40 * i) for i in range(2)]
    run.add(longs[0])
    run.add(longs[1])
    for _ in range(3):
        run.engine.step()
    run.add(request(20, 100, 400))
    while not (found := [seq for seq in run.engine.scheduler if seq.suspended]):
        run.engine.step()
    (suspended,) = found
    run.engine.cancel(suspended)
    found = cache.find(suspended.key)
    assert found is not None and found.length == suspended.computed > 0
    run.run({})
    again = Run(runner, cache).run({0: [suspended.request]})
    assert again.ids(suspended.request) == alone(runner, suspended.request)


def test_a_budget_draws_the_same_tokens_in_blocks_and_one_by_one(runner, monkeypatch):
    job = request(40, 60, budget=Budget(37, 5))
    found = []
    for block in (1, 7, 16):
        monkeypatch.setattr(runner, "block", lambda room, block=block: max(1, min(room, block)))
        found.append(alone(runner, job, again=True))
    assert found[0][37] == 5 and found[0] == found[1] == found[2]


def test_who_waits_too_long_is_told(runner):
    run = Run(runner, patience=0.05)
    jobs = [request(9, 60, i) for i in range(3)]
    for each in jobs:
        run.add(each)
    run.engine.step()
    time.sleep(0.06)
    run.run({})
    (event,) = run.events[jobs[2]]
    assert isinstance(event.error, Overloaded) and "found no place within" in str(event.error)
    assert all(len(run.ids(each)) == 60 for each in jobs[:2])


# ---- logits that are no numbers --------------------------------------------------------------------------------------
def poison(runner, slot):
    """Make every floating-point number of a slot's state NaN."""

    def spoil(x):
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.at[:, slot].set(jnp.nan)

    runner.cache = jax.tree.map(spoil, runner.cache)


@pytest.mark.parametrize("rest", [{}, {"logprobs": 3}])
def test_only_the_sequence_whose_numbers_overflow_fails(runner, rest):
    run = Run(runner, cache := PrefixCache(1 << 30))
    jobs = [request(200, 50, i, **rest) for i in range(2)]
    for each in jobs:
        run.add(each)
    run.until_answering(jobs)
    poison(runner, next(seq.slot for seq in run.engine.scheduler if seq.request is jobs[0]))
    run.run({})
    failed = run.events[jobs[0]][-1]
    assert isinstance(failed, Failed) and isinstance(failed.error, StepFailed) and "finite" in str(failed.error)
    assert all(np.isfinite(event.logprob or 0) for event in run.events[jobs[0]] if isinstance(event, Token))
    assert run.ids(jobs[1]) == alone(runner, jobs[1]) and run.count("not_finite") == 1
    assert cache.find(np.array(jobs[0].tokens, np.uint32).tobytes()) is None  # nothing is kept of it
    again = Run(runner, cache).run({0: jobs})  # what a slot holds does not harm the next sequence
    assert [again.ids(each) for each in jobs] == [alone(runner, each) for each in jobs]


def test_a_prompt_whose_numbers_overflow_leaves_nothing(runner, monkeypatch):
    """Neither of the chunk that did, nor of those before it."""
    jobs = [request(500, 5), request(500, 5, prompt_logprobs=1)]
    for job in jobs:
        cache, prefill, calls = PrefixCache(1 << 30), runner.prefill, []

        def spoiled(*args, prefill=prefill, calls=calls):
            calls.append(args)
            sampled = prefill(*args)
            if len(calls) != 3:
                return sampled
            scores = tuple(x * np.nan if x.dtype == np.float32 else x for x in sampled.scores)
            return dataclasses.replace(sampled, token=sampled.token if scores else -1, scores=scores)

        with monkeypatch.context() as patch:
            patch.setattr(runner, "prefill", spoiled)
            run = Run(runner, cache).run({0: [job]})
        assert isinstance(run.events[job][-1].error, StepFailed) and len(calls) == 3
        assert len(cache) == 0 and run.count("not_finite") == 1
        assert Run(runner, cache).run({0: [job]}).ids(job) == alone(runner, job)
