"""The converter: values, names, resumption, refusals. The checkpoints are made by `hf_checkpoint`."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import deepseek_reference as reference
import hf_checkpoint
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from hf_checkpoint import CFG

from ds4jax.__main__ import main
from ds4jax.config import ModelConfig
from ds4jax.errors import Ds4Error
from ds4jax.io import convert as tool
from ds4jax.io import hf, recipes
from ds4jax.io.checkpoint import open_checkpoint, open_mtp
from ds4jax.io.convert import convert
from ds4jax.io.imatrix import Entry, Imatrix
from ds4jax.io.tokenizer import Tokenizer, byte_tokenizer
from ds4jax.model.tensors import tensor_table
from ds4jax.tools.convert import FLAGS

RECIPES = recipes.RECIPES

# Names in the GGUF file → DeepSeek's, within a block.
OFFICIAL = {
    "attn_norm.weight": "attn_norm.weight",
    "attn_q_a.weight": "attn.wq_a.weight",
    "attn_q_a_norm.weight": "attn.q_norm.weight",
    "attn_q_b.weight": "attn.wq_b.weight",
    "attn_kv.weight": "attn.wkv.weight",
    "attn_kv_a_norm.weight": "attn.kv_norm.weight",
    "attn_sinks.weight": "attn.attn_sink",
    "attn_output_a.weight": "attn.wo_a.weight",
    "attn_output_b.weight": "attn.wo_b.weight",
    "indexer.attn_q_b.weight": "attn.indexer.wq_b.weight",
    "indexer.proj.weight": "attn.indexer.weights_proj.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate_inp.weight": "ffn.gate.weight",
    "exp_probs_b.bias": "ffn.gate.bias",
    "ffn_gate_tid2eid.weight": "ffn.gate.tid2eid",
    "ffn_gate_shexp.weight": "ffn.shared_experts.w1.weight",
    "ffn_up_shexp.weight": "ffn.shared_experts.w3.weight",
    "ffn_down_shexp.weight": "ffn.shared_experts.w2.weight",
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "norm.weight": "norm.weight",
    "e_proj.weight": "e_proj.weight",
    "h_proj.weight": "h_proj.weight",
    "main_proj.weight": "main_proj.weight",
    "main_norm.weight": "main_norm.weight",
    "markov_head.markov_w1.weight": "markov_head.markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_head.markov_w2.weight",
    "confidence_head.proj.weight": "confidence_head.proj.weight",
}
for _hc in ("hc_attn", "hc_ffn", "hc_head"):
    OFFICIAL |= {f"{_hc}_{leaf}.weight": f"{_hc}_{leaf}" for leaf in ("fn", "base", "scale")}
for _ours, _theirs in (("attn_compressor", "attn.compressor"), ("indexer_compressor", "attn.indexer.compressor")):
    OFFICIAL |= {
        f"{_ours}_kv.weight": f"{_theirs}.wkv.weight",
        f"{_ours}_gate.weight": f"{_theirs}.wgate.weight",
        f"{_ours}_ape.weight": f"{_theirs}.ape",
        f"{_ours}_norm.weight": f"{_theirs}.norm.weight",
    }
TOP = {
    "token_embd.weight": "embed.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
    "output_hc_fn.weight": "hc_head_fn",
    "output_hc_base.weight": "hc_head_base",
    "output_hc_scale.weight": "hc_head_scale",
}
EXPERTS = {"ffn_gate_exps.weight": "w1", "ffn_up_exps.weight": "w3", "ffn_down_exps.weight": "w2"}


def expected(name: str, values: dict[str, np.ndarray]) -> np.ndarray:
    """The values of a tensor of the GGUF file, from the checkpoint's."""
    if name in TOP:
        return values[TOP[name]]
    block, number, rest = name.split(".", 2)
    prefix = f"mtp.{number}" if block == "mtp" else f"layers.{number}"
    if rest in EXPERTS:
        return np.stack([values[f"{prefix}.ffn.experts.{e}.{EXPERTS[rest]}.weight"] for e in range(CFG.n_experts)])
    return values[f"{prefix}.{OFFICIAL[rest]}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind → its folder, written when first asked for."""
    root, have = tmp_path_factory.mktemp("checkpoints"), {}

    def get(kind: str):
        if kind not in have:
            have[kind] = root / kind
            hf_checkpoint.files(kind.removesuffix("+mtp"), kind.endswith("+mtp")).write(have[kind])
        return have[kind]

    return get


@pytest.fixture(scope="module")
def f16(folders, tmp_path_factory):
    """The official checkpoint, converted without interruption."""
    path = tmp_path_factory.mktemp("f16") / "whole.gguf"
    convert(folders("official"), path, RECIPES["f16"])
    return path


def as_stored(cfg: ModelConfig) -> ModelConfig:
    """GGUF stores float32."""
    return dataclasses.replace(cfg, hc_eps=float(np.float32(cfg.hc_eps)), norm_eps=float(np.float32(cfg.norm_eps)))


def no_leftovers(folder) -> bool:
    return not [p for p in folder.iterdir() if "partial" in p.name]


# ---- values ----------------------------------------------------------------------------------------------------------
def test_every_value_of_every_naming(folders, tmp_path):
    values = hf_checkpoint.official(mtp=True).values
    digests = {}
    for kind in ("official+mtp", "official", "transformers", "transformers-bf16", "saved"):
        out = tmp_path / f"{kind}.gguf"
        convert(folders(kind), out, RECIPES["f32"])
        with open_checkpoint(out).file as file:
            digests[kind] = hashlib.sha256(out.read_bytes()).hexdigest()
            if kind in ("official+mtp", "official"):  # the others must be the same file
                for name, info in file.tensors.items():
                    assert info.type == (Type.I32 if "tid2eid" in name else Type.F32)
                    np.testing.assert_array_equal(file.array(name), expected(name, values), err_msg=name)
    assert len({digests[kind] for kind in digests if kind != "official+mtp"}) == 1
    assert no_leftovers(tmp_path)


# Root mean square error over the root mean square, of what a good quantizer makes of these weights.
ERRORS = {Type.F16: 3e-4, Type.Q8_0: 8e-3, Type.Q4_K: 0.09, Type.Q2_K: 0.36, Type.IQ2_XXS: 0.42}


@pytest.mark.parametrize("recipe", ["q2", "q4"])
def test_published_recipes(folders, tmp_path, recipe):
    values = hf_checkpoint.official(mtp=True).values
    convert(folders("official+mtp"), tmp_path / "m.gguf", RECIPES[recipe])
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.cfg == as_stored(dataclasses.replace(CFG, n_mtp=1))
    types = checkpoint.types
    assert types["blk.1.ffn_up_exps.weight"] == (Type.IQ2_XXS if recipe == "q2" else Type.Q4_K)
    assert types["blk.2.ffn_down_exps.weight"] == (Type.Q2_K if recipe == "q2" else Type.Q4_K)
    assert types["mtp.0.ffn_gate_exps.weight"] == Type.Q4_K
    assert types["output.weight"] == types["blk.0.attn_output_a.weight"] == types["mtp.0.e_proj.weight"] == Type.Q8_0
    assert types["token_embd.weight"] == types["blk.1.indexer.attn_q_b.weight"] == Type.F16
    for name, qtype in types.items():
        raw, want = checkpoint.file.raw(name), expected(name, values)
        if qtype in (Type.F32, Type.I32):
            np.testing.assert_array_equal(checkpoint.file.array(name), want, err_msg=name)
            continue
        if qtype in (Type.F16, Type.Q8_0):  # rounding to nearest leaves no choice
            np.testing.assert_array_equal(raw, quantize(want, qtype).view(np.uint8).reshape(raw.shape), err_msg=name)
        found = dequantize(raw, qtype).reshape(want.shape)
        error = np.sqrt(np.mean((found - want) ** 2) / np.mean(want**2))
        assert error < ERRORS[qtype], name


def test_experts_as_mxfp4_lose_nothing(folders, tmp_path):
    values = hf_checkpoint.official().values
    types = recipes.parse_types(["ffn.experts=mxfp4", "ffn.experts.down=F32", "embed=Q4_K"])
    convert(folders("official"), tmp_path / "m.gguf", RECIPES["f16"], types)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.types["blk.0.ffn_down_exps.weight"] == Type.F32
    assert checkpoint.types["token_embd.weight"] == Type.Q4_K
    for layer in range(CFG.n_layers):
        name = f"blk.{layer}.ffn_up_exps.weight"
        found = dequantize(checkpoint.file.raw(name), Type.MXFP4)
        np.testing.assert_array_equal(found, expected(name, values))


def test_slabs_do_not_show(folders, tmp_path, monkeypatch, f16):
    monkeypatch.setattr(tool, "SLAB", 30_000)  # 117 rows: no multiple of the scales' blocks
    convert(folders("official"), tmp_path / "m.gguf", RECIPES["f16"])
    assert (tmp_path / "m.gguf").read_bytes() == f16.read_bytes()


def test_mtp(folders, tmp_path, f16):
    source = folders("official+mtp")
    convert(source, tmp_path / "skip.gguf", RECIPES["f16"], draft="skip")
    assert (tmp_path / "skip.gguf").read_bytes() == f16.read_bytes()
    convert(source, tmp_path / "only.gguf", RECIPES["q4"], draft="only")
    head = open_mtp(tmp_path / "only.gguf", CFG)
    assert head.types["mtp.0.ffn_up_exps.weight"] == Type.Q4_K
    want = hf_checkpoint.official(mtp=True).values["mtp.0.norm.weight"]
    np.testing.assert_array_equal(head.file.array("mtp.0.norm.weight"), want)
    with pytest.raises(Ds4Error, match=r"found no tensor mtp\.0\.\*"):
        convert(folders("official"), tmp_path / "none.gguf", RECIPES["q4"], draft="only")


def test_tokenizer_and_config_arrive(f16):
    checkpoint = open_checkpoint(f16)
    assert checkpoint.cfg == as_stored(CFG)
    tokenizer, ours = Tokenizer.from_metadata(checkpoint.file.metadata), byte_tokenizer()
    assert tokenizer.tokens == [*ours.tokens, *(f"[PAD{i}]" for i in range(384, 390))]
    assert tokenizer.encode_raw("def f(x): return 1") == ours.encode_text("def f(x): return 1")  # add_bos is false
    assert [tokenizer.special(s) for s in ("user", "think_open")] == [ours.special(s) for s in ("user", "think_open")]
    assert checkpoint.file.metadata["tokenizer.ggml.token_type"][385] == 5  # unused


# ---- importances -----------------------------------------------------------------------------------------------------
def importances(rng) -> Imatrix:
    entries = {}
    for spec in tensor_table(CFG):
        if spec.family.startswith("ffn.experts."):
            sums = rng.exponential(size=(CFG.n_experts, spec.shape[-1])) ** 4
            entries[spec.name] = Entry(sums, np.array([3.0, 0, 5]))
    return Imatrix(entries, ["text"], 4, 512)


def test_importances_weigh_the_errors(folders, tmp_path):
    matrix = importances(np.random.default_rng(1))
    matrix.write(tmp_path / "i.gguf")
    for name, path in (("plain", None), ("weighed", tmp_path / "i.gguf")):
        convert(folders("official"), tmp_path / f"{name}.gguf", RECIPES["f16"], {"ffn.experts": Type.Q2_K}, path)
    values = hf_checkpoint.official().values
    plain, weighed = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("plain", "weighed"))
    assert weighed.file.metadata["quantize.imatrix.entries_count"] == 9
    assert weighed.file.metadata["quantize.imatrix.chunks_count"] == 4
    for name, qtype in plain.types.items():
        if name not in matrix.entries:
            assert plain.file.raw(name).tobytes() == weighed.file.raw(name).tobytes()
            continue
        want, weights = expected(name, values), matrix.entries[name].means()
        before, after = (
            np.einsum("eoi,ei->e", (dequantize(c.file.raw(name), qtype).reshape(want.shape) - want) ** 2, weights)
            for c in (plain, weighed)
        )
        assert after[1] == before[1]  # this expert saw no token: all columns alike
        assert (after[[0, 2]] < 0.9 * before[[0, 2]]).all(), name


