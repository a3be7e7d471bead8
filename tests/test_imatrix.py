"""Importance matrices: the file, merging, and what is collected against a plain NumPy computation."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ds4jax import sharding
from ds4jax.config import DrafterConfig
from ds4jax.errors import Ds4Error, GGUFError
from ds4jax.io import synthetic
from ds4jax.io.gguf import TensorData, write_gguf
from ds4jax.io.imatrix import Entry, Imatrix, merge
from ds4jax.io.load import load
from ds4jax.io.tokenizer import byte_tokenizer
from ds4jax.model import cache as kv
from ds4jax.model import dspark, mtp, transformer, weights
from ds4jax.model.compute import Compute
from ds4jax.model.tensors import tensor_table
from ds4jax.tools import cli, imatrix
from ds4jax.tools.imatrix import collect

CFG = synthetic.synthetic_config(
    {
        "n_layers": 2,
        "embed_dim": 64,
        "vocab_size": 384,
        "n_heads": 4,
        "head_dim": 64,
        "rope_dim": 16,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "compress_ratios": (4, 128),
        "index_heads": 4,
        "index_head_dim": 32,
        "n_experts": 8,
        "n_experts_used": 2,
        "expert_dim": 48,
        "n_hash_layers": 1,
        "swiglu_clamp": (0.625, 0.75),  # small, so that they matter
        "n_streams": 2,
        "hc_eps": 2.0**-20,  # float32, as in a file
        "norm_eps": 2.0**-20,
    }
)
PLAIN = Compute(numerics="plain")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    synthetic.write_synthetic(path, CFG, 3, synthetic.RECIPES["f32"], byte_tokenizer().to_metadata())
    return path


@pytest.fixture(scope="module")
def model(path):
    w, checkpoint = load(path)
    assert checkpoint.cfg == CFG
    return w


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, CFG.vocab_size, length).tolist()


def some(rng, *names) -> dict[str, Entry]:
    return {name: Entry(rng.random((3, 8)), rng.integers(1, 9, 3).astype(float)) for name in names}


# ---- file ------------------------------------------------------------------------------------------------------------
def test_layout_of_the_file(tmp_path):
    entries = some(np.random.default_rng(0), "blk.1.ffn_up_exps.weight", "blk.0.ffn_up_exps.weight")
    Imatrix(entries, ["a.txt", "b.txt"], 7, 512).write(tmp_path / "i.gguf")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix" and fields["imatrix.datasets"] == ["a.txt", "b.txt"]
    assert fields["imatrix.chunk_count"] == 7 and fields["imatrix.chunk_size"] == 512
    types = {key: reader.fields[key].types[0].name for key in ("imatrix.chunk_count", "imatrix.chunk_size")}
    assert set(types.values()) == {"UINT32"}
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == [f"blk.{i}.ffn_up_exps.weight.{end}" for i in (0, 1) for end in ("in_sum2", "counts")]
    for name, entry in entries.items():
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert (sums.tensor_type, counts.tensor_type) == (Type.F32, Type.F32)
        assert sums.shape.tolist() == [8, 3] and counts.shape.tolist() == [1, 3]
        np.testing.assert_array_equal(sums.data, entry.sums.astype(np.float32))
        np.testing.assert_array_equal(counts.data[:, 0], entry.counts)


def test_reads_what_it_writes(tmp_path):
    matrix = Imatrix(some(np.random.default_rng(0), "b", "a"), ["text"], 2, 128)
    matrix.write(tmp_path / "i.gguf")
    again = Imatrix.read(tmp_path / "i.gguf")
    assert (again.datasets, again.chunks, again.chunk_size) == (["text"], 2, 128)
    for name, entry in matrix.entries.items():
        np.testing.assert_array_equal(again.entries[name].sums, entry.sums.astype(np.float32))
        np.testing.assert_array_equal(again.entries[name].counts, entry.counts)
    again.write(tmp_path / "j.gguf")
    assert (tmp_path / "i.gguf").read_bytes() == (tmp_path / "j.gguf").read_bytes()


def foreign(path, **changes):
    """A file as llama.cpp's tool writes it: no trailing dims of 1, sums of x beside those of x²."""
    writer = gguf.GGUFWriter(path, "none")
    del writer.kv_data[0]["general.architecture"]
    metadata = {"general.type": "imatrix", "imatrix.chunk_count": 3, "imatrix.chunk_size": 512} | changes
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    for name, array in {
        "dense.in_sum2": np.arange(4),
        "dense.counts": np.array([2]),
        "dense.in_sum": np.arange(4),
        "grouped.in_sum2": np.arange(8).reshape(2, 4),  # several matrices, one count
        "grouped.counts": np.array([4]),
        "experts.in_sum2": np.arange(12).reshape(3, 4),
        "experts.counts": np.array([[1], [0], [2]]),
    }.items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_llama_cpp(tmp_path):
    foreign(tmp_path / "i.gguf")
    matrix = Imatrix.read(tmp_path / "i.gguf")
    assert matrix.entries.keys() == {"dense", "grouped", "experts"}

    def means(*which):
        entry = matrix.entry(*which)
        assert entry
        return entry.means()

    np.testing.assert_array_equal(means("dense", 1, 4), [[0, 0.5, 1, 1.5]])
    np.testing.assert_array_equal(means("grouped", 2, 4), [[0, 0.25, 0.5, 0.75], [1, 1.25, 1.5, 1.75]])
    np.testing.assert_array_equal(means("grouped", 1, 4), [[0.5, 0.75, 1, 1.25]])
    np.testing.assert_array_equal(
        means("experts", 3, 4), [[0, 1, 2, 3], [1, 1, 1, 1], [4, 4.5, 5, 5.5]]
    )  # the second was never chosen
    assert matrix.entry("other", 3, 4) is None
    for name, matrices, columns in (("experts", 2, 4), ("experts", 3, 5), ("dense", 2, 4)):
        with pytest.raises(Ds4Error, match=rf"tensor '{name}': found sums for .*, expected \({matrices}, {columns}\)"):
            matrix.entry(name, matrices, columns)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general.type": "model"}, "i.gguf: key 'general.type': found 'model', expected 'imatrix'"),
        ({"imatrix.chunk_size": "512"}, "i.gguf: key 'imatrix.chunk_size': found '512', expected int"),
        ({"imatrix.chunk_count": None}, "i.gguf: key 'imatrix.chunk_count': found None, expected int"),
    ],
)
def test_bad_metadata(changes, message, tmp_path):
    foreign(tmp_path / "i.gguf", **changes)
    with pytest.raises(Ds4Error, match=message):
        Imatrix.read(tmp_path / "i.gguf")


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, r"found no tensor \*\.in_sum2"),
        ({"x.in_sum2": np.ones((2, 4), np.float32)}, "tensor 'x.counts': not in the file"),
        ({"x.in_sum2": np.ones((2, 4), np.float32), "x.counts": np.ones((3, 1), np.float32)},
         r"'x\.counts': found 3 values, expected 1 or 2, as \.in_sum2 has shape \(2, 4\)"),
    ],
)  # fmt: skip
def test_bad_tensors(tensors, message, tmp_path):
    metadata = {"general.type": "imatrix", "imatrix.datasets": ["a"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 1}
    data = [(name, TensorData(a.shape, Type.F32, lambda a=a: a)) for name, a in tensors.items()]
    write_gguf(tmp_path / "i.gguf", metadata, data)
    with pytest.raises(Ds4Error, match=message):
        Imatrix.read(tmp_path / "i.gguf")


def test_the_old_format_is_refused(tmp_path):
    (tmp_path / "i.dat").write_bytes(bytes([1, 0, 0, 0]) * 100)
    with pytest.raises(GGUFError, match="not a GGUF file"):
        Imatrix.read(tmp_path / "i.dat")


def test_values_that_cannot_be_are_not_used():
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(Ds4Error, match="found 1 sums or counts that are negative or not finite"):
            Entry(np.array([[1.0, bad]]), np.ones(1)).means()


# ---- merging ---------------------------------------------------------------------------------------------------------
def test_merging_adds():
    rng = np.random.default_rng(0)
    a, b = Imatrix(some(rng, "x", "y"), ["a"], 3, 512), Imatrix(some(rng, "y", "z"), ["b", "c"], 1, 256)
    both = merge([a, b])
    assert both.entries.keys() == {"x", "y", "z"}
    np.testing.assert_array_equal(both.entries["y"].sums, a.entries["y"].sums + b.entries["y"].sums)
    np.testing.assert_array_equal(both.entries["y"].counts, a.entries["y"].counts + b.entries["y"].counts)
    np.testing.assert_array_equal(both.entries["z"].sums, b.entries["z"].sums)
    assert (both.datasets, both.chunks, both.chunk_size) == (["a", "b", "c"], 4, 512)  # 3.5 chunks, rounded up
    other = Imatrix({"x": Entry(np.ones((3, 4)), np.ones(3))}, ["d"], 1, 512)
    with pytest.raises(
        Ds4Error, match=r"tensor 'x': found sums for \(3, 4\) and for \(3, 8\), expected files of one model"
    ):
        merge([a, other])


# ---- collection ------------------------------------------------------------------------------------------------------
def inputs_of(w, tokens, monkeypatch) -> dict[str, list[np.ndarray]]:
    """What attention and experts of each layer are given when `transformer.forward` reads the tokens at once."""
    attention, moe = transformer.attention, transformer.moe

    @jax.jit
    def forward(w, cache, tokens, n):
        seen = {"attn": [], "ffn": []}
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "attention", lambda h, *args: seen["attn"].append(h) or attention(h, *args))
            patch.setattr(transformer, "moe", lambda h, *args: seen["ffn"].append(h) or moe(h, *args))
            transformer.forward(w, cache, tokens, n, CFG, PLAIN)
        return seen

    cache = kv.empty(CFG, "plain", "float32", 1, len(tokens))
    seen = forward(w, cache, jnp.array([tokens], jnp.int32), jnp.array([len(tokens)]))
    return jax.tree.map(lambda h: np.asarray(h, np.float64), seen)


