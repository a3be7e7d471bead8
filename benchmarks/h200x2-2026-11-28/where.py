"""Where the time of a step goes on two GPUs and on one, and ways to sum over two: mesh.py's model, one sequence.

    python benchmarks/h200x2-2026-11-28/where.py LAYERS [small]

Seconds of kernels are those of the first GPU, of one profiled call.
"""
# ruff: noqa: E402

import contextlib
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import jax
import jax.numpy as jnp
import mesh as m
import numpy as np
from jax import lax

from ds4jax import sharding
from ds4jax.engine import compiled_steps
from ds4jax.engine.compiled_steps import BLOCK, decode_args
from ds4jax.model import attention, moe
from ds4jax.model import cache as kv
from ds4jax.model.spread import WHOLE, over
from ds4jax.tools.roofline import kernel_times

say = m.say
SIZES = (8,) if m.SMALL else (8, 64, 512)
WAYS = {
    "XLA's kernels": (m.OUTSIDE, False), "NCCL in the graph": (m.INSIDE | m.NCCL, False),
    "exchange by copies": (m.INSIDE | {"xla_gpu_use_memcpy_local_p2p": True}, True),
}  # fmt: skip
if m.SMALL:
    WAYS = {"default": ({}, False), "exchange": ({}, True)}


def exchange(x, mesh, *axes):
    """The sum over two devices, each of which sends its part."""
    del axes
    return x if mesh is None else x + lax.ppermute(x, "tp", [(0, 1), (1, 0)])


@contextlib.contextmanager
def by_exchange(wanted):
    if not wanted:
        yield
        return
    before = sharding.total
    attention.total = moe.total = exchange
    yield
    attention.total = moe.total = before


def sums(mesh, pool):
    everywhere = sharding.replicated(mesh)

    def compiled(key):
        name, kib, length = key
        options, by_copies = WAYS[name]
        add = exchange if by_copies else sharding.total

        def local(x):
            for _ in range(length):
                x = add(x * jnp.bfloat16(0.5), mesh, "tp")
            return x

        x = jax.ShapeDtypeStruct((kib * 512,), jnp.bfloat16, sharding=everywhere)
        return jax.jit(over(local, mesh, (WHOLE,), WHOLE)).lower(x).compile(options)

    def microseconds(program, kib):
        x = jax.device_put(jax.random.normal(jax.random.key(0), (kib * 512,), jnp.bfloat16), everywhere)
        return m.median(lambda: jax.block_until_ready([program(x) for _ in range(8)]), 9) / 8 * 1e6

    keys = [(name, kib, length) for name in WAYS for kib in SIZES for length in (8, 136)]
    jobs = {key: pool.submit(compiled, key) for key in keys}
    for name in WAYS:
        try:
            text = str(jobs[name, 8, 8].result().as_text())
            kinds = {kind: text.count(kind) for kind in ("all-reduce(", "all-reduce-start(", "kCustom", "permute")}
            say(f"sum, {name}:", kinds)
            for kib in SIZES:
                few, many = (microseconds(jobs[name, kib, length].result(), kib) for length in (8, 136))
                say(f"  {kib} KiB {(many - few) / 128:.2f} us")
        except Exception as error:
            say(name, "failed:", str(error)[:300])


def profiled(what, launch, steps):
    """Time one launch, profile another, and list its kernels."""
    for _ in range(3):
        jax.block_until_ready(launch())
    start = time.perf_counter()
    jax.block_until_ready(launch())
    ms = (time.perf_counter() - start) / steps * 1e3
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(launch())
        times = {name: t / steps * 1e3 for name, t in kernel_times(Path(folder), 1).items()}
    say(f"{what}: {ms:.4f} ms a step, {sum(times.values()):.4f} ms of kernels")
    merged = {}
    for name, t in times.items():
        name = name.split("__")[0]
        merged[name] = merged.get(name, 0) + t
    listed = sorted(merged.items(), key=lambda item: -item[1])[:26]
    print("   ", "; ".join(f"{name} {t * 1e3:.1f}" for name, t in listed), "(us)", flush=True)


def main():
    end = threading.Timer(m.LIMIT, lambda: (say("ended after", m.LIMIT, "s"), os._exit(3)))
    end.daemon = True
    end.start()
    two, one = m.Side(2), m.Side(1)
    with ThreadPoolExecutor(24) as pool:
        jobs = {}
        for side in (two, one):
            for name, (options, by_copies) in WAYS.items() if side is two else [("one", (m.OUTSIDE, False))]:
                options = {} if m.SMALL else options
                s, key = side.one, (side.devices, by_copies)
                if key not in jobs:
                    with by_exchange(by_copies):
                        args = s.results, *decode_args({}, 1, [m.GREEDY], 1)
                        s._steps["decode"].clear_cache()
                        jobs[key] = s._steps["decode"].lower(s.weights, s.cache, *args)
                jobs[side.devices, name] = pool.submit(jobs[key].compile, options)
        for side in (two, one):
            s, zeros = side.one, m.prefill_args(np.zeros(m.CHUNK, np.int32), True)
            options = compiled_steps.compiler_options("prefill", s.compute.implementations)
            lowered = s._steps["prefill"].lower(s.weights, s.cache, *zeros)
            jobs[side.devices, "prefill"] = pool.submit(lowered.compile, options)
        say("lowered")
        sums(two.one.compute.mesh, pool)
        tokens = np.random.default_rng(0).integers(0, one.one.cfg.vocab_size, m.CHUNK).astype(np.int32)
        for side in (one, two):
            side.fill()
            s = side.one
            where = s.compute.mesh and jax.tree.map(lambda x: x.sharding, s.cache)
            state = {"cache": kv.empty(s.cfg, s.settings.numerics, s.settings.dtype, 1, m.CTX, where)}
            args = side.put(s, "prefill", m.prefill_args(tokens, True), 0)
            program = jobs[side.devices, "prefill"].result()

            def read(program=program, args=args, state=state, side=side):
                _, logits, *_, state["cache"] = program(side.weights, state["cache"], *args)
                return logits

            profiled(f"{side.devices} GPU: prefill of {m.CHUNK}", read, 1)
            first = side.put(s, "decode", decode_args({0: 5}, BLOCK, [m.GREEDY], 1), 1)
            for (devices, name), job in list(jobs.items()):
                if devices != side.devices or name in (True, False, "prefill"):
                    continue
                try:
                    program = job.result()
                    state["results"] = tuple(jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in s.results)

                    def step(program=program, state=state, side=side, first=first):
                        *results, state["cache"] = program(side.weights, state["cache"], state["results"], *first)
                        state["results"] = tuple(results)
                        return results[0]

                    profiled(f"{devices} GPU: decode, {name}", step, BLOCK)
                except Exception as error:
                    say(devices, name, "failed:", str(error)[:300])
    say("done")


if __name__ == "__main__":
    main()
