"""Quantizers: errors against ggml's, bytes against the gguf package, optimality, edge cases, experts and shards.

GGML holds the errors that ggml's own C quantizers reach on the matrices that `matrix` makes. It was printed, for ggml
0.25.3, with a shared library that exports `ggml_quantize_chunk`, such as a build of libggml-base:

    python tests/test_quantize.py path/to/libggml-base.so
"""

import ctypes
import sys
from typing import Any, cast

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ds4jax.errors import Ds4Error
from ds4jax.formats import BF16, F16, F32, IQ2_XXS, MXFP4, Q2_K, Q4_K, Q8_0
from ds4jax.formats.iq2_xxs import GRID
from ds4jax.formats.quantize import check_values, quantize

FORMATS = (F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4)
LOSSY = (Q4_K, Q2_K, IQ2_XXS, MXFP4)
DISTRIBUTIONS = ("gaussian", "laplace", "student", "outliers")
SHAPE = (32, 1024)


def uniform(seed, shape):
    """float64 in (0, 1), from raw integers, which numpy guarantees."""
    raw = np.random.Philox(key=seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) + 0.5).reshape(shape) * 2.0**-53


def gaussian(seed, shape):
    u, v = uniform(seed, (2, *shape))
    return np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)


def matrix(distribution, shape=SHAPE, seed=1):
    """float32 of deviation about 0.03 and one of DISTRIBUTIONS; student has 3 degrees of freedom."""
    x = gaussian(seed, shape)
    if distribution == "laplace":
        u = uniform(seed, shape) - 0.5
        x = -np.sign(u) * np.log1p(-2 * np.abs(u))
    elif distribution == "student":
        x /= np.sqrt(np.mean([gaussian(seed + 10 + i, shape) ** 2 for i in range(3)], axis=0))
    elif distribution == "outliers":
        x[..., 5::37] *= 12
    return (0.03 * x).astype(np.float32)


def importances(shape=SHAPE[1:], seed=7):
    """Log-normal, as the columns of a trained model are: the largest is hundreds of times the mean."""
    return np.exp(1.5 * gaussian(seed, shape)).astype(np.float32)


def error(x, y, importance=None, magnitude=False):
    """Weighted RMSE; with `magnitude`, weighted as ggml's quantizers do, also with √(mean x² + x²) of each block."""
    w = np.ones(x.shape) if importance is None else np.broadcast_to(importance[..., None, :], x.shape)
    x, y, w = (v.astype(np.float64).reshape(-1, 256) for v in (x, y, w))
    if magnitude:
        w = w * np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + x**2)
    return np.sqrt(np.sum(w * (x - y) ** 2) / np.sum(w))


def dequantize(q):
    """The values that the gguf package finds in the file's bytes."""
    return gguf.quants.dequantize(q.to_bytes(), q.ggml_type)


