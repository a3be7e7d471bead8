"""The runner: weights, cache and compiled steps of one model. Nothing else in the engine touches a device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ds4jax import sharding
from ds4jax.config import ModelConfig
from ds4jax.engine import compiled, memory, sampling, snapshots
from ds4jax.engine.constraints import edits
from ds4jax.engine.sampling import Sampling
from ds4jax.engine.snapshots import Planes
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.formats.quant import wide
from ds4jax.io.checkpoint import Checkpoint, open_checkpoint
from ds4jax.io.download import resolve_model
from ds4jax.io.load import load
from ds4jax.io.synthetic import RECIPES, Synthetic, synthetic_config
from ds4jax.io.tokenizer import Tokenizer, byte_tokenizer
from ds4jax.model import cache as kv
from ds4jax.model import transformer, weights
from ds4jax.model.cache import Cache
from ds4jax.model.transformer import Compute, bucket
from ds4jax.numerics import rows as numerics
from ds4jax.paths import cache_dir
from ds4jax.settings import Settings
from pallas_kernels.common import Implementation, Unsupported

Array = jax.Array

BLOCK = 16  # tokens of a sequence that one call decodes at most
BLOCK_SECONDS = 0.125  # that a call should take: streams, and what arrives, wait for its end
LARGEST_BUCKET = 2**20  # no chunk is larger: see Settings


@dataclasses.dataclass(frozen=True)
class Step:
    """One sampled token, and the logits it was sampled from (still on the device until asked for).

    batch_logits: (B, vocab), of which `row` is this token's; None for tokens inside a block.
    """

    token: int
    batch_logits: Array | None
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
    decoded_at: float = 0.0  # time.perf_counter() when the last tokens had come
    token_seconds: float = 0.0  # for a token of each sequence, in the last block


def open_model(settings: Settings, synthetic: str | None = None) -> Checkpoint | Synthetic:
    """The model file of `settings`, or one of `synthetic.SHAPES` in the published q2 file's types. Raises Ds4Error."""
    if synthetic is None:
        return open_checkpoint(resolve_model(settings))
    return Synthetic(synthetic_config(synthetic), RECIPES["q2"])


