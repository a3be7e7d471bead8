"""A DSpark drafter's own file: the same in each of its dialects, and nothing else is taken for it."""

import dataclasses
import re

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from ds4jax.config import DrafterConfig
from ds4jax.errors import Ds4Error
from ds4jax.io.checkpoint import Checkpoint, open_checkpoint, open_mtp
from ds4jax.io.drafter import open_drafter, with_drafter
from ds4jax.io.synthetic import RECIPES, random_data, storage_type, synthetic_config, write_synthetic
from ds4jax.model.tensors import drafter_table, mtp_table

CFG = synthetic_config(
    {
        "n_layers": 4,
        "compress_ratios": (0, 4, 128, 4),
        "swiglu_clamp": (10.0,) * 4,
        "n_hash_layers": 1,
        "vocab_size": 384,
        "n_heads": 2,
        "head_dim": 64,
        "rope_dim": 32,
        "q_lora_rank": 64,
        "o_lora_rank": 32,
        "index_heads": 2,
        "index_head_dim": 32,
        "n_experts": 3,
        "n_streams": 2,
    }
)
DRAFTER = DrafterConfig(stages=3, block_size=5, markov_rank=32, noise_token=370, target_layers=(1, 2, 3))
TABLE = drafter_table(CFG, DRAFTER)
LEAVES = [
    "main_proj", "main_norm", "norm", "hc_head_fn", "hc_head_base", "hc_head_scale", "markov_head.markov_w1",
    "markov_head.markov_w2", "confidence_head.proj",
]  # fmt: skip
NAMES = {
    "b": ["main_proj", "main_norm", "norm", "hc_head_fn", "hc_head_base", "hc_head_scale", "markov_w1", "markov_w2",
          "conf_proj"],
    "c": ["fc", "enc.output_norm", "output_norm", "output_hc_fn", "output_hc_base", "output_hc_scale", "markov_w1",
          "markov_w2", "conf_proj"],
}  # fmt: skip
U32 = GGUFValueType.UINT32
METADATA = {
    "a": {"general.architecture": "deepseek4-dspark", "dspark.stage_count": 3, "dspark.block_size": 5,
          "dspark.markov_rank": 32, "dspark.noise_token_id": 370, "dspark.target_layer_ids": [1, 2, 3]},
    "b": {"general.architecture": "deepseek4-dspark", "deepseek4.dspark.layer_count": 3,
          "deepseek4.dspark.block_size": 5, "deepseek4.dspark.markov_rank": 32, "deepseek4.dspark.expert_count": 3,
          "deepseek4.dspark.noise_token_id": 370, "deepseek4.dspark.target_layers": [1, 2, 3]},
    "c": {"general.architecture": "dflash", "dflash.block_count": 3, "dflash.block_size": 5,
          "dflash.target_layers": [2, 3, 4], "dflash.embedding_length": 256, "dflash.vocab_size": 384,
          "dflash.attention.head_count": 2, "dflash.attention.sliding_window": 128, "dflash.hash_layer_count": 0,
          "dflash.attention.compress_ratios": [0, 0, 0], "tokenizer.ggml.mask_token_id": 370},
}  # fmt: skip


def renamed(name: str, dialect: str) -> str:
    """A tensor's name, which is dialect A's, in another dialect."""
    if dialect == "a":
        return name
    _, stage, leaf = name.removesuffix(".weight").split(".", 2)
    if leaf in LEAVES:
        return ("dspark." if dialect == "b" else "") + NAMES[dialect][LEAVES.index(leaf)] + ".weight"
    return {"b": "dspark", "c": "blk"}[dialect] + name.removeprefix("mtp")


DATA = {
    spec.name: (random_data(CFG, 1, spec, storage_type(spec, RECIPES["q2"])), storage_type(spec, RECIPES["q2"]), spec)
    for spec in TABLE
}


def write(path, metadata, tensors):
    """By the `gguf` package. tensors: name → (bytes, type, spec)."""
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=GGUFValueType.get_type(value[0]))
        elif key != "general.architecture":
            writer.add_key_value(key, value, U32 if type(value) is int else GGUFValueType.get_type(value))
    for name, (data, qtype, spec) in tensors.items():
        if qtype in (Type.F32, Type.F16):
            data = data.view(np.float32 if qtype == Type.F32 else np.float16).reshape(spec.shape)
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(dialect):
    return {renamed(name, dialect): data for name, data in DATA.items()}


