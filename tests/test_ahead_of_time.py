"""With the JAX that is installed, the steps compile for the GPUs that the configs name, XLA's options included.

On a CPU; it takes minutes, and the CUDA plugin's compiler: ``pip install jax-cuda13-plugin jax-cuda13-pjrt`` in the
version of jax.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ahead_of_time
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("device", ahead_of_time.GPUS)
def test_a_step_compiles(device, tokens):
    """Four layers, of all three kinds. A decoding step copies no weight: it needs little memory of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", ahead_of_time.__file__, device, str(tokens), "4"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kernels"] > 0 and found["temp_bytes"] < (2**26 if tokens == 1 else 2**31)