class Programs:
    """The steps of a model, each compiled for the shapes that it is called with. Allocates nothing on a device.

    Attributes: source, settings, cfg (of the model), batch, compute, tree (`weights.abstract`), weights, cache and
    results (of `_decode`; all three of `jax.ShapeDtypeStruct`s), compiled (by step and shapes), seconds (spent
    compiling).
    """

    def __init__(
        self, source: Checkpoint | Synthetic, settings: Settings, batch: int | None = None, progress: bool = False
    ):
        """See `Runner`. Raises Ds4Error for weights, numerics and mesh that do not go together."""
        settings.set_environment()
        self.source, self.settings, self.cfg = source, settings, source.cfg
        self.batch = settings.batch if batch is None else batch
        self._progress = progress
        numerics.check(self.cfg, settings.numerics)
        mesh = sharding.make_mesh(settings.tp, settings.ep) if settings.tp * settings.ep > 1 else None
        self.everywhere = None if mesh is None else sharding.replicated(mesh)
        self.compute = Compute(settings.numerics, settings.dtype, mesh, kernels=settings.kernels)
        self.tree = weights.abstract(self.cfg, source.types)
        self.weights = weights.structs(self.tree)
        self.cache = kv.abstract(self.cfg, settings.numerics, settings.dtype, self.batch, settings.ctx)
        logits = (self.batch, self.cfg.vocab_size), jnp.dtype(wide(jnp.dtype(settings.dtype)))
        shapes = ((BLOCK, self.batch), jnp.int32), ((1, self.batch), jnp.int32), logits
        self.results = tuple(jax.ShapeDtypeStruct(*shape, sharding=self.everywhere) for shape in shapes)
        if mesh is not None:
            self.weights = jax.tree.map(_placed, self.weights, weights.shardings(self.tree, mesh))
            self.cache = jax.tree.map(functools.partial(_placed, sharding=self.everywhere), self.cache)
        model = {"cfg": self.cfg, "compute": self.compute}
        self._steps = {
            name: jax.jit(functools.partial(step, **model), donate_argnums=donated, out_shardings=self.everywhere)
            for name, step, donated in (("prefill", _prefill, 1), ("decode", _decode, (1, 2)))
        }
        self._lowering = threading.Lock()
        self.compiled: dict[tuple, Callable] = {}
        self.seconds = 0.0

    def get(self, name: str, *args: Any) -> Callable:
        """The step `name` compiled for weights, cache and arguments of these shapes."""
        return self.get_all([(name, args)])[0]

    def get_all(self, calls: Sequence[tuple[str, tuple]]) -> list[Callable]:
        """`get` for several names and arguments; what is missing is compiled side by side, as one has no use for all
        cores."""
        keyed = {(name, *(x.shape for x in jax.tree.leaves(args))): (name, args) for name, args in calls}
        missing = [key for key in keyed if key not in self.compiled]
        if missing:
            start = time.perf_counter()
            with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
                programs = list(pool.map(lambda key: self._compile(*keyed[key]), missing))
            self.compiled |= zip(missing, programs, strict=True)
            self.seconds += time.perf_counter() - start
        return [self.compiled[key] for key in keyed]

    def calls(self, sizes: Iterable[int]) -> list[tuple[str, tuple]]:
        """What `get_all` takes for decoding, and for prefill padded to each of `sizes`."""
        one, every = sampling.batch([Sampling()]), sampling.batch([Sampling()] * self.batch)
        prefills = [("prefill", (np.int32(0), np.array([True]), *_pad([0], [size]), one)) for size in sizes]
        return [("decode", (self.results, *decode_args({}, 1, every))), *prefills]

    def _compile(self, name: str, args: tuple) -> Callable:
        if self.settings.kernels == "pallas" and (found := jax.default_backend()) != "gpu":
            raise ConfigError(f"kernels: found 'pallas' on a {found.upper()}, expected 'xla' or an NVIDIA GPU")
        args, options = (self.weights, self.cache, *args), _compiler_options(name, self.settings.kernels)
        shapes = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype).name), args)
        what = name, self.cfg, self.compute, options, jax.tree.structure(args), jax.tree.leaves(shapes)
        others = {"prefill": 2, "decode": 3}[name]  # results beside the cache
        if (program := compiled.load(what, args, (*range(others), self.cache))) is not None:
            return program
        if self._progress:
            what_for = f"{name}, {args[3 if name == 'decode' else 4].size} tokens"
            sys.stderr.write(f"compiling {what_for} ...\n")  # in one piece: there are several threads
        try:
            with self._lowering:  # one at a time: it is Python's work, and small programs are kept on disk on the way
                lowered = self._steps[name].lower(*args)
        except Unsupported as error:
            raise ConfigError(f"kernels: found 'pallas', expected 'xla' for this model: {error}") from None
        program = lowered.compile(options)
        compiled.save(what, program)
        return program

    @property
    def ctx(self) -> int:
        """Tokens that one sequence can hold."""
        return self.settings.ctx

    def but(self, key: str, value: int) -> Self:
        """The same with another ctx or batch."""
        ctx, batch = {"ctx": (value, self.batch), "batch": (self.ctx, value)}[key]
        return type(self)(self.source, dataclasses.replace(self.settings, ctx=ctx), batch, self._progress)

    def compile_largest(self, sizes: Iterable[int] = ()) -> None:
        """Compile the largest call of each step: the ones that need the most memory; and prefill for `sizes`, too."""
        padded, _ = _pad([0] * min(self.settings.prefill_chunk, self.settings.ctx - 1))
        self.get_all(self.calls([padded.shape[1], *sizes]))


def _placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return x.update(sharding=sharding)


