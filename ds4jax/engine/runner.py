"""The runner: weights, cache and compiled steps of one model. Nothing else in the engine touches a device."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax import lax

from ds4jax import cache as kv
from ds4jax import numerics, sampling, sharding, weights
from ds4jax.cache import Cache
from ds4jax.checkpoint import Checkpoint, open_checkpoint
from ds4jax.config import ModelConfig
from ds4jax.download import resolve_model
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.load import load
from ds4jax.model import transformer
from ds4jax.model.transformer import Compute, bucket
from ds4jax.sampling import Sampling
from ds4jax.settings import Settings
from ds4jax.tiny import cache_dir
from ds4jax.tokenizer import Tokenizer
from ds4jax.weights import Weights

Array = jax.Array

_LARGEST_BUCKET = 2**20  # no chunk is larger: see Settings
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Step:
    """One sampled token, and the logits it was sampled from (still on the device until asked for)."""

    token: int
    batch_logits: Array  # (B, vocab)
    row: int

    @property
    def logits(self) -> np.ndarray:
        """float32 (vocab,), before temperature and filters."""
        return np.asarray(self.batch_logits)[self.row]


@dataclasses.dataclass
class Stats:
    """Tokens through the model and the seconds they took, compilation apart."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0


class Runner:
    """A model on its devices with a cache of `batch` sequences, each in a slot of its own.

    `prefill` starts a sequence in a slot and samples its first token; `decode` appends one token to each of some
    sequences and samples the next. Every shape is compiled once, when first used, and can then only run as compiled.

    Attributes: settings, cfg (of the model), checkpoint (the open file), weights, cache, batch, lengths (tokens in each
    slot's cache), stats.
    """

    @classmethod
    def load(cls, settings: Settings, batch: int | None = None, progress: bool = False) -> Self:
        """The model of `settings`; see `Runner`. Raises Ds4Error if its file is missing."""
        return cls(open_checkpoint(resolve_model(settings)), settings, batch, progress)

    def __init__(self, checkpoint: Checkpoint, settings: Settings, batch: int | None = None, progress: bool = False):
        """Load the weights onto the devices and allocate the cache.

        batch: number of slots, by default the settings'. progress: report loading and compilation on stderr.
        Raises Ds4Error for weights, mesh and memory that do not go together.
        """
        settings.set_environment()
        self.settings, self.checkpoint, self.cfg = settings, checkpoint, checkpoint.cfg
        self.batch = settings.batch if batch is None else batch
        self.lengths, self.stats, self._progress = [0] * self.batch, Stats(), progress
        numerics.check(self.cfg, settings.numerics)
        mesh = sharding.make_mesh(settings.tp, settings.ep) if settings.tp * settings.ep > 1 else None
        everywhere = None if mesh is None else sharding.replicated(mesh)
        self._compute = Compute(settings.numerics, settings.dtype, mesh)
        self._empty = functools.partial(kv.empty, self.cfg, settings.numerics, settings.dtype, sharding=everywhere)
        self._check_memory()
        self.weights, _ = load(checkpoint, mesh, progress)
        self.cache = self._empty(self.batch, settings.ctx)
        self._sampling = [Sampling()] * self.batch
        model = {"cfg": self.cfg, "compute": self._compute}
        self._steps = {
            name: jax.jit(functools.partial(step, **model), donate_argnums=1, out_shardings=everywhere)
            for name, step in (("prefill", _prefill), ("decode", _decode))
        }
        self._compiled: dict[tuple, Callable] = {}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the model's file. Raises GGUFError if there is none."""
        return Tokenizer.from_metadata(self.checkpoint.file.metadata)

    def prefill(self, slot: int, tokens: Sequence[int], params: Sampling) -> Step:
        """Start a sequence in `slot`, in place of what was there; → its first token, drawn as `params` say.

        Raises Ds4Error unless there are 1 to ctx - 1 tokens, all in the vocabulary.
        """
        check_prompt(tokens, self.cfg, self.settings.ctx)
        self._sampling[slot], self.lengths[slot] = params, 0
        for start in range(0, len(tokens), self.settings.prefill_chunk):
            padded, n = _pad(tokens[start : start + self.settings.prefill_chunk])
            seconds, sampled, logits = self._run(
                "prefill", np.int32(slot), np.array([start == 0]), padded, n, sampling.batch([params])
            )
            self.lengths[slot] += int(n[0])
            self.stats.prefill_tokens += int(n[0])
            self.stats.prefill_seconds += seconds
        return Step(int(sampled[0]), logits, 0)

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Step]:
        """Append to the sequence of each given slot its token; → what follows, by slot. Other slots rest.

        Raises Ds4Error if a sequence has ctx tokens already.
        """
        for slot in tokens:
            if self.lengths[slot] >= self.settings.ctx:
                raise Ds4Error(f"slot {slot}: the context of {self.settings.ctx} tokens is full")
        ids, active = np.zeros(self.batch, np.int32), np.zeros(self.batch, bool)
        for slot, token in tokens.items():
            ids[slot], active[slot] = token, True
        seconds, sampled, logits = self._run("decode", ids, active, sampling.batch(self._sampling))
        for slot in tokens:
            self.lengths[slot] += 1
        self.stats.decode_tokens += len(tokens)
        self.stats.decode_seconds += seconds
        return {slot: Step(int(sampled[slot]), logits, slot) for slot in tokens}

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits at every position of a text: float32 (S, vocab). No slot is touched; takes a cache of its own."""
        check_prompt(tokens, self.cfg, self.settings.ctx + 1)
        cache, out = self._empty(1, self.settings.ctx), []
        for start in range(0, len(tokens), self.settings.prefill_chunk):
            padded, n = _pad(tokens[start : start + self.settings.prefill_chunk])
            logits, cache = transformer.prefill(
                self.weights, cache, padded, n, cfg=self.cfg, compute=self._compute, all_positions=True
            )
            out.append(np.asarray(logits)[0, : n[0]])
        return np.concatenate(out)

    def _run(self, name: str, *args: Any) -> tuple[float, np.ndarray, Array]:
        """One step on the weights, the cache and numpy arguments: → seconds it took, sampled tokens, logits."""
        step = name, *(x.shape for x in jax.tree.leaves(args))
        try:
            if step not in self._compiled:
                if self._progress:
                    print(f"compiling {name}, {args[-3].size} tokens ...", file=sys.stderr)
                start = time.perf_counter()
                lowered = self._steps[name].lower(self.weights, self.cache, *args)
                self._compiled[step] = lowered.compile(_compiler_options())
                self.stats.compile_seconds += time.perf_counter() - start
            start = time.perf_counter()
            tokens, logits, self.cache = self._compiled[step](self.weights, self.cache, *args)
            tokens = np.asarray(tokens)  # waits for it
            return time.perf_counter() - start, tokens, logits
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise Ds4Error(
                f"{name}: out of device memory; a smaller prefill_chunk, ctx or batch needs less (found "
                f"{self.settings.prefill_chunk}, {self.settings.ctx}, {self.batch})"
            ) from error

    def _check_memory(self) -> None:
        """Raises ConfigError if weights and cache cannot fit, before anything is loaded."""
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        mesh, settings = self._compute.mesh, self.settings
        per_device = weights_per_device(weights.abstract(self.cfg, self.checkpoint.types), mesh)
        cache = kv.nbytes(kv.abstract(self.cfg, settings.numerics, settings.dtype, self.batch, settings.ctx))
        if limit is not None and per_device + cache > limit:
            raise ConfigError(
                f"memory: found {limit / _GIB:.1f} GiB for JAX on each device (memory_fraction is "
                f"{settings.memory_fraction}), expected {per_device / _GIB:.1f} GiB for weights, {cache / _GIB:.1f} "
                f"GiB for the cache (batch {self.batch}, ctx {settings.ctx}) and more for activations"
            )


def _prefill(w, cache: Cache, slot, fresh, tokens, n, params, *, cfg: ModelConfig, compute: Compute):
    """tokens (1, T), n (1,) of them real, appended to the sequence in `slot`, which is emptied first if fresh (1,)."""

    def axis(x: Array) -> int:
        return min(1, x.ndim - 1)  # of the sequence: 1, but 0 in `length`

    one = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, axis(x)), cache)
    logits, one = transformer.prefill(w, kv.reset(one, fresh), tokens, n, cfg=cfg, compute=compute)
    cache = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, slot, axis(x)), cache, one)
    return sampling.sample(logits, params, one.length), logits, cache


def _decode(w, cache: Cache, tokens, active, params, *, cfg: ModelConfig, compute: Compute):
    """tokens (B,), appended where active (B,) → sampled tokens (B,), logits (B, vocab), cache."""
    logits, cache = transformer.decode_step(w, cache, tokens, active, cfg=cfg, compute=compute)
    return sampling.sample(logits, params, cache.length), logits, cache


def _compiler_options() -> dict[str, Any] | None:
    """On a CPU most of the time to the first token is LLVM's; level 1 takes two thirds of it, for code as fast."""
    given = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" and not given else None


