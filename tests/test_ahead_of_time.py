"""With the JAX that is installed, the steps compile for the GPUs that the configs name, XLA's options included.

On a CPU; it takes minutes, and the CUDA plugin's compiler: ``pip install jax-cuda13-plugin jax-cuda13-pjrt`` in the
version of jax.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 256])
@pytest.mark.parametrize("device", ["H200", "RTX PRO 6000", "GB10"])
def test_a_step_compiles(device, chunk):
    """Four layers, of all three kinds. A decoding step copies no weight: it needs little memory of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "measure_workspace.py"), f"--device={device}"]
    command += ["--layers=4", f"--points={chunk}:32768:1"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kernels"] > 0 and found["temp"] < (2**31 if chunk else 2**26)
