"""Model files as llama.cpp writes them, made with the `gguf` package: they load to the model that transformers answered
for, and what is no model of this architecture is refused by name."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from test_goldens import our_logits

from ds4jax.config import PREFIX, ModelConfig
from ds4jax.engine.fingerprint import open_store
from ds4jax.engine.kv_store import KVStore
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.errors import Ds4Error
from ds4jax.io import dialect, regguf
from ds4jax.io.checkpoint import open_checkpoint, open_mtp
from ds4jax.io.gguf import GGUFFile
from ds4jax.io.split import open_file, part_names
from ds4jax.io.synthetic import KERNEL, RECIPES, Synthetic
from ds4jax.model import cache as kv
from ds4jax.model import mtp, transformer, weights
from ds4jax.model.compute import Compute
from ds4jax.settings import Settings

GOLDEN = oracle.Golden.load(next(case for case in oracle.CASES if case.name == "odd-f32"))
TOKENS = GOLDEN.arrays["130/tokens"]
RATIOS = f"{PREFIX}attention.compress_ratios"
NOT_IMPLIED = {f"{PREFIX}expert_weights_norm", f"{PREFIX}swiglu_clamp_exp", f"{PREFIX}attention.sliding_window"}
IMPLIED = {PREFIX + key for key in dialect.IMPLIED} - {f"{PREFIX}nextn_predict_layers"}


def fails(*messages):
    """Expects a Ds4Error of one line that contains all of these."""
    return pytest.raises(Ds4Error, match="^" + "".join(f"(?=[^\n]*{re.escape(m)})" for m in messages) + "[^\n]*$")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The golden's model in this project's own dialect."""
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    GOLDEN.case.build(path)
    return path


