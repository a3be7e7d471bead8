"""The converter and what came after the first release: 0731's drafter, copies in FP8 alone or NVFP4, Vision-Exp."""

import copy
import hashlib
import re
from pathlib import Path

import hf_checkpoint
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hf_checkpoint import CFG
from test_convert import FLAGS, expected, f32, no_leftovers, stopping_at, without

from ds4jax.__main__ import main
from ds4jax.config import DrafterConfig
from ds4jax.errors import Ds4Error
from ds4jax.io import gguf, hf
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.convert import convert
from ds4jax.io.drafter import open_drafter
from ds4jax.io.gguf import GGUFFile
from ds4jax.io.imatrix import Entry, Imatrix
from ds4jax.io.recipes import RECIPES, choose
from ds4jax.io.synthetic import FULL
from ds4jax.model.tensors import drafter_table, tensor_table
from ds4jax.profile import sign_of_0731

FILES = hf_checkpoint.files("drafter")
DRAFTER = DrafterConfig(stages=3, block_size=5, markov_rank=32, noise_token=389, target_layers=(0, 1, 2))
REVISION = "7872f01b1d1fe23eabc4c98b48bffcef5a386062"


def changed(*changes) -> hf_checkpoint.Files:
    files = hf_checkpoint.Files(dict(FILES.stored), copy.deepcopy(FILES.json), 3)
    for change in changes:
        change(files)
    return files


def config(**values):
    return lambda files: files.json["config.json"].update(values)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "snapshots" / REVISION
    FILES.write(folder)
    return folder


@pytest.fixture(scope="module")
def pair(source, tmp_path_factory) -> tuple[Path, Path]:
    """Both files, in F16."""
    folder = tmp_path_factory.mktemp("pair")
    written = convert(source, folder / "m.gguf", RECIPES["f16"])
    assert written == [folder / "m.gguf", folder / "m-dspark.gguf"] == sorted(folder.iterdir(), reverse=True)
    return written[0], written[1]


def error(*messages):
    """Expects a Ds4Error of one line that contains all of these."""
    return pytest.raises(Ds4Error, match="^" + "".join(f"(?=[^\n]*{re.escape(m)})" for m in messages) + "[^\n]*$")


# ---- two files -------------------------------------------------------------------------------------------------------
def test_every_value_of_both_files(source, tmp_path):
    values = hf_checkpoint.official(drafter=True).values
    convert(source, tmp_path / "m.gguf", RECIPES["f32"], draft_out=tmp_path / "d.gguf")
    model = open_checkpoint(tmp_path / "m.gguf")
    drafter = open_drafter(tmp_path / "d.gguf", model)
    assert model.cfg.n_mtp == 0 and drafter.cfg == DRAFTER and len(drafter.types) == 81
    used = set()
    for file in (model.file, drafter.file):
        for name in file.tensors:
            np.testing.assert_array_equal(file.array(name), expected(name, values), err_msg=name)
            used.add(name)
    assert len(used) == 81 + len(tensor_table(CFG))


def test_what_both_files_say_of_themselves(source, pair):
    config_sha256 = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    index_sha256 = hashlib.sha256((source / hf.INDEX).read_bytes()).hexdigest()
    model, drafter = (GGUFFile.open(path).metadata for path in pair)
    assert sign_of_0731(model, "m.gguf") == "general.version"
    assert model["general.source.revision"] == REVISION
    assert {key: value for key, value in drafter.items() if not key.endswith("layer_ids")} == {
        "general.architecture": "deepseek4-dspark",
        "general.version": "0731",
        "general.quantization_version": 2,
        "dspark.stage_count": 3,
        "dspark.block_size": 5,
        "dspark.markov_rank": 32,
        "dspark.noise_token_id": 389,
        "dspark.source.revision": REVISION,
        "dspark.source.config_sha256": config_sha256,
        "dspark.source.index_sha256": index_sha256,
    }
    assert drafter["dspark.target_layer_ids"].dtype == np.uint32
    assert drafter["dspark.target_layer_ids"].tolist() == [0, 1, 2]


def test_the_revision_that_a_download_notes(tmp_path):
    FILES.write(tmp_path / "s")
    assert "dspark.source.revision" not in hf.open_sources(tmp_path / "s")[1].metadata()
    note = tmp_path / "s" / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{REVISION}\nabc\n1.5\n")
    assert hf.open_sources(tmp_path / "s")[1].metadata()["dspark.source.revision"] == REVISION


