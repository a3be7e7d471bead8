"""Indexer scores: interpreted against the model's own functions, lowered for GPUs, run on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import kernels_of

from ds4jax.numerics.rows import Fp4Row
from ds4jax.ops.check import formula
from pallas_kernels import common, indexer
from pallas_kernels.indexer import SHAPES, Config, Shape, op

GPUS = ["NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10"]

# Both add up products that are exact, in float32 and in another order: 64 heads of 128 dims.
BOUND = 1e-6


def error(found, shape, inputs) -> float:
    """‖found - expected‖ / ‖expected‖ over the visible keys, of which there are some."""
    expected = jax.jit(lambda *a: formula("indexer")(*a, **shape.static))(*inputs)
    assert found.shape == expected.shape and found.dtype == expected.dtype == jnp.float32
    found, expected = (np.asarray(shape.defined(x, inputs), np.float64) for x in (found, expected))
    seen = np.isfinite(expected)
    return np.linalg.norm(found[seen] - expected[seen]) / np.linalg.norm(expected[seen])


SMALL = [
    (Shape(2, 1, 80, 291, heads=32), Config(32, 1, 1, 4)),  # one query: N is no multiple of a program's keys
    (Shape(1, 4, 64, 100, heads=32), Config(32, 4, 1, 4)),  # keys 25 to 63 are in the future of all or of some
    (Shape(1, 8, 64, 250, heads=32), Config(32, 4, 2, 4)),
    (Shape(1, 1, 48, 3, dim=32), Config(16, 1, 1, 4)),  # one key is visible
]


@pytest.mark.parametrize("shape, config", SMALL)
def test_interpreted(shape, config):
    inputs = shape.inputs(jax.random.key(0))
    found = op(*inputs, **shape.static, config=config, interpret=True)
    assert error(found, shape, inputs) < BOUND


def test_every_scale_of_a_key():
    """Not only usual ones."""
    shape = Shape(2, 3, 40, 120, heads=32)
    q, weight, codes, exponents, position, layer = shape.inputs(jax.random.key(1))
    exponents = (jnp.arange(exponents.size, dtype=jnp.int32).reshape(exponents.shape) % 20 + 117).astype(jnp.uint8)
    inputs = q, weight, codes, exponents, position, layer
    found = op(*inputs, config=Config(16, 1, 1, 4), interpret=True)
    assert error(found, shape, inputs) < BOUND


def test_every_code_is_decoded_exactly():
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(16, 1, 16)
    for exponent in (1, 127, 240):
        found = indexer._decoded(codes, jnp.full((16, 1), exponent, jnp.uint8))
        planes = {"codes": codes.reshape(16, 16), "exponents": jnp.full((16, 1), exponent, jnp.uint8)}
        np.testing.assert_array_equal(found.astype(jnp.float32), Fp4Row(32).decode(planes, jnp.float32))


@pytest.mark.parametrize("device", GPUS)
def test_lowers_for_gpus(device):
    for shape in (SHAPES["decode 28k"], SHAPES["verify 4 at 28k"], SHAPES["prefill 1024 at 28k"]):
        assert kernels_of(op, shape, device) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=(1, 1, 64, 96)), "96 dims"),
        (dict(q=(1, 1, 48, 128)), "48 heads"),
        (dict(dtype=jnp.float32), "float32, expected bfloat16"),
        (dict(config=Config(64, 2, 1, 4)), "1 queries, expected a multiple of the 2"),
    ],
)
def test_unsupported(change, message):
    q = jnp.zeros(change.get("q", (1, 1, 64, 128)), change.get("dtype", jnp.bfloat16))
    rest = Shape(1, 1, 64, 0).inputs(jax.random.key(0))[1:]
    with pytest.raises(common.Unsupported, match=message):
        op(q, *rest, config=change.get("config"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu(name):
    shape = SHAPES[name]
    inputs = shape.inputs(jax.random.key(sum(name.encode())))
    run = jax.jit(lambda *a: op(*a, **shape.static))
    found = run(*inputs)
    assert error(found, shape, inputs) < BOUND
    np.testing.assert_array_equal(shape.defined(found, inputs), shape.defined(run(*inputs), inputs))