def test_importances_of_another_model_are_refused(folders, tmp_path):
    matrix = importances(np.random.default_rng(1))
    entry = matrix.entries.pop("blk.1.ffn_up_exps.weight")
    for entries, message in (
        (
            {"blk.1.ffn_up_exps.weight": Entry(entry.sums[:, :128], entry.counts)},
            r"ffn_up_exps.*\(3, 128\), expected \(3, 256\)",
        ),
        ({"blk.7.ffn_up_exps.weight": entry}, "found sums for none of the tensors"),
    ):
        Imatrix(entries, ["text"], 4, 512).write(tmp_path / "i.gguf")
        with pytest.raises(Ds4Error, match=message):
            convert(folders("official"), tmp_path / "m.gguf", RECIPES["q2"], imatrix=tmp_path / "i.gguf")
    assert no_leftovers(tmp_path)


# ---- resumption ------------------------------------------------------------------------------------------------------
KILLED = """
import os, random, signal, sys
from ds4jax.io import convert, recipes

source, out, seed = sys.argv[1:]
rng, real = random.Random(int(seed)), {name: getattr(os, name) for name in ("pwrite", "ftruncate", "fsync", "replace")}

def run_and_die(countdown):
    def guarded(name):
        def call(*args):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                if name == "pwrite" and rng.random() < 0.5:
                    args = (args[0], args[1][: len(args[1]) // 2], args[2])
                if rng.random() < 0.8:
                    real[name](*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args)
        return call
    for name in real:
        setattr(os, name, guarded(name))
    convert.convert(source, out, recipes.RECIPES["f16"])

kills = 0
while not os.path.exists(out):
    countdown = rng.choice([rng.randint(1, 3), rng.randint(4, 90)])
    rng.seed(rng.random())
    if (child := os.fork()) == 0:
        run_and_die(countdown)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    kills += status == signal.SIGKILL
print(kills)
"""


