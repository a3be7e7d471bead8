"""The compiled steps of a model: prefill of one slot, and decoding of a block of tokens in every slot.

A step is compiled for the shapes that it is called with: prefill for each padded chunk length, decoding once. Nothing
here allocates memory on a device, so a memory plan can be made from the steps before the weights are loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax import sharding
from ds4jax.config import ModelConfig
from ds4jax.engine import cards, compile_cache, sampling
from ds4jax.engine.cards import Card
from ds4jax.engine.chunks import pad
from ds4jax.engine.types import MAX_LOGPROBS, Sampling
from ds4jax.errors import ConfigError
from ds4jax.implementation import Kernels
from ds4jax.io.checkpoint import Checkpoint
from ds4jax.io.synthetic import Synthetic
from ds4jax.model import cache as kv
from ds4jax.model import support, transformer, weights
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute
from ds4jax.numerics import rows as numerics
from ds4jax.numerics.precision import wide
from ds4jax.ops.mhc import Streams
from ds4jax.settings import Settings
from pallas_kernels.common import Unsupported, assumed_gpu

Array = jax.Array

SCORED = 128  # tokens of a prompt whose logits are in memory at once, where their log-probabilities are asked for
BLOCK = 16  # the most tokens of a sequence that one decoding call computes


class CompiledSteps:
    """The steps of a model for one batch and context length, each compiled for the shapes that it is called with.

    An `expert_layout` of auto counts as file here; `memory.steps` decides it.

    Attributes: source, settings, wide (whether experts are), cfg (of the model), batch, compute, tree
    (`weights.abstract`); weights, cache and results (of the decoding step beside the cache), all three trees of
    `jax.ShapeDtypeStruct`; card (as given); can_compile (whether that is possible on this machine, for the card);
    compiled (programs by name and shapes); seconds (spent compiling); compiling (whether it does so now).
    """

    def __init__(
        self,
        source: Checkpoint | Synthetic,
        settings: Settings,
        batch: int | None = None,
        progress: bool = False,
        card: Card | None = None,
    ):
        """batch: number of slots, by default the settings'. progress: report each compilation on stderr. card: plan for
        such devices instead of this machine's.

        Raises Ds4Error for weights, numerics and mesh that do not go together.
        """
        settings.set_environment()
        self.source, self.settings, self.cfg = source, settings, source.cfg
        self.batch = settings.batch if batch is None else batch
        self._progress = progress
        numerics.check(self.cfg, settings.numerics)
        self.card = card
        make_mesh: Any = sharding.make_mesh if card is None else sharding.abstract_mesh
        mesh = make_mesh(settings.tp, settings.ep) if settings.tp * settings.ep > 1 else None
        self.can_compile = card is None or (mesh is None and cards.compiler_is_here())
        self.everywhere = None if mesh is None else sharding.replicated(mesh)
        if card and self.can_compile:
            self.everywhere = jax.sharding.SingleDeviceSharding(card.device())
        self.compute = Compute(settings.numerics, settings.dtype, mesh, kernels=settings.kernels)
        self.wide = settings.expert_layout == "wide"
        self.tree = weights.abstract(self.cfg, source.types, self.wide)
        self.weights = weights.structs(self.tree)
        self.cache = kv.abstract(self.cfg, settings.numerics, settings.dtype, self.batch, settings.ctx)
        logits = (self.batch, self.cfg.vocab_size), jnp.dtype(wide(jnp.dtype(settings.dtype)))
        shapes = ((BLOCK, self.batch), jnp.int32), ((1, self.batch), jnp.int32), logits
        self.results = tuple(jax.ShapeDtypeStruct(*shape, sharding=self.everywhere) for shape in shapes)
        if mesh is not None:
            self.weights = jax.tree.map(_placed, self.weights, weights.shardings(self.tree, mesh))
            self.cache = jax.tree.map(self._whole, self.cache)
        model = {"cfg": self.cfg, "compute": self.compute}
        self._steps = {
            name: jax.jit(functools.partial(step, **model), donate_argnums=donated, out_shardings=self.everywhere)
            for name, step, donated in (("prefill", prefill_step, 1), ("decode", decode_step, (1, 2)))
        }
        self._lowering = threading.Lock()
        self.compiled: dict[tuple, Callable] = {}
        self.seconds, self.compiling = 0.0, False

    def get(self, name: str, *args: Any) -> Callable:
        """The step `name` compiled for arguments of these shapes, which follow weights and cache."""
        return self.get_all([(name, args)])[0]

    def get_all(self, calls: Sequence[tuple[str, tuple]]) -> list[Callable]:
        """`get` for several names and arguments. Missing programs are compiled in parallel, one per core."""
        keyed = {(name, *(x.shape for x in jax.tree.leaves(args))): (name, args) for name, args in calls}
        missing = [key for key in keyed if key not in self.compiled]
        if missing:
            start, self.compiling = time.perf_counter(), True
            try:
                with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
                    programs = list(pool.map(lambda key: self._compile(*keyed[key]), missing))
            finally:
                self.compiling = False
            self.compiled |= zip(missing, programs, strict=True)
            self.seconds += time.perf_counter() - start
        return [self.compiled[key] for key in keyed]

    def calls(self, sizes: Iterable[int]) -> list[tuple[str, tuple]]:
        """The arguments of `get_all` for decoding, and for prefill of chunks padded to each of `sizes`."""
        one, every = sampling.batch([Sampling()]), sampling.batch([Sampling()] * self.batch)
        prefills = [
            ("prefill", (np.int32(0), np.array([True]), *pad([0], [size]), one, np.zeros(size, np.int32)))
            for size in sizes
        ]
        return [("decode", (self.results, *decode_args({}, 1, every))), *prefills]

    @contextlib.contextmanager
    def refusing(self, tokens: int) -> Iterator[None]:
        """Steps of so many tokens are traced inside; raises ConfigError where the kernels do not take the model."""
        backend = self._backend
        if self.compute.implementations.uses("pallas") and backend != "gpu":
            expected = "xla, or pallas_interpret to test, or an NVIDIA GPU"
            raise ConfigError(f"kernels: found {self.settings.kernels!r} on a {backend.upper()}, expected {expected}")
        try:
            yield
        except Unsupported:
            problems = support.unsupported(self.cfg, self.weights, self.cache, self.compute, tokens)
            listed = "; ".join(f"{op}: {reason}" for op, reason in problems.items())
            raise ConfigError(
                f"kernels: found {self.settings.kernels!r}, expected xla for this model: {listed}"
            ) from None

    def _compile(self, name: str, args: tuple) -> Callable:
        args = self.weights, self.cache, *args
        options = compiler_options(name, self.compute.implementations, self._backend)
        if self.card:
            args = jax.tree.map(self._whole, args)
        shapes = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype).name), args)
        what = name, self.cfg, self.compute, options, jax.tree.structure(args), jax.tree.leaves(shapes)
        others = {"prefill": 5, "decode": 3}[name]  # results beside the cache
        program = None if self.card else compile_cache.load(what, args, (*range(others), self.cache))
        if program is not None:
            return program
        with self.refusing(args[4].shape[1] if name == "prefill" else 1):
            if self._progress:
                what_for = f"{name}, {args[3 if name == 'decode' else 4].size} tokens"
                sys.stderr.write(f"compiling {what_for} ...\n")  # one write: several threads do this
            with self._lowering:  # Python's work, which threads do not speed up; it also compiles small programs
                lowered = self._lower(name, args)
        program = lowered.compile(options)
        if self.card is None:
            compile_cache.save(what, program)
        return program

    def _lower(self, name: str, args: tuple) -> jax.stages.Lowered:
        if self.card is None:
            return self._steps[name].lower(*args)
        with assumed_gpu(self.card.kind, self.card.cores):
            return self._steps[name].trace(*args).lower(lowering_platforms=("cuda",))

    @property
    def _backend(self) -> str:
        return jax.default_backend() if self.card is None else "gpu"

    def _whole(self, x: Any) -> jax.ShapeDtypeStruct:
        """The shape of an array that every device holds whole."""
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.everywhere)

    @property
    def ctx(self) -> int:
        """Tokens that one sequence can hold."""
        return self.settings.ctx

    def but(self, key: str, value: int) -> Self:
        """The steps of the same model with another value of `key`, ctx or batch."""
        ctx, batch = {"ctx": (value, self.batch), "batch": (self.ctx, value)}[key]
        return type(self)(self.source, dataclasses.replace(self.settings, ctx=ctx), batch, self._progress, self.card)

    def compile_largest(self, sizes: Iterable[int] = ()) -> None:
        """Compile the calls that need the most memory: decoding and the largest chunk; and prefill for `sizes`."""
        padded, _ = pad([0] * min(self.settings.prefill_chunk, self.settings.ctx - 1))
        self.get_all(self.calls([padded.shape[1], *sizes]))


def _placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    return x.update(sharding=sharding)


# ---- the steps -------------------------------------------------------------------------------------------------------
def prefill_step(w, cache: Cache, slot, fresh, tokens, n, params, targets, *, cfg: ModelConfig, compute: Compute):
    """Append a chunk of a prompt to the sequence in one slot, and sample the token that follows.

    slot: () int32. fresh: (1,) bool, whether to empty the slot first. tokens: (1, T) int32, of which the first n (1,)
    are real. params: `sampling.Batch` of one. targets: (T,) int32, the tokens that really follow each one, or -1 where
    nobody asks how likely they are.

    → sampled (1,) int32; logits (1, vocab) of the last real token; `sampling.logprobs` of the targets (T, …), nothing
    where there is none; cache.
    """

    def axis(x: Array) -> int:
        return min(1, x.ndim - 1)  # the axis of the sequences: 1, but 0 in `length`

    one = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, axis(x)), cache)
    s, one = transformer.run(w, kv.reset(one, fresh), tokens, n, cfg, compute)
    logits = transformer.head(transformer.last(s, n), w.head, cfg, compute)
    cache = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, slot, axis(x)), cache, one)
    return sampling.sample(logits, params, one.length), logits, *_scores(w, s, targets, cfg, compute), cache


def _scores(w, s: Streams, targets: Array, cfg: ModelConfig, compute: Compute) -> tuple[Array, Array, Array]:
    """`sampling.logprobs` of the targets (T,), SCORED at a time, up to the last one that is not negative.

    Where T is no multiple of SCORED, the last piece begins earlier and computes a part of the one before it again.
    """
    T = len(targets)
    size = min(T, SCORED)

    def of(i: Array, out: tuple) -> tuple:
        ids = lax.dynamic_slice_in_dim(targets, i * size, size)
        new = sampling.logprobs(block_logits(w, s, i, size, cfg, compute), jnp.maximum(ids, 0))
        return tuple(lax.dynamic_update_slice_in_dim(x, y, i * size, 0) for x, y in zip(out, new, strict=True))

    top = min(MAX_LOGPROBS, cfg.vocab_size)
    shapes = ((T,), jnp.float32), ((T, top), jnp.int32), ((T, top), jnp.float32)
    end = jnp.max(jnp.where(targets >= 0, jnp.arange(1, T + 1, dtype=jnp.int32), 0))
    return lax.fori_loop(0, (end + size - 1) // size, of, tuple(jnp.zeros(*shape) for shape in shapes))


def block_logits(w, s: Streams, i: Array, size: int, cfg: ModelConfig, compute: Compute) -> Array:
    """The logits (size, vocab) of the i-th `size` of a chunk's tokens."""
    part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size), s)
    return transformer.head(part, w.head, cfg, compute)


