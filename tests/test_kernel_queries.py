"""Queries: interpreted against the model's functions, lowered for GPUs, run on one; and how rows are rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import kernels_of

from ds4jax.numerics import rows as num
from ds4jax.ops.check import formula
from pallas_kernels import common, queries
from pallas_kernels.numerics import e2m1, e4m3
from pallas_kernels.queries import SHAPES, Config, Shape, op

GPUS = ["NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10"]

SMALL = {
    "attention": (Shape("attention", 5, 4, 256, "bfloat16"), Config(2, 4)),
    "attention, float32": (Shape("attention", 3, 2, 128), Config(1, 1)),
    "index": (Shape("index", 4, 4), Config(2, 2)),
    "index of 64 dims": (Shape("index", 3, 2, 64, "bfloat16"), Config(1, 1)),
}


def check(found, expected, kind):
    """Sums in another order differ in a float32's last bits, which the rounding of about one value in 2⁻²⁴ over the
    spacing of the format turns into one step: 2e-4 of all in float16, far fewer in E2M1, whose steps are large.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    if kind == "attention":
        assert np.linalg.norm(found - expected) < 5e-5 * np.linalg.norm(expected)
    else:
        assert (found != expected).mean() < 1e-4
        np.testing.assert_allclose(found, expected, rtol=0.51, atol=0.3)


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name):
    shape, config = SMALL[name]
    inputs = shape.inputs(jax.random.key(0))
    found = op(*inputs, **shape.static, config=config, interpret=True)
    check(found, formula("queries")(*inputs, **shape.static), shape.kind)


@pytest.mark.parametrize("exponent", [-100, -20, 0, 20])
def test_rounding_is_that_of_the_rows(exponent):
    """Largest values around 448 and 6, times a power of two; beside them every tie of E2M1, and neighbours of both."""
    ties = np.arange(0, 6.25, 0.25, dtype=np.float32)
    for block, largest in ((64, 448.0), (32, 6.0)):
        x = np.zeros((5, block), np.float32)
        x[:, :25] = ties
        x[3:, :25] = np.nextafter(ties, np.array([[0], [9]], np.float32))
        x[:, 25] = np.float32(largest) * np.array([1, 1 + 2**-23, 1 - 2**-24, 1, 1], np.float32)
        x = jnp.asarray(np.concatenate([x, -x]) * np.float32(2.0**exponent))
        if block == 64:
            codes, exponents = e4m3.encode_blocks(x)
            expected = num.Fp8Row(128, 64).encode(jnp.concatenate([x, x], axis=-1))
            np.testing.assert_array_equal(codes.astype(jnp.float32), expected["codes"].astype(jnp.float32))
            np.testing.assert_array_equal(exponents, expected["exponents"][:, 0])
        else:
            row = num.Fp4Row(32)
            np.testing.assert_array_equal(e2m1.rounded(x), row.decode(row.encode(x), jnp.float32))


@pytest.mark.parametrize("device", [pytest.param(d, marks=[] if "GB10" in d else pytest.mark.slow) for d in GPUS])
def test_lowers_for_gpus(device):
    for name, shape in SHAPES.items():
        assert kernels_of(op, shape, device) == 1, name


@pytest.mark.parametrize(
    "shape, change, message",
    [
        (Shape("index", 1, dim=96), {}, "heads of 96, expected a power of two"),
        (Shape("index", 1, heads=6), {"config": Config(4)}, "6 heads, expected a multiple of 4"),
        (Shape("attention", 1), {"x": jnp.zeros((1, 700))}, "700 columns"),
        (Shape("attention", 1), {"cos": jnp.zeros((1, 16))}, "cos"),
    ],
)
def test_unsupported(shape, change, message):
    args = dict(zip(("x", "cos", "sin"), shape.inputs(jax.random.key(0)), strict=True))
    with pytest.raises(common.Unsupported, match=message):
        op(**args | change, **shape.static)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu(name):
    shape = SHAPES[name]
    inputs = shape.inputs(jax.random.key(sum(name.encode())))
    expected = jax.jit(lambda *a: formula("queries")(*a, **shape.static))(*inputs)
    for config in {queries.default_config(shape), *queries.configs(shape)[::4]}:
        f = jax.jit(lambda *a, c=config: op(*a, **shape.static, config=c))
        found, again = f(*inputs), f(*inputs)
        check(found, expected, shape.kind)
        np.testing.assert_array_equal(found, again)