def by_hand(w, tokens, monkeypatch) -> dict[str, Entry]:
    """The same as `collect`, token by token, in NumPy and float64."""
    seen, out = inputs_of(w, tokens, monkeypatch), {}

    def matrix(weight):
        return np.asarray(weight.dequantize(), np.float64)

    def activation(gate, up, clamp):
        gate, up = np.minimum(gate, clamp), np.clip(up, -clamp, clamp)
        return gate / (1 + np.exp(-gate)) * up

    def put(layer, names, x):
        for name in names:
            out[f"blk.{layer}.{name}.weight"] = Entry((x**2).sum(0)[None], np.array([float(len(x))]))

    for layer, (h, x) in enumerate(zip(seen["attn"], seen["ffn"], strict=True)):
        clamp = CFG.swiglu_clamp[layer]
        r = h @ matrix(w.attn.q_a[layer]).T
        r = r / np.sqrt((r**2).mean(-1, keepdims=True) + CFG.norm_eps) * np.asarray(w.attn.q_a_norm[layer])
        put(layer, ["attn_q_a", "attn_kv"], h)
        put(layer, ["attn_q_b"], r)
        if CFG.compress_ratios[layer]:
            put(layer, ["attn_compressor_kv", "attn_compressor_gate"], h)
        if CFG.compress_ratios[layer] == 4:
            put(layer, ["indexer_compressor_kv", "indexer_compressor_gate", "indexer.proj"], h)
            put(layer, ["indexer.attn_q_b"], r)
        put(layer, ["ffn_gate_inp", "ffn_gate_shexp", "ffn_up_shexp"], x)
        shared = [matrix(m[layer]) for m in (w.ffn.shared.gate, w.ffn.shared.up)]
        put(layer, ["ffn_down_shexp"], activation(x @ shared[0].T, x @ shared[1].T, clamp))

        experts = [matrix(m) for m in (w.ffn.experts.gate[layer], w.ffn.experts.up[layer])]
        counts = np.zeros(CFG.n_experts)
        into_gate, into_down = np.zeros((CFG.n_experts, CFG.embed_dim)), np.zeros((CFG.n_experts, CFG.expert_dim))
        for token, row in zip(tokens, x, strict=True):
            scores = np.sqrt(np.log1p(np.exp(matrix(w.ffn.router[layer]) @ row)))
            if layer < CFG.n_hash_layers:
                chosen = np.asarray(w.hash.tid2eid[layer])[token]
            else:
                chosen = np.argsort(-(scores + np.asarray(w.route.bias[layer])))[: CFG.n_experts_used]
            for e in chosen:
                weight = CFG.route_scale * scores[e] / scores[chosen].sum()
                act = activation(experts[0][e] @ row, experts[1][e] @ row, clamp)
                counts[e] += 1
                into_gate[e] += row**2
                into_down[e] += (act * weight) ** 2
        for name, sums in (("gate", into_gate), ("up", into_gate), ("down", into_down)):
            out[f"blk.{layer}.ffn_{name}_exps.weight"] = Entry(sums, counts)
    return out