# (format, distribution, with importances): ggml's `error` and its `error(magnitude=True)`, and ours over each of them.
GGML = {
    ("Q4_K", "gaussian", False): (2.14296e-03, 2.11769e-03, 0.977, 0.981),
    ("Q4_K", "gaussian", True): (1.71682e-03, 1.70564e-03, 0.960, 0.959),
    ("Q4_K", "laplace", False): (3.58235e-03, 3.53712e-03, 0.975, 0.979),
    ("Q4_K", "laplace", True): (2.87047e-03, 2.84150e-03, 0.961, 0.960),
    ("Q4_K", "student", False): (4.76751e-03, 4.83927e-03, 0.976, 0.980),
    ("Q4_K", "student", True): (3.96522e-03, 4.06130e-03, 0.949, 0.947),
    ("Q4_K", "outliers", False): (6.71109e-03, 6.76672e-03, 0.970, 0.968),
    ("Q4_K", "outliers", True): (5.67134e-03, 5.75876e-03, 0.940, 0.939),
    ("Q2_K", "gaussian", False): (8.85708e-03, 8.61693e-03, 0.889, 0.922),
    ("Q2_K", "gaussian", True): (6.02793e-03, 6.09296e-03, 0.947, 0.957),
    ("Q2_K", "laplace", False): (1.44481e-02, 1.39807e-02, 0.859, 0.902),
    ("Q2_K", "laplace", True): (9.57037e-03, 9.75007e-03, 0.931, 0.945),
    ("Q2_K", "student", False): (1.80480e-02, 1.78964e-02, 0.832, 0.876),
    ("Q2_K", "student", True): (1.24405e-02, 1.30379e-02, 0.904, 0.919),
    ("Q2_K", "outliers", False): (2.03305e-02, 2.01672e-02, 0.806, 0.839),
    ("Q2_K", "outliers", True): (1.60058e-02, 1.65489e-02, 0.863, 0.868),
    ("IQ2_XXS", "gaussian", False): (1.02909e-02, 1.04155e-02, 0.963, 0.970),
    ("IQ2_XXS", "gaussian", True): (7.70274e-03, 7.80046e-03, 0.889, 0.900),
    ("IQ2_XXS", "laplace", False): (1.62230e-02, 1.65541e-02, 0.952, 0.974),
    ("IQ2_XXS", "laplace", True): (1.27437e-02, 1.29410e-02, 0.881, 0.910),
    ("IQ2_XXS", "student", False): (2.50274e-02, 2.63274e-02, 0.926, 0.978),
    ("IQ2_XXS", "student", True): (1.99991e-02, 2.17211e-02, 0.885, 0.949),
    ("IQ2_XXS", "outliers", False): (4.56318e-02, 4.60651e-02, 0.903, 0.989),
    ("IQ2_XXS", "outliers", True): (3.94925e-02, 4.19334e-02, 0.890, 0.977),
    ("MXFP4", "gaussian", False): (3.47886e-03, 4.10548e-03, 0.958, 0.939),
    ("MXFP4", "gaussian", True): (3.55461e-03, 4.22626e-03, 0.938, 0.924),
    ("MXFP4", "laplace", False): (5.35942e-03, 7.09974e-03, 0.968, 0.905),
    ("MXFP4", "laplace", True): (5.30907e-03, 6.94839e-03, 0.943, 0.896),
    ("MXFP4", "student", False): (7.33422e-03, 1.30559e-02, 0.977, 0.897),
    ("MXFP4", "student", True): (7.00524e-03, 1.12579e-02, 0.953, 0.945),
    ("MXFP4", "outliers", False): (1.17133e-02, 2.31046e-02, 0.972, 0.842),
    ("MXFP4", "outliers", True): (1.15952e-02, 2.33134e-02, 0.948, 0.846),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("fmt", LOSSY)
def test_error_is_below_that_of_ggml(fmt, distribution, weighted):
    x, importance = matrix(distribution), importances() if weighted else None
    y = dequantize(quantize(x, fmt, importance))
    *theirs, ratio, ratio_magnitude = GGML[fmt.__name__, distribution, weighted]
    # Ties that another machine decides otherwise change an error by less than 0.2 %.
    assert error(x, y, importance) < min(1, 1.004 * ratio) * theirs[0]
    assert error(x, y, importance, magnitude=True) < min(1, 1.004 * ratio_magnitude) * theirs[1]


def test_importance_lowers_the_weighted_error():
    x, importance = matrix("gaussian"), importances()
    for fmt, ratio in ((Q4_K, 0.85), (Q2_K, 0.8), (IQ2_XXS, 0.8), (MXFP4, 0.995)):
        with_, without = (dequantize(quantize(x, fmt, i)) for i in (importance, None))
        assert error(x, with_, importance) < ratio * error(x, without, importance)
        assert error(x, with_) > error(x, without)


# ---- bytes -----------------------------------------------------------------------------------------------------------
def special_rows():
    """Rows of zeros, ties of Q8_0, constants, tiny and large numbers, and heavy-tailed ones."""
    x = np.zeros((32, 1024), np.float32)
    x[1] = np.arange(1024) % 255 - 127 + 0.5
    x[1, ::32] = 127
    x[2], x[3], x[4] = 1.0, -0.3, 1e-30
    x[5:10] = matrix("gaussian", (5, 1024)) * np.logspace(-6, 6, 5, dtype=np.float32)[:, None]
    x[10:] = matrix("student", (22, 1024))
    # As near to the half of a step as float32 comes.
    steps = x[10:20, ::32] / 127
    x[10:20].reshape(10, 32, 32)[..., 1:] = steps[..., None] * (np.arange(1, 32, dtype=np.float32) * 3 + 0.5)
    return x


@pytest.mark.parametrize("fmt", [F32, BF16, Q8_0])
def test_bytes_equal_those_of_gguf(fmt):
    x = special_rows()
    np.testing.assert_array_equal(quantize(x, fmt).to_bytes(), gguf.quants.quantize(x, fmt.ggml_type).view(np.uint8))


def test_f16_bytes_equal_those_of_gguf():
    x = special_rows() / 4
    np.testing.assert_array_equal(quantize(x, F16).to_bytes(), gguf.quants.quantize(x, F16.ggml_type).view(np.uint8))


@pytest.mark.parametrize("fmt", FORMATS)
def test_values_are_those_of_gguf(fmt):
    q = quantize(special_rows() / 4, fmt)
    assert q.shape == SHAPE and {n: (p.dtype, p.shape) for n, p in vars(q).items()} == {
        n: (p.dtype, p.shape) for n, p in vars(fmt.struct(SHAPE)).items()
    }
    np.testing.assert_array_equal(np.asarray(q.dequantize()), dequantize(q))


def test_mxfp4_blocks_are_not_worse_than_those_of_gguf():
    x = special_rows()
    ours, kind = dequantize(quantize(x, MXFP4)), MXFP4.ggml_type
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    # Blocks are compared in the weighted error that is minimised, and may differ by its rounding.
    x, ours, theirs = (v.reshape(-1, 32) for v in (x, ours, theirs))
    unit = np.max(np.abs(x), axis=-1, keepdims=True) + np.float32(1e-37)
    w = (np.mean((x / unit) ** 2, axis=-1, keepdims=True) + (x / unit) ** 2) ** 0.4
    ours, theirs = (np.sum(w * ((v - x) / unit) ** 2, axis=-1) for v in (ours, theirs))
    assert np.all(ours <= 1.00001 * theirs)
    assert np.mean(ours) < 0.95 * np.mean(theirs)


def test_mxfp4_keeps_values_of_its_own_kind():
    x = np.asarray(MXFP4.random(jax.random.key(0), SHAPE, 1.0).dequantize())
    np.testing.assert_array_equal(dequantize(quantize(x, MXFP4)), x)


def test_iq2_xxs_takes_the_best_grid_point_and_signs():
    """Brute force over all 256 grid points and 128 sign sets of each eight weights, at the scale that was chosen."""
    x, importance = matrix("laplace")[:2], importances()
    q = quantize(x, IQ2_XXS, importance)
    y = dequantize(q).reshape(-1, 8)
    words = np.asarray(q.signs).reshape(2, 4, 8)
    scale = np.repeat(np.asarray(q.d, np.float32)[..., None] * (0.5 + (words >> 28)) / 4, 4).astype(np.float64)
    blocks = x.astype(np.float64).reshape(2, 4, 256)
    w = importance.reshape(4, 256) / np.mean(importance.reshape(4, 256), axis=-1, keepdims=True)
    w = np.maximum(w, 1e-4) * (np.mean(blocks**2, axis=-1, keepdims=True) + blocks**2) ** 0.4
    x, w = x.reshape(-1, 8), w.reshape(-1, 8)
    even = [s for s in range(256) if s.bit_count() % 2 == 0]
    signs = 1 - 2 * (np.array(even)[:, None] >> np.arange(8) & 1)
    points = (signs[:, None] * GRID).reshape(-1, 8)
    for x_, w_, y_, s in zip(x, w, y, scale, strict=True):
        least = np.min(np.sum(w_ * (x_ - s * points) ** 2, axis=-1))
        assert np.sum(w_ * (x_ - y_) ** 2) <= least * (1 + 1e-4)


# ---- edge cases ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_stay_zeros(fmt):
    assert not np.any(dequantize(quantize(np.zeros(SHAPE), fmt)))


# The relative error of a constant: of one rounding to float16 or bfloat16, of two, or of the values of four bits.
@pytest.mark.parametrize(
    "fmt, tolerance",
    [(F32, 0), (F16, 2**-11), (BF16, 2**-8), (Q8_0, 2**-10), (Q4_K, 2**-9), (Q2_K, 2**-9), (MXFP4, 0.2)],
)
@pytest.mark.parametrize("value", [1.0, -0.7, 700.0, -1e-3])
def test_constants(fmt, tolerance, value):
    x = np.full(SHAPE, value, np.float32)
    np.testing.assert_allclose(dequantize(quantize(x, fmt)), x, rtol=tolerance)


@pytest.mark.parametrize("fmt", [Q4_K, Q2_K])
def test_groups_far_from_zero(fmt):
    """Small differences on a large offset must not lose it, with either sign."""
    for offset in (5.0, -5.0):
        x = (offset + 1e-3 * gaussian(3, SHAPE)).astype(np.float32)
        np.testing.assert_allclose(dequantize(quantize(x, fmt)), x, rtol=2e-3)


@pytest.mark.parametrize("fmt", (Q8_0, *LOSSY))
def test_units_do_not_matter(fmt):
    """Weights times a power of two change scales only, importances times one change nothing."""
    x, importance = matrix("gaussian"), importances()
    y = dequantize(quantize(x, fmt, importance))
    z = dequantize(quantize(x * np.float32(2.0**12), fmt, importance * np.float32(2.0**-100)))
    # Only the scales that float16 holds with fewer bits may differ.
    assert np.mean(z / np.float32(2.0**12) != y) < 0.02


@pytest.mark.parametrize("fmt", FORMATS)
def test_extreme_values(fmt):
    """Magnitudes from the largest that are accepted to subnormal ones give finite weights of the right size."""
    f16 = 65504.0
    largest = {F16: f16, Q8_0: f16 * 127, Q4_K: f16 * 63, Q2_K: f16 * 15, IQ2_XXS: f16 * 166, MXFP4: 2.0**126}
    largest = largest.get(fmt, 3e38)
    shape = matrix("student").reshape(-1, 256)
    shape = (shape / np.max(np.abs(shape), axis=1, keepdims=True)).reshape(SHAPE)
    for scale in (1.0, 1e-5, 1e-20, 1e-38, 1e-45):
        x = (shape * np.float64(largest) * scale).astype(np.float32)
        y = dequantize(quantize(x, fmt, importances())).astype(np.float64)
        assert np.all(np.isfinite(y))
        assert np.max(np.abs(y)) <= 1.5 * largest * scale + 1e-37
        if scale == 1:
            assert error(shape, y / largest) < 0.5 * error(shape, 0 * shape)


@pytest.mark.parametrize("fmt", LOSSY)
def test_columns_without_importance(fmt):
    x, importance = matrix("gaussian"), importances()
    importance[256:512] = 0
    importance[::3] = 0
    q = quantize(x, fmt, importance)
    y = dequantize(q)
    for columns in (importance == 0, importance > 0):
        assert np.std((x - y)[:, columns]) < 0.75 * np.std(x)
    # A block without any is quantized as if all columns weighed alike.
    alike = dequantize(quantize(x, fmt))
    np.testing.assert_array_equal(y[:, 256:512], alike[:, 256:512])


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(fmt, value):
    x = matrix("gaussian")
    x[3, 700] = value  # also in float16, whose infinity is not that of float32
    with pytest.raises(Ds4Error, match=f"{fmt.__name__}: 1 of 32768 weights are not finite or above"):
        quantize(x, fmt)
    with pytest.raises(Ds4Error, match="1 of 32768 weights"):
        check_values(jnp.asarray(x, jnp.float16), fmt)


@pytest.mark.parametrize(
    "fmt, value", [(F16, 7e4), (Q8_0, -8.4e6), (Q4_K, 4.2e6), (Q2_K, -1e6), (IQ2_XXS, 1.1e7), (MXFP4, 9e37)]
)
def test_values_too_large_for_the_scale_are_refused(fmt, value):
    x = matrix("gaussian")
    x[0, 0] = value
    with pytest.raises(Ds4Error, match=f"{fmt.__name__}: 1 of 32768 weights are not finite or above"):
        quantize(x, fmt)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-3, 1e38])