def decode_step(w, cache: Cache, results, tokens, active, n, params, *, cfg: ModelConfig, compute: Compute):
    """Append n tokens to the sequence in every active slot: the given token, then each sampled one but the last.

    One call decodes n tokens, so that the cost of starting a call is paid once.

    results: what the previous call returned beside the cache. They are donated: the three have different shapes, so
        each new result takes the buffer of its predecessor.
    tokens: (B,) int32; a negative one stands for the last sampled token of the previous call. active: (B,) bool.
    n: () int32, 1 to BLOCK. params: `sampling.Batch` of B.

    → sampled (BLOCK, B) int32, of which the first n rows are set; the last of these (1, B); its logits (B, vocab);
    cache.
    """

    def one(i: Array, carry: tuple) -> tuple:
        cache, ids, sampled, _ = carry
        logits, cache = transformer.decode_step(w, cache, ids, active, cfg=cfg, compute=compute)
        ids = sampling.sample(logits, params, cache.length)
        return cache, ids, sampled.at[i].set(ids), logits

    sampled, last, logits = results
    carry = cache, jnp.where(tokens >= 0, tokens, last[0]), sampled, logits
    cache, last, sampled, logits = lax.fori_loop(0, n, one, carry)
    return sampled, last[None], logits, cache


def decode_args(tokens: Mapping[int, int | None], n: int, params: sampling.Batch) -> tuple[Any, ...]:
    """The arguments of `decode_step` after `results`, to decode n tokens in some slots.

    tokens: by slot; None for the last sampled token of the previous call. params: of all slots.
    """
    ids = np.zeros(len(params.seed), np.int32)
    active = np.zeros(len(ids), bool)
    for slot, token in tokens.items():
        ids[slot], active[slot] = -1 if token is None else token, True
    return ids, active, np.int32(n), params


def compiler_options(step: str, kernels: Kernels, backend: str | None = None) -> dict[str, Any] | None:
    """XLA's options for a step, "prefill" or "decode", on a backend, by default JAX's own.

    On a GPU a decoding step is recorded as a graph, in which independent kernels may run side by side: 4 % of the time
    on an H200. With Pallas kernels the graph includes the loop over tokens, which XLA would otherwise leave to the
    host: 0.18 ms a token (7 layers). Without them the loop contains loops, and a graph of these is untried. Prefill is
    not recorded, which makes it 6 % faster (7 layers, 2048 tokens).

    On a CPU most of the time to the first token is LLVM's. Its optimization level 1 compiles in two thirds of the time
    to code as fast.
    """
    backend = backend or jax.default_backend()
    if backend == "gpu" and step == "prefill":
        return {"xla_gpu_enable_command_buffer": ""}
    if backend == "gpu":
        options = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
        if kernels.all_pallas:  # XLA's default list, and WHILE
            recorded = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,WHILE"
            options["xla_gpu_enable_command_buffer"] = recorded
        return options
    given = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": 1} if backend == "cpu" and not given else None