def test_killed_at_any_moment_the_bytes_are_the_same(folders, tmp_path, f16):
    command = [sys.executable, "-c", KILLED, folders("official"), tmp_path / "m.gguf", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 3
    assert (tmp_path / "m.gguf").read_bytes() == f16.read_bytes()


class Stop(Exception):
    pass


@contextlib.contextmanager
def stopping_at(name: str, monkeypatch):
    """Conversions fail when they come to tensor `name`."""
    real = tool._pieces

    def pieces(opened, spec, qtype, entry):
        if spec.name == name:
            raise Stop
        return real(opened, spec, qtype, entry)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(tool, "_pieces", pieces)
        yield


def begin(folders, tmp_path, monkeypatch):
    """Half a file; → the path of the whole."""
    out = tmp_path / "m.gguf"
    with stopping_at("blk.1.ffn_up_exps.weight", monkeypatch):
        convert(folders("official"), out, RECIPES["f16"])
    assert not out.exists()
    return out


def test_only_what_is_missing_is_done_again(folders, tmp_path, monkeypatch, f16):
    out = begin(folders, tmp_path, monkeypatch)
    made, real = [], tool._pieces
    monkeypatch.setattr(tool, "_pieces", lambda *args: made.append(args[1].name) or real(*args))
    convert(folders("official"), out, RECIPES["f16"])
    names = [spec.name for spec in tensor_table(CFG)]
    assert made == names[names.index("blk.1.ffn_up_exps.weight") :]
    assert out.read_bytes() == f16.read_bytes()
    assert no_leftovers(tmp_path)


def test_damaged_parts_are_done_again(folders, tmp_path, monkeypatch, f16):
    with open_checkpoint(f16).file as file:
        at = file.info("blk.0.ffn_norm.weight").offset
    for damage in ("tensor", "header", "journal"):
        out = begin(folders, tmp_path, monkeypatch)
        partial = tmp_path / "m.gguf.partial"
        if damage == "journal":
            journal = tmp_path / "m.gguf.partial.json"
            journal.write_bytes(journal.read_bytes()[:-7])
        else:
            data = bytearray(partial.read_bytes())
            data[at if damage == "tensor" else 30] ^= 1
            partial.write_bytes(data)
        convert(folders("official"), out, RECIPES["f16"])
        assert out.read_bytes() == f16.read_bytes()
        out.unlink()


def test_other_inputs_are_refused(folders, tmp_path, monkeypatch, f16):
    out = begin(folders, tmp_path, monkeypatch)
    importances(np.random.default_rng(0)).write(tmp_path / "i.gguf")
    source = tmp_path / "copy"
    shutil.copytree(folders("official"), source)
    for recipe, imatrix, message in (
        ("q8", None, "begun with other config, tokenizer or types; give"),
        ("f16", tmp_path / "i.gguf", "begun with other .*importances; give"),
    ):
        with pytest.raises(Ds4Error, match=message):
            convert(folders("official"), out, RECIPES[recipe], imatrix=imatrix)
    os.utime(source / "model-00002-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(Ds4Error, match=r"m\.gguf\.partial: was begun with other weights; give .* or --restart"):
        convert(source, out, RECIPES["f16"])
    convert(source, out, RECIPES["f16"], restart=True)
    assert out.read_bytes() == f16.read_bytes()
    with pytest.raises(Ds4Error, match=r"m\.gguf: exists already"):
        convert(source, out, RECIPES["f16"])


def test_two_at_once_are_refused(folders, tmp_path, monkeypatch):
    out = begin(folders, tmp_path, monkeypatch)
    plan = tool.gguf.layout({}, [])
    with tool.Partial(out, plan, {}, restart=True):
        with pytest.raises(Ds4Error, match="another process is writing this file"):
            convert(folders("official"), out, RECIPES["f16"])


def test_a_full_disk(folders, tmp_path, monkeypatch, f16):
    real, room = os.pwrite, iter(range(40))

    def pwrite(*args):
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(
            Ds4Error, match=r"m\.gguf\.partial: cannot be written: No space left on device; the same co"
        ):
            convert(folders("official"), tmp_path / "m.gguf", RECIPES["f16"])
    convert(folders("official"), tmp_path / "m.gguf", RECIPES["f16"])
    assert (tmp_path / "m.gguf").read_bytes() == f16.read_bytes()


def test_no_room(folders, tmp_path, monkeypatch):
    with pytest.raises(Ds4Error, match="No such file or directory, expected a folder for the new file"):
        convert(folders("official"), tmp_path / "none" / "m.gguf", RECIPES["f16"])
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2**30))
    with pytest.raises(Ds4Error, match=r"found 1\.0 GiB free, expected 0\.0 GiB for the file and 1 GiB to spare"):
        convert(folders("official"), tmp_path / "m.gguf", RECIPES["f16"])