def test_bad_importance_values_are_refused(value):
    importance = importances()
    importance[9] = value
    with pytest.raises(Ds4Error, match="importance: 1 of 1024 values are not from 0 to 8.5"):
        quantize(matrix("gaussian"), Q2_K, importance)


@pytest.mark.parametrize("fmt, block", [(Q8_0, 32), (MXFP4, 32), (Q4_K, 256), (Q2_K, 256), (IQ2_XXS, 256)])
def test_partial_blocks_are_refused(fmt, block):
    with pytest.raises(Ds4Error, match=f"{fmt.__name__}: row length {block + 16} is not a multiple of {block}"):
        quantize(np.zeros((2, block + 16)), fmt)


def test_other_arguments_that_do_not_fit_are_refused():
    x = matrix("gaussian")
    with pytest.raises(Ds4Error, match="format: found int, expected one that can be written: F32, F16"):
        quantize(x, cast(Any, int))
    with pytest.raises(Ds4Error, match=r"Q8_0: found int32\[32, 1024\]"):
        quantize(x.astype(np.int32), Q8_0)
    with pytest.raises(Ds4Error, match=r"importance: found float32\[512\], expected floats \[1024\] for"):
        quantize(x, Q8_0, np.ones(512, np.float32))
    with pytest.raises(Ds4Error, match=r"expected floats \[1024\] or \[4, 1024\] for weights \[4, 8, 1024\]"):
        quantize(x.reshape(4, 8, 1024), Q8_0, np.ones((8, 1024), np.float32))
    with pytest.raises(Ds4Error, match=r"importance: found int32\[1024\]"):
        quantize(x, Q8_0, np.ones(1024, np.int32))


