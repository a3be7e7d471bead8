"""Tuned tile sizes: which calls they serve, files that are wrong, and those that are committed."""

import dataclasses
import functools
import importlib
import inspect
import json

import jax
import jax.numpy as jnp
import pytest

from ds4jax.errors import ConfigError
from ds4jax.io.synthetic import FULL, RECIPES, Synthetic
from ds4jax.model import cache as kv
from ds4jax.model import transformer, weights
from ds4jax.model.compute import Compute
from ds4jax.ops import tuned
from ds4jax.ops.check import formula
from ds4jax.settings import CONFIG_DIR
from pallas_kernels import common, grouped_gemm, hyper, indexer, matmul, mla, topk

SMALL = topk.Shape(4, 64, 60, k=8)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes what is tuned for a device kind, by default the one at hand."""
    monkeypatch.setattr(tuned, "CONFIG_DIR", tmp_path)
    monkeypatch.setitem(topk.SHAPES, "small", SMALL)

    def write(content, kind="cpu"):
        path = tuned.path_of(kind)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        tuned._table.cache_clear()

    yield write
    tuned._table.cache_clear()


@pytest.fixture
def used(monkeypatch):
    """The configs that top-k is built with."""
    seen, build = [], topk._call.__wrapped__
    monkeypatch.setattr(topk, "_call", lambda *args: seen.append(args[4]) or build(*args))
    return seen


def test_an_op_takes_the_config_that_is_tuned_for_its_device_and_shape(write, used):
    score, visible = SMALL.inputs(jax.random.key(0))
    expected, default = formula("topk")(score, visible, k=8), topk.default_config(SMALL)
    fields = [{"block": block, "num_warps": 1} for block in (32, 128)]

    def chosen(score, **options):
        used.clear()
        options = {"config": tuned.tiles(topk)} | options
        found = topk.op(score, visible[: len(score)], k=8, interpret=True, **options)
        assert jnp.array_equal(found[:, :4], expected[: len(score), :4])
        return used[0]

    assert chosen(score) == default
    write({"topk": {"small": fields[1]}})
    assert chosen(score) == topk.Config(128, 1)
    assert chosen(score, config=topk.Config(64, 2)) == topk.Config(64, 2)
    assert chosen(score[:3]) == default  # another shape: nothing is known
    # A program for another device takes that device's.
    write({"topk": {"small": fields[0]}}, "NVIDIA H200")
    common.lower_for_gpu(lambda *x: topk.op(*x, k=8, config=tuned.tiles(topk)), *map(jax.typeof, (score, visible)))
    assert used[-1] == topk.Config(32, 1)
    assert chosen(score) == topk.Config(128, 1)


@pytest.mark.parametrize(
    "content, problem",
    [
        ("{", r"cpu.json: found Expecting .*, expected JSON"),
        ({"topk": {"tiny": {}}}, r"cpu.json: topk, tiny: found no such shape, expected one of decode 4k, .*, small"),
        (
            {"topk": {"small": {"block": 32, "warps": 4}}},
            r"topk, small: found fields \{'block': 'int', 'warps': 'int'\}, expected \{'block': 'int', 'num_warps': 'i",
        ),
        ({"topk": {"small": {"block": "32", "num_warps": 4}}}, r"found fields \{'block': 'str', .* expected \{'block"),
        ({"topk": {"small": [32, 4]}}, r"topk, small: found \[32, 4\], expected the fields of a config"),
        ([1], r"cpu.json: topk: found \[1\], expected configs by the names of shapes"),
        ({"topk": [1]}, r"cpu.json: topk: found \[1\], expected configs by the names of shapes"),
        (
            {"topk": {f"decode {n}": {"block": b, "num_warps": 8} for n, b in (("28k of 256k", 4096), ("256k", 8192))}},
            r"topk, decode 256k: found Config\(block=8192, .*, expected Config\(block=4096, .* equal calls",
        ),
    ],
)
def test_files_that_are_wrong(write, content, problem):
    write(content)
    with pytest.raises(ConfigError, match=problem):
        topk.op(jnp.zeros((4, 64)), jnp.ones(4, jnp.int32), k=8, config=tuned.tiles(topk), interpret=True)


def test_calls_that_share_a_config():
    def same(module, name, **changes):
        shape = module.SHAPES[name]
        return tuned.key(shape) == tuned.key(dataclasses.replace(shape, **changes))

    assert same(matmul, "q_b/1", layers=43) and same(matmul, "q_b/1", m=2) and not same(matmul, "q_b/1", m=3)
    assert same(hyper, "16", layers=43) and not same(hyper, "16", tokens=8) and not same(hyper, "1", first=True)
    # Two devices with half of the experts each take the tiles of one with all: an expert has as many rows.
    assert same(grouped_gemm, "gate_up_iq2_xxs_2048", stack=128) and not same(grouped_gemm, "down_q2_k_512", m=2048)
    # A capacity counts, but only roughly; where in it the sequence ends is not known to the program.
    assert same(indexer, "decode 28k", keys=7200, position=5) and not same(indexer, "decode 28k", keys=16384)
    assert same(topk, "decode 28k", n=8192, visible=600) and not same(topk, "decode 28k", n=4096)
    assert same(mla, "decode csa 2k", context=262143) and same(mla, "decode window", context=5)
    assert same(mla, "decode hca 28k", context=32767) and not same(mla, "decode hca 28k", context=262143)
    assert [common.magnitude(n) for n in (0, 1, 225, 256, 300, 2049)] == [0, 1, 256, 256, 256, 2048]


@pytest.mark.parametrize("batch, ctx", [(1, 28800), (1, 262272), (16, 2176)])
def test_the_model_decodes_with_shapes_that_are_tuned(batch, ctx, monkeypatch):
    cfg = dataclasses.replace(FULL, n_layers=5, compress_ratios=FULL.compress_ratios[:5])
    unknown, config_for = [], tuned.config_for

    def note(name, shape):
        module = importlib.import_module(name)
        if tuned.key(shape) not in map(tuned.key, module.SHAPES.values()):
            unknown.append(shape)
        return config_for(name, shape)

    monkeypatch.setattr(tuned, "config_for", note)
    compute = Compute("official", "bfloat16", kernels="pallas")
    step = functools.partial(inspect.unwrap(transformer.prefill), cfg=cfg, compute=compute)
    w = weights.structs(weights.abstract(cfg, Synthetic(cfg, RECIPES["q2"]).types))
    ints = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 1), (batch,)))
    jax.eval_shape(step, w, kv.abstract(cfg, "official", "bfloat16", batch, ctx), *ints)
    assert not unknown


def committed():
    """(device kind, op's module, name of a shape, its tuned config) of every entry of every file."""
    for path in sorted((CONFIG_DIR / "tuned").glob("*.json")):
        kind = path.stem.replace("_", " ").upper()
        assert tuned.path_of(kind) == path
        for op, shapes in json.loads(path.read_text()).items():
            module = importlib.import_module(f"pallas_kernels.{op}")
            table = tuned._table(path, module)
            for name in shapes:
                yield kind, module, name, table[tuned.key(module.SHAPES[name])]


def call(module, name, config):
    """An op at a shape, and the structs of its arguments."""
    shape = module.SHAPES[name]
    op = getattr(module, "op", None) or getattr(module, module.__name__.rpartition(".")[2])
    return functools.partial(op, **shape.static, config=config), jax.eval_shape(shape.inputs, jax.random.key(0))


def test_ops_accept_the_configs_that_are_committed():
    with pytest.raises(common.Unsupported, match="blocks of 48"):
        f, args = call(topk, "decode 4k", topk.Config(48, 4))
        jax.eval_shape(f, *args)
    for _, module, name, config in committed():
        f, args = call(module, name, config)
        jax.eval_shape(f, *args)


@pytest.mark.slow
def test_kernels_with_committed_configs_lower_for_their_device():
    for kind, module, name, config in committed():
        f, args = call(module, name, config)
        assert "triton" in common.lower_for_gpu(f, *args, device=kind) or not getattr(config, "fused", True)
