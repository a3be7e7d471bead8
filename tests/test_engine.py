"""The loop: sequences together equal each alone; every shape is compiled once; ends are where they should be."""

import dataclasses
import functools

import numpy as np
import pytest
from small import CFG, write

from ds4jax.engine.engine import Engine
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.pace import Pace
from ds4jax.engine.prefix_cache import PrefixCache
from ds4jax.engine.types import Budget, Finished, Request, Sampling, Scored, Token
from ds4jax.errors import Ds4Error
from ds4jax.settings import Settings

GREEDY = Sampling(temperature=0.0)
TOKENS = np.random.default_rng(5).integers(0, CFG.vocab_size, 134).tolist()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("model"))
    return Settings(str(path), ctx=256, numerics="plain", prefill_chunk=8)


@pytest.fixture(scope="module")
def runner(settings):
    return ModelRunner.load(settings)


@pytest.fixture(scope="module")
def three(settings):
    return ModelRunner.load(settings, batch=3)


def close(a, b):
    # The order of float32 additions differs between shapes; a wrong row or position would be off by far more.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def run(runner, requests, eos=-1, logits=False):
    """Every token of some requests as it comes: (request, Token, why it is the last one or None)."""
    engine, out = Engine(runner), []

    def collect(request, event):
        if isinstance(event, Token):
            out.append((request, event, None))
        elif isinstance(event, Finished):  # follows its token at once
            assert out[-1][0] is request
            out[-1] = *out[-1][:2], event.reason

    for request in requests:
        asked = dataclasses.replace(request, stop_ids=frozenset([eos]), logits=logits)
        engine.check(asked)
        engine.add(asked, functools.partial(collect, request))
    while len(engine):
        engine.step()
    return out


def requests():
    """Five requests of different lengths and parameters, for three slots."""
    params = [GREEDY, Sampling(seed=1), Sampling(temperature=0.5, top_k=9), Sampling(top_p=0.8), Sampling(seed=2)]
    sizes = [(6, 9), (48, 4), (29, 6), (16, 12), (125, 3)]  # in chunks of 8: bucket 8 only
    return [Request(TOKENS[:n], m, p) for (n, m), p in zip(sizes, params, strict=True)]


@pytest.mark.slow
def test_a_batch_of_ragged_sequences_equals_each_alone(runner, three):
    jobs, together = requests(), {}
    for request, token, finish in run(three, jobs, logits=True):
        together.setdefault(request, []).append((token.id, token.logits, finish))
    assert together.keys() == set(jobs)
    for request in jobs:
        alone = [(token.id, token.logits, finish) for _, token, finish in run(runner, [request], logits=True)]
        assert [t for t, _, _ in together[request]] == [t for t, _, _ in alone]
        assert [f for _, _, f in together[request]] == [None] * (request.max_tokens - 1) + ["length"]
        close(np.array([x for _, x, _ in together[request]]), np.array([x for _, x, _ in alone]))


def test_blocks_of_tokens_are_the_tokens_one_by_one(three):
    """Whatever the pace; a block ends where a sequence does."""
    tokens = [
        [(request.max_tokens, token.id, finish) for request, token, finish in run(three, requests(), logits=one)]
        for one in (True, False)
    ]
    assert sorted(map(str, tokens[0])) == sorted(map(str, tokens[1]))


def test_nothing_is_compiled_twice(three):
    run(three, requests())
    before = set(three.steps.compiled)
    assert sum(name == "decode" for name, *_ in before) == 1
    run(three, requests())
    assert set(three.steps.compiled) == before


def test_an_end_token_ends_a_sequence_and_frees_its_slot(three):
    free_run = [token.id for _, token, _ in run(three, requests()[:1])]
    eos = free_run[4]
    out = run(three, requests()[:1] * 4, eos)
    assert [finish for _, _, finish in out if finish] == ["stop"] * 4
    assert len(out) == 4 * (free_run.index(eos) + 1)


def test_a_sequence_ends_where_the_context_does(runner):
    request = Request(TOKENS + TOKENS[:116], 99, GREEDY)
    out = run(runner, [request])
    assert [finish for _, _, finish in out] == [None] * 5 + ["length"]  # 250 and 6 make 256


def test_log_probabilities_of_a_prompt_are_those_of_its_logits(three):
    """In any chunks, beside other sequences, from a warm cache too; and nothing need be sampled."""
    engine, found = Engine(three, PrefixCache(1 << 30)), {}
    for n, top, max_tokens in ((1, 2, 0), (29, 0, 1), (134, 3, 0), (134, None, 2), (134, 20, 2)):
        events = found[n, top] = []
        engine.add(Request(TOKENS[:n], max_tokens, GREEDY, prompt_logprobs=top), events.append)
    while len(engine):
        engine.step()
    logits = three.logits(TOKENS).astype(np.float64)
    true = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for (n, top), events in found.items():
        scored = [token for event in events if isinstance(event, Scored) for token in event.tokens]
        assert [token.id for token in scored] == (TOKENS[1:n] if top is not None else [])
        for token, row in zip(scored, true, strict=False):
            assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
            assert [p for _, p in token.top] == pytest.approx(np.sort(row)[::-1][:top], abs=1e-4)
            assert all(row[id] == pytest.approx(p, abs=1e-4) for id, p in token.top)
        assert events[-1] == Finished("length")
        assert sum(isinstance(event, Token) for event in events) == {(29, 0): 1, (134, None): 2, (134, 20): 2}.get(
            (n, top), 0
        )
    with pytest.raises(Ds4Error, match="prompt_logprobs: found 21, expected 0 to 20"):
        engine.check(Request(TOKENS, 1, GREEDY, prompt_logprobs=21))
    with pytest.raises(Ds4Error, match="max_tokens: found -1, expected at least 0"):
        engine.check(Request(TOKENS, -1, GREEDY))


