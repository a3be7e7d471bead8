"""What must hold on an NVIDIA GPU; run there with ``python -m pytest -m gpu``."""

import os
import subprocess
import sys

import greedy
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_goldens import our_logits
from test_numerics import samples
from test_quant import assert_same_bits, on_device, random_bytes

from ds4jax.formats import FORMATS
from ds4jax.numerics import rows as num

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session", autouse=True)
def gpu():
    assert jax.devices()[0].platform == "gpu", f"found {jax.devices()}, expected an NVIDIA GPU"


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.ggml_type.name)
def test_dequantize_bit_for_bit(fmt):
    raw = random_bytes(fmt, (64, 40), 512)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        expected = np.asarray(jax.jit(lambda q: q.dequantize())(on_device(fmt, raw)))
    assert_same_bits(jax.jit(lambda q: q.dequantize())(on_device(fmt, raw)), expected)


@pytest.mark.parametrize("fmt", [num.Fp8Row(512, 64), num.Fp4Row(128)], ids=["E4M3", "E2M1"])
def test_stored_rows_bit_for_bit(fmt):
    x = samples(4096, fmt.dim, seed=1)
    x[:, -64:] = np.clip(x[:, -64:], -1000, 1000)
    encode = jax.jit(fmt.encode)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = encode(jnp.asarray(x))
    found = encode(jnp.asarray(x))
    for plane in expected:
        assert np.asarray(found[plane]).tobytes() == np.asarray(expected[plane]).tobytes(), plane


@pytest.mark.parametrize("case", oracle.CASES, ids=lambda case: case.name)
def test_goldens(case, tmp_path):
    """The same bounds as on a CPU: float32 products are computed in float32 (no TF32)."""
    golden, path = oracle.Golden.load(case), tmp_path / "model.gguf"
    case.build(path)
    for length in oracle.LENGTHS:
        logits = our_logits(path, golden.arrays[f"{length}/tokens"], case.numerics)
        assert golden.failures(length, logits) == []


def test_the_same_prompt_gives_the_same_bits(tmp_path):
    case = next(c for c in oracle.CASES if c.numerics == "official")
    golden, path = oracle.Golden.load(case), tmp_path / "model.gguf"
    case.build(path)
    first, second = (our_logits(path, golden.arrays["640/tokens"], case.numerics) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["tiny", "tiny_q2"])
def test_a_shipped_model_answers_through_the_kernels_as_on_a_cpu(name, tmp_path):
    """Float32 on both, but for the kernels' float16 queries, which move a code of a stored row now and then."""
    path = tmp_path / "cpu.npz"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, greedy.__file__, name, str(path)], env=environment, check=True)
    expected, found = np.load(path), greedy.answers(name, "pallas")
    error = np.linalg.norm(found["logits"] - expected["logits"], axis=-1)
    error /= np.linalg.norm(expected["logits"], axis=-1)
    assert np.median(error) < 2e-3 and error.max() < 0.05
    for ours, theirs, gap in zip(found["tokens"], expected["tokens"], expected["gaps"], strict=True):
        differs = np.flatnonzero(ours != theirs)
        assert not differs.size or gap[differs[0]] < 0.05, f"token {differs[0]}: {gap[differs[0]]} above the next"