def _pad(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids → int32 (1, T) with T a bucket, and their number (1,)."""
    padded = np.zeros((1, bucket(len(tokens), _LARGEST_BUCKET)), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded, np.array([len(tokens)], np.int32)


def check_prompt(tokens: Sequence[int], cfg: ModelConfig, ctx: int) -> None:
    """Raises Ds4Error unless a prompt has at least one token, room for one more, and only ids of the vocabulary."""
    if not 0 < len(tokens) < ctx:
        raise Ds4Error(f"prompt: found {len(tokens)} tokens, expected 1 to {ctx - 1} (ctx is {ctx})")
    if not 0 <= min(tokens) <= max(tokens) < cfg.vocab_size:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise Ds4Error(f"prompt: found token id {wrong}, expected 0 to {cfg.vocab_size - 1}")


def weights_per_device(tree: Weights, mesh: jax.sharding.Mesh | None) -> int:
    """Bytes of the weights of `weights.abstract` that one device holds."""
    if mesh is None:
        return weights.nbytes(tree)
    planes = jax.tree.leaves(weights.structs(tree))
    shardings = jax.tree.leaves(weights.shardings(tree, mesh))
    return sum(math.prod(s.shard_shape(p.shape)) * p.dtype.itemsize for p, s in zip(planes, shardings, strict=True))


def peak_memory() -> tuple[int, str]:
    """The most memory in use so far: bytes, and of what (the first GPU, or the process where JAX cannot tell)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device memory"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process memory"


def keep_compilations() -> None:
    """Let JAX keep compiled programs in the user's cache, for a quicker next start, unless it has been told where."""
    if jax.config.jax_compilation_cache_dir is None:
        try:
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        except Ds4Error:
            pass  # not writable: every start compiles