# ---- experts, chunks, transformations, shards ------------------------------------------------------------------------
def assert_same(a, b, x, importance=None):
    """The same bytes; or, where a search compares sums, which another array shape may round otherwise, as good ones."""
    assert type(a) is type(b) and a.shape == b.shape == x.shape
    if type(a) not in LOSSY:
        np.testing.assert_array_equal(a.to_bytes(), b.to_bytes())
    else:
        for i in (None, importance):
            np.testing.assert_allclose(error(x, dequantize(a), i), error(x, dequantize(b), i), rtol=2e-3)


@pytest.mark.parametrize("fmt", [F16, Q8_0, Q2_K, IQ2_XXS, MXFP4])
def test_every_expert_has_its_own_importance(fmt):
    x = matrix("laplace", (4, 8, 512))
    importance = importances((4, 512))
    q = quantize(x, fmt, importance)
    for i in range(4):
        assert_same(q[i], quantize(x[i], fmt, importance[i]), x[i], importance[i])
    assert_same(quantize(x, fmt, importance[0]), quantize(x, fmt, np.tile(importance[0], (4, 1))), x)


@pytest.mark.parametrize("fmt", [Q2_K, MXFP4])
def test_chunks_do_not_change_the_result(fmt, monkeypatch):
    x, importance = matrix("student", (3, 5, 512)), importances((3, 512))
    whole = quantize(x, fmt, importance)
    monkeypatch.setattr("ds4jax.formats.quantize.CHUNK", 4 * 512)  # three chunks of four rows, and a rest of three
    assert_same(quantize(x, fmt, importance), whole, x, importance)