@pytest.fixture(scope="module")
def main(tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("main") / "main.gguf"
    write_synthetic(path, CFG, 0, RECIPES["q8"])
    return open_checkpoint(path)


def fails(*messages):
    """Expects a Ds4Error of one line that contains all of these."""
    return pytest.raises(Ds4Error, match="^" + "".join(f"(?=[^\n]*{re.escape(m)})" for m in messages) + "[^\n]*$")


# ---- the dialects ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", ["a", "b", "c"])
def test_all_tensors_of_every_dialect(main, tmp_path, dialect):
    path = write(tmp_path / "d.gguf", METADATA[dialect], tensors(dialect))
    assert len(GGUFReader(path).tensors) == 81
    found = open_drafter(path, main)
    assert found.cfg == DRAFTER
    assert found.types == {name: qtype for name, (_, qtype, _) in DATA.items()} and len(found.types) == 81
    for name, (data, _, spec) in DATA.items():
        assert found.file.info(name).shape == spec.shape
        assert found.file.raw(name).tobytes() == data.tobytes(), name


def test_the_families_of_the_table():
    """Each stage has what a block has, once; the rest is of the first and the last stage."""
    stages = {spec.role for spec in TABLE if spec.layer == 0}
    assert len(stages) == 24 and stages == {s.role for s in mtp_table(CFG, "mtp") if s.layer is not None}
    assert len({(spec.family, spec.layer) for spec in TABLE}) == 81
    assert {spec.name.split(".")[1] for spec in TABLE if spec.layer is None} == {"0", "2"}
    assert [spec.shape for spec in TABLE if spec.role == "main_proj"] == [(256, 3 * 256)]


def test_names_without_suffix_and_a_vector_for_the_confidence(main, tmp_path):
    held = {name.rpartition(".")[0]: value for name, value in tensors("c").items()}
    values = np.arange(288, dtype=np.float32)
    held["conf_proj"] = values.view(np.uint8), Type.F32, dataclasses.replace(TABLE[-1], shape=(288,))
    found = open_drafter(write(tmp_path / "d.gguf", METADATA["c"], held), main)
    np.testing.assert_array_equal(found.file.array("mtp.2.confidence_head.proj.weight"), values[None])


@pytest.mark.parametrize("start", ["dspark.", "deepseek4.dspark.", "deepseek4.dspark_"])
def test_keys_of_ds4_in_any_spelling(main, tmp_path, start):
    metadata = {key.replace("dspark.", start): value for key, value in METADATA["a"].items()}
    assert open_drafter(write(tmp_path / "d.gguf", metadata, DATA), main).cfg == DRAFTER


def test_keys_that_ds4_leaves_out(main, tmp_path):
    """The last layers are read, and the rest is the published drafter's; its noise is no token of a small model."""
    cfg = dataclasses.replace(CFG, vocab_size=129280)
    specs = drafter_table(cfg, dataclasses.replace(DRAFTER, markov_rank=1))
    held = {
        spec.name: (np.zeros((*spec.shape[:-1], 2 * spec.shape[-1]), np.uint8), Type.F16, spec)
        if spec.kind == "matrix"
        else (np.zeros((*spec.shape[:-1], 4 * spec.shape[-1]), np.uint8), Type.F32, spec)
        for spec in specs
    }
    path = write(tmp_path / "d.gguf", {"general.architecture": "deepseek4-dspark"}, held)
    large = dataclasses.replace(main, cfg=cfg)
    assert open_drafter(path, large).cfg == DrafterConfig(3, 5, 1, 128799, (1, 2, 3))
    cfg = dataclasses.replace(cfg, n_layers=2, compress_ratios=(0, 4), swiglu_clamp=(10.0,) * 2)
    with fails("tensor 'mtp.0.main_proj.weight': found shape (256, 768), expected (256, 512)"):
        open_drafter(path, dataclasses.replace(main, cfg=cfg))


# ---- refusals --------------------------------------------------------------------------------------------------------
def change(metadata, held, changes):
    """Changes of keys and tensors: a value, another name, or None for nothing."""
    for what, value in changes.items():
        if what in held:
            moved = held.pop(what)
            if isinstance(value, str):
                held[value] = moved
            elif value is not None:
                held[what] = value
        elif value is None:
            del metadata[what]
        else:
            metadata[what] = value


def blank(*shape):
    spec = dataclasses.replace(TABLE[0], shape=shape)
    return np.zeros((*shape[:-1], 4 * shape[-1]), np.uint8), Type.F32, spec


ARCH = "general.architecture"
BAD = [
    ("a", {ARCH: "deepseek41-dspark"}, ["found 'deepseek41-dspark'", "the drafter of DeepSeek-V4.1, another arch"]),
    ("a", {ARCH: "qwen3"}, ["key 'general.architecture': found 'qwen3', expected 'deepseek4-dspark' or 'dflash'"]),
    ("a", {ARCH: "deepseek4_mtp_support"}, ["the MTP head of the first release"]),
    ("a", {"mtp.0.main_proj.weight": "mtp.0.e_proj.weight"}, ["'mtp.0.e_proj.weight': found the MTP head of the fir"]),
    ("c", {"fc.weight": "x"}, ["found none of the tensors mtp.0.main_proj.weight, dspark.main_proj.weight, fc.weight"]),
    ("c", {"markov_w1.weight": None}, ["found no tensor markov_w1.weight or no", "other drafters"]),
    ("c", {"blk.0.attn_q_a.weight": "blk.0.attn_q.weight"}, ["found no tensor markov_w1.weight or no"]),
    ("b", {"dspark.main_norm.weight": blank(128)}, ["'dspark.main_norm.weight': found 128 values", "another model"]),
    ("c", {"markov_w1.weight": blank(400, 32)}, ["'markov_w1.weight': found 400 tokens, expected 384", "another mo"]),
    ("a", {"mtp.2.hc_head_base.weight": blank(4)}, ["'mtp.2.hc_head_base.weight': found 4 streams, expected 2"]),
    ("a", {"mtp.1.ffn_up_shexp.weight": None}, ["tensor 'mtp.1.ffn_up_shexp.weight': not found, expected shape"]),
    ("b", {"dspark.1.ffn_up_shexp.weight": None}, ["tensor 'mtp.1.ffn_up_shexp.weight': not found, expected shape"]),
    ("c", {"blk.2.attn_norm.weight": "blk.2.other.weight"}, ["tensor 'mtp.2.attn_norm.weight': not found"]),
    ("c", {"more": blank(3)}, ["1 tensors that belong to no known part of the model: 'more'"]),
    ("c", {"mtp.0.attn_q_a.weight": blank(3)}, ["found tensors of the same meaning under two names"]),
    ("a", {"dspark.target_layer_ids": [1, 3, 2]}, ["'dspark.target_layer_ids': found [1, 3, 2], expected rising num"]),
    ("a", {"dspark.target_layer_ids": [1, 1, 2]}, ["found [1, 1, 2], expected rising numbers"]),
    ("b", {"deepseek4.dspark.target_layers": [2, 3, 4]}, ["found [2, 3, 4]", "expected rising", "from 0 to 3"]),
    ("c", {"dflash.target_layers": [3, 4, 5]}, ["'dflash.target_layers, less 1': found [2, 3, 4], expected rising"]),
    ("c", {"dflash.target_layers": [0, 1, 2]}, ["'dflash.target_layers, less 1': found [-1, 0, 1], expected rising"]),
    ("a", {"dspark.target_layer_ids": [2, 3]}, ["'mtp.0.main_proj.weight': found shape (256, 768), expected (256, 51"]),
    ("b", {"deepseek4.dspark.target_layers": None}, ["key 'dspark.target_layer_ids': found nothing, expected an arr"]),
    ("a", {"dspark.stage_count": 2}, ["key 'dspark.stage_count': found 2, expected 3, as there are tensors"]),
    ("a", {"deepseek4.dspark.block_size": 7}, ["'deepseek4.dspark.block_size': found 7, expected 5, as 'dspark.blo"]),
    ("a", {"dspark.block_size": 1}, ["key 'dspark.block_size': found 1, expected an integer from 2 to 64"]),
    ("a", {"dspark.markov_rank": 16}, ["markov_w1.weight': found shape (384, 32), expected (384, 16)"]),
    ("a", {"dspark.noise_token_id": 384}, ["key 'dspark.noise_token_id': found 384, expected an integer from 0 to"]),
    ("c", {"tokenizer.ggml.mask_token_id": None}, ["key 'tokenizer.ggml.mask_token_id': found nothing"]),
    ("b", {"deepseek4.dspark.expert_count": 256}, ["'deepseek4.dspark.expert_count': found 256, expected 3"]),
    ("c", {"dflash.vocab_size": 400}, ["key 'dflash.vocab_size': found 400, expected 384, the main model's"]),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "changes", "messages"), BAD, ids=range(len(BAD)))
