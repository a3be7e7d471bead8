"""The forward pass through the kernels: the mathematics of the plain one; it lowers for GPUs; it runs on one."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.engine import compiled_steps, sampling
from ds4jax.errors import ConfigError
from ds4jax.formats.quant import Q8_0
from ds4jax.io.synthetic import FULL, RECIPES, Synthetic, synthetic_config
from ds4jax.model import Compute, fused, prefill, weights
from ds4jax.model import cache as kv
from pallas_kernels import common
from pallas_kernels.common import Unsupported

# As small as the kernels take it: RoPE of 64 dims, powers of two.
CFG = synthetic_config(
    {
        "n_layers": 3, "compress_ratios": (0, 4, 128), "swiglu_clamp": (10.0,) * 3, "n_hash_layers": 1,
        "head_dim": 128, "rope_dim": 64, "n_heads": 16, "index_heads": 32, "index_head_dim": 64, "index_top_k": 32,
        "n_experts": 16,
    }
)  # fmt: skip
DEVICES = {"NVIDIA H200": 132, "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 188, "NVIDIA GB10": 48}


@pytest.fixture(scope="module")
def model():
    """Sub-layers change the streams by little, as in a trained model: else a rounding that falls the other way, or a
    near-tie among rows or experts, changes everything after it."""
    w = weights.init_random(weights.abstract(CFG, Synthetic(CFG, RECIPES["q2"]).types), CFG)

    def damped(stack):
        def group(m):
            scale = "d" if isinstance(m, Q8_0) else "dm"
            return m.replace(**{scale: getattr(m, scale) / 16})

        return stack.replace(groups=tuple(map(group, stack.groups)))

    ffn = w.ffn.replace(
        experts=w.ffn.experts.replace(down=damped(w.ffn.experts.down)),
        shared=w.ffn.shared.replace(down=damped(w.ffn.shared.down)),
    )
    return w.replace(attn=w.attn.replace(o_b=damped(w.attn.o_b)), ffn=ffn)


def run(model, step, dtype, chunks, ids, ctx=512):
    """Logits of the real tokens of two sequences, chunk by chunk; the second has one token fewer in each long chunk.

    On the device that has `ids`.
    """
    (device,), out, start = ids.devices(), [], 0
    cache = jax.device_put(kv.empty(CFG, "official", dtype, 2, ctx), device)
    for T in chunks:
        n = jnp.array([T, max(1, T - 1)], jnp.int32)
        logits, cache = step(model, cache, ids[:, start : start + T], n)
        out.append(np.asarray(logits)[:, : max(1, T - 1)])
        start += T
    return np.concatenate(out, axis=1), cache


def errors(found, expected):
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


CHUNKS = [128, *[4] * 31, *[1] * 8]  # prefill, a few tokens, and decoding until an HCA window closes
IDS = jnp.asarray(np.random.default_rng(0).integers(CFG.vocab_size, size=(2, sum(CHUNKS))), jnp.int32)


def test_agrees_with_the_plain_forward_pass(model):
    compute = Compute("official", "float32")
    plain = functools.partial(prefill, cfg=CFG, compute=compute, all_positions=True)
    ours = jax.jit(functools.partial(fused.forward, cfg=CFG, compute=compute, all_positions=True, impl="xla"))
    expected, cache = run(model, plain, "float32", CHUNKS, IDS)
    found, moved = run(model, ours, "float32", CHUNKS, IDS)
    # Queries are float16 here, 11 bits. Where that tips a choice, more of the logits moves.
    error = errors(found, expected)
    assert np.median(error) < 1e-3 and error.max() < 0.05
    np.testing.assert_array_equal(moved.length, cache.length)
    for name in ("csa", "hca"):
        seen = int(cache.length[0]) // {"csa": 4, "hca": 128}[name]
        a, b = (np.asarray(getattr(c, name).rows["codes"][:, 0, :seen], np.float32) for c in (moved, cache))
        assert (a != b).mean() < 0.01


# ---- the kernels themselves, interpreted -----------------------------------------------------------------------------
KERNELS = {
    "compressor": ["op"], "experts": ["gate_up", "down"], "grouped_gemm": ["linear", "experts"], "hyper": ["op"],
    "indexer": ["op"], "latent": ["op"], "matmul": ["matmul"], "mla": ["op"], "router": ["op"], "topk": ["op"],
}  # fmt: skip


@pytest.fixture
def interpreted(monkeypatch):
    for name, functions in KERNELS.items():
        module = getattr(fused, name)
        calls = {f: functools.partial(getattr(module, f), interpret=True) for f in functions}
        monkeypatch.setattr(fused, name, types.SimpleNamespace(**{**vars(module), **calls}))


def steps_of_both(dtype):
    """The forward pass in XLA, and through the kernels."""
    f = functools.partial(fused.forward, cfg=CFG, compute=Compute("official", dtype), all_positions=True)
    return jax.jit(functools.partial(f, impl="xla")), jax.jit(f)


def test_decoding_through_the_kernels_is_decoding_in_xla(model, interpreted):
    """Over the end of a window of 128; float32, so that only the order of sums differs, and now and then a code."""
    xla, kernels = steps_of_both("float32")
    start = 254
    _, cache = run(model, xla, "float32", [128, *[4] * 31, 1, 1], IDS)
    one, cache = jnp.ones((2,), jnp.int32), cache.replace(length=jnp.full((2,), start, jnp.int32))
    a = b = cache
    kernels = kernels.lower(model, b, IDS[:, :1], one).compile()
    for i in range(start, start + 3):
        expected, a = xla(model, a, IDS[:, i : i + 1], one)
        found, b = kernels(model, b, IDS[:, i : i + 1], one)
        assert errors(np.asarray(found), np.asarray(expected)).max() < 2e-3
    for x, y in zip(
        jax.tree.leaves((a.window, a.csa.rows, a.hca.rows)),
        jax.tree.leaves((b.window, b.csa.rows, b.hca.rows)),
        strict=True,
    ):
        assert (np.asarray(x, np.float32) != np.asarray(y, np.float32)).mean() < 0.03


def test_a_sequence_that_rests_changes_nothing(model, interpreted):
    """Nor does it have an effect on the other, whose logits are the same bit for bit."""
    _, kernels = steps_of_both("float32")
    cache = kv.empty(CFG, "official", "float32", 2, 512)
    both, one = jnp.array([1, 1], jnp.int32), jnp.array([0, 1], jnp.int32)
    kernels = kernels.lower(model, cache, IDS[:, :1], both).compile()
    for i in range(5):
        _, cache = kernels(model, cache, IDS[:, i : i + 1], both)
    expected, together = kernels(model, cache, IDS[:, 5:6], both)
    found, alone = kernels(model, cache, IDS[:, 5:6], one)
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

    def spied(name, function, seen, argument):
        module = getattr(fused, name)

        def spy(*args, **options):
            seen.append(np.asarray(args[argument]))
            return getattr(module, function)(*args, **options)

        monkeypatch.setattr(fused, name, types.SimpleNamespace(**{**vars(module), function: spy}))

    spied("experts", "gate_up", chosen, 1)
    spied("mla", "op", positions, 4)
    cache = kv.empty(CFG, "official", "float32", 2, 512).replace(length=jnp.full((2,), 5, jnp.int32))
    compute = Compute("official", "float32")
    fused.forward(model, cache, IDS[:, :T], jnp.array(n, jnp.int32), cfg=CFG, compute=compute, impl="xla")
    real = (np.arange(T) < np.array(n)[:, None]).reshape(-1)
    assert len(chosen) == len(positions) == CFG.n_layers
    for ids, position in zip(chosen, positions, strict=True):
        assert (ids[real] >= 0).all() and (ids[~real] == -1).all()
        assert position.tolist() == [5 if count else 0 for count in n]


def test_prefill_through_the_kernels_is_prefill_in_xla(model, interpreted):
    """In bfloat16, where both round to 2⁻⁹ at other places."""
    xla, kernels = steps_of_both("bfloat16")
    n, cache = jnp.array([61], jnp.int32), kv.empty(CFG, "official", "bfloat16", 1, 512)
    expected, found = (np.asarray(f(model, cache, IDS[:1, :64], n)[0], np.float32)[0, :61] for f in (xla, kernels))
    error = errors(found, expected)
    assert np.median(error) < 0.01 and error.max() < 0.1


def test_refuses_what_it_has_no_kernels_for(model):
    cache, ids, n = kv.empty(CFG, "plain", "float32", 1, 128), jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    with pytest.raises(ConfigError, match="kernels = 'pallas': found numerics 'plain' on 1 devices"):
        prefill(model, cache, ids, n, cfg=CFG, compute=Compute("plain", "bfloat16", kernels="pallas"))
    odd = dataclasses.replace(CFG, rope_dim=32)
    w = weights.structs(weights.abstract(odd, Synthetic(odd, RECIPES["q2"]).types))
    form = kv.abstract(odd, "official", "bfloat16", 1, 128)
    step = functools.partial(fused.forward, cfg=odd, compute=Compute("official", "bfloat16"))
    with pytest.raises(Unsupported, match="latent"):
        jax.eval_shape(step, w, form, ids, n)


# ---- the full shape, in five layers of all kinds ---------------------------------------------------------------------
SHORT = dataclasses.replace(
    FULL, n_layers=5, compress_ratios=FULL.compress_ratios[:5], swiglu_clamp=FULL.swiglu_clamp[:5]
)


def steps(T, B=1, ctx=32768):
    """A step of the full shape, and the structures of its arguments."""
    w = weights.structs(weights.abstract(SHORT, Synthetic(SHORT, RECIPES["q2"]).types))
    cache = kv.abstract(SHORT, "official", "bfloat16", B, ctx)
    f = functools.partial(fused.forward, cfg=SHORT, compute=Compute("official", "bfloat16"))
    return f, (w, cache, jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32))


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_lowers_for_gpus_in_few_launches(device):
    f, args = steps(1)
    text = common.lower_for_gpu(f, *args, device=device, cores=DEVICES[device])
    # Per layer: two boundaries of 2, seven or eight products, latent, compressor, 2 of attention, router, 3 of experts.
    kernels = text.count("__gpu$xla.gpu.triton")
    assert 5 * 18 <= kernels <= 5 * 22 + 3


def test_prefill_lowers_for_gpus():
    f, args = steps(2048)
    assert common.lower_for_gpu(f, *args).count("__gpu$xla.gpu.triton") >= 5 * 7


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_kernels_agree_with_xla_on_the_gpu(model):
    """In bfloat16 both: a rounding is 2⁻⁹, and what the two round is not the same."""
    xla, kernels = steps_of_both("bfloat16")
    cpu = jax.devices("cpu")[0]
    # There XLA takes seconds to compile it, not minutes.
    expected, _ = run(jax.device_put(model, cpu), xla, "bfloat16", CHUNKS, jax.device_put(IDS, cpu))
    found, again = (run(model, kernels, "bfloat16", CHUNKS, IDS)[0] for _ in range(2))
    np.testing.assert_array_equal(found, again)
    error = errors(found, expected)
    assert np.median(error) < 0.02 and np.quantile(error, 0.95) < 0.1


@pytest.mark.gpu
def test_no_weight_is_copied_and_the_cache_stays_in_place():
    f, (w, cache, *_) = steps(1)
    decode = functools.partial(
        compiled_steps.decode_step, cfg=SHORT, compute=Compute("official", "bfloat16", kernels="pallas")
    )
    params = sampling.batch([sampling.Sampling()])
    shapes = (compiled_steps.BLOCK, 1), (1, 1)
    results = [*(np.zeros(shape, np.int32) for shape in shapes), np.zeros((1, SHORT.vocab_size), np.float32)]
    args = results, *compiled_steps.decode_args({0: 0}, 1, params)
    stats = jax.jit(decode, donate_argnums=(1, 2)).lower(w, cache, *args).compile().memory_analysis()
    smallest = min(x.size * x.dtype.itemsize for x in jax.tree.leaves(w.ffn.experts))
    assert stats.temp_size_in_bytes < smallest
    assert stats.alias_size_in_bytes == kv.nbytes(cache) + sum(x.nbytes for x in results)
