"""Compiled steps: XLA takes their options; a model or device that the kernels do not take is refused in one line."""

import jax
import pytest
from small import CFG

from ds4jax.engine.compiled_steps import CompiledSteps, compiler_options
from ds4jax.errors import ConfigError
from ds4jax.implementation import parse
from ds4jax.io import synthetic
from ds4jax.settings import Settings


@pytest.mark.parametrize("step, kernels", [("prefill", "xla"), ("decode", "xla"), ("decode", "pallas")])
def test_xla_knows_the_options_for_gpus(step, kernels):
    options = compiler_options(step, parse(kernels), "gpu")
    assert options and jax.jit(lambda x: x + 1).lower(1.0).compile(options)(1.0) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 2).lower(1.0).compile(options | {"xla_gpu_no_such_option": 1})


def test_kernels_are_for_gpus(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    settings = Settings("tiny", ctx=256, dtype="bfloat16", kernels="pallas")
    steps = CompiledSteps(synthetic.Synthetic(CFG, synthetic.RECIPES["q2"]), settings)
    with pytest.raises(ConfigError, match="kernels: found 'pallas' on a CPU, expected xla, .* or an NVIDIA GPU"):
        steps.compile_largest()


def test_a_model_that_the_kernels_do_not_take_is_refused_in_one_line(monkeypatch):
    settings = Settings("tiny", ctx=256, dtype="bfloat16", kernels="pallas")
    steps = CompiledSteps(synthetic.Synthetic(CFG, synthetic.RECIPES["q2"]), settings)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(
        ConfigError, match="kernels: found 'pallas', expected xla for this model: linear: .*; latent: heads of 96"
    ):
        steps.compile_largest()
