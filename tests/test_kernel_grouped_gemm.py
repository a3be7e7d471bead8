"""Grouped products with quantized matrices: formats, routing, the kernel in interpret mode, lowering, and on a GPU."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unit_formats import UNITS, mostly_slow

from ds4jax import formats
from ds4jax.ops import experts as experts_op
from ds4jax.ops.check import formula, left_to_xla
from ds4jax.ops.weight import single
from pallas_kernels import common
from pallas_kernels import formats as known
from pallas_kernels import grouped_gemm as gg
from pallas_kernels.common import Unsupported
from pallas_kernels.grouped_gemm import SHAPES, Config, Shape

FORMATS = known.names("grouped_gemm")
CONFIG = Config(bm=32, num_warps=2)
DEVICES = {"NVIDIA H200": 132, "NVIDIA RTX PRO 6000 Blackwell": 188, "NVIDIA GB10": 48}


def random_bits(fmt: str, seed: int, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Planes in which every bit of codes and scales is random; d and exponents stay moderate."""
    rng = np.random.default_rng(seed)
    out = []
    for p in known.find(fmt).structs(shape):
        if p.dtype in (np.uint32, np.uint16, np.int8):
            out.append(rng.integers(0, 256, (*p.shape, np.dtype(p.dtype).itemsize), np.uint8).view(p.dtype)[..., 0])
        elif p.dtype == np.uint8:
            out.append(rng.integers(100, 140, p.shape, np.uint8))
        else:
            out.append(rng.normal(size=p.shape).astype(p.dtype))
    return tuple(map(jnp.asarray, out))


def ds4(fmt: str, planes) -> formats.Quantized:
    cls = getattr(formats, fmt)
    return cls(**dict(zip(cls.planes, planes, strict=True)))


def error(out, expected) -> float:
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("fmt", mostly_slow(FORMATS))
def test_random_planes_have_the_asked_spread(fmt):
    w = np.asarray(ds4(fmt, known.find(fmt).random(jax.random.key(0), (64, 2048), 0.02)).dequantize())
    assert abs(w.mean()) < 2e-3
    # MXFP4 takes the next power of two; the others differ by the spread of their own scales.
    assert 0.012 < w.std() < 0.032


PUBLISHED = "IQ2_XXS", "IQ2_3B", "Q2_K", "Q4_K", "Q8_0"  # of the files that people load


@pytest.mark.parametrize("fmt", [pytest.param(f, marks=[] if f in PUBLISHED else pytest.mark.slow) for f in FORMATS])
def test_kernel_decodes_every_weight(fmt):
    """The identity times Wᵀ shows the kernel's own weights: the exact ones rounded to the format's dtype."""
    planes = random_bits(fmt, 2, (2, 32, 512))
    x = jnp.eye(512, dtype=jnp.bfloat16)
    config = Config(bm=256, num_warps=2, splits=2)
    y = gg.linear(x, jnp.array([1], jnp.int32), planes, fmt=fmt, dtype=jnp.float32, config=config, interpret=True)
    expected = np.asarray(ds4(fmt, planes).dequantize()[1].T)
    # Half a unit in the last place. IQ2_XXS and IQ2_3B round their scale to float16 first; Q2_K its scale and its
    # minimum, of which the larger is up to 45 d, and Q5_K as well. Q4_K adds its minimum in float32, in another order.
    # Of the others that have float16 weights the scale is rounded, too.
    others = (10, 0) if fmt in UNITS else (8, 0)
    minima = {"Q2_K": (11, 2.0**-10), "Q5_K": (11, 2.0**-10), "Q4_K": (8, 2.0**-20)}
    digits, slack = (minima | {"IQ2_XXS": (10, 0), "IQ2_3B": (10, 0)}).get(fmt, others)
    assert np.all(np.abs(np.asarray(y) - expected) <= np.abs(expected) * 2.0**-digits + slack * np.abs(expected).max())


@pytest.mark.parametrize("fmt", mostly_slow(UNITS, "Q5_K"))
def test_linear_in(fmt):
    shape = Shape("linear", 16, 32, 256, fmt, 2)
    args = shape.inputs(jax.random.key(0))
    found = gg.grouped_gemm(*args, **shape.static, config=Config(bm=16, num_warps=2), interpret=True)
    # Scales, minima and weights are rounded to float16, the results to bfloat16.
    assert error(found, formula("grouped_gemm")(*args, **shape.static)) < 3e-3


