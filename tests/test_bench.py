"""The sweep over context: its frontiers and columns, and what is in the cache at each. The sweep over kernels."""

import csv
import dataclasses
import functools
import json
import re
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import autotune
from small import CFG

from ds4jax.engine import compile_cache
from ds4jax.engine import model_runner as engine
from ds4jax.engine.compiled_steps import BLOCK
from ds4jax.engine.types import Sampling
from ds4jax.errors import ConfigError
from ds4jax.io import synthetic
from ds4jax.model import cache as kv
from ds4jax.model.weights import Route, Stack
from ds4jax.ops import check, tuned
from ds4jax.settings import Settings
from ds4jax.tools import bench, cli, limits
from pallas_kernels import common, compressor, grouped_gemm, latent

MODEL = synthetic.Synthetic(CFG, synthetic.RECIPES["q8"], seed=3)
GREEDY = Sampling(temperature=0.0)
RUNNER = engine.ModelRunner


@pytest.fixture(scope="module")
def runners():
    return {}


@pytest.fixture
def run(runners, monkeypatch, capsys):
    """Runs the tool on the small model: (exit status, stdout, stderr). What is compiled once serves all calls."""

    def runner(model, settings, progress, sizes):
        assert set(sizes) <= {4}
        if settings not in runners:
            runners[settings] = RUNNER(model, settings)
        return runners[settings]

    monkeypatch.setattr(engine, "open_model", lambda settings, *_: MODEL)
    monkeypatch.setattr(engine, "ModelRunner", runner)
    monkeypatch.setattr(compile_cache, "keep_compilations", lambda: None)

    def call(*argv):
        flags = ["--ctx_start=8", "--ctx_max=20", "--gen_tokens=4", "--batch=2", "--prefill_chunk=4", "--ctx=256"]
        status = cli.run(bench.main, bench.FLAGS, bench.__doc__, [*flags, *argv])
        return status, *capsys.readouterr()

    return call


def test_what_drafts_must_hold():
    assert bench.break_even(2.0, 1) == "an acceptance of 1.00 on"
    assert bench.break_even(1 + 0.5 + 0.25, 2) == "an acceptance of 0.50 on"
    assert bench.break_even(6.5, 5) == "no acceptance on"


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["--draft=auto", "--acceptance=0.9,x"], "acceptance: found '0.9,x', expected probabilities, 0.83,0.73,…"),
        (["--draft=auto", "--acceptance=1.2"], "acceptance: found '1.2', expected probabilities"),
        (["--acceptance=0.5"], "acceptance: found it without drafts, expected --draft auto or a drafter's file"),
    ],
)
def test_wrong_acceptances_are_one_line(run, argv, problem):
    status, _, err = run(*argv)
    assert status == 1 and err.startswith(f"error: {problem}")


