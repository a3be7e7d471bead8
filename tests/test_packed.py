"""`ds4jax checkpoint`: a folder in Orbax's format loads as its GGUF file does, on any mesh; what is wrong is named."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
import tensorstore as ts
from test_dialect import rewrite

from ds4jax import sharding
from ds4jax.__main__ import main
from ds4jax.engine import fingerprint
from ds4jax.engine.memory import steps
from ds4jax.engine.model_runner import ModelRunner
from ds4jax.engine.types import Sampling
from ds4jax.errors import Ds4Error, GGUFError
from ds4jax.formats import FORMATS
from ds4jax.io import content_hash, convert, load, pack, packed, synthetic
from ds4jax.io.checkpoint import open_checkpoint
from ds4jax.io.drafter import with_drafter
from ds4jax.io.packed import MANIFEST, Manifest, PackedFile, verify
from ds4jax.io.recipes import RECIPES
from ds4jax.io.tokenizer import Tokenizer
from ds4jax.model import weights
from ds4jax.paths import embedded_drafter, embedded_model
from ds4jax.settings import Settings

CFG = small.CFG  # 16 experts: three devices have 6, 6 and 4 of them
TINY = synthetic.synthetic_config(
    {"n_layers": 2, "compress_ratios": (4, 128), "swiglu_clamp": (10.0,) * 2, "n_hash_layers": 1}
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def made(gguf, tmp_path_factory):
    """The folder made of the file, which no test changes."""
    folder = tmp_path_factory.mktemp("packed") / "small"
    pack.pack(open_checkpoint(gguf), folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "packed"))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


# ---- what arrives ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [None, (2, 1), (1, 3), (2, 2)], ids=["one", "tp 2", "ep 3", "tp 2 ep 2"])
def test_the_weights_are_those_of_the_file_on_any_mesh(gguf, made, shape):
    mesh = sharding.make_mesh(*shape) if shape else None
    assert_same(load.load(made, mesh)[0], load.load(gguf, mesh)[0])


@pytest.mark.parametrize("recipe, how", [("mixed", {}), ("q2", {"wide": True})], ids=["every format", "wide"])
def test_every_format_and_layout(tmp_path, recipe, how, monkeypatch):
    """Read in several slabs, too."""
    path = tmp_path / "model.gguf"
    synthetic.write_synthetic(path, TINY, 7, synthetic.RECIPES[recipe])
    pack.pack(open_checkpoint(path), tmp_path / "packed")
    monkeypatch.setattr(load, "SLAB_BYTES", 300_000)
    assert_same(load.load(tmp_path / "packed", **how)[0], load.load(path, **how)[0])


def test_experts_in_host_memory(gguf, made):
    found, expected = (load.load(path, on_host=True)[0].ffn.experts for path in (made, gguf))
    assert_same(found, expected)
    assert jax.tree.leaves(found)[0].sharding.memory_kind == "pinned_host"


def test_config_tokenizer_and_shapes_are_those_of_the_file(gguf, made):
    a, b = open_checkpoint(made), open_checkpoint(gguf)
    assert a.cfg == b.cfg and a.types == b.types and a.file.path.name == b.file.path.name
    tokens = [Tokenizer.from_metadata(x.file.metadata).encode_text("Hello") for x in (a, b)]
    assert tokens[0] == tokens[1]
    ids = "blk.0.ffn_gate_tid2eid.weight"
    np.testing.assert_array_equal(a.file.array(ids), b.file.array(ids))


def test_a_device_reads_its_part_alone(made):
    """Each of three, of experts that they do not share out evenly: 6, 6 and 4."""
    checkpoint, mesh = open_checkpoint(made), sharding.make_mesh(1, 3)
    spec = weights.even(weights.abstract(CFG, checkpoint.types), mesh).ffn.experts.up.groups[0]
    shards = load._shards(spec, jax.tree.leaves(spec.shardings(mesh)))
    one = sum(p.nbytes for p in FORMATS[checkpoint.types["blk.0.ffn_up_exps.weight"]].from_bytes(_raw(spec)).values())
    for shard, experts in zip(shards, (6, 6, 4), strict=True):
        load._read(checkpoint.holder, shard, shard.slabs[0])  # also opens the planes
        before = _read_so_far()
        load._read(checkpoint.holder, shard, shard.slabs[0])
        assert 0 <= _read_so_far() - before - one * experts * CFG.n_layers < 10_000


def _raw(spec):
    """File bytes of one expert of Q8_0, all zero."""
    rows, columns = spec.shape[2:]
    return np.zeros((rows, columns // 32 * 34), np.uint8)


def _read_so_far():
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_orbax_alone_restores_a_group_to_a_mesh(gguf, made):
    """One of experts that do not divide: the missing ones are zeros."""
    mesh, name = sharding.make_mesh(1, 3), "blk.1.ffn_down_exps.weight"
    sharded = jax.NamedSharding(mesh, jax.P("ep"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(made / "model/blk.1.ffn_down_exps").item_metadata.tree
        args = {
            name: {
                plane: ocp.ArrayRestoreArgs(sharding=sharded, global_shape=(18, *about.shape[1:]), strict=False)
                for plane, about in found[name].items()
            }
        }
        planes = checkpointer.restore(made / "model/blk.1.ffn_down_exps", restore_args=args)[name]
    file = open_checkpoint(gguf).file
    for plane, expected in FORMATS[file.info(name).type].from_bytes(file.raw(name)).items():
        assert {shard.data.shape[0] for shard in planes[plane].addressable_shards} == {6}
        np.testing.assert_array_equal(planes[plane][:16], expected)
        assert not np.asarray(planes[plane][16:]).any()


def test_the_manifest_says_what_every_array_is(gguf, made):
    """Its digest is of the bytes in row-major order."""
    file, tensors = open_checkpoint(gguf).file, Manifest.read(made).tensors["model"]
    assert tensors.keys() == file.tensors.keys()
    name = "output.weight"
    for plane, value in FORMATS[file.info(name).type].from_bytes(file.raw(name)).items():
        said = tensors[name]["planes"][plane]
        assert said == pack._described(value) and said["nbytes"] == value.nbytes
        assert said["dtype"] == str(value.dtype) and said["shape"] == list(value.shape)


def test_whoever_may_read_the_folder_may_read_all_of_it(made):
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in made.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"ep": 3}, {"tp": 2, "dp": 2}], ids=str)
def test_the_engine_says_the_same(mesh, tmp_path):
    pack.pack(open_checkpoint(embedded_model("tiny")), tmp_path / "packed")
    said = []
    for model in ("tiny", str(tmp_path / "packed")):
        runner = ModelRunner.load(dataclasses.replace(Settings.load("tiny", ctx=256, **mesh), model=model))
        tokens = runner.tokenizer.encode_text("The quick brown fox jumps over the lazy dog.")
        first = runner.prefill(0, tokens, Sampling(temperature=0.0))
        said.append((first.logits, [first.token, *runner.decode_block({0: first.token}, 8).tokens()[0]]))
    np.testing.assert_array_equal(said[0][0], said[1][0])
    assert said[0][1] == said[1][1]


# ---- drafters, heads, parts ------------------------------------------------------------------------------------------
def test_the_drafter_is_in_the_folder(tmp_path):
    plain = with_drafter(open_checkpoint(embedded_model("tiny")), str(embedded_drafter()))
    pack.pack(plain, tmp_path / "packed")
    found = with_drafter(open_checkpoint(tmp_path / "packed"), "auto")
    assert found.cfg == plain.cfg and found.drafter and plain.drafter and found.drafter.types == plain.drafter.types
    assert_same(load.load(found)[0].dspark, load.load(plain)[0].dspark)
    assert with_drafter(open_checkpoint(tmp_path / "packed"), "off").drafter is None
    with pytest.raises(GGUFError, match="expected a GGUF file, auto or off"):
        with_drafter(open_checkpoint(tmp_path / "packed"), str(tmp_path / "packed"))


def test_an_mtp_head_of_its_own_file_is_in_the_folder(tmp_path):
    cfg = dataclasses.replace(TINY, n_mtp=1)
    for path, of in (("main.gguf", TINY), ("both.gguf", cfg)):
        synthetic.write_synthetic(tmp_path / path, of, 7, RECIPES["q8"])
    names = [name for name in open_checkpoint(tmp_path / "both.gguf").types if name.startswith("mtp.")]
    _write_head(tmp_path / "both.gguf", tmp_path / "head.gguf", names)
    plain = open_checkpoint(tmp_path / "main.gguf").with_mtp(tmp_path / "head.gguf")
    pack.pack(plain, tmp_path / "packed")
    found = with_drafter(open_checkpoint(tmp_path / "packed"), "auto")
    assert found.cfg == plain.cfg and found.cfg.n_mtp == 1
    assert_same(load.load(found)[0], load.load(plain)[0])
    assert with_drafter(open_checkpoint(tmp_path / "packed"), "off").cfg.n_mtp == 0


def _write_head(path, to, names):
    from ds4jax.io.gguf import TensorData, write_gguf

    file = open_checkpoint(path).file
    data = [(n, TensorData(file.info(n).shape, file.info(n).type, lambda n=n: file.raw(n).copy())) for n in names]
    write_gguf(to, {"general.architecture": "deepseek4_mtp_support"}, data)


def test_a_file_in_parts(gguf, tmp_path):
    first = rewrite(gguf, tmp_path / "m.gguf", per_part=20, empty=True)
    pack.pack(open_checkpoint(first), tmp_path / "packed")
    found, parts = open_checkpoint(tmp_path / "packed"), open_checkpoint(first).file.parts
    assert found.file.content == " ".join(content_hash.compute(part.path, part.status) for part in parts)
    assert_same(load.load(found)[0], load.load(gguf)[0])


# ---- prefixes --------------------------------------------------------------------------------------------------------
def test_prefixes_of_the_file_are_those_of_the_folder(gguf, made):
    def said(path):
        checkpoint = open_checkpoint(path)
        programs = steps(checkpoint, Settings(str(path), ctx=256))
        runner: Any = SimpleNamespace(
            cfg=checkpoint.cfg, checkpoint=checkpoint, settings=programs.settings, steps=programs, fits=lambda _: True
        )
        return fingerprint.fingerprint(runner), runner

    (a, of_folder), (b, of_file) = said(made), said(gguf)
    assert a == b and fingerprint.content(of_folder) == fingerprint.content(of_file)


def test_a_store_opens_at_once_however_large_the_model(made, tmp_path, monkeypatch):
    monkeypatch.setattr(content_hash, "AT_ONCE", 0)
    begun = []
    monkeypatch.setattr(fingerprint.KVStore, "begin", lambda store, content: begun.append(content))
    monkeypatch.setattr(fingerprint, "fingerprint", lambda runner: {})
    runner: Any = SimpleNamespace(checkpoint=open_checkpoint(made), fits=lambda _: True)
    fingerprint.open_store(tmp_path, 1 << 20, runner).close()
    assert begun == [Manifest.read(made).sources["model"][0]["hash"]]


# ---- interruption ----------------------------------------------------------------------------------------------------
class Killed(Exception):
    pass


@pytest.mark.parametrize("when", ["before a group", "in a group", "before its note", "before the manifest"])
@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_conversion_goes_on(gguf, made, tmp_path, monkeypatch, when, after):
    folder, groups, whole = tmp_path / "packed", [], pack._write

    def write(file, names, place, bar):
        groups.append(place.name)
        if when == "before a group" and len(groups) > after:
            raise Killed
        return whole(file, names, place, bar)

    def fails(*args, **kwargs):
        if len(groups) > after:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(pack, "_write", write)
    if when == "in a group":
        original = pack.open_plane
        monkeypatch.setattr(pack, "open_plane", fails)
    elif when == "before its note":
        original = pack.write_whole
        monkeypatch.setattr(pack, "write_whole", fails)
    elif when == "before the manifest":
        original = Manifest.write
        monkeypatch.setattr(Manifest, "write", fails)
    with pytest.raises(Killed):
        pack.pack(open_checkpoint(gguf), folder)
    with pytest.raises(GGUFError, match=f"{folder}: found a conversion that was interrupted, expected manifest.json"):
        open_checkpoint(folder)
    before = groups[:-1] if when != "before the manifest" else groups[:]
    monkeypatch.undo()
    again = []
    monkeypatch.setattr(pack, "_write", lambda *args: again.append(args[2].name) or whole(*args))
    manifest = pack.pack(open_checkpoint(gguf), folder)
    assert not set(again) & set(before) and len(again) + len(before) == len(os.listdir(folder / "model"))
    assert manifest.tensors == Manifest.read(made).tensors
    verify(folder)
    assert_same(load.load(folder)[0], load.load(gguf)[0])
    assert not (folder / packed.UNFINISHED).exists() and not (folder / "done").exists()


def test_what_a_process_left_that_was_killed_as_it_began_or_ended(gguf, folder):
    pack._clear(folder)
    left = [folder / "done/model.output.json", folder / packed.UNFINISHED]
    left[0].parent.mkdir()
    for path in left:
        path.write_text("{}")
    pack.pack(open_checkpoint(gguf), folder)
    assert not any(path.exists() for path in (*left, left[0].parent))
    begun = folder.with_name("begun")
    begun.mkdir()
    (begun / f"{packed.UNFINISHED}.tmp").touch()
    pack.pack(open_checkpoint(gguf), begun)
    verify(begun)


def test_a_disk_that_is_full_after_all_is_one_line(gguf, tmp_path, monkeypatch, caplog):
    def save(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: "x": Failed to write 3 bytes: No space left on device\nmore')

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", save)
    with pytest.raises(Ds4Error, match=r"cannot be written: Failed to write 3 bytes: No space left on device$"):
        pack.pack(open_checkpoint(gguf), tmp_path / "packed")
    monkeypatch.undo()
    pack.pack(open_checkpoint(gguf), tmp_path / "packed")
    verify(tmp_path / "packed")


def test_a_group_that_was_damaged_since_is_written_again(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(Manifest, "write", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        pack.pack(open_checkpoint(gguf), tmp_path / "packed")
    monkeypatch.undo()
    largest(tmp_path / "packed").write_bytes(b"short")
    pack.pack(open_checkpoint(gguf), tmp_path / "packed")
    verify(tmp_path / "packed")


@pytest.mark.slow
def test_a_killed_process_is_followed_by_another(tmp_path):
    command = [sys.executable, "-m", "ds4jax.checkpoint", "--config", "tiny", "--out", str(tmp_path / "packed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "packed/done").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(GGUFError, match="interrupted"):
        open_checkpoint(tmp_path / "packed")
    subprocess.run(command, check=True)
    verify(tmp_path / "packed")
    assert_same(load.load(tmp_path / "packed")[0], load.load(embedded_model("tiny"))[0])


def test_a_conversion_of_another_file_is_refused(gguf, folder, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other/small.gguf"
    other.write_bytes(gguf.read_bytes()[:-1] + b"\x01")
    with pytest.raises(GGUFError, match="found a conversion of small.gguf, expected one of small.gguf with the same"):
        pack.pack(open_checkpoint(other), folder)
    monkeypatch.setattr(pack, "_write", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        pack.pack(open_checkpoint(gguf), tmp_path / "begun")
    with pytest.raises(GGUFError, match="begun: found a conversion of small.gguf, expected one of small.gguf with the"):
        pack.pack(open_checkpoint(other), tmp_path / "begun")
    (tmp_path / "begun/conversion.json").write_text("{}")
    with pytest.raises(GGUFError, match="conversion.json: found no conversion of version 1, expected one"):
        pack.pack(open_checkpoint(gguf), tmp_path / "begun")


def test_other_folders_are_refused(gguf, made, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(Ds4Error, match="found 'notes.txt' in it, expected an empty folder"):
        pack.pack(open_checkpoint(gguf), tmp_path)
    with pytest.raises(GGUFError, match=f"{tmp_path}: found no manifest.json, expected a GGUF file or what"):
        open_checkpoint(tmp_path)
    with pack._alone_in(tmp_path), pytest.raises(Ds4Error, match="another process is converting to it"):
        pack.pack(open_checkpoint(gguf), tmp_path)
    with pytest.raises(Ds4Error, match="notes.txt: found a file, expected a folder to write to"):
        pack.pack(open_checkpoint(gguf), tmp_path / "notes.txt")
    with pytest.raises(Ds4Error, match="cannot be written: Not a directory"):
        pack.pack(open_checkpoint(gguf), tmp_path / "notes.txt/packed")
    for command in (lambda: pack.pack(open_checkpoint(made), tmp_path / "a"), lambda: _convert(made, tmp_path)):
        with pytest.raises(Ds4Error, match="small: found a folder of `ds4jax checkpoint`, expected a"):
            command()
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Ds4Error, match="found 1,000 bytes free on its disk, expected 2"):
        pack.pack(open_checkpoint(gguf), tmp_path / "full")


def _convert(source, folder):
    convert.convert(source, folder / "m.gguf", RECIPES["q8"])


# ---- damage ----------------------------------------------------------------------------------------------------------
def largest(folder):
    """The file with the most weights in it."""
    return max(folder.glob("model/*/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def test_a_missing_file_and_a_truncated_one_are_named(folder):
    path = largest(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    for check in (open_checkpoint, verify):
        with pytest.raises(GGUFError, match=f"^{path}: found {len(data) - 1} bytes, expected {len(data)}"):
            check(folder)
    path.unlink()
    with pytest.raises(GGUFError, match=f"^{path}: cannot be read: No such file"):
        open_checkpoint(folder)


def test_flipped_bits_are_named(folder):
    """By `verify`; loading looks at sizes alone."""
    paths = [largest(folder), folder / "headers/small.gguf", folder / "model/blk.0/_METADATA"]
    for path in paths:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    names = sorted(str(path.relative_to(folder)) for path in paths)
    with pytest.raises(GGUFError, match="found 3 files of other content than was written: ") as error:
        verify(folder)
    assert sorted(str(error.value).rpartition(": ")[2].split(", ")) == names


def test_what_tensorstore_cannot_read_is_named(folder):
    for path in folder.glob("model/blk.0/**/manifest.ocdbt"):
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(GGUFError, match="tensor 'blk.0.*': cannot be read"):
        load.load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda said: said | {"version": 2}, "found version 2, expected 1; convert the GGUF file again"),
        (lambda said: said | {"files": {}}, "found other content than was written, expected SHA-256"),
        (lambda said: {"a": 1}, "found no manifest of `ds4jax checkpoint` in it, expected one"),
        (lambda said: [], "found no manifest of `ds4jax checkpoint` in it, expected one"),
    ],
    ids=["version", "content", "fields", "list"],
)
def test_a_wrong_manifest_is_refused(folder, change, message):
    path = folder / MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(GGUFError, match=re.escape(f"{path}: {message}")):
        open_checkpoint(folder)
    path.write_text("{")
    with pytest.raises(GGUFError, match=f"{path}: found no manifest"):
        open_checkpoint(folder)


def test_planes_of_another_format_are_refused(made):
    file = open_checkpoint(made).file
    assert isinstance(file, PackedFile)
    with pytest.raises(GGUFError, match="tensor 'output.weight': found .*, expected a plane 'grid'"):
        file.read("output.weight", ((0, 1),), {"grid": np.zeros((1, 1), np.uint32)})


def test_what_was_written_is_compared(gguf, tmp_path, monkeypatch):
    class Other:
        def read(self):
            return self

        def result(self):
            return np.zeros(3)

    monkeypatch.setattr(pack, "open_plane", lambda *_: Other())
    with pytest.raises(GGUFError, match="found another plane '.*' than was written"):
        pack.pack(open_checkpoint(gguf), tmp_path / "packed")


# ---- the tool --------------------------------------------------------------------------------------------------------
def test_the_tool(gguf, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as the tool does for its process
    folder = tmp_path / "packed"
    for _ in range(2):  # the second time, it is there already
        assert main(["checkpoint", str(gguf), "--out", str(folder)]) == 0
        assert re.fullmatch(rf"{folder}: complete, 0.0\d GiB in \d+ files\n", capsys.readouterr().out)
    assert main(["checkpoint", str(folder), "--verify"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: as written, ")
    largest(folder).unlink()
    assert main(["checkpoint", str(folder), "--verify"]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert main(["checkpoint", str(folder)]) == 1
    assert "found neither of --out DIR and --verify, expected one" in capsys.readouterr().err
    assert main(["checkpoint", str(gguf), "--verify"]) == 1
    assert f"{gguf}: found a file, expected a folder of `ds4jax checkpoint`" in capsys.readouterr().err