def test_what_is_no_drafter_of_this_model(main, tmp_path, dialect, changes, messages):
    metadata, held = dict(METADATA[dialect]), tensors(dialect)
    for name, value in changes.items():
        if isinstance(value, tuple):
            held[name] = value
        else:
            change(metadata, held, {name: value})
    path = write(tmp_path / "d.gguf", metadata, held)
    with fails(f"{path}: ", *messages):
        open_drafter(path, main)


@pytest.mark.parametrize(
    ("key", "mains"),
    [
        ("dspark.source.revision", "general.source.revision"),
        ("general.source.revision", "general.source.revision"),
        ("deepseek4.checkpoint_variant", "deepseek4.checkpoint_variant"),
        ("general.base_model.0.version", "general.base_model.0.version"),
    ],
)
def test_a_drafter_of_another_source(main, tmp_path, monkeypatch, key, mains):
    path = write(tmp_path / "d.gguf", METADATA["a"] | {key: "7872f01b"}, DATA)
    assert open_drafter(path, main).cfg == DRAFTER  # the model says nothing
    monkeypatch.setitem(main.file.metadata, mains, "7872f01b")
    assert open_drafter(path, main).cfg == DRAFTER
    monkeypatch.setitem(main.file.metadata, mains, "0a1b2c3d")
    with fails("found '7872f01b', expected '0a1b2c3d', as ", "says of itself"):
        open_drafter(path, main)