def assert_same(found: dict[str, Entry], wanted: dict[str, Entry]) -> None:
    assert found.keys() == wanted.keys()
    for name, entry in wanted.items():
        np.testing.assert_array_equal(found[name].counts, entry.counts, err_msg=name)
        # float32 against float64, after up to two layers.
        np.testing.assert_allclose(found[name].sums, entry.sums, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def by_hand_41(model):
    with pytest.MonkeyPatch.context() as patch:
        return by_hand(model, text(1, 41), patch)


def test_collected_is_what_numpy_computes(model, by_hand_41):
    found = collect(model, CFG, PLAIN, [text(1, 41)], ctx=64, piece=16)  # pieces of 16, 16 and 9 padded to 16
    assert_same(found, by_hand_41)
    left_out = {spec.name for spec in tensor_table(CFG) if spec.kind == "matrix"} - found.keys()
    assert {name.removeprefix(f"blk.{i}.") for i in range(2) for name in left_out if name.startswith(f"blk.{i}.")} == {
        "attn_output_a.weight", "attn_output_b.weight", "hc_attn_fn.weight", "hc_ffn_fn.weight",
        "attn_compressor_ape.weight", "indexer_compressor_ape.weight",
    }  # fmt: skip
    assert found["blk.1.ffn_up_exps.weight"].counts.sum() == 41 * CFG.n_experts_used


def test_texts_are_separate_and_add_up(model, by_hand_41, monkeypatch):
    found = collect(model, CFG, PLAIN, [text(1, 41), text(2, 41)], ctx=64, piece=16)
    one, other = ({name: Imatrix({name: e}, ["x"], 1, 64) for name, e in part.items()}
                  for part in (by_hand_41, by_hand(model, text(2, 41), monkeypatch)))  # fmt: skip
    assert_same(found, {name: merge([one[name], other[name]]).entries[name] for name in one})


@pytest.mark.slow
def test_the_mtp_head_reads_every_token_but_the_last():
    """What its block sees is what `mtp.draft` gives it, whatever the pieces."""
    cfg = dataclasses.replace(CFG, n_mtp=1)
    w = weights.init_random(weights.abstract(cfg, synthetic.RECIPES["f32"]), cfg, seed=3)
    tokens, attention, moe = text(1, 41), transformer.attention, transformer.moe

    @jax.jit
    def forward(w, cache, tokens):
        seen = []
        X, after = transformer.forward(w, cache, tokens[:, :-1], jnp.array([40]), cfg, PLAIN)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "attention", lambda h, *args: seen.append(h) or attention(h, *args))
            patch.setattr(transformer, "moe", lambda h, *args: seen.append(h) or moe(h, *args))
            mtp.draft(w, after, X, tokens[:, 1:], cache.length, jnp.array([40]), cfg, PLAIN)
        return seen

    cache = kv.empty(cfg, "plain", "float32", 1, 64)
    attended, fed = (np.asarray(h, np.float64) for h in forward(w, cache, jnp.array([tokens], jnp.int32)))
    found = collect(w, cfg, PLAIN, [tokens], ctx=64, piece=16, layout="mtp")
    for name, h in (("attn_kv", attended), ("ffn_gate_inp", fed)):
        entry = found[f"mtp.0.{name}.weight"]
        assert entry.counts.tolist() == [40]
        np.testing.assert_allclose(entry.sums[0], (h**2).sum(0), rtol=1e-4)
    experts = found["mtp.0.ffn_up_exps.weight"]
    assert experts.counts.sum() == 40 * cfg.n_experts_used
    assert not any(name.startswith("mtp.") for name in collect(w, cfg, PLAIN, [tokens], ctx=64, piece=64))


