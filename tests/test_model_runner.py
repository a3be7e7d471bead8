"""The runner: chunks, slots and meshes change nothing; every shape is compiled once; what cannot run is refused."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from small import CFG, write

from ds4jax.engine.call_sizes import WORTH_SECONDS, CallSizes
from ds4jax.engine.chunks import chunk_sizes
from ds4jax.engine.compiled_steps import BLOCK
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.types import Sampling
from ds4jax.errors import Ds4Error, GGUFError
from ds4jax.io import synthetic
from ds4jax.settings import Settings

GREEDY = Sampling(temperature=0.0)
# 134 tokens in chunks of 1, 7, 128 and 129 need the buckets 1, 8, 128 and 256; compiling them takes most of the time.
TOKENS = np.random.default_rng(5).integers(0, CFG.vocab_size, 134).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def settings(path):
    return Settings(str(path), ctx=256, numerics="plain", prefill_chunk=256)


@pytest.fixture(scope="module")
def runner(settings):
    return ModelRunner.load(settings)


@pytest.fixture(scope="module")
def three(settings):
    return ModelRunner.load(dataclasses.replace(settings, prefill_chunk=8), batch=3)


@pytest.fixture(scope="module")
def expected(runner):
    return runner.logits(TOKENS)


def close(a, b):
    # The order of float32 additions differs between shapes; a wrong row or position would be off by far more.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("chunk", [1, 7, 128, 129])
def test_prefill_in_chunks_of_any_size(runner, settings, expected, chunk, monkeypatch):
    monkeypatch.setattr(runner, "settings", dataclasses.replace(settings, prefill_chunk=chunk))
    step = runner.prefill(0, TOKENS, GREEDY)
    close(step.logits, expected[-1])
    assert step.token == step.logits.argmax()
    assert runner.lengths == [134]


def test_decode_continues_prefill(runner, expected, monkeypatch, settings):
    monkeypatch.setattr(runner, "settings", dataclasses.replace(settings, prefill_chunk=128))
    runner.prefill(0, TOKENS[:128], GREEDY)
    for i in range(128, 134):
        close(runner.decode({0: TOKENS[i]})[0].logits, expected[i])


def test_blocks_find_their_buffers_where_they_were(runner):
    """Else a GPU would write what it recorded of a step anew; and what a block gave stays what it was."""
    tokens = {0: runner.prefill(0, [5, 6, 7], GREEDY).token}
    pointers, blocks, wanted = set(), [], []
    for _ in range(3):
        blocks.append(runner.decode_block(tokens, 2))
        wanted.append((blocks[-1].tokens(), np.asarray(blocks[-1].batch_logits)))
        (_, slots), _, *others = runner._arguments["decode"]  # without the tokens
        buffers = *runner._results, slots, *(there for _, there in others)
        pointers.add(tuple(x.unsafe_buffer_pointer() for x in buffers))
        tokens = dict.fromkeys(tokens)
    assert len(pointers) == 1
    for block, (ids, logits) in zip(blocks, wanted, strict=True):
        assert block.tokens() == ids
        np.testing.assert_array_equal(block.batch_logits, logits)


def test_seconds_of_decoding_are_all_that_it_takes_but_compiling(runner, monkeypatch):
    get, before = runner.steps.get, dataclasses.replace(runner.stats)

    def slow_to_start(*args):
        step = get(*args)

        def start(*args):
            time.sleep(0.05)
            return step(*args)

        time.sleep(0.6)
        runner.steps.seconds += 0.6
        return start

    monkeypatch.setattr(runner.steps, "get", slow_to_start)
    runner.prefill(0, [1] * 8, GREEDY)
    runner.decode_block({0: 1}, 2).tokens()
    seconds = runner.stats.decode_seconds - before.decode_seconds
    assert 0.05 <= seconds < 0.6 and runner.stats.token_seconds == pytest.approx(seconds / 2)
    monkeypatch.setattr(runner.stats, "token_seconds", 0.01)
    assert [runner.block(room) for room in (0, 1, 3, 100)] == [1, 1, 3, 4]
    monkeypatch.setattr(runner.stats, "token_seconds", 1e-6)
    assert runner.block(100) == BLOCK


def test_sizes_are_what_prompts_are_padded_to(three):
    assert chunk_sizes([1, 3, 8, 21], 8) == [1, 4, 8]
    lengths = [3, 21]
    for n in lengths:
        three.prefill(0, [1] * n, GREEDY)
    assert set(chunk_sizes(lengths, three.settings.prefill_chunk)) <= three.steps.prefill_sizes


def test_chunks_are_padded_to_more_until_their_size_is_compiled(three):
    three.prefill(0, [1] * 8, GREEDY, sizes=[8])
    assert 8 in three.steps.prefill_sizes
    key = next(key for key in three.steps.compiled if key[0] == "prefill" and key[3][1] == 4)
    program, prepare = three.steps.compiled.pop(key), three.steps.prepare
    called, release, used = threading.Event(), threading.Event(), []

    def slow(name, *args):
        called.set()
        release.wait(60)
        three.steps.compiled[key] = program
        return prepare(name, *args)

    def log(name, *args):
        used.append(args[2].shape[1])
        return run(name, *args)

    run = three._run
    three.steps.prepare, three._run = slow, log
    try:
        thread = three.compile_later([4, 8])
        assert called.wait(60)
        three.prefill(0, [1, 2, 3], GREEDY, sizes=[4, 8])
        release.set()
        thread.join()
        three.prefill(0, [1, 2, 3], GREEDY, sizes=[4, 8])
    finally:
        del three.steps.prepare, three._run
    assert used == [8, 4]


@pytest.mark.slow
def test_a_mesh_gives_the_same_logits(settings, expected):
    sharded = ModelRunner.load(dataclasses.replace(settings, tp=2, ep=2, prefill_chunk=8))
    assert len(sharded.weights.head.out.q.sharding.device_set) == 4
    step = sharded.prefill(0, TOKENS[:16], GREEDY)
    close(step.logits, expected[15])
    assert step.token == step.logits.argmax()
    for i in (16, 17):
        close(sharded.decode({0: TOKENS[i]})[0].logits, expected[i])
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded.cache))


def test_seconds_and_tokens_are_counted(runner):
    runner.prefill(0, [1] * 8, GREEDY)
    runner.decode({0: 1})
    before = dataclasses.replace(runner.stats)
    runner.prefill(0, [2] * 8, GREEDY)
    runner.decode({0: 1})
    assert runner.stats.prefill_tokens == before.prefill_tokens + 8
    assert runner.stats.decode_tokens == before.decode_tokens + 1
    assert runner.stats.prefill_seconds > before.prefill_seconds
    assert runner.stats.decode_seconds > before.decode_seconds
    assert runner.stats.compile_seconds == before.compile_seconds > 1  # the shapes were known


@pytest.mark.parametrize(
    "tokens, problem",
    [
        ([], "prompt: found 0 tokens, expected 1 to 255"),
        ([1] * 256, r"prompt: found 256 tokens, expected 1 to 255 \(ctx is 256\)"),
        ([5, -1], "prompt: found token id -1, expected 0 to 383"),
        ([5, 384], "prompt: found token id 384, expected 0 to 383"),
    ],
)
def test_prompts_that_cannot_run(runner, tokens, problem):
    with pytest.raises(Ds4Error, match=problem):
        runner.prefill(0, tokens, GREEDY)


def test_a_full_context_is_refused(runner):
    runner.prefill(0, [1] * 255, GREEDY)
    runner.decode({0: 1})
    with pytest.raises(Ds4Error, match="the context of 256 tokens is full"):
        runner.decode({0: 1})


def test_running_out_of_memory_says_what_to_do(runner, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    runner.prefill(0, [1], GREEDY)
    runner.decode({0: 1})
    monkeypatch.setattr(runner.steps, "compiled", dict.fromkeys(runner.steps.compiled, fail))
    with pytest.raises(Ds4Error, match=r"decode: out of device memory; a smaller prefill_chunk, ctx or batch"):
        runner.decode({0: 1})


def test_a_file_without_a_tokenizer_runs_but_has_none(tmp_path):
    synthetic.write_synthetic(tmp_path / "bare.gguf", CFG, 3, synthetic.RECIPES["q8"])
    bare = ModelRunner.load(Settings(str(tmp_path / "bare.gguf"), ctx=8))
    with pytest.raises(GGUFError, match="the file has no usable tokenizer"):
        _ = bare.tokenizer


def test_a_call_for_some_slots_computes_them_alone_and_leaves_the_others_as_they_are(settings, monkeypatch):
    whole, narrow = (ModelRunner.load(settings, batch=4) for _ in range(2))
    for runner in (whole, narrow):
        for slot in range(4):
            runner.prefill(slot, TOKENS[slot : slot + 5 + slot], GREEDY)
    assert narrow._prepare(0, 1) and narrow._prepare(0, 2)
    for slots, rows in (([2], 1), ([2], 2), ([0, 3], 2), ([1, 2, 3], 4)):
        monkeypatch.setattr(narrow._call_sizes[0], "of", lambda n, rows=rows: rows)
        blocks = [runner.decode_block(dict.fromkeys(slots, 7), 3) for runner in (whole, narrow)]
        ids, same = (block.tokens() for block in blocks)
        assert ids == same
        close(*(np.asarray(block.batch_logits)[slots] for block in blocks))
        again = [runner.decode_block(dict.fromkeys(slots), 2).tokens() for runner in (whole, narrow)]
        assert again[0] == again[1]
    for slot in range(4):  # nothing but the order of additions differs in what the slots hold
        for a, b in zip(*(jax.tree.leaves(runner.snapshot(slot)) for runner in (whole, narrow)), strict=True):
            if np.issubdtype(a.dtype, np.floating):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(a[np.isfinite(a)]).max(initial=0)))
            else:
                np.testing.assert_array_equal(a, b)


def test_programs_for_fewer_sequences_are_made_when_they_are_worth_it():
    asked, fits = [], {1: True, 2: False}

    def prepare(rows):
        asked.append(rows)
        return fits[rows]

    rows = CallSizes(6, prepare)

    def took(sequences, seconds):
        rows.took(sequences, seconds)
        for thread in threading.enumerate():
            if thread.name == "call-sizes":
                thread.join()

    assert [rows.of(n) for n in (0, 1, 4, 6)] == [6, 6, 6, 6]
    took(1, WORTH_SECONDS - 1)
    took(6, 100)
    took(5, 100)  # the next power of two is more than there are slots
    assert not asked
    took(1, 1)
    took(1, 100)
    took(2, 100)
    took(2, 100)
    assert asked == [1, 2]  # 2 does not fit, and is not tried again
    assert [rows.of(n) for n in (0, 1, 2, 6)] == [1, 1, 6, 6]


def test_a_program_that_cannot_be_made_is_reported_and_not_missed(capfd):
    def fail(rows):
        raise ValueError("too large")

    rows = CallSizes(4, fail)
    rows.took(3, 0.1)
    rows.took(1, WORTH_SECONDS)
    for thread in threading.enumerate():
        if thread.name == "call-sizes":
            thread.join()
    assert rows.of(1) == 4
    assert "no program for 1 sequences: too large" in capfd.readouterr().err