def test_under_jit_and_from_bfloat16():
    x, importance = jnp.asarray(matrix("gaussian"), jnp.bfloat16), jnp.asarray(importances())
    q = jax.jit(lambda x, i: quantize(x, Q2_K, i))(x, importance)
    x = x.astype(jnp.float32)
    assert_same(q, quantize(x, Q2_K, importance), np.asarray(x), np.asarray(importance))


@pytest.mark.parametrize(
    "fmt, spec",
    [
        (MXFP4, ("ep",)),
        (MXFP4, (None, "tp")),
        (MXFP4, (None, None, "tp")),
        pytest.param(IQ2_XXS, ("ep", "tp"), marks=pytest.mark.slow),
        (Q2_K, (("ep", "tp"), None, None)),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_shards_stay_where_they_are(fmt, spec):
    x, importance = matrix("gaussian", (4, 8, 512)), importances((4, 512))
    mesh = jax.make_mesh((2, 2), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    sharded = jax.device_put(x, sharding)
    for i in (None, importance[0], importance):
        q = quantize(sharded, fmt, i)
        assert_same(q, quantize(x, fmt, i), x, i)
        for plane in jax.tree.leaves(q):
            assert plane.sharding.is_equivalent_to(sharding, 3)


def test_shards_that_cut_blocks_are_refused():
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,))
    x = jax.device_put(matrix("gaussian", (8, 512)), NamedSharding(mesh, PartitionSpec(None, "tp")))
    with pytest.raises(Ds4Error, match="Q2_K: rows of 512 in shards that are not a multiple of 256"):
        quantize(x, Q2_K)


def print_ggml(library):
    """Prints GGML. ggml's IQ2_XXS does not go without importances: then they are all 1."""
    lib = ctypes.CDLL(library)
    floats, size = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, size, size, size, floats]
    for fmt in LOSSY:
        for distribution in DISTRIBUTIONS:
            for weighted in (False, True):
                x, importance = matrix(distribution), importances() if weighted else None
                out = np.empty((len(x), x.shape[1] // fmt.block * fmt.block_bytes), np.uint8)
                given = np.ones(x.shape[1], np.float32) if importance is None and fmt is IQ2_XXS else importance
                pointer = None if given is None else given.ctypes.data_as(floats)
                source = x.ctypes.data_as(floats)
                lib.ggml_quantize_chunk(int(fmt.ggml_type), source, out.ctypes.data, 0, *x.shape, pointer)
                y = gguf.quants.dequantize(out, fmt.ggml_type)
                ours = dequantize(quantize(x, fmt, importance))
                (a, b), (c, d) = ([error(x, v, importance, magnitude=m) for m in (False, True)] for v in (y, ours))
                key = f'("{fmt.__name__}", "{distribution}", {weighted})'
                print(f"    {key}: ({a:.5e}, {b:.5e}, {c / a:.3f}, {d / b:.3f}),")


if __name__ == "__main__":
    print_ggml(sys.argv[1])
