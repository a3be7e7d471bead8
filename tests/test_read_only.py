"""Models in types that are read only: they compute as in F32, convert to other types, and some have kernels."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from ds4jax.formats import FORMATS, READ_ONLY
from ds4jax.io import synthetic
from ds4jax.io.convert import convert
from ds4jax.io.gguf import TensorData, write_gguf
from ds4jax.io.load import load
from ds4jax.io.recipes import RECIPES, fits, parse_types
from ds4jax.io.tokenizer import byte_tokenizer
from ds4jax.model import cache as kv
from ds4jax.model import support, weights
from ds4jax.model.compute import Compute
from ds4jax.model.tensors import tensor_table
from ds4jax.model.transformer import prefill
from pallas_kernels import formats as known
from pallas_kernels.common import UnsupportedFormat

CFG = small.CFG
RECIPE = {"dense": Type.Q6_K, "gate": Type.IQ3_XXS, "up": Type.IQ3_XXS, "down": Type.IQ4_XS}
OTHER = {"dense": Type.Q5_K, "gate": Type.IQ2_S, "up": Type.IQ2_S, "down": Type.Q3_K}


def chosen(spec, types):
    """The type of a matrix in a file of such types; Q5_0 where a row is not a multiple of 256."""
    expert = spec.family.removeprefix("ffn.experts.")
    qtype = types[expert if expert != spec.family else "dense"]
    return qtype if fits(spec, qtype) else Type.Q5_0


@functools.cache
def random_rows(qtype, columns, std):
    """1009 rows as a file has them, which the matrices of a model repeat, each from another one on."""
    return FORMATS[qtype].random(jax.random.key(0), (1009, columns), std).to_bytes()


def write(path, types, dequantized):
    """A model of random matrices in `types`; or of the same values in F32, dequantized by the gguf package."""
    tensors = []
    for spec in tensor_table(CFG):
        if spec.kind != "matrix":
            qtype = synthetic.storage_type(spec, RECIPES["f32"])
            raw = synthetic.random_data(CFG, 3, spec, qtype)
        else:
            qtype = chosen(spec, types)
            rows = random_rows(qtype, spec.shape[-1], 1.0 if spec.family == "embed" else spec.shape[-1] ** -0.5)
            rows = np.roll(rows, zlib.crc32(spec.name.encode()), axis=0)
            raw = np.resize(rows, (*spec.shape[:-1], rows.shape[-1]))
            if dequantized:
                raw, qtype = dequantize(raw, qtype), Type.F32
        tensors.append((spec.name, TensorData(spec.shape, qtype, functools.partial(np.asarray, raw))))
    write_gguf(path, CFG.to_metadata() | byte_tokenizer().to_metadata(), tensors)


def logits(path):
    """Of 38 tokens, a chunk of 36 and two of one token: experts are taken all at once, and one by one."""
    model, checkpoint = load(path)
    compute, tokens = Compute("plain"), jnp.arange(38, dtype=jnp.int32)[None] * 7 % CFG.vocab_size
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    cache, out = kv.empty(checkpoint.cfg, "plain", compute.dtype, 1, 128, device), []
    for start, stop in ((0, 36), (36, 37), (37, 38)):
        n = jnp.array([stop - start], jnp.int32)
        found, cache = prefill(model, cache, tokens[:, start:stop], n, cfg=CFG, compute=compute, all_positions=True)
        out.append(np.asarray(found[0]))
    return np.concatenate(out)


@pytest.mark.parametrize(
    "types", [RECIPE, pytest.param(OTHER, marks=pytest.mark.slow)], ids=lambda types: types["dense"].name
)
def test_logits_are_those_of_the_dequantized_model(types, tmp_path):
    for name, dequantized in (("quantized", False), ("f32", True)):
        write(tmp_path / f"{name}.gguf", types, dequantized)
    found, expected = (logits(tmp_path / f"{name}.gguf") for name in ("quantized", "f32"))
    assert found.std() > 0.1
    # The matrices are the same floats; only the order of sums is the compiler's.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * found.std())


def test_a_file_of_such_types_converts_to_others(tmp_path):
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    write(source, RECIPE, dequantized=False)
    convert(source, out, RECIPES["f32"], parse_types(["ffn.experts=Q8_0"]))
    write(tmp_path / "f32.gguf", RECIPE, dequantized=True)
    (found, checkpoint), (expected, _) = load(out), load(tmp_path / "f32.gguf")
    assert checkpoint.types["blk.1.ffn_up_exps.weight"] == Type.Q8_0
    np.testing.assert_array_equal(found.attn.kv[0].dequantize(), expected.attn.kv[0].dequantize())
    up, wanted = (model.ffn.experts.up[1].dequantize() for model in (found, expected))
    np.testing.assert_allclose(up, wanted, rtol=0, atol=0.02 * float(jnp.std(wanted)))


def problems(types, kernels, tokens=1):
    tree = weights.abstract(CFG, types)
    compute = Compute("official", "bfloat16", kernels=kernels)
    cache = kv.abstract(CFG, "official", "bfloat16", 1, 512)
    return support.unsupported(CFG, weights.structs(tree), cache, compute, tokens)


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize(
    "types", [pytest.param(RECIPE, marks=pytest.mark.slow), OTHER], ids=lambda types: types["dense"].name
)
def test_kernels_take_experts_of_the_types_of_llama_cpps_files(types, tokens):
    assert problems(lambda spec: chosen(spec, types), "xla,experts=pallas", tokens) == {}


WITHOUT = {"dense": Type.Q5_1, "gate": Type.IQ3_S, "up": Type.IQ3_S, "down": Type.IQ4_NL}


@pytest.mark.parametrize("tokens", [1, 64])
def test_kernels_refuse_other_types_and_name_the_command_that_converts_them(tokens):
    found = problems(lambda spec: chosen(spec, WITHOUT), "xla,mhc=pallas,linear=pallas,experts=pallas", tokens)
    assert found.keys() == {"mhc", "linear", "experts"}
    command = "ds4jax convert --source FILE.gguf --out NEW.gguf --types "
    assert found["experts"].startswith("format: found IQ")
    assert found["experts"].endswith(f"{command}ffn.experts.gate=Q4_K,ffn.experts.up=Q4_K,ffn.experts.down=Q4_K")
    assert "found Q" in found["linear"] and "attn.q_a=Q8_0" in found["linear"] and "head.out=Q8_0" in found["linear"]
    assert "attn.hc.fn=F16,ffn.hc.fn=F16,head.hc.fn=F16" in found["mhc"]
    assert "embed" not in str(found)


WITH_KERNELS = {"Q6_K", "Q5_K", "Q3_K", "IQ4_XS", "IQ3_XXS", "IQ2_XS", "IQ2_S"}


@pytest.mark.parametrize("kernel", ["matmul", "experts", "grouped_gemm"])
def test_every_kernel_takes_the_same_of_them(kernel):
    names = {fmt.__name__ for fmt in READ_ONLY}
    assert names <= {*known.names()} and names & {*known.names(kernel)} == WITH_KERNELS
    with pytest.raises(UnsupportedFormat, match="format: found IQ3_S, expected one of .*Q8_0"):
        known.find("IQ3_S", kernel)


def test_random_weights_are_the_same_within_a_program():
    """The deviation of the codes is measured while the program is traced."""
    fmt = FORMATS[Type.TQ2_0]
    within = jax.jit(lambda key: fmt.random(key, (3, 512), 0.5))(jax.random.key(0))
    np.testing.assert_array_equal(within.to_bytes(), fmt.random(jax.random.key(0), (3, 512), 0.5).to_bytes())