@pytest.mark.slow
def test_rounds_of_drafts_are_timed_with_the_acceptance_that_is_asked_for():
    """The first two drafts always count as accepted, the third never; nothing of it is left in the slots."""
    cfg = dataclasses.replace(CFG, n_mtp=1)
    settings = Settings("none", ctx=1280, draft="auto", draft_tokens=3)
    runner = RUNNER(synthetic.Synthetic(cfg, synthetic.RECIPES["q8"]), settings, 2, acceptance=(1.0, 1.0, 0.0))
    last = {slot: runner.prefill(slot, [1, 2, 3], GREEDY).token for slot in range(2)}
    before = runner.snapshot(1)
    title, two, three, said, _ = bench.drafted(runner, last)
    assert re.fullmatch(r"drafts after 3 tokens, 2 sequences: a plain step takes [\d.]+ ms", title)
    assert re.search(r"2 drafts: .* steps; 3\.00 tokens", two) and re.search(r"3 drafts: .*; 3\.00 tokens", three)
    assert re.search(r"by place 1\.00, 1\.00, 0\.00; the engine would draft (2|3|none)", said)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(runner.snapshot(1)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert runner.lengths == [3, 3]


@pytest.fixture
def small(runners, run):
    """The runner that the tool has used."""
    run()
    (runner,) = runners.values()
    return runner


def test_skewed_routers_choose_by_zipfs_law():
    """Of the scores of normal logits, how often each of 256 experts is among six, against its rank."""
    stack = Stack((jnp.zeros((2, 256)),), ((1, 2),))
    (bias,) = bench.skewed(Route(stack), 1.0, 0).bias.groups
    assert bias.shape == (2, 256) and not np.array_equal(bias[0], bias[1])
    scores = np.sqrt(np.log1p(np.exp(np.random.default_rng(0).normal(size=(4000, 256)))))
    chosen = np.bincount(np.argsort(-scores - np.asarray(bias[0]))[:, :6].ravel(), minlength=256)
    rank = 1 + np.argsort(np.argsort(-np.asarray(bias[0])))
    slope = np.polyfit(np.log(rank), np.log(chosen + 0.5), 1)[0]
    assert -1.15 < slope < -0.85 and 0.6 < chosen[rank <= 43].sum() / chosen.sum() < 0.7


def test_the_flag_for_skew_replaces_the_routers(small, run, monkeypatch):
    made = []

    def skewed(route, exponent, seed):
        assert (exponent, seed) == (1.5, 7)
        made.append(dataclasses.replace(route))  # the same, so that the runner serves the other tests, too
        return made[0]

    monkeypatch.setattr(bench, "skewed", skewed)
    assert run("--skew=1.5", "--seed=7")[0] == 0
    assert small.weights.route is made[0]


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
    calls, decode, prefill = [], RUNNER.decode_block, RUNNER.prefill

    def log_prefill(self, slot, tokens, params, append=False):
        step = prefill(self, slot, tokens, params, append)
        calls.append(("prefill", slot, list(tokens), append, step.token))
        return step

    def log_decode(self, tokens, n):
        before, block = list(self.lengths), decode(self, tokens, n)
        calls.append(("decode", before, dict(tokens), n, block.tokens()))
        return block

    monkeypatch.setattr(RUNNER, "prefill", log_prefill)
    monkeypatch.setattr(RUNNER, "decode_block", log_decode)
    rows = list(bench.sweep(small, [8, 16, 20], BLOCK + 3, seed=1))
    assert [row.ctx_tokens for row in rows] == [8, 16, 20] and small.lengths == [20, 20]
    monkeypatch.undo()

    text = np.random.default_rng(1).integers(CFG.vocab_size, size=(2, 20)).tolist()
    warm = 2 * bench.WARM  # one size of chunk, and decoding
    assert all(call[0] == ("prefill" if i < bench.WARM else "decode") for i, call in enumerate(calls[:warm]))
    calls = calls[warm:]
    for before, after in ((0, 8), (8, 16), (16, 20)):
        timed, calls = calls[:4], calls[4:]
        for slot, call in enumerate(timed[:2]):
            assert call[:4] == ("prefill", slot, text[slot][before:after], before > 0)
        first = {slot: call[4] for slot, call in enumerate(timed[:2])}
        assert [call[1:4] for call in timed[2:]] == [
            ([after] * 2, first, BLOCK),
            ([after + BLOCK] * 2, dict.fromkeys(first), 3),
        ]
        # Each sequence continues greedily, as it does alone.
        found = timed[2][4][1] + timed[3][4][1]
        small.prefill(0, text[1][:after], GREEDY)
        for token, following in zip([first[1], *found], found, strict=False):
            assert small.decode({0: token})[0].token == following
    assert calls == []


@pytest.mark.slow
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
    from ds4jax.numerics.rows import Fp4Row, Fp8Row

    fmt = Fp8Row(*dims) if len(dims) == 2 else Fp4Row(*dims)
    return np.asarray(fmt.decode(planes, "float32"))[0]


@pytest.mark.slow
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
        (["--step_mul=nan"], "step_mul: found nan, expected a number"),
        (["--gen_tokens=0"], "gen_tokens: found 0, expected at least 1"),
        (["--fill=0"], "fill: found 0, expected at least 1"),
        (["--fill=254"], "ctx: found 256, expected at least 258 for this table"),
        (["--csv=/nowhere/out.csv"], "csv: found /nowhere/out.csv, expected a file in an existing directory"),
        (["--synthetic=huge"], "should be one of <base|odd|kernel|full>"),
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
    monkeypatch.setattr(
        engine, "ModelRunner", lambda model, settings, progress, sizes: asked.append(settings) or exit()
    )
    with pytest.raises(SystemExit):
        cli.run(bench.main, bench.FLAGS, "", ["--config=h200", "--synthetic=full"])
    expected = Settings.load("h200", ctx=28672 + 128, batch=1)
    assert asked == [expected]


# ---- scripts/autotune.py ----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class ToyConfig:
    block: int
    how: str = "right"


@dataclasses.dataclass(frozen=True)
class ToyShape:
    n: int
    factor: float = 3.0
    nbytes: int = 2**27
    flops: int = 0

    @property
    def static(self):
        return {"factor": self.factor}

    def inputs(self, key):
        return (jax.random.normal(key, (self.n,)),)


def toy_op(x, *, factor, config, interpret=False):
    if config.how == "raises":
        raise ValueError("block is not\na divisor")

    def kernel(x, y):
        y[...] = x[...] * (factor if config.how != "wrong" else 2.0)

    block = pl.BlockSpec((config.block,), lambda i: (i,))
    call = common.call(
        kernel, name="toy", grid=(x.shape[0] // config.block,), out_shape=x, in_specs=[block], out_specs=block,
        num_warps=4, num_stages=1, interpret=interpret,
    )  # fmt: skip
    return {"y": call(x), "n": jnp.int32(x.shape[0])}


def toy_reference(x, *, factor):
    if factor < 0:
        raise ValueError("no such factor")
    return {"y": factor * x, "n": jnp.int32(x.shape[0])}


@pytest.fixture
def toy():
    return types.SimpleNamespace(
        SHAPES={"small": ToyShape(64), "decode 1": ToyShape(256)},
        toy=toy_op,
        default_config=lambda shape: ToyConfig(32),
        configs=lambda shape: [ToyConfig(32), ToyConfig(64), ToyConfig(64, "raises"), ToyConfig(64, "wrong")],
    )


@pytest.fixture
def sweep_kernels(toy, monkeypatch, capsys, tmp_path):
    cases = [autotune.Case("toy", name, toy, shape) for name, shape in toy.SHAPES.items()]
    monkeypatch.setattr(autotune, "discover", lambda ops, shapes: cases)
    monkeypatch.setattr(check, "formula", lambda name: toy_reference)
    monkeypatch.setattr(limits, "measure", lambda: limits.Device("A GPU", 1e12, 1e12))
    monkeypatch.setattr(limits, "ROUND", 1e-4)
    monkeypatch.setattr(autotune, "LAUNCH", 1e-5)  # two turns
    monkeypatch.setattr(tuned, "CONFIG_DIR", tmp_path)

    def call(*argv):
        flags = [f"--out={tmp_path / 'out.json'}", "--repeats=2", *argv]
        status = cli.run(autotune.main, autotune.FLAGS, "", flags)
        out, err = capsys.readouterr()
        assert err == ""
        return status, out, json.loads((tmp_path / "out.json").read_text())

    return call


def test_the_sweep_of_a_kernel(sweep_kernels, tmp_path):
    status, out, report = sweep_kernels("--write")
    assert status == 0
    results = report["results"]
    # Defaults first, then the rest; all of one shape in the order of their times, what failed at the end.
    assert [(r["shape"], r["default"]) for r in results] == [("small", True), ("decode 1", True)] + [
        ("small", False)
    ] * 3 + [("decode 1", False)] * 3
    for group in (results[2:5], results[5:]):
        by_how = {r["config"]["how"]: r for r in group}
        assert by_how["right"]["error"] < 1e-6 and by_how["right"]["repeats"]
        assert by_how["wrong"]["error"] == pytest.approx(1 / 3, rel=1e-5)
        assert by_how["raises"]["us"] is None and by_how["raises"]["failed"] == "ValueError: block is not"
        assert [r["us"] for r in group[:2]] == sorted(r["us"] for r in group[:2]) and group[2]["failed"]
    for r in results:
        if r["us"]:
            assert r["gb_per_s"] == pytest.approx(2**27 / r["us"] / 1e3)
            assert r["floor_share"] == pytest.approx(2**27 / 1e12 * 1e6 / r["us"])
            assert not r["cached"]  # four copies of 128 MiB
    assert "toy, small: 134.22 MB, 0.00 GFLOP, floor 134.22 µs\n" in out
    assert "    failed  block=64 how=raises: ValueError: block is not\n" in out
    assert out.count("block=32 how=right (default)\n") == 2

    # The fastest that is right is written, beside what was there.
    path = tmp_path / "tuned" / "a_gpu.json"
    tuned = json.loads(path.read_text())
    for shape in ("small", "decode 1"):
        right = [r for r in results if r["shape"] == shape and r["config"]["how"] == "right"]
        assert tuned["toy"][shape] == min(right, key=lambda r: r["us"])["config"]
    path.write_text(json.dumps({"other": {"s": {"block": 1}}, "toy": {"small": {"block": 0}}}))
    sweep_kernels("--write", "--nosweep")
    assert json.loads(path.read_text()) == {
        "other": {"s": {"block": 1}},
        "toy": dict.fromkeys(("decode 1", "small"), {"block": 32, "how": "right"}),
    }


def test_shapes_that_are_one_call_get_one_config(toy, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Shape:
        n: int
        key = "equal"

    toy.SHAPES = {"first": Shape(1), "second": Shape(2), "third": Shape(3)}
    cases = [autotune.Case("toy", name, toy, shape) for name, shape in toy.SHAPES.items()][:2]

    def result(shape, block, us, **changes):
        fields = {"us": us, "repeats": True, "error": 0.0, "default": block == 1} | changes
        return fields | {"op": "toy", "shape": shape, "config": {"block": block}}

    def winner(*results):
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps({"toy": {"third": {"block": 99}, "other": {"block": 7}}}))
        n = autotune.write_winners(path, cases, list(results), 0.02)
        written = json.loads(path.read_text())["toy"]
        assert written.pop("other") == {"block": 7}  # a shape of another call
        return n, written

    one, two = result("first", 1, 10.0), result("second", 1, 100.0)
    # 2 gains most on the first, but loses on the second; 4 gains on both; 8 was tried on one only.
    tried = [result("first", 2, 4.0), result("second", 2, 300.0), result("first", 4, 8.0), result("second", 4, 70.0)]
    assert winner(one, two, *tried) == (1, {"first": {"block": 4}})
    assert winner(one, two, *tried, result("second", 8, 60.0)) == (1, {"first": {"block": 8}})
    assert winner(one, two, *tried[2:], result("first", 2, 4.0), result("second", 2, 5.0, error=0.5))[1] == {
        "first": {"block": 4}
    }
    assert winner(result("first", 1, None)) == (0, {"third": {"block": 99}})


def test_defaults_come_first_when_time_is_short(sweep_kernels, monkeypatch):
    clock = iter(range(0, 10**6, 50))
    fake = types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(autotune, "time", fake)
    _, _, report = sweep_kernels("--minutes=2")
    assert [(r["shape"], r["default"]) for r in report["results"]] == [("small", True), ("decode 1", True)]


def test_a_shape_that_cannot_be_checked_stops_nothing(sweep_kernels, toy, monkeypatch):
    shapes = toy.SHAPES = {"bad": ToyShape(64, factor=-1.0), **toy.SHAPES}
    cases = [autotune.Case("toy", name, toy, shape) for name, shape in shapes.items()]
    monkeypatch.setattr(autotune, "discover", lambda ops, names: cases)
    status, out, report = sweep_kernels("--nosweep")
    assert status == 1
    assert [r["failed"] for r in report["results"]] == ["reference: ValueError: no such factor", None, None]
    assert "  toy, bad: all failed\n" in out


def test_gpus_share_the_shapes(sweep_kernels, monkeypatch, tmp_path):
    started = []

    class Child:
        def __init__(self, command, env):
            started.append(env["CUDA_VISIBLE_DEVICES"])
            self.flags = [flag for flag in command if flag.startswith("--")]

        def wait(self):
            flags = self.flags
            autotune.FLAGS.unparse_flags()
            autotune.FLAGS(["", *flags])
            path = next(flag for flag in flags if flag.startswith("--out=")).removeprefix("--out=")
            report = autotune.run(autotune.discover((), ()), float("inf"))
            autotune.save(Path(path), report)
            autotune.FLAGS.unparse_flags()
            autotune.FLAGS(["", f"--out={tmp_path / 'out.json'}"])

    monkeypatch.setattr(autotune.subprocess, "Popen", Child)
    _, _, report = sweep_kernels("--gpus=0,3", "--nosweep")
    assert started == ["0", "3"]
    assert [r["shape"] for r in report["results"]] == ["small", "decode 1"]


@pytest.mark.slow
def test_copies_are_distinct_and_as_many_as_needed():
    inputs = (jnp.arange(8), {"w": jnp.ones(3), "none": None})

    def pointers(nbytes):
        sets = autotune.copies(ToyShape(8, nbytes=nbytes), inputs, jnp.zeros(1))
        assert all(autotune.norm_error(s, inputs) == 0 for s in sets)
        return [x.unsafe_buffer_pointer() for s in sets for x in jax.tree.leaves(s)]

    for nbytes, n in ((2**27, 4), (2**30, 2), (1, 64)):
        found = pointers(nbytes)
        assert len(found) == len(set(found)) == 2 * n


def test_errors_of_floats_integers_and_infinities():
    error, inf = autotune.norm_error, jnp.inf
    assert error(jnp.array([3.0, 4.5]), jnp.array([3.0, 4.0])) == pytest.approx(0.1)
    assert error(jnp.array([3, 4], jnp.bfloat16), jnp.array([3.0, 4.0])) == 0
    assert error(jnp.array([1, 2, 3, 4]), jnp.array([1, 2, 4, 3])) == 0.5
    assert error(jnp.array([1.0, -inf]), jnp.array([1.0, -inf])) == 0
    assert error(jnp.array([1.0, -3e38]), jnp.array([1.0, -inf])) == inf
    assert error(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 2.0])) != 0
    assert error((jnp.ones(2), jnp.array([True])), [jnp.ones(2), jnp.array([False])]) == 1
    with pytest.raises(ValueError, match=r"results \[\(2,\)\] where the reference has \[\(3,\)\]"):
        error(jnp.ones(2), jnp.ones(3))
    assert autotune.same_bits([(jnp.array([1.0, jnp.nan]),)] * 3)
    assert not autotune.same_bits([jnp.ones(2), jnp.ones(2), jnp.array([1.0, 1 + 1e-6])])


