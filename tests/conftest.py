"""Strictness for every test: strict dtype promotion, warnings as errors (pyproject), four fake CPU devices."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    # Most of a CPU run is compilation, so compile without optimisation.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
