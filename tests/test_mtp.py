"""The MTP head: every layout loads to the same weights, a draft is the same in any chunks, and its input is the sum."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from ds4jax import sharding
from ds4jax.errors import GGUFError
from ds4jax.io import checkpoint, synthetic
from ds4jax.io import load as loader
from ds4jax.io.gguf import TensorData, write_gguf
from ds4jax.io.synthetic import random_data
from ds4jax.model import cache as kv
from ds4jax.model import mtp, weights
from ds4jax.model.compute import Compute
from ds4jax.model.tensors import mtp_table, tensor_table
from ds4jax.model.transformer import forward

EPS = 2.0**-17  # a float32, as files have it
MAIN = dataclasses.replace(
    synthetic.synthetic_config("odd"),
    n_layers=2,
    compress_ratios=(0, 4),
    swiglu_clamp=(1.0, 1.5),
    hc_eps=EPS,
    norm_eps=EPS,
)
CFG = dataclasses.replace(MAIN, n_mtp=1)


def stored(table):
    """{tensor name: (spec, type, bytes)} of random weights, in Q8_0 where that fits."""
    out = {}
    for spec in table:
        qtype = synthetic.storage_type(spec, lambda spec: Type.Q8_0)
        out[spec.name] = spec, qtype, random_data(CFG, 7, spec, qtype)
    return out


def write(path, metadata, tensors):
    data = {name: TensorData(spec.shape, qtype, lambda raw=raw: raw) for name, (spec, qtype, raw) in tensors.items()}
    write_gguf(path, metadata, data.items())
    return path


@pytest.fixture(scope="module")
def tensors():
    return stored(tensor_table(CFG)), stored(mtp_table(CFG, "mtp"))


@pytest.fixture(scope="module")
def in_file(tmp_path_factory, tensors):
    main, head = tensors
    return write(tmp_path_factory.mktemp("mtp") / "model.gguf", CFG.to_metadata(), main | head)


def nextn(tensors, with_own_head=True):
    """The same head in llama.cpp's layout: names, and e_proj and h_proj side by side."""
    head = {spec.family: (spec, qtype, raw) for spec, qtype, raw in tensors.values()}
    e, qtype, left = head["mtp.e_proj"]
    joined = dataclasses.replace(e, shape=(CFG.embed_dim, 2 * CFG.embed_dim))
    head["mtp.eh_proj"] = joined, qtype, np.concatenate([left, head["mtp.h_proj"][2]], axis=-1)
    table = mtp_table(CFG, "nextn")
    return {spec.name: head[spec.family] for spec in table if with_own_head or not spec.optional}


def sidecar(tensors, own_names):
    """llama.cpp's file of the head alone: the block, what it shares with the main model, and its own norm and
    hyper-connection under the main model's names (unless `own_names`)."""
    main, head = tensors
    out = nextn(head) | {name: main[name] for name in ("token_embd.weight", "output.weight")}
    block = f"blk.{CFG.n_layers}.nextn"
    names = {f"{block}.hc_head_{leaf}.weight": f"output_hc_{leaf}.weight" for leaf in ("fn", "base", "scale")}
    names |= {f"{block}.shared_head_norm.weight": "output_norm.weight"}
    if own_names:  # then those of the main model may be there, too, and mean nothing
        return out | {name: main[name] for name in names.values()}
    return {names.get(name, name): tensor for name, tensor in out.items()}


def nextn_metadata():
    cfg = dataclasses.replace(CFG, n_layers=CFG.n_layers + 1, n_mtp=0)
    return cfg.to_metadata() | {
        "deepseek4.nextn_predict_layers": 1,
        "deepseek4.attention.compress_ratios": [*CFG.compress_ratios, 0],
    }


