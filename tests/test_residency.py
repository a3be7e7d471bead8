"""Routed experts in host memory: what is said is the same bit for bit, the slots hold what they should, and no more."""

import dataclasses
import socket
import types

import jax
import numpy as np
import pytest
import small

from ds4jax.__main__ import main
from ds4jax.engine import compile_cache, memory, model_runner
from ds4jax.engine.compiled_steps import CompiledSteps
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.routing_trace import Trace, Writer, replay
from ds4jax.engine.types import Sampling
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.io import synthetic
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.model import residency
from ds4jax.settings import Settings
from ds4jax.tools import serve

CFG = dataclasses.replace(small.CFG, compress_ratios=(0, 0))  # a layer that routes by id, and one by score
SETTINGS = Settings("none", ctx=512, batch=2, prefill_chunk=32)
PROMPT = [i * 37 % CFG.vocab_size for i in range(32)]
MODEL = synthetic.Synthetic(CFG, synthetic.RECIPES["q8"])
SLOTS = 20  # for the 32 experts of both layers


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    synthetic.write_synthetic(path, CFG, 3, synthetic.RECIPES["q8"])
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def all_there(source):
    return ModelRunner(source, SETTINGS)


@pytest.fixture(scope="module")
def held(source, all_there):
    with pytest.MonkeyPatch.context() as patch:
        return with_slots(patch, source, SETTINGS)


def with_slots(patch, source, settings, slots=SLOTS, record=lambda ids: recorded.append(np.array(ids))):
    """A runner that has slots without a budget, so that nothing is compiled but what it runs."""
    steps = CompiledSteps(source, settings, record=record)
    patch.setattr(memory, "steps", lambda *_, **__: steps.with_slots([slots]))
    return ModelRunner(source, settings)


recorded = []  # of the passes of `held`


def said(runner):
    """Logits of two prompts in chunks, of decoding both sequences and one of them, and of what a copy says after it."""
    out = [runner.prefill(slot, PROMPT[slot:], Sampling()).logits for slot in (0, 1)]
    tokens = {slot: int(logits.argmax()) for slot, logits in enumerate(out)}
    for active in ((0, 1), (0, 1), (1,), (0, 1)):
        found = runner.decode({slot: tokens[slot] for slot in active})
        out += [found[slot].logits for slot in active]
        tokens |= {slot: step.token for slot, step in found.items()}
    block = runner.decode_block(dict.fromkeys((0, 1)), 8).tokens()
    runner.restore(1, runner.snapshot(0), Sampling())
    return np.stack([*out, runner.decode({1: 5})[1].logits]), block


def test_what_is_said_does_not_depend_on_where_experts_are(all_there, held):
    assert held.plan.slots == (SLOTS, CFG.n_layers * CFG.n_experts)
    expected, found = said(all_there), said(held)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert min(held.brought) > 10 and all_there.brought == (0, 0)
    *_, planes = held.take(0)
    held.put(1, planes, Sampling())
    assert held.lengths[1] == held.lengths[0]
    holds_what_it_says(held)
    held.reset()
    assert held.brought == (0, 0)
    holds_what_it_says(held)