class Runner:
    """A model on its devices with a cache of `batch` sequences, each in a slot of its own.

    `prefill` starts a sequence in a slot and samples its first token; `decode` appends one token to each of some
    sequences and samples the next. Every shape is compiled once, when first used, and can then only run as compiled.

    Attributes: settings, cfg (of the model), checkpoint (the open file), programs, plan (of memory), weights, cache,
    batch, lengths (tokens in each slot's cache), stats.
    """

    @classmethod
    def load(cls, settings: Settings, batch: int | None = None, progress: bool = False) -> Self:
        """The model of `settings`; see `Runner`. Raises Ds4Error if its file is missing."""
        return cls(open_model(settings), settings, batch, progress)

    def __init__(
        self,
        checkpoint: Checkpoint | Synthetic,
        settings: Settings,
        batch: int | None = None,
        progress: bool = False,
        sizes: Collection[int] = (),
    ):
        """Load the weights onto the devices, or make them there, and allocate the cache.

        batch: number of slots, by default the settings'. progress: report loading and compilation on stderr. sizes:
        what chunks of prompts will be padded to; prefill for these and decode are then compiled here, side by side.
        Raises Ds4Error for weights, mesh and memory that do not go together.
        """
        self.programs = Programs(checkpoint, settings, batch, progress)
        self.settings, self.checkpoint, self.cfg = settings, checkpoint, checkpoint.cfg
        self.batch, self._compute = self.programs.batch, self.programs.compute
        self.plan = memory.check(self.programs, sizes)
        if sizes:
            self.programs.get_all(self.programs.calls(sizes))
        self.lengths, self.stats = [0] * self.batch, Stats(compile_seconds=self.programs.seconds)
        self._empty = functools.partial(
            kv.empty, self.cfg, settings.numerics, settings.dtype, sharding=self.programs.everywhere
        )
        if isinstance(checkpoint, Synthetic):
            self.weights = weights.init_random(self.programs.tree, self.cfg, checkpoint.seed, self._compute.mesh)
        else:
            self.weights, _ = load(checkpoint, self._compute.mesh, progress)
        self.cache = self._empty(self.batch, settings.ctx)
        self._sampling = [Sampling()] * self.batch
        results = self.programs.results
        self._results = tuple(jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in results)  # of the last block
        self._arguments: list[tuple[np.ndarray, Array]] = []  # of the last block, on the host and on the device

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the model's file (GGUFError if there is none), or one for a model of random weights."""
        if isinstance(self.checkpoint, Synthetic):
            return byte_tokenizer(self.cfg.vocab_size)
        return Tokenizer.from_metadata(self.checkpoint.file.metadata)

    def compile(self) -> None:
        """Compile now, not on first use: `take`, `put` and `choose`."""
        for tokens in snapshots.rooms(self.settings.ctx):
            self.decode_block({}, 1)
            with self._enough_memory("snapshots"):
                self.cache = snapshots.compile(self.cache, tokens)
        for rows in (1, self.batch):
            logits = np.zeros((rows, self.cfg.vocab_size), np.float32)
            self.choose(logits, [Sampling()] * rows, edits([None] * rows, self.cfg.vocab_size), [0] * rows)

    def prefill(
        self, slot: int, tokens: Sequence[int], params: Sampling, append: bool = False, sizes: Sequence[int] = ()
    ) -> Step:
        """Start a sequence in `slot`, in place of what was there; → its first token, drawn as `params` say.

        append: continue the sequence that is there instead. sizes: what chunks are padded to, ascending, or buckets.
        Raises Ds4Error unless there are 1 to ctx - 1 tokens (with those that are there), all in the vocabulary.
        """
        before = self.lengths[slot] if append else 0
        check_prompt(tokens, self.cfg, self.settings.ctx, before)
        self._sampling[slot], self.lengths[slot] = params, before
        for start in range(0, len(tokens), self.settings.prefill_chunk):
            padded, n = _pad(tokens[start : start + self.settings.prefill_chunk], sizes)
            fresh = np.array([self.lengths[slot] == 0])
            begun = time.perf_counter() - self.stats.compile_seconds
            sampled, logits = self._run("prefill", np.int32(slot), fresh, padded, n, sampling.batch([params]))
            sampled.block_until_ready()
            self.lengths[slot] += int(n[0])
            self.stats.prefill_tokens += int(n[0])
            self.stats.prefill_seconds += time.perf_counter() - self.stats.compile_seconds - begun
        return Step(int(sampled[0]), logits, 0)

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Step]:
        """Append to the sequence of each given slot its token; → what follows, by slot. Other slots rest.

        Raises Ds4Error if a sequence has ctx tokens already.
        """
        block = self.decode_block(tokens, 1)
        return {slot: Step(token, block.batch_logits, slot) for slot, (token,) in block.tokens().items()}

    def decode_block(self, tokens: Mapping[int, int | None], n: int) -> Block:
        """Append n tokens, 1 to BLOCK, to the sequence of each given slot: its token, then what was sampled from it.

        Nothing is waited for, so that the device goes on while the host reads: for a slot whose token is None the
        block starts from the last token of the block before. Raises Ds4Error if a sequence has no room for n tokens.
        """
        for slot in tokens:
            if self.lengths[slot] + n > self.settings.ctx:
                raise Ds4Error(f"slot {slot}: the context of {self.settings.ctx} tokens is full")
        start = time.perf_counter() - self.stats.compile_seconds
        args = self._resident(decode_args(tokens, n, sampling.batch(self._sampling)))
        self._results = tuple(self._run("decode", self._results, *args))
        sampled, _, logits = _copy(self._results)  # the next block's will take the place of these
        for slot in tokens:
            self.lengths[slot] += n
        self.stats.decode_tokens += n * len(tokens)
        return Block(self.stats, sampled, logits, tuple(tokens), n, start + self.stats.compile_seconds)

    def _resident(self, args: tuple) -> tuple:
        """Numpy arguments on the device: where one is as it was in the last block, the very array of that block.

        A step that finds all its buffers where they were runs as it was recorded; else it is first written anew.
        """
        leaves, tree = jax.tree.flatten(args)
        before = self._arguments or [(None, None)] * len(leaves)
        self._arguments = [
            (x, there if np.array_equal(x, old) else jax.device_put(x, self.programs.everywhere))
            for x, (old, there) in zip(leaves, before, strict=True)
        ]
        return jax.tree.unflatten(tree, [there for _, there in self._arguments])

    def block(self, room: int) -> int:
        """How many tokens to decode at once, BLOCK and `room` at most, so that it takes some BLOCK_SECONDS.

        One until the first have shown how long they take.
        """
        seconds = self.stats.token_seconds
        return max(1, min(room, BLOCK, int(BLOCK_SECONDS / seconds) if seconds else 1))

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

    def snapshot(self, slot: int) -> Cache:
        """The sequence in `slot` as it is now, for `restore`; no larger than its length needs."""
        return kv.snapshot(self.cache, slot)

    def restore(self, slot: int, saved: Cache, params: Sampling) -> None:
        """Put a snapshot into `slot`, in place of what was there; its next tokens are drawn as `params` say."""
        self.cache = kv.restore(self.cache, slot, saved)
        self._sampling[slot], self.lengths[slot] = params, int(saved.length[0])

    def take(self, slot: int, at: int | None = None, state: Planes | None = None) -> Iterator[Planes | None]:
        """The sequence in `slot` as it is now, in host memory, for `put` (see `ds4jax.engine.snapshots`).

        In pieces, so that others need not wait for a long one: None after each, and the planes after the last. From the
        first piece on the sequence may grow. at, state: as it was when it had `at` tokens and `self.state` gave that.
        """
        pieces = snapshots.take(lambda: self.cache, slot, self.lengths[slot] if at is None else at, state)
        planes = None
        while planes is None:
            with self._enough_memory("take"):
                planes = next(pieces)
            yield planes

    def earlier(self, planes: Planes, length: int, state: Planes) -> Planes:
        """What `take` would have given when the sequence had `length` tokens and `self.state` gave that."""
        return snapshots.earlier(planes, length, state)

    def state(self, slot: int) -> Planes:
        """What `take` needs to know later of the sequence in `slot` as it is now, of a multiple of 128 tokens."""
        return snapshots.state(self.cache, slot)

    def put(self, slot: int, planes: Planes, params: Sampling) -> None:
        """Put a state from `take` into `slot`, in place of what was there; see `restore`."""
        with self._enough_memory("put"):
            self.cache = snapshots.put(self.cache, slot, planes)
        self._sampling[slot], self.lengths[slot] = params, int(planes["length"][0])

    def choose(
        self, logits: Array | np.ndarray, params: Sequence[Sampling], changes: sampling.Edits, position: Sequence[int]
    ) -> tuple[np.ndarray, ...]:
        """`sampling.choose` for logits (B, vocab), with numpy results."""
        return jax.device_get(_choose(logits, sampling.batch(params), changes, np.array(position, np.int32)))

    def _run(self, name: str, *args: Any) -> list[Array]:
        """One step on the weights, the cache and numpy arguments: → what it returns beside the cache."""
        with self._enough_memory(name):
            before = self.programs.seconds
            step = self.programs.get(name, *args)
            self.stats.compile_seconds += self.programs.seconds - before
            *out, self.cache = step(self.weights, self.cache, *args)
            return out

    @contextlib.contextmanager
    def _enough_memory(self, what: str) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise Ds4Error(
                f"{what}: out of device memory; a smaller prefill_chunk, ctx or batch needs less (found "
                f"{self.settings.prefill_chunk}, {self.settings.ctx}, {self.batch})"
            ) from error