def assert_equal(found, expected):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("layout", ["nextn", "nextn, not counted", "separate", "sidecar", "sidecar, own names"])
def test_layouts_load_to_the_same_weights(tmp_path, tensors, in_file, layout):
    main, head = tensors
    expected, opened = loader.load(in_file)
    assert opened.cfg == CFG and opened.mtp == "mtp"
    if layout.startswith("nextn"):
        metadata = nextn_metadata()
        metadata["deepseek4.block_count"] -= layout == "nextn, not counted"
        found, opened = loader.load(write(tmp_path / "m.gguf", metadata, main | nextn(head)))
    else:
        if layout == "separate":
            path = write(tmp_path / "mtp.gguf", {"general.architecture": "deepseek4_mtp_support"}, head)
        else:
            path = write(tmp_path / "mtp.gguf", nextn_metadata(), sidecar(tensors, layout == "sidecar, own names"))
        found, opened = loader.load(write(tmp_path / "m.gguf", MAIN.to_metadata(), main), mtp_path=path)
        with pytest.raises(GGUFError, match="second MTP head"):
            loader.load(in_file, mtp_path=path)
    assert opened.cfg == CFG and opened.mtp == ("mtp" if layout == "separate" else "nextn")
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"deepseek4.expert_used_count": 3},
            "key 'deepseek4.expert_used_count': found 3, expected 4, the main model's",
        ),
        (
            {"deepseek4.attention.layer_norm_rms_epsilon": 0.5},
            r"key 'deepseek4.attention.layer_norm_rms_epsilon': found 0.5, expected 7.6\d*e-06, the main model's",
        ),
        ({"deepseek4.rope.freq_base": "x"}, "key 'deepseek4.rope.freq_base': found 'x', expected 5000.0"),
        ({"token_embd.weight": None}, None),
        ({"token_embd.weight": "output_hc_fn.weight"}, r"tensor 'token_embd.weight': found shape \(2, 256\), expected"),
        ({"blk.2.nextn.eh_proj.weight": "blk.3"}, "tensor 'blk.3.nextn.eh_proj.weight': found the MTP head of another"),
        ({"output_norm.weight": "mtp.0.main_proj"}, "tensor 'mtp.0.main_proj.weight': found a DSpark drafter"),
        ({"blk.2.nextn.enorm.weight": None}, r"tensor 'blk.2.nextn.enorm.weight': not found, expected shape"),
        ({"output_norm.weight": "blk.2.x"}, "1 tensors that belong to no known part of the model: 'blk.2.x"),
    ],
)
def test_a_sidecar_of_another_model_is_refused(tmp_path, tensors, change, message):
    """The keys and tensors that a sidecar has fit the main model's, or are named."""
    metadata, held = nextn_metadata(), sidecar(tensors, False)
    ((what, value),) = change.items()
    if what in metadata:
        metadata |= change
    elif value is None:
        del held[what]
    elif value in held:
        held[what] = held[value]
    else:
        held[what.replace("blk.2", value) if value == "blk.3" else f"{value}.weight"] = held.pop(what)
    path = write(tmp_path / "mtp.gguf", metadata, held)
    with pytest.raises(GGUFError, match="found only an MTP head"):
        checkpoint.open_checkpoint(path)
    if message is None:
        assert checkpoint.open_mtp(path, MAIN).cfg == CFG
    else:
        with pytest.raises(GGUFError, match=rf"^{path}: [^\n]*{message}"):
            checkpoint.open_mtp(path, MAIN)


def test_a_head_without_its_own_norm_takes_the_main_models(tmp_path, tensors):
    main, head = tensors
    path = write(tmp_path / "m.gguf", nextn_metadata(), main | nextn(head, with_own_head=False))
    w, _ = loader.load(path)
    assert w.mtp is not None
    assert_equal(w.mtp.head.norm, w.head.norm)
    assert_equal(w.mtp.head.hc, w.head.hc)


def test_blocks_that_straddle_the_halves_are_refused(tmp_path, tensors):
    main, head = tensors
    head = nextn(head)
    spec = head[f"blk.{CFG.n_layers}.nextn.eh_proj.weight"][0]
    head[f"blk.{CFG.n_layers}.nextn.eh_proj.weight"] = spec, Type.Q4_K, random_data(CFG, 7, spec, Type.Q4_K)
    path = write(tmp_path / "m.gguf", nextn_metadata(), main | head)
    with pytest.raises(GGUFError, match=r"eh_proj.*found type Q4_K, .*rows of 128 values, not blocks of 256"):
        loader.load(path)


def test_memory_and_shards_count_the_head(in_file):
    mesh = sharding.make_mesh(1, 2)
    found, opened = loader.load(in_file, mesh)
    tree = weights.abstract(CFG, opened.types)
    assert weights.nbytes(tree) == sum(t.nbytes for t in opened.file.tensors.values())
    assert jax.tree.map(lambda v: v.sharding, found) == weights.shardings(tree, mesh)
    rings = [kv.abstract(c, "plain", "float32", 1, 256).window["x"].shape[0] for c in (CFG, MAIN)]
    assert rings == [MAIN.n_layers + 1, MAIN.n_layers]