DRAFTER = DrafterConfig(stages=2, block_size=4, markov_rank=16, noise_token=300, target_layers=(0, 1))


@pytest.mark.slow
def test_a_drafter_drafts_along_the_text(monkeypatch):
    """A block after every 4 tokens, each from a cache of its own; the context's rows count for what makes rows."""
    cfg = dataclasses.replace(CFG, drafter=DRAFTER, window=16)
    w = weights.init_random(weights.abstract(cfg, synthetic.RECIPES["f32"]), cfg, seed=3)
    d = weights.init_random(weights.abstract_drafter(cfg, synthetic.RECIPES["f32"]), cfg, seed=4)
    tokens, slots, (attention, moe) = text(1, 22), 4, (transformer.attention, transformer.moe)

    @jax.jit
    def blocks(w, d, tokens, n):
        """n (B,): how many of the tokens (B, T) are context."""
        taps, seen = dspark.Taps(cfg), []
        empty = kv.zeros(cfg, "plain", "float32", len(n), 64)
        _, cache = transformer.forward(w, empty, tokens, n, cfg, PLAIN, taps)
        features = taps.features(len(n))
        cache = dspark.write(d, cache, features, empty.length, n, cfg, PLAIN)
        anchors = jnp.take_along_axis(tokens, n[:, None], axis=1)[:, 0]
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "attention", lambda h, *args: seen.append(h) or attention(h, *args))
            patch.setattr(transformer, "moe", lambda h, *args: seen.append(h) or moe(h, *args))
            dspark.hidden(w, d, cache, anchors, jnp.full_like(n, slots), cfg, PLAIN)
        return seen, dspark.joined(d, features, cfg, PLAIN)

    n = [*range(slots, len(tokens), slots), len(tokens)]  # 4, 8, …: there is no block without context, nor at the end
    seen, m = jax.device_get(blocks(w, d, jnp.array([[*tokens, 0]] * len(n), jnp.int32), jnp.array(n)))
    drafted = slots * (len(n) - 1)
    found = collect(w, cfg, PLAIN, [tokens], ctx=64, piece=16, d=d)
    for stage in range(2):
        attended, fed = (h[:drafted] for h in seen[2 * stage : 2 * stage + 2])
        context = (m[-1, : len(tokens)].astype(np.float64) ** 2).sum(0)
        for name, h, more, rows in (
            ("attn_q_a", attended, 0, 0), ("ffn_gate_inp", fed, 0, 0), ("attn_kv", attended, context, len(tokens))
        ):  # fmt: skip
            entry = found[f"mtp.{stage}.{name}.weight"]
            assert entry.counts.tolist() == [drafted + rows]
            np.testing.assert_allclose(entry.sums[0], (h.astype(np.float64) ** 2).sum(0) + more, rtol=1e-4)
        experts = found[f"mtp.{stage}.ffn_down_exps.weight"]
        assert (
            experts.counts.sum() == drafted * cfg.n_experts_used and (experts.sums.any(1) == (experts.counts > 0)).all()
        )
    assert found.keys() >= collect(w, CFG, PLAIN, [tokens], ctx=64, piece=16).keys()


