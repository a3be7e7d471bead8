"""Two GPUs against one of the same machine: sums of small arrays, decoding and prefill of the first layers.

    python benchmarks/h200x2-2026-11-28/mesh.py LAYERS [small] [VARIANT,…]

The model is the full shape with random weights in the q2 file's types; both sides get the same ones. Nothing is timed
before three calls; medians. `small`: another shape without kernels, to try the script on a CPU. VARIANTs: numbers, of
those that are compiled for two GPUs; by default all.
"""
# ruff: noqa: E402

import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

SMALL = "small" in sys.argv
if SMALL:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
else:
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": "0.95"}

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax import sharding
from ds4jax.engine import compiled_steps, sampling
from ds4jax.engine.compiled_steps import BLOCK, CompiledSteps, decode_args
from ds4jax.engine.types import Sampling
from ds4jax.io.synthetic import FULL, KERNEL, RECIPES, Synthetic, first_layers
from ds4jax.model import cache as kv
from ds4jax.model import weights
from ds4jax.model.spread import WHOLE, over
from ds4jax.settings import Settings

LAYERS, START, GREEDY = int(sys.argv[1]), time.time(), Sampling(temperature=0.0)
RECORDED = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,WHILE"
OUTSIDE = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT", "xla_gpu_enable_command_buffer": RECORDED}
INSIDE = OUTSIDE | {"xla_gpu_enable_command_buffer": RECORDED + ",COLLECTIVES"}
NCCL = {"xla_gpu_experimental_use_collective_kernels": ""}  # else XLA has kernels of its own for small arrays
EVERY = {
    "XLA's kernels beside the graph": OUTSIDE, "NCCL beside the graph": OUTSIDE | NCCL,
    "NCCL in the graph": INSIDE | NCCL,
}  # fmt: skip
chosen = [int(i) for i in sys.argv[-1].split(",")] if len(sys.argv) > 2 and not SMALL else range(len(EVERY))
VARIANTS = {"default": {}} if SMALL else {name: EVERY[name] for i, name in enumerate(EVERY) if i in chosen}
CTX, CHUNK, BATCH = (512, 128, 4) if SMALL else (8448, 2048, 64)
LIMIT = float(os.environ.get("LIMIT", "500"))  # seconds after which the process ends, whatever hangs


def say(*what):
    print(f"{time.time() - START:6.1f}", *what, flush=True)


def median(f, n=5):
    for _ in range(3):
        f()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sums(mesh, pool):
    """Microseconds of a sum over both devices, in a chain of many, by size."""
    sizes, everywhere = [8, 16, 64, 512, 16384], sharding.replicated(mesh)

    def compiled(key):
        (_, options), kib, length = key

        def local(x):
            for _ in range(length):
                x = lax.psum(x * jnp.bfloat16(0.5), "tp")
            return x

        x = jax.ShapeDtypeStruct((kib * 512,), jnp.bfloat16, sharding=everywhere)
        return jax.jit(over(local, mesh, (WHOLE,), WHOLE)).lower(x).compile(options)

    def microseconds(program, kib):
        x = jax.device_put(jax.random.normal(jax.random.key(0), (kib * 512,), jnp.bfloat16), everywhere)
        return median(lambda: jax.block_until_ready([program(x) for _ in range(4)])) / 4 * 1e6

    keys = [(v, kib, length) for v in VARIANTS.items() for kib in sizes for length in (8, 72)]
    programs = dict(zip(((v[0], *rest) for v, *rest in keys), pool.map(compiled, keys), strict=True))
    for name in VARIANTS:
        for kib in sizes:
            try:
                few, many = (microseconds(programs[name, kib, length], kib) for length in (8, 72))
                say(f"sum, {name}: {kib} KiB {(many - few) / 64:.1f} us")
            except Exception as error:
                say(name, kib, "failed:", str(error)[:200])


def steps(devices, batch):
    settings = Settings(
        "none", ctx=CTX, batch=batch, dtype="bfloat16", kernels="xla" if SMALL else "pallas", tp=devices,
        prefill_chunk=CHUNK, expert_layout="file", preallocate=False,
    )  # fmt: skip
    cfg = first_layers(KERNEL if SMALL else FULL, LAYERS)
    return CompiledSteps(Synthetic(cfg, RECIPES["q8" if SMALL else "q2"]), settings)


def prefill_args(tokens, fresh):
    n, one = np.array([len(tokens)], np.int32), sampling.batch([GREEDY])
    follows = np.full(len(tokens), -1, np.int32)
    return np.int32(0), np.array([fresh]), tokens[None], n, one, follows, np.zeros(1, np.int32)