# ---- refusals --------------------------------------------------------------------------------------------------------
FILES = hf_checkpoint.files("official", mtp=True)


def f32(*shape):
    return "F32", shape, np.zeros(shape, "<f4").tobytes()


def without(*names):
    return lambda files: [files.stored.pop(name) for name in names]


def put(**tensors):
    return lambda files: files.stored.update(tensors)


def changed(name, at, byte):
    def change(files):
        dtype, shape, data = files.stored[name]
        data = bytearray(data)
        data[at] = byte
        files.stored[name] = dtype, shape, bytes(data)

    return change


def config(**values):
    return lambda files: files.json["config.json"].update(values)


def tokenizer(change):
    return lambda files: change(files.json["tokenizer.json"], files.json["tokenizer_config.json"])


BAD = [
    (without("layers.1.attn.wkv.weight"),
     r"no tensor 'layers\.1\.attn\.wkv\.weight' or 'layers\.1\.self_attn\.kv_proj\.weight', .*\(64, 256\)"),
    (without("layers.0.ffn.experts.2.w3.weight"), r"no tensor 'layers\.0\.ffn\.experts\.2\.w3\.weight', expected sh"),
    (without("layers.0.ffn.experts.2.w3.scale"), r"found no tensor 'layers\.0\.ffn\.experts\.2\.w3\.scale'"),
    (without("layers.2.attn.wo_a.scale"), r"no tensor 'layers\.2\.attn\.wo_a\.scale' or '.*wo_a\.weight_scale_inv'"),
    (without("mtp.0.h_proj.weight"), r"no tensor 'mtp\.0\.h_proj\.weight', .*\(--draft skip leaves head or"),
    (put(**{"norm.weight": f32(5)}), r"'norm\.weight': found F32 of shape \(5,\), expected .* of shape \(256,\)"),
    (put(**{"layers.1.ffn.gate.bias": ("I64", (3,), bytes(24))}), r"gate\.bias': found I64 of shape \(3,\), expected"),
    (put(**{"layers.1.attn.wkv.scale": f32(1, 1)}), r"wkv\.scale': found F32 of shape \(1, 1\), expected .* \(1, 2\)"),
    (put(**{"layers.1.attn.wkv.weight": ("F8_E5M2", (64, 256), bytes(64 * 256))}), r"wkv\.weight': found F8_E5M2"),
    (put(**{"layers.0.attn.extra": f32(2)}), r"1 tensors that belong to no known part .*: 'layers\.0\.attn\.extra'"),
    (put(**{"model.norm.weight": f32(256)}), r"found both 'norm\.weight' and 'model\.norm\.weight', expected one"),
    (put(**{"model.embed_tokens.weight": f32(390, 256)}), r"found both 'embed\.weight' and 'embed_tokens\.weight'"),
    (changed("layers.0.ffn.gate.tid2eid", 8, 3), r"tid2eid': found 3, expected experts 0 to 2"),
    (changed("layers.1.attn.wkv.weight", 3, 127), r"tensor 'blk\.1\.attn_kv\.weight': F16: 1 of 16384 weights"),
    (changed("layers.2.ffn.experts.1.w2.scale", 0, 255), r"tensor 'blk\.2\.ffn_down_exps\.weight': F16: 32 of 65536"),
    (changed("norm.weight", 1, 127), r"'norm\.weight': found .*, expected finite numbers"),
    (config(quantization_config={}), r"config\.json: key 'quantization_config\.weight_block_size': found None"),
    (config(hc_mult="4"), r"config\.json: key 'hc_mult': found '4', expected an integer from 1 to 64"),
    (tokenizer(lambda t, c: t["added_tokens"][0].update(id=390)),
     r"tokenizer\.json: found token id 390, expected less than the model's vocab_size, 390"),
    (tokenizer(lambda t, c: t["model"].update(type="Unigram")), "key 'model.type': found 'Unigram', expected 'BPE'"),
    (tokenizer(lambda t, c: t.pop("added_tokens")), r"tokenizer\.json: not a tokenizer that can be read: KeyError"),
    (tokenizer(lambda t, c: t["pre_tokenizer"]["pretokenizers"][2].update(pattern={"Regex": "."})),
     r"tokenizer\.json: key 'pre_tokenizer': found one that splits text in another way than DeepSeek-V4's"),
    (tokenizer(lambda t, c: c.update(bos_token="<s>")), "key 'bos_token' of tokenizer_config.json: found '<s>'"),
    (lambda files: files.json.pop("tokenizer_config.json"), r"tokenizer_config\.json: cannot be read: No such file"),
    (lambda files: files.json.pop("config.json"), r"config\.json: cannot be read: No such file"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD, ids=range(len(BAD)))
def test_bad_checkpoints(change, message, tmp_path):
    files = hf_checkpoint.Files(dict(FILES.stored), copy.deepcopy(FILES.json), 2)
    change(files)
    files.write(tmp_path / "source")
    with pytest.raises(Ds4Error, match=message) as caught:
        convert(tmp_path / "source", tmp_path / "m.gguf", RECIPES["f16"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


def test_what_only_images_need_is_left_out(tmp_path):
    """Vision-Exp's checkpoint: its text weights, with their epsilon, are taken."""
    files = hf_checkpoint.Files(dict(FILES.stored), copy.deepcopy(FILES.json), 2)
    names = ("vision.norm.weight", "aligner.w1.bias", "image_start", "image_pad", "layers.1.ffn.gate.bias_vl")
    files.stored.update({name: f32(3) for name in names})
    files.json["config.json"].update(rms_norm_eps=1e-20, vision_n_layers=32)
    files.write(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "m.gguf", RECIPES["f16"])
    assert open_checkpoint(tmp_path / "m.gguf").cfg.norm_eps == float(np.float32(1e-20))
    assert not any("vl" in name or "image" in name for name in open_checkpoint(tmp_path / "m.gguf").types)


INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"


def header(contents, data=b""):
    raw = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes):
    return header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}, bytes(8))


