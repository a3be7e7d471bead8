"""Times prefill, decoding and rounds of drafts of the full shape with random weights: ``python steps.py [PART]``.

On a GPU. PART: `one`, of one sequence, or `several`; otherwise both.

All programs are compiled at once, before anything is timed. One sequence has experts as in the file; several have them
wide, as `expert_layout = "auto"` gives them.
"""

import dataclasses
import gc
import statistics
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

from ds4jax.settings import Settings

BASE = Settings.load("h200", prefill_chunk=4096)
BASE.set_environment()

import jax  # noqa: E402 (JAX comes after the environment)
import numpy as np  # noqa: E402

from ds4jax.engine import memory, model_runner  # noqa: E402
from ds4jax.engine.compiled_steps import CompiledSteps  # noqa: E402
from ds4jax.engine.types import Sampling  # noqa: E402
from ds4jax.io.synthetic import FULL, RECIPES, Synthetic, first_layers  # noqa: E402
from ds4jax.model import weights  # noqa: E402
from ds4jax.tools import bench  # noqa: E402

ONLY, LAYERS = sys.argv[1:] or ["one", "several"], 43
GREEDY, START = Sampling(temperature=0.0), time.perf_counter()
PUBLISHED = (0.83, 0.73, 0.57, 0.47, 0.40)  # marginal acceptance of 0731 by slot
AFTER = tuple(b / a for a, b in zip((1.0, *PUBLISHED), PUBLISHED, strict=False))  # if those before were accepted


def say(text):
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


def made(batch, ctx, layout, draft_tokens=0, sizes=()):
    """Steps, compiled in threads of their own."""
    draft = "auto" if draft_tokens else "off"
    settings = dataclasses.replace(
        BASE, batch=batch, ctx=ctx, expert_layout=layout, draft=draft, draft_tokens=draft_tokens
    )
    source = Synthetic(first_layers(FULL, LAYERS), RECIPES["q2"])
    source = source.with_drafter() if draft_tokens else source
    steps = CompiledSteps(source, settings, batch, False, None, AFTER if draft_tokens else ())
    return source, settings, steps, sizes


JOBS = {}
if "one" in ONLY:
    JOBS |= {"one": made(1, 393216, "file", 0, (2048, 4096)), "one, drafts": made(1, 32768, "file", 5)}
if "several" in ONLY:
    JOBS |= {"16": made(16, 4096, "wide"), "16, drafts": made(16, 4096, "wide", 2), "64": made(64, 4096, "wide")}
calls = [(name, steps, call) for name, (_, _, steps, sizes) in JOBS.items() for call in steps.calls(sizes)]
with ThreadPoolExecutor(16) as pool:

    def compiled(job):
        name, steps, (step, args) = job
        begun = time.perf_counter()
        steps.prepare(step, *args)
        say(f"compiled {step} of {name} in {time.perf_counter() - begun:.0f} s")

    list(pool.map(compiled, calls))

memory.check = lambda steps, sizes: memory.plan(steps)
shared = {}


def init_random(tree, cfg, seed, mesh):
    if not shared:
        shared["w"] = jax.block_until_ready(INIT(tree, cfg, seed, mesh))
    return shared["w"] if cfg.drafter else dataclasses.replace(shared["w"], dspark=None)


INIT, weights.init_random = weights.init_random, init_random


def runner(name):
    source, settings, steps, _ = JOBS[name]
    memory.steps = lambda *args, **kwargs: steps
    return model_runner.ModelRunner(source, settings)


def fill(run, saved):
    for slot in range(run.batch):
        run.restore(slot, saved[slot % len(saved)], GREEDY)
    jax.block_until_ready(run.cache)


def prefill(run, n, times=4):
    """Seconds of each chunk of a prompt of n tokens, the medians of some runs but the first."""
    tokens, every = np.random.default_rng(0).integers(run.cfg.vocab_size, size=n).tolist(), []
    for _ in range(times):
        took = []
        for at in range(0, n, 4096):
            begun = time.perf_counter()
            run.prefill(0, tokens[at : at + 4096], GREEDY, append=at > 0)
            took.append(time.perf_counter() - begun)
        every.append(took)
    return [statistics.median(column) for column in zip(*every[1:], strict=True)]