def rewrite(source, path, *, without=(), changes=None, name=lambda name: name, more=None, per_part=0, empty=False):
    """The file once more, by the `gguf` package: without some keys, with others changed, tensors renamed, or in parts.

    name: gives None for a tensor that is left out. more: further tensors. empty: the first part has no tensors.
    Returns the path of the (first) file.
    """
    reader = GGUFReader(source)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.") and k not in without}
    arch = (changes or {}).get("general.architecture") or fields["general.architecture"].contents()
    writer = GGUFWriter(path, arch, split_max_tensors=per_part, small_first_shard=empty)
    for key, field in fields.items():
        if key == "general.architecture" or key in (changes or {}):
            continue
        sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    for key, value in (changes or {}).items():
        if isinstance(value, list):
            sub = GGUFValueType.get_type(value[0])
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=sub)
        elif key != "general.architecture":
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for t in reader.tensors:
        if new := name(t.name):
            writer.add_tensor(new, t.data, raw_dtype=t.tensor_type)
    for new, array in (more or {}).items():
        writer.add_tensor(new, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    n_parts = empty + -(-len(reader.tensors) // (per_part or 1))
    return path.with_name(f"{path.stem}-00001-of-{n_parts:05}.gguf") if per_part else path


def config(path):
    with open_checkpoint(path).file as file:
        return ModelConfig.from_metadata(dialect.complete(file.metadata, file.tensors), file.tensors)


def right(path):
    """Whether a file gives transformers' logits."""
    return GOLDEN.failures(130, our_logits(path, TOKENS, "plain")) == []


# ---- each dialect gives transformers' logits -------------------------------------------------------------------------
def test_a_file_in_parts(plain, tmp_path):
    """Of which the first has metadata alone."""
    first = rewrite(plain, tmp_path / "m.gguf", per_part=20, empty=True)
    assert not GGUFReader(first).tensors
    names = part_names(first.name)
    assert len(names) > 3 and sorted(p.name for p in tmp_path.iterdir()) == names
    assert right(first)
    assert config(tmp_path / names[2]) == config(plain)
    with open_checkpoint(tmp_path / names[2]).file as file, GGUFFile.open(plain) as whole:
        assert [part.path.name for part in file.parts] == names and file.metadata.keys() >= whole.metadata.keys()
        assert all((file.raw(name) == whole.raw(name)).all() for name in whole.tensors)


def test_46_compress_ratios(plain, tmp_path):
    """43 and three zeros for the drafter; other arrays by layer may be as long."""
    cfg = config(plain)
    clamps = [float(clamp) for clamp in (*cfg.swiglu_clamp, 9, 9, 9)]
    changes = {RATIOS: [*cfg.compress_ratios, 0, 0, 0], f"{PREFIX}swiglu_clamp_exp": clamps}
    path = rewrite(plain, tmp_path / "m.gguf", changes=changes | {f"{PREFIX}nextn_predict_layers": 1})
    assert config(path) == cfg and right(path)


def test_keys_left_out_and_names_without_suffix(plain, tmp_path):
    path = rewrite(plain, tmp_path / "m.gguf", without=IMPLIED, name=lambda n: n.rpartition(".")[0])
    assert not IMPLIED & GGUFReader(path).fields.keys()
    assert {"output_hc_fn", "blk.2.exp_probs_b", "blk.0.ffn_gate_tid2eid"} <= {t.name for t in GGUFReader(path).tensors}
    assert config(path) == config(plain) and right(path)


# ---- keys ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", sorted(IMPLIED))
def test_each_key_that_the_tensors_imply(plain, key):
    with open_file(plain) as file:
        metadata = {k: v for k, v in file.metadata.items() if k != key}
        found = dialect.complete(metadata, file.tensors)[key]
        np.testing.assert_array_equal(found, file.metadata[key])
        assert dialect.complete(file.metadata | {key: "x"}, file.tensors)[key] == "x"


def test_what_the_tensors_do_not_tell_is_named(plain, tmp_path):
    path = rewrite(plain, tmp_path / "m.gguf", without=NOT_IMPLIED | IMPLIED)
    with fails(f"{path}: {'; '.join(f"key '{key}': found nothing" for key in sorted(NOT_IMPLIED))}, expected values"):
        open_checkpoint(path)
    for key in NOT_IMPLIED:
        with fails(f"{path}: key '{key}': found nothing, expected "):
            open_checkpoint(rewrite(plain, path, without={key}))


def test_tensors_that_tell_something_impossible(plain, tmp_path):
    """Shapes of a damaged file derive nothing, or what the check of all tensors refuses by name."""
    renamed = {"blk.0.attn_kv.weight": "blk.0.attn_sinks.weight", "blk.0.attn_sinks.weight": "blk.0.attn_kv.weight"}
    path = rewrite(plain, tmp_path / "m.gguf", without=IMPLIED, name=lambda n: renamed.get(n, n))
    with fails(f"{path}: "):
        open_checkpoint(path)


def test_a_name_with_and_without_suffix_is_one_too_many(plain, tmp_path):
    renamed = {"blk.1.attn_norm.weight": "blk.0.attn_norm"}
    path = rewrite(plain, tmp_path / "m.gguf", name=lambda n: renamed.get(n, n))
    with fails(f"{path}: tensor 'blk.0.attn_norm': found beside 'blk.0.attn_norm.weight', expected one of them"):
        open_checkpoint(path)


# ---- parts -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def parts(plain, tmp_path):
    """The paths of a file in parts, each in a folder of the test's own."""
    first = rewrite(plain, tmp_path / "m.gguf", per_part=30)
    return [tmp_path / name for name in part_names(first.name)]


def test_missing_parts_are_named(parts):
    parts[1].unlink()
    for path in (parts[0], parts[2]):
        with fails(f"{path}: found {len(parts) - 1} of its {len(parts)} parts, expected {parts[1].name} beside it"):
            open_checkpoint(path)


def test_parts_in_the_wrong_place_are_named(parts):
    shutil.copy(parts[2], parts[1])
    with fails(f"{parts[1]}: key 'split.no': found 2, expected 1"):
        open_checkpoint(parts[0])


def test_foreign_parts_are_named(parts, plain, tmp_path):
    (tmp_path / "other").mkdir()
    fewer = rewrite(plain, tmp_path / "other" / "m.gguf", per_part=30, name=lambda n: n != "output.weight" and n)
    shutil.copy(fewer.with_name(parts[1].name), parts[1])
    total = len(GGUFReader(plain).tensors)
    with fails(f"{parts[1]}: key 'split.tensors.count': found {total - 1}, expected {total}; a foreign part?"):
        open_checkpoint(parts[0])


def test_a_tensor_in_two_parts_is_named(parts, plain, tmp_path):
    (tmp_path / "other").mkdir()
    names = [t.name for t in GGUFReader(plain).tensors]
    swapped = dict(zip(names, reversed(names), strict=True))
    other = rewrite(plain, tmp_path / "other" / "m.gguf", per_part=30, name=swapped.get)
    shutil.copy(other.with_name(parts[-1].name), parts[-1])
    with fails(f"{parts[-1]}: tensor '", f"': found in {parts[0].name} too"):
        open_checkpoint(parts[0])


def test_a_part_under_another_name_says_what_it_misses(parts, tmp_path):
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with fails(
        f"{renamed}: key 'split.count': found {len(parts)}, expected 1, or a name like NAME-00001-of-00002.gguf"
    ):
        open_checkpoint(renamed)
    renamed = renamed.rename(tmp_path / "m-00001-of-00002.gguf")
    with fails(f"{renamed}: key 'split.count': found {len(parts)}, expected 2, as its name says"):
        open_checkpoint(renamed)


def test_names_of_parts():
    assert part_names("a/b-00002-of-00003.gguf") == [f"a/b-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for whole in ("m.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-1-of-3.gguf"):
        assert part_names(whole) == [whole]


def test_every_part_counts_for_states_on_disk(parts, tmp_path, monkeypatch):
    """A byte that differs in any part gives another hash, so that no state of the other model is taken."""
    begun = []
    monkeypatch.setattr(KVStore, "begin", lambda store, content: begun.append(content.split()))
    for changed in (None, *parts):
        if changed:
            last = max(GGUFReader(changed, "r+").tensors, key=lambda t: t.data_offset)
            last.data.reshape(-1).view(np.uint8)[-1] ^= 1
        with open_store(tmp_path / "kv", 1 << 30, ModelRunner.load(Settings(str(parts[2]), ctx=8))):
            assert len(begun[-1]) == len(parts)
    assert len({tuple(hashes) for hashes in begun}) == 1 + len(parts)


def test_parts_are_a_source_for_convert(parts, plain):
    (split,), (whole,) = regguf.open_sources(parts[1]), regguf.open_sources(plain)
    assert (split.cfg, split.table) == (whole.cfg, whole.table) and len(split.identity) == len(parts)
    for spec in whole.table:
        if spec.kind != "matrix":
            np.testing.assert_array_equal(split.values(spec), whole.values(spec))
        else:
            for (_, found), (_, expected) in zip(split.slabs(spec, 1 << 20), whole.slabs(spec, 1 << 20), strict=True):
                np.testing.assert_array_equal(found, expected)


# ---- other models, and the wrong head --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("architecture", "what"),
    [("deepseek41", "DeepSeek-V4.1"), ("deepseek4-dspark", "a DSpark drafter"), ("clip", "images are not supported")],
)
def test_other_architectures_are_named(plain, tmp_path, architecture, what):
    path = rewrite(plain, tmp_path / "m.gguf", changes={"general.architecture": architecture})
    for opened in (open_checkpoint, lambda path: open_mtp(path, config(plain))):
        with fails(f"{path}: key 'general.architecture': found '{architecture}', expected ", what):
            opened(path)


def test_v41_in_a_config_json():
    with fails("key 'model_type': found 'deepseek_v41', expected 'deepseek_v4'; it is DeepSeek-V4.1"):
        ModelConfig.from_hf({"model_type": "deepseek_v41"})


@pytest.mark.parametrize(
    "sign",
    [
        {RATIOS: [0, 4, 128, 4, 0, 0, 0]},
        {"general.version": "0731"},
        {"general.base_model.0.name": "DeepSeek V4 Flash Vision Exp"},
    ],
)
def test_no_mtp_head_beside_0731(plain, tmp_path, sign):
    checkpoint = open_checkpoint(rewrite(plain, tmp_path / "m.gguf", changes=sign))
    (key,) = sign
    with fails(
        f"mtp.gguf: found an MTP head, expected none beside {checkpoint.file.path}: DeepSeek-V4-Flash-0731", key
    ):
        checkpoint.with_mtp(tmp_path / "mtp.gguf")


# ---- Vision-Exp's text weights ---------------------------------------------------------------------------------------
def test_what_only_images_need_is_left_out(plain, tmp_path):
    """The published file of the text weights has a second routing bias for image tokens, and no vocab_size."""
    cfg = config(plain)
    biases = {f"blk.{i}.exp_probs_b_vl.bias": np.ones(cfg.n_experts, np.float32) for i in range(cfg.n_layers)}
    changes = {f"{PREFIX}attention.layer_norm_rms_epsilon": 1e-20}
    path = rewrite(plain, tmp_path / "m.gguf", without={f"{PREFIX}vocab_size"}, changes=changes, more=biases)
    assert config(path) == dataclasses.replace(cfg, norm_eps=float(np.float32(1e-20)))
    assert right(rewrite(plain, path, more=biases))
    with open_checkpoint(path).file as file:
        assert not any("_vl" in name for name in file.tensors)
    (source,) = regguf.open_sources(path)
    names = "blk.0.exp_probs_b_vl.bias, blk.1.exp_probs_b_vl.bias, blk.2.exp_probs_b_vl.bias, ..."
    assert source.notes == [f"left out: 4 tensors that only images need, which are not supported: {names}"]
    for wrong in (
        {"blk.0.exp_probs_b_vl.bias": np.ones(3, np.float32)},
        {"v.blk.0.norm.weight": np.ones(3, np.float32)},
    ):
        with fails(f"{path}: 1 tensors that belong to no known part of the model: '{next(iter(wrong))}'"):
            open_checkpoint(rewrite(plain, path, more=wrong))


def denominators(jaxpr, found):
    """What is added below every reciprocal square root of a jaxpr and those inside it, its kernels' too."""
    made = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                denominators(inner, found)
        if eqn.primitive.name == "rsqrt":
            below = made.get(eqn.invars[0])
            assert below is not None and below.primitive.name == "add", below
            (number,) = [float(v.val) for v in below.invars if hasattr(v, "val")]
            found.append(number)
    return found


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_the_epsilon_reaches_every_norm(plain, tmp_path, kernels):
    """Vision-Exp's norms have 1e-20, which its files say."""
    path = rewrite(plain, tmp_path / "m.gguf", changes={f"{PREFIX}attention.layer_norm_rms_epsilon": 1e-20})
    assert (epsilon := config(path).norm_eps) == float(np.float32(1e-20))
    cfg = dataclasses.replace(KERNEL, norm_eps=epsilon, n_mtp=1)
    w = weights.structs(weights.abstract(cfg, Synthetic(cfg, RECIPES["q2"]).types))
    compute = Compute("official", kernels=kernels)
    cache = jax.eval_shape(lambda: kv.empty(cfg, "official", compute.dtype, 1, 512))

    def step(w, cache, ids, n):
        X, moved = transformer.forward(w, cache, ids, n, cfg, compute)
        drafted = mtp.draft(w, moved, X, ids, cache.length, n, cfg, compute)[0]
        return transformer.logits(w, X, cfg, compute), drafted

    for T in (1, 128):
        ids, n = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        found = denominators(jax.make_jaxpr(step)(w, cache, ids, n).jaxpr, [])
        assert len(found) >= 20 and {np.float32(number) for number in found} == {np.float32(1e-20)}