@pytest.mark.parametrize(
    "name, contents, message",
    [
        (SHARD, None, r"index\.json: names the file '.*00002-of-00003.safetensors', found no such file in"),
        (SHARD, b"", r"found a header of 0 bytes in a file of 0; truncated\?"),
        (SHARD, struct.pack("<Q", 2**40) + b"{}", r"found a header of 1099511627776 bytes in a file of 10"),
        (SHARD, header(b"{nonsense"), "the header is not JSON"),
        (SHARD, header(b"[" * 100_000), "the header is not JSON"),
        (SHARD, header([1]), r"found the header \[1\], expected an object"),
        (SHARD, header({"x": 3}), "tensor 'x': found 3, expected dtype, shape and data_offsets"),
        (SHARD, entry(shape=["2"]), "tensor 'x': found .*, expected dtype, shape and data_offsets"),
        (SHARD, entry(data_offsets=[4, 0]), "tensor 'x': found .*, expected dtype, shape and data_offsets"),
        (SHARD, entry(data_offsets=[0, 4]), r"tensor 'x': found 4 bytes for F32 of shape \(2,\)"),
        (
            SHARD,
            entry(shape=[4], data_offsets=[0, 16]),
            r"tensor 'x' ends at byte \d+, found a file of \d+ bytes; trunc",
        ),
        (SHARD, entry(), r"says that .* has tensor '.*', found none there"),
        (INDEX, b"{", r"index\.json: not JSON"),
        (INDEX, b"[]", r"index\.json: found \[\], expected an object"),
        (INDEX, b'{"weight_map": {"a": 1}}', "key 'weight_map': found {'a': 1}, expected tensor names and their files"),
    ],
)
def test_bad_containers(name, contents, message, folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders("official"), source)
    if contents is None:
        (source / name).unlink()
    else:
        (source / name).write_bytes(contents)
    with pytest.raises(Ds4Error, match=message):
        hf.open_sources(source)


