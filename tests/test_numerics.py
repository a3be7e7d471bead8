"""Round trips against independent arithmetic: ml_dtypes for E4M3, a search for E2M1, the dense Hadamard matrix."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ds4jax.errors import ConfigError
from ds4jax.io.synthetic import synthetic_config
from ds4jax.numerics import rows as num


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
        distance = np.abs(np.abs(block / scale)[..., None] - num.E2M1_VALUES)
        nearest = distance == distance.min(-1, keepdims=True)
        even = nearest & (np.arange(8) % 2 == 0)
        code = np.where(even.any(-1), even.argmax(-1), nearest.argmax(-1))
        np.testing.assert_array_equal(found[:, start : start + 32], np.copysign(num.E2M1_VALUES[code] * scale, block))


@pytest.mark.parametrize("n", [32, 128])
def test_hadamard(n):
    H = np.array([[1.0]])
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    x = np.random.default_rng(0).standard_normal((5, n)).astype(np.float32)
    np.testing.assert_allclose(num.hadamard(jnp.asarray(x)), x @ H / np.sqrt(n), rtol=1e-5, atol=1e-5)


def test_rotating_twice_is_the_identity_and_keeps_scores():
    x = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    y = num.hadamard(jnp.asarray(x))
    np.testing.assert_allclose(num.hadamard(y), x, atol=1e-5)
    np.testing.assert_allclose(y[0] @ y[1], x[0] @ x[1], rtol=1e-4)


def test_official_needs_a_power_of_two():
    cfg = synthetic_config({"index_head_dim": 96})
    num.check(cfg, "plain")
    with pytest.raises(ConfigError, match="key_length is 96, expected a power of two"):
        num.check(cfg, "official")
