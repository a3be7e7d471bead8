"""The engine with drafts: every stream is what it is alone and without them; how many are drafted is what pays."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
from test_speculate import CFG

from ds4jax.engine.engine import Engine
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.prefix_cache import PrefixCache
from ds4jax.engine.speculation import LOSS, Speculation
from ds4jax.engine.types import Budget, Finished, Request, Sampling, Token
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.io.recipes import RECIPES
from ds4jax.io.synthetic import Synthetic
from ds4jax.settings import Settings

pytestmark = pytest.mark.usefixtures("float64_in_threads")
TEXT = np.random.default_rng(5).integers(0, CFG.vocab_size, 300).tolist()


def load(cfg, batch, **changes):
    settings = Settings("random", ctx=320, prefill_chunk=128, **changes)
    object.__setattr__(settings, "dtype", "float64")  # so that one order of sums says what another does
    return ModelRunner(Synthetic(cfg, RECIPES["f32"], 3), settings, batch)


@pytest.fixture(scope="module")
def alone():
    return load(dataclasses.replace(CFG, drafter=None, n_mtp=0), 1)


@pytest.fixture(scope="module", params=["dspark", pytest.param("mtp", marks=pytest.mark.slow)])
def runner(request):
    missing = {"dspark": {"n_mtp": 0}, "mtp": {"drafter": None}}[request.param]
    found = load(dataclasses.replace(CFG, **missing), 3, draft="auto", draft_tokens=3)
    return found


class InTurn(Speculation):
    """Drafts as many tokens as a cycle says."""

    def __init__(self, *cycle):
        super().__init__(sorted({*cycle} - {0}))
        self.cycle = itertools.cycle(cycle)

    def choose(self, sequences, free=None):
        return next(self.cycle)


def start(engine, request, out, cancel_at=None):
    """Add a request; its tokens go to `out`, then why it ended. cancel_at: after so many tokens."""

    def collect(event):
        if isinstance(event, Token):
            out.append(event)
        elif isinstance(event, Finished):
            out.append(event.reason)

    seq = engine.add(request, collect)
    return lambda: cancel_at is not None and len(out) >= cancel_at and engine.cancel(seq)


def run(runner, requests, cycle=(), cache=None, cancelled=()):
    """What comes of each request, all together. cancelled: {index of a request: after how many tokens}."""
    engine, outs = Engine(runner, cache), [[] for _ in requests]
    if cycle:
        engine.speculation = InTurn(*cycle)
    checks = []
    for i, (request, out) in enumerate(zip(requests, outs, strict=True)):
        engine.check(request)
        checks.append(start(engine, request, out, dict(cancelled).get(i)))
    while len(engine):
        engine.step()
        for check in checks:
            check()
    return outs


def requests():
    """Prompts of which some begin alike and reach over token 128, and everything that edits or looks at logits."""
    greedy = Sampling(temperature=0.0)
    asked = [
        Request(TEXT[:5], 40, greedy),
        Request(TEXT[:120], 30, Sampling(seed=1)),
        Request(TEXT[:140], 30, Sampling(temperature=0.5, top_k=9, seed=2)),
        Request(TEXT[:135], 25, Sampling(top_p=0.8, seed=3), frozenset([7, 8])),
        Request(TEXT[:9], 20, Sampling(seed=4, frequency_penalty=0.7, logit_bias=((3, 2.0),))),
        Request(TEXT[:9], 20, greedy, logprobs=3),
        Request(TEXT[:280], 99, Sampling(min_p=0.2, seed=6)),  # the context ends it
        Request(TEXT[:33], 24, Sampling(seed=7), budget=Budget(9, 5)),
        Request(TEXT[:9], 12, Sampling(seed=8, min_tokens=8), frozenset(range(40))),
        Request(TEXT[:1], 5, greedy, logits=True),
        Request(TEXT[:50], 1, greedy),
    ]
    return [r if r.stop_ids else dataclasses.replace(r, stop_ids=frozenset([-1])) for r in asked]


@pytest.fixture(scope="module")
def expected(alone):
    return [run(alone, [request])[0] for request in requests()]


def close(found, wanted):
    """Whether two streams are the same, log-probabilities and logits but for the last digits."""
    assert [getattr(x, "id", x) for x in found] == [getattr(x, "id", x) for x in wanted]
    for a, b in zip(found[:-1], wanted[:-1], strict=True):
        assert (a.logprob is None) == (b.logprob is None) and [i for i, _ in a.top] == [i for i, _ in b.top]
        if b.logprob is not None:
            np.testing.assert_allclose(
                [a.logprob, *(p for _, p in a.top)], [b.logprob, *(p for _, p in b.top)], atol=1e-5
            )
        if b.logits is not None:
            np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)


@pytest.mark.parametrize("cycle", [(3, 0, 2), pytest.param((3,), marks=pytest.mark.slow)])
def test_together_and_with_drafts_each_says_what_it_says_alone_without(runner, expected, cycle):
    """First with an empty prefix cache, then with what that has kept."""
    cache = PrefixCache(1 << 30)
    for _ in range(2):
        for found, wanted in zip(run(runner, requests(), cycle, cache), expected, strict=True):
            close(found, wanted)
    assert len(cache) > 2


def test_cancelled_ones_leave_no_trace(runner, expected):
    asked = [request for request in requests() for _ in range(2)]
    cancelled = {i: i % 5 for i in range(0, len(asked), 2)}
    outs = run(runner, asked, (3,), PrefixCache(1 << 30), cancelled)
    for i, found in enumerate(outs):
        wanted = expected[i // 2]
        if i in cancelled and len(found) < len(wanted):
            found, wanted = [*found, None], [*wanted[: len(found)], None]
        close(found, wanted)


def test_a_snapshot_goes_only_where_there_is_the_same_drafter(runner, alone):
    runner.prefill(0, TEXT[:128], Sampling())
    *_, planes = runner.take(0)
    assert runner.fits(128, planes) and not alone.fits(128, planes)


def test_room_is_what_a_slot_has(runner):
    runner.prefill(0, TEXT[:256], Sampling())
    for room in (0, 65):
        with pytest.raises(Ds4Error, match=f"slot 0: found room {room}, expected 1 to 64"):
            runner.speculate({0: 1}, {0: room}, 3, 1)


def test_what_cannot_draft_is_refused():
    with pytest.raises(ConfigError, match="draft_tokens: found 6, expected at most 5, the drafter's block"):
        load(CFG, 1, draft="auto", draft_tokens=6)


# ---- how many are drafted --------------------------------------------------------------------------------------------
class World:
    """Simulated calls: drafts of which each is accepted with probability `a`; rounds take `ratio` plain steps."""

    def __init__(self, a, ratio, counts=(3, 5)):
        self.a, self.ratio, self.rule, self.rng = a, ratio, Speculation(counts), np.random.default_rng(0)
        self.seconds, self.appended, self.chosen = 0.0, 0, []

    def run(self, calls, sequences=1):
        for _ in range(calls):
            n = self.rule.choose(sequences)
            self.chosen.append(n)
            if n:
                held = self.rng.random((8, sequences, n)) < self.a
                kept = 1 + np.cumprod(held, axis=2).sum(2)
                seconds = 8 * (1 + (self.ratio - 1) * (1 + n) / 6)
                self.rule.ran(sequences, n, kept.tolist(), [999] * sequences, seconds)
                appended = kept.sum() / sequences
            else:
                appended = seconds = 16.0
                self.rule.plain(sequences, 16, seconds)
            self.seconds, self.appended = self.seconds + seconds, self.appended + appended
        return self.appended / self.seconds  # against plain decoding


@pytest.mark.parametrize("a, ratio", [(0.0, 2.2), (0.3, 2.2), (0.3, 4.0), (0.0, 8.0)])
@pytest.mark.parametrize("sequences", [1, 16])
def test_poor_drafts_cost_little(a, ratio, sequences):
    world = World(a, ratio)
    speed = world.run(1000, sequences)
    assert speed > 0.95 and world.rule.lost / world.seconds < LOSS + 0.01
    assert any(world.chosen[-500:]) == (ratio < 6)  # it tries again now and then, if that might pay


@pytest.mark.parametrize("a, ratio", [(0.8, 2.2), (0.8, 1.5), (0.6, 1.3)])
def test_good_drafts_are_used(a, ratio):
    world = World(a, ratio)
    tokens = 1 + sum(a**j for j in range(1, 6))
    assert world.run(1000) > 0.93 * tokens / ratio
    assert np.mean(np.array(world.chosen) > 0) > 0.9


def test_what_pays_is_found_again_when_the_text_changes():
    world = World(0.05, 2.2)
    world.run(300)
    assert world.chosen[-50:].count(0) > 40
    world.a = 0.85
    world.run(300)
    assert world.chosen[-50:].count(0) < 5
    world.a = 0.05
    world.run(300)
    assert world.chosen[-50:].count(0) > 40


def test_many_sequences_may_make_drafts_too_dear():
    """Each number of sequences has its own seconds; those that must not go on by several tokens count."""
    world = World(0.6, 1.4)
    assert world.run(300) > 1.2
    world.ratio = 4.0
    world.run(300, 16)
    assert world.chosen[-50:].count(0) > 40
    world.ratio = 1.4
    world.run(20)
    assert world.chosen[-10:].count(0) < 3
    assert world.rule.choose(1, 0) == 0


def test_only_drafts_with_room_are_judged():
    rule = Speculation([3])
    rule.ran(2, 3, [[4, 1], [1, 2], [0, 2]], [5, 5], 1.0)
    # First sequence: three of three, then room for none. Second: none of three, one of three, and one of room for one.
    assert rule.tried == [1 + 1 + 1 + 1, 1 + 1, 1] and rule.accepted == [1 + 1 + 1, 1, 1]


def test_a_drafter_that_seems_to_be_of_another_model_is_reported_once(caplog):
    world = World(0.1, 2.0)
    with caplog.at_level(logging.WARNING):
        world.run(3000, 16)
    (record,) = [r for r in caplog.records if "the drafter may be another model's" in r.getMessage()]
    assert "first ones accepted" in record.getMessage()
    assert world.rule.report()["drafted_tokens"] == sum(world.rule.tried)