def test_truncated_and_doubled_shards(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders("official"), source)
    os.truncate(source / SHARD, (source / SHARD).stat().st_size - 1)
    with pytest.raises(
        Ds4Error, match=rf"{SHARD}: tensor '.*' ends at byte \d+, found a file of \d+ bytes; truncated\?"
    ):
        hf.open_sources(source)
    (source / INDEX).unlink()
    shutil.copy(source / SHARD.replace("2-", "1-"), source / SHARD)
    with pytest.raises(Ds4Error, match=rf"found in {SHARD.replace('2-', '1-')} and in {SHARD}"):
        hf.open_sources(source)
    for path in source.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(Ds4Error, match=r"found no \*\.safetensors"):
        hf.open_sources(source)
    with pytest.raises(Ds4Error, match="no such folder"):
        hf.open_sources(tmp_path / "nothing")


@pytest.mark.parametrize(
    "types, message",
    [
        (
            ["attn.q_b=Q4_K"],
            r"'blk\.0\.attn_q_b\.weight': found rows of 160 values, expected a multiple of 256 for Q4_K; ch",
        ),
        (["attn.q_c=Q8_0"], r"found family 'attn\.q_c', expected one of attn\.hc\.fn, attn\.kv, .*, or its start"),
        (["attn.norm=Q8_0"], r"found family 'attn\.norm', expected one of"),
        (["attn"], "found 'attn', expected FAMILY=TYPE with a type of F32, F16"),
        (["attn=Q3_K"], "found 'attn=Q3_K', expected FAMILY=TYPE"),
        (["attn=F16", "attn=F32"], "found 'attn' twice, expected once"),
    ],
)
def test_bad_types(types, message, folders, tmp_path):
    with pytest.raises(Ds4Error, match=message):
        convert(folders("official"), tmp_path / "m.gguf", RECIPES["f16"], recipes.parse_types(types))
    assert no_leftovers(tmp_path)


