"""The sweep: its frontiers, its columns, what is in the cache at each, and that it leaves no trace."""

import csv
import dataclasses
import re

import jax
import numpy as np
import pytest

from ds4jax import bench, cli, synthetic, tiny
from ds4jax import cache as kv
from ds4jax.engine import runner as engine
from ds4jax.errors import ConfigError
from ds4jax.sampling import Sampling
from ds4jax.settings import Settings

CFG = dataclasses.replace(
    tiny.CONFIG, n_layers=2, compress_ratios=(4, 128), swiglu_clamp=(10.0,) * 2, n_hash_layers=1, index_top_k=8
)
MODEL = synthetic.Synthetic(CFG, synthetic.RECIPES["q8"], seed=3)
GREEDY = Sampling(temperature=0.0)
RUNNER = engine.Runner


@pytest.fixture(scope="module")
def runners():
    return {}


@pytest.fixture
def run(runners, monkeypatch, capsys):
    """Runs the tool on the small model: (exit status, stdout, stderr). What is compiled once serves all calls."""

    def runner(model, settings, progress):
        if settings not in runners:
            runners[settings] = RUNNER(model, settings)
        return runners[settings]

    monkeypatch.setattr(engine, "open_model", lambda settings, shape: MODEL)
    monkeypatch.setattr(engine, "Runner", runner)
    monkeypatch.setattr(engine, "keep_compilations", lambda: None)

    def call(*argv):
        flags = ["--ctx_start=8", "--ctx_max=20", "--gen_tokens=4", "--batch=2", "--prefill_chunk=4", "--ctx=256"]
        status = cli.run(bench.main, bench.FLAGS, bench.__doc__, [*flags, *argv])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def small(runners, run):
    """The runner that the tool has used."""
    run()
    (runner,) = runners.values()
    return runner


def test_frontiers():
    assert bench.frontiers(2048, 28672, 2) == [2048, 4096, 8192, 16384, 28672]
    assert bench.frontiers(2048, 8192, 2) == [2048, 4096, 8192]
    assert bench.frontiers(5, 5, 2) == [5]
    assert bench.frontiers(1, 4, 1.1) == [1, 2, 3, 4]
    assert bench.frontiers(10, 30, 1.5) == [10, 15, 22, 30]


def test_chunks_are_the_sizes_of_the_calls():
    assert bench.chunks([2048, 4096, 28672], 2048) == {2048}
    assert bench.chunks([100, 230], 64) == {64, 36, 2}