def test_the_drafter_alone_or_not_at_all(source, pair, tmp_path):
    assert convert(source, tmp_path / "m.gguf", RECIPES["f16"], draft="skip") == [tmp_path / "m.gguf"]
    assert convert(source, tmp_path / "d.gguf", RECIPES["f16"], draft="only") == [tmp_path / "d.gguf"]
    assert [(tmp_path / name).read_bytes() for name in ("m.gguf", "d.gguf")] == [path.read_bytes() for path in pair]
    with error("found no drafter to be written beside a model, expected one for"):
        convert(source, tmp_path / "n.gguf", RECIPES["f16"], draft="skip", draft_out=tmp_path / "e.gguf")
    with error("found the same file for model and drafter"):
        convert(source, tmp_path / "n.gguf", RECIPES["f16"], draft_out=tmp_path / "n.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.gguf", "m.gguf"]


def test_the_command_line(source, pair, tmp_path, capsys):
    def run(*argv):
        for flag in FLAGS:
            FLAGS[flag].unparse()
        return main(["convert", "--source", str(source), "--recipe", "f16", *map(str, argv)])

    out, draft = tmp_path / "m.gguf", tmp_path / "other.gguf"
    assert run("--out", out, "--draft_out", draft) == 0
    assert capsys.readouterr().out == f"{out}\n{draft}\n"
    assert draft.read_bytes() == pair[1].read_bytes()
    assert run("--out", tmp_path / "d.gguf", "--mtp", "only") == 0  # the flag's former name
    assert capsys.readouterr().out == f"{tmp_path / 'd.gguf'}\n"
    assert (tmp_path / "d.gguf").read_bytes() == pair[1].read_bytes()


@pytest.mark.parametrize("name", ["blk.2.ffn_up_exps.weight", "mtp.1.ffn_up_exps.weight"])
def test_the_same_call_goes_on_with_both(source, pair, tmp_path, monkeypatch, name):
    out = tmp_path / "m.gguf"
    with stopping_at(name, monkeypatch):
        convert(source, out, RECIPES["f16"])
    assert out.exists() == name.startswith("mtp.")
    with error("was begun with other config, tokenizer or types"):
        convert(source, out, RECIPES["q8"])
    if out.exists():
        with error(f"{out}: exists already, expected a new file"):
            convert(source, out, RECIPES["f16"], restart=True)
    assert convert(source, out, RECIPES["f16"]) == [out, tmp_path / "m-dspark.gguf"]
    assert [path.read_bytes() for path in (out, tmp_path / "m-dspark.gguf")] == [path.read_bytes() for path in pair]
    assert no_leftovers(tmp_path)
    with error(f"{out}: exists already, expected a new file"):
        convert(source, out, RECIPES["f16"])


def test_killed_when_the_model_has_just_got_its_name(source, pair, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def killed(path, **_):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "unlink", killed)  # of the journal
        convert(source, tmp_path / "m.gguf", RECIPES["f16"])
    assert (tmp_path / "m.gguf").exists() and (tmp_path / "m.gguf.partial.json").exists()
    convert(source, tmp_path / "m.gguf", RECIPES["f16"])
    found = [tmp_path / name for name in ("m.gguf", "m-dspark.gguf")]
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in pair]