class Side:
    """One GPU, or two: weights and programs."""

    def __init__(self, devices):
        self.devices, self.one, self.many = devices, steps(devices, 1), steps(devices, BATCH)
        prefill = compiled_steps.compiler_options("prefill", self.one.compute.implementations)
        zeros = prefill_args(np.zeros(CHUNK, np.int32), True)
        self.jobs = {("prefill",): (self.one, "prefill", zeros, prefill)}
        for name, options in (VARIANTS if devices > 1 else {"in a graph": {} if SMALL else OUTSIDE}).items():
            for s in (self.one, self.many):
                args = s.results, *decode_args({}, 1, [GREEDY] * s.batch, s.batch)
                self.jobs["decode", s.batch, name] = s, "decode", args, options

    def compile(self, pool):
        lowered = {}
        for s, name, args, _ in self.jobs.values():
            if (id(s), name) not in lowered:
                lowered[id(s), name] = s._steps[name].lower(s.weights, s.cache, *args)
        say("lowered for", self.devices)

        def one(key):
            s, name, _, options = self.jobs[key]
            start = time.time()
            program = lowered[id(s), name].compile(options)
            say(self.devices, key, f"compiled in {time.time() - start:.1f} s")
            return program

        return {key: pool.submit(one, key) for key in self.jobs}

    def fill(self):
        self.weights = weights.init_random(self.one.tree, self.one.cfg, 0, self.one.compute.mesh)
        jax.block_until_ready(self.weights)
        say("weights for", self.devices)

    def put(self, s, name, args, first):
        if s.compute.mesh is None:
            return jax.device_put(args)
        return jax.device_put(args, jax.tree.broadcast(tuple(s.places(name)[0][first:]), args))

    def prefill(self, program, tokens, cache):
        logits = None
        for start in range(0, len(tokens), CHUNK):
            args = self.put(self.one, "prefill", prefill_args(tokens[start : start + CHUNK], start == 0), 0)
            _, logits, *_, cache = program(self.weights, cache, *args)
        return logits, cache

    def run(self, programs, tokens, other=None):
        """Time everything, compared with what another side said; → what this one says."""
        s, said = self.one, {}
        where = s.compute.mesh and jax.tree.map(lambda x: x.sharding, s.cache)
        program = programs["prefill",].result()
        cache = [kv.empty(s.cfg, s.settings.numerics, s.settings.dtype, 1, CTX, where)]

        def read():
            logits, cache[0] = self.prefill(program, tokens, cache[0])
            jax.block_until_ready(logits)

        t = median(read, 3)
        say(f"{self.devices} GPU: prefill of {len(tokens)}: {t * 1e3:.2f} ms, {len(tokens) / t:.0f} tokens/s")
        logits, short = self.prefill(program, tokens[:CHUNK], cache[0])
        said["logits"] = a = np.asarray(logits, np.float32)[0]
        if other:
            b = other["logits"]
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            say(f"logits after {CHUNK} tokens: error {error:.2e}; likeliest {a.argmax()} and {b.argmax()}")
        kept = jax.tree.map(np.asarray, short)
        for key in programs:
            if key[0] == "decode":
                try:
                    self.decode(key, programs[key].result(), tokens, kept, said, other)
                except Exception as error:
                    say(self.devices, key, "failed:", str(error)[:300])
        return said

    def decode(self, key, program, tokens, kept, said, other):
        _, batch, name = key
        s = self.one if batch == 1 else self.many
        slots = dict.fromkeys(range(batch))

        def every(x, y):  # the state after the prompt, in all slots
            whole = np.broadcast_to(x[:, :1] if x.ndim > 1 else x, y.shape)
            return jax.device_put(whole, y.sharding or jax.devices()[0])

        cache = jax.tree.map(every, kept, s.cache)
        results = tuple(jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in s.results)
        params = [GREEDY] * batch
        given = decode_args({slot: int(tokens[slot]) for slot in slots}, BLOCK, params, batch)
        first, on = (self.put(s, "decode", args, 1) for args in (given, decode_args(slots, BLOCK, params, batch)))
        found, start, timed = [], 0.0, 8
        for i in range(4 + timed):
            if i == 4:
                start = time.perf_counter()
            *results, cache = program(self.weights, cache, tuple(results), *(on if i else first))
            if i < 4:
                found.append(np.asarray(results[0]))
        jax.block_until_ready(results)
        ms = (time.perf_counter() - start) / timed / BLOCK * 1e3
        say(f"{self.devices} GPU: decode, {batch} sequences, {name}: {ms:.4f} ms a step")
        said[batch] = found = np.concatenate(found)
        if other:
            same = np.cumprod(found == other[batch], axis=0).sum(0)
            say(f"  of {len(found)} greedy tokens the same until {same.min()}, {np.median(same)} in the median")


def main():
    end = threading.Timer(LIMIT, lambda: (say("ended after", LIMIT, "s"), os._exit(3)))
    end.daemon = True
    end.start()
    say(jax.devices(), jax.__version__, f"{LAYERS} layers")
    two, one = Side(2), Side(1)
    with ThreadPoolExecutor(24) as pool:
        programs = {side: side.compile(pool) for side in (two, one)}
        one.fill()
        two.fill()
        for of_side in programs.values():
            for future in of_side.values():
                future.exception()
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, one.one.cfg.vocab_size, (2 if SMALL else 4) * CHUNK).astype(np.int32)
        said = one.run(programs[one], tokens)
        two.run(programs[two], tokens, said)
        if 1 < LAYERS <= 8:
            sums(two.one.compute.mesh, pool)
    say("done")


if __name__ == "__main__":
    main()
