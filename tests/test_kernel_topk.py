"""Top-k selection: interpreted against `lax.top_k`, lowered for GPUs, run on one. The choice is exact: no tolerance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lowering import kernels_of

from ds4jax.ops.check import formula
from pallas_kernels import common
from pallas_kernels.topk import SHAPES, Config, Shape, op

GPUS = ["NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10"]


def check(score, k, block, visible=None):
    if visible is None:
        visible = jnp.full(len(score), score.shape[1], jnp.int32)
    found = op(score, visible, k=k, config=Config(block, 4), interpret=True)
    assert found.dtype == jnp.int32
    seen = jnp.where(jnp.arange(score.shape[1]) < visible[:, None], score, -jnp.inf)
    np.testing.assert_array_equal(found, np.sort(lax.top_k(seen, k)[1], axis=-1))


@pytest.mark.parametrize(
    "shape, block",
    [
        (Shape(3, 100, 100, k=16), 128),  # one pass
        (Shape(3, 100, 60, k=16), 32),  # 4 blocks, then 2, then 1; rows see 60, 59, 58
        (Shape(2, 129, 129, k=16), 64),  # a block of a single score
        (Shape(4, 64, 18, k=16), 32),  # rows that see more, as many, and fewer than k
        (Shape(3, 200, 34, k=16), 32),  # of 7 blocks two, and one
        (Shape(3, 200, 2, k=16), 32),  # rows that see 2, 1, none
        (Shape(2, 40, 40, k=40), 128),  # all
        (Shape(2, 40, 40, k=1), 64),
    ],
)
def test_interpreted(shape, block):
    score, visible = shape.inputs(jax.random.key(0))
    check(score, shape.k, block, visible)


def test_hard_scores():
    inf, tiny = np.inf, np.float32(1e-45)
    few = np.array([-inf, -3e38, -1.0, -tiny, -0.0, 0.0, tiny, 1.0, 1.0000001, 3e38, inf], np.float32)
    score = np.random.default_rng(0).choice(few, (4, 64))
    score[3] = 1.0  # all equal
    for k in (1, 7, 31):
        check(jnp.asarray(score), k, 64)


def test_every_bit_of_a_score_counts():
    """Neighbouring floats, around every power of two and of both signs."""
    bits = np.concatenate([np.arange(-8, 8) + (e << 23) for e in (1, 64, 127, 200, 254)]).astype(np.int32)
    score = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    order = np.random.default_rng(0).permutation(score.size)
    for k in (5, 60, 100):
        check(jnp.asarray(score[order][None]), k, 256)


@pytest.mark.parametrize("device", GPUS)
def test_lowers_for_gpus(device):
    for name, passes in (("decode 28k", 1), ("decode 256k", 2), ("prefill 1024 at 28k", 1)):
        assert kernels_of(op, SHAPES[name], device) == passes, name


@pytest.mark.parametrize(
    "score, k, block, message",
    [
        (jnp.zeros((1, 64), jnp.bfloat16), 4, 64, "scores are bfloat16"),
        (jnp.zeros((1, 64)), 65, 256, "k is 65, expected 1 to the 64"),
        (jnp.zeros((1, 64)), 0, 64, "k is 0"),
        (jnp.zeros((1, 64)), 33, 64, "blocks of 64, expected a power of two from 66"),
        (jnp.zeros((1, 64)), 4, 96, "blocks of 96"),
    ],
)
def test_unsupported(score, k, block, message):
    with pytest.raises(common.Unsupported, match=message):
        op(score, jnp.ones(1, jnp.int32), k=k, config=Config(block, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu(name):
    shape = SHAPES[name]
    inputs = shape.inputs(jax.random.key(sum(name.encode())))
    run = jax.jit(lambda *a: op(*a, **shape.static))
    found = np.asarray(run(*inputs))
    np.testing.assert_array_equal(found, jax.jit(lambda *a: formula("topk")(*a, **shape.static))(*inputs))
    np.testing.assert_array_equal(found, run(*inputs))
