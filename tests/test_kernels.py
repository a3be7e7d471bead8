"""The forward pass through the kernels: the same as in XLA; it lowers for GPUs; it runs on one."""

import dataclasses
import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unit_formats import UNITS

from ds4jax import implementation
from ds4jax.config import DrafterConfig
from ds4jax.engine import compiled_steps, sampling
from ds4jax.errors import ConfigError
from ds4jax.formats import GGMLType
from ds4jax.implementation import OPS
from ds4jax.io.recipes import Type
from ds4jax.io.synthetic import FULL, KERNEL, RECIPES, Synthetic
from ds4jax.model import cache as kv
from ds4jax.model import moe, support, weights
from ds4jax.model.compute import Compute
from ds4jax.model.transformer import forward, prefill
from ds4jax.ops import attend
from pallas_kernels import common, compressor, experts, grouped_gemm, hyper, indexer, latent, matmul, mla, router, topk

# Layers of both ratios, as small as the kernels take them.
CFG = dataclasses.replace(KERNEL, n_layers=2, compress_ratios=(4, 128), swiglu_clamp=(10.0,) * 2)
DEVICES = {"NVIDIA H200": 132, "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 188, "NVIDIA GB10": 48}


@pytest.fixture(scope="module")
def model():
    return random_model(Synthetic(CFG, RECIPES["q2"]).types)


def random_model(types, cfg=CFG):
    """Sub-layers change the streams by little, as in a trained model: else a rounding that falls the other way, or a
    near-tie among rows or experts, changes everything after it."""
    w = weights.init_random(weights.abstract(cfg, types), cfg)

    def damped(stack):
        def group(m):
            scale = "dm" if "dm" in m.planes else "d"
            return dataclasses.replace(m, **{scale: getattr(m, scale) / 16})

        return dataclasses.replace(stack, groups=tuple(map(group, stack.groups)))

    experts, shared = (dataclasses.replace(f, down=damped(f.down)) for f in (w.ffn.experts, w.ffn.shared))
    attn = dataclasses.replace(w.attn, o_b=damped(w.attn.o_b))
    return dataclasses.replace(w, attn=attn, ffn=dataclasses.replace(w.ffn, experts=experts, shared=shared))


def run(model, compute, chunks, ids, ctx=512):
    """Logits of the real tokens of two sequences, chunk by chunk; the second has one token fewer in each long chunk.

    On the device that has `ids`.
    """
    (device,), out, start = ids.devices(), [], 0
    cache = jax.device_put(kv.empty(CFG, "official", compute.dtype, 2, ctx), device)
    for T in chunks:
        n = jnp.array([T, max(1, T - 1)], jnp.int32)
        step = functools.partial(prefill, cfg=CFG, compute=compute, all_positions=True)
        logits, cache = step(model, cache, ids[:, start : start + T], n)
        out.append(np.asarray(logits)[:, : max(1, T - 1)])
        start += T
    return np.concatenate(out, axis=1), cache


def errors(found, expected):
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


CHUNKS = [128, *[4] * 31, *[1] * 8]  # prefill, a few tokens, and decoding until an HCA window closes
IDS = jnp.asarray(np.random.default_rng(0).integers(CFG.vocab_size, size=(2, sum(CHUNKS))), jnp.int32)
XLA, INTERPRETED = Compute(), Compute(kernels="pallas_interpret")


# ---- tokens that are none --------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_sequence_that_rests_changes_nothing(model):
    """Nor does it have an effect on the other, whose logits are the same bit for bit."""
    step = jax.jit(functools.partial(inspect.unwrap(prefill), cfg=CFG, compute=INTERPRETED))
    cache = kv.empty(CFG, "official", "float32", 2, 512)
    both, one = jnp.array([1, 1], jnp.int32), jnp.array([0, 1], jnp.int32)
    for i in range(5):
        _, cache = step(model, cache, IDS[:, i : i + 1], both)
    expected, together = step(model, cache, IDS[:, 5:6], both)
    found, alone = step(model, cache, IDS[:, 5:6], one)
    np.testing.assert_array_equal(found[1], expected[1])
    assert np.isfinite(np.asarray(found)).all()
    for before, after, other in zip(*(jax.tree.leaves(c) for c in (cache, alone, together)), strict=True):
        axis = min(1, before.ndim - 1)
        np.testing.assert_array_equal(after.take(0, axis), before.take(0, axis))
        np.testing.assert_array_equal(after.take(1, axis), other.take(1, axis))


@pytest.mark.parametrize("T, n", [(1, [0, 1]), (4, [4, 3])])
def test_what_is_no_token_reads_nothing(model, monkeypatch, T, n):
    """Its experts are -1, which no kernel computes; and a sequence that rests attends from position 0."""
    chosen, positions = [], []

    def spied(module, name, seen, argument):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **options: seen.append(args[argument]) or real(*args, **options)
        )

    @jax.jit
    def seen(w, cache, tokens, n):
        forward(w, cache, tokens, n, CFG, XLA)
        return chosen, positions

    spied(moe, "experts", chosen, 1)
    spied(attend, "attend", positions, 4)
    cache = kv.empty(CFG, "official", "float32", 2, 512)
    cache = dataclasses.replace(cache, length=jnp.full((2,), 5, jnp.int32))
    chosen, positions = seen(model, cache, IDS[:, :T], jnp.array(n, jnp.int32))
    real = (np.arange(T) < np.array(n)[:, None]).reshape(-1)
    assert len(chosen) == len(positions) == CFG.n_layers
    for ids, position in zip(map(np.asarray, chosen), map(np.asarray, positions), strict=True):
        assert (ids[real] >= 0).all() and (ids[~real] == -1).all()
        assert position.tolist() == [5 if count else 0 for count in n]


