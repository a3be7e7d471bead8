"""Round trips against independent arithmetic: ml_dtypes for E4M3, a search for E2M1, the dense Hadamard matrix."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ds4jax.errors import ConfigError
from ds4jax.io.synthetic import synthetic_config
from ds4jax.numerics import rows as num
from pallas_kernels.numerics import e2m1, e4m3, norm, rope, scale
from pallas_kernels.numerics.hadamard import hadamard, hadamard_in_kernel
from pallas_kernels.numerics.swiglu import swiglu


def samples(rows, dim, seed=0):
    """Rows of very different sizes, with zeros, exact powers of two and the block maxima right at the scale limits."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dim)) * 10.0 ** rng.integers(-6, 4, (rows, 1))
    x[0] = 0
    x[1, :] = 448.0
    x[2, ::7] = 2.0 ** rng.integers(-20, 20, x[2, ::7].shape)
    return x.astype(np.float32)


def power_of_two_scale(amax, floor, largest):
    """2^ceil(log2(max(amax, floor) / largest)) by search, with no logarithm to round."""
    target = np.float32(np.maximum(amax, np.float32(floor))) / np.float32(largest)
    powers = np.ldexp(np.float32(1), np.arange(-126, 128))
    return powers[np.searchsorted(powers, target)]


@pytest.mark.parametrize("dim, rope", [(512, 64), (192, 64), (96, 32), (160, 32)])
def test_e4m3_rows(dim, rope):
    x = samples(64, dim)
    x[:, dim - rope :] = np.clip(x[:, dim - rope :], -1000, 1000)  # float16; normed rows never come near its limit
    fmt = num.Fp8Row(dim, rope)
    found = np.asarray(fmt.decode(fmt.encode(jnp.asarray(x)), jnp.float32))
    for start in range(0, dim - rope, 64):
        block = x[:, start : min(start + 64, dim - rope)]
        scale = power_of_two_scale(np.abs(block).max(-1), 1e-4, 448)[:, None]
        expected = (block / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        np.testing.assert_array_equal(found[:, start : start + block.shape[1]], expected)
    np.testing.assert_array_equal(found[:, dim - rope :], x[:, dim - rope :].astype(np.float16).astype(np.float32))


def test_e2m1_rows_take_the_nearest_code_ties_to_even():
    dim = 128
    x = samples(64, dim)
    x[5, :32] = np.repeat([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], 4) * np.tile([1, -1], 16)  # every tie
    fmt = num.Fp4Row(dim)
    found = np.asarray(fmt.decode(fmt.encode(jnp.asarray(x)), jnp.float32))
    for start in range(0, dim, 32):
        block = x[:, start : start + 32]
        scale = power_of_two_scale(np.abs(block).max(-1), 6 * 2.0**-126, 6)[:, None]
        distance = np.abs(np.abs(block / scale)[..., None] - e2m1.VALUES)
        nearest = distance == distance.min(-1, keepdims=True)
        even = nearest & (np.arange(8) % 2 == 0)
        code = np.where(even.any(-1), even.argmax(-1), nearest.argmax(-1))
        np.testing.assert_array_equal(found[:, start : start + 32], np.copysign(e2m1.VALUES[code] * scale, block))


@pytest.mark.parametrize("n", [32, 128])
def test_hadamard(n):
    H = np.array([[1.0]])
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    x = np.random.default_rng(0).standard_normal((5, n)).astype(np.float32)
    np.testing.assert_allclose(hadamard(jnp.asarray(x)), x @ H / np.sqrt(n), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [64, 128])
def test_hadamard_in_a_kernel_has_the_same_bits(n):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, n)), jnp.float32)
    np.testing.assert_array_equal(hadamard_in_kernel(x), hadamard(x))


@pytest.mark.parametrize("largest, floor", [(e4m3.MAX, e4m3.FLOOR), (e2m1.MAX, e2m1.FLOOR)])
def test_exponents_are_the_ceiling_of_the_logarithm(largest, floor):
    """At every edge between two, and one float to either side; float64 has room for the exact quotient's side of 1."""
    edges = np.float32(largest) * np.float32(2) ** np.arange(-126, 118, dtype=np.float32)
    beside = [np.nextafter(edges, np.float32(end)) for end in (0, np.inf)]
    x = np.concatenate([[0, floor], edges, *beside]).astype(np.float32)
    mantissa, exponent = np.frexp(np.maximum(x, np.float32(floor)).astype(np.float64) / largest)
    expected = exponent - (mantissa == 0.5) + 127
    np.testing.assert_array_equal(scale.biased_exponent(jnp.asarray(x), floor, largest), expected)


def test_every_e2m1_code_has_its_value():
    expected = np.concatenate([e2m1.VALUES, -e2m1.VALUES])
    found = np.asarray(e2m1.decode(jnp.arange(16, dtype=jnp.uint8), jnp.float32))
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    codes = jnp.asarray(np.delete(np.arange(16), 8), jnp.uint32)  # code 8 is −0, which `decode_scaled` has as 0
    np.testing.assert_array_equal(e2m1.decode_scaled(codes, jnp.int32(127)), np.delete(expected, 8))
    np.testing.assert_array_equal(
        e2m1.encode(jnp.asarray(np.delete(expected, 8)), jnp.int32), np.delete(np.arange(16), 8)
    )


def test_rope_turns_pairs_as_complex_numbers():
    rng = np.random.default_rng(2)
    x, angle = rng.standard_normal((3, 8)).astype(np.float32), rng.uniform(0, 6, (3, 4)).astype(np.float32)
    expected = (x.astype(np.float64).view(np.complex128) * np.exp(1j * angle)).view(np.float64)
    found = rope.rotate(jnp.asarray(x), jnp.cos(angle), jnp.sin(angle))
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 products of numbers up to 3


def test_norm_and_activation_of_kernels():
    rng = np.random.default_rng(3)
    x, up = (rng.standard_normal((3, 8)).astype(np.float32) * 4 for _ in range(2))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm.rms_norm(jnp.asarray(x), 1e-2), expected, rtol=1e-6)
    gate = np.minimum(wide, 2.0)
    expected = gate / (1 + np.exp(-gate)) * np.clip(up, -2.0, 2.0)
    np.testing.assert_allclose(swiglu(jnp.asarray(x), jnp.asarray(up), 2.0), expected, rtol=1e-5, atol=1e-6)


def test_rotating_twice_is_the_identity_and_keeps_scores():
    x = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    y = hadamard(jnp.asarray(x))
    np.testing.assert_allclose(hadamard(y), x, atol=1e-5)
    np.testing.assert_allclose(y[0] @ y[1], x[0] @ x[1], rtol=1e-4)


def test_official_needs_a_power_of_two():
    cfg = synthetic_config({"index_head_dim": 96})
    num.check(cfg, "plain")
    with pytest.raises(ConfigError, match="key_length is 96, expected a power of two"):
        num.check(cfg, "official")