@pytest.mark.parametrize("m, groups", [(33, 1), (70, 1), (40, 2)])
def test_linear(m, groups):
    shape = Shape("linear", m, 64, 256, "Q8_0", 3, groups=groups)
    args = shape.inputs(jax.random.key(m))
    expected = formula("grouped_gemm")(*args, **shape.static)
    fused = gg.grouped_gemm(*args, **shape.static, config=CONFIG, interpret=True)
    # Weights and results are each rounded to bfloat16: 2 · 0.12 %, added as squares.
    assert error(fused, expected) < 3e-3
    assert error(left_to_xla(*args, **shape.static), expected) < 3e-3
    with pytest.raises(Unsupported, match="leaves the product to XLA"):
        gg.grouped_gemm(*args, **shape.static, config=Config(fused=False))
    x, layer, planes = args
    w = np.asarray(ds4("Q8_0", planes)[layer[0]].dequantize()).reshape(groups, -1, shape.k)
    by_hand = np.einsum("mgk,gnk->mgn", np.asarray(x, np.float32).reshape(m, groups, -1), w)
    assert error(expected, by_hand.reshape(m, -1)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gate_up", "down"])
def test_experts_sorted(kind):
    """Seven experts, one without a token and one with more than a tile of them."""
    shape = Shape(kind, 50, 32, 256, "IQ2_XXS" if kind == "gate_up" else "Q2_K", 7, 3)
    x, ids, *rest = shape.inputs(jax.random.key(5))
    ids = jnp.where(ids == 4, (ids + 1) % 7, ids).at[:, 0].set(2)
    assert int((ids == 2).sum()) > CONFIG.bm and not bool((ids == 4).any())
    expected = formula("grouped_gemm")(x, ids, *rest, **shape.static)
    out = gg.grouped_gemm(x, ids, *rest, **shape.static, config=CONFIG, interpret=True)
    # As above; `down` rounds six summands before it adds them.
    assert error(out, expected) < 4e-3


def in_xla(x, ids, weight, gate, up, down, clamp):
    """The op's formula in float32, in the types of the published file."""
    w = experts_op.Experts(*(single(ds4(t, m)) for t, m in (("IQ2_XXS", gate), ("IQ2_XXS", up), ("Q2_K", down))))
    return experts_op.experts(x.astype(jnp.float32), ids, weight, w, jnp.zeros(x.shape, jnp.float32), clamp=clamp)


@pytest.mark.slow
def test_experts_are_the_models():
    """As the model's own experts, with pairs whose expert another device has."""
    shape = Shape("gate_up", 40, 64, 256, "IQ2_XXS", 5, 2)
    x, ids, weight, gate, up = shape.inputs(jax.random.key(6))
    down = known.find("Q2_K").random(jax.random.key(7), (5, 256, 64 * 4), 0.1)
    gate, up = (known.find("IQ2_XXS").random(jax.random.key(i), (5, 256, 256), 0.06) for i in (8, 9))
    weight = weight * 3
    first = 3  # of the eight experts that ids mean, the planes hold 3 to 7
    ids = ids + jnp.arange(40, dtype=jnp.int32)[:, None] % 4
    fmts = "IQ2_XXS", "IQ2_XXS", "Q2_K"
    out = gg.experts(x, ids - first, weight, gate, up, down, fmts=fmts, clamp=1.5, config=CONFIG, interpret=True)
    held = jnp.where((ids >= first) & (ids < 8), ids - first, -1)
    expected = in_xla(x, held, weight, gate, up, down, 1.5)
    # Three roundings of weights, and of h, of each pair's result and of the sum.
    assert error(out, expected) < 6e-3
    nobody = np.asarray(((ids < first) | (ids >= 8)).all(-1))
    assert nobody.any() and not np.asarray(out, np.float32)[nobody].any()


def test_routing_is_a_stable_sort():
    ids = np.random.default_rng(3).integers(-1, 6, (64, 6)).astype(np.int32)
    order, counts = gg.route(jnp.asarray(ids), 5)
    key = np.where((ids < 0) | (ids >= 5), 5, ids).reshape(-1)
    assert np.array_equal(order, np.argsort(key, stable=True))
    assert np.array_equal(counts, np.bincount(key, minlength=6)[:5])


@pytest.mark.parametrize(
    "counts", [[0, 0, 0], [97, 0, 0], [1, 95, 1], [32, 32, 33], [0, 64, 33], [31, 33, 3], [5, 0, 1]]
)
def test_tiles_cover_every_place_once(counts):
    expert, start, rows = np.asarray(gg.tile_map(jnp.array(counts, jnp.int32), 97, 32))
    assert rows.max() <= 32
    owner = np.full(97, -1)
    for e, s, n in zip(expert, start, rows, strict=True):
        assert (owner[s : s + n] == -1).all()
        owner[s : s + n] = e
    assert np.array_equal(owner[: sum(counts)], np.repeat(np.arange(3), counts))
    assert (owner[sum(counts) :] == -1).all()


def test_repeats_bit_for_bit():
    shape = Shape("down", 20, 32, 256, "MXFP4", 3, 2)
    args = shape.inputs(jax.random.key(1))
    f = functools.partial(gg.grouped_gemm, **shape.static, config=CONFIG, interpret=True)
    assert np.array_equal(np.asarray(f(*args), np.float32), np.asarray(f(*args), np.float32))


def test_unsupported_is_named():
    shape = Shape("linear", 64, 64, 256, "Q8_0", 1)
    x, layer, planes = shape.inputs(jax.random.key(0))
    run = functools.partial(gg.linear, layer=layer, config=CONFIG)
    with pytest.raises(Unsupported, match="x: found float32, expected bfloat16"):
        run(x.astype(jnp.float32), planes=planes, fmt="Q8_0")
    with pytest.raises(Unsupported, match="format: found Q5_0, expected one of"):
        run(x, planes=planes, fmt="Q5_0")
    with pytest.raises(Unsupported, match="planes of Q4_K"):
        run(x, planes=planes, fmt="Q4_K")
    with pytest.raises(Unsupported, match=r"matrix: found 64 × 256, expected multiples of 128 and 128"):
        run(x, planes=planes, fmt="Q8_0", config=Config(num_warps=8))
    with pytest.raises(Unsupported, match=r"matrix: found 64 × 256, expected multiples of 32 and 512"):
        run(x, planes=planes, fmt="Q8_0", config=Config(num_warps=2, splits=4))
    with pytest.raises(Unsupported, match="columns for Q2_K: found 128, expected a multiple of 256"):
        run(x[:, :128], planes=planes, fmt="Q2_K")
    with pytest.raises(Unsupported, match="expected a product below"):
        gg.route(jnp.zeros((2**20, 6), jnp.int32), 1024)


@pytest.mark.parametrize("name", SHAPES)
def test_configs_fit_every_gpu(name):
    shape = SHAPES[name]
    candidates = gg.configs(shape)
    assert gg.default_config(shape) in candidates
    assert all(gg.shared_memory(c) <= common.SHARED_MEMORY for c in candidates if c.fused)


@pytest.mark.parametrize(
    "device", ["NVIDIA GB10", *(pytest.param(d, marks=pytest.mark.slow) for d in list(DEVICES)[:2])]
)
@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith(("gate_up", "down")) and "_2048" in name])
def test_lowers_for_the_gpu(name, device):
    """The experts' shapes have every quantized format; a single matrix goes through the same kernel."""
    shape = SHAPES[name]
    f = functools.partial(gg.grouped_gemm, **shape.static)
    args = jax.eval_shape(shape.inputs, jax.random.key(0))
    assert common.lower_for_gpu(f, *args, device=device, cores=DEVICES[device]).count("xla.gpu.triton") == 1