@dataclasses.dataclass
class Block:
    """Tokens that the device is sampling for some slots, n each. batch_logits (B, vocab): those of the last ones."""

    stats: Stats
    sampled: Array
    batch_logits: Array
    slots: tuple[int, ...]
    n: int
    start: float

    def tokens(self) -> dict[int, list[int]]:
        """By slot; waits for them."""
        sampled = np.asarray(self.sampled)
        now = time.perf_counter()
        # Blocks overlap: what the one before took is not this one's.
        seconds = now - max(self.start, self.stats.decoded_at)
        self.stats.decode_seconds += seconds
        self.stats.decoded_at, self.stats.token_seconds = now, seconds / self.n
        return {slot: sampled[: self.n, slot].tolist() for slot in self.slots}


def decode_args(tokens: Mapping[int, int | None], n: int, params: sampling.Batch) -> tuple[Any, ...]:
    """The arguments of `_decode` after its results, for decoding n tokens in some slots. params: of all slots."""
    ids = np.zeros(len(params.seed), np.int32)
    active = np.zeros(len(ids), bool)
    for slot, token in tokens.items():
        ids[slot], active[slot] = -1 if token is None else token, True
    return ids, active, np.int32(n), params


def _prefill(w, cache: Cache, slot, fresh, tokens, n, params, *, cfg: ModelConfig, compute: Compute):
    """tokens (1, T), n (1,) of them real, appended to the sequence in `slot`, which is emptied first if fresh (1,)."""

    def axis(x: Array) -> int:
        return min(1, x.ndim - 1)  # of the sequence: 1, but 0 in `length`

    one = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, axis(x)), cache)
    logits, one = transformer.prefill(w, kv.reset(one, fresh), tokens, n, cfg=cfg, compute=compute)
    cache = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, slot, axis(x)), cache, one)
    return sampling.sample(logits, params, one.length), logits, cache


