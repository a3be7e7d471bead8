"""Compile steps of the full shape for GPUs that need not be there, and print what memory they need beside the rest.

    python scripts/measure_workspace.py --device H200 --points 2048:32768:1,0:32768:4 [--layers 4] [--jobs 8]
    python scripts/measure_workspace.py --fit

A point is CHUNK:CTX:BATCH, of a prefill step, or of a decoding step if CHUNK is 0. Each is compiled in a process of its
own, which needs the CUDA plugin, and printed as a line of JSON. What such lines say is kept as "rows" of
configs/workspace.json; --fit makes its "cards" of them, from which `ds4jax.engine.workspace` predicts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from absl import flags

from ds4jax.settings import Settings
from ds4jax.tools import cli

FLAGS = flags.FlagValues()
flags.DEFINE_list("device", ["H200"], "Names of cards, or here.", flag_values=FLAGS)
flags.DEFINE_integer("layers", 4, "The first layers of the model; 4 have every kind.", flag_values=FLAGS)
flags.DEFINE_list("points", ["2048:32768:1"], "CHUNK:CTX:BATCH; CHUNK 0 for decoding.", flag_values=FLAGS)
flags.DEFINE_integer("jobs", 1, "Processes at a time.", flag_values=FLAGS)
flags.DEFINE_bool("fit", False, "Compile nothing, but fit configs/workspace.json to its rows.", flag_values=FLAGS)


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


def fit(rows: Sequence[Sequence]) -> dict[str, dict]:
    """The numbers of `ds4jax.engine.workspace` by card, from rows (card, layers, chunk, ctx, batch, bytes).

    All are H200's but for what another card's prefill needs more or less, at the one point that each has a row of.
    """
    needs = {(card, layers, chunk, ctx, batch): nbytes for card, layers, chunk, ctx, batch, nbytes in rows}

    def four(chunk: int, ctx: int, batch: int = 1, card: str = "H200") -> int:
        """Of the first four layers."""
        return needs[card, 4, chunk, ctx, batch]

    chunk, ctx, batch = 2048, 393216, 4  # the point at which all layers were compiled
    per_ctx = 1024  # c of the moment at which a long context needs the most: the scores of 1024 queries
    a, b = _line(1024, four(1024, 32768), 4096, four(4096, 131072))
    a += (four(2048, 32768) - a - 2048 * b) / 2  # between that line and what the middle needs
    prefill = [
        (a, b, 0),
        (*_line(1024, four(1024, 131072) - per_ctx * 131072, chunk, four(chunk, ctx) - per_ctx * ctx), per_ctx),
    ]
    prefill = [tuple(map(round, moment)) for moment in prefill]
    alone = max(a + b * chunk + c * ctx for a, b, c in prefill)
    other_layers = needs["H200", 43, 0, ctx, batch] - four(0, ctx, batch)
    one, some, many = (1, four(0, 131072)), (batch, four(0, ctx, batch)), (16, four(0, 32768, 16))
    decode = [[round(a + other_layers), round(b), 0] for a, b in (_line(*one, *some), _line(*some, *many))]
    copy = round((needs["H200", 43, chunk, ctx, batch] - alone) / ctx)

    def numbers(card: str) -> dict:
        more = four(1024, 131072, card=card) - four(1024, 131072)
        return {"prefill": [[a + more, b, c] for a, b, c in prefill], "decode": decode, "copy": copy}

    like = {"H200": "H200", "H100": "H200", "B200": "B200", "RTX PRO 6000": "RTX PRO 6000"}
    like |= {"RTX 5090": "RTX PRO 6000", "GB10": "GB10"}
    return {card: numbers(measured) for card, measured in like.items()}


def _line(x1: int, y1: int, x2: int, y2: int) -> tuple[float, float]:
    """a and b of y = a + b·x through two points."""
    b = (y2 - y1) / (x2 - x1)
    return y1 - b * x1, b


def write_fit() -> None:
    """Replace the numbers in `workspace.PATH` by those that fit its rows."""
    from ds4jax.engine import workspace

    table = json.loads(workspace.PATH.read_text())
    text = json.dumps(table | {"cards": fit(table["rows"])}, indent=1)
    of_numbers = r"\[\s+([^\[\]{}]*?)\s+\]"  # such lists are a line each
    text = re.sub(of_numbers, lambda found: f"[{re.sub(r'\s*\n\s*', ' ', found[1])}]", text)
    workspace.PATH.write_text(text + "\n")


def main() -> None:
    """Run the tool as FLAGS say. Raises Ds4Error."""
    if FLAGS.fit:
        write_fit()
        return
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