# ---- drafts ----------------------------------------------------------------------------------------------------------
LENGTH = 75  # twice around a window of 32


@pytest.fixture(params=["official-float64", pytest.param("plain-float32", marks=pytest.mark.slow)])
def compute(request):
    """See test_model: in float64 no rounding to 8 bits can fall on the other side."""
    numerics, dtype = request.param.split("-")
    with jax.enable_x64(dtype == "float64"):
        yield Compute(numerics, dtype)


def drafts(w, compute, ids, chunk):
    """Logits and streams of drafts over a prompt, `chunk` positions at a time, each padded by 3 that are not real."""
    cache = kv.empty(CFG, compute.numerics, compute.dtype, 1, 256)

    @jax.jit
    def step(cache, tokens, following):
        start, n = cache.length, jnp.array([chunk], jnp.int32)
        X, cache = forward(w, cache, tokens, n, CFG, compute)
        logits, Z, cache = mtp.draft(w, cache, X, following, start, n, CFG, compute)
        return logits, Z, cache

    out = []
    for start in range(0, LENGTH, chunk):
        padded = np.full((1, chunk + 4), 9, np.int32)
        padded[:, : chunk + 1] = ids[:, start : start + chunk + 1]
        logits, Z, cache = step(cache, padded[:, :-1], padded[:, 1:])
        out.append((np.asarray(logits)[0, :chunk], np.asarray(Z)[0, :chunk]))
    assert cache.length.tolist() == [LENGTH]
    return [np.concatenate(parts) for parts in zip(*out, strict=True)]


def test_a_prompt_at_once_equals_token_by_token(in_file, compute):
    w, _ = loader.load(in_file)
    ids = np.random.default_rng(0).integers(0, CFG.vocab_size, (1, LENGTH + 1)).astype(np.int32)
    expected = drafts(w, compute, ids, LENGTH)
    for chunk in (1, 25):
        for a, b in zip(drafts(w, compute, ids, chunk), expected, strict=True):
            assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_the_blocks_input_in_numpy(in_file):
    w, _ = loader.load(in_file)
    rng = np.random.default_rng(1)
    X = rng.standard_normal((2, 3, CFG.n_streams, CFG.embed_dim)).astype(np.float32)
    x = rng.standard_normal((2, 3, CFG.embed_dim)).astype(np.float32)
    assert w.mtp is not None
    found = mtp.join(jnp.asarray(X), jnp.asarray(x), w.mtp, CFG)

    def rms(v, weight):
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + CFG.norm_eps) * np.asarray(weight)

    e_proj, h_proj = (np.asarray(m.dequantize()) for m in (w.mtp.e_proj, w.mtp.h_proj))
    for i in range(CFG.n_streams):
        expected = rms(X[:, :, i], w.mtp.hnorm) @ h_proj.T + rms(x, w.mtp.enorm) @ e_proj.T
        np.testing.assert_allclose(found[:, :, i], expected, rtol=1e-4, atol=1e-5)


def test_a_further_draft_follows_its_own_streams(in_file):
    """Two drafts in a row are what one call over both positions gives, once the second one's streams are known."""
    w, _ = loader.load(in_file)
    compute, one = Compute("plain"), jnp.array([1], jnp.int32)
    rng = np.random.default_rng(2)
    X = jnp.asarray(rng.standard_normal((1, 1, CFG.n_streams, CFG.embed_dim)), jnp.float32)
    first, second = (jnp.array([[t]], jnp.int32) for t in (3, 4))
    cache, at = kv.empty(CFG, "plain", "float32", 1, 256), jnp.array([0], jnp.int32)
    step = jax.jit(functools.partial(mtp.draft, cfg=CFG, compute=compute))
    _, Z, once = step(w, cache, X, first, at, one)
    logits, _, twice = step(w, once, Z, second, at + 1, one)
    tokens, both = jnp.concatenate([first, second], axis=1), jnp.concatenate([X, Z], axis=1)
    expected, _, cache = step(w, cache, both, tokens, at, 2 * one)
    np.testing.assert_allclose(logits[0, 0], expected[0, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(twice.window["x"][-1], cache.window["x"][-1], rtol=1e-4, atol=1e-5)
    assert twice.length.tolist() == [0]