@pytest.mark.parametrize("dialect", ["a", "b", "c"])
def test_a_drafter_is_no_model_and_no_mtp_head(main, tmp_path, dialect):
    path = write(tmp_path / "d.gguf", METADATA[dialect], tensors(dialect))
    with fails(f"{path}: ", "found a DSpark drafter, expected the main model that it must accompany"):
        open_checkpoint(path)
    with fails(f"{path}: key 'general.architecture': found ", "a DSpark drafter" if dialect != "c" else "a drafter"):
        open_mtp(path, CFG)


# ---- which drafter a model gets --------------------------------------------------------------------------------------
def test_the_drafter_beside_a_model_is_found_or_one_is_named(main, tmp_path):
    path = tmp_path / "m.gguf"
    for draft in ("off", "auto"):
        assert with_drafter(main, draft, path) is main
    beside = write(tmp_path / "m-dspark.gguf", METADATA["a"], DATA)
    assert with_drafter(main, "off", path) is main
    for draft, where in (("auto", path), (str(beside), tmp_path / "other.gguf")):
        found = with_drafter(main, draft, where)
        assert found.drafter and found.drafter.file.path == beside
        assert found.cfg == dataclasses.replace(main.cfg, drafter=DRAFTER)
        assert found.drafter_types == found.drafter.types and found.types == main.types
    with pytest.raises(Ds4Error, match="draft: found 'no.gguf', expected a GGUF file, auto or off"):
        with_drafter(main, "no.gguf", path)


def test_an_mtp_head_in_its_own_file_drafts_too_and_one_beside_another_is_refused(main, tmp_path):
    table = mtp_table(dataclasses.replace(CFG, n_mtp=1), "mtp")
    held = {
        s.name: (random_data(CFG, 1, s, storage_type(s, RECIPES["q8"])), storage_type(s, RECIPES["q8"]), s)
        for s in table
    }
    path = write(tmp_path / "mtp.gguf", {"general.architecture": "deepseek4_mtp_support"}, held)
    found = with_drafter(main, str(path))
    assert found.mtp_file and found.cfg == dataclasses.replace(main.cfg, n_mtp=1)
    with fails("mtp.gguf", "found a second MTP head"):
        with_drafter(found, str(path))


@pytest.mark.parametrize("draft", ["auto", "FILE"])
def test_a_drafter_that_does_not_fit_is_refused_and_not_passed_over(main, tmp_path, draft):
    path = write(tmp_path / "m-dspark.gguf", METADATA["a"] | {"dspark.target_layer_ids": [1, 2, 9]}, DATA)
    with fails("m-dspark.gguf", "dspark.target_layer_ids", "from 0 to 3"):
        with_drafter(main, str(path) if draft == "FILE" else draft, tmp_path / "m.gguf")
