"""Prefix reuse: what is reused is bit for bit what would be computed, as much as promised, in memory and on disk."""

import asyncio
import dataclasses
import errno
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import CFG, write

from ds4jax import files
from ds4jax.engine import fingerprint as module
from ds4jax.engine import kv_file
from ds4jax.engine import snapshot as snapshots
from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.engine.fingerprint import fingerprint, open_store
from ds4jax.engine.keys import key_of
from ds4jax.engine.kv_store import KVStore
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.prefix_cache import TAIL, PrefixCache, Snapshot, positions
from ds4jax.engine.types import ALIGN, Finished, Prefilled, Request, Sampling, Started, Token
from ds4jax.io import content_hash, synthetic
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.tokenizer import byte_tokenizer
from ds4jax.settings import Settings

GREEDY = Sampling(temperature=0.0)
TOKENS = np.random.default_rng(5).integers(2, CFG.vocab_size, 1024).tolist()
OTHERS = np.random.default_rng(6).integers(2, CFG.vocab_size, 1024).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runner(path):
    return ModelRunner.load(Settings(str(path), ctx=768), batch=3)


@pytest.fixture
def engines(runner):
    """Makes engines on the one runner, one after the other; of each, the function that collects a request's events."""
    running = []

    def close():
        while running:
            asyncio.run(running.pop().close())

    def make(budget=1 << 30, store=None):
        close()
        running.append(AsyncEngine(runner, PrefixCache(budget, store)))
        return lambda *requests: asyncio.run(collect(running[-1], requests))

    yield make
    close()


async def collect(engine, requests) -> Any:
    """The events of requests that run at once; of a single one, its events alone."""

    async def one(request):
        return [event async for event in engine.generate(request)]

    events = await asyncio.gather(*map(one, requests))
    return events if len(events) > 1 else events[0]


def request(tokens, max_tokens=3):
    return Request(tokens, max_tokens, GREEDY, stop_ids=frozenset(), logprobs=20)


def tokens(events):
    """Ids with all log-probabilities: as good as the logits themselves for seeing any difference."""
    return [event for event in events if isinstance(event, Token)]


def logprobs(events):
    return np.array([event.logprob for event in tokens(events)], np.float64)


def ids(events):
    return [event.id for event in tokens(events)]


# ---- as much as promised, and exact ----------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [159, 384, 701, *(pytest.param(n, marks=pytest.mark.slow) for n in (31, 158, 286, 287))])
def test_a_changed_tail_is_all_that_is_computed(engines, n):
    prompt = TOKENS[: n - TAIL] + OTHERS[:TAIL]
    cold = engines(budget=0)(request(prompt))
    run = engines()
    run(request(TOKENS[:n], 1))
    warm = run(request(prompt))
    assert cold[0] == Started(0, n) and n - warm[0].cached_tokens <= ALIGN + TAIL
    assert tokens(warm) == tokens(cold)


@pytest.mark.parametrize("n", [128, 129, 300, 640])
def test_the_same_prompt_again_computes_nothing(engines, runner, n):
    run = engines()
    cold = run(request(TOKENS[:n]))
    before = runner.stats.prefill_tokens
    warm = run(request(TOKENS[:n]))
    assert cold[0] == Started(0, n) and warm[0] == Started(n, n) and runner.stats.prefill_tokens == before
    assert tokens(warm) == tokens(cold)
    assert not any(isinstance(event, Prefilled) for event in warm)