def test_a_trace_replayed_finds_what_the_run_found(held, tmp_path):
    recorded.clear()
    held.reset()
    said(held)
    path = tmp_path / "routing.trace"
    write = Writer(path, CFG)
    for ids in recorded:
        write(ids)
    trace = Trace.read(path, CFG)
    assert [rows for rows, _ in trace.passes][:5] == [32, 32, 2, 2, 2]
    assert [len(ids) for _, ids in trace.passes][:5] == [32, 31, 2, 2, 1]
    found = replay(trace, [(0, 1)], [SLOTS])
    assert (found.found, found.lacked) == held.brought and found.chunks == 2 and found.streamed > 0
    path.write_bytes(path.read_bytes()[:-1])
    assert len(Trace.read(path, CFG).passes) == len(trace.passes) - 1


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a tool that cannot open its model; → what it says of that."""
    monkeypatch.setattr(compile_cache, "keep_compilations", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(serve, "bind", lambda host, port: listener)

        def call(name, *argv):
            assert main([name, "--config=tiny", *argv]) == 1
            return capsys.readouterr().err

        yield call


@pytest.mark.parametrize("argv", [("generate", "Hello"), ("serve",)], ids=lambda argv: argv[0])
def test_the_flag_for_a_trace_gives_the_runner_a_writer(argv, tool, monkeypatch, tmp_path):
    path, read = tmp_path / "routing.trace", []

    def runner(source, *_, record, **__):
        ids = np.zeros((source.cfg.n_layers, 3, source.cfg.n_experts_used), np.int32)
        record(ids)
        read.extend(Trace.read(path, source.cfg).passes)
        raise Ds4Error("that is enough")

    monkeypatch.setattr(model_runner, "ModelRunner", runner)
    assert "that is enough" in tool(*argv, f"--trace_routing={path}") and [rows for rows, _ in read] == [3]


def test_what_a_runner_records_its_steps_record(monkeypatch):
    def record(ids):
        pass

    for nbytes in (0, memory.plan(CompiledSteps(MODEL, SETTINGS)).total - 10**6):
        assert memory.steps(MODEL, budget(nbytes), compiled=False, record=record)._record is record

    def steps(*_, record, **__):
        given.append(record)
        raise Ds4Error("that is enough")

    given = []
    monkeypatch.setattr(memory, "steps", steps)
    with pytest.raises(Ds4Error, match="that is enough"):
        ModelRunner(MODEL, SETTINGS, record=record)
    assert given == [record]


@pytest.mark.slow
def test_a_text_is_read_with_the_same_slots(all_there, held):
    np.testing.assert_array_equal(held.logits(PROMPT[:3]), all_there.logits(PROMPT[:3]))
    holds_what_it_says(held)


@pytest.mark.slow
def test_rounds_of_drafts_say_the_same(monkeypatch):
    """The drafter's own experts are always there."""
    model, settings = MODEL.with_drafter(), dataclasses.replace(SETTINGS, draft="auto")
    runners = ModelRunner(model, settings), with_slots(monkeypatch, model, settings)
    every = []
    for runner in runners:
        first = runner.prefill(0, PROMPT[:3], Sampling())
        rounds = runner.speculate({0: first.token}, {0: 12}, runner.steps.draft_counts[0], 8)
        every.append((first.token, rounds.tokens(), np.asarray(rounds.batch_logits)))
    assert every[0][:2] == every[1][:2] and len(every[0][1][0]) >= 8
    np.testing.assert_array_equal(every[0][2], every[1][2])
    assert min(runners[1].brought) > 0


@pytest.mark.gpu
def test_what_is_said_on_a_gpu(monkeypatch):
    """Through the kernels."""
    model = synthetic.Synthetic(synthetic.KERNEL, synthetic.RECIPES["q2"])
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16", kernels="pallas")
    all_there, held = ModelRunner(model, settings), with_slots(monkeypatch, model, settings, 30, None)
    expected, found = said(all_there), said(held)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1] and min(held.brought) > 0
    holds_what_it_says(held)


