"""The goldens through the kernels: transformers' logits, interpreted on a CPU and compiled on a GPU (marker gpu)."""

import functools

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from ds4jax.io.load import load
from ds4jax.model import cache as kv
from ds4jax.model.compute import Compute
from ds4jax.model.transformer import prefill

CTX = 640
CASES = [case for case in oracle.CASES if case.kernels]

# Up to 32 tokens at once, in decoding and in verification say, every product is summed in float32 over weights as they
# are. Queries and softmax weights are float16 (2⁻¹¹), the experts' activations 16-bit fixed point (2⁻¹⁵): 1e-5 to 3e-5
# in the median. Where that moves a stored value over the middle between two codes, a position moves by 1e-3, once (640
# positions, on an H200) by 2.3e-3.
FEW = {"highest": 4e-3, "most": 1e-3, "median": 1e-4}
# More tokens multiply bfloat16 or float16 on the tensor cores: each product of the experts is off by 2e-3 (2⁻⁹, its
# weights and its result). That decides between two experts whose scores differ by less than 1e-3, so positions with
# such a choice are not held to the highest error; they are few.
MANY = {"highest": 1e-2, "most": 1e-2, "median": 5e-3}
CLOSE, FEWEST = 1e-3, 0.02


def only(recipe):
    """Each way to read with the experts of one recipe; the other is slow: compiling takes a minute and a half."""
    slow = pytest.mark.slow
    cases = [pytest.param(case, marks=[] if case.recipe == recipe else slow, id=case.name) for case in CASES]
    return pytest.mark.parametrize("golden", cases, indirect=True, scope="module")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def golden(request):
    return oracle.Golden.load(request.param)


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("goldens") / f"{golden.case.name}.gguf"
    golden.case.build(path)
    return load(path)


def logits(model, kernels, tokens, sizes):
    """Logits (S, vocab) of one sequence, read in pieces of these sizes; the last is padded."""
    weights, checkpoint = model
    compute = Compute("official", "float32", kernels=kernels)
    step = functools.partial(prefill, cfg=checkpoint.cfg, compute=compute, all_positions=True)
    cache, out, start = kv.empty(checkpoint.cfg, "official", "float32", 1, CTX), [], 0
    for size in sizes:
        part = tokens[start : start + size]
        padded, n = np.pad(part, (0, size - len(part)))[None], jnp.array([len(part)], jnp.int32)
        found, cache = step(weights, cache, padded, n)
        out.append(np.asarray(found[0, : len(part)]))
        start += size
    return np.concatenate(out)


def check(golden, length, found, bounds, clear=None):
    """found: logits of the first positions, at most `length`. clear: those that are held to the highest error."""
    rest = np.zeros((length - len(found), found.shape[1]), found.dtype)
    errors = golden.errors(length, np.concatenate([found, rest]))[: len(found)]
    held = errors if clear is None else errors[clear[: len(found)]]
    assert np.median(errors) <= bounds["median"] and held.max() <= bounds["highest"], (
        f"median {np.median(errors):.1e}, highest {held.max():.1e}, at {np.argsort(-errors)[:5]}"
    )
    assert np.mean(errors > bounds["most"]) <= FEWEST


def check_prefill(golden, length, found):
    check(golden, length, found, MANY, golden.arrays[f"{length}/router_gap"] > CLOSE)


def few(length):
    """Pieces of 32, then one token at a time over the position where the first window of 128 closes."""
    return [32] * 3 + [1] * (length - 96)


# ---- interpreted -----------------------------------------------------------------------------------------------------
@only("q2")
def test_decoding_interpreted(golden, model):
    """A window of 128 in pieces of 32; of the case whose experts have other types, 5 tokens one by one."""
    length, sizes = (130, [32] * 4) if golden.case.recipe == "q2" else (5, [1] * 5)
    found = logits(model, "pallas_interpret", golden.arrays[f"{length}/tokens"][: sum(sizes)], sizes)
    check(golden, length, found, FEW)


@pytest.mark.slow
@only("q2")
def test_decoding_over_the_end_of_a_window_interpreted(golden, model):
    found = logits(model, "pallas_interpret", golden.arrays["130/tokens"], few(130))
    check(golden, 130, found, FEW)


@pytest.mark.slow
@only("mixed_experts")
def test_prefill_interpreted(golden, model):
    found = logits(model, "pallas_interpret", golden.arrays["130/tokens"][:128], [128])
    check_prefill(golden, 130, found)


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("length", oracle.LENGTHS)
def test_decoding_on_the_gpu(golden, model, length):
    """Nearly all of it token by token, as an answer is decoded."""
    found = logits(model, "pallas", golden.arrays[f"{length}/tokens"], few(length) if length > 96 else [1] * length)
    check(golden, length, found, FEW)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [n for n in oracle.LENGTHS if n >= 128])
def test_prefill_on_the_gpu(golden, model, length):
    found = logits(model, "pallas", golden.arrays[f"{length}/tokens"], [128] * -(-length // 128))
    check_prefill(golden, length, found)