def test_command_line(folders, tmp_path, f16, capsys):
    def run(*argv):
        for flag in FLAGS:
            FLAGS[flag].unparse()
        return main(["convert", *map(str, argv)])

    out = tmp_path / "m.gguf"
    assert run("--source", folders("official"), "--out", out, "--recipe", "q4", "--types", "ffn.experts=F16,attn=F16,"
               "ffn.shared=F16,head.out=F16") == 0  # fmt: skip
    assert out.read_bytes() == f16.read_bytes()
    assert capsys.readouterr().out == f"{out}\n"
    assert run("--source", tmp_path / "none", "--out", tmp_path / "n.gguf") == 1
    assert (
        capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such folder, expected a Hugging Face checkpoint\n"
    )
    assert run("--source", tmp_path) == 1
    assert "expected --source DIR or FILE.gguf, and --out FILE" in capsys.readouterr().err


# ---- config.json and tokenizer.json ----------------------------------------------------------------------------------
def test_config_of_flash():
    """The numbers of the published config.json."""
    config = hf_checkpoint.official_config() | {
        "hidden_size": 4096, "num_hidden_layers": 43, "vocab_size": 129280, "num_attention_heads": 64, "head_dim": 512,
        "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_lora_rank": 1024, "o_groups": 8, "index_n_heads": 64,
        "index_head_dim": 128, "index_topk": 512, "n_routed_experts": 256, "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048, "num_hash_layers": 3, "hc_mult": 4,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    }  # fmt: skip
    cfg = ModelConfig.from_hf(config)
    assert ModelConfig.from_metadata(cfg.to_metadata()) == cfg
    assert (cfg.n_layers, cfg.compress_ratios[-1], cfg.rope_base, cfg.swiglu_clamp) == (43, 4, 1e4, (10.0,) * 43)
    assert ModelConfig.from_hf(config | {"compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0]}) == cfg


def test_config_in_either_spelling():
    assert ModelConfig.from_hf(hf_checkpoint.official_config()) == CFG
    assert ModelConfig.from_hf(hf_checkpoint.transformers_config()) == CFG


@pytest.mark.parametrize(
    "theirs, change, message",
    [
        (False, {"model_type": "deepseek_v3"}, "key 'model_type': found 'deepseek_v3', expected 'deepseek_v4'"),
        (False, {"model_type": None}, "key 'model_type': found None"),
        (False, {"scoring_func": "sigmoid"}, "key 'scoring_func': found 'sigmoid', expected 'sqrtsoftplus'"),
        (False, {"tie_word_embeddings": True}, "key 'tie_word_embeddings': found True, expected False"),
        (False, {"num_key_value_heads": 2}, "key 'num_key_value_heads': found 2, expected 1"),
        (False, {"rope_scaling": None}, r"key 'rope_scaling\.\w+': found nothing"),
        (False, {"compress_ratios": [0, 4]}, "key 'compress_ratios': found 2 values, expected 3, one per layer"),
        (False, {"compress_ratios": [0, 4, 64]}, r"key 'compress_ratios': found \[0, 4, 64\], expected values of 0, 4"),
        (False, {"num_hidden_layers": 0}, "key 'num_hidden_layers': found 0"),
        (False, {"rope_theta": 1}, "key 'rope_theta': found 1, expected a finite number above 1"),
        (False, {"rms_norm_eps": 0}, "key 'rms_norm_eps': found 0, expected a finite number above 0"),
        (False, {"num_hash_layers": 4}, "key 'num_hash_layers': found 4, expected at most 3 layers"),
        (False, {"norm_topk_prob": 1}, "key 'norm_topk_prob': found 1, expected a boolean"),
        (True, {"layer_types": ["sliding_attention", "other", "x"]}, "key 'layer_types': found .*, expected an array"),
        (True, {"layer_types": None}, "key 'compress_ratios': found nothing"),
        (True, {"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "key 'mlp_layer_types': found .*, expected layers"),
        (True, {"rope_parameters": {"main": {"rope_type": "yarn"}}}, r"'rope_parameters\.main\.rope_type': found 'ya"),
        (True, {"compress_rates": {"compressed_sparse_attention": 8}}, r"key 'compress_rates\.comp.*': found 8"),
    ],
)  # fmt: skip
def test_bad_configs(theirs, change, message):
    config = (hf_checkpoint.transformers_config() if theirs else hf_checkpoint.official_config()) | change
    with pytest.raises(Ds4Error, match=message):
        ModelConfig.from_hf(config)


def test_the_published_tokenizer():
    tokenizer = hf.read_tokenizer(reference._JSON.parent, 129280)
    found, expected = tokenizer.to_metadata(), dict(reference.metadata())
    kinds = zip(found.pop("tokenizer.ggml.token_type"), expected.pop("tokenizer.ggml.token_type"), strict=True)
    assert found == expected
    # Control tokens or user-defined ones: a matter of taste in two cases, and all the same to `Tokenizer`.
    assert {tokenizer.tokens[i] for i, (a, b) in enumerate(kinds) if a != b} == {"<|EOT|>", "<｜/table>｜"}


def test_chat_templates(tmp_path):
    for name, contents in hf_checkpoint.tokenizer_files().items():
        (tmp_path / name).write_text(json.dumps(contents))
    assert hf.read_tokenizer(tmp_path, 384).chat_template is None
    options = json.loads((tmp_path / "tokenizer_config.json").read_text())
    options["chat_template"] = [{"name": "tools", "template": "b"}, {"name": "default", "template": "a"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    assert hf.read_tokenizer(tmp_path, 384).chat_template == "a"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert hf.read_tokenizer(tmp_path, 384).chat_template == "{{ messages }}"


# ---- memory ----------------------------------------------------------------------------------------------------------
MEMORY = """
import sys, threading, time, re
from ds4jax.io import convert, recipes
import jax
jax.numpy.zeros(1).block_until_ready()

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

base, peak, done = resident(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, resident())
thread = threading.Thread(target=watch); thread.start()
convert.convert(sys.argv[1], sys.argv[2], recipes.RECIPES[sys.argv[3]])
done.set(); thread.join()
print(peak - base)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["f32", "q2"])
def test_memory_is_that_of_a_slab(recipe, tmp_path, monkeypatch):
    """Full-size experts and embeddings (1.6 GiB of bfloat16): well below 2 GiB, whatever the model's size."""
    sizes = {"embed_dim": 4096, "expert_dim": 2048, "n_experts": 4, "vocab_size": 60_000, "n_layers": 1}
    cfg = dataclasses.replace(CFG, compress_ratios=(0,), swiglu_clamp=(10.0,), **sizes)
    monkeypatch.setattr(hf_checkpoint, "CFG", cfg)
    hf_checkpoint.files("transformers-bf16").write(tmp_path / "source")
    run = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "source", tmp_path / "m.gguf", recipe],
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert int(run.stdout) < 3 * 2**29


def test_a_checkpoint_with_a_drafter_is_marked_as_0731(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders("official"), source)
    config = json.loads((source / "config.json").read_text())
    convert(source, tmp_path / "first.gguf", RECIPES["q8"])
    (source / "config.json").write_text(json.dumps(config | {"dspark_block_size": 5}))
    convert(source, tmp_path / "marked.gguf", RECIPES["q8"])
    convert(tmp_path / "marked.gguf", tmp_path / "again.gguf", RECIPES["q8"])
    os.link(tmp_path / "first.gguf", tmp_path / "named-0731.gguf")
    convert(tmp_path / "named-0731.gguf", tmp_path / "renamed.gguf", RECIPES["q8"])
    found = {
        name: open_checkpoint(tmp_path / f"{name}.gguf").file.metadata.get("general.version")
        for name in ("first", "marked", "again", "renamed")
    }
    assert found == {"first": None, "marked": "0731", "again": "0731", "renamed": "0731"}


# ---- from GGUF -------------------------------------------------------------------------------------------------------
def test_a_gguf_file_in_other_types(folders, tmp_path):
    """By way of a file of float32, the bytes are those of the checkpoint."""
    rng = np.random.default_rng(0)
    importances(rng).write(tmp_path / "i.gguf")
    for source, out in ((folders("official+mtp"), "f32"), (tmp_path / "f32.gguf", "again")):
        convert(source, tmp_path / f"{out}.gguf", RECIPES["f32"])
    assert (tmp_path / "f32.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    for source, out in ((folders("official+mtp"), "a"), (tmp_path / "f32.gguf", "b")):
        convert(source, tmp_path / f"{out}.gguf", RECIPES["q2"], imatrix=tmp_path / "i.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    convert(tmp_path / "a.gguf", tmp_path / "c.gguf", RECIPES["q2"], draft="skip")  # what is coarse already is read too
    assert open_checkpoint(tmp_path / "c.gguf").cfg.n_mtp == 0
    convert(tmp_path / "a.gguf", tmp_path / "head.gguf", RECIPES["q4"], draft="only")
    assert open_mtp(tmp_path / "head.gguf", CFG).types["mtp.0.ffn_up_exps.weight"] == Type.Q4_K
    with pytest.raises(Ds4Error, match=r"c\.gguf: found no MTP head \(--draft only\)"):
        convert(tmp_path / "c.gguf", tmp_path / "d.gguf", RECIPES["q4"], draft="only")
