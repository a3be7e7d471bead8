"""The sparse MLA kernel against its reference, and the reference against the model's attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from candidates import each_value

from ds4jax.ops.check import formula
from pallas_kernels import common, mla
from pallas_kernels.mla import Config, Shape

# Two roundings to float16, of the softmax weights and of the result, each by at most 2⁻¹² of the value.
TOLERANCE = 2 * 2.0**-12

SMALL = {
    "decode gathered": (Shape(2, 1, 150, 4, 32, heads=32, dim=128, window=32), Config(16, 16, 3, 1)),
    "decode dense": (Shape(2, 1, 180, 4, heads=16, dim=128, window=32), Config(16, 32, 2, 1)),
    "verify gathered": (Shape(1, 5, 140, 4, 32, heads=16, dim=256, window=24), Config(16, 16, 1, 1)),
    "verify from nothing": (Shape(2, 6, 0, 4, heads=16, dim=128, window=16), Config(16, 16, 2, 1)),
    "not causal": (Shape(2, 5, 45, 0, heads=16, dim=128, window=32, causal=False), Config(16, 16, 2, 1)),
    "prefill gathered": (Shape(1, 9, 140, 4, 32, heads=16, dim=256, window=24), Config(16, 16, 1, 1)),
    "prefill from nothing": (Shape(2, 10, 0, 4, heads=16, dim=128, window=16), Config(16, 16, 2, 1)),
}


def error(found: jax.Array, expected: jax.Array) -> float:
    f, e = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(f - e) / np.linalg.norm(e))


def run(shape: Shape, seed: int, **options) -> tuple[jax.Array, jax.Array]:
    """Output in float32, and the reference's."""
    inputs, static = shape.inputs(jax.random.key(seed)), shape.static | {"dtype": jnp.float32}
    return mla.op(*inputs, **static, **options), formula("mla")(*inputs, **static)


@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_the_reference(name):
    shape, config = SMALL[name]
    found, expected = run(shape, 1, config=config, interpret=True)
    assert found.shape == (shape.batch, shape.queries, shape.heads, shape.dim)
    assert error(found, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    ["NVIDIA GB10", *(pytest.param(f"NVIDIA {x}", marks=pytest.mark.slow) for x in ("H200", "RTX PRO 6000 Blackwell"))],
)
def test_lowers_for_gpus(device):
    for shape in mla.SHAPES.values():
        leaves, tree = jax.tree.flatten(jax.eval_shape(shape.inputs, jax.random.key(0)))

        def step(*leaves, tree=tree, shape=shape):
            return mla.op(*jax.tree.unflatten(tree, leaves), **shape.static)

        text = common.lower_for_gpu(step, *leaves, device=device)
        assert text.count("__gpu$xla.gpu.triton") == (2 if mla.default_config(shape).splits > 1 else 1)


@pytest.mark.parametrize("name", mla.SHAPES)
def test_default_configs_fit_every_gpu(name):
    shape = mla.SHAPES[name]
    assert mla.shared_memory(mla.default_config(shape)) <= common.SHARED_MEMORY
    assert mla.default_config(shape) in mla.configs(shape)


def test_nbytes_and_flops_count_rows():
    shape = mla.SHAPES["decode csa 28k"]
    assert shape.rows_read == 128 + 512
    assert shape.nbytes == 640 * 583 + 2 * 2 * 64 * 512
    assert shape.flops == 2 * 2 * 64 * 512 * 640


def test_refuses_what_it_does_not_take():
    shape, config = SMALL["decode gathered"]
    inputs = list(shape.inputs(jax.random.key(0)))

    def refused(match, changes=None, *, config=config, ratio=4, width=shape.window):
        args = [(changes or {}).get(i, x) for i, x in enumerate(inputs)]
        with pytest.raises(common.Unsupported, match=match):
            mla.op(*args, ratio=ratio, width=width, ring=True, config=config)

    refused("heads 24, expected a power of two", config=dataclasses.replace(config, heads=24))
    refused("32 heads, expected a multiple of 64", config=dataclasses.replace(config, heads=64))
    refused("0 splits", config=dataclasses.replace(config, splits=0))
    refused("ratio 0 with compressed rows", ratio=0)
    refused("ratio 4 without compressed rows", {2: None, 3: None})
    refused("codes.*bfloat16.*expected", {2: inputs[2] | {"codes": inputs[2]["codes"].astype(jnp.bfloat16)}})
    refused("40 rows of a window, of which 1 queries see 41", width=41)


@pytest.mark.gpu
@pytest.mark.parametrize("name", mla.SHAPES)
def test_on_the_gpu(name):
    shape = mla.SHAPES[name]
    found, expected = run(shape, 3)
    assert error(found, expected) < TOLERANCE
    again, _ = run(shape, 3)
    assert np.array_equal(np.asarray(found), np.asarray(again))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode csa 28k", "decode hca 28k", "prefill csa 2k"])
def test_each_value_of_a_config_on_the_gpu(name):
    shape = mla.SHAPES[name]
    inputs, static = shape.inputs(jax.random.key(4)), shape.static | {"dtype": jnp.float32}
    expected = formula("mla")(*inputs, **static)
    for config in each_value(mla.configs(shape)):
        try:
            found = mla.op(*inputs, **static, config=config)
        except jax.errors.JaxRuntimeError as e:  # a GPU with less shared memory than Hopper
            assert "hared memory" in str(e) and mla.shared_memory(config) > common.SHARED_MEMORY
            continue
        assert error(found, expected) < TOLERANCE, config
