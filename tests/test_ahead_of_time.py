"""With the JAX that is installed, the steps compile for the GPUs that the configs name, XLA's options included.

No kernel of them spills registers, nor takes more shared memory than the GPU has (99 KiB for a block on an RTX PRO 6000
or a GB10): XLA refuses the latter always, the former with an option.

On a CPU; it takes minutes, and the CUDA plugin's compiler: ``pip install jax-cuda13-plugin jax-cuda13-pjrt`` in the
version of jax, and ``ptxas``, which the package nvidia-cuda-nvcc has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["0:32768:1", "0:32768:16", "256:32768:1", "2048:32768:1"])
@pytest.mark.parametrize("device", ["H200", "RTX PRO 6000", "GB10"])
def test_a_step_compiles(device, point):
    """Four layers, of all three kinds. A decoding step copies no weight: it needs little memory of its own.

    point: tokens of a chunk, 0 for decoding, the context's capacity, and sequences.
    """
    spills = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_fail_ptx_compilation_on_register_spilling=true"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": spills}
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "measure_workspace.py"), f"--device={device}"]
    command += ["--layers=4", f"--points={point}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kernels"] > 0 and found["temp"] < (2**26 if point.startswith("0:") else 2**31)
