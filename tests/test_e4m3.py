"""E4M3 weights, which no file has: values, kernels, and a model of random weights in DeepSeek's own types."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_kernel_matmul import check
from test_mesh import KERNEL

from ds4jax import sharding
from ds4jax.__main__ import main
from ds4jax.engine import model_runner
from ds4jax.engine.compiled_steps import CompiledSteps
from ds4jax.errors import ConfigError
from ds4jax.formats import E4M3, MXFP4
from ds4jax.io import recipes
from ds4jax.io.synthetic import FULL, Synthetic, first_layers, write_repeating
from ds4jax.model import support, weights
from ds4jax.settings import Settings
from pallas_kernels import common, grouped_gemm, matmul
from pallas_kernels.matmul import Config, Output, Shape

OFFICIAL = recipes.RANDOM_RECIPES["official"]


def test_every_code_and_scale():
    """Of codes that are numbers, where no product is subnormal, which some devices take for 0, or too large."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    q = np.resize(codes[np.isfinite(codes.astype(np.float32))], (236, 256))
    e = np.repeat(np.r_[0, 11:246].astype(np.uint8)[:, None], 2, axis=1)
    found = np.asarray(E4M3(jnp.asarray(e), jnp.asarray(q)).dequantize())
    scale = np.where(e > 0, np.ldexp(np.float32(1), e.astype(int) - 127), 0).astype(np.float32)
    np.testing.assert_array_equal(found, q.astype(np.float32) * np.repeat(scale, 128, axis=1))


def test_random_weights_are_finite_and_have_the_wanted_deviation():
    w = E4M3.random(jax.random.key(0), (3, 256, 1024), 0.02)
    assert jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), w) == E4M3.struct((3, 256, 1024))
    values = np.asarray(w.dequantize())
    assert abs(values.mean()) < 1e-4 and values.std() == pytest.approx(0.02, rel=0.01)
    assert (E4M3.block, E4M3.block_bytes) == (128, 129)


def test_a_matrix_is_cut_between_blocks():
    spec = next(s for s in jax.tree.leaves(weights.abstract(KERNEL, OFFICIAL)) if s.tensors[0].family == "attn.o_b")
    assert spec.format is E4M3
    e, q = jax.tree.leaves(spec.shardings(sharding.make_mesh(2)))
    shape = spec.struct()
    assert e.shard_shape(shape.e.shape)[-1] * 128 == q.shard_shape(shape.q.shape)[-1] == spec.shape[-1] // 2


# ---- kernels ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "shape, config",
    [
        (Shape(1, 512, (Output(4, "E4M3"),)), Config("vector", 4, 512, 1)),
        (Shape(2, 512, (Output(4, "E4M3"),), norm_eps=1e-6, norm_weight=True), Config("vector", 2, 256, 1)),
        (Shape(2, 256, (Output(8, "E4M3"),), groups=2), Config("vector", 4, 128, 1)),
        (Shape(1, 256, (Output(4, "E4M3", clamp=0.5), Output(2, "BF16"))), Config("vector", 2, 256, 1)),
        (Shape(5, 512, (Output(16, "E4M3", clamp=0.5),)), Config("dot", 16, 128, 4, splits=2)),
        (Shape(5, 256, (Output(16, "E4M3"), Output(16, "BF16"))), Config("dot", 16, 128, 4)),
    ],
    ids=["one row", "norm", "groups", "SwiGLU", "dot", "dot beside BF16"],
)
def test_few_rows(shape, config):
    check(shape, config, interpret=True)


@pytest.mark.parametrize("device, cores", [("NVIDIA H200", 132), ("NVIDIA GB10", 48)])
@pytest.mark.parametrize("m", [1, 16, 64])
def test_few_rows_lower_for_gpus(device, cores, m):
    """At the shape of o_b, with the default tiles."""
    shape = Shape(m, 8192, (Output(4096, "E4M3"),))
    args = jax.eval_shape(shape.inputs, jax.random.key(0))
    run = lambda *a: matmul.matmul(*a, config=matmul.default_config, **shape.static)  # noqa: E731
    assert "__gpu$xla.gpu.triton" in common.lower_for_gpu(run, *args, device=device, cores=cores)


def test_many_rows_lower_for_gpus():
    shape = grouped_gemm.Shape("linear", 128, 4096, 8192, "E4M3", 2)
    assert grouped_gemm.default_config(shape).fused
    x, layer, planes = jax.eval_shape(shape.inputs, jax.random.key(0))
    text = common.lower_for_gpu(
        lambda *a: grouped_gemm.linear(*a, fmt="E4M3", config=grouped_gemm.default_config(shape)), x, layer, planes
    )
    assert "__gpu$xla.gpu.triton" in text


# ---- a model ---------------------------------------------------------------------------------------------------------
def test_which_matrices_are_which():
    tree = weights.abstract(first_layers(FULL, 4), OFFICIAL)
    of = {s.tensors[0].family: s.format for s in jax.tree.leaves(tree)}
    assert of["attn.q_a"] is of["attn.o_b"] is of["ffn.shared.down"] is E4M3
    assert of["ffn.experts.gate"] is of["ffn.experts.down"] is MXFP4
    names = {f: fmt.__name__ for f, fmt in of.items() if isinstance(fmt, type)}
    assert (names["embed"], names["head.out"], names["csa.compressor.kv"]) == ("BF16",) * 3
    assert names["attn.hc.fn"] == names["head.hc.fn"] == "F32"


@pytest.mark.slow
@pytest.mark.parametrize("tp, tokens", [(2, 1), (4, 1), (2, 2048)])
def test_kernels_take_the_full_shape_on_a_mesh(tp, tokens):
    cfg = first_layers(FULL, 4)
    settings = Settings.load("h200x2", ctx=4096, batch=1, tp=tp, expert_layout="file")
    steps = CompiledSteps(Synthetic(cfg, OFFICIAL), settings)
    assert support.unsupported(cfg, steps.weights, steps.cache, steps.compute, tokens) == {}


def test_no_file_can_have_them(tmp_path):
    with pytest.raises(ConfigError, match="recipe: found E4M3 for .*, expected types that GGUF files have"):
        write_repeating(tmp_path / "m.gguf", Synthetic(KERNEL, OFFICIAL))
    with pytest.raises(ConfigError, match="found 'attn.q_a=E4M3', expected FAMILY=TYPE"):
        recipes.parse_types(["attn.q_a=E4M3"])


def test_a_model_of_random_weights_in_these_types():
    model = model_runner.open_model(Settings("none"), "kernel", "official")
    assert isinstance(model, Synthetic) and model.recipe is OFFICIAL


def test_a_recipe_is_of_random_weights_alone(capsys):
    assert main(["memory", "--recipe", "official"]) == 1
    assert "recipe=official, synthetic=None: expected --recipe beside --synthetic alone" in capsys.readouterr().err