def test_a_file_in_the_drafters_place(source, tmp_path):
    (tmp_path / "m-dspark.gguf").write_bytes(b"mine")
    with error("m-dspark.gguf: exists already, expected a new file"):
        convert(source, tmp_path / "m.gguf", RECIPES["f16"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-dspark.gguf"]


# ---- refusals --------------------------------------------------------------------------------------------------------
BAD = [
    ([without("mtp.0.main_proj.weight")], ["no tensor 'mtp.0.main_proj.weight'", "--draft skip leaves head or draft"]),
    ([without("mtp.1.ffn.shared_experts.w3.weight")], ["no tensor 'mtp.1.ffn.shared_experts.w3.weight', expected"]),
    ([without("mtp.2.ffn.experts.1.w1.scale")], ["found no tensor 'mtp.2.ffn.experts.1.w1.scale'"]),
    ([without("mtp.2.markov_head.markov_w2.weight")], ["found no tensor 'mtp.2.markov_head.markov_w2.weight'"]),
    ([without("mtp.2.hc_head_base")], ["found no tensor 'mtp.2.hc_head_base', expected shape (2,)"]),
    ([lambda files: files.stored.update({"mtp.1.norm.weight": f32(256)})], ["1 tensors that", "'mtp.1.norm.weight'"]),
    ([lambda files: files.stored.update({"mtp.3.norm.weight": f32(256)})], ["found no tensor 'mtp.3."]),
    ([lambda files: files.json["config.json"].pop("dspark_block_size")], ["'dspark_block_size': found nothing"]),
    ([config(dspark_target_layer_ids=[1, 2, 3])], ["'dspark_target_layer_ids': found [1, 2, 3], expected rising num"]),
    ([config(dspark_target_layer_ids=[0, 1])], ["'mtp.0.main_proj.weight': found F8_E4M3 of shape (256, 768)"]),
    ([config(dspark_markov_rank=16)], ["markov_w1.weight': found BF16 of shape (390, 32), expected", "(390, 16)"]),
    ([config(dspark_noise_token_id=390)], ["'dspark_noise_token_id': found 390, expected an integer from 0 to 389"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "messages"), BAD, ids=range(len(BAD)))
def test_bad_drafters(tmp_path, changes, messages):
    changed(*changes).write(tmp_path / "s")
    with error(*messages):
        convert(tmp_path / "s", tmp_path / "m.gguf", RECIPES["f16"])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    "change",
    [
        config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}),
        config(quantization_config={"config_groups": {"group_0": {"format": "nvfp4-pack-quantized"}}}),
        lambda files: files.json.update({"hf_quant_config.json": {"quantization": {"quant_algo": "MIXED_NVFP4"}}}),
    ],
)
def test_nvfp4_is_refused(tmp_path, change):
    changed(change).write(tmp_path / "s")
    with error("found weights in NVFP4, expected DeepSeek's FP8 and FP4, or bfloat16; convert the original repository"):
        convert(tmp_path / "s", tmp_path / "m.gguf", RECIPES["f16"])


# ---- FP8 alone -------------------------------------------------------------------------------------------------------
def fp8_only(seed: int = 3) -> hf_checkpoint.Builder:
    """The checkpoint with experts in FP8, too."""
    builder = hf_checkpoint.official(drafter=True)
    more = hf_checkpoint.Builder(seed)
    for name in [name for name in builder.stored if ".experts." in name and name.endswith(".weight")]:
        more.fp8(name.removesuffix(".weight"), *builder.values[name].shape)
    builder.stored |= more.stored
    builder.values |= more.values
    return builder


def test_experts_in_fp8(tmp_path):
    builder = fp8_only()
    hf_checkpoint.Files(builder.stored, FILES.json, 2).write(tmp_path / "s")
    for path in convert(tmp_path / "s", tmp_path / "m.gguf", RECIPES["f32"]):
        file = GGUFFile.open(path)
        for name in file.tensors:
            if "_exps." in name:
                np.testing.assert_array_equal(file.array(name), expected(name, builder.values), err_msg=name)


def test_lost_scales_of_wo_a(tmp_path):
    builder = fp8_only()
    del builder.stored["layers.1.attn.wo_a.scale"]
    hf_checkpoint.Files(builder.stored, FILES.json, 2).write(tmp_path / "s")
    with error(
        "found no tensor 'layers.1.attn.wo_a.scale' or 'layers.1.attn.wo_a.weight_scale_inv', expected shape (1, 1)",
        "'layers.1.attn.wo_a.weight' is F8_E4M3, which means nothing without its scales; copies in FP8 alone may have",
        "convert the original repository",
    ):
        hf.open_sources(tmp_path / "s")


def test_a_drafter_that_is_told_of_but_not_there(tmp_path):
    files = changed(without(*(name for name in FILES.stored if name.startswith("mtp."))))
    files.write(tmp_path / "s")
    (model,) = hf.open_sources(tmp_path / "s")
    assert model.notes == [f"no drafter: {tmp_path / 's' / 'config.json'} tells of one, but there are no tensors mtp.*"]
    assert sign_of_0731(model.metadata(), "m.gguf") == "general.version"
    with error("found no tensor mtp.0.*, expected an MTP head or a drafter (--draft only)"):
        hf.open_sources(tmp_path / "s", "only")