# A quarter of the experts: in 5 bits and more a stack of 256 would have 2^31 bytes.
REAL = {
    f"{name}_{fmt.lower()}": shape
    for fmt in UNITS
    for name, shape in {
        "gate_up": Shape("gate_up", 128, 2048, 4096, fmt, 64, 6),
        "down": Shape("down", 128, 4096, 2048, fmt, 64, 6),
        "shared_gate": Shape("linear", 64, 2048, 4096, fmt, 2),
    }.items()
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_every_format_on_the_gpu(name):
    shape = REAL[name]
    args = jax.jit(shape.inputs)(jax.random.key(0))
    out = jax.jit(functools.partial(gg.grouped_gemm, **shape.static))(*args)
    expected = jax.jit(functools.partial(formula("grouped_gemm"), **shape.static))(*args)
    # As below.
    assert error(jnp.asarray(out, jnp.float32), expected) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_on_the_gpu(name):
    shape = SHAPES[name]
    args = jax.jit(shape.inputs)(jax.random.key(len(name)))
    expected = jax.jit(functools.partial(formula("grouped_gemm"), **shape.static))(*args)
    fused = [c for c in gg.configs(shape) if c.fused]
    for config in {gg.default_config(shape), fused[0], fused[-1]}:
        op = functools.partial(gg.grouped_gemm, config=config) if config.fused else left_to_xla
        run = jax.jit(functools.partial(op, **shape.static))
        with warnings.catch_warnings():
            common.ignore_deprecation()
            out = run(*args)
        # Weights and results are each rounded to bfloat16: 2 · 0.12 %, added as squares; `down` rounds summands, too.
        assert error(jnp.asarray(out, jnp.float32), expected) < 4e-3, config
        assert np.array_equal(np.asarray(out, np.float32), np.asarray(run(*args), np.float32)), config


@pytest.mark.gpu
def test_layer_of_experts_on_the_gpu():
    """All of a layer's routed experts, as the model computes them in float32."""
    shape = SHAPES["gate_up_iq2_xxs_2048"]
    x, ids, weight, gate, up = jax.jit(shape.inputs)(jax.random.key(0))
    _, _, down = jax.jit(SHAPES["down_q2_k_2048"].inputs)(jax.random.key(1))
    run = jax.jit(functools.partial(gg.experts, fmts=("IQ2_XXS", "IQ2_XXS", "Q2_K"), clamp=10.0))
    out = run(x, ids, weight, gate, up, down)
    expected = jax.jit(functools.partial(in_xla, clamp=10.0))(x, ids, weight, gate, up, down)
    # Three roundings of weights, and of h, of each pair's result and of the sum.
    assert error(out, expected) < 6e-3
    assert np.array_equal(np.asarray(out, np.float32), np.asarray(run(x, ids, weight, gate, up, down), np.float32))
