"""Strictness for every test: strict dtype promotion, warnings as errors (pyproject), four fake CPU devices."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    # Most of a CPU run is compilation, so compile without optimisation.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
else:
    # Several processes share the card. The search for the fastest product would take most of the formulas' compilation.
    flags = "--xla_gpu_autotune_level=0"
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import jax  # noqa: E402
import jax.experimental.pallas.fuser  # noqa: E402
import pytest  # noqa: E402

# Interpreting a kernel imports `fuser`, which adds a setting to the key of every compiled function. Imported here, it
# makes no test compile anything again.

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def float64():
    """The tests of a module may compute in float64, in their own thread."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def float64_in_threads():
    """`float64` in the threads that compile, too."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
