"""scripts/train_tiny.py: it learns, survives an interruption bit for bit, and what it writes is what it trained."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import train_tiny

from ds4jax.io import load as loader
from ds4jax.io.imatrix import Imatrix
from ds4jax.io.tokenizer import Tokenizer, byte_tokenizer


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        train_tiny.smoke(tmp_path)
    step: Any = train_tiny.train_step
    assert step._cache_size() == 1  # compiled once, for new and for restored states
    losses = [
        float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines() if "loss" in line
    ]
    assert losses[:3] == losses[3:] and losses[2] < losses[0]
    w, checkpoint = loader.load(tmp_path / "smoke.gguf")
    assert checkpoint.mtp == "mtp" and checkpoint.cfg.n_mtp == 1
    assert Tokenizer.from_metadata(checkpoint.file.metadata).tokens == byte_tokenizer().tokens


def test_export_keeps_every_weight(tmp_path):
    cfg = train_tiny.MINIATURE
    table = train_tiny.expert_table(np.arange(cfg.vocab_size), cfg)
    w = jax.jit(lambda: train_tiny.training.init(cfg, 1, table))()
    train_tiny.export(tmp_path / "m.gguf", w, cfg, byte_tokenizer())
    found, _ = loader.load(tmp_path / "m.gguf")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(w), strict=True):
        np.testing.assert_array_equal(a, b)


def test_experts_share_the_frequent_tokens():
    tokens = np.repeat(np.arange(train_tiny.MINIATURE.vocab_size), np.arange(train_tiny.MINIATURE.vocab_size))
    table = train_tiny.expert_table(tokens, train_tiny.MINIATURE)
    load = np.bincount(table[tokens].reshape(-1), minlength=train_tiny.MINIATURE.n_experts)
    assert (table[:, 0] != table[:, 1]).all() and load.max() < 1.01 * load.min()


def test_every_epoch_has_all_rows_in_another_order():
    plan = train_tiny.Plan(train_tiny.TINY, train_tiny.Compute(), steps=100, batch=4, learning_rate=1e-3, seed=0)
    epochs = [np.concatenate([train_tiny.rows_of(plan, 10 * epoch + i, 40) for i in range(10)]) for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert not np.array_equal(epochs[0], epochs[1])


def test_importance_of_the_columns_of_every_expert(tmp_path):
    cfg = train_tiny.MINIATURE
    w = jax.jit(lambda: train_tiny.training.init(cfg, 1, train_tiny.expert_table(np.arange(cfg.vocab_size), cfg)))()
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 65)).astype(np.uint16)
    found = train_tiny.column_importance(w, cfg, tokens, tmp_path / "i.gguf")
    written = Imatrix.read(tmp_path / "i.gguf")
    assert (written.chunks, written.chunk_size) == (3, 64)
    for name in ("gate", "up", "down"):
        stacked = getattr(found, name)
        assert stacked.shape[:2] == (cfg.n_layers + 1, cfg.n_experts)
        for layer, prefix in enumerate(("blk.0", "blk.1", "mtp.0")):
            expected = written.entries[f"{prefix}.ffn_{name}_exps.weight"].means()
            np.testing.assert_array_equal(stacked[layer], expected)
