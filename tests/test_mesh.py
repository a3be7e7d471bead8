"""A mesh changes nothing: the pass on several fake devices is that of one, with formulas and with kernels."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import small
from test_model import run, tokens, worst

from ds4jax import sharding
from ds4jax.engine.compiled_steps import CompiledSteps
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.types import Sampling
from ds4jax.errors import ConfigError
from ds4jax.io import load, synthetic
from ds4jax.io.recipes import RANDOM_RECIPES, Type
from ds4jax.model import cache as kv
from ds4jax.model import support, weights
from ds4jax.model.compute import Compute
from ds4jax.model.spread import partition
from ds4jax.model.transformer import prefill
from ds4jax.settings import Settings

CFG = small.CFG  # 16 experts, which three devices do not share out evenly
MESHES = {  # tp, ep, dp
    "tp 2 ep 2": (2, 2, 1), "ep 3": (1, 3, 1), "dp 2": (1, 1, 2),
    "tp 2": (2, 1, 1), "tp 4": (4, 1, 1), "ep 2 dp 2": (1, 2, 2), "tp 2 dp 2": (2, 1, 2),
}  # fmt: skip
FAST = "tp 2 ep 2", "ep 3", "dp 2"
every_mesh = pytest.mark.parametrize(
    "shape", [pytest.param(MESHES[k], id=k, marks=[] if k in FAST else pytest.mark.slow) for k in MESHES]
)


@pytest.fixture(scope="module")
def model():
    tree = weights.abstract(CFG, random_weights.F32)
    return tree, random_weights.make(CFG, tree, 5)[0]


def on(mesh, tree, model):
    """A model on a mesh, with as many experts as that shares out evenly."""
    spread = weights.even(tree, mesh)

    def filled(spec, value):
        planes = zip(jax.tree.leaves(value), jax.tree.leaves(spec.struct()), strict=True)
        padded = [np.pad(x, [(0, n - m) for m, n in zip(x.shape, p.shape, strict=True)]) for x, p in planes]
        return jax.tree.unflatten(jax.tree.structure(value), padded)

    specs, structure = jax.tree.flatten(spread)
    values = map(filled, specs, structure.flatten_up_to(model))
    return jax.device_put(structure.unflatten(values), weights.shardings(spread, mesh))


def cache_on(mesh):
    """`kv.empty` on a mesh."""

    def empty(cfg, numerics, dtype, batch, ctx):
        specs = partition(kv.abstract(cfg, numerics, dtype, batch, ctx), mesh)
        where = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
        return kv.empty(cfg, numerics, dtype, batch, ctx, where)

    return empty


# ---- the pass --------------------------------------------------------------------------------------------------------
@every_mesh
def test_the_pass_is_that_of_one_device(model, shape):
    """In float32 under `plain`, where sums differ by their order alone: 1e-5."""
    tree, one = model
    mesh, compute, ids = sharding.make_mesh(*shape), Compute("plain"), tokens(2, 8, seed=4, cfg=CFG)
    expected = run(one, compute, ids, 8, CFG)
    found = run(on(mesh, tree, one), dataclasses.replace(compute, mesh=mesh), ids, 8, CFG, cache_on(mesh))
    assert worst(found, expected) < 1e-5


WIDE = synthetic.synthetic_config(
    {"o_groups": 4, "compress_ratios": (0, 4, 128), "n_layers": 3, "n_hash_layers": 1, "n_experts": 14,
     "expert_dim": 1024}
)  # fmt: skip


@pytest.mark.slow
@every_mesh
def test_long_prompts_and_single_tokens(shape):
    """More than a block of queries, all kinds of layers, quantized weights; and tokens that choose few experts."""
    tree, mesh, compute = weights.abstract(WIDE, synthetic.RECIPES["q2"]), sharding.make_mesh(*shape), Compute("plain")
    one = weights.init_random(tree, WIDE, seed=5)
    for length, chunk in ((150, 150), (6, 1)):
        ids = tokens(2, length, seed=4, cfg=WIDE)
        expected = run(one, compute, ids, chunk, WIDE)
        found = run(on(mesh, tree, one), dataclasses.replace(compute, mesh=mesh), ids, chunk, WIDE, cache_on(mesh))
        assert worst(found, expected) < 1e-5


# Heads and groups of which two devices have what the kernels want.
KERNEL = dataclasses.replace(
    synthetic.KERNEL, n_layers=2, compress_ratios=(4, 128), swiglu_clamp=(10.0,) * 2, n_hash_layers=1, n_heads=32,
    o_groups=4, n_experts=7, expert_dim=1024,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, recipe", [((2, 1, 1), "q2"), ((1, 3, 1), "q2"), ((2, 1, 2), "q2"), ((2, 1, 1), "official")]
)
def test_kernels_on_a_mesh(shape, recipe):
    """Up to 32 tokens; 1e-5 to 4e-5 in the median, as of the goldens, see `test_goldens_kernels`."""
    tree, mesh = weights.abstract(KERNEL, RANDOM_RECIPES[recipe]), sharding.make_mesh(*shape)
    one, ids = weights.init_random(tree, KERNEL, seed=5), tokens(2, 3, seed=4, cfg=KERNEL)
    compute = Compute("official", "float32", kernels="pallas_interpret")
    expected = run(one, compute, ids, 1, KERNEL)
    found = run(on(mesh, tree, one), dataclasses.replace(compute, mesh=mesh), ids, 1, KERNEL, cache_on(mesh))
    assert worst(found, expected) < 1e-3


@pytest.mark.parametrize(
    "tp, kernels, expected",
    [(4, "xla,attend=pallas", {"attend"}), pytest.param(2, "pallas", set(), marks=pytest.mark.slow)],
)
def test_kernels_are_asked_for_the_shapes_of_one_device(tp, kernels, expected):
    """The attention kernel takes 16 heads or more; the model has 32."""
    mesh = sharding.make_mesh(tp)
    tree = weights.even(weights.abstract(KERNEL, synthetic.RECIPES["q2"]), mesh)
    cache = kv.abstract(KERNEL, "official", "bfloat16", 2, 512)
    compute = Compute("official", "bfloat16", mesh, kernels=kernels)
    assert set(support.unsupported(KERNEL, weights.structs(tree), cache, compute, 1)) == expected


def test_two_sums_a_layer(model):
    """What a decoding step exchanges: activations, no weight."""
    tree, _ = model
    mesh = sharding.make_mesh(2)
    cache = kv.abstract(CFG, "plain", "float32", 1, 512)
    args = weights.structs(tree), cache, jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    text = prefill.lower(*args, cfg=CFG, compute=Compute("plain", mesh=mesh)).as_text()
    kinds = re.findall(r"stablehlo\.(all_reduce|all_gather|all_to_all|collective_permute|reduce_scatter)", text)
    assert kinds == ["all_reduce"] * 2 * CFG.n_layers + ["all_gather"]
    summed = re.findall(r"all_reduce.*?-> tensor<(\w+)>", text, re.S)
    assert set(summed) == {f"1x{CFG.embed_dim}xf32"}


# ---- weights ---------------------------------------------------------------------------------------------------------
def test_experts_arrive_that_cannot_be_shared_out_evenly(tmp_path):
    path, mesh = small.write(tmp_path), sharding.make_mesh(1, 3)
    (found, checkpoint), (expected, _) = load.load(path, mesh), load.load(path)
    plane = jax.tree.leaves(found.ffn.experts.up)[0]
    assert {shard.data.shape[1] for shard in plane.addressable_shards} == {6}
    for spread, alone in zip(jax.tree.leaves(found.ffn.experts), jax.tree.leaves(expected.ffn.experts), strict=True):
        np.testing.assert_array_equal(spread[:, : CFG.n_experts], alone)
        assert not np.asarray(spread[:, CFG.n_experts :]).view(np.uint8).any()
    tree = weights.even(weights.abstract(CFG, checkpoint.types), mesh)
    assert jax.tree.map(lambda v: v.sharding, found) == weights.shardings(tree, mesh)


def test_random_weights_are_the_same_on_a_mesh():
    tree, mesh = weights.abstract(CFG, random_weights.F32).ffn.experts.up, sharding.make_mesh(1, 3)
    alone = weights.init_random(tree, CFG)
    spread = weights.init_random(weights.even(tree, mesh), CFG, mesh=mesh)
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a[:, : CFG.n_experts], b)


def test_blocks_of_a_format_are_not_cut():
    tree = weights.abstract(synthetic.BASE, lambda spec: Type.Q4_K if spec.family == "attn.o_b" else Type.F32)
    with pytest.raises(ConfigError, match="attn_output_b.weight has 256 columns, not a multiple of 512: .* of Q4_K"):
        weights.shardings(tree, sharding.make_mesh(2))


def test_too_few_devices_are_refused():
    with pytest.raises(ConfigError, match="tp=8 × ep=1 × dp=1 needs 8 devices .* this machine has 4"):
        sharding.make_mesh(8)


# ---- the engine ------------------------------------------------------------------------------------------------------
def said(settings, given=None):
    """Greedy tokens of three sequences, in plain steps and rounds of drafts, and one more whose state was put there.

    given: what this returned of another mesh: the sequence is then that one.
    """
    runner, greedy = ModelRunner.load(settings), Sampling(temperature=0.0)
    ids, out = runner.tokenizer.encode_text("The quick brown fox jumps over the lazy dog."), {}
    for slot in (0, 2, 3):
        out[slot] = [runner.prefill(slot, ids[slot:], greedy).token]
    for first in (True, False):
        block = runner.decode_block({slot: said[-1] if first else None for slot, said in out.items()}, 4).tokens()
        out = {slot: said + block[slot] for slot, said in out.items()}
        if runner.steps.draft_counts:
            rounds = runner.speculate(dict.fromkeys(out), dict.fromkeys(out, 20), runner.steps.draft_counts[0], 2)
            out = {slot: out[slot] + more for slot, more in rounds.tokens().items()}
    *_, planes = runner.take(2)
    assert planes
    before, from_ = (given[0][2], given[1]) if given else (out[2], planes)
    runner.put(1, from_, greedy)
    out[1] = before + runner.decode_block({1: before[-1]}, 4).tokens()[1]
    return out, planes, runner.logits(ids)


@functools.cache
def alone(draft):
    return said(Settings.load("tiny", ctx=256, draft=draft))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{"tp": 2, "ep": 2}, {"ep": 3, "draft": "auto"}, {"dp": 2, "draft": "auto"}, {"dp": 2, "tp": 2}], ids=str
)
def test_the_engine_says_the_same(shape):
    """With and without drafts; and a state that was taken on one device goes on here."""
    expected = alone(shape.get("draft", "off"))
    found, planes, logits = said(Settings.load("tiny", ctx=256, **shape), expected)
    assert found == expected[0]
    assert worst(logits, expected[2]) < 1e-3  # `official`: a rounding may fall on another side
    kinds = [{name: (x.shape, x.dtype) for name, x in of.items()} for of in (planes, expected[1])]
    assert kinds[0] == kinds[1]


def test_a_mesh_shares_out_weights_and_sequences():
    model = synthetic.Synthetic(CFG, synthetic.RECIPES["q8"])
    one, spread = (CompiledSteps(model, Settings("none", ctx=256, batch=4, tp=n, dp=n)) for n in (1, 2))
    for a, b in zip(jax.tree.leaves(spread.cache.window), jax.tree.leaves(one.cache.window), strict=True):
        assert a.shape == b.shape and a.sharding.shard_shape(a.shape)[1] == 2
    q_b = jax.tree.leaves(spread.weights.attn.q_b)[0]
    assert q_b.sharding.shard_shape(q_b.shape)[1] == q_b.shape[1] // 2


def test_ep_shares_out_experts_alone():
    settings = Settings("none", ctx=256, ep=4)
    cut = CompiledSteps(synthetic.Synthetic(CFG, synthetic.RECIPES["q8"]), settings).weights
    for tree, parts in ((cut.ffn.experts, 4), (cut.ffn.shared, 1), (cut.attn, 1), (cut.head, 1)):
        for x in jax.tree.leaves(tree):
            assert np.prod(x.sharding.shard_shape(x.shape)) * parts == np.prod(x.shape)