def pipelined(begin, n, skip):
    """Seconds a call, of n that are begun one ahead of the host, from the `skip`-th on; → and what they returned."""
    running, read, said = [], [], []
    for i in range(n):
        running.append(begin(i))
        if len(running) > 1:
            said.append(running.pop(0).tokens())
            read.append(time.perf_counter())
    said.append(running.pop().tokens())
    return (time.perf_counter() - read[skip]) / (n - 1 - skip), said


def decode(run, saved, blocks=20):
    times, text = [], []
    for _ in range(4):
        fill(run, saved)
        t, said = pipelined(
            lambda i: run.decode_block(dict.fromkeys(range(run.batch), 7 if i == 0 else None), 16), blocks, 3
        )
        times.append(t / 16)
        text.append([token for block in said for token in block[0]])
    assert all(t == text[0] for t in text), "does not repeat"
    return statistics.median(times[1:]), text[0]


def speculate(run, saved, n, calls=24):
    """Seconds a round, tokens a round of each sequence, and tokens a second."""
    found = []
    for _ in range(4):
        fill(run, saved)
        tokens = dict.fromkeys(range(run.batch), 7)
        total, rounds, begun = 0, 0, time.perf_counter()
        for i in range(calls):
            if i == 4:
                begun, total, rounds = time.perf_counter(), 0, 0
            said = run.speculate(tokens, dict.fromkeys(tokens, 8 * (n + 1)), n, 8).tokens()
            tokens = dict.fromkeys(tokens)
            total += sum(map(len, said.values()))
            rounds += 8
        seconds = time.perf_counter() - begun
        found.append((seconds / rounds, total / rounds / run.batch, total / seconds))
    return sorted(found[1:])[1]


def prefills(run):
    for n in (2048, 8192):
        t = prefill(run, n)
        say(f"prefill to {n}: {n / sum(t):.0f} tokens/s; ms: {[round(1e3 * x, 1) for x in t]}")
    t = prefill(run, 131072, 2)
    say(f"prefill to 28672: {28672 / sum(t[:7]):.0f} tokens/s; ms: {[round(1e3 * x, 1) for x in t[:7]]}")
    say(f"prefill to 131072: {131072 / sum(t):.0f} tokens/s, the last chunk {1e3 * t[-1]:.1f} ms (ctx 393216)")


PLAIN = {}  # seconds of a step, by sequences


def steps_of(run, name, lengths=(2048,), blocks=20):
    for at in lengths:
        t, _ = decode(run, [bench.random_sequence(run, at, seed) for seed in range(run.batch)], blocks)
        PLAIN.setdefault(run.batch, t)
        say(f"decoding, {name}, at {at}: {1e3 * t:.3f} ms a step, {run.batch / t:.1f} tokens/s")


def rounds_of(run, name, calls=24):
    saved, plain = [bench.random_sequence(run, 2048, seed) for seed in range(run.batch)], PLAIN[run.batch]
    for n in run.steps.draft_counts:
        t, each, rate = speculate(run, saved, n, calls)
        say(
            f"{n} drafts, {name}: {1e3 * t:.3f} ms a round, {t / plain:.2f} plain steps, {each:.2f} tokens a round of "
            f"each, {rate:.1f} tokens/s, {rate * plain / run.batch:.2f} times"
        )


def measure(name, *parts):
    """Each part, even if one before it has failed."""
    try:
        run = runner(name)
        say(f"{name}: weights and cache are there")
        for part in parts:
            try:
                part(run, name)
            except Exception:
                traceback.print_exc()
    except Exception:
        traceback.print_exc()


if "one" in ONLY:
    measure("one, drafts")  # so that the drafter's weights are made with the model's
    measure("one", lambda run, name: steps_of(run, name, (2048, 28672, 262144)), lambda run, _: prefills(run))
    measure("one, drafts", steps_of, rounds_of)
    shared.clear()
    gc.collect()
if "several" in ONLY:
    measure("16, drafts")
    measure("16", lambda run, name: steps_of(run, name, blocks=12))
    measure("16, drafts", lambda run, name: rounds_of(run, name, 12))
    measure("64", lambda run, name: steps_of(run, name, blocks=12))