# ---- one op apart from the others ------------------------------------------------------------------------------------
def test_any_op_can_be_switched_alone(model, monkeypatch):
    """`pallas_interpret,OP=xla` runs every kernel but that op's; the result stays the same."""
    ran = set()
    for op, module, name in KERNEL_CALLS:
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, op=op, real=real, **options: ran.add(op) or real(*args, **options)
        )
    cache, one = kv.abstract(CFG, "official", "float32", 2, 512), jax.ShapeDtypeStruct((2,), jnp.int32)
    ids = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    for op in OPS:
        ran.clear()
        compute = Compute(kernels=f"pallas_interpret,{op}=xla")
        jax.eval_shape(functools.partial(inspect.unwrap(prefill), cfg=CFG, compute=compute), model, cache, ids, one)
        assert ran == set(OPS) - {op}


KERNEL_CALLS = [
    ("mhc", hyper, "op"), ("linear", matmul, "matmul"), ("latent", latent, "op"), ("compress", compressor, "op"),
    ("index", indexer, "op"), ("topk", topk, "op"), ("attend", mla, "op"), ("route", router, "op"),
    ("experts", experts, "gate_up"),
]  # fmt: skip


@pytest.mark.parametrize(
    "text, problem",
    [
        ("cuda", "found 'cuda', expected one of xla, pallas, pallas_interpret, then ,OP=IMPLEMENTATION"),
        (
            "pallas,attention=xla",
            "found 'attention=xla' in 'pallas,attention=xla', expected OP=IMPLEMENTATION, OP of mhc",
        ),
        ("pallas,attend=xla,attend=pallas", "found 'attend=pallas' in"),
        ("pallas,attend", "found 'pallas,attend', expected one of xla"),
    ],
)
def test_implementations_that_are_none(text, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        implementation.parse(text)


@pytest.mark.slow
def test_what_there_are_no_kernels_for_is_named():
    """One line for each op that cannot run, of every one that was asked for."""

    def problems(cfg, numerics, kernels="pallas", types="q2", tokens=1):
        w = weights.structs(weights.abstract(cfg, Synthetic(cfg, RECIPES[types]).types))
        cache = kv.abstract(cfg, numerics, "bfloat16", 1, 512)
        return support.unsupported(cfg, w, cache, Compute(numerics, "bfloat16", kernels=kernels), tokens)

    assert problems(CFG, "official") == problems(CFG, "official", tokens=64) == {}
    plain = problems(CFG, "plain")
    assert set(plain) == {"latent", "compress", "index", "attend"} and "official" in plain["index"]
    assert set(problems(CFG, "plain", "xla,index=pallas")) == {"index"}
    narrow = problems(dataclasses.replace(CFG, rope_dim=32), "official", "xla,latent=pallas,attend=pallas")
    assert set(narrow) == {"latent", "attend"}
    heads = problems(dataclasses.replace(CFG, index_heads=12), "official", "xla,index=pallas,topk=pallas")
    assert set(heads) == {"index"} and "12 heads" in heads["index"]
    assert "F32" in problems(CFG, "official", "xla,experts=pallas", "f32")["experts"]


# ---- the full shape, in four layers of all kinds ---------------------------------------------------------------------
SHORT = dataclasses.replace(
    FULL, n_layers=4, compress_ratios=FULL.compress_ratios[:4], swiglu_clamp=FULL.swiglu_clamp[:4]
)


PALLAS = Compute("official", "bfloat16", kernels="pallas")


def steps(T, B=1, ctx=32768):
    """A step of the full shape, and the structures of its arguments."""
    w = weights.structs(weights.abstract(SHORT, Synthetic(SHORT, RECIPES["q2"]).types))
    cache = kv.abstract(SHORT, "official", "bfloat16", B, ctx)
    f = functools.partial(inspect.unwrap(prefill), cfg=SHORT, compute=PALLAS)
    return f, (w, cache, jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32))