def test_a_reused_beginning_gives_a_cold_run_wherever_the_prompts_part(engines):
    """A prompt that parts where no snapshot is leaves one there, for the next."""
    run, cold_run = engines(), None
    run(request(TOKENS[:700], 1))
    reused = [run(request(TOKENS[:k] + OTHERS[: 720 - k])) for k in (140, 390, 391, 520)]
    again = [run(request(TOKENS[:k] + OTHERS[3 : 720 - k])) for k in (140, 390, 391, 520)]
    cold_run = engines(budget=0)
    for events, k in zip(reused, (140, 390, 391, 520), strict=True):
        assert tokens(events) == tokens(cold_run(request(TOKENS[:k] + OTHERS[: 720 - k])))
    for events, k in zip(again, (140, 390, 391, 520), strict=True):
        assert tokens(events) == tokens(cold_run(request(TOKENS[:k] + OTHERS[3 : 720 - k])))
    assert [events[0].cached_tokens for events in again] == [128, 384, 384, 512]


@pytest.fixture(scope="module")
def larger(path):
    return ModelRunner.load(Settings(str(path), ctx=768, prefill_chunk=512), batch=2)


def test_the_last_chunk_passes_a_mark(larger, monkeypatch):
    """It need not end there for the state to be kept, which is that of a prompt that ends there."""
    chunks, prefill = [], larger.prefill
    monkeypatch.setattr(larger, "prefill", lambda slot, t, *a, **k: chunks.append(len(t)) or prefill(slot, t, *a, **k))
    prefixes = PrefixCache(1 << 30)
    engine = AsyncEngine(larger, prefixes)
    asyncio.run(collect(engine, [request(TOKENS[:700])]))
    asyncio.run(engine.close())
    assert chunks == [512, 188]
    found = prefixes.find(key_of(TOKENS[:699]))
    assert found is not None and found.length == 640
    chunks.clear()
    engine = AsyncEngine(larger, prefixes)
    asyncio.run(collect(engine, [request(OTHERS[:460])]))
    asyncio.run(engine.close())
    found = prefixes.find(key_of(OTHERS[:459]))
    assert chunks == [460] and found is not None and found.length == 384
    larger.put(0, found.planes, GREEDY)
    prefill(1, OTHERS[:384], GREEDY, sizes=[512])
    for token in OTHERS[384:400]:
        steps = larger.decode({0: token, 1: token})
    np.testing.assert_allclose(steps[0].logits, steps[1].logits, atol=1e-4)


@pytest.mark.slow
def test_larger_chunks_reuse_as_much_to_the_last_bits(larger):
    prompts = [TOKENS[:k] + OTHERS[: 720 - k] for k in (300, 600)]

    async def main(budget):
        engine = AsyncEngine(larger, PrefixCache(budget))
        events = [await collect(engine, [request(tokens)]) for tokens in [TOKENS[:720], *prompts, *prompts]]
        await engine.close()
        return events

    warm, cold = asyncio.run(main(1 << 30)), asyncio.run(main(0))
    assert [events[0].cached_tokens for events in warm] == [0, 0, 512, 720, 720]
    for a, b in zip(warm, cold, strict=True):
        assert ids(a) == ids(b)
        np.testing.assert_allclose(logprobs(a), logprobs(b), atol=0.05)


def test_the_next_turn_reuses_prompt_and_answer(engines):
    run = engines()
    prompt = TOKENS[:300]
    answer = ids(run(request(prompt, 140)))  # 440 tokens, of which the last is not in the cache
    turn = run(request(prompt + answer + OTHERS[:50]))
    assert turn[0] == Started(384, 490)
    # An answer is computed token by token, a prompt in chunks, so they agree but for the last bits.
    cold = engines(budget=0)(request(prompt + answer + OTHERS[:50]))
    assert ids(turn) == ids(cold)
    np.testing.assert_allclose(logprobs(turn), logprobs(cold), atol=0.05)


@pytest.mark.parametrize("n", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (127, 128, 131, 512))])
def test_a_state_taken_and_put_elsewhere_goes_on_bit_for_bit(runner, n):
    runner.prefill(0, TOKENS[:n], GREEDY, sizes=[32, 128])
    *_, planes = runner.take(0)
    runner.prefill(2, OTHERS[:500], GREEDY, sizes=[32, 128])  # what was there leaves no trace
    runner.put(2, planes, GREEDY)
    assert all(isinstance(plane, np.ndarray) for plane in planes.values()) and runner.lengths[2] == n
    for token in OTHERS[:140]:
        steps = runner.decode({0: token, 2: token})
    np.testing.assert_array_equal(steps[0].logits, steps[2].logits)


