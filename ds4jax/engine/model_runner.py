"""The model runner: weights, cache and compiled steps of one model. Nothing else in the engine touches a device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, Self

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import sharding
from ds4jax.config import ModelConfig
from ds4jax.engine import compile_cache, memory, sampling, snapshot
from ds4jax.engine.call_sizes import CallSizes
from ds4jax.engine.chunks import pad, serving_sizes
from ds4jax.engine.compiled_steps import (
    BLOCK,
    ROUNDS,
    SCORED,
    block_logits,
    compiler_options,
    decode_args,
    speculate_args,
)
from ds4jax.engine.constraints import edits
from ds4jax.engine.routing_trace import Record
from ds4jax.engine.snapshot import Planes
from ds4jax.engine.types import Sampling
from ds4jax.errors import ConfigError, Ds4Error
from ds4jax.io.checkpoint import Checkpoint
from ds4jax.io.drafter import open_with_drafter
from ds4jax.io.load import load
from ds4jax.io.recipes import RANDOM_RECIPES
from ds4jax.io.synthetic import Synthetic, synthetic_config
from ds4jax.io.tokenizer import Tokenizer, byte_tokenizer
from ds4jax.model import cache as kv
from ds4jax.model import residency, transformer, weights
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute
from ds4jax.model.spread import WHOLE, holder, over, spread
from ds4jax.model.weights import Weights
from ds4jax.ops.mhc import Streams
from ds4jax.profile import choose
from ds4jax.settings import Settings

Array = jax.Array

BLOCK_SECONDS = 0.04
"""Seconds that a decoding call should take: streams and new requests wait for its end, and for that of the next one."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One sampled token, and the logits it was sampled from (still on the device until asked for).

    batch_logits: (B, vocab), of which `row` is this token's; None for tokens inside a block. scores: after a prefill
    with targets, what `sampling.logprobs` says of them. state: after a prefill with a mark, what `ModelRunner.state`
    would have given at the mark.
    """

    token: int
    batch_logits: Array | None
    row: int
    scores: tuple[np.ndarray, ...] = ()
    state: Planes | None = None

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
    decoded_at: float = 0.0  # `time.perf_counter` when the last block was read
    token_seconds: float = 0.0  # of the last block, per token of each sequence
    round_seconds: float = 0.0  # of the last rounds of drafts, each

    def read(self, start: float) -> float:
        """Note that the tokens of a decoding call that began at `start` are read now; → the seconds that it took.

        The next call may begin before this one is read, so the time since the last reading is what counts.
        """
        now = time.perf_counter()
        seconds = now - max(start, self.decoded_at)
        self.decode_seconds += seconds
        self.decoded_at = now
        return seconds


def open_model(settings: Settings, synthetic: str | None = None, recipe: str = "q2") -> Checkpoint | Synthetic:
    """The model file of `settings`, or one of `synthetic.SHAPES` in the types of a recipe. Raises Ds4Error.

    recipe: one of `recipes.RANDOM_RECIPES`.
    """
    if synthetic is None:
        return open_with_drafter(settings)
    return with_drafter(Synthetic(synthetic_config(synthetic), RANDOM_RECIPES[recipe]), settings)


def serving_runner(
    model: Checkpoint | Synthetic,
    settings: Settings,
    batch: int | None = None,
    progress: bool = False,
    record: Record | None = None,
    loaded: Callable[[ModelRunner], object] = lambda runner: None,
) -> ModelRunner:
    """A model, loaded, with the programs of a server compiled.

    On a GPU, where that takes long, programs for all chunks but the largest are compiled in the background; several
    processes compile all of them at the start. loaded: called with the model before the first program that needs the
    devices of all processes, which wait for each other there, but not for long. The other arguments are those of
    `ModelRunner`.
    """
    compile_cache.keep_compilations()
    sizes = serving_sizes(settings)
    later = jax.default_backend() == "gpu" and jax.process_count() == 1
    # The largest serves all prompts.
    runner = ModelRunner(model, settings, batch, progress, sizes[-1:] if later else sizes, record=record)
    loaded(runner)
    runner.compile()
    runner.compile_later(sizes)
    return runner


def with_drafter(model: Synthetic, settings: Settings) -> Synthetic:
    """A synthetic model with the drafter that the settings ask for. Raises ConfigError if that is a file."""
    if settings.draft not in ("auto", "off"):
        raise ConfigError(f"draft: found {settings.draft!r} for a model without a file, expected auto or off")
    return model.with_drafter() if settings.draft == "auto" else model


def _steps_worth_a_call(seconds: float, most: int) -> int:
    """How many steps of so many seconds take some BLOCK_SECONDS together; one if that is not known yet (0)."""
    return max(1, min(most, round(BLOCK_SECONDS / seconds) if seconds else 1))


TOGETHER: set[str] = set()
"""The names of the methods that are `together`."""


def together[**P, R](method: Callable[Concatenate[ModelRunner, P], R]) -> Callable[Concatenate[ModelRunner, P], R]:
    """A method that starts a program of all devices: the runners of other processes are told to do the same first."""

    @functools.wraps(method)
    def run(self: ModelRunner, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.tell is not None:
            self.tell(method.__name__, args, kwargs)
        return method(self, *args, **kwargs)

    TOGETHER.add(method.__name__)
    return run


class ModelRunner:
    """A model on its devices with a cache of `batch` sequences, each in a slot of its own.

    `prefill` starts a sequence in a slot and samples its first token; `decode` appends one token to each of some
    sequences and samples the next. Every shape is compiled once, when first used, and can then only run as compiled.

    Where the devices belong to several processes, each has a runner, and all have to call the same methods in the same
    order, but for those that only read: `take`, `state`, `choose`, `fits`.

    Attributes: settings, cfg (of the model), checkpoint (the open file), profile (its release), steps, plan (of
    memory), weights, cache, batch, lengths (tokens in each slot's cache), stats, tell (called with the name and the
    arguments of every call of a method in TOGETHER, unless it is None).
    """

    tell: Callable[[str, tuple, dict[str, Any]], None] | None = None

    @classmethod
    def load(cls, settings: Settings, batch: int | None = None, progress: bool = False) -> Self:
        """The model of `settings`; see `ModelRunner`. Raises Ds4Error if its file is missing."""
        return cls(open_model(settings), settings, batch, progress)

    def __init__(
        self,
        checkpoint: Checkpoint | Synthetic,
        settings: Settings,
        batch: int | None = None,
        progress: bool = False,
        sizes: Collection[int] = (),
        acceptance: Sequence[float] = (),
        record: Record | None = None,
    ):
        """Load the weights onto the devices, or make them there, and allocate the cache.

        batch: number of slots, by default the settings'. progress: report loading and compilation on stderr. sizes:
        what chunks of prompts will be padded to; prefill for these and decoding are then compiled here, in parallel.
        acceptance: of drafts, by slot, instead of what the model says of them: for measurements alone. record: is given
        the experts of every token, see `ds4jax.engine.routing_trace`.
        Raises Ds4Error for weights, mesh and memory that do not go together, and for the chat template of V4.1.
        """
        file = None if isinstance(checkpoint, Synthetic) else checkpoint.file
        self.profile = choose(settings.profile, file.metadata if file else {}, file.path.name if file else "")
        self.steps = memory.steps(
            checkpoint, settings, batch, progress, sizes=sizes, acceptance=acceptance, record=record
        )
        self.settings, self.checkpoint, self.cfg = settings, checkpoint, checkpoint.cfg
        self.batch, self._compute = self.steps.batch, self.steps.compute
        if progress and settings.draft != "off":
            print(f"drafts: {self.drafts}", file=sys.stderr)
        self.plan = memory.check(self.steps, sizes)
        if progress and (every := self.plan.slots[1]):
            print(f"routed experts: room for {self.plan.slots[0]} of {every} on the device", file=sys.stderr)
        if sizes:
            self.steps.get_all(self.steps.calls(sizes))
        self.stats = Stats(compile_seconds=self.steps.seconds)
        if isinstance(checkpoint, Synthetic):
            self.weights = weights.init_random(
                self.steps.tree, self.cfg, checkpoint.seed, self._compute.mesh, self._place
            )
        else:
            on_host = bool(self.steps.slots)
            self.weights, _ = load(checkpoint, self._compute.mesh, progress, wide=self.steps.wide, on_host=on_host)
        if experts := self.steps.cache.experts:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            self._fill = jax.jit(functools.partial(residency.fill, experts), out_shardings=here)
        counts = (0, *self.steps.draft_counts)
        self._call_sizes = {n: CallSizes(self.batch, functools.partial(self._prepare, n)) for n in counts}
        self._later: set[int] = set()  # lengths of chunks that are being compiled for
        self.reset()

    def reset(self) -> None:
        """Empty every slot. A step that failed may have lost the cache, which was donated to it."""
        for name in ("cache", "_results"):  # what is left of them makes room first
            vars(self).pop(name, None)
        where = self.steps.compute.mesh and jax.tree.map(lambda x: x.sharding, self.steps.cache)
        self.cache = self._empty(self.batch, where)
        if self.steps.slots:
            self.cache = kv.with_experts(self.cache, self._fill(self.weights.ffn.experts))
        self.lengths, self._sampling = [0] * self.batch, [Sampling()] * self.batch
        results = self.steps.results
        self._results = tuple(jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in results)  # of the last block
        self._drafted: dict[int, tuple[Array, ...]] = {}  # of the last rounds, by the number of drafts
        self._arguments: dict[str, list[tuple[Any, Any]]] = {}  # of each step's last call, on the host and the device

    def _place(self, spec: weights.WeightSpec, made: Any) -> Any:
        """A weight that was made at random, in the memory that it belongs to."""
        return jax.device_put(made, residency.host_memory()) if self.steps.slots and residency.hosted(spec) else made

    @property
    def brought(self) -> tuple[int, int]:
        """Experts that decoding found on the device, and that it had to bring there; 0 and 0 if all are there."""
        if self.cache.experts is None:
            return 0, 0
        found, lacked = np.asarray(self.cache.experts.counts).tolist()
        return found, lacked

    def _holder(self, slot: int) -> tuple[Cache, int]:
        """What of the cache is read for the sequence in a slot, and its slot there."""
        return holder(self.cache, slot, self.steps.compute.mesh)

    def _empty(self, batch: int, where: Any) -> Cache:
        return kv.empty(self.cfg, self.settings.numerics, self.settings.dtype, batch, self.settings.ctx, where)

    @property
    def drafts(self) -> str:
        """Who drafts, and how much, in words."""
        if not self.steps.draft_counts:
            return "nobody: there is no drafter beside the model, nor an MTP head in it"
        file = None if isinstance(self.checkpoint, Synthetic) else self.checkpoint.drafter
        mtp = None if isinstance(self.checkpoint, Synthetic) else self.checkpoint.mtp_file
        who = file.file.path if file else "a synthetic drafter" if self.cfg.drafter else mtp.path if mtp else "MTP head"
        return f"{who}, {self.steps.draft_counts[-1]} at once"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the model's file (GGUFError if there is none), or one for a model of random weights."""
        if isinstance(self.checkpoint, Synthetic):
            return byte_tokenizer(self.cfg.vocab_size)
        return Tokenizer.from_metadata(self.checkpoint.file.metadata)

    @together
    def clear(self, slot: int) -> None:
        """Empty a slot whose state is not finite: its rows would harm the next sequence in it."""
        self.cache, self.lengths[slot] = kv.clear(self.cache, slot), 0

    def compile(self) -> None:
        """Compile `take`, `put` and `choose` now instead of at their first use."""
        for tokens in snapshot.rooms(self.settings.ctx):
            self.decode_block({}, 1)
            with self._enough_memory("snapshots"):
                firsts = range(0, self.batch, max(1, self.batch // self.settings.dp))
                self.cache = snapshot.compile(self.cache, [self._holder(slot)[0] for slot in firsts], tokens)
        for rows in (1, self.batch):
            logits = np.zeros((rows, self.cfg.vocab_size), np.float32)
            self.choose(logits, [Sampling()] * rows, edits([None] * rows, self.cfg.vocab_size), [0] * rows)

    def compile_later(self, sizes: Iterable[int]) -> threading.Thread:
        """Compile prefill for these sizes of chunks in the background; meanwhile chunks are padded to larger ones.

        The largest one has to be compiled. Which program computes a chunk may change the last bits of its results.
        """
        missing = set(sizes) - self.steps.prefill_sizes
        self._later |= missing

        def work() -> None:
            for size in sorted(missing, reverse=True):
                try:
                    *_, (name, args) = self.steps.calls([size])
                    self.steps.prepare(name, *args)
                    self._later.discard(size)
                except Exception as error:  # larger ones still serve
                    sys.stderr.write(f"prefill: no program for {size} tokens: {error}\n")

        thread = threading.Thread(target=work, name="chunk-sizes", daemon=True)
        thread.start()
        return thread

    @together
    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        params: Sampling,
        append: bool = False,
        sizes: Sequence[int] = (),
        targets: Sequence[int] = (),
        mark: int = 0,
    ) -> Sampled:
        """Start a sequence in `slot`, in place of what was there; → its first token, drawn as `params` say.

        append: continue the sequence that is there instead. sizes: what chunks are padded to, ascending, or buckets.
        targets: the token after each of the first len(targets) tokens; `Sampled.scores` says how likely each is.
        mark: after how many of the tokens `Sampled.state` is wanted, all of them in one chunk then; 0 for nowhere.
        Raises Ds4Error unless there are 1 to ctx - 1 tokens (with those that are there), all in the vocabulary.
        """
        before = self.lengths[slot] if append else 0
        check_prompt(tokens, self.cfg, self.settings.ctx, before)
        self._sampling[slot], self.lengths[slot] = params, before
        scores, state = [], None
        for start in range(0, len(tokens), self.settings.prefill_chunk):
            ready = [size for size in sizes if size not in self._later]
            padded, n = pad(tokens[start : start + self.settings.prefill_chunk], ready)
            follows = np.full(padded.shape[1], -1, np.int32)
            here = targets[start : start + int(n[0])]
            follows[: len(here)] = here
            fresh = np.array([self.lengths[slot] == 0])
            begun = time.perf_counter() - self.stats.compile_seconds
            args = np.int32(slot), fresh, padded, n, sampling.batch([params]), follows, np.array([mark], np.int32)
            sampled, logits, *about, at_mark = self._run("prefill", *args)
            sampled.block_until_ready()
            self.lengths[slot] += int(n[0])
            self.stats.prefill_tokens += int(n[0])
            self.stats.prefill_seconds += time.perf_counter() - self.stats.compile_seconds - begun
            if mark:
                state = jax.device_get(at_mark)
            if here:
                scores.append([np.asarray(x)[: len(here)] for x in about])
        return Sampled(int(sampled[0]), logits, 0, tuple(map(np.concatenate, zip(*scores, strict=True))), state)

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Sampled]:
        """Append to the sequence of each given slot its token; → what follows, by slot. Other slots rest.

        Raises Ds4Error if a sequence has ctx tokens already.
        """
        block = self.decode_block(tokens, 1)
        return {slot: Sampled(token, block.batch_logits, slot) for slot, (token,) in block.tokens().items()}

    @together
    def decode_block(self, tokens: Mapping[int, int | None], n: int) -> Block:
        """Append n tokens, 1 to BLOCK, to the sequence of each given slot: its token, then what was sampled from it.

        Nothing is waited for, so that the device goes on while the host reads: for a slot whose token is None the
        block starts from the last token of the block before. Raises Ds4Error if a sequence has no room for n tokens.
        """
        for slot in tokens:
            if self.lengths[slot] + n > self.settings.ctx:
                raise Ds4Error(f"slot {slot}: the context of {self.settings.ctx} tokens is full")
        start = time.perf_counter() - self.stats.compile_seconds
        args = self._resident("decode", decode_args(tokens, n, self._sampling, self._call_sizes[0].of(len(tokens))))
        self._results = tuple(self._run("decode", self._results, *args))
        sampled, _, logits = _copy(self._results)  # the next block's will take the place of these
        for slot in tokens:
            self.lengths[slot] += n
        self.stats.decode_tokens += n * len(tokens)
        return Block(
            self.stats, sampled, logits, tuple(tokens), n, start + self.stats.compile_seconds, self._call_sizes[0]
        )

    def _prepare(self, drafts: int, size: int) -> bool:
        """Compile the decoding call of `size` sequences, with drafts unless 0; → whether it fits into memory.

        Where devices have sequences of their own, every call computes all of them; so it does where several processes
        would have to compile at once.
        """
        if self.settings.dp > 1 or jax.process_count() > 1:
            return False
        steps = self.steps
        if drafts:
            args = speculate_args({}, {}, 1, self._sampling, size)
            name, args = "speculate", ((*steps.drafted(drafts), *steps.results[1:]), *args)
        else:
            name, args = "decode", (steps.results, *decode_args({}, 1, self._sampling, size))
        need = memory.needed(steps, steps.prepare(name, *args))
        return dataclasses.replace(self.plan, workspace={name: need}).fits

    @together
    def speculate(self, tokens: Mapping[int, int | None], room: Mapping[int, int], n: int, rounds: int) -> Rounds:
        """Append to the sequence of each given slot in rounds of n drafts, ROUNDS at most: see `speculate_step`.

        tokens: as in `decode_block`. room: by slot, 1 or more: how many tokens to append at most. n: one of
        `CompiledSteps.draft_counts`. How long the sequences have become is known once the result is read. Raises
        Ds4Error if a sequence has less room.
        """
        for slot in tokens:
            left = self.settings.ctx - self.lengths[slot]
            if not 1 <= room[slot] <= left:
                raise Ds4Error(f"slot {slot}: found room {room[slot]}, expected 1 to {left}")
        start = time.perf_counter() - self.stats.compile_seconds
        args = speculate_args(tokens, room, rounds, self._sampling, self._call_sizes[n].of(len(tokens)))
        args = self._resident("speculate", args)
        buffers = self._drafted.pop(n, None) or tuple(
            jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in self.steps.drafted(n)
        )
        sampled, last, logits = self._results
        ids, counts, last, logits = self._run("speculate", (*buffers, last, logits), *args)
        self._drafted[n], self._results = (ids, counts), (sampled, last, logits)
        ids, counts, logits = _copy((ids, counts, logits))
        start += self.stats.compile_seconds
        return Rounds(self.stats, ids, counts, logits, tuple(tokens), self.lengths, start, self._call_sizes[n])

    def rounds(self) -> int:
        """How many rounds to run at once, so that they take some BLOCK_SECONDS: see `block`."""
        return _steps_worth_a_call(self.stats.round_seconds, ROUNDS)

    def _resident(self, step: str, args: tuple) -> tuple:
        """Numpy arguments on the device: where one is as it was in the step's last call, the very array of that call.

        A step that finds all its buffers where they were runs as it was recorded; else it is first written anew.
        """
        leaves, tree = jax.tree.flatten(args)
        places: list[Any] = [None] * len(leaves)
        if self.steps.compute.mesh is not None:
            given, _ = self.steps.places(step)
            places = jax.tree.leaves(jax.tree.broadcast(tuple(given[1:]), args))
        before: list[tuple[Any, Any]] = self._arguments.get(step) or [(None, None)] * len(leaves)
        self._arguments[step] = [
            (x, there if np.array_equal(x, old) else sharding.put(x, place))
            for x, place, (old, there) in zip(leaves, places, before, strict=True)
        ]
        return jax.tree.unflatten(tree, [there for _, there in self._arguments[step]])

    def block(self, room: int) -> int:
        """How many tokens to decode at once, BLOCK and `room` at most, so that it takes some BLOCK_SECONDS.

        One until the first have shown how long they take.
        """
        return max(1, min(room, _steps_worth_a_call(self.stats.token_seconds, BLOCK)))

    def logit_blocks(self, tokens: Sequence[int]) -> Iterator[tuple[Array, int]]:
        """The logits at every position of a text, a block at a time, so that those of a long one need no memory.

        → (rows, vocab), SCORED rows at most, on the device, and how many of the rows count: the others mean nothing.
        Chunks are padded as those of a served prompt. No slot is touched; takes a cache of its own.
        """
        check_prompt(tokens, self.cfg, self.settings.ctx + 1)
        chunk_streams, logits_of = _reading(self.cfg, self._compute)
        cache = kv.with_experts(self._empty(1, self.steps.everywhere), self.cache.experts)
        for start in range(0, len(tokens), self.settings.prefill_chunk):
            padded, n = pad(tokens[start : start + self.settings.prefill_chunk])
            size = min(SCORED, padded.size)
            left = int(n[0])
            with self._enough_memory("logits"), self.steps.refusing(padded.size):
                s, cache = chunk_streams(self.weights, cache, padded, n)
                self.cache = kv.with_experts(self.cache, cache.experts)  # those before were donated
                for i in range(-(-left // size)):
                    yield logits_of(self.weights, s, np.int32(i), size), min(size, left - i * size)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """`logit_blocks` in one array: float32 (S, vocab)."""
        return np.concatenate([np.asarray(block)[:n] for block, n in self.logit_blocks(tokens)])

    def snapshot(self, slot: int) -> Cache:
        """The sequence in `slot` as it is now, for `restore`; no larger than its length needs."""
        return kv.snapshot(*self._holder(slot))

    def restore(self, slot: int, saved: Cache, params: Sampling) -> None:
        """Put a snapshot into `slot`, in place of what was there; its next tokens are drawn as `params` say."""
        saved = saved if self.steps.compute.mesh is None else jax.device_put(saved, self.steps.everywhere)
        self.cache = kv.restore(self.cache, slot, saved)
        self._sampling[slot], self.lengths[slot] = params, int(saved.length[0])

    def take(self, slot: int, at: int | None = None, state: Planes | None = None) -> Iterator[Planes | None]:
        """Copy the state of the sequence in `slot` to host memory, for `put` (see `ds4jax.engine.snapshot`).

        In pieces, so that no other sequence waits for a long copy: yields None after each, and the planes after the
        last. After the first piece the sequence may grow. at, state: copy its first `at` tokens, of which `self.state`
        gave `state`.
        """
        _, number = self._holder(slot)
        length = self.lengths[slot] if at is None else at
        pieces = snapshot.take(lambda: self._holder(slot)[0], number, length, state)
        planes = None
        while planes is None:
            with self._enough_memory("take"):
                planes = next(pieces)
            yield planes

    def earlier(self, planes: Planes, length: int, state: Planes) -> Planes:
        """The snapshot of the first `length` tokens, from a longer one and what `state` gave at that length."""
        return snapshot.earlier(planes, length, state)

    def state(self, slot: int) -> Planes:
        """What a later `take` needs of the sequence in `slot` as it is now, of a multiple of 128 tokens."""
        return snapshot.state(*self._holder(slot))

    def fits(self, length: int, planes: Planes) -> bool:
        """Whether `put` takes these planes for a state of `length` tokens. From any thread."""
        settings = self.settings
        cache = kv.abstract(self.cfg, settings.numerics, settings.dtype, self.batch, settings.ctx)
        return snapshot.fits(cache, length, planes)

    @together
    def put(self, slot: int, planes: Planes, params: Sampling) -> None:
        """Put a state from `take` into `slot`, in place of what was there; see `restore`."""
        with self._enough_memory("put"):
            self.cache = snapshot.put(self.cache, slot, planes)
        self._sampling[slot], self.lengths[slot] = params, int(planes["length"][0])

    def choose(
        self,
        logits: Array | np.ndarray,
        params: Sequence[Sampling],
        changes: Sequence[sampling.Edits],
        position: Sequence[int],
    ) -> tuple[np.ndarray, ...]:
        """`sampling.choose` for logits (B, vocab) with these edits made in turn, with numpy results.

        It runs on one device of this process, where others have the rest.
        """
        if isinstance(logits, Array) and not logits.is_fully_addressable:
            logits = logits.addressable_data(0)
        edited = functools.reduce(_edited, changes, logits)
        return jax.device_get(_choose(logits, edited, sampling.batch(params), np.array(position, np.int32)))

    def _run(self, name: str, *args: Any) -> list[Array]:
        """One step on the weights, the cache and numpy arguments: → what it returns beside the cache."""
        with self._enough_memory(name):
            before = self.steps.seconds
            step = self.steps.get(name, *args)
            self.stats.compile_seconds += self.steps.seconds - before
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
    """A block of n tokens that the device is sampling for each of some slots.

    batch_logits: (B, vocab), on the device, those that the last token of each slot was sampled from. seconds: that the
    block took, once `tokens` has been called.
    """

    stats: Stats
    sampled: Array
    batch_logits: Array
    slots: tuple[int, ...]
    n: int
    start: float
    sizes: CallSizes
    seconds: float = 0.0

    def tokens(self) -> dict[int, list[int]]:
        """The tokens by slot. Waits for them, and counts their time."""
        sampled = np.asarray(self.sampled)
        self.seconds = self.stats.read(self.start)
        self.sizes.took(len(self.slots), self.seconds)
        self.stats.token_seconds = self.seconds / self.n
        return {slot: sampled[: self.n, slot].tolist() for slot in self.slots}


@dataclasses.dataclass
class Rounds:
    """Rounds of drafts that the device is running for each of some slots.

    ids, counts, batch_logits: what `speculate_step` returns. lengths: the runner's, by slot. seconds: that the call
    took, once `tokens` has been called.
    """

    stats: Stats
    ids: Array
    counts: Array
    batch_logits: Array
    slots: tuple[int, ...]
    lengths: list[int]
    start: float
    sizes: CallSizes
    seconds: float = 0.0

    def tokens(self) -> dict[int, list[int]]:
        """The tokens by slot. Waits for them, and counts their time. To be called once."""
        ids, counts = np.asarray(self.ids), self.kept()
        self.seconds = self.stats.read(self.start)
        self.sizes.took(len(self.slots), self.seconds)
        self.stats.round_seconds = self.seconds / max(1, len(counts))
        out = {}
        for i, slot in enumerate(self.slots):
            out[slot] = [int(token) for r, n in enumerate(counts[:, i]) for token in ids[r, :n, slot]]
            self.lengths[slot] += len(out[slot])
            self.stats.decode_tokens += len(out[slot])
        return out

    def kept(self) -> np.ndarray:
        """How many tokens each round appended, for each of `slots`: (rounds, slots), of the rounds that were run."""
        counts = np.asarray(self.counts)
        return counts[counts.any(axis=1)][:, list(self.slots)]


_copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))
_edited = jax.jit(sampling.edited)
_choose = jax.jit(sampling.choose)


@functools.cache
def _reading(cfg: ModelConfig, compute: Compute) -> tuple[Callable, Callable]:
    """What `ModelRunner.logit_blocks` runs: from tokens to streams, and from these to a block of logits."""
    options, model = compiler_options("prefill", compute.implementations), {"cfg": cfg, "compute": compute}
    run = spread(functools.partial(transformer.run, **model), compute.mesh, cfg, [WHOLE] * 2, [WHOLE])

    def logits(w: Weights, s: Streams, i: Array, size: int) -> Array:
        of_block = functools.partial(block_logits, size=size, **model)
        if compute.mesh is not None:
            of_block = over(of_block, compute.mesh, (weights.partition(w, cfg), WHOLE, WHOLE), WHOLE)
        return of_block(w, s, i)

    streams = jax.jit(run, donate_argnums=1, compiler_options=options)
    return streams, jax.jit(logits, static_argnums=3, compiler_options=options)


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
