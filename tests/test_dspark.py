"""The DSpark drafter against a reference in numpy, and its windows kept in step with the model."""

import dataclasses
import functools

import dspark_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights

from ds4jax import training
from ds4jax.config import DrafterConfig
from ds4jax.errors import ConfigError
from ds4jax.io import synthetic
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.drafter import to_metadata
from ds4jax.io.gguf import TensorData, write_gguf
from ds4jax.io.load import load_drafter
from ds4jax.model import cache as kv
from ds4jax.model import dspark, transformer, weights
from ds4jax.model.compute import Compute
from ds4jax.model.tensors import drafter_table, tensor_table

DRAFTER = DrafterConfig(stages=2, block_size=4, markov_rank=16, noise_token=95, target_layers=(0, 1))
# Layers without compression, so that the reference is short; everything that a drafter has is there.
CFG = dataclasses.replace(
    synthetic.ODD, n_layers=3, compress_ratios=(0,) * 3, swiglu_clamp=(1.0, 1.5, 2.0), window=16, embed_dim=64,
    vocab_size=96, n_heads=3, head_dim=48, rope_dim=16, q_lora_rank=32, n_experts=6, n_experts_used=2, expert_dim=32,
    index_head_dim=16, sinkhorn_iters=4, n_mtp=1, drafter=DRAFTER,
)  # fmt: skip
PLAIN = Compute("plain")


@pytest.fixture(scope="module")
def model():
    """Model and drafter, and the arrays of both by the names of their tensors."""
    w, named = random_weights.make(CFG, weights.abstract(CFG, random_weights.F32), 1)
    d, drafter = random_weights.make(CFG, weights.abstract_drafter(CFG, random_weights.F32), 1)
    return w, d, named | drafter


@jax.jit
def extend(w, d, cache, tokens, n):
    """Run tokens and write their rows → the cache."""
    taps = dspark.Taps(CFG)
    _, moved = transformer.run(w, cache, tokens, n, CFG, PLAIN, taps)
    return dspark.write(d, moved, taps.features(len(tokens)), cache.length, n, CFG, PLAIN)


@jax.jit
def draft(w, d, cache, anchor, active):
    return dspark.draft(w, d, cache, anchor, active, CFG, PLAIN)


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, CFG.vocab_size, shape).astype(np.int32)


# ---- the reference ---------------------------------------------------------------------------------------------------
LENGTHS = (1, 5, 16, 17, 39)  # within the window, full, and around it


@pytest.fixture(scope="module")
def prompts(model):
    """Tokens, one more than LENGTHS of each sequence, and the cache after LENGTHS of them."""
    w, d, _ = model
    tokens = ids(len(LENGTHS), max(LENGTHS) + 1)
    return tokens, extend(w, d, kv.empty(CFG, "plain", "float32", len(LENGTHS), 64), tokens[:, :-1], jnp.array(LENGTHS))


@pytest.fixture(scope="module")
def drafted(model, prompts):
    """The drafts after the prompts, the streams after the model's layers, and the anchors."""
    w, d, named = model
    tokens, cache = prompts
    anchors = tokens[np.arange(len(LENGTHS)), LENGTHS]
    found = jax.device_get(draft(w, d, cache, anchors, np.full(len(LENGTHS), True)))
    streams = [reference.run(named, CFG, row[:length]) for row, length in zip(tokens, LENGTHS, strict=True)]
    return found, streams, anchors


def distance(model, drafted, b, mistake=""):
    """How far logits and confidences are from the reference's, relative to the largest logit and to 1."""
    found, streams, anchors = drafted
    tokens, logits, confidence = reference.draft(model[2], CFG, DRAFTER, streams[b], anchors[b], mistake)
    assert mistake or found.tokens[b].tolist() == tokens
    return max(
        np.abs(found.logits[b] / logits.max() - logits / logits.max()).max(),
        np.abs(found.confidence[b] - confidence).max(),
    )


@pytest.mark.parametrize("b", range(len(LENGTHS)))
def test_drafts_are_the_references(model, drafted, b):
    assert distance(model, drafted, b) < 1e-4  # float32, sums in another order


@pytest.mark.parametrize("mistake", reference.MISTAKES)
def test_a_mistake_would_be_noticed(model, drafted, mistake):
    assert distance(model, drafted, len(LENGTHS) - 1, mistake) > 1e-2


# ---- the windows -----------------------------------------------------------------------------------------------------
def test_rows_are_the_same_from_a_prompt_at_once_and_token_by_token(model):
    """At every length up to twice around the window: sequence b of a batch has the first b tokens of the same text."""
    w, d, _ = model
    text = ids(2 * CFG.window + 3, seed=1)
    B = len(text) + 1
    at_once = extend(w, d, kv.empty(CFG, "plain", "float32", B, 64), np.tile(text, (B, 1)), jnp.arange(B))
    cache, stages = kv.empty(CFG, "plain", "float32", 1, 64), list(CFG.stages)
    for length, token in enumerate(text, 1):
        cache = extend(w, d, cache, token[None, None], jnp.array([1]))
        expected = cache.window["x"][stages, 0]
        np.testing.assert_allclose(at_once.window["x"][stages, length], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).min(-1).max() > 0  # and no slot has been left empty


