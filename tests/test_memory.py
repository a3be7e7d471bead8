"""The memory plan: it is what is allocated, it refuses what does not fit, and what it offers instead fits."""

import dataclasses
import re
import types
from typing import Any

import jax
import numpy as np
import pytest
from small import CFG

from ds4jax import sharding
from ds4jax.__main__ import main
from ds4jax.engine import compile_cache, memory
from ds4jax.engine.compiled_steps import CompiledSteps
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.types import Sampling
from ds4jax.errors import ConfigError
from ds4jax.io import synthetic
from ds4jax.model import cache as kv
from ds4jax.model import weights
from ds4jax.settings import Settings

MODEL = synthetic.Synthetic(CFG, synthetic.RECIPES["q2"], seed=3)
SETTINGS = Settings("none", ctx=1024, batch=2, prefill_chunk=16)


def gpu(limit, peak=0):
    """A stand-in for `jax.local_devices`: one device that has so many bytes, and has used `peak` of them."""
    stats = {"bytes_limit": limit, "peak_bytes_in_use": peak}
    return lambda: [types.SimpleNamespace(device_kind="a GPU", memory_stats=lambda: stats)]


@pytest.fixture
def limit(monkeypatch):
    return lambda n, peak=0: monkeypatch.setattr(jax, "local_devices", gpu(n, peak))


@pytest.fixture(scope="module")
def runner():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", gpu(2**30))
        return ModelRunner(MODEL, SETTINGS)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_the_plan_is_what_a_runner_allocates(runner):
    assert (runner.plan.weights, runner.plan.cache) == (nbytes(runner.weights), nbytes(runner.cache))
    assert runner.plan.weights == weights.nbytes(weights.abstract(CFG, MODEL.types))


def test_workspace_is_what_steps_need_beside_weights_and_cache(runner):
    plan, logits = runner.plan, 4 * CFG.vocab_size
    assert plan.workspace.keys() == {"prefill", "decode"}
    for (name, *_), program in runner.steps.compiled.items():
        stats = program.memory_analysis()
        results = nbytes(runner._results) if name == "decode" else 0
        assert stats.alias_size_in_bytes == plan.cache + results  # the cache is updated in place
        assert plan.workspace[name] >= stats.temp_size_in_bytes + logits
        assert plan.workspace[name] < stats.temp_size_in_bytes + 10 * logits
    assert plan.total == plan.weights + plan.cache + max(plan.workspace.values())


def test_the_largest_calls_are_compiled_ahead_where_memory_is_limited(runner):
    assert sorted(runner.steps.compiled) == [
        ("decode", (16, 2), (1, 2), (2, CFG.vocab_size), (2,), (2,), (2,), (), *[(2,)] * 5),
        ("prefill", (), (1,), (1, 16), (1,), *[(1,)] * 5, (16,), (1,)),
    ]
    before = set(runner.steps.compiled)
    assert runner.stats.compile_seconds == runner.steps.seconds > 0
    step = runner.prefill(1, [1] * 16, Sampling())
    runner.decode({0: 1, 1: step.token})
    assert set(runner.steps.compiled) == before
    assert np.isfinite(step.logits).all() and step.logits.std() > 0.01


def test_a_mesh_divides_the_weights():
    model = synthetic.Synthetic(CFG, synthetic.RECIPES["q8"])
    tree, mesh = weights.abstract(CFG, model.types), sharding.make_mesh(tp=2, ep=2)
    alone, experts = weights.nbytes(tree), sum(spec.nbytes for spec in jax.tree.leaves(tree.ffn.experts))
    plan = memory.plan(CompiledSteps(model, dataclasses.replace(SETTINGS, tp=2, ep=2)))
    assert alone / 4 < plan.weights < alone - 3 / 4 * experts
    empty = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), weights.structs(tree))
    placed = jax.device_put(empty, weights.shardings(tree, mesh))
    assert plan.weights == sum(s.data.nbytes for x in jax.tree.leaves(placed) for s in x.addressable_shards) / 4
    assert plan.cache == memory.plan(CompiledSteps(MODEL, SETTINGS)).cache  # every device holds it whole


def test_the_full_shape_is_planned_without_memory():
    model = synthetic.Synthetic(synthetic.FULL, synthetic.RECIPES["q2"])
    plan = memory.plan(CompiledSteps(model, Settings("none", ctx=32768, dtype="bfloat16")))
    assert round(plan.weights / 2**30, 2) == 80.76  # the published file
    assert 3.6e3 < plan.cache / 32768 < 4.3e3  # and what a short cache has besides


# ---- what does not fit -----------------------------------------------------------------------------------------------
class Fake:
    """Stands in for `CompiledSteps`: 1000 bytes of weights, 10 of cache and 4 of workspace per token."""

    compilations = []

    def __init__(self, ctx, batch, fixed=0):
        self.ctx, self.batch, self.fixed, self.compiled, self.card, self.can_compile = ctx, batch, fixed, {}, None, True
        self.settings, self.wide = types.SimpleNamespace(ctx=ctx, device_budget_gb=0, devices=1), False
        self.slots, self.cfg = (), CFG
        self.device_weights = self.weights = jax.ShapeDtypeStruct((1000,), np.uint8)
        self.cache = jax.ShapeDtypeStruct((batch, ctx, 10), np.uint8)

    def but(self, key, value):
        ctx, batch = {"ctx": (value, self.batch), "batch": (self.ctx, value)}[key]
        return Fake(ctx, batch, self.fixed)

    def compile_largest(self, sizes=()):
        self.compilations.append((self.ctx, self.batch))
        stats = types.SimpleNamespace(
            temp_size_in_bytes=4 * self.ctx * self.batch + self.fixed,
            output_size_in_bytes=10 * self.ctx * self.batch,
            generated_code_size_in_bytes=7,
        )
        self.compiled["decode", (self.batch,)] = types.SimpleNamespace(memory_analysis=lambda: stats)

    @property
    def true_total(self):
        return 1000 + 14 * self.ctx * self.batch + self.fixed


