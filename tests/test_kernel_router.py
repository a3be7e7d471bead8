"""Router: interpreted against the model's own function, lowered for GPUs, run on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import kernels_of

from ds4jax.ops.check import formula
from pallas_kernels import common, experts
from pallas_kernels.router import SHAPES, Config, Shape, op

GPUS = ["NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10"]

SMALL = {
    "256": Shape(3),
    "12": Shape(3, experts=12, k=4),  # no powers of two
    "all": Shape(2, experts=8, k=8),
    "one": Shape(2, experts=5, k=1, layers=1),
    "512": Shape(2, experts=512, norm=False, scale=1.0),
    "by token": Shape(4, vocab=50, experts=12),
    "by token, 5 of 12": Shape(4, vocab=50, experts=12, k=5, norm=False),
    "gaps": Shape(5, experts=12, k=4, gaps=True),
    "by token with gaps": Shape(4, vocab=50, experts=12, gaps=True),
}


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name):
    shape = SMALL[name]
    inputs = shape.inputs(jax.random.key(0))
    found = op(*inputs, **shape.static, interpret=True)
    ids, weight = formula("router")(*inputs, **shape.static)
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_allclose(found[1], weight, rtol=1e-6)
    assert [x.dtype for x in found] == [jnp.int32, jnp.float32]


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("vocab", [0, 9])
def test_packs_meanwhile(vocab, gaps):
    shape = Shape(2, vocab, experts=16, fmt="Q2_K", dim=512, gaps=gaps)
    inputs = shape.inputs(jax.random.key(0))
    found = op(*inputs, **shape.static, interpret=True)
    for f, e in zip(found, formula("router")(*inputs, **shape.static), strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-6)
    np.testing.assert_array_equal(found[2], experts.pack(inputs[4], fmt="Q2_K", interpret=True))


def test_ties_and_extremes():
    """Of equal scores the lower expert; logits that overflow an exponential, or of which softplus leaves nothing."""
    logits = np.random.default_rng(0).choice(np.array([-100, -87, -1, 0, 1, 88, 1e4, 1e30], np.float32), (6, 16))
    bias = np.random.default_rng(1).choice(np.array([-1e3, -0.5, 0, 0.5], np.float32), (2, 16))
    bias[1] = 0
    logits[5] = -200  # whose scores are 0, all alike
    for layer in range(2):
        args = jnp.asarray(logits), jnp.asarray(bias), None, jnp.array([layer], jnp.int32)
        static = {"k": 6, "norm": False, "scale": 2.0}
        found, expected = op(*args, **static, interpret=True), formula("router")(*args, **static)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    precise = np.sqrt(np.logaddexp(0, logits.astype(np.float64)))
    np.testing.assert_allclose(found[1], 2 * np.take_along_axis(precise, np.asarray(found[0]), 1), 3e-7, atol=1e-37)
    np.testing.assert_array_equal(found[0][5], np.arange(6))


@pytest.mark.parametrize("device", GPUS)
def test_lowers_for_gpus(device):
    for name, shape in (SHAPES | {"12": SMALL["12"]}).items():
        assert kernels_of(op, shape, device) == 1, name


@pytest.mark.parametrize(
    "shape, change, message",
    [
        (Shape(1, experts=1024), {}, "6 of 1024 experts"),
        (Shape(1, experts=4, k=2), {"k": 5}, "5 of 4 experts"),
        (Shape(1, experts=16, vocab=9), {"k": 5}, r"\('int32', \(9, 6\)\), expected \('int32', \(9, 5\)\)"),
        (Shape(1), {"table": jnp.zeros((3, 256), jnp.bfloat16)}, "bfloat16"),
        (Shape(1, fmt="F16"), {}, "format: found F16"),
        (Shape(1), {"logits": jnp.zeros((1, 256), jnp.bfloat16)}, "logits are bfloat16"),
    ],
)
def test_unsupported(shape, change, message):
    logits, table, *rest = shape.inputs(jax.random.key(0))
    with pytest.raises(common.Unsupported, match=message):
        op(
            change.get("logits", logits),
            change.get("table", table),
            *rest,
            **shape.static | {"k": change.get("k", shape.k)},
        )


@pytest.mark.gpu
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_gpu(name, warps):
    """Scores differ in their last bits, by a GPU's quick exponentials; so may the choice between two nearly equal."""
    shape = SHAPES[name]
    inputs = shape.inputs(jax.random.key(sum(name.encode())))
    run = jax.jit(lambda *a: op(*a, **shape.static, config=Config(warps)))
    found, again = (jax.device_get(run(*inputs)) for _ in range(2))
    ids, weight, *packed = jax.device_get(jax.jit(lambda *a: formula("router")(*a, **shape.static))(*inputs))
    same = (found[0] == ids).all(1)
    if shape.vocab:
        assert same.all()
    assert (~same).sum() <= shape.tokens / 1000
    np.testing.assert_allclose(found[1][same], weight[same], rtol=5e-6)
    for f, p in zip(found[2:], packed, strict=True):
        # A GPU's quick division may turn an activation in the middle between two integers to the other one.
        assert np.abs(f.view(np.int16).astype(int) - p.view(np.int16)).max() <= 1
    for f, a in zip(found, again, strict=True):
        np.testing.assert_array_equal(f, a)