def test_experts_on_several_devices(model):
    mesh = sharding.make_mesh(tp=2, ep=2)
    tree = weights.abstract(CFG, synthetic.RECIPES["f32"])
    spread = jax.device_put(model, weights.shardings(tree, mesh))
    found = collect(spread, CFG, dataclasses.replace(PLAIN, mesh=mesh), [text(1, 25)], ctx=64, piece=16)
    assert_same(found, collect(model, CFG, PLAIN, [text(1, 25)], ctx=64, piece=16))


def test_a_broken_model_is_noticed(model):
    broken = model.replace(embed=jax.tree.map(lambda x: x * jnp.float32(jnp.nan), model.embed))
    with pytest.raises(Ds4Error, match="tensor 'blk.0.attn_q_a.weight': found inputs that are not finite"):
        collect(broken, CFG, PLAIN, [text(1, 25)], ctx=64, piece=16)


# ---- command line ----------------------------------------------------------------------------------------------------
def run(*argv) -> int:
    for flag in imatrix.FLAGS:
        imatrix.FLAGS[flag].unparse()
    imatrix.FLAGS.unparse_flags()
    return cli.run(imatrix.main, imatrix.FLAGS, imatrix.__doc__, [*map(str, argv)])


def test_command_line(model, path, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    (tmp_path / "c.toml").write_text(f'model = "{path}"\nnumerics = "plain"\nprefill_chunk = 16\npreallocate = true')
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    read = ("--config", tmp_path / "c.toml", "--text", tmp_path / "t.txt", "--ctx", 16)
    assert run(*read, "--chunks", 2, "--out", tmp_path / "a.gguf") == 0
    assert "2 chunks of 16 tokens; " in capsys.readouterr().err
    found = Imatrix.read(tmp_path / "a.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (["t.txt"], 2, 16)

    ids = tokenizer.encode_text((tmp_path / "t.txt").read_text())[:30]
    texts = [[tokenizer.bos_id, *ids[:15]], [tokenizer.bos_id, *ids[15:]]]
    assert_same(found.entries, {n: Entry(e.sums.astype(np.float32), e.counts)
                                for n, e in collect(model, CFG, PLAIN, texts, 16, 16).items()})  # fmt: skip

    assert run("--merge", f"{tmp_path}/a.gguf,{tmp_path}/a.gguf", "--out", tmp_path / "b.gguf") == 0
    twice = Imatrix.read(tmp_path / "b.gguf")
    np.testing.assert_array_equal(
        twice.entries["blk.1.attn_kv.weight"].sums, 2 * found.entries["blk.1.attn_kv.weight"].sums
    )

    capsys.readouterr()
    for argv, message in (
        (("--out", "x.gguf"), "expected --out FILE, and either --text FILE or --merge A,B"),
        (("--text", "t"), "expected --out FILE"),
        ((*read, "--chunks", 0, "--out", "x.gguf"), "chunks: found 0, expected at least 1"),
        (("--text", tmp_path / "none", "--out", "x.gguf"), "none: cannot be read: No such file"),
    ):
        assert run(*argv) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "t.txt").write_text("")
    assert run(*read, "--out", tmp_path / "x.gguf") == 1
    assert "t.txt: found no text" in capsys.readouterr().err