# ---- Vision-Exp ------------------------------------------------------------------------------------------------------
def test_what_only_images_need_is_named(tmp_path, capsys):
    names = ("vision.norm.weight", "aligner.w1.bias", "image_start", "image_pad", "layers.1.ffn.gate.bias_vl")
    changed(config(rms_norm_eps=1e-20), lambda files: files.stored.update({n: f32(3) for n in names})).write(
        tmp_path / "s"
    )
    convert(tmp_path / "s", tmp_path / "m.gguf", RECIPES["f16"], progress=True)
    line = "left out: 5 tensors that only images need, which are not supported: aligner.w1.bias, image_pad, image_start"
    said = capsys.readouterr().err
    assert f"{line}, ..." in said.splitlines() and "converting: " in said
    model = open_checkpoint(tmp_path / "m.gguf")
    assert model.cfg.norm_eps == float(np.float32(1e-20))
    assert open_drafter(tmp_path / "m-dspark.gguf", model).cfg == DRAFTER


# ---- recipes and importances -----------------------------------------------------------------------------------------
def test_the_published_files_sizes():
    """Bytes of tensors: of the drafter as published, and of two recipes by the difference of the published files."""
    tables = tensor_table(FULL), drafter_table(FULL, DrafterConfig(3, 5, 256, 128799, (40, 41, 42)))

    def size(recipe: str, table: int) -> int:
        types = choose(tables[table], RECIPES[recipe], {})
        layout = gguf.layout({}, [(spec.name, spec.shape, types[spec.name]) for spec in tables[table]])
        return sum(info.nbytes for info in layout.tensors.values())

    assert size("q2", 1) == size("q2-q4", 1) == 5_989_108_652
    assert size("q2-q4", 0) - size("q2", 0) == 97_591_747_456 - 86_720_111_488
    assert 0 < 86_720_111_488 - size("q2", 0) < 6e6  # the tokenizer, and what is said of the tensors
    assert 0 < 155_976_458_848 - size("mxfp4", 0) < 6e6
    assert round(size("q4", 0) / 2**30, 2) == 153.32  # published: 153.33 with the tokenizer


@pytest.mark.parametrize(
    ("recipe", "types"),
    [
        ("q2", (Type.IQ2_XXS, Type.Q2_K, Type.IQ2_XXS, Type.Q2_K)),
        ("q2-q4", (Type.IQ2_XXS, Type.Q2_K, Type.Q4_K, Type.Q4_K)),
        ("q4", (Type.Q4_K,) * 4),
        ("mxfp4", (Type.MXFP4,) * 4),
    ],
)
def test_types_of_experts_by_layer(recipe, types):
    found = choose(tensor_table(FULL), RECIPES[recipe], {})
    assert [found[f"blk.{layer}.ffn_{part}_exps.weight"] for layer in (36, 37) for part in ("up", "down")] == [*types]


def test_importances_of_the_drafters_experts(source, tmp_path, capsys):
    rng = np.random.default_rng(1)
    table = [spec for spec in drafter_table(CFG, DRAFTER) if "experts" in spec.family and spec.layer != 1]
    entries = {
        spec.name: Entry(rng.exponential(size=(3, spec.shape[-1])) ** 4, np.array([3.0, 0, 5])) for spec in table
    }
    Imatrix(entries, ["text"], 4, 512).write(tmp_path / "i.gguf")
    types = {"dspark.ffn.experts.gate": Type.Q2_K}
    for name, imatrix in (("plain", None), ("weighed", tmp_path / "i.gguf")):
        convert(source, tmp_path / f"{name}.gguf", RECIPES["f16"], types, imatrix, "only", progress=True)
    said = capsys.readouterr().err
    assert (
        "no importances for 3 of 9 tensors of experts: mtp.1.ffn_gate_exps.weight, mtp.1.ffn_up_exps.weight, " in said
    )
    assert "no importances for experts of mtp.2.ffn_down_exps.weight, which saw no token: 1\n" in said
    plain, weighed = (GGUFFile.open(tmp_path / f"{name}.gguf") for name in ("plain", "weighed"))
    assert weighed.metadata["quantize.imatrix.entries_count"] == 6
    differ = {name for name in plain.tensors if plain.raw(name).tobytes() != weighed.raw(name).tobytes()}
    assert differ == {name for name in entries if "gate" in name}


def test_the_configs_name_the_published_file():
    root = Path(__file__).parent.parent / "configs"
    for name in ("h200", "h200x2", "rtx_pro_6000", "spark"):
        assert "SExpQ8-OutQ8-chat-v2-imatrix-0731.gguf" in (root / f"{name}.toml").read_text()
