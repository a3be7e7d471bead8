"""The logits equal those of Hugging Face transformers, at every position (see `oracle` and scripts/make_goldens.py)."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gguf import GGUFReader

from ds4jax.io.load import load
from ds4jax.model import cache as kv
from ds4jax.model.compute import Compute
from ds4jax.model.transformer import prefill

CHUNK, CTX = 128, 640  # one compiled shape for prompts of every length


def our_logits(path, tokens, numerics):
    """Logits (S, vocab) float32 of one sequence of up to CTX tokens from the model file at `path`."""
    model, checkpoint = load(path)
    compute = Compute(numerics)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    cache = kv.empty(checkpoint.cfg, numerics, compute.dtype, 1, CTX, device)
    out = []
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        padded = np.pad(part, (0, CHUNK - len(part)))[None]
        n = jnp.array([len(part)], jnp.int32)
        logits, cache = prefill(model, cache, padded, n, cfg=checkpoint.cfg, compute=compute, all_positions=True)
        out.append(np.asarray(logits[0, : len(part)]))
    return np.concatenate(out)


@pytest.fixture(scope="module", params=oracle.CASES, ids=lambda case: case.name)
def golden(request):
    return oracle.Golden.load(request.param)


@pytest.fixture(scope="module")
def path(golden, tmp_path_factory):
    """The case's model file, rebuilt from its seed."""
    path = tmp_path_factory.mktemp("goldens") / f"{golden.case.name}.gguf"
    golden.case.build(path)
    return path


def test_the_model_is_the_one_that_was_asked(golden, path):
    assert oracle.fingerprint(path) == golden.meta["sha256"]


@pytest.mark.parametrize("length", oracle.LENGTHS)
def test_logits(golden, path, length):
    logits = our_logits(path, golden.arrays[f"{length}/tokens"], golden.case.numerics)
    assert golden.failures(length, logits) == []


def test_greedy_continuation(golden, path):
    tokens, ids, best = (golden.arrays[f"greedy/{k}"] for k in ("tokens", "ids", "logits"))
    logits = our_logits(path, tokens, golden.case.numerics)[oracle.GREEDY_PROMPT - 1 : -1]
    assert (logits.argmax(axis=1) == tokens[oracle.GREEDY_PROMPT :]).all()
    found = np.take_along_axis(logits, ids, axis=1)
    tolerance, _ = golden.case.tolerances
    assert (np.linalg.norm(found - best, axis=1) <= tolerance * np.linalg.norm(best, axis=1)).all()


def test_a_changed_weight_is_noticed(golden, path, tmp_path):
    """One norm weight out of a million values, through the whole chain from file to comparison."""
    changed = shutil.copy(path, tmp_path / "changed.gguf")
    norm = next(t for t in GGUFReader(changed, "r+").tensors if t.name == "blk.2.attn_norm.weight")
    assert isinstance(norm.data, np.memmap)
    norm.data[0] *= 2
    norm.data.flush()
    logits = our_logits(changed, golden.arrays["130/tokens"], golden.case.numerics)
    assert golden.failures(130, logits)


def test_no_position_hides_behind_a_near_tie():
    """At no position of a plain golden does float32 leave open which candidate is the k-th."""
    plain = [case for case in oracle.CASES if case.numerics == "plain"]
    assert {case.shape for case in plain} == {"base", "odd", "tiny"}
    for golden in map(oracle.Golden.load, plain):
        for what in ("index_gap", "router_gap"):
            assert min(golden.arrays[f"{n}/{what}"].min() for n in oracle.LENGTHS) >= oracle.NEAR_TIE


@pytest.fixture
def imagined():
    """A golden of random logits, and those logits (640, vocab)."""
    case = oracle.CASES[0]
    logits = np.random.default_rng(0).standard_normal((640, case.cfg.vocab_size)).astype(np.float32)
    kept = {**oracle.record(logits), "index_gap": np.ones(640), "router_gap": np.ones(640)}
    return oracle.Golden(case, {}, {f"640/{k}": v for k, v in kept.items()}), logits


def test_the_comparison_measures_the_relative_error_of_every_position(imagined):
    golden, logits = imagined
    error = np.random.default_rng(1).standard_normal(logits.shape)
    error *= (np.linalg.norm(logits, axis=1) / np.linalg.norm(error, axis=1))[:, None]
    measured = golden.errors(640, logits + 1e-3 * error) / 1e-3
    assert 0.4 < measured.min() and measured.max() < 1.7
    np.testing.assert_allclose(measured[oracle.full_positions(640)], 1, rtol=1e-4)


@pytest.mark.parametrize("position", [0, 77, 639])
@pytest.mark.parametrize("factor", [1.0003, np.nan])
def test_one_bad_position_is_enough(imagined, factor, position):
    golden, logits = imagined
    assert golden.failures(640, logits) == []
    logits[position] *= factor
    assert f"position {position}: error" in golden.failures(640, logits)[0]


def test_a_small_error_everywhere_is_too_much(imagined):
    golden, logits = imagined
    (failure,) = golden.failures(640, logits * np.float32(1.00004))
    assert "median error" in failure
