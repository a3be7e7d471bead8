"""Times verification of drafts, and drafting, beside plain decoding steps: ``python verify.py``, on a GPU.

Four layers of the full shape, two of each ratio, after 2,048 tokens; 16 steps are a call.
"""

import dataclasses
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from ds4jax.settings import Settings

Settings.load("h200").set_environment()

import jax  # noqa: E402 (JAX comes after the environment)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from ds4jax.config import DrafterConfig  # noqa: E402
from ds4jax.engine.compiled_steps import compiler_options  # noqa: E402
from ds4jax.io.synthetic import FULL, RECIPES, first_layers  # noqa: E402
from ds4jax.model import cache as kv  # noqa: E402
from ds4jax.model import dspark, transformer, verify, weights  # noqa: E402
from ds4jax.model.compute import Compute  # noqa: E402

ROUNDS, LENGTH, ROOM = 16, 2048, 4096
JOBS = [("plain", 1, 1), ("verify", 2, 1), ("verify", 3, 1), ("verify", 4, 1), ("verify", 6, 1), ("draft", 5, 1)]
JOBS += [("plain", 1, 16), ("verify", 3, 16)]  # what is run, tokens of a sequence, sequences
CFG = dataclasses.replace(
    first_layers(FULL, 4), compress_ratios=(4, 128, 4, 128), n_hash_layers=1,
    drafter=DrafterConfig(stages=3, block_size=5, markov_rank=256, noise_token=128799, target_layers=(1, 2, 3)),
)  # fmt: skip
COMPUTE = Compute("official", "bfloat16", kernels="pallas")
TREES = weights.abstract(CFG, RECIPES["q2"]), weights.abstract_drafter(CFG, RECIPES["q2"])


def step(kind, w, d, cache, ids):
    """A number that depends on all results, and the cache."""
    n = jnp.where(ids[:, 0] >= 0, ids.shape[1], 0).astype(jnp.int32)
    if kind == "draft":
        made = dspark.draft(w, d, cache, ids[:, 0], n > 0, CFG, COMPUTE)
        return made.tokens.sum() + made.confidence.sum().astype(jnp.int32), cache
    if kind == "plain":
        s, cache = transformer.run(w, cache, ids, n, CFG, COMPUTE)
        return jnp.argmax(transformer.head(s, w.head, CFG, COMPUTE), -1).sum(), cache
    logits, cache = verify.verify(w, cache, ids, n, CFG, COMPUTE)
    return jnp.argmax(logits, -1).sum(), verify.commit(cache, n)


def program(kind, T, B):
    def run(w, d, cache, ids, total):
        def one(i, carry):
            said, cache = step(kind, w, d, carry[0], ids[i])
            return cache, carry[1] + said.astype(jnp.int32)

        cache = dataclasses.replace(cache, length=jnp.full((B,), LENGTH, jnp.int32))
        return jax.lax.fori_loop(0, ROUNDS, one, (cache, total))

    args = *map(weights.structs, TREES), kv.abstract(CFG, "official", "bfloat16", B, ROOM)
    numbers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((ROUNDS, B, T), ()))
    return jax.jit(run, donate_argnums=(2, 4)).lower(*args, *numbers)


def filled(B):
    """A cache of random rows."""

    def leaf(x):
        if x.ndim == 1:
            return jnp.full(x.shape, LENGTH, x.dtype)
        if x.dtype == jnp.uint8 and x.shape[-1] < 16:
            return jnp.full(x.shape, 122, x.dtype)  # exponents
        size = 40 if x.dtype.itemsize == 1 else 1
        return (size * jax.random.normal(jax.random.key(x.size), x.shape)).astype(x.dtype)

    return jax.jit(lambda: jax.tree.map(leaf, kv.abstract(CFG, "official", "bfloat16", B, ROOM)))()


def main():
    options = compiler_options("decode", COMPUTE.implementations, "gpu")
    lowered = [program(*job) for job in JOBS]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda low: low.compile(options), lowered))
    w, d = (weights.init_random(tree, CFG) for tree in TREES)
    caches, total, rng = {B: filled(B) for B in (1, 16)}, jnp.int32(0), np.random.default_rng(0)
    ids = [jax.device_put(rng.integers(0, CFG.vocab_size, (ROUNDS, B, T)).astype(np.int32)) for _, T, B in JOBS]
    times = [[] for _ in JOBS]
    for _ in range(9):
        for (_, _, B), run, tokens, taken in zip(JOBS, programs, ids, times, strict=True):
            jax.block_until_ready(caches[B])
            start = time.perf_counter()
            caches[B], total = run(w, d, caches[B], tokens, total)
            int(total)
            taken.append(1e3 * (time.perf_counter() - start) / ROUNDS)
    for (kind, T, B), taken in zip(JOBS, times, strict=True):
        print(f"{kind:7s} T={T} B={B:2d} {statistics.median(taken[2:]):.4f} ms")


if __name__ == "__main__":
    main()