@pytest.mark.parametrize("room, piece", [(128, 256), (512, 512)])
def test_a_long_state_is_taken_and_put_in_pieces(runner, monkeypatch, room, piece):
    """Which end anywhere, also where the cache does, or would go beyond it; meanwhile the sequence goes on."""
    n = 700
    runner.prefill(0, TOKENS[:n], GREEDY, sizes=[32, 128])
    (whole,) = runner.take(0)
    monkeypatch.setattr(snapshots, "SMALLEST_ROOM", room)
    monkeypatch.setattr(snapshots, "PIECE", piece)
    pieces = runner.take(0)
    found = [next(pieces)]
    for token in OTHERS[:10]:
        runner.decode({0: token})
    found += pieces
    assert found[:-1] == [None] * ((n - 1) // piece) and found[-1].keys() == whole.keys()
    for name, plane in whole.items():
        np.testing.assert_array_equal(found[-1][name], plane)
    runner.prefill(1, OTHERS[:720], GREEDY, sizes=[32, 128])
    runner.put(1, whole, GREEDY)
    monkeypatch.undo()
    (again,) = runner.take(1)
    for name, plane in whole.items():
        np.testing.assert_array_equal(again[name], plane)


def test_the_last_mark_shares_the_rows_of_the_whole_prompt(engines, runner):
    """It is what a copy taken there would have been; given up in between, that copy is taken."""
    prefixes = PrefixCache(1 << 30)
    engine = AsyncEngine(runner, prefixes)

    async def main():
        await collect(engine, (request(TOKENS[:300]),))
        given_up = engine.submit(request(OTHERS[:300]))
        while await anext(given_up) != Prefilled(256, 300):
            pass
        given_up.cancel()
        await engine.close()

    asyncio.run(main())
    for tokens in (TOKENS, OTHERS):
        found = prefixes.find(key_of(tokens[:299]))
        assert found is not None and found.length == 256
        runner.prefill(0, tokens[:256], GREEDY, sizes=[32, 128])
        (expected,) = runner.take(0)
        assert expected.keys() == found.planes.keys()
        for name, plane in expected.items():
            np.testing.assert_array_equal(found.planes[name], plane)
    whole, mark = prefixes.find(key_of(TOKENS[:300])), prefixes.find(key_of(TOKENS[:299]))
    assert whole is not None and mark is not None and whole.length == 300
    shared = [name for name, plane in mark.planes.items() if np.shares_memory(plane, whole.planes[name])]
    assert shared and all(".rows." in name for name in shared)


@pytest.mark.slow
def test_a_state_is_taken_later_as_it_was(runner):
    runner.prefill(0, TOKENS[:380], GREEDY, sizes=[32, 128])
    for token in OTHERS[:4]:
        runner.decode({0: token})
    (then,), state = runner.take(0), runner.state(0)
    for token in OTHERS[4:140]:  # far enough to overwrite the whole window, and to close windows of 128
        runner.decode({0: token})
    (later,) = runner.take(0, 384, state)
    (now,) = runner.take(0)
    assert later.keys() == then.keys() and all((later[k] == then[k]).all() for k in then)
    assert any(now[k].shape != plane.shape or (now[k] != plane).any() for k, plane in later.items())


# ---- between requests that run at once -------------------------------------------------------------------------------
def test_requests_at_once_compute_a_shared_prefix_once(engines, runner):
    shared = TOKENS[:600]
    requests = [request(shared + OTHERS[10 * i : 10 * i + 40]) for i in range(5)]
    alone = [engines(budget=0)(r) for r in requests]
    before, run = runner.stats.prefill_tokens, engines()
    together = run(*requests)
    assert runner.stats.prefill_tokens - before <= 640 + 4 * (600 % ALIGN + 40)
    assert [tokens(events) for events in together] == [tokens(events) for events in alone]


def test_equal_requests_at_once_compute_it_all_once(engines, runner):
    before, run = runner.stats.prefill_tokens, engines()
    together = run(*[request(TOKENS[:333])] * 7)
    assert runner.stats.prefill_tokens - before == 333
    assert all(tokens(events) == tokens(together[0]) for events in together)


def test_without_a_budget_no_request_waits_for_ever(engines):
    together = engines(budget=0)(*[request(TOKENS[:333])] * 7)
    assert all(events[-1] == Finished("length") and ids(events) == ids(together[0]) for events in together)


def test_a_cancelled_prompt_leaves_what_was_computed(runner):
    async def main():
        engine = AsyncEngine(runner, PrefixCache(2 << 30))
        prompt = engine.submit(request(TOKENS[:700]))
        async for event in prompt:
            if event == Prefilled(256, 700):
                break
        stream = engine.submit(request(OTHERS[:10]))
        await anext(stream)
        prompt.cancel()
        stream.cancel()
        events = await collect(engine, [request(TOKENS[:700])])
        await engine.close()
        return events

    assert asyncio.run(main())[0].cached_tokens >= 256


@pytest.mark.slow
def test_an_answer_that_its_reader_ends_is_reused_up_to_what_was_read(runner):
    """The engine may be past a multiple of 128 by then, with tokens that are no part of the conversation."""

    async def main():
        engine = AsyncEngine(runner, PrefixCache(2 << 30))
        stream, read = engine.submit(request(TOKENS[:100], 345)), []
        async for event in stream:
            read += [event.id] if isinstance(event, Token) else []
            if len(read) == 283:
                break
        assert stream.sequence is not None
        while stream.sequence in engine._engine.scheduler and stream.sequence.computed < 384:
            await asyncio.sleep(0.001)
        await stream.aclose()
        events = await collect(engine, [request(TOKENS[:100] + read + OTHERS[:50])])
        await engine.close()
        return events

    assert asyncio.run(main())[0] == Started(256, 433)


# ---- on disk ---------------------------------------------------------------------------------------------------------
def test_a_restarted_engine_goes_on_with_a_conversation(engines, runner, path, tmp_path):
    prompt = TOKENS[:500]
    run = engines(store=KVStore(tmp_path / "kv", 1 << 30, fingerprint(runner)))
    first = run(request(prompt, 150))
    turn = request(prompt + ids(first) + OTHERS[:20])
    live = run(turn)
    engines(budget=0)  # closes the first one
    again = ModelRunner.load(runner.settings, batch=3)
    store = KVStore(tmp_path / "kv", 1 << 30, fingerprint(again))
    warm = engines(store=store)(turn)
    assert warm[0] == Started(640, 670) and tokens(warm) == tokens(live)


def test_a_killed_engine_has_saved_what_ended(engines, runner, tmp_path):
    store = KVStore(tmp_path / "kv", 1 << 30, fingerprint(runner))
    engines(store=store)(request(TOKENS[:400]))
    deadline = time.monotonic() + 20
    while not len(store) and time.monotonic() < deadline:
        time.sleep(0.01)
    entry = store.longest(TOKENS[:400])
    assert entry is not None and entry.length == 256


def test_a_damaged_file_is_computed_anew(engines, runner, tmp_path, caplog):
    folder = tmp_path / "kv"
    cold = engines(store=KVStore(folder, 1 << 30, fingerprint(runner)))(request(TOKENS[:400]))
    engines(budget=0)
    for file in folder.glob("*.kv"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    found = engines(store=KVStore(folder, 1 << 30, fingerprint(runner)))(request(TOKENS[:400]))
    assert found[0] == Started(0, 400) and tokens(found) == tokens(cold) and "checksum" in caplog.text


def test_beyond_the_memory_budget_prefixes_are_read_from_disk(engines, runner, tmp_path):
    run = engines(budget=0, store=KVStore(tmp_path / "kv", 1 << 30, fingerprint(runner)))
    cold = run(request(TOKENS[:400]))
    deadline = time.monotonic() + 20
    while (warm := run(request(TOKENS[:400])))[0].cached_tokens == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert warm[0].cached_tokens == 256 and tokens(warm) == tokens(cold)


def changed(path, target):
    """A copy of a model that differs in the last byte of its last tensor."""
    data = bytearray(path.read_bytes())
    last = max(open_checkpoint(path).file.tensors.values(), key=lambda t: t.offset)
    data[last.offset + last.nbytes - 1] ^= 1
    target.write_bytes(data)
    return target


def test_the_store_is_of_the_whole_content_of_the_file(runner, path, tmp_path, monkeypatch):
    """Two files that differ in one byte of one tensor do not share states. A large file is hashed in the background."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = ModelRunner.load(dataclasses.replace(runner.settings, model=str(changed(path, tmp_path / "other.gguf"))))
    assert fingerprint(other) == fingerprint(runner)
    with open_store(tmp_path / "kv", 1 << 30, runner) as store:
        assert store.ready and store.put(TOKENS[:128], planes(runner, 128))
    with open_store(tmp_path / "kv", 1 << 30, other) as store:
        assert store.ready and len(store) == 0
    monkeypatch.setattr(content_hash, "AT_ONCE", 0)
    for kept in (False, True):
        with open_store(tmp_path / "kv", 1 << 30, runner) as store:
            assert store.ready == kept
            wait_until(lambda: store.ready)
            assert len(store) == 1


def test_a_file_that_changed_after_it_was_loaded_is_not_trusted(runner, path, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    loaded = ModelRunner.load(dataclasses.replace(runner.settings, model=str(copy)))
    changed(path, copy)
    for large in (False, True):
        monkeypatch.setattr(content_hash, "AT_ONCE", 0 if large else 1 << 30)
        caplog.clear()
        with open_store(tmp_path / "kv", 1 << 30, loaded) as store:
            wait_until(lambda: "are not used" in caplog.text)
            assert not store.ready and "copy.gguf: it was replaced or changed" in caplog.text


def test_without_a_thread_to_hash_in_the_store_is_unused(runner, tmp_path, caplog, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "AT_ONCE", 0)
    monkeypatch.setattr(threading.Thread, "start", fail)
    with open_store(tmp_path / "kv", 1 << 30, runner) as store:
        assert not store.ready and "are not used: can't start new thread" in caplog.text


def test_a_store_that_was_closed_meanwhile_is_not_said_to_be_in_use(runner, tmp_path, caplog, monkeypatch):
    store = KVStore(tmp_path / "kv", 1 << 30, fingerprint(runner), None)
    monkeypatch.setattr(content_hash, "compute", lambda *_: store.close() or "")
    module._begin_later(store, module._files(runner.checkpoint))
    assert store.closed and "have been read for a hash" in caplog.text and "in use from now on" not in caplog.text


def test_prefixes_in_memory_work_before_the_store_is_ready(engines, runner, tmp_path):
    store = KVStore(tmp_path / "kv", 1 << 30, fingerprint(runner), None)
    run = engines(store=store)
    cold, warm = run(request(TOKENS[:400])), run(request(TOKENS[:400]))
    assert warm[0] == Started(400, 400) and tokens(warm) == tokens(cold) and not len(store)
    store.begin("")
    engines(budget=0)  # closes the first one, which saves what it has
    with KVStore(tmp_path / "kv", 1 << 30, fingerprint(runner)) as store:
        assert store.shared(TOKENS[:400]) == 256


def test_planes_of_another_shape_are_a_miss(engines, runner, tmp_path, caplog):
    """Behind the right tokens, fingerprint and checksums: nothing that the device would choke on reaches it."""
    good = planes(runner, 256)
    assert runner.fits(256, good) and not runner.fits(128, good) and runner.fits(200, planes(runner, 200))
    name, plane = next((name, plane) for name, plane in good.items() if plane.ndim == 4)
    wrong = [
        {},
        {k: v for k, v in good.items() if k != name},
        good | {"more": plane},
        good | {name: plane[:, :, :-1]},
        good | {name: plane[0]},
        good | {name: plane.view(np.uint8)[..., : plane.shape[-1]].astype(np.float16)},
        good | {"length": np.array([384], np.int32)},
    ]
    cold = engines(budget=0)(request(TOKENS[:400]))
    for i, bad in enumerate([*wrong, good]):
        caplog.clear()
        store = KVStore(tmp_path / str(i), 1 << 30, fingerprint(runner), fits=runner.fits)
        store.put(TOKENS[:256], bad)
        found = engines(store=store)(request(TOKENS[:400]))
        assert tokens(found) == tokens(cold) and found[0] == Started(256 if bad is good else 0, 400)
        assert ("not the state" in caplog.text) == (bad is not good)


def test_what_could_not_be_written_is_written_later(tmp_path, monkeypatch):
    prefixes = PrefixCache(1000, KVStore(tmp_path, 1 << 20, {"model": "m"}))
    prefixes.put(new := snapshot([1, 2], 100))
    with monkeypatch.context() as broken:
        broken.setattr(files.os, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
        prefixes.save(new)
        for writing in list(prefixes._writes):
            writing.result()
        assert not list(tmp_path.glob("*.kv"))
    prefixes.close(save=True)
    with KVStore(tmp_path, 1 << 20, {"model": "m"}) as store:
        assert store.shared([1, 2]) == 2


def test_a_file_that_cannot_be_read_makes_way_for_a_shorter_prefix(tmp_path, monkeypatch):
    store = KVStore(tmp_path, 1 << 20, {"model": "m"})
    prefixes = PrefixCache(0, store)
    for n in (2, 4):
        store.put([1] * n, {"x": np.zeros(n)})
    longer, real = store.longest([1] * 4), open
    assert longer is not None

    def fail(path, *args):
        if path == longer.path:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *args)

    monkeypatch.setattr(kv_file, "open", fail, raising=False)
    reading = prefixes.fetch(key_of([1] * 5), more_than=0)
    found = reading and reading.result(timeout=20)
    assert found and found.length == 2 and store.longest([1] * 5) is longer
    prefixes.close(save=False)


def planes(runner, n):
    """The state of the first n tokens."""
    runner.prefill(0, TOKENS[:n], GREEDY)
    *_, planes = runner.take(0)
    return planes


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.slow
def test_fingerprints_tell_models_and_settings_apart(runner, path, tmp_path):
    other = tmp_path / "other.gguf"
    synthetic.write_synthetic(other, CFG, 4, synthetic.RECIPES["q2"], byte_tokenizer().to_metadata())
    tokenizer = byte_tokenizer().to_metadata() | {"tokenizer.ggml.add_bos_token": False}
    synthetic.write_synthetic(tmp_path / "bos.gguf", CFG, 3, synthetic.RECIPES["q8"], tokenizer)
    load = [
        Settings(str(path), ctx=8),
        Settings(str(other), ctx=8),
        Settings(str(tmp_path / "bos.gguf"), ctx=8),
        Settings(str(path), ctx=8, numerics="plain"),
        Settings(str(path), ctx=8, numerics="plain", dtype="bfloat16"),
    ]
    found = [str(sorted(fingerprint(ModelRunner.load(settings)).items())) for settings in load]
    random = [synthetic.Synthetic(CFG, synthetic.RECIPES[r], seed) for r, seed in (("q8", 0), ("q8", 1), ("q2", 0))]
    random = [str(sorted(fingerprint(ModelRunner(source, load[0])).items())) for source in random]
    assert len({*found, *random}) == len(load) + 3
    for same in ({"ctx": 9, "batch": 2}, {"tp": 2}):
        assert fingerprint(ModelRunner.load(dataclasses.replace(load[0], **same))) == fingerprint(runner)


# ---- the parts alone -------------------------------------------------------------------------------------------------
@given(st.integers(1, 10**6), st.sampled_from([64, 128, 2048]), st.integers(0, 10**6))
def test_where_snapshots_are_taken(prompt, chunk, shared):
    found = positions(prompt, chunk, shared)
    assert all(0 < p < prompt and p % ALIGN == 0 for p in found) and len(found) <= 2 + 20
    known = [*sorted(found), prompt]
    assert prompt - max([0, *found]) < ALIGN + TAIL
    for kept in (prompt - TAIL, prompt // 2, prompt // 3):  # another prompt that shares this much
        reused = max([p for p in known if p <= kept], default=0)
        assert reused > kept / 2 or kept < 2 * max(chunk, ALIGN)
    assert min(shared, prompt - TAIL) - max([0, *(p for p in found if p <= shared)]) < ALIGN + TAIL


def snapshot(tokens, nbytes, used=0):
    return Snapshot(key_of(tokens), {"x": np.zeros(nbytes, np.uint8)}, used=used)


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.booleans()), max_size=30))
def test_memory_finds_the_longest_and_stays_within_its_budget(puts):
    prefixes, budget = PrefixCache(1000), 1000
    for i, (tokens, complete) in enumerate(puts):
        new = snapshot(tokens, 100, i)
        prefixes.put(dataclasses.replace(new, logits=np.zeros(4, np.float32)) if complete else new)
        held = [*prefixes._aligned, *prefixes._complete.values()]
        assert prefixes.nbytes == sum(s.nbytes for s in held) <= budget and len(prefixes) == len(held)
        query = [random.Random(i).randrange(2) for _ in range(5)]
        shorter = [s.length for s in prefixes._aligned if key_of(query[:4]).startswith(s.key)]
        expected = 5 if key_of(query) in prefixes._complete else max(shorter, default=0)
        found = prefixes.find(key_of(query))
        assert (found.length if found else 0) == expected
        same = [sum(1 for _ in iter_common(query, s)) for s in prefixes._aligned]
        assert prefixes.shared(key_of(query)) == max(same, default=0)
    prefixes.close(save=False)


def iter_common(query, snapshot):
    for a, b in zip(query, np.frombuffer(snapshot.key, "<u4"), strict=False):
        if a != b:
            return
        yield a


def test_what_is_evicted_goes_to_disk(tmp_path):
    store = KVStore(tmp_path, 1 << 20, {"model": "m"})
    prefixes = PrefixCache(250, store)
    for i in range(4):
        prefixes.put(snapshot([i, i], 100, i))
    assert len(prefixes) == 2 and prefixes.find(key_of([3, 3, 3])) and not prefixes.find(key_of([0, 0, 0]))
    for writing in list(prefixes._writes):
        writing.result()
    assert prefixes.fetch(key_of([0, 0, 0]), more_than=2) is None
    reading = prefixes.fetch(key_of([0, 0, 0]), more_than=1)
    read = reading and reading.result()
    assert read and read.key == key_of([0, 0]) and read.planes["x"].shape == (100,)
    assert prefixes.fetch(key_of([0, 0]), more_than=0) is None  # one token has to be computed
    prefixes.close(save=True)
    with KVStore(tmp_path, 1 << 20, {"model": "m"}) as reopened:
        entries = [reopened.longest([i, i]) for i in range(4)]
        assert [entry and entry.length for entry in entries] == [2] * 4
