"""Hyper-connections: interpreted against the model's own functions, lowered for GPUs, run on one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.ops.check import formula
from pallas_kernels import common
from pallas_kernels.hyper import SHAPES, Config, Numbers, Shape, op

GPUS = ["NVIDIA H200", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10"]


def errors(found, expected) -> list[float]:
    """‖found - expected‖ / ‖expected‖ of each result that there is."""
    results = []
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if e is not None:
            assert f.shape == e.shape and f.dtype == e.dtype
            f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
            results.append(np.linalg.norm(f - e) / np.linalg.norm(e))
    return results


def bounds(dtype: str) -> list[float]:
    """X', h, post, C. float32: the order of sums differs, and a GPU's quick exponentials and divisions are 2 ulp off.

    bfloat16: a sum near the middle of two values may be rounded to the other one, 2⁻⁸ away: rare in X', less so in h,
    which is rounded three times. post and C see X' only through sums over all of it.
    """
    return [1e-6, 5e-6, 5e-6, 5e-6] if dtype == "float32" else [3e-4, 2e-3, 5e-4, 5e-4]


SMALL = {
    "1": (Shape(1, dim=64), Config(1, 32, 4, 4)),
    "5": (Shape(5, dim=64), Config(4, 64, 4, 4, 2)),  # no multiple of what a program takes
    "float32": (Shape(3, dim=64, dtype="float32"), Config(2, 16, 4, 4)),
    "first": (Shape(2, first=True, dim=64), Config(1, 32, 4, 4)),
    "head": (Shape(2, head=True, dim=64, layers=1), Config(1, 32, 4, 4)),
    "many": (Shape(70, first=True, dim=128), Config(64, 32, 4, 4, 32, 2)),
    "many, first": (Shape(64, first=True, dim=128), Config(64, 64, 4, 4, 32, 1)),
    "many, float32": (Shape(64, first=True, dim=128, dtype="float32"), Config(32, 64, 4, 4, 32, 4)),
    "2 streams": (Shape(2, streams=2, dim=64), Config(1, 32, 4, 4)),
}


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name):
    shape, config = SMALL[name]
    inputs = shape.inputs(jax.random.key(0))
    found = op(*inputs, config=config, interpret=True)
    expected = formula("hyper")(*inputs)
    assert len(errors(found, expected)) == (2 if shape.head else 4)
    assert np.all(np.array(errors(found, expected)) < bounds(shape.dtype)[: 2 if shape.head else 4])
    assert shape.first == (found[0] is inputs[0])


def test_other_numbers():
    """Two sub-layers in a row, and the head, with other epsilons and fewer iterations."""
    numbers = Numbers(1e-2, 1e-3, 7)
    X, _, *weights, _ = Shape(3, dim=64, dtype="float32", layers=2, first=True).inputs(jax.random.key(0))
    head = Shape(3, dim=64, dtype="float32", layers=1, head=True).inputs(jax.random.key(1))[2:]
    a: tuple[Any, Any] = X, None
    b = a
    for layer in range(3):
        args = head if layer == 2 else (*weights, jnp.array([layer], jnp.int32))
        found = op(*a, *args, numbers=numbers, config=Config(1, 32, 4, 4), interpret=True)
        expected = formula("hyper")(*b, *args, numbers=numbers)
        results = errors(found, expected)
        assert np.all(np.array(results) < bounds("float32")[: len(results)])
        a, b = ((X, (jnp.sin(3 * h), post, C)) for X, h, post, C in (found, expected))
    assert len(results) == 2


@pytest.mark.parametrize("device", [pytest.param(d, marks=[] if "GB10" in d else pytest.mark.slow) for d in GPUS])
def test_lowers_for_gpus(device):
    for name in ("1", "1 first", "1 head", "prefill 2048"):
        inputs = jax.eval_shape(SHAPES[name].inputs, jax.random.key(0))
        text = common.lower_for_gpu(lambda *a: op(*a), *inputs, device=device)
        assert text.count("__gpu$xla.gpu.triton") == 2, name


@pytest.mark.parametrize(
    "shape, change, message",
    [
        (Shape(1, dim=96), {}, "4 streams of 96"),
        (Shape(1, dim=64, streams=8), {}, "fn is 80 x 512"),
        (Shape(1, dim=64), {"fn": jnp.zeros((3, 20, 256))}, "fn is 20 x 256, expected 24"),
        (Shape(1, dim=64), {"config": Config(1, 128, 4, 4)}, "64 columns"),
        (Shape(1, dim=64), {"config": Config(1, 64, 4, 4, 2)}, "1 tokens, expected at least the 2"),
        (Shape(32, first=True, dim=64), {"config": Config(64, 64, 4, 4, 32, 2)}, "32 tokens, expected at least the 64"),
        (Shape(64, dim=64), {"config": Config(64, 64, 4, 4, 32, 4)}, "an output to add to the streams of 64 tokens"),
        (Shape(64, dim=64), {"config": Config(64, 64, 4, 4, 32, 8)}, "each of 8 slices of 256, expected a multiple of"),
    ],
)
def test_unsupported(shape, change, message):
    X, mixed, fn, *rest = shape.inputs(jax.random.key(0))
    with pytest.raises(common.Unsupported, match=message):
        op(X, mixed, change.get("fn", fn), *rest, config=change.get("config"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu(name):
    shape = SHAPES[name]
    inputs = shape.inputs(jax.random.key(sum(name.encode())))
    run = jax.jit(lambda *a: op(*a))
    found, again = run(*inputs), run(*inputs)
    results = errors(found, formula("hyper")(*inputs))  # not jitted: XLA would leave out roundings between its steps
    assert np.all(np.array(results) < bounds(shape.dtype)[: len(results)]), results
    for f, a in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(f, a)
