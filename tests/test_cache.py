"""The cache: its size, and snapshots that continue bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.io import synthetic
from ds4jax.model import cache as kv
from ds4jax.model import weights
from ds4jax.model.compute import Compute
from ds4jax.model.transformer import prefill

CFG = synthetic.synthetic_config("odd")

FLASH = ModelConfig(
    n_layers=43, embed_dim=4096, vocab_size=129280, n_heads=64, head_dim=512, rope_dim=64, q_lora_rank=1024,
    o_lora_rank=1024, o_groups=8, window=128, compress_ratios=(0, 0, *(4, 128) * 20, 4), index_heads=64,
    index_head_dim=128, index_top_k=512, rope_base=1e4, compress_rope_base=16e4, yarn_factor=16.0,
    yarn_original_ctx=65536, yarn_beta_fast=32.0, yarn_beta_slow=1.0, n_experts=256, n_experts_used=6,
    n_shared_experts=1, expert_dim=2048, route_scale=1.5, route_norm=True, n_hash_layers=3, swiglu_clamp=(10.0,) * 43,
    n_streams=4, sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6,
)  # fmt: skip


def test_the_full_synthetic_shape_is_the_published_one():
    assert synthetic.FULL == FLASH


def test_a_million_tokens_cost_at_most_4_gb():
    size = {ctx: kv.nbytes(kv.abstract(FLASH, "official", "bfloat16", 1, ctx)) for ctx in (2**20, 2**19)}
    assert size[2**20] <= 4.0e9
    # 21 CSA layers: a row of 448 + 7 + 128 bytes and a key of 64 + 4 per 4 tokens; 20 HCA layers: a row per 128.
    assert (size[2**20] - size[2**19]) / 2**19 == 21 * (583 + 68) / 4 + 20 * 583 / 128


def test_plain_rows_are_in_the_compute_type():
    tree = kv.abstract(FLASH, "plain", "bfloat16", 2, 4096)
    assert tree.window["x"].dtype == tree.csa.rows["x"].dtype == tree.index.rows["x"].dtype == jnp.bfloat16
    assert tree.csa.rows["x"].shape == (21, 2, 1024, 512)
    assert tree.hca.z.dtype == jnp.float32


@pytest.mark.parametrize("batch, ctx", [(0, 10), (1, 0)])
def test_empty_sizes_are_refused(batch, ctx):
    with pytest.raises(ConfigError, match="must both be at least 1"):
        kv.abstract(CFG, "official", "float32", batch, ctx)


@pytest.fixture(scope="module")
def model():
    return weights.init_random(weights.abstract(CFG, synthetic.RECIPES["f16"]), CFG, seed=3)


def feed(model, cache, numerics, tokens, n):
    """Logits (B, 256, vocab) of up to 256 tokens per sequence, n[b] of them real, in two calls of 128."""
    out = []
    for start in (0, 128):
        real = jnp.clip(jnp.asarray(n, jnp.int32) - start, 0, 128)
        part = tokens[:, start : start + 128]
        logits, cache = prefill(model, cache, part, real, cfg=CFG, compute=Compute(numerics), all_positions=True)
        out.append(np.asarray(logits))
    return np.concatenate(out, axis=1), cache


@pytest.mark.parametrize("numerics", ["official", "plain"])
@pytest.mark.parametrize("length", [1, 3, 4, 127, 128, 131])
def test_snapshot_restore_and_fork_continue_bit_for_bit(model, numerics, length):
    rng = np.random.default_rng(length)
    prompt, other, tail = rng.integers(0, CFG.vocab_size, (3, 3, 256)).astype(np.int32)
    cache = kv.empty(CFG, numerics, "float32", 3, 500)
    _, cache = feed(model, cache, numerics, prompt, [length, 17, 0])
    saved = kv.snapshot(cache, 0)
    assert kv.nbytes(saved) < kv.nbytes(cache)
    expected, cache = feed(model, cache, numerics, tail, [150, 0, 0])

    # Other tokens go over everything before the sequence comes back: in slot 0 by restoring, in slot 2 by forking 0.
    _, cache = feed(model, cache, numerics, other, [200, 160, 60])
    cache = kv.fork(kv.restore(cache, 0, saved), 0, 2)
    assert cache.length.tolist() == [length, 177, length]
    tail[2] = tail[0]
    found, cache = feed(model, cache, numerics, tail, [150, 20, 150])
    np.testing.assert_array_equal(found[0, :150], expected[0, :150])
    np.testing.assert_array_equal(found[2, :150], expected[0, :150])


def test_a_reset_sequence_remembers_nothing(model):
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (3, 256)).astype(np.int32)
    n = [150, 90, 3]
    expected, cache = feed(model, kv.empty(CFG, "official", "float32", 3, 500), "official", tokens, n)
    cache = jax.jit(kv.reset, donate_argnums=0)(cache, jnp.array([True, True, True]))
    found, _ = feed(model, cache, "official", tokens, n)
    for b in range(3):
        np.testing.assert_array_equal(found[b, : n[b]], expected[b, : n[b]])