@pytest.mark.parametrize(
    "device", [pytest.param(device, marks=[] if "H200" in device else pytest.mark.slow) for device in DEVICES]
)
def test_decoding_lowers_for_gpus_in_few_launches(device):
    f, args = steps(1)
    text = common.lower_for_gpu(f, *args, device=device, cores=DEVICES[device])
    # Per layer: two boundaries of 2, seven or eight products, latent, compressor, 2 of attention, router, 3 of experts.
    kernels = text.count("__gpu$xla.gpu.triton")
    assert SHORT.n_layers * 18 <= kernels <= SHORT.n_layers * 22 + 3


def test_prefill_lowers_for_gpus():
    f, args = steps(2048)
    assert common.lower_for_gpu(f, *args).count("__gpu$xla.gpu.triton") >= SHORT.n_layers * 7


# ---- formats that kernels read and nothing writes --------------------------------------------------------------------
ROLES = [
    *(f"attn.{name}" for name in ("q_a", "q_b", "kv", "o_a", "o_b")), "ffn.shared.down", "ffn.experts.down",
    "ffn.shared.gate ffn.shared.up", "ffn.experts.gate", "ffn.experts.up", "head.out",
]  # fmt: skip


def many_formats(cfg=CFG, of=ROLES):
    """The types of the tensors: of ROLES those of UNITS, one after the other; of the others the q2 file's."""
    formats = zip(of, itertools.cycle(GGMLType[name] for name in UNITS), strict=False)
    chosen = {role: qtype for roles, qtype in formats for role in roles.split()}
    return Synthetic(cfg, lambda spec: chosen[spec.role] if spec.role in chosen else RECIPES["q2"](spec)).types


@pytest.mark.parametrize("tokens", [1, 128])
def test_a_model_of_many_formats_has_kernels(tokens):
    """As traced; the next test computes it."""
    w = weights.structs(weights.abstract(CFG, many_formats()))
    cache = kv.abstract(CFG, "official", "bfloat16", 2, 512)
    compute = Compute("official", "bfloat16", kernels="xla,linear=pallas,experts=pallas")
    assert support.unsupported(CFG, w, cache, compute, tokens) == {}


@pytest.mark.slow
def test_a_model_of_many_formats_through_the_kernels():
    """Decoding, all of them interpreted. The largest error seen is 1.6e-5; a code of a row may fall otherwise."""
    w = random_model(many_formats())
    expected, found = (run(w, compute, [1] * 4, IDS)[0] for compute in (XLA, INTERPRETED))
    error = errors(found, expected)
    assert np.median(error) < 1e-4 and error.max() < 1e-3


