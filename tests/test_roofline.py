"""What a step reads and computes, which component a kernel belongs to, and the table."""

import contextlib
import csv
import dataclasses
import functools
import inspect
import json
import re
import statistics
import types
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small import CFG

from ds4jax.engine import cards, compiled_steps, links, model_runner
from ds4jax.errors import ConfigError
from ds4jax.io.synthetic import BASE, FULL, RECIPES, Synthetic
from ds4jax.model import transformer, weights
from ds4jax.model.compute import Compute
from ds4jax.settings import Settings
from ds4jax.tools import cli, limits, roofline

# The longest kernels of a decoded token, µs of all their calls, as a profile of the full shape on an H200 names them.
DECODE = {
    "experts_gate_up_IQ2_XXS": 603.1, "matmul_8192_4096": 568.0, "matmul_4096_8192": 551.5,
    "experts_down_Q2_K": 401.1, "matmul_1024_40960": 373.0, "hyper_collapse": 358.7, "matmul_1024_32768": 288.7,
    "matmul_4096_2048": 249.4, "hyper_expand__1": 203.0, "matmul_4096_1536": 176.6, "topk": 153.3,
    "matmul_2048_4096": 146.9, "matmul_4096_129280": 145.3, "matmul_4096_256": 117.4, "mla_attend__1": 117.1,
    "mla_attend__2": 108.3, "matmul_4096_2624": 94.0, "indexer_scores": 77.5, "matmul_4096_1024": 76.7,
    "mla_combine__1": 57.8, "pack_Q2_K": 55.5, "router__1": 50.4, "latent__1": 40.3, "latent": 39.1,
    "mla_combine__2": 34.4, "compressor__1": 28.3, "compressor": 26.0, "experts_gate_up_IQ2_XXS__1": 14.4,
    "mla_attend": 10.2, "experts_down_Q2_K__1": 9.6, "MemcpyD2H": 3.4, "mla_combine": 3.3, "router": 3.1,
    "hyper_collapse__1": 2.9, "hyper_expand": 2.2, "hyper_expand__2": 2.2, "input_reduce_fusion_8": 1.7,
    "input_reduce_fusion_7": 1.5,
}  # fmt: skip


def programs(cfg, recipe="q2", ctx=4096, batch=1):
    settings = Settings.load("h200", ctx=ctx, batch=batch)
    return compiled_steps.CompiledSteps(Synthetic(cfg, RECIPES[recipe]), settings)


@pytest.fixture(scope="module")
def full():
    return programs(FULL)


def sums(works, field="nbytes"):
    out = {}
    for w in works:
        out[w.component] = out.get(w.component, 0) + getattr(w, field)
    return out


# ---- counting --------------------------------------------------------------------------------------------------------
def test_many_tokens_read_all_weights_and_one_reads_what_it_needs():
    p = programs(BASE, "q8")
    every = weights.nbytes(p.tree)
    read = sum(w.nbytes for w in roofline.count(p, 0, 10**6, 1) if w.shape)
    assert read == pytest.approx(every, rel=1e-9)

    one = roofline.count(p, 0, 1, 1)
    experts = sum(w.nbytes for w in one if w.component == "experts")
    of_all = sum(w.nbytes for w in roofline.count(p, 0, 10**6, 1) if w.component == "experts")
    assert experts == pytest.approx(of_all * BASE.n_experts_used / BASE.n_experts)
    table = BASE.vocab_size * (BASE.n_hash_layers * BASE.n_experts_used * 4)
    embedding = next(s.nbytes for s in jax.tree.leaves(p.tree) if s.tensors[0].family == "embed")
    slots = sum(s.nbytes * (1 - 1 / s.shape[1]) for s in jax.tree.leaves(p.tree) if s.tensors[0].family.endswith("ape"))
    unread = of_all - experts + (table + embedding) * (1 - 1 / BASE.vocab_size) + slots
    assert sum(w.nbytes for w in one if w.shape) == pytest.approx(every - unread)


