"""Verification leaves what plain decoding of the accepted tokens leaves, at every length and alignment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights

from ds4jax.io import synthetic
from ds4jax.model import cache as kv
from ds4jax.model import transformer, verify, weights
from ds4jax.model.compute import Compute
from ds4jax.ops import ring

CFG = dataclasses.replace(
    synthetic.ODD, n_layers=3, compress_ratios=(0, 4, 128), swiglu_clamp=(1.0, 1.5, 2.0), embed_dim=32, vocab_size=64,
    n_heads=3, head_dim=48, q_lora_rank=32, index_heads=2, index_top_k=16, n_experts=4, n_experts_used=2,
    expert_dim=32, rope_dim=16, index_head_dim=16, sinkhorn_iters=3,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("float64")
COMPUTE = Compute("official", "float64")  # in float64 no rounding to 4 or 8 bits falls on the other side
T = 6
# Every alignment modulo 4, the first window of both ratios, and all that may cross token 128 or just not; then the ring
# of 32 rows anywhere. Each with every number of accepted tokens.
LENGTHS = (0, 1, 2, 3, 30, 31, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130)
CASES = [(length, accepted) for length in LENGTHS for accepted in range(T + 1)]
ACCEPTED = np.array([accepted for _, accepted in CASES], np.int32)


@pytest.fixture(scope="module")
def plain():
    """A text decoded token by token: a step, the tokens, the cache at every length, and the logits after it."""
    w, _ = random_weights.make(CFG, weights.abstract(CFG, random_weights.F32), 3)
    step = jax.jit(functools.partial(forward, w, n=jnp.array([1], jnp.int32), cfg=CFG, compute=COMPUTE))
    text = np.random.default_rng(0).integers(0, CFG.vocab_size, LENGTHS[-1] + T + 1).astype(np.int32)
    caches, logits = [kv.empty(CFG, COMPUTE.numerics, COMPUTE.dtype, 1, 256)], []
    for token in text:
        said, cache = step(caches[-1], token[None, None])
        caches.append(cache)
        logits.append(said[0, 0])
    return w, step, text, caches, np.stack(logits)


def forward(w, cache, tokens, n, cfg, compute):
    X, cache = transformer.forward(w, cache, tokens, n, cfg, compute)
    return transformer.logits(w, X, cfg, compute), cache


def batch(caches):
    """Caches of one sequence each as one."""
    joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=min(1, x[0].ndim - 1)), *caches)
    return jax.device_put(joined, jax.devices()[0])


@pytest.fixture(scope="module")
def verified(plain):
    """Drafts of CASES, how many of them are real and how many accepted → logits, and the cache after commit."""
    w, _, _, caches, _ = plain

    @jax.jit
    def run(cache, tokens, n, accepted):
        logits, pending = verify.verify(w, cache, tokens, n, CFG, COMPUTE)
        return logits, verify.commit(pending, accepted)

    return functools.partial(run, batch([caches[length] for length, _ in CASES]))


def drafts(text, seed):
    """The accepted tokens of every case, and others than the true ones after them."""
    true = np.stack([text[length : length + T] for length, _ in CASES])
    wrong = (true + np.random.default_rng(seed).integers(1, CFG.vocab_size, true.shape)) % CFG.vocab_size
    return np.where(np.arange(T) < ACCEPTED[:, None], true, wrong).astype(np.int32)


def reachable(cache):
    """Everything of a cache that a later token may see, by name; the rest is 0."""
    length = np.asarray(cache.length)
    out = {"length": length}

    def add(name, x, seen):
        out[name] = np.where(seen[..., None], np.asarray(x).astype(np.float64), 0)

    for plane, x in cache.window.items():
        held = newest(length, x.shape[2])
        add(f"window {plane}", x, (held >= 0) & (held > length[:, None] - CFG.window))
    for kind, ratio in (("csa", 4), ("index", 4), ("hca", 128)):
        state = getattr(cache, kind)
        for plane, x in state.rows.items():
            add(f"{kind} {plane}", x, np.arange(x.shape[2]) < length[:, None] // ratio)
        for name in ("z", "g"):
            first = np.maximum(length // ratio * ratio - (ratio if ratio == 4 else 0), 0)
            add(f"{kind} {name}", getattr(state, name), newest(length, getattr(state, name).shape[2]) >= first[:, None])
    return out


def newest(length, slots):
    """The position that each slot of a ring holds; negative if none."""
    found = np.asarray(ring.positions(jnp.asarray(length) - 1, slots))
    return np.where(length[:, None] > 0, found, -1)


def test_after_a_rejection_all_is_as_after_plain_decoding(plain, verified):
    _, step, text, caches, expected = plain
    logits, committed = verified(drafts(text, 1), jnp.full(len(CASES), T, jnp.int32), ACCEPTED)
    found, wanted = reachable(committed), reachable(batch([caches[length + accepted] for length, accepted in CASES]))
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-9, atol=1e-9, err_msg=name)
    for b, (length, accepted) in enumerate(CASES):
        np.testing.assert_allclose(logits[b, :accepted], expected[length : length + accepted], rtol=1e-9, atol=1e-9)
        one = jax.tree.map(lambda x, b=b: x[:, b : b + 1] if x.ndim > 1 else x[b : b + 1], committed)
        after, _ = step(one, text[length + accepted][None, None])
        np.testing.assert_allclose(after[0, 0], expected[length + accepted], rtol=1e-9, atol=1e-9)


def test_rejected_tokens_leave_no_trace(plain, verified):
    """Bit for bit, and whether they are padding or wrong drafts; a sequence that takes no part stays as it is."""
    _, _, text, caches, _ = plain
    _, found = verified(drafts(text, 2), jnp.full(len(CASES), T, jnp.int32), ACCEPTED)
    _, again = verified(drafts(text, 3), jnp.asarray(ACCEPTED), ACCEPTED)
    before = batch([caches[length] for length, _ in CASES])
    found, again, before = map(reachable, (found, again, before))
    for name, x in found.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)
        sequences, unmoved = (np.moveaxis(y, -min(3, y.ndim), 0) for y in (x, before[name]))
        np.testing.assert_array_equal(sequences[ACCEPTED == 0], unmoved[ACCEPTED == 0], err_msg=name)