def test_what_is_updated_in_place_passes_from_turn_to_turn():
    def part(x, state):
        return x + 1, {"n": state["n"] + x}

    def whole(state, x):
        return state["n"] + x, state["n"]

    def last(f, in_place, inputs):
        first = autotune.before(in_place, inputs, jax.eval_shape(f, *inputs))
        return jax.jit(functools.partial(autotune.looped, f, in_place, 4))([first], [inputs])[0]

    x, n = jnp.int32(2), jnp.int32(5)
    assert last(part, (1, 1), (x, {"n": n})) == (3, {"n": 13})
    assert last(lambda state, x: {"n": whole(state, x)[0]}, (0, None), ({"n": n}, x)) == {"n": 13}


@pytest.mark.slow
def test_a_kernel_that_updates_in_place_is_compared_with_a_reference_that_does(monkeypatch):
    device = limits.Device("A GPU", 1e12, 1e12)
    monkeypatch.setattr(limits, "ROUND", 1e-4)
    monkeypatch.setattr(autotune, "LAUNCH", 1e-5)
    monkeypatch.setattr(autotune, "MOST_CALLS", 2)
    for op, shape in (
        (latent, latent.Shape(2, heads=2, dim=128, window=8)),
        (compressor, compressor.Shape(1, (compressor.Part(128, 4, overlap=True),), -1, rows=4)),
    ):
        case = autotune.Case(op.__name__.split(".")[1], "", op, shape)
        (result,) = autotune.measure(case, [op.default_config(shape)], device, 1, float("inf"))
        assert result.failed is None and result.repeats and result.error is not None and result.error < 1e-3


