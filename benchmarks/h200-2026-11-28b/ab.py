"""Times prefill and decoding of one checkout: ``python ab.py CHECKOUT BATCH LAYERS``, on a GPU.

BATCH 1: calls of 4,096 tokens and decoding, after 0, 2,048 or 24,576 tokens; 16: decoding of one sequence 16 times.
"""

import os
import statistics
import sys
import time

root, batch, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, root)
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

from ds4jax.settings import Settings  # noqa: E402 (JAX comes after the environment)

settings = Settings.load("h200", ctx=28800 if batch == 1 else 4096, batch=batch, prefill_chunk=4096)
settings.set_environment()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from ds4jax.engine.model_runner import ModelRunner  # noqa: E402
from ds4jax.engine.types import Sampling  # noqa: E402
from ds4jax.io.synthetic import FULL, RECIPES, Synthetic, first_layers  # noqa: E402
from ds4jax.tools import bench  # noqa: E402

GREEDY = Sampling(temperature=0.0)
runner = ModelRunner(Synthetic(first_layers(FULL, layers), RECIPES["q2"]), settings)


def fill(saved):
    for slot in range(batch):
        runner.restore(slot, saved, GREEDY)
    jax.block_until_ready(runner.cache)


def prefill(at):
    tokens = np.random.default_rng(0).integers(runner.cfg.vocab_size, size=4096).tolist()
    saved, times = bench.random_sequence(runner, at, 1) if at else None, []
    for _ in range(5):
        if at:
            fill(saved)
        start = time.perf_counter()
        runner.prefill(0, tokens, GREEDY, append=at > 0)
        times.append(time.perf_counter() - start)
    print(f"prefill of 4096 after {at}: {1e3 * statistics.median(times[2:]):.2f} ms", flush=True)


def decode(at):
    saved, times = bench.random_sequence(runner, at, 0), []
    fill(saved)
    bench._warm_decode(runner)
    for _ in range(3):
        fill(saved)
        given, running, read = dict.fromkeys(range(batch), 7), [], []
        for _ in range(20):  # the device is a block ahead of the host
            running.append(runner.decode_block(given, 16))
            given = dict.fromkeys(given)
            if len(running) > 1:
                running.pop(0).tokens()
                read.append(time.perf_counter())
        running.pop().tokens()
        times.append((time.perf_counter() - read[3]) / 16 / 16)
    print(f"decoding after {at}: {1e3 * statistics.median(times):.4f} ms a step", flush=True)


if batch == 1:
    prefill(0)
    prefill(24576)
    decode(2048)
    decode(24576)
else:
    decode(2048)