@pytest.mark.slow
def test_a_prompt_through_the_kernels_of_many_formats(monkeypatch):
    """One layer and one tile for all rows, since compiling is what takes time; each format in one product. They are in
    bfloat16, whose roundings are 2e-3 (2⁻⁹) each."""
    whole = grouped_gemm.default_config
    monkeypatch.setattr(grouped_gemm, "default_config", lambda shape: dataclasses.replace(whole(shape), bm=16))
    cfg = dataclasses.replace(CFG, n_layers=1, compress_ratios=(4,), swiglu_clamp=(10.0,), n_experts=4)
    w = random_model(
        many_formats(cfg, [r for r in ROLES if r not in ("attn.kv", "ffn.shared.gate ffn.shared.up")]), cfg
    )
    ids, n = IDS[:1, :40], jnp.array([40], jnp.int32)
    kernels = "xla,linear=pallas_interpret,experts=pallas_interpret"
    expected, found = (
        prefill(w, kv.empty(cfg, "official", "float32", 1, 512), ids, n, cfg=cfg, compute=compute, all_positions=True)[
            0
        ]
        for compute in (XLA, Compute(kernels=kernels))
    )
    error = errors(found, expected)
    assert 2e-5 < np.median(error) < 0.015 and error.max() < 0.03


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_kernels_agree_with_xla_on_the_gpu(model):
    """In bfloat16 both: a rounding is 2⁻⁹, and what the two round is not the same."""
    cpu = jax.devices("cpu")[0]
    # There XLA takes seconds to compile it, not minutes.
    on_cpu = Compute("official", "bfloat16")
    expected, _ = run(jax.device_put(model, cpu), on_cpu, CHUNKS, jax.device_put(IDS, cpu))
    found, again = (run(model, PALLAS, CHUNKS, IDS)[0] for _ in range(2))
    np.testing.assert_array_equal(found, again)
    error = errors(found, expected)
    assert np.median(error) < 0.02 and np.quantile(error, 0.95) < 0.1


@pytest.mark.gpu
def test_no_weight_is_copied_and_the_cache_stays_in_place():
    f, (w, cache, *_) = steps(1)
    decode = functools.partial(
        compiled_steps.decode_step, cfg=SHORT, compute=Compute("official", "bfloat16", kernels="pallas")
    )
    shapes = (compiled_steps.BLOCK, 1), (1, 1)
    results = [*(np.zeros(shape, np.int32) for shape in shapes), np.zeros((1, SHORT.vocab_size), np.float32)]
    args = results, *compiled_steps.decode_args({0: 0}, 1, [sampling.Sampling()], 1)
    stats = jax.jit(decode, donate_argnums=(1, 2)).lower(w, cache, *args).compile().memory_analysis()
    smallest = min(x.size * x.dtype.itemsize for x in jax.tree.leaves(w.ffn.experts))
    assert stats is not None and stats.temp_size_in_bytes < smallest
    assert stats.alias_size_in_bytes == kv.nbytes(cache) + sum(x.nbytes for x in results)


def test_a_drafter_is_part_of_what_must_run():
    """Its own projections, too, that are in no other call."""
    drafter = DrafterConfig(stages=1, block_size=2, markov_rank=256, noise_token=1, target_layers=(0,))
    cfg = dataclasses.replace(KERNEL, drafter=drafter)

    def types(spec):
        return Type.TQ1_0 if "main_proj" in spec.name else RECIPES["q8"](spec)

    w = weights.structs(weights.abstract(cfg, RECIPES["q8"], types))
    cache = kv.abstract(cfg, "official", "bfloat16", 1, 512)
    found = support.unsupported(cfg, w, cache, Compute("official", "bfloat16", kernels="xla,linear=pallas"), 2)
    assert list(found) == ["linear"] and found["linear"].startswith("format: found TQ1_0")
    assert found["linear"].endswith("--types dspark.main_proj=Q4_K")
