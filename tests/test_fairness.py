"""Sequences that are suspended, or whose numbers overflow: their answers and all others are as if alone."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CFG, write

from ds4jax.engine.engine import Engine
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.prefix_cache import PrefixCache
from ds4jax.engine.types import Failed, Finished, Overloaded, Prefilled, Request, Sampling, Scored, StepFailed, Token
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

    def ids(self, request):
        return [event.id for event in self.events[request] if isinstance(event, Token)]

    def count(self, name):
        return self.engine.counters.report()[name]


def alone(runner, request):
    return Run(runner).run({0: [request]}).ids(request)


@pytest.mark.parametrize("cached", [False, True])
def test_a_short_prompt_takes_the_slot_of_a_long_one_which_goes_on(runner, cached):
    longs = [request(500, 5, 40 * i) for i in range(3)]
    longs[1] = request(500, 5, 40, prompt_logprobs=0)
    shorts = [request(20, 4, 400), request(30, 4, 450)]
    run = Run(runner, PrefixCache(1 << 30) if cached else None).run({0: longs, 2: shorts[:1], 4: shorts[1:]})
    assert run.count("suspended") >= 2 and set(run.order[:2]) == set(shorts)
    for each in longs + shorts:
        assert run.ids(each) == alone(runner, each)
        done = [event.done for event in run.events[each] if isinstance(event, Prefilled)]
        assert done == sorted(set(done))  # nothing is computed twice
    scored = [token for event in run.events[longs[1]] if isinstance(event, Scored) for token in event.tokens]
    assert [token.id for token in scored] == list(longs[1].tokens[1:])


@pytest.mark.parametrize("cached", [False, True])
def test_a_new_client_takes_a_slot_of_one_who_has_two(runner, cached):
    many = [request(9 + i, 200, i, "a") for i in range(6)]
    few = [request(40 + i, 9, i, "b") for i in range(2)]
    run = Run(runner, PrefixCache(1 << 30) if cached else None).run({0: many, 20: few})
    assert run.order[:2] == few and run.count("suspended") == 1
    for each in many + few:
        assert run.ids(each) == alone(runner, each)


def test_a_suspended_sequence_can_be_cancelled_and_the_engine_recovers_with_one(runner):
    many = [request(200 + i, 100, i, "a") for i in range(2)]
    few = request(40, 50, 0, "b")
    run = Run(runner, PrefixCache(1 << 30))
    for each in many:
        run.add(each)
    while not all(map(run.ids, many)):
        run.engine.step()
    run.add(few)
    while not run.ids(few):
        run.engine.step()
    (suspended,) = [seq for seq in run.engine.scheduler if seq.suspended]
    run.engine.recover(StepFailed("lost"))
    assert len(run.engine) == 1 and suspended in run.engine.scheduler
    run.run({})
    assert run.ids(suspended.request) == alone(runner, suspended.request)
    for each in many:
        run.add(each)
    while not all(map(run.ids, many)):
        run.engine.step()
    run.add(few)
    while not run.ids(few):
        run.engine.step()
    (suspended,) = [seq for seq in run.engine.scheduler if seq.suspended]
    run.engine.cancel(suspended)
    run.run({})
    assert run.ids(few) == alone(runner, few)


def test_who_waits_too_long_is_told(runner):
    run = Run(runner, patience=0.05)
    jobs = [request(9, 400, i) for i in range(3)]
    for each in jobs:
        run.add(each)
    run.engine.step()
    time.sleep(0.06)
    run.run({})
    (event,) = run.events[jobs[2]]
    assert isinstance(event.error, Overloaded) and "found no place within" in str(event.error)
    assert all(len(run.ids(each)) == 400 for each in jobs[:2])


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
    while not all(map(run.ids, jobs)):
        run.engine.step()
    poison(runner, next(seq.slot for seq in run.engine.scheduler if seq.request is jobs[0]))
    run.run({})
    failed = run.events[jobs[0]][-1]
    assert isinstance(failed, Failed) and isinstance(failed.error, StepFailed) and "finite" in str(failed.error)
    assert all(np.isfinite(event.logprob or 0) for event in run.events[jobs[0]] if isinstance(event, Token))
    assert run.ids(jobs[1]) == alone(runner, jobs[1]) and run.count("not_finite") == 1
    assert cache.find(np.array(jobs[0].tokens, np.uint32).tobytes()) is None  # nothing is kept of it
    again = Run(runner, cache).run({0: jobs})  # what a slot holds does not harm the next sequence
    assert [again.ids(each) for each in jobs] == [alone(runner, each) for each in jobs]