def test_what_a_token_of_the_full_shape_reads(full):
    """The published shape: 9.55 GB, and FLOPs of two for each of 13 billion active weights."""
    works = roofline.count(full, 2048, 1, 1)
    assert sum(w.nbytes for w in works) == pytest.approx(9.55e9, rel=0.01)
    flops = sums([w for w in works if w.shape], "flops")
    assert sum(flops.values()) / 2 == pytest.approx(13e9, rel=0.03)
    sixteen = roofline.count(full, 2048, 1, 16)
    assert sums(sixteen)["experts"] / sums(works)["experts"] == pytest.approx(256 * (1 - (250 / 256) ** 16) / 6)
    assert sums(sixteen)["projections"] == sums(works)["projections"]
    assert sums(sixteen, "flops")["projections"] == 16 * sums(works, "flops")["projections"]


def test_stored_rows_that_are_read(full):
    cfg, row = FULL, 448 + 7 + 128  # as pallas_kernels/mla.py has them
    csa, hca = (sum(r == ratio for r in cfg.compress_ratios) for ratio in (4, 128))

    def attention(context, tokens=1, sequences=1):
        works = [w for w in roofline.count(full, context, tokens, sequences) if w.family == "rows"]
        return sums(works)["attention"], sums(works, "flops")["attention"]

    n = 43 * 128 + csa * min(512, 3001 // 4) + hca * (3001 // 128)
    assert attention(3000) == (n * row, 4 * 64 * 512 * n) and attention(3000, sequences=3)[0] == 3 * n * row
    n = 43 * 11 + csa * (11 // 4)
    assert attention(10)[0] == n * row
    # A chunk reads each row once, but every query meets its own.
    rows = 43 * (128 + 512) + csa * (3512 // 4) + hca * (3512 // 128)
    pairs = sum(43 * 128 + csa * 512 + hca * ((at + 1) // 128) for at in range(3000, 3512))
    assert attention(3000, 512) == (rows * row, 4 * 64 * 512 * pairs)
    (keys,) = {w.nbytes for w in roofline.count(full, 3000, 1, 1) if w.family == "keys"}
    assert keys == 3001 // 4 * (64 + 4)
    # With room for fewer rows than are chosen, all are read and the indexer has nothing to do.
    assert "indexer" not in sums(roofline.count(programs(FULL, ctx=2048), 1000, 1, 1))


# ---- attribution -----------------------------------------------------------------------------------------------------
def test_kernels_of_a_profile(full):
    works = roofline.count(full, 2048, 1, 1)
    found = roofline.attribute(DECODE, works)
    assert sum(found.values()) == pytest.approx(sum(DECODE.values()))

    def alone(*names):
        return sum(DECODE[name] for name in names)

    assert found["rest"] == pytest.approx(alone("MemcpyD2H", "input_reduce_fusion_7", "input_reduce_fusion_8"))
    assert found["head"] == pytest.approx(alone("matmul_4096_129280"))
    assert found["streams"] == pytest.approx(sum(t for name, t in DECODE.items() if name.startswith("hyper")))
    assert found["experts"] == pytest.approx(sum(t for n, t in DECODE.items() if n.startswith(("experts", "pack"))))
    assert found["router"] == pytest.approx(alone("router", "router__1", "matmul_4096_256"))
    assert found["shared expert"] == pytest.approx(alone("matmul_4096_2048", "matmul_2048_4096"))
    assert found["indexer"] > alone("topk", "indexer_scores") + 100  # its queries


def test_products_of_a_prefill(full):
    works = roofline.count(full, 0, 2048, 1)
    names = {"grouped_4096_2048": 125.0, "grouped_2048_4096__1": 56.0, "nvjet_sm90_tss_144x128_64x6_1x2_h_bz_TNN": 5.0,
             "gemm_fusion_dot_510": 8.0, "triton_softmax_383": 4.0}  # fmt: skip
    found = roofline.attribute(names, works)
    assert sum(found.values()) == pytest.approx(198) and found["rest"] == 4
    assert found["experts"] == 181
    flops = sums(works, "flops")
    assert found["projections"] / found["compressors"] == pytest.approx(flops["projections"] / flops["compressors"])


PROGRAM = """
ENTRY %main {
  %loop_add_fusion.3 = f32[4096,4096]{1,0} fusion(%a, %b), kind=kLoop, metadata={op_name="jit(f)/experts/add" x=1}
  ROOT %triton_softmax.383 = bf16[8]{0} fusion(%c), kind=kCustom, metadata={op_name="jit(f)/latent/mul"}
  %gemm_fusion_dot.5 = f32[8]{0} fusion(%d), kind=kCustom, metadata={op_name="jit(f)/shared_expert/dot_general"}
  %fusion.7 = f32[8]{0} fusion(%d), kind=kCustom, metadata={op_name="jit(f)/add"}
  %bitcast.1 = f32[8]{0} bitcast(%d), metadata={op_name="jit(f)/router/reshape"}
}
"""


def test_scopes_name_what_xla_made(full):
    scoped = roofline.scopes(PROGRAM)
    assert scoped == {
        "loop_add_fusion_3": "experts",
        "triton_softmax_383": "new rows",
        "gemm_fusion_dot_5": "shared expert",
    }
    works = roofline.count(full, 0, 2048, 1)
    names = {
        "loop_add_fusion_3": 1.0,
        "triton_softmax_383": 2.0,
        "gemm_fusion_dot_5": 4.0,
        "fusion_7": 8.0,
        "topk": 16.0,
    }
    expected = {"experts": 1, "new rows": 2, "shared expert": 4, "rest": 8, "indexer": 16}
    assert roofline.attribute(names, works, scoped) == expected


def kernel_names(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn.params["name"]
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from kernel_names(inner)


@pytest.mark.parametrize("batch", [1, 16])
def test_every_kernel_of_a_decoded_token_has_a_component(batch):
    cfg = dataclasses.replace(FULL, n_layers=5, compress_ratios=FULL.compress_ratios[:5])
    p = programs(cfg, batch=batch)
    compute = Compute("official", "bfloat16", kernels="pallas")
    step = functools.partial(inspect.unwrap(transformer.prefill), cfg=cfg, compute=compute)
    ints = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 1), (batch,)))
    names = set(kernel_names(jax.make_jaxpr(step)(p.weights, p.cache, *ints).jaxpr))
    assert len(names) > 15
    works = roofline.count(p, 2048, 1, batch)
    for name in names:
        assert "rest" not in roofline.attribute({name: 1.0}, works), name


def test_a_trace_is_read(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.xplane.pb").write_bytes(b"")

    def line(name, *events):
        return types.SimpleNamespace(
            name=name, events=[types.SimpleNamespace(name=n, start_ns=a, duration_ns=b - a) for n, a, b in events]
        )

    # latent runs beside topk for 200 ns, and router beside both for 90 of them.
    gpu = [line("Stream #7(Compute)", ("topk", 1000, 2000), ("topk", 2000, 5000), ("latent", 4800, 5300)),
           line("Stream #8(Compute)", ("router", 4900, 4990)), line("XLA Ops", ("topk", 0, 9))]  # fmt: skip
    planes = [types.SimpleNamespace(name="/device:GPU:0", lines=gpu),
              types.SimpleNamespace(name="/device:GPU:1", lines=[line("Stream #7", ("sum", 0, 9000))]),
              types.SimpleNamespace(name="/host:CPU", lines=[line("Stream", ("python", 0, 5))])]  # fmt: skip
    fake = types.SimpleNamespace(from_file=lambda path: types.SimpleNamespace(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", fake)
    times = {name: ns * 1e-9 / 2 for name, ns in (("topk", 3885), ("latent", 385), ("router", 30))}
    assert roofline.kernel_times(tmp_path, 2) == pytest.approx(times)


@pytest.mark.slow
def test_steps_are_timed_at_their_context(monkeypatch):
    monkeypatch.setattr(roofline, "BLOCKS", 2)
    monkeypatch.setattr(roofline, "WARM", 1)
    settings = Settings.load("tiny", ctx=256, batch=2, prefill_chunk=8)
    small = model_runner.ModelRunner(Synthetic(CFG, RECIPES["q8"]), settings)
    lengths, run = [], small._run

    def log(name, *args):
        lengths.append((name, list(small.lengths)))
        return run(name, *args)

    monkeypatch.setattr(small, "_run", log)
    for prefill, expected in (
        (8, [("prefill", [100, 100])]),
        (None, [("decode", [100, 100]), ("decode", [116, 116])]),
    ):
        lengths.clear()
        seconds, times = roofline.measure(small, 100, prefill, seed=0)
        assert 0 < seconds < 10 and times == {}  # no GPU
        assert lengths == expected * (len(lengths) // len(expected)) and len(lengths) > 4


# ---- the table -------------------------------------------------------------------------------------------------------
WORKS = [
    roofline.Work("attn.q_a", "projections", 4e9, 1e9),
    roofline.Work("rows", "attention", 1e9, 5e12),
    roofline.Work("embed", "rest", 0.0),
]
DEVICE = limits.Device("A GPU", 4e12, 1e15)
TIMES = {"projections": 2e-3, "attention": 6e-3, "rest": 1e-3}


def test_the_table(tmp_path):
    found = roofline.rows(WORKS, DEVICE, 0.010, TIMES)
    header, *cells = roofline.table(found)
    assert header == list(roofline.COLUMNS)
    assert cells == [
        ["projections", "4000.00", "1.000", "1.0000", "2.0000", "2000.0", "0.50", "50.0%", "1.0000", "25.0%"],
        ["attention", "1000.00", "5000.000", "5.0000", "6.0000", "166.7", "833.33", "83.3%", "1.0000", "25.0%"],
        ["rest", "0.00", "0.000", "0.0000", "1.0000", "0.0", "0.00", "0.0%", "1.0000", "25.0%"],
        ["idle", "0.00", "0.000", "0.0000", "1.0000", "0.0", "0.00", "0.0%", "1.0000", "25.0%"],
        ["total", "5000.00", "5001.000", "6.0000", "10.0000", "500.0", "500.10", "60.0%", "4.0000", "100.0%"],
    ]
    lines = roofline.text([header, *cells]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].startswith("projections  4000.00 ")
    assert roofline.table(roofline.rows(WORKS))[1] == ["projections", "4000.00", "1.000"]
    roofline.plot(tmp_path / "out.png", found, "title")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "seconds, times, problem",
    [
        (0.010, TIMES, None),
        (0.006, TIMES, "found 9.000 ms of kernels, expected at most a step's 6.000 ms"),
        (0.010, TIMES | {"attention": 1e-3}, "found 1.000 ms of attention, expected at least its limit, 5.000 ms"),
    ],
)
def test_a_profile_that_contradicts_itself(seconds, times, problem):
    with pytest.raises(ConfigError, match=problem) if problem else contextlib.nullcontext():
        roofline.check(roofline.rows(WORKS, DEVICE, seconds, times), seconds)


def call(capsys, *argv):
    status = cli.run(roofline.main, roofline.FLAGS, roofline.__doc__, ["--config=h200", *argv])
    return status, *capsys.readouterr()


def test_without_a_gpu_it_counts(capsys, tmp_path):
    path = tmp_path / "out.csv"
    status, out, err = call(capsys, "--synthetic=base", "--ctx=100", f"--csv={path}")
    assert status == 0 and err.startswith("no GPU here, cpu: only bytes and FLOPs")
    lines = list(csv.reader(path.read_text().splitlines()))
    assert lines[0] == ["component", "MB", "GFLOP"] and lines[-1][0] == "total"
    assert float(lines[-1][1]) == pytest.approx(sum(float(line[1]) for line in lines[1:-1]), abs=0.05)
    assert [line.split() for line in out.splitlines()] == [cell for line in lines for cell in [" ".join(line).split()]]
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--prefill=1"], "prefill: found 1, expected at least 2"),
        (["--prefill=64", "--batch=2"], "batch: found 2, expected 1 with prefill"),
        (["--room=2000"], "room: found 2000, expected at least 2112"),
        (["--csv=/nowhere/f.csv"], "csv: found /nowhere/f.csv, expected a file in an existing directory"),
        (["--plot=f.png"], "plot: found nothing to show, expected a GPU"),
        (["--config=gpu24"], "device_budget_gb: found 22, expected 0: all weights are read from the device"),
    ],
)
def test_refusals(capsys, flags, problem):
    status, out, err = call(capsys, "--synthetic=base", *flags)
    assert (status, out) == (1, "") and problem in err


def test_a_plot_without_matplotlib(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ConfigError, match=r"plot: found no matplotlib, .*ds4jax\[plot\]"):
        roofline.plot(Path("out.png"), roofline.rows(WORKS, DEVICE, 0.01, TIMES), "")


def test_two_devices_share_the_work(full):
    """Of two by tensor: half of the large matrices and of attention's FLOPs each, and two sums a layer."""
    one = roofline.count(full, 2048, 1, 1)
    two = roofline.count(
        compiled_steps.CompiledSteps(Synthetic(FULL, RECIPES["q2"]), Settings.load("h200", ctx=4096, tp=2)), 2048, 1, 1
    )
    alone, shared = sums(one), sums(two)
    assert shared["experts"] == alone["experts"] / 2 and shared["router"] == alone["router"]
    assert 0.5 < shared["projections"] / alone["projections"] < 0.56  # q_a and kv are whole
    assert sums(two, "flops")["attention"] == sums(one, "flops")["attention"] / 2
    *layers, logits = (w.nbytes for w in two if w.component == "links")
    assert "links" not in alone and layers == [2 * FULL.embed_dim] * 2 * FULL.n_layers
    assert logits == 2 * FULL.vocab_size


def test_devices_that_are_not_here_are_counted(capsys):
    """Of the config's card and mesh."""
    status, out, err = call(capsys, "--config=h200x2", "--synthetic=full")
    assert status == 0 and "only bytes and FLOPs, those of H200, nothing is measured" in err
    assert out.splitlines()[-1].startswith("each device sends 0.96 MB in 87 messages; 86 sums of 8 KiB take 1.19 ms")


def test_times_of_sums_are_the_medians_that_were_measured():
    """Those in links.json are of the four runs in its source."""
    table = json.loads(links.PATH.read_text())
    lines = (links.PATH.parent.parent / table["source"]).read_text()
    found = defaultdict(list)
    for kib, us in re.findall(r"sum, .*: (\d+) KiB ([\d.]+) us", lines):
        found[int(kib) * 2**10].append(float(us))
    assert table["sums"]["H200"]["2"] == [[size, statistics.median(us)] for size, us in sorted(found.items())]


def test_times_of_sums_between_those_measured():
    h200 = cards.find("H200")
    times = [links.seconds(h200, 2, n) for n in (1, 8192, 12288, 2**24, 2**25)]
    slope = (91.45 - 19.65) / (2**24 - 2**19)
    assert times == pytest.approx([13.8e-6, 13.8e-6, 13.375e-6, 91.45e-6, (91.45 + slope * 2**24) * 1e-6])
    assert links.seconds(h200, 4, 8192) is None and links.seconds(cards.find("H100"), 2, 8192) is None


def test_sums_of_data_parallel_groups():
    """Each has its share of the sequences; experts are added over ep alone, if tp is 1."""
    settings = Settings.load("h200", ctx=4096, batch=4, ep=2, dp=2)
    programs = compiled_steps.CompiledSteps(Synthetic(FULL, RECIPES["q2"]), settings, card=cards.find("H200"))
    (experts,) = links.exchanges(programs, 1, 4)
    assert (experts.what, experts.devices, experts.nbytes, experts.count) == ("experts", 2, 2 * 4096 * 2, 43)
    assert "43 sums of 16 KiB" in links.describe(programs, 1, 4)
    assert "43 sums of 1,048,576 KiB" in links.describe(programs, 65536, 4)
    only_dp = compiled_steps.CompiledSteps(programs.source, Settings.load("h200", ctx=4096, dp=2), card=programs.card)
    assert links.describe(only_dp, 1, 4) == "0.00 MB in 0 messages"
