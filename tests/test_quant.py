"""Formats: bit for bit what `gguf.quants` says, with no byte added, and one product that uses them."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.formats import FORMATS, Q2_K, Q8_0, READ_ONLY, WIDE, WRITABLE, GGMLType
from ds4jax.formats.quantize import quantize
from ds4jax.io.gguf import TYPES
from ds4jax.io.recipes import MATRIX_TYPES, parse_types
from ds4jax.ops.linear import linear, product, products
from ds4jax.ops.weight import single

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.ggml_type.name)


def random_bytes(fmt, rows, n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*rows, n // fmt.block * fmt.block_bytes), dtype=np.uint8)


def on_device(fmt, raw):
    return jax.tree.map(jnp.asarray, fmt(**fmt.from_bytes(raw)))


def assert_same_bits(found, expected):
    """Equal bits, signed zeros and infinities included; any NaN equals any NaN."""
    found = np.asarray(found)
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert same.all(), f"{(~same).sum()} differ: {found[~same][:4]} {expected[~same][:4]}"


@formats
@pytest.mark.parametrize("jit", [False, True])
def test_dequantize_is_the_references_bit_for_bit(fmt, jit):
    # Uniform bytes make every scale there is: subnormal, huge, negative, infinite, NaN.
    raw = random_bytes(fmt, (3, 40), 512)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, fmt.ggml_type)
    run = jax.jit(lambda q: q.dequantize()) if jit else lambda q: q.dequantize()
    assert_same_bits(run(on_device(fmt, raw)), expected)


@pytest.mark.parametrize(("stored", "wide"), WIDE.items(), ids=lambda f: f.__name__)
def test_a_wide_format_holds_the_stored_weights_bit_for_bit(stored, wide):
    raw = random_bytes(stored, (3, 40), 512)
    q = wide.repack(on_device(stored, raw))
    assert wide.stored is stored
    assert jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), q) == wide.struct((3, 40, 512))
    with np.errstate(all="ignore"):
        assert_same_bits(q.dequantize(), gguf.quants.dequantize(raw, stored.ggml_type))
    assert_same_bits(q[1].dequantize(), np.asarray(q.dequantize())[1])


def test_every_mxfp4_scale_and_code():
    fmt = FORMATS[gguf.GGMLQuantizationType.MXFP4]
    codes = np.arange(16, dtype=np.uint8) * 17  # every code in both nibbles
    raw = np.concatenate([np.arange(256, dtype=np.uint8)[:, None], np.tile(codes, (256, 1))], axis=1)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, fmt.ggml_type)
    assert_same_bits(on_device(fmt, raw).dequantize(), expected)


def test_files_and_recipes_know_every_format():
    """They do without JAX, so they have lists of their own."""
    assert (*FORMATS, GGMLType.I32) == TYPES
    assert tuple(fmt.ggml_type for fmt in WRITABLE) == MATRIX_TYPES


def test_every_type_that_gguf_dequantizes_has_a_format():
    known = {
        t
        for t in gguf.GGMLQuantizationType
        if t not in (GGMLType.F32, GGMLType.F16) and hasattr(getattr(gguf.quants, t.name, None), "dequantize_blocks")
    }
    assert known == FORMATS.keys() - {GGMLType.F32, GGMLType.F16}


@pytest.mark.parametrize("fmt", READ_ONLY, ids=lambda f: f.ggml_type.name)
def test_a_format_that_is_read_only_is_not_written(fmt):
    expected = "expected one that can be written: F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4"
    with pytest.raises(Ds4Error, match=f"format: found {fmt.__name__}, {expected}"):
        quantize(jnp.ones((1, 256)), fmt)
    with pytest.raises(ConfigError, match=f"found 'embed={fmt.__name__}', expected FAMILY=TYPE with a type of F32"):
        parse_types([f"embed={fmt.__name__}"])


@formats
def test_bytes_survive(fmt):
    raw = random_bytes(fmt, (2, 3), 768)
    q = on_device(fmt, raw)
    assert q.shape == (2, 3, 768)
    np.testing.assert_array_equal(q.to_bytes(), raw)
    np.testing.assert_array_equal(q[1].to_bytes(), raw[1])


@formats
def test_no_format_grows(fmt):
    planes = jax.tree.leaves(fmt.struct((4, 1024)))
    assert sum(np.prod(p.shape) * p.dtype.itemsize for p in planes) == 4 * 1024 // fmt.block * fmt.block_bytes
    assert all(len(p.shape) == 2 for p in planes)


@formats
def test_random_weights_have_the_wanted_deviation(fmt):
    q = fmt.random(jax.random.key(1), (64, 1024), 0.02)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), q) == jax.tree.map(
        lambda p: (p.shape, p.dtype), fmt.struct((64, 1024))
    )
    w = q.dequantize()
    assert abs(float(w.mean())) < 1e-3
    assert 0.017 < float(w.std()) < 0.024  # MXFP4 has only powers of two to choose from


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match="Q2_K: row length 300 is not a multiple of 256"):
        Q2_K.struct((2, 300))


def test_linear_accumulates_wider_than_its_input():
    w = Q8_0.random(jax.random.key(0), (8, 4096), 1.0)
    x = jnp.ones((3, 4096), jnp.bfloat16)
    expected = np.asarray(w.dequantize(jnp.bfloat16), np.float64).sum(-1)
    found = linear(x, single(w), jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.tile(expected, (3, 1)), rtol=1e-5, atol=1e-3)
    assert linear(x, single(w)).dtype == jnp.bfloat16


def test_a_product_in_groups_is_block_diagonal():
    w = Q8_0.random(jax.random.key(0), (6, 32), 1.0)
    x = jax.random.normal(jax.random.key(1), (5, 3, 32))
    dense = np.asarray(w.dequantize())
    expected = np.stack([np.asarray(x)[:, g] @ dense[2 * g : 2 * g + 2].T for g in range(3)], axis=1)
    (found,) = products(x, [product(single(w))], groups=3)
    np.testing.assert_allclose(found, expected.reshape(5, 6), rtol=1e-5, atol=1e-5)