def holds_what_it_says(runner):
    """Every slot has the bytes of the expert that it holds, and is found by it."""
    experts, n_experts = runner.weights.ffn.experts, runner.cfg.n_experts
    assert {x.sharding.memory_kind for x in jax.tree.leaves(experts)} == {"pinned_host"}
    experts, pools = jax.device_get((experts, runner.cache.experts.pools))
    for pool in pools:
        slot, holds = np.asarray(pool.slot), np.asarray(pool.holds)
        assert (slot >= 0).sum() == len(holds) and (slot.reshape(-1)[holds] == np.arange(len(holds))).all()
        for place, number in enumerate(holds):
            layer, expert = pool.layers[number // n_experts], number % n_experts
            for name in ("gate", "up", "down"):
                found = jax.tree.map(lambda x, i=place: x[i], getattr(pool.experts, name))
                expected = jax.tree.map(lambda x, i=expert: x[i], getattr(experts, name)[layer])
                jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_plan_is_what_is_on_the_device_and_the_host(held):
    plan = held.plan
    on_device = residency.with_experts(held.weights, None), held.cache
    assert plan.weights + plan.cache + plan.residents == sum(x.nbytes for x in jax.tree.leaves(on_device))
    assert plan.host == sum(x.nbytes for x in jax.tree.leaves(held.weights.ffn.experts))
    for program in held.steps.compiled.values():  # the slots stay in place
        assert program.memory_analysis().alias_size_in_bytes >= plan.cache + plan.residents


# ---- the budget ------------------------------------------------------------------------------------------------------
def budget(nbytes, **changes):
    return dataclasses.replace(SETTINGS, device_budget_gb=nbytes / 2**30, **changes)


@pytest.fixture
def compiled(monkeypatch):
    """Stands for compilation: so many bytes of workspace, and the buffer for a layer. → the slots compiled for."""
    found = []

    def compile_largest(steps, sizes=()):
        layer = residency.whole_layer(steps.tree, CFG) if steps.slots else 0
        needs = {"temp_size_in_bytes": 10**6 + layer, "generated_code_size_in_bytes": 7}
        stats = types.SimpleNamespace(**needs, output_size_in_bytes=memory.per_device(steps.cache))
        steps.compiled["prefill", len(found)] = types.SimpleNamespace(memory_analysis=lambda: stats)
        found.append(steps.slots)

    monkeypatch.setattr(CompiledSteps, "compile_largest", compile_largest)
    return found


def test_as_many_experts_as_the_budget_has_room_for(compiled):
    steps = CompiledSteps(MODEL, SETTINGS)
    whole, every = memory.plan(steps).total + 10**6, residency.total(steps.tree, CFG)
    assert memory.steps(MODEL, budget(whole)).slots == ()
    for less in (0.6, 0.75):
        settings = budget(whole + residency.whole_layer(steps.tree, CFG) - round(less * every))
        found = memory.check(memory.steps(MODEL, settings))
        some = int(CFG.n_layers * CFG.n_experts * (1 - less))
        assert found.slots[0] in (some - 1, some) and found.limit is not None
        assert 0 <= found.limit - found.total <= every / (CFG.n_layers * CFG.n_experts) + 1000
        assert found.host == every and "device_budget_gb" in str(found)


def test_a_budget_that_is_too_small_is_refused_with_the_plan(compiled):
    steps = CompiledSteps(MODEL, SETTINGS)
    smallest = (
        memory.plan(steps).total + 10**6 - residency.total(steps.tree, CFG) + residency.whole_layer(steps.tree, CFG)
    )
    smallest += residency.least(steps.tree, CFG)
    assert memory.steps(MODEL, budget(smallest)).slots == (CFG.n_experts_used,)
    with pytest.raises(ConfigError, match=r"device_budget_gb: found 0\.\d+ GiB, expected at least 0\.\d+ GiB") as error:
        memory.steps(MODEL, budget(smallest - 10**5))
    assert smallest <= float(str(error.value).split()[7]) * 2**30 < smallest + 2**30 / 100
    assert f"room for {CFG.n_experts_used} of {2 * CFG.n_experts} routed experts" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_budget_gb": -1.0}, "found -1.0, expected 0 or more"),
        ({"device_budget_gb": 1.0, "tp": 2}, "1 with 2 devices"),
        ({"device_budget_gb": 1.0, "expert_layout": "wide"}, "1 with wide experts"),
    ],
)
def test_what_goes_with_no_budget(changes, message):
    with pytest.raises(ConfigError, match=f"device_budget_gb: .*{message}"):
        dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize("argv", [("generate", "Hello"), ("chat",), ("serve",), ("bench",), ("memory",)])
def test_the_flag_for_a_budget_is_obeyed(argv, tool):
    assert "device_budget_gb: found 0.001 GiB, expected at least 0." in tool(*argv, "--device_budget_gb=1e-3")


def test_an_mtp_head_is_left_in_host_memory_and_drafts_nothing():
    model = synthetic.Synthetic(dataclasses.replace(CFG, n_mtp=1), synthetic.RECIPES["q8"])
    settings = budget(memory.plan(CompiledSteps(model, SETTINGS)).total - 10**6)
    steps = memory.steps(model, settings, compiled=False)
    plan, layer = memory.plan(steps), residency.whole_layer(steps.tree, CFG)
    assert plan.host == 3 * layer and plan.residents < 2 * layer and plan.fits
    with pytest.raises(ConfigError, match="device_budget_gb: found drafts of an MTP head"):
        memory.steps(model, dataclasses.replace(settings, draft="auto"), compiled=False)
