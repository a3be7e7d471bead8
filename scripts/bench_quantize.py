"""Times the quantizers on one layer's routed experts, and checks that the results are as good as the CPU's.

    python scripts/bench_quantize.py                      # on a GPU: the full size, 256 experts of three 4096 × 2048
    python scripts/bench_quantize.py --experts 2 --layers 1

Gate and up become IQ2_XXS, down Q2_K, as in the published recipe (`--gate_up`, `--down` choose others), with an
importance per expert and column. The weights are Gaussian; speed does not depend on values. Prints a table and exits
with status 1 if a check fails: errors of a slice differ from the CPU's by more than 0.2 %, or two runs differ in any
byte. Q8_0, bit for bit ggml's on a CPU, is checked on values half-way between two codes: a GPU's float32 division is
not correctly rounded, so there (and only there) it may take the neighbouring code, which is as near.
"""

from __future__ import annotations

import sys
import time

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ds4jax.formats import Q8_0, WRITABLE
from ds4jax.formats.quantize import quantize

NAMES = {fmt.__name__: fmt for fmt in WRITABLE}
EXPERTS = flags.DEFINE_integer("experts", None, "Experts of the layer (default: 256 on a GPU, 1 on the CPU).")
AT_ONCE = flags.DEFINE_integer("experts_at_once", 64, "Experts in one call: 64 are 2 GiB of float32.")
DIM = flags.DEFINE_integer("dim", None, "Model width (default: 4096 on a GPU, 512 on the CPU).")
EXPERT_DIM = flags.DEFINE_integer("expert_dim", None, "Expert width (default: 2048 on a GPU, 256 on the CPU).")
LAYERS = flags.DEFINE_integer("layers", 43, "Layers of the projection.")
GATE_UP = flags.DEFINE_enum("gate_up", "IQ2_XXS", list(NAMES), "Format of the gate and up matrices.")
DOWN = flags.DEFINE_enum("down", "Q2_K", list(NAMES), "Format of the down matrices.")


def draw(seed: int, experts: int, rows: int, columns: int):
    """Weights float32 (experts, rows, columns) and log-normal importances (experts, columns), on the default device."""

    @jax.jit
    def values():
        kx, ki = jax.random.split(jax.random.key(seed))
        x = 0.02 * jax.random.normal(kx, (experts, rows, columns), jnp.float32)
        return x, jnp.exp(1.5 * jax.random.normal(ki, (experts, columns), jnp.float32))

    return jax.block_until_ready(values())


def seconds(x, fmt, importance) -> float:
    start = time.perf_counter()
    jax.block_until_ready(quantize(x, fmt, importance))
    return time.perf_counter() - start


def time_matrices(fmt, experts: int, rows: int, columns: int) -> float:
    """Seconds for `experts` matrices, after a first call that compiles."""
    total, compiled = 0.0, None
    for first in range(0, experts, AT_ONCE.value):
        n = min(AT_ONCE.value, experts - first)
        x, importance = draw(first, n, rows, columns)
        if n != compiled:
            compiled = n
            once = seconds(x, fmt, importance)
            print(f"  compiling and running {fmt.__name__} {list(x.shape)}: {once:.1f} s", flush=True)
        total += seconds(x, fmt, importance)
    return total


def relative_error(x, q, importance) -> float:
    """Weighted RMSE over weighted RMS, in float64 on the host, of what the gguf package reads from the bytes."""
    x, y = np.asarray(x, np.float64), gguf.quants.dequantize(q.to_bytes(), q.ggml_type).astype(np.float64)
    w = np.asarray(importance, np.float64)[:, None, :]
    return float(np.sqrt(np.sum(w * (x - y) ** 2) / np.sum(w * x**2)))


def check(fmt, columns: int) -> bool:
    """Compares a slice with the CPU's result; prints one line."""
    x, importance = draw(99, 2, 64, columns)
    if fmt is Q8_0:  # as near to the half of a step as float32 comes, where every rounding shows
        blocks = np.array(x).reshape(-1, 32)
        blocks[:, 1:] = blocks[:, :1] / 127 * (np.arange(1, 32, dtype=np.float32) * 3 + 0.5)
        x = jnp.asarray(blocks.reshape(x.shape))
    here, again = quantize(x, fmt, importance), quantize(x, fmt, importance)
    cpu = jax.devices("cpu")[0]
    there = quantize(jax.device_put(x, cpu), fmt, jax.device_put(importance, cpu))
    ours, theirs = relative_error(x, here, importance), relative_error(x, there, importance)
    repeats = np.array_equal(here.to_bytes(), again.to_bytes())
    same = float(np.mean(here.to_bytes() == there.to_bytes()))
    good = repeats and abs(ours / theirs - 1) < 2e-3
    print(
        f"  {fmt.__name__:8} relative error {ours:.5f}, on the CPU {theirs:.5f}; {same:.2%} of bytes equal; "
        f"{'repeats' if repeats else 'DOES NOT REPEAT'}: {'ok' if good else 'FAILED'}",
        flush=True,
    )
    return good


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    device = jax.devices()[0]
    full = device.platform != "cpu"
    experts = EXPERTS.value or (256 if full else 1)
    dim, expert_dim = DIM.value or (4096 if full else 512), EXPERT_DIM.value or (2048 if full else 256)
    gate_up, down = NAMES[GATE_UP.value], NAMES[DOWN.value]
    print(f"device: {device.device_kind} ({device.platform}), jax {jax.__version__}")

    print("checks against the CPU:")
    good = [check(fmt, columns) for fmt, columns in ((gate_up, dim), (down, expert_dim), (Q8_0, dim))]

    print(f"one layer, {experts} experts of three {dim} × {expert_dim} matrices:")
    gate_up_s = sum(time_matrices(gate_up, experts, expert_dim, dim) for _ in range(2))
    down_s = time_matrices(down, experts, dim, expert_dim)
    total, weights = gate_up_s + down_s, experts * dim * expert_dim
    print(f"  gate, up {gate_up.__name__:8} {gate_up_s:8.2f} s  {2 * weights / gate_up_s / 1e9:6.3f} G weights/s")
    print(f"  down     {down.__name__:8} {down_s:8.2f} s  {weights / down_s / 1e9:6.3f} G weights/s")
    print(f"  layer             {total:8.2f} s; {LAYERS.value} layers: {LAYERS.value * total / 60:.1f} min")
    if full and (stats := device.memory_stats()):
        print(f"  peak memory {stats['peak_bytes_in_use'] / 2**30:.1f} GiB")
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    app.run(main)
