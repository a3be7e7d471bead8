"""The forward pass agrees with itself: chunked, token by token, in ragged batches; over a mesh in `test_mesh`.

`official` rounds activations to 8 and 4 bits, so two orders of the same float32 sums now and then fall on different
sides of a rounding (or of the top-k), which no tolerance describes. Those cases run in float64, where such an accident
has no chance, and 1e-5 holds for both numerics. Agreement with another implementation is in `test_goldens`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.io import synthetic
from ds4jax.model import cache as kv
from ds4jax.model import weights
from ds4jax.model.compute import Compute
from ds4jax.model.transformer import bucket, decode_step, prefill

ODD = synthetic.synthetic_config("odd")
LENGTH = 300  # two rows of ratio 128, 75 of ratio 4 against a top-k of 16, a window of 32


@pytest.fixture(params=["official-float64", pytest.param("plain-float32", marks=pytest.mark.slow)])
def compute(request):
    numerics, dtype = request.param.split("-")
    with jax.enable_x64(dtype == "float64"):
        yield Compute(numerics, dtype)


@pytest.fixture(scope="module")
def model():
    return weights.init_random(weights.abstract(ODD, synthetic.RECIPES["f16"]), ODD, seed=3)


def tokens(batch, length, seed=0, cfg=ODD):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, length)).astype(np.int32)


def run(model, compute, ids, chunk, cfg=ODD, empty=kv.empty):
    """Logits (B, S, vocab) of ids (B, S), `chunk` tokens at a time."""
    cache = empty(cfg, compute.numerics, compute.dtype, len(ids), 512)
    out, size = [], bucket(chunk, 512)
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        padded = np.pad(part, ((0, 0), (0, size - part.shape[1])), constant_values=5)
        n = jnp.full((len(ids),), part.shape[1], jnp.int32)
        logits, cache = prefill(model, cache, padded, n, cfg=cfg, compute=compute, all_positions=True)
        out.append(np.asarray(logits[:, : part.shape[1]]))
    assert cache.length.tolist() == [ids.shape[1]] * len(ids)
    return np.concatenate(out, axis=1)


def worst(found, expected):
    """Largest relative error over positions."""
    return (np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


@pytest.fixture(scope="module")
def one_shot(model):
    cache = {}

    def logits(compute):
        if compute not in cache:
            cache[compute] = run(model, compute, tokens(1, LENGTH), LENGTH)
        return cache[compute]

    return logits


@pytest.mark.parametrize("chunk", [*(pytest.param(n, marks=pytest.mark.slow) for n in (7, 128)), 129])
def test_chunks_change_nothing(model, compute, one_shot, chunk):
    assert worst(run(model, compute, tokens(1, LENGTH), chunk), one_shot(compute)) < 1e-5


def test_token_by_token(model, compute, one_shot):
    cache = kv.empty(ODD, compute.numerics, compute.dtype, 1, 512)
    out = []
    for token in tokens(1, LENGTH)[0]:
        logits, cache = decode_step(model, cache, jnp.array([token]), jnp.array([True]), cfg=ODD, compute=compute)
        out.append(np.asarray(logits))
    assert worst(np.stack(out, axis=1), one_shot(compute)) < 1e-5


def test_ragged_sequences_equal_each_alone(model, compute):
    """Three sequences, in two calls that give each a different number of tokens; padding differs from call to call."""
    shares = np.array([[100, 37], [3, 128], [0, 129]], np.int32)
    ids = tokens(3, 137, seed=1)
    cache = kv.empty(ODD, compute.numerics, compute.dtype, 3, 512)
    found = [[], [], []]
    for call in range(2):
        padded = np.full((3, 256 if call else 128), 9, np.int32)
        for b, (start, n) in enumerate(zip(shares[:, :call].sum(1), shares[:, call], strict=True)):
            padded[b, :n] = ids[b, start : start + n]
        n = jnp.asarray(shares[:, call])
        logits, cache = prefill(model, cache, padded, n, cfg=ODD, compute=compute, all_positions=True)
        for b in range(3):
            found[b].append(np.asarray(logits[b, : shares[b, call]]))
    for b in range(3):
        length = shares[b].sum()
        alone = run(model, compute, ids[b : b + 1, :length], 128)[0]
        assert worst(np.concatenate(found[b]), alone) < 1e-5


SHAPES = {
    "window only": {"compress_ratios": (0,), "n_layers": 1, "n_hash_layers": 1, "window": 7},
    "no ratio 4": {"compress_ratios": (128, 0), "n_layers": 2, "n_hash_layers": 0, "n_streams": 1},
    "no ratio 128": {"compress_ratios": (4, 4), "n_layers": 2, "n_hash_layers": 2, "route_norm": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes(shape):
    """A kind of layer that is missing, one stream, an odd window: whole and in parts, the same."""
    layers = SHAPES[shape]["n_layers"]
    cfg = dataclasses.replace(ODD, swiglu_clamp=(2.0,) * layers, **SHAPES[shape])
    model = weights.init_random(weights.abstract(cfg, synthetic.RECIPES["f16"]), cfg, seed=1)
    ids = tokens(1, 140, seed=6, cfg=cfg)
    expected = run(model, Compute("plain"), ids, 140, cfg)
    assert np.isfinite(expected).all()
    assert worst(run(model, Compute("plain"), ids, 3, cfg), expected) < 1e-5


@pytest.mark.slow
def test_last_position_only(model):
    compute, ids = Compute("plain"), tokens(2, 64, seed=2)
    n = jnp.array([64, 11], jnp.int32)
    last, every = (
        prefill(model, kv.empty(ODD, "plain", "float32", 2, 512), ids, n, cfg=ODD, compute=compute, all_positions=a)[0]
        for a in (False, True)
    )
    expected = np.stack([every[0, 63], every[1, 10]])
    assert worst(np.asarray(last), expected) < 1e-5


# ---- compiled programs -----------------------------------------------------------------------------------------------
def test_one_program_per_bucket_and_the_cache_is_donated(model):
    compute = Compute("plain")
    prefill.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    for length in (5, 8, 7):  # one bucket; lengths and positions are data
        cache = kv.empty(ODD, "plain", "float32", 1, 256)
        for n in (length, 1, 3):
            ids = np.zeros((1, bucket(length, 64)), np.int32)
            before = cache
            _, cache = prefill(model, cache, ids, jnp.array([n], jnp.int32), cfg=ODD, compute=compute)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.size)
    assert prefill._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    for i in range(3):
        _, cache = decode_step(model, cache, jnp.array([i]), jnp.array([True]), cfg=ODD, compute=compute)
    assert prefill._cache_size() == 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("n, expected", [(1, 1), (2, 2), (5, 8), (128, 128), (129, 256), (300, 512), (4000, 512)])
def test_buckets(n, expected):
    assert bucket(n, 512) == expected
