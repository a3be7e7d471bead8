"""Queries and window row: interpreted against the model's functions, lowered for GPUs, run on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import kernels_of

from ds4jax.ops.check import formula
from pallas_kernels import common, latent
from pallas_kernels.latent import SHAPES, Config, Shape, op

GPUS = ["NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10"]

SMALL = {
    "some heads": (Shape(4, heads=4, dim=128, window=8), Config(2, 4)),
    "one layer": (Shape(2, heads=4, dim=256, window=5, layers=1), Config(1, 1)),
    "float32": (Shape(3, heads=2, dim=128, window=8, dtype="float32"), Config(2, 2)),
    "5 tokens": (Shape(3, 5, heads=2, dim=128, window=8), Config(2, 2)),
}


def check(found, expected, shape):
    """Sums in another order differ in a float32's last bits, which the rounding of about one value in 2⁻²⁴ over the
    spacing of the format turns into one step: 2e-4 of all in float16, far fewer in E4M3.
    """
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(expected)
    ]
    found, expected = jax.device_get(found), jax.device_get(expected)
    q, e = (np.float64(x[0]) for x in (found, expected))
    assert np.linalg.norm(q - e) < 5e-5 * np.linalg.norm(e)
    for name, plane in expected[1].items():
        bits, right = (x.view(np.int16 if name == "rope" else np.uint8).astype(int) for x in (found[1][name], plane))
        assert np.abs(bits - right).max() <= 1, name
        assert (bits != right).sum() <= 2e-3 * shape.batch * shape.tokens * plane.shape[-1], name


def run(shape, config, inputs, **options):
    return op(*inputs, **shape.static, config=config, **options)


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name):
    shape, config = SMALL[name]
    inputs = shape.inputs(jax.random.key(0))
    found = run(shape, config, inputs, interpret=True)
    check(found, formula("latent")(*inputs, **shape.static), shape)
    # Another layer's rows, other slots, and the rows of tokens that are not real stay; the others are new.
    before, after = (np.asarray(w["codes"].astype(jnp.float32)) for w in (inputs[-1], found[1]))
    changed = {tuple(map(int, x)) for x in np.argwhere((before != after).any(-1))}
    *_, position, n, layers, _ = inputs
    at = {
        (int(layers[1]), b, (int(position[b]) + t) % shape.window) for b in range(shape.batch) for t in range(n[b])
    }  # fmt: skip
    assert changed == at and 0 < len(at) == n.sum() < shape.batch * shape.tokens + (shape.batch < 3)


@pytest.mark.parametrize("device", [pytest.param(d, marks=[] if "GB10" in d else pytest.mark.slow) for d in GPUS])
def test_lowers_for_gpus(device):
    for name, shape in SHAPES.items():
        assert kernels_of(op, shape, device) == 1, name


@pytest.mark.parametrize(
    "shape, change, message",
    [
        (Shape(1, dim=192), {}, "heads of 192"),
        (Shape(1, heads=6), {"config": Config(4)}, "6 heads, expected a multiple of 4"),
        (Shape(1), {"q": jnp.zeros((1, 700))}, "700"),
        (Shape(1), {"cos": jnp.zeros((1, 1, 16))}, "cos"),
        (Shape(2), {"cos": jnp.zeros((2, 3, 32))}, r"B·T = 2"),
        (Shape(1), {"window": {"x": jnp.zeros((1, 1, 8, 512))}}, "planes"),
    ],
)
def test_unsupported(shape, change, message):
    names = "q", "kv", "norm", "cos", "sin", "position", "n", "layers", "window"
    args = dict(zip(names, shape.inputs(jax.random.key(0)), strict=True))
    with pytest.raises(common.Unsupported, match=message):
        op(**args | change, **shape.static)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu(name):
    shape = SHAPES[name]
    inputs = shape.inputs(jax.random.key(sum(name.encode())))
    expected = jax.jit(lambda *a: formula("latent")(*a, **shape.static))(*inputs)
    configs = {latent.default_config(shape), *latent.configs(shape)[::5]}
    for config in configs:
        f = jax.jit(lambda *a, c=config: run(shape, c, a))
        found, again = f(*inputs), f(*inputs)
        check(found, expected, shape)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