def test_a_product_that_a_config_leaves_to_xla_is_timed_as_xlas(monkeypatch):
    monkeypatch.setattr(limits, "ROUND", 1e-4)
    monkeypatch.setattr(autotune, "LAUNCH", 1e-5)
    monkeypatch.setattr(autotune, "MOST_CALLS", 2)
    shape = grouped_gemm.Shape("linear", 40, 64, 256, "Q8_0", 2, groups=2)
    case = autotune.Case("grouped_gemm", "", grouped_gemm, shape)
    configs = [grouped_gemm.Config(fused=False), grouped_gemm.Config(32, 2)]
    assert configs[0] in grouped_gemm.configs(shape)
    for result in autotune.measure(case, configs, limits.Device("A GPU", 1e12, 1e12), 1, float("inf")):
        assert result.failed is None and result.repeats
        assert result.error is not None and 1e-4 < result.error < 3e-3  # bfloat16, both


def test_the_device_is_measured():
    device = limits.measure()
    assert 1e8 < device.bandwidth < 1e13 and 1e7 < device.rate < 1e15
    floor = limits.Device("", 2.0, 4.0).floor
    assert (floor(6, 8), floor(6, 16)) == (3, 4)


def test_a_loop_is_as_long_as_a_launch_should_take():
    assert autotune.turns(0.0, 64) == round(0.02 / (64 * autotune.KERNEL)) == 104
    assert autotune.turns(0.0, 1) == 200 and autotune.turns(1.0, 2) == 2


def test_kernels_are_found_by_name_and_pattern():
    names = [case.name for case in autotune.discover(["topk"], ["decode*", "few visible"])]
    assert "decode 28k" in names and "few visible" in names and "prefill 1024 at 28k" not in names
    case = autotune.discover(["topk"], ["decode 28k"])[0]
    assert callable(case.op) and case.candidates() == case.candidates()
    assert case.module.default_config(case.shape) not in case.candidates()
    with pytest.raises(ConfigError, match="ops: found 'topkk', expected some of .*topk"):
        autotune.discover(["topkk"], ["*"])
    with pytest.raises(ConfigError, match=r"shapes: found nothing\*, expected names or patterns"):
        autotune.discover(["topk"], ["nothing*"])