def test_the_table(run, tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    status, out, err = run(f"--csv={path}")
    assert (status, out) == (0, "")
    lines = path.read_text().splitlines()
    assert lines[0] == "ctx_tokens,prefill_tokens,prefill_tps,gen_tokens,gen_tps,kvcache_bytes"  # ds4's
    rows = list(csv.DictReader(lines))
    assert [(r["ctx_tokens"], r["prefill_tokens"], r["gen_tokens"]) for r in rows] == [
        ("8", "16", "8"),
        ("16", "16", "8"),
        ("20", "8", "8"),
    ]
    form = kv.abstract(CFG, "official", "float32", 1, 256)
    # A snapshot's rows are rounded up to 64; with a context of 256 the layer of ratio 4 has just as many.
    csa = kv.nbytes(form) - kv.nbytes(form.hca.rows)
    assert {int(r["kvcache_bytes"]) for r in rows} == {2 * csa}
    assert all(float(r["prefill_tps"]) > 1 and float(r["gen_tps"]) > 1 for r in rows)
    assert list(tmp_path.iterdir()) == [path]
    assert re.search(r"first row after [\d.]+ s, of which compilation [\d.]+ s\nctx_tokens 8  prefill_tokens 16", err)
    assert re.search(r"\npeak process memory: [\d.]+ GiB\n$", err)


def test_without_a_file_the_table_goes_to_stdout(run):
    status, out, _ = run("--ctx_start=20")
    assert status == 0 and len(out.splitlines()) == 2
    assert out.startswith(",".join(bench.COLUMNS) + "\n20,40,")


def test_sequences_are_where_the_frontier_is_and_generation_is_taken_back(small, monkeypatch):
    calls, decode, prefill = [], RUNNER.decode, RUNNER.prefill

    def log_prefill(self, slot, tokens, params, append=False):
        step = prefill(self, slot, tokens, params, append)
        calls.append(("prefill", slot, list(tokens), append, step.token))
        return step

    def log_decode(self, tokens):
        calls.append(("decode", list(self.lengths), dict(tokens)))
        return decode(self, tokens)

    monkeypatch.setattr(RUNNER, "prefill", log_prefill)
    monkeypatch.setattr(RUNNER, "decode", log_decode)
    rows = list(bench.sweep(small, [8, 16, 20], 3, seed=1))
    assert [row.ctx_tokens for row in rows] == [8, 16, 20] and small.lengths == [20, 20]
    monkeypatch.undo()

    text = np.random.default_rng(1).integers(CFG.vocab_size, size=(2, 20)).tolist()
    warm = 2 * bench.WARM  # one size of chunk, and decoding
    assert all(call[0] == ("prefill" if i < bench.WARM else "decode") for i, call in enumerate(calls[:warm]))
    calls = calls[warm:]
    for before, after in ((0, 8), (8, 16), (16, 20)):
        timed, calls = calls[:5], calls[5:]
        for slot, call in enumerate(timed[:2]):
            assert call[:4] == ("prefill", slot, text[slot][before:after], before > 0)
        assert [lengths for _, lengths, _ in timed[2:]] == [[after + i] * 2 for i in range(3)]
        assert timed[2][2] == {slot: call[4] for slot, call in enumerate(timed[:2])}
        # Each sequence continues greedily, as it does alone.
        alone, token = small.prefill(0, text[1][:after], GREEDY), timed[1][4]
        assert alone.token == token
        for i in range(2):
            assert small.decode({0: timed[2 + i][2][1]})[0].token == timed[3 + i][2][1]
    assert calls == []


def test_a_filled_cache_is_one_that_a_sequence_could_have_left(small):
    like = kv.abstract(CFG, "official", "float32", 1, 200)
    state = bench.random_sequence(small, 200, seed=1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    assert int(state.length[0]) == 200
    small.prefill(0, [1, 2, 3, 4], GREEDY)
    real = np.asarray(small.snapshot(0).window["rope"], np.float32)[:, :, :4]
    assert 0.8 < real.std() < 1.2  # rows are normed
    fp8, fp4 = bench_rows(state.csa.rows, 96, 32), bench_rows(state.index.rows, 64)
    for rows in (fp8, fp4):
        assert np.isfinite(rows).all() and abs(rows.std() - 1) < 0.05
        assert abs(rows[0, 0] @ rows[0, 1]) < 0.5 * np.linalg.norm(rows[0, 0]) * np.linalg.norm(rows[0, 1])
    other = bench.random_sequence(small, 200, seed=2)
    assert not np.array_equal(state.window["codes"], other.window["codes"])


def bench_rows(planes, *dims):
    from ds4jax.numerics import Fp4Row, Fp8Row

    fmt = Fp8Row(*dims) if len(dims) == 2 else Fp4Row(*dims)
    return np.asarray(fmt.decode(planes, "float32"))[0]


def test_decoding_at_a_long_context_without_prefilling(run, small):
    status, out, err = run("--fill=200")
    assert status == 0 and "prefill of" not in err
    row = next(csv.DictReader(out.splitlines()))
    assert (row["ctx_tokens"], row["prefill_tokens"], row["prefill_tps"], row["gen_tokens"]) == (
        "200",
        "0",
        "0.00",
        "8",
    )
    assert small.lengths == [200, 200]
    step = small.decode({0: 1, 1: 1})
    assert np.isfinite(step[0].logits).all() and step[0].token == step[0].logits.argmax()
    assert np.abs(step[0].logits - step[1].logits).max() > 0.01  # each slot has rows of its own


def test_rows_are_kept_when_the_sweep_breaks_off(run, small, tmp_path, monkeypatch):
    def prefill(self, slot, tokens, params, append=False):
        if append:
            raise KeyboardInterrupt
        return original(self, slot, tokens, params, append)

    original = RUNNER.prefill
    monkeypatch.setattr(RUNNER, "prefill", prefill)
    path = tmp_path / "out.csv"
    status, _, err = run(f"--csv={path}")
    assert status == 130 and err.endswith("interrupted\n")
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["ctx_tokens", "8"]


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--ctx_start=21"], "ctx_start: found 21, expected 1 to 20 (ctx_max)"),
        (["--ctx_start=0"], "ctx_start: found 0, expected 1 to 20 (ctx_max)"),
        (["--step_mul=1"], "step_mul: found 1, expected more than 1"),
        (["--step_mul=nan"], "step_mul: found nan, expected more than 1"),
        (["--gen_tokens=0"], "gen_tokens: found 0, expected at least 1"),
        (["--fill=0"], "fill: found 0, expected at least 1"),
        (["--fill=254"], "ctx: found 256, expected at least 258 for this table"),
        (["--csv=/nowhere/out.csv"], "csv: found /nowhere/out.csv, expected a file in an existing directory"),
        (["--synthetic=huge"], "should be one of <base|odd|full>"),
    ],
)
def test_refusals(run, runners, flags, problem):
    before = len(runners)
    status, out, err = run(*flags)
    assert (status, out, len(runners)) == (1, "", before) and problem in err


def test_a_table_that_cannot_be_written(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=r"csv: .*there cannot be written: Is a directory"):
        bench.write(tmp_path / "there", [])
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_the_cache_has_room_for_what_is_needed(run, runners, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "Runner", lambda model, settings, progress: asked.append(settings) or exit())
    with pytest.raises(SystemExit):
        cli.run(bench.main, bench.FLAGS, "", ["--config=h200", "--synthetic=full"])
    expected = Settings.load("h200", ctx=28672 + 128, batch=1)
    assert asked == [expected]
