"""Compile steps of the full shape for GPUs that need not be there, and print what memory they need beside the rest.

    python scripts/measure_workspace.py --device H200 --points 2048:32768:1,0:32768:4 [--layers 4] [--jobs 8]

A point is CHUNK:CTX:BATCH, of a prefill step, or of a decoding step if CHUNK is 0. Each is compiled in a process of its
own and printed as a line of JSON; `ds4jax.engine.workspace` is fitted to such lines. Needs the CUDA plugin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from absl import flags

from ds4jax.settings import Settings
from ds4jax.tools import cli

FLAGS = flags.FlagValues()
flags.DEFINE_list("device", ["H200"], "Names of cards, or here.", flag_values=FLAGS)
flags.DEFINE_integer("layers", 4, "The first layers of the model; 4 have every kind.", flag_values=FLAGS)
flags.DEFINE_list("points", ["2048:32768:1"], "CHUNK:CTX:BATCH; CHUNK 0 for decoding.", flag_values=FLAGS)
flags.DEFINE_integer("jobs", 1, "Processes at a time.", flag_values=FLAGS)


def measure(device: str, layers: int, point: str) -> dict:
    """Compile one step in this process."""
    from ds4jax.engine import cards, memory
    from ds4jax.engine.compiled_steps import CompiledSteps
    from ds4jax.io.synthetic import FULL, RECIPES, Synthetic, first_layers

    start, (chunk, ctx, batch) = time.monotonic(), map(int, point.split(":"))
    settings = Settings("none", ctx=ctx, batch=batch, dtype="bfloat16", kernels="pallas")
    card = None if device == "here" else cards.find(device)
    steps = CompiledSteps(Synthetic(first_layers(FULL, layers), RECIPES["q2"]), settings, card=card)
    steps.get_all(steps.calls([chunk])[1:] if chunk else steps.calls([]))
    ((_, program),) = steps.compiled.items()
    found = memory.plan(steps)
    return {
        "device": found.device, "layers": layers, "chunk": chunk, "ctx": ctx, "batch": batch, **found.workspace,
        "temp": program.memory_analysis().temp_size_in_bytes,
        "kernels": str(program.as_text()).count("__gpu$xla.gpu.triton"), "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    todo = [(device, point) for point in FLAGS.points for device in FLAGS.device]
    if len(todo) == 1:
        import jax

        print(json.dumps({"jax": jax.__version__} | measure(todo[0][0], FLAGS.layers, todo[0][1])), flush=True)
        return

    def one(device: str, point: str) -> None:
        argv = [f"--device={device}", f"--layers={FLAGS.layers}", f"--points={point}"]
        environment = os.environ | ({} if device == "here" else {"JAX_PLATFORMS": "cpu"})
        run = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *argv], capture_output=True, text=True, env=environment
        )
        print(run.stdout if run.returncode == 0 else f"{device} {point}: {run.stderr[-2000:]}", end="", flush=True)

    with ThreadPoolExecutor(FLAGS.jobs) as pool:
        list(pool.map(lambda job: one(*job), todo))


if __name__ == "__main__":
    raise SystemExit(cli.run(main, FLAGS, __doc__))