def test_a_budget_ends_a_thought_in_blocks_of_tokens(runner, monkeypatch):
    """The first tokens are those without a budget, then comes the one that is forced, then what follows these."""
    close, prompt, calls = 5, TOKENS[:20], []
    decode = runner.decode_block
    monkeypatch.setattr(runner, "decode_block", lambda last, n: calls.append(n) or decode(last, n))
    monkeypatch.setattr(runner, "block", lambda room: min(room, 16))

    def ids(prompt, n, budget=None):
        return [token.id for _, token, _ in run(runner, [Request(prompt, n, GREEDY, budget=budget)])]

    free = ids(prompt, 21)
    assert close not in free
    calls.clear()
    found = ids(prompt, 60, Budget(21, close))
    assert found[:22] == [*free, close] and found[22:] == ids([*prompt, *found[:22]], 38)
    assert len(calls) < 20 and max(calls) == 16


def test_the_next_block_begins_before_the_last_one_is_read(runner, monkeypatch):
    """And the tokens are those of blocks that wait for each other, whatever ends, and whoever gets the slot then."""
    work, decode = [], runner.decode_block
    monkeypatch.setattr(runner, "block", lambda room: min(room, 4))
    prompts = [TOKENS[:20], TOKENS[30:61], TOKENS[:9]]

    def ids(ahead, cancelled=0):
        if not ahead:
            monkeypatch.setattr(Engine, "_begin_ahead", lambda self, now: None)
        engine, out = Engine(runner), [[] for _ in prompts]
        for prompt, tokens, n in zip(prompts, out, (23, 40, 30), strict=True):
            stop = frozenset([stops[0]]) if prompt is prompts[0] else frozenset()
            seq = engine.add(
                Request(prompt, n, GREEDY, stop_ids=stop),
                lambda event, tokens=tokens: tokens.append(event.id) if isinstance(event, Token) else None,
            )
            while len(engine) and not (prompt is prompts[1] and len(tokens) > 12):
                engine.step()
            engine.cancel(seq)
        return out

    stops = [-1]
    free = ids(ahead=True)[0]
    stops = [free[9]]

    def begin(last, n):
        block = decode(last, n)
        work.append("begin")
        read, block.tokens = block.tokens, lambda: work.append("read") or read()
        return block

    monkeypatch.setattr(runner, "decode_block", begin)
    found = ids(ahead=True)
    assert " ".join(work).startswith("begin read begin begin read begin read")
    assert found[0] == free[: free.index(stops[0]) + 1]
    work.clear()
    waiting = ids(ahead=False)
    assert " ".join(work).startswith("begin read begin read")
    assert [found[0], found[1][:13], found[2]] == [waiting[0], waiting[1][:13], waiting[2]]


def test_a_target_for_gaps_leaves_chunks_alone_that_are_short_anyway(settings):
    runner = ModelRunner.load(dataclasses.replace(settings, prefill_chunk=32), batch=2)
    engine, seen = Engine(runner, gap=1e-6), []
    for _ in range(2):
        engine.add(Request(TOKENS[:40], 3, GREEDY), seen.append)
    while len(engine):
        engine.step()
    assert seen.count(Finished("length")) == 2


def test_chunks_are_short_while_answers_wait_for_them(settings, monkeypatch):
    runner = ModelRunner.load(dataclasses.replace(settings, prefill_chunk=256), batch=2)
    engine, chunks, prefill = Engine(runner, sizes=[128, 256], gap=1e-6), [], runner.prefill
    monkeypatch.setattr(Pace, "longest", lambda self, decode_seconds: 128)

    def log(slot, tokens, *args):
        chunks.append(len(tokens))
        return prefill(slot, tokens, *args)

    monkeypatch.setattr(runner, "prefill", log)
    long = [*TOKENS, *TOKENS][:250]
    engine.add(Request(long, 1, GREEDY), lambda event: None)
    while len(engine):
        engine.step()
    assert chunks == [250]
    engine.add(Request(TOKENS[:5], 100, GREEDY), lambda event: None)
    engine.step()
    engine.add(Request(long, 1, GREEDY), lambda event: None)
    while len(engine.scheduler.decoding) < 1 or len(chunks) < 4:
        engine.step()
    assert chunks == [250, 5, 128, 122]