def fake(*args, **kwargs) -> Any:
    return Fake(*args, **kwargs)


@pytest.fixture
def compilations(monkeypatch):
    monkeypatch.setattr(Fake, "compilations", [])
    return Fake.compilations


@pytest.mark.parametrize("asked", [1280, 4096, 2**20])
@pytest.mark.parametrize("room", [128, 129, 1000, 1279])
def test_the_ctx_that_is_offered_fits(asked, room, limit, compilations):
    limit(Fake(room, 1).true_total)
    programs = fake(asked, 1)
    with pytest.raises(ConfigError) as refusal:
        memory.check(programs)
    (ctx,) = map(int, re.findall(r"would fit: ctx (\d+) with batch 1$", str(refusal.value)))
    assert ctx % 128 == 0 and room / 8 < ctx <= room  # the bound on the workspace was that of more tokens
    assert len(compilations) <= 6


def test_a_ctx_slightly_too_large_takes_no_further_compilation(limit, compilations):
    limit(Fake(1280, 4).true_total - 1)
    programs = fake(1280, 4)
    with pytest.raises(ConfigError, match="would fit: ctx 1152 with batch 4, or batch 3 with ctx 1280$") as refusal:
        memory.check(programs)
    table = str(refusal.value).splitlines()
    assert table[0] == "memory: found 0.0 GiB, expected at least 0.0 GiB"
    assert table[1] == "GiB on each device (a GPU)"
    assert [line.split()[0] for line in table[2:-1]] == [
        *("weights", "cache", "workspace", "together", "limit", "left", "programs")
    ]
    assert compilations == [(1280, 4)]


def test_what_fits_exactly_is_not_refused(limit, compilations):
    limit(Fake(1280, 4).true_total)
    plan = memory.check(fake(1280, 4))
    assert (plan.total, plan.programs, plan.workspace) == (plan.limit, 7, {"decode": 4 * 1280 * 4})
    limit(None)
    assert memory.check(fake(2**40, 4)).workspace == {}  # nobody says how much there is: nothing to compile for


def test_a_smaller_chunk_is_offered_when_the_workspace_is_what_is_too_large(limit, compilations):
    limit(50_000)
    with pytest.raises(ConfigError, match="no smaller ctx or batch alone would fit; a smaller prefill_chunk needs"):
        memory.check(fake(1280, 2, fixed=10**6))


def test_weights_that_are_too_large_are_refused_at_once(limit, monkeypatch):
    monkeypatch.setattr(weights, "init_random", lambda *_: pytest.fail("made weights"))
    monkeypatch.setattr(CompiledSteps, "compile_largest", lambda *_: pytest.fail("compiled"))
    limit(2**20)
    with pytest.raises(ConfigError, match=r"no ctx or batch would fit: more devices \(tp, ep\), a smaller file"):
        ModelRunner(MODEL, SETTINGS)


def test_planned_and_actual_peak_are_shown_together(runner, limit):
    assert re.fullmatch(r"peak process memory: [\d.]+ GiB", memory.describe_peak(runner.steps))
    limit(2**30, peak=int(runner.plan.total * 1.02))
    shown = memory.describe_peak(runner.steps)
    assert re.fullmatch(r"peak device memory: 0.\d\d GiB, planned 0.\d\d GiB \(\+2.0%\)", shown)


# ---- the tool --------------------------------------------------------------------------------------------------------
@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(compile_cache, "keep_compilations", lambda: None)

    def call(*argv):
        status = main(["memory", *argv])
        return status, *capsys.readouterr()

    return call


def test_the_table(run):
    size = "--ctx=32768", "--batch=1"
    status, out, err = run("--synthetic=full", "--config=h200", *size, "--nocompile", "--device=here")
    assert (status, err) == (0, "")
    assert out.startswith("shapes: full, in the types of q2\nGiB on each device (cpu)\n")
    table = dict(line.split(maxsplit=1) for line in out.splitlines()[2:])
    assert table["weights"] == "80.759"
    assert table["cache"].endswith("batch 1, ctx 32768")
    assert table["workspace"] == "?  not compiled" and table["limit"].startswith("?")
    cache = kv.nbytes(kv.abstract(synthetic.FULL, "official", "bfloat16", 1, 32768)) / 2**30
    assert float(table["together"]) == pytest.approx(80.759 + cache, abs=2e-3)


def test_the_tool_fails_where_loading_would(run, limit):
    limit(80 * 2**30)
    status, out, _ = run("--synthetic=full", "--config=h200", "--device=here")
    assert status == 1 and out.splitlines()[-1].startswith("no ctx or batch would fit")
    assert "\nleft          -5.9" in out


def test_the_steps_are_compiled_for_the_workspace(run, monkeypatch, compilations):
    monkeypatch.setattr(memory, "steps", lambda model, settings, **_: Fake(settings.ctx, settings.batch))
    status, out, _ = run("--synthetic=base", "--ctx=1048576", "--batch=16")
    assert (status, compilations) == (0, [(2**20, 16)])
    assert "workspace      0.062  decode 0.062, compiled here\n" in out


def test_a_missing_file_is_an_error(run):
    status, out, err = run("--model=/nowhere.gguf")
    assert (status, out) == (1, "") and "no such file" in err


def test_peak_memory(monkeypatch):
    n, what = memory.peak_memory()
    assert what == "process memory" and 2**27 < n < 2**40
    monkeypatch.setattr(
        jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 5})]
    )
    assert memory.peak_memory() == (5, "device memory")