def _decode(w, cache: Cache, results, tokens, active, n, params, *, cfg: ModelConfig, compute: Compute):
    """n tokens, () int32, of every active sequence (B,): tokens (B,), or the last sampled ones where that is negative,
    and then the sampled ones. → sampled (BLOCK, B), of which n rows, the last of them (1, B), their logits (B, vocab),
    cache. results: those of the call before, but the cache; the new ones take their place, as no two have one shape.

    One call, so that what it costs to start one is paid once for n tokens.
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


_copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))
_choose = jax.jit(sampling.choose)


def _compiler_options(step: str, kernels: Implementation) -> dict[str, Any] | None:
    """On a CPU most of the time to the first token is LLVM's; level 1 takes two thirds of it, for code as fast.

    On a GPU a decoding step is recorded as a graph, in which kernels that do not depend on each other may run side by
    side: 4 % of it on an H200. With Pallas kernels the loop over tokens is in the graph, too, which XLA would otherwise
    leave to the host: 0.18 ms a token (7 layers). Without them there are loops in the loop, as a graph not tried so
    far. Prefill is launched once, and takes 6 % less time without one (7 layers, 2048 tokens).
    """
    backend = jax.default_backend()
    if backend == "gpu" and step == "prefill":
        return {"xla_gpu_enable_command_buffer": ""}
    if backend == "gpu":
        options = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
        if kernels == "pallas":  # XLA's own choice, and the last
            recorded = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,WHILE"
            options["xla_gpu_enable_command_buffer"] = recorded
        return options
    given = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": 1} if backend == "cpu" and not given else None


def _pad(tokens: Sequence[int], sizes: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Token ids → int32 (1, T) with T the first of `sizes` that is enough, or else a bucket, and their number (1,)."""
    enough = (size for size in sizes if size >= len(tokens))
    padded = np.zeros((1, next(enough, bucket(len(tokens), LARGEST_BUCKET))), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded, np.array([len(tokens)], np.int32)


def chunk_lengths(lengths: Iterable[int], chunk: int) -> set[int]:
    """How many tokens the chunks have that `Runner.prefill` makes of prompts of these lengths."""
    return {min(chunk, n - start) for n in lengths for start in range(0, n, chunk)}


def chunk_sizes(lengths: Iterable[int], chunk: int) -> set[int]:
    """What it pads them to."""
    return {bucket(n, LARGEST_BUCKET) for n in chunk_lengths(lengths, chunk)}


def check_prompt(tokens: Sequence[int], cfg: ModelConfig, ctx: int, before: int = 0) -> None:
    """Raises Ds4Error unless a prompt has at least one token, room for one more, and only ids of the vocabulary.

    before: tokens that are in its place already.
    """
    if not 0 < len(tokens) < ctx - before:
        there = f", of which {before} are taken" if before else ""
        raise Ds4Error(f"prompt: found {len(tokens)} tokens, expected 1 to {ctx - before - 1} (ctx is {ctx}{there})")
    if not 0 <= min(tokens) <= max(tokens) < cfg.vocab_size:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise Ds4Error(f"prompt: found token id {wrong}, expected 0 to {cfg.vocab_size - 1}")


def peak_memory() -> tuple[int, str]:
    """The most memory in use so far: bytes, and of what (the first GPU, or the process where JAX cannot tell)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device memory"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process memory"


def describe_peak(programs: Programs) -> str:
    """`peak_memory` in words, beside the plan for `programs` where the two can be compared."""
    peak, of = peak_memory()
    text, planned = f"peak {of}: {peak / 2**30:.2f} GiB", memory.plan(programs)
    if planned.limit is None:
        return text
    return f"{text}, planned {planned.total / 2**30:.2f} GiB ({peak / planned.total - 1:+.1%})"


def keep_compilations() -> None:
    """Let JAX keep compiled programs in the user's cache, for a quicker next start, unless it has been told where."""
    if jax.config.jax_compilation_cache_dir is None:
        try:
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # many small ones add up, too
        except Ds4Error:
            pass  # not writable: every start compiles
