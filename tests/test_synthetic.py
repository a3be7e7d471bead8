"""Random models: of the promised statistics, in every format. (That their bytes never change, `test_goldens` says.)"""

import dataclasses

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize

from ds4jax.__main__ import main
from ds4jax.errors import ConfigError
from ds4jax.io import synthetic
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.model.tensors import tensor_table

BASE, ODD = synthetic.synthetic_config("base"), synthetic.synthetic_config("odd")


def test_a_tensor_depends_on_seed_and_name_only():
    specs = tensor_table(ODD)
    data = {s.name: synthetic.random_data(ODD, 3, s, Type.F32).tobytes() for s in specs if s.kind == "matrix"}
    assert len(set(data.values())) == len(data)
    for spec, again, qtype in synthetic.random_tensors(ODD, 3, synthetic.RECIPES["f32"]):
        if spec.kind == "matrix":
            assert again.tobytes() == data[spec.name] != synthetic.random_data(ODD, 4, spec, qtype).tobytes()


@pytest.mark.parametrize("qtype", synthetic.MATRIX_TYPES, ids=lambda t: t.name)
def test_matrices_have_zero_mean_and_the_promised_deviation(qtype):
    specs = {s.family: s for s in tensor_table(BASE)}
    for family, deviation in (("ffn.experts.up", 1 / 16), ("ffn.experts.down", 1 / 64), ("embed", 1.0)):
        data = synthetic.random_data(BASE, 5, specs[family], qtype, damping=0.25)
        values = dequantize(data, qtype)
        assert values.shape == specs[family].shape
        assert abs(values.mean()) < 0.01 * deviation
        assert abs(values.std() / deviation - 1) < 0.03


def test_recipes_store_what_they_say():
    types = {}
    for name, recipe in synthetic.RECIPES.items():
        types[name] = {s.name: synthetic.storage_type(s, recipe) for s in tensor_table(BASE)}
    assert types["q2"]["blk.3.ffn_gate_exps.weight"] == types["q2"]["blk.3.ffn_up_exps.weight"] == Type.IQ2_XXS
    assert types["q2"]["blk.3.ffn_down_exps.weight"] == Type.Q2_K
    assert types["q4"]["blk.3.ffn_down_exps.weight"] == Type.Q4_K
    for name in ("blk.0.attn_q_a", "blk.0.attn_output_b", "blk.4.ffn_up_shexp", "output"):
        assert types["q2"][f"{name}.weight"] == types["q4"][f"{name}.weight"] == Type.Q8_0
    for name in ("token_embd", "blk.0.hc_attn_fn", "blk.2.indexer.proj", "blk.3.attn_compressor_ape"):
        assert types["q2"][f"{name}.weight"] == Type.F16
    assert types["q8"]["blk.0.ffn_gate_tid2eid.weight"] == Type.I32
    assert types["q8"]["blk.3.exp_probs_b.bias"] == Type.F32
    experts = {types["mixed"][f"blk.{i}.ffn_gate_exps.weight"] for i in range(5)}
    assert len(experts) == 5 and set(types["mixed"].values()) == {*synthetic.MATRIX_TYPES, Type.I32}
    # Rows of 128 hold no block of 256.
    spec = next(s for s in tensor_table(ODD) if s.family == "ffn.experts.up")
    assert synthetic.storage_type(spec, synthetic.RECIPES["q2"]) == Type.F16


def test_hash_layers_name_distinct_experts():
    spec = next(s for s in tensor_table(BASE) if s.kind == "ids")
    ids = synthetic.random_data(BASE, 0, spec, Type.I32).view(np.int32)
    assert ids.shape == (BASE.vocab_size, BASE.n_experts_used)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert set(ids.ravel().tolist()) == set(range(BASE.n_experts))


def test_a_file_holds_the_tensors_and_the_tokenizer(tmp_path):
    path = tmp_path / "m.gguf"
    synthetic.write_synthetic(path, ODD, 1, synthetic.RECIPES["mixed"], {"tokenizer.ggml.model": "gpt2"})
    reader = GGUFReader(path)
    assert reader.fields["tokenizer.ggml.model"].contents() == "gpt2"
    stored = {t.name: t for t in reader.tensors}
    for spec, data, qtype in synthetic.random_tensors(ODD, 1, synthetic.RECIPES["mixed"]):
        tensor = stored.pop(spec.name)
        assert tensor.tensor_type == qtype and tuple(tensor.shape[::-1]) == spec.shape
        assert tensor.data.tobytes() == data.tobytes()
    assert not stored


def test_a_repeating_file_is_a_model_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "PIECE_BYTES", 10_000)
    path = tmp_path / "m.gguf"
    assert main(["synthetic", "--synthetic=base", "--layers=4", f"--out={path}"]) == 0
    cfg = synthetic.first_layers(BASE, 4)
    checkpoint = open_checkpoint(path)
    assert dataclasses.replace(checkpoint.cfg, norm_eps=cfg.norm_eps, hc_eps=cfg.hc_eps) == cfg  # stored as float32
    assert cfg.compress_ratios == (0, 0, 4, 128)
    assert Tokenizer.from_metadata(checkpoint.file.metadata).vocab_size == BASE.vocab_size
    for spec in tensor_table(cfg):
        assert checkpoint.types[spec.name] == synthetic.storage_type(spec, synthetic.RECIPES["q2"])
    up = [checkpoint.file.raw(f"blk.{i}.ffn_up_exps.weight").reshape(-1, 66) for i in range(4)]
    period = next(n for n in range(1, len(up[0])) if (up[0][n] == up[0][0]).all())
    assert period % 2 and 66 * period <= 10_100
    for layer, rows in enumerate(up):
        np.testing.assert_array_equal(rows[period:], rows[:-period])
        np.testing.assert_array_equal(rows[:50], up[0][7 * layer :][:50])
    values = dequantize(up[0], Type.IQ2_XXS)
    assert abs(values.std() * 16 - 1) < 0.1
    ids = checkpoint.file.array("blk.0.ffn_gate_tid2eid.weight")
    assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_shapes():
    assert synthetic.synthetic_config({"n_experts": 32}).n_experts == 32
    with pytest.raises(ConfigError, match="synthetic shape: found 'huge', expected one of base, odd"):
        synthetic.synthetic_config("huge")
    with pytest.raises(ConfigError, match="layers: found 6, expected 1 to 5"):
        synthetic.first_layers(BASE, 6)