def test_padding_and_other_sequences_leave_no_trace(model, prompts, drafted):
    """The same prompts again with other padding, in a cache that has held others, beside a sequence that pauses."""
    w, d, _ = model
    tokens, cache = prompts
    fresh = kv.reset(cache, jnp.arange(len(LENGTHS)) > 0)
    padded = np.where(np.arange(tokens.shape[1]) < np.array(LENGTHS)[:, None], tokens, 7)[:, :-1]
    again = extend(w, d, fresh, padded, jnp.array((0, *LENGTHS[1:])))
    np.testing.assert_array_equal(again.window["x"][:, 0], cache.window["x"][:, 0])
    active = np.arange(len(LENGTHS)) != 2
    found = jax.device_get(draft(w, d, again, drafted[2], active))
    for a, b in zip(found, drafted[0], strict=True):
        np.testing.assert_array_equal(a[active], b[active])


def test_only_accepted_tokens_enter_the_windows(model, prompts):
    """Of six tokens the first two are written, as they would be one after the other, whatever the others are."""
    _, d, _ = model
    _, cache = prompts
    width = len(DRAFTER.target_layers) * CFG.embed_dim
    features = np.random.default_rng(2).standard_normal((len(LENGTHS), 6, width)).astype(np.float32)
    write, n = jax.jit(functools.partial(dspark.write, cfg=CFG, compute=PLAIN)), jnp.full(len(LENGTHS), 1)
    found = write(d, cache, features, cache.length, 2 * n)
    expected = write(d, cache, features, cache.length, n)
    expected = write(d, expected, np.roll(features, -1, axis=1), cache.length + 1, n)
    np.testing.assert_allclose(found.window["x"], expected.window["x"], rtol=1e-4, atol=1e-5)
    again = write(d, cache, np.where(np.arange(6)[:, None] < 2, features, 9.0), cache.length, 2 * n)
    np.testing.assert_array_equal(found.window["x"], again.window["x"])
    assert (found.window["x"] != cache.window["x"]).any(-1).sum() == DRAFTER.stages * len(LENGTHS) * 2


@pytest.mark.slow
def test_training_sees_what_drafting_computes(model):
    """Blocks within a text, taught all at once, against the text up to each of them, and the block after it."""
    w, d, _ = model
    tokens, anchors, slots = ids(2, 41, seed=4), np.array([[7], [30]], np.int32), DRAFTER.block_size
    _, parts = jax.jit(functools.partial(training.drafter_loss, cfg=CFG, compute=PLAIN))(
        d, w, tokens, np.ones((2, 41), bool), anchors
    )
    _, said = jax.jit(functools.partial(training.taught, cfg=CFG, compute=PLAIN))(w, tokens[:, :-1])
    cache = extend(w, d, kv.empty(CFG, "plain", "float32", 2, 64), tokens[:, :-1], anchors[:, 0])
    row, ahead = np.arange(2)[:, None], anchors + np.arange(slots)

    @jax.jit
    def q(cache, before):
        h = dspark.hidden(w, d, cache, before[:, 0], jnp.full(2, slots, jnp.int32), CFG, PLAIN)
        return jax.nn.softmax(dspark.after(d, dspark.base(w, d, h, CFG, PLAIN), h, before, PLAIN)[0])

    apart = np.abs(q(cache, tokens[row, ahead]) - jax.nn.softmax(said[row, ahead])).sum(-1)
    np.testing.assert_allclose(parts["accepted"], (1 - apart / 2).mean(0), rtol=1e-4)


def test_a_file_loads_to_the_weights_that_it_was_written_from(tmp_path, model):
    _, d, named = model

    def write(name, metadata, table):
        types = {spec.name: synthetic.storage_type(spec, random_weights.F32) for spec in table}
        data = {s.name: TensorData(s.shape, types[s.name], functools.partial(named.get, s.name)) for s in table}
        write_gguf(tmp_path / name, metadata, data.items())
        return tmp_path / name

    main = open_checkpoint(write("model.gguf", CFG.to_metadata(), tensor_table(CFG)))
    path = write("drafter.gguf", to_metadata(DRAFTER), drafter_table(CFG, DRAFTER))
    found, cfg = load_drafter(path, main)
    assert cfg.drafter == DRAFTER and list(cfg.stages) == [3, 4]  # here without an MTP head
    for (where, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(d), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(where))


def test_a_drafter_is_one_of_the_config():
    assert list(CFG.stages) == [4, 5]  # after three layers and the MTP head
    assert kv.abstract(CFG, "plain", "float32", 1, 64).window["x"].shape[0] == 6
    tree = weights.abstract_drafter(CFG, synthetic.RECIPES["f32"])
    assert sum(len(spec.tensors) for spec in jax.tree.leaves(tree)) == 2 * 24 + 2 + 7
    with pytest.raises(ConfigError, match="a drafter: found a config without one"):
        weights.abstract_drafter(dataclasses.replace(CFG, drafter=None), synthetic.RECIPES["f32"])
