"""Products of a few rows with quantized matrices: the kernel in interpret mode, its lowering, and itself on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unit_formats import UNITS, mostly_slow

from ds4jax import formats
from ds4jax.ops.check import formula
from pallas_kernels import common, matmul
from pallas_kernels import formats as known
from pallas_kernels.matmul import Config, Output, Shape

DEVICES = {"NVIDIA H200": 132, "NVIDIA RTX PRO 6000 Blackwell": 188, "NVIDIA GB10": 48}

# Float32 sums of at most 16384 terms; only their order differs.
FLOAT32 = 5e-6
# Operands of the tensor cores: a weight d · q rounds to float16, by 2^-12 or so on average, and with a norm x does too;
# SwiGLU multiplies two such results. To bfloat16 they round by 8 times as much.
FLOAT16, BFLOAT16 = 1e-3, 8e-3


def run(op, shape, seed=0, **kwargs):
    return jax.jit(lambda *a: op(*a, **shape.static, **kwargs))(*shape.inputs(jax.random.key(seed)))


def in_float32(shape):
    """The same products without the rounding of the result."""
    return dataclasses.replace(shape, outputs=tuple(dataclasses.replace(o, dtype="float32") for o in shape.outputs))


def errors(found, expected):
    pairs = [(np.asarray(f, np.float64), np.asarray(e, np.float64)) for f, e in zip(found, expected, strict=True)]
    return [np.linalg.norm(f - e) / np.linalg.norm(e) for f, e in pairs]


def bound(shape, config):
    if config.method == "vector":
        return FLOAT32
    return BFLOAT16 if any(out.fmt == "BF16" for out in shape.outputs) else FLOAT16


def check(shape, config, **kwargs):
    expected = run(formula("matmul"), in_float32(shape))
    found = run(matmul.matmul, in_float32(shape), config=config, **kwargs)
    assert [y.shape for y in found] == [(shape.m, out.n) for out in shape.outputs]
    assert max(errors(found, expected)) < bound(shape, config), errors(found, expected)


@pytest.mark.parametrize("name", mostly_slow(known.names("matmul")))
def test_random_planes_are_of_the_format(name):
    fmt, engine = known.find(name), getattr(formats, name)
    planes = fmt.random(jax.random.key(0), (3, 512), 0.02)
    expected = engine(**dict(zip(engine.planes, planes, strict=True))).dequantize()
    assert 0.005 < float(jnp.std(expected)) < 0.08
    assert fmt.nbytes(512) == 512 // engine.block * engine.block_bytes


VECTOR = {
    "one row": (Shape(1, 512, (Output(4, "Q8_0"),)), Config("vector", 4, 512, 1)),
    "norm, and steps along K": (
        Shape(2, 512, (Output(6, "Q8_0"),), norm_eps=1e-6, norm_weight=True),
        Config("vector", 4, 256, 1),
    ),
    "norm without a weight, float32": (
        Shape(2, 256, (Output(2, "F16"),), "float32", norm_eps=1e-6),
        Config("vector", 1, 128, 1),
    ),
    "groups": (Shape(2, 256, (Output(8, "Q8_0"),), groups=2), Config("vector", 4, 256, 1)),
    "several formats, SwiGLU": (
        Shape(1, 256, (Output(4, "Q8_0", clamp=0.5), Output(2, "F16"))),
        Config("vector", 2, 256, 1),
    ),
    "split": (
        Shape(1, 512, (Output(2, "Q8_0", clamp=0.5), Output(2, "BF16"))),
        Config("vector", 2, 256, 1, splits=2),
    ),
    "Q4_K": (Shape(1, 512, (Output(2, "Q4_K"),)), Config("vector", 2, 256, 1)),
    "MXFP4": (Shape(1, 256, (Output(2, "MXFP4"),)), Config("vector", 2, 256, 1)),
    "F32": (Shape(1, 256, (Output(2, "F32"),)), Config("vector", 2, 128, 1)),
}
DOT = {
    "norm": (
        Shape(5, 256, (Output(16, "Q8_0"),), norm_eps=1e-6, norm_weight=True),
        Config("dot", 16, 128, 4),
    ),
    "groups": (Shape(17, 128, (Output(32, "Q8_0"),), groups=2), Config("dot", 16, 128, 4)),
    "several formats, SwiGLU, split": (
        Shape(8, 256, (Output(16, "Q8_0", clamp=0.5), Output(16, "F16"), Output(32, "BF16"))),
        Config("dot", 16, 128, 4, splits=2),
    ),
    "many rows, groups": (Shape(33, 128, (Output(32, "Q8_0"),), groups=2), Config("dot", 16, 64, 4)),
    "many rows, norm, several formats, split": (
        Shape(40, 256, (Output(16, "Q8_0", clamp=0.5), Output(16, "BF16")), norm_eps=1e-6, norm_weight=True),
        Config("dot", 16, 128, 4, splits=2),
    ),
    "Q4_K": (Shape(6, 256, (Output(16, "Q4_K"),)), Config("dot", 16, 256, 4)),
    "MXFP4": (Shape(6, 256, (Output(16, "MXFP4"),)), Config("dot", 16, 128, 4)),
}
VECTOR |= {name: (Shape(1, 512, (Output(2, name),)), Config("vector", 2, 256, 1)) for name in UNITS}
DOT |= {name: (Shape(6, 256, (Output(16, name),)), Config("dot", 16, 256, 4)) for name in UNITS}
SMALL = {**{f"vector {k}": v for k, v in VECTOR.items()}, **{f"dot {k}": v for k, v in DOT.items()}}


SMALL_NAMES = mostly_slow(SMALL, "vector Q6_K", "vector IQ2_S", "dot Q5_K")


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_products(name):
    check(*SMALL[name], interpret=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_results_have_the_dtype_asked_for(dtype):
    shape = Shape(1, 128, (Output(2, "Q8_0", dtype), Output(2, "Q8_0", dtype, clamp=1.0)))
    for y in run(matmul.matmul, shape, config=Config("vector", 2, 128, 1), interpret=True):
        assert y.dtype == dtype


def test_every_stack_has_its_own_layer():
    shape = Shape(1, 128, (Output(2, "Q8_0"), Output(4, "F16")), layers=3)
    x, _, weights, _ = shape.inputs(jax.random.key(3))
    config = Config("vector", 2, 128, 1)
    for layer in ([2, 0], [1, 2], [1]):
        args = x, jnp.array(layer, jnp.int32), weights
        expected = formula("matmul")(*args, outputs=shape.outputs)
        found = matmul.matmul(*args, outputs=shape.outputs, config=config, interpret=True)
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_array_equal(f, e)


def test_the_norm_has_its_own_layer():
    shape = Shape(1, 128, (Output(2, "Q8_0", "float32"), Output(4, "F16", "float32")), layers=3)
    x, _, weights, _ = shape.inputs(jax.random.key(3))
    norm = jnp.outer(jnp.arange(1.0, 4), jnp.ones(128))
    for layer in ([2, 0, 1], [1]):
        args, options = (x, jnp.array(layer, jnp.int32), weights, norm), {"outputs": shape.outputs, "norm_eps": 1e-6}
        found = matmul.matmul(*args, **options, config=Config("vector", 2, 128, 1), interpret=True)
        assert max(errors(found, formula("matmul")(*args, **options))) < FLOAT32


def test_extreme_codes():
    """-128 and 127, scales of either sign and subnormal, as int8 → float is done by hand on a GPU."""
    q = jnp.array(np.tile(np.arange(-128, 128, dtype=np.int8), (1, 4, 2)))
    d = jnp.array(np.linspace(-3e-5, 3e-5, 64, dtype=np.float16).reshape(1, 4, 16))
    x = jax.random.normal(jax.random.key(0), (1, 512), jnp.float32).astype(jnp.bfloat16)
    out = (Output(4, "Q8_0", "float32"),)
    args = x, jnp.zeros(1, jnp.int32), (((d, q),),)
    interpret = jax.default_backend() == "cpu"
    found = matmul.matmul(*args, outputs=out, config=Config("vector", 4, 512, 1), interpret=interpret)
    assert errors(found, formula("matmul")(*args, outputs=out))[0] < FLOAT32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((97, 256), jnp.bfloat16)}, r"shape of x: found \(97, 256\), expected 1 to 96 rows"),
        ({"x": jnp.zeros((1, 256), jnp.int8)}, "dtype of x: found int8"),
        ({"layer": jnp.zeros((3,), jnp.int32)}, r"layer: found \(3,\)"),
        ({"outputs": (Output(4, "Q2_K"),)}, "format: found Q2_K, expected one of F32"),
        ({"outputs": (Output(8, "Q8_0"),)}, r"planes of Output\(n=8.*found \[\(\(4, 8\), dtype\('float16'\)\)"),
        ({"outputs": (Output(4, "Q8_0", clamp=1.0),)}, "matrices of Output.*found 1, expected 2"),
        ({"norm": jnp.ones((2, 256), jnp.float32)}, "norm_eps: found None"),
        ({"config": Config("vector", 3, 256, 1)}, "rows: found 3, expected a power of two"),
        ({"config": Config("vector", 4, 512, 1)}, r"splits · k_block: found \(1, 512\), expected a divisor of 256"),
        (
            {"config": Config("vector", 4, 128, 1, splits=2), "norm_eps": 1e-6},
            "splits: found 2, expected 1 with a norm",
        ),
        ({"config": Config("dot", 16, 256, 4)}, "rows of Output.*found 4, expected at least 16"),
    ],
)
def test_unsupported(change, message):
    shape = Shape(1, 256, (Output(4, "Q8_0"),))
    x, layer, weights, norm = shape.inputs(jax.random.key(0))
    args = {"x": x, "layer": layer, "weights": weights, "norm": norm, "outputs": shape.outputs} | change
    with pytest.raises(common.Unsupported, match=message):
        matmul.matmul(**args, interpret=True)


def lowered(shape, config, **kwargs):
    args = jax.eval_shape(shape.inputs, jax.random.key(0))
    return common.lower_for_gpu(lambda *a: matmul.matmul(*a, **shape.static, config=config), *args, **kwargs)


@pytest.mark.parametrize(
    "device", ["NVIDIA GB10", *(pytest.param(d, marks=pytest.mark.slow) for d in list(DEVICES)[:2])]
)
@pytest.mark.parametrize("name", SMALL_NAMES)
def test_lowers_for_every_device(name, device):
    case = SMALL[name]
    kernels = 1 if case[1].splits == 1 else 2
    assert lowered(*case, device=device, cores=DEVICES[device]).count("__gpu$xla.gpu.triton") == kernels


@pytest.mark.parametrize("name", ["csa/1", "q_b+index/1", "index q_b/16", "o_a/4", "o_b/96", "mhc/16"])
def test_defaults_lower(name):
    """The kernel and perhaps its second stage, whatever shares the input; with few rows nothing else."""
    shape = matmul.SHAPES[name]
    config = matmul.default_config(shape)
    text = lowered(shape, None)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == (1 if config.splits == 1 else 2)
    if shape.m <= matmul.IN_KERNEL:
        assert text.count("stablehlo.") == text.count("stablehlo.custom_call @__gpu$xla.gpu.triton")


@pytest.mark.parametrize("name", matmul.SHAPES)
def test_candidates_fit(name):
    shape = matmul.SHAPES[name]
    candidates = matmul.configs(shape)
    assert candidates[0] == matmul.default_config(shape) and len(candidates) > 4
    for config in candidates:
        matmul.check(shape, config)


def test_too_much_shared_memory():
    shape = Shape(16, 4096, (Output(64, "F16"),))
    with pytest.raises(common.Unsupported, match="shared memory: found 212992, expected at most 101376 bytes"):
        matmul.check(shape, Config("dot", 64, 256, 4, num_stages=6))


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_small_on_gpu(case):
    check(*case)


# In every such format: two matrices, long rows in parts, and another format beside it.
REAL = {
    f"{name} {fmt}": shape
    for fmt in UNITS
    for name, shape in {
        "shared gate+up/1": Shape(1, 4096, (Output(2048, fmt, clamp=10.0),)),
        "o_b/2": Shape(2, 8192, (Output(4096, fmt),)),
        "o_b/16": Shape(16, 8192, (Output(4096, fmt),)),
        "q_a+kv/32": Shape(32, 4096, (Output(1024, fmt), Output(512, "Q8_0", "float32"))),
    }.items()
}


@pytest.mark.parametrize(
    "shape", [*REAL.values(), Shape(16, 8192, (Output(4096, "Q4_K"),))], ids=[*REAL, "o_b/16 Q4_K"]
)
def test_defaults_fit_every_format(shape):
    candidates = matmul.configs(shape)
    assert candidates[0] == matmul.default_config(shape)
    for config in candidates:
        matmul.check(shape, config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", matmul.SHAPES)
def test_real_shapes_on_gpu(name):
    shape = matmul.SHAPES[name]
    check(shape, matmul.default_config(shape))
    first, second = (run(matmul.matmul, shape, seed=1) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_every_format_on_gpu(name):
    check(REAL[name], matmul.default_config(REAL[name]))


@pytest.mark.gpu
def test_extreme_codes_on_gpu():
    test_extreme_codes()
