"""The compiled steps of a model: prefill of one slot, and decoding in every slot, plainly or by rounds of drafts.

A step is compiled for the shapes that it is called with: prefill for each padded chunk length, decoding for
some numbers of sequences and of drafts. Nothing here allocates memory on a device, so a memory plan can be made from
the steps before the weights are loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
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
from ds4jax.engine import cards, compile_cache, sampling, snapshot
from ds4jax.engine.cards import Card
from ds4jax.engine.chunks import pad
from ds4jax.engine.routing_trace import Record, Recording
from ds4jax.engine.types import ALIGN, MAX_LOGPROBS, Sampling
from ds4jax.errors import ConfigError
from ds4jax.implementation import Kernels
from ds4jax.io.checkpoint import Checkpoint
from ds4jax.io.synthetic import Synthetic
from ds4jax.model import cache as kv
from ds4jax.model import residency, support, transformer, verify, weights
from ds4jax.model.cache import Cache
from ds4jax.model.compute import Compute, Tap, no_tap
from ds4jax.model.drafting import Drafter, drafter_of
from ds4jax.model.mark import AtMark
from ds4jax.model.spread import FIRST, SECOND, THIRD, WHOLE, partition, placed, spread
from ds4jax.numerics import rows as numerics
from ds4jax.numerics.precision import wide
from ds4jax.ops.mhc import Streams
from ds4jax.ops.ring import SPARE
from ds4jax.settings import Settings
from ds4jax.sharding import DATA, place, total
from pallas_kernels.common import Unsupported, assumed_gpu

Array = jax.Array

SCORED = 128  # tokens of a prompt whose logits are in memory at once, where their log-probabilities are asked for
BLOCK = 16  # the most tokens of a sequence that one decoding call computes
ROUNDS = 8  # the most rounds of drafts in one call


class CompiledSteps:
    """The steps of a model for one batch and context length, each compiled for the shapes that it is called with.

    An `expert_layout` of auto counts as file here; `memory.steps` decides it.

    Attributes: source, settings, wide (whether experts are), cfg (of the model), batch, compute, tree
    (`weights.abstract`, for the mesh); slots (for routed experts of each kind of layers, see `model.residency`; empty
    where all are on the device); weights, cache and results (of the decoding step beside the cache), all three trees of
    `jax.ShapeDtypeStruct`, with shardings on a mesh; everywhere (the sharding of what every device holds whole, or
    None); drafter (or None); draft_counts (how many tokens it may draft at once, ascending; empty
    without one); card (as given); can_compile (whether that is possible on this machine, for the card); compiled
    (programs by name and shapes); seconds (spent compiling); compiling (whether it does so now).
    """

    def __init__(
        self,
        source: Checkpoint | Synthetic,
        settings: Settings,
        batch: int | None = None,
        progress: bool = False,
        card: Card | None = None,
        acceptance: Sequence[float] = (),
        slots: Sequence[int] = (),
        record: Record | None = None,
    ):
        """batch: number of slots, by default the settings'. progress: report each compilation on stderr. card: plan for
        such devices instead of this machine's. acceptance: see `speculate_step`. slots: for routed experts, as the
        attribute. record: is given the experts of the tokens of every step.

        Raises Ds4Error for weights, numerics, mesh, drafter and slots that do not go together.
        """
        settings.set_environment()
        self.source, self.settings, self.cfg = source, settings, source.cfg
        self.batch = settings.batch if batch is None else batch
        self._progress = progress
        numerics.check(self.cfg, settings.numerics)
        self.card = card
        self.can_compile = card is None or cards.compiler_is_here()
        devices = card.devices(settings.devices) if card and self.can_compile else None
        mesh: Any = None  # one that is only planned for is a Mesh in name
        if settings.devices > 1:
            shape = settings.tp, settings.ep, settings.dp
            mesh = sharding.make_mesh(*shape, devices) if self.can_compile else sharding.abstract_mesh(*shape)
        self.everywhere = None if mesh is None else sharding.replicated(mesh)
        if devices and mesh is None:
            self.everywhere = jax.sharding.SingleDeviceSharding(devices[0])
        self.compute = Compute(settings.numerics, settings.dtype, mesh, kernels=settings.kernels)
        self.wide = settings.expert_layout == "wide"
        self.tree = weights.abstract(self.cfg, source.types, source.drafter_types, self.wide)
        self.tree = self.tree if mesh is None else weights.even(self.tree, mesh)
        self.drafter = drafter_of(self.cfg) if settings.draft != "off" else None
        self.draft_counts = _draft_counts(self.cfg, settings.draft_tokens) if self.drafter else []
        self._acceptance = tuple(acceptance)
        self.weights = weights.structs(self.tree)
        self.cache = kv.abstract(self.cfg, settings.numerics, settings.dtype, self.batch, settings.ctx)
        logits = (self.batch, self.cfg.vocab_size), jnp.dtype(wide(jnp.dtype(settings.dtype)))
        shapes = ((BLOCK, self.batch), jnp.int32), ((1, self.batch), jnp.int32), logits
        if mesh is not None:
            self.weights = jax.tree.map(_placed, self.weights, weights.shardings(self.tree, mesh))
            self.cache = jax.tree.map(_placed, self.cache, self._shardings(partition(self.cache, mesh)))
        self.slots = tuple(slots)
        if self.slots:
            if self.drafter and not self.cfg.drafter:  # its block's experts are among those in host memory
                raise ConfigError("device_budget_gb: found drafts of an MTP head, expected those of a drafter, or off")
            self.cache = kv.with_experts(self.cache, residency.abstract(self.tree, self.cfg, self.slots))
            there = residency.host_memory()
            self.weights = residency.with_experts(
                self.weights, jax.tree.map(lambda x: x.update(sharding=there), self.weights.ffn.experts)
            )
        _, places = self.places("decode")
        self.results = tuple(map(_placed, itertools.starmap(jax.ShapeDtypeStruct, shapes), places))
        if record and mesh is not None:
            raise ConfigError(f"experts of tokens: found {settings.devices} devices, expected one to tell of them")
        self._record = record
        model = {"cfg": self.cfg, "compute": self.compute, "drafter": self.drafter, "record": record}
        speculate = functools.partial(speculate_step, acceptance=self._acceptance)
        self._steps = {
            name: self._jitted(name, functools.partial(step, **model), donated)
            for name, step, donated in (
                ("prefill", functools.partial(prefill_step, batch=self.batch), 1),
                ("decode", decode_step, (1, 2)),
                ("speculate", speculate, (1, 2)),
            )
        }
        self._lowering = threading.Lock()
        self.compiled: dict[tuple, Callable] = {}
        self.seconds, self.compiling = 0.0, False

    def _jitted(self, name: str, step: Callable, donated: int | tuple[int, ...]) -> Callable:
        """A step for one device or for the mesh."""
        if self.compute.mesh is None:
            return jax.jit(step, donate_argnums=donated, out_shardings=self.everywhere)
        given, found = self.places(name)
        weights, cache = (jax.tree.map(lambda x: x.sharding, tree) for tree in (self.weights, self.cache))
        return jax.jit(
            spread(step, self.compute.mesh, self.cfg, *PLACES[name]), donate_argnums=donated,
            in_shardings=(weights, cache, *given), out_shardings=(*found, cache),
        )  # fmt: skip

    def places(self, name: str) -> tuple[Sequence[Any], Sequence[Any]]:
        """The shardings of a step's arguments after the cache, and of its results before it; None for one device."""
        if (mesh := self.compute.mesh) is None:
            return tuple(jax.tree.map(lambda _: self.everywhere, specs) for specs in PLACES[name])
        return tuple(self._shardings(placed(specs, self.cache, mesh)) for specs in PLACES[name])

    def _shardings(self, specs: Any) -> Any:
        mesh: Any = self.compute.mesh
        return jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)

    def get(self, name: str, *args: Any) -> Callable:
        """The step `name` compiled for arguments of these shapes, which follow weights and cache."""
        return self.get_all([(name, args)])[0]

    def get_all(self, calls: Sequence[tuple[str, tuple]]) -> list[Callable]:
        """`get` for several names and arguments. Missing programs are compiled in parallel, one per core."""
        keyed = {_key(name, args): (name, args) for name, args in calls}
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

    def prepare(self, name: str, *args: Any) -> Callable:
        """`get` in another thread, beside running steps; its time does not count as theirs."""
        key = _key(name, args)
        if key not in self.compiled:
            self.compiled[key] = self._compile(name, args)
        return self.compiled[key]

    @property
    def prefill_sizes(self) -> set[int]:
        """The lengths of chunks that prefill is compiled for."""
        return {shapes[2][1] for name, *shapes in list(self.compiled) if name == "prefill"}

    def calls(self, sizes: Iterable[int]) -> list[tuple[str, tuple]]:
        """The arguments of `get_all` for decoding, with drafts too, and for prefill of chunks padded to `sizes`."""
        one, mark = sampling.batch([Sampling()]), np.zeros(1, np.int32)
        prefills = [
            ("prefill", (np.int32(0), np.array([True]), *pad([0], [size]), one, np.zeros(size, np.int32), mark))
            for size in sizes
        ]
        every, batch = [Sampling()] * self.batch, self.batch
        rounds = [
            ("speculate", ((*self.drafted(n), *self.results[1:]), *speculate_args({}, {}, 1, every, batch)))
            for n in self.draft_counts
        ]
        return [("decode", (self.results, *decode_args({}, 1, every, batch))), *rounds, *prefills]

    def drafted(self, n: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What `speculate_step` returns first, with n drafts at once."""
        shapes = (ROUNDS, 1 + n, self.batch), (ROUNDS, self.batch)
        _, (of_ids, of_counts, *_) = self.places("speculate")
        ids, counts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
        return _placed(ids, of_ids), _placed(counts, of_counts)

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
        nested = bool(self.slots or self._record)
        options = compiler_options(name, self.compute.implementations, self._backend, nested)
        if self.card and self.compute.mesh is None:
            args = jax.tree.map(self._whole, args)
        shapes = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype).name), args)
        drafting = self.drafter, self._acceptance
        what = name, self.cfg, self.compute, drafting, options, jax.tree.structure(args), jax.tree.leaves(shapes)
        unlike = self.card or self.slots or self._record  # what is kept does not fit, or cannot be kept
        program = None if unlike else compile_cache.load(what, args, (*self._results(name, args), self.cache))
        if program is not None:
            return program
        tokens = {"prefill": lambda: args[4].shape[1], "decode": lambda: 1, "speculate": lambda: args[2][0].shape[1]}
        of_each = tokens[name]()
        with self.refusing(of_each):
            if self._progress:
                what_for = f"{name}, {of_each * (1 if name == 'prefill' else args[3].size)} tokens"
                sys.stderr.write(f"compiling {what_for} ...\n")  # one write: several threads do this
            with self._lowering:  # Python's work, which threads do not speed up; it also compiles small programs
                lowered = self._lower(name, args)
        program = lowered.compile(options)
        if not unlike:
            compile_cache.save(what, program)
        return program

    def _results(self, name: str, args: tuple) -> Iterable[Any]:
        """Something of the structure of what a step returns beside the cache."""
        if name != "prefill":
            return range({"decode": 3, "speculate": 4}[name])
        return *range(5), dict.fromkeys(snapshot.state_names(self.cache) if _has_mark(args[4].shape[1]) else ())

    def _lower(self, name: str, args: tuple) -> jax.stages.Lowered:
        if self.card is None:
            return self._steps[name].lower(*args)
        one = self.compute.mesh is None  # a mesh tells itself what devices it is of
        with assumed_gpu(self.card.kind, self.card.cores) if one else contextlib.nullcontext():
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
        settings, others = dataclasses.replace(self.settings, ctx=ctx), (self._acceptance, self.slots, self._record)
        return type(self)(self.source, settings, batch, self._progress, self.card, *others)

    def with_slots(self, slots: Sequence[int]) -> Self:
        """The steps of the same model with some slots for routed experts."""
        others = self._progress, self.card, self._acceptance, slots, self._record
        return type(self)(self.source, self.settings, self.batch, *others)

    @property
    def device_weights(self) -> weights.Weights:
        """`weights` without what is in host memory."""
        return residency.with_experts(self.weights, None) if self.slots else self.weights

    def compile_largest(self, sizes: Iterable[int] = ()) -> None:
        """Compile the calls that need the most memory: decoding and the largest chunk; and prefill for `sizes`."""
        padded, _ = pad([0] * min(self.settings.prefill_chunk, self.settings.ctx - 1))
        self.get_all(self.calls([padded.shape[1], *sizes]))


def _key(name: str, args: tuple) -> tuple:
    return name, *(x.shape for x in jax.tree.leaves(args))


def _placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    return x.update(sharding=sharding)


def _draft_counts(cfg: ModelConfig, asked: int) -> list[int]:
    """How many tokens may be drafted at once, for settings that say `asked`: so many, and half. Raises ConfigError."""
    if cfg.drafter and asked > cfg.drafter.block_size:
        raise ConfigError(
            f"draft_tokens: found {asked}, expected at most {cfg.drafter.block_size}, the drafter's block"
        )
    most = asked or min(cfg.drafter.block_size if cfg.drafter else 1, SPARE - 1)  # verified with the token before
    return sorted({(most + 1) // 2, most})


# ---- the steps -------------------------------------------------------------------------------------------------------
# Where the sequences are in what a step is given after the cache, and in what it returns before it: see `spread`.
_RESULTS, _SEQUENCES = (SECOND, SECOND, FIRST), (FIRST, FIRST, FIRST, WHOLE, FIRST)
PLACES = {
    "prefill": ([WHOLE] * 7, [WHOLE] * 6),
    "decode": ([_RESULTS, *_SEQUENCES], [*_RESULTS]),
    "speculate": ([(THIRD, *_RESULTS), *_SEQUENCES], [THIRD, *_RESULTS]),
}


def prefill_step(
    w, cache: Cache, slot, fresh, tokens, n, params, targets, mark, *, cfg: ModelConfig, compute: Compute,
    drafter: Drafter | None = None, record: Record | None = None, batch: int | None = None,
):  # fmt: skip
    """Append a chunk of a prompt to the sequence in one slot, and sample the token that follows.

    slot: () int32. fresh: (1,) bool, whether to empty the slot first. tokens: (1, T) int32, of which the first n (1,)
    are real. params: `sampling.Batch` of one. targets: (T,) int32, the tokens that really follow each one, or -1 where
    nobody asks how likely they are. mark: (1,) int32, after how many of these tokens the state is wanted as well; the
    sequence's length must be a multiple of 128 there. batch: sequences on all devices, if each of a mesh holds some of
    them.

    → sampled (1,) int32; logits (1, vocab) of the last real token; `sampling.logprobs` of the targets (T, …), nothing
    where there is none; `snapshot.state` at the mark, if T is a multiple of 128; cache.
    """
    here = None
    if batch is not None and cache.batch < batch:  # only where the slot is does the chunk leave a trace
        slot = slot - place(compute.mesh, DATA) * cache.batch
        here = (slot >= 0) & (slot < cache.batch)
        slot, fresh, n = jnp.clip(slot, 0, cache.batch - 1), fresh & here, jnp.where(here, n, 0)
    one = kv.reset(kv.take(cache, slot[None]), fresh)
    at_mark = AtMark(kv.with_experts(one, None), mark, cfg) if _has_mark(tokens.shape[1]) else None
    s, one, marked = _run(w, one, tokens, n, cfg, compute, drafter, record, at_mark)
    logits = transformer.head(transformer.last(s, n), w.head, cfg, compute)
    sampled, scores = sampling.sample(logits, params, one.length), _scores(w, s, targets, cfg, compute)
    state = {} if marked is None else snapshot.state_within(marked)
    out = sampled, logits, *scores, state
    if here is not None:
        out = jax.tree.map(functools.partial(_from, here, compute=compute), out)
    return *out, kv.put(cache, slot[None], one)


def _from(here: Array, x: Array, compute: Compute) -> Array:
    """x of the devices that are `here`, on all along the data axis."""
    bits = lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x  # not all types can be added
    found = total(jnp.where(here, bits, jnp.zeros_like(bits)), compute.mesh, DATA)
    return lax.bitcast_convert_type(found, x.dtype) if x.dtype.itemsize == 1 else found


def _has_mark(tokens: int) -> bool:
    """Whether prefill of a chunk padded to so many tokens returns the state at a mark."""
    return tokens % ALIGN == 0


def _run(
    w, cache: Cache, tokens, n, cfg: ModelConfig, compute: Compute, drafter: Drafter | None, record: Record | None,
    at_mark: AtMark | None = None,
):  # fmt: skip
    """`transformer.run`, and after it the drafter → streams, cache, and the cache at the mark or None."""
    seen: Any = drafter.tap(cfg) if drafter else no_tap
    with _recorded(record, seen, at_mark or no_tap) as tap:
        s, moved = transformer.run(w, cache, tokens, n, cfg, compute, tap)
    marked = at_mark and at_mark.cache
    if drafter:
        moved = drafter.follow(w, moved, seen, tokens, cache.length, n, cfg, compute)
    if drafter and at_mark:
        marked = drafter.follow(w, at_mark.cache, seen, tokens, cache.length, at_mark.n, cfg, compute)
    return s, moved, marked


@contextlib.contextmanager
def _recorded(record: Record | None, *taps: Tap) -> Iterator[Tap]:
    """One tap for several of a pass, which is recorded if somebody wants to know."""
    recording = None if record is None else Recording(record)
    every = (*taps, recording or no_tap)

    def tap(layer: int, name: str, value: Any) -> None:
        for each in every:
            each(layer, name, value)

    yield tap
    if recording:
        recording.write()


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


def decode_step(
    w, cache: Cache, results, slots, tokens, active, n, params, *, cfg: ModelConfig, compute: Compute,
    drafter: Drafter | None = None, record: Record | None = None,
):  # fmt: skip
    """Append n tokens to the sequence in every active slot: the given token, then each sampled one but the last.

    One call decodes n tokens, so that the cost of starting a call is paid once. It computes as many sequences as it is
    given `slots`. If these are fewer than the cache has, their states are copied out of it and back: without the other
    sequences a token takes less time.

    results: what the previous call returned beside the cache. They are donated: the three have different shapes, so
        each new result takes the buffer of its predecessor.
    slots: (R,) int32, all different; where R = B, they are 0, 1, …. tokens: (R,) int32; a negative one stands for the
    last sampled token of the slot. active: (R,) bool. n: () int32, 1 to BLOCK. params: `sampling.Batch` of R.

    → sampled (BLOCK, B) int32, of which the first n rows are set in the given slots; the last of these (1, B); its
    logits (B, vocab); cache.
    """

    def one(i: Array, carry: tuple) -> tuple:
        part, ids, sampled, _ = carry
        s, part, _ = _run(w, part, ids[:, None], active.astype(jnp.int32), cfg, compute, drafter, record)
        logits = transformer.head(s, w.head, cfg, compute)
        ids = sampling.sample(logits, params, part.length)
        return part, ids, sampled.at[i].set(ids), logits

    sampled, last, logits = results
    some = len(slots) < len(cache.length)
    carry = (kv.take(cache, slots), sampled[:, slots], last[:, slots], logits[slots]) if some else (cache, *results)
    part, of_part, (ids,), of_last = carry
    carry = part, jnp.where(tokens >= 0, tokens, ids), of_part, of_last
    part, ids, of_part, of_last = lax.fori_loop(0, n, one, carry)
    if not some:
        return of_part, ids[None], of_last, part
    sampled, last, logits = sampled.at[:, slots].set(of_part), last.at[:, slots].set(ids), logits.at[slots].set(of_last)
    return sampled, last, logits, kv.put(cache, slots, part)


def decode_args(tokens: Mapping[int, int | None], n: int, params: Sequence[Sampling], size: int) -> tuple[Any, ...]:
    """The arguments of `decode_step` after `results`, to decode n tokens in some slots.

    tokens: by slot; None for the last sampled token of the slot. params: of all slots. size: how many sequences the
    call computes, those of `tokens` at least; others rest.
    """
    resting = [slot for slot in range(len(params)) if slot not in tokens]
    slots = sorted([*tokens, *resting[: size - len(tokens)]])
    ids = [tokens.get(slot, 0) for slot in slots]
    return (
        np.array(slots, np.int32),
        np.array([-1 if token is None else token for token in ids], np.int32),
        np.array([slot in tokens for slot in slots], bool),
        np.int32(n),
        sampling.batch([params[slot] for slot in slots]),
    )


def speculate_step(
    w, cache: Cache, results, slots, tokens, room, rounds, params, *, cfg: ModelConfig, compute: Compute,
    drafter: Drafter, acceptance: Sequence[float] = (), record: Record | None = None,
):  # fmt: skip
    """Some rounds for the sequence in every slot with room: N tokens are drafted, verified at once, and some are kept.

    A round appends 1 to N + 1 tokens: the newest one, which was chosen before, and those drafts that are accepted.

    The token of each position is drawn from the model's logits there exactly as `decode_step` draws it: with the noise
    of that position, under the same temperature and filters. A draft is accepted if it is that token, so the text is
    the one without drafts, token by token, at any temperature and with any seed. What this costs is acceptance: drafts
    are drawn with the same noise, so that they agree as often as two draws by Gumbel-max can that do not know of each
    other's distribution. With p the model's and q the drafter's, and TV their total variation distance, that is at
    least (1 - TV) / (1 + TV) of all, where rejection sampling accepts 1 - TV and draws another text (Daliri, Musco,
    Suresh, arXiv:2408.07978; Leviathan, Kalman, Matias, arXiv:2211.17192).

    results: buffers of what is returned beside the cache, donated: the first two as `CompiledSteps.drafted` says, the
        others as in `decode_step`, of the last call of either.
    slots, tokens, params: as in `decode_step`. room: (R,) int32, how many tokens may be appended to each sequence; 0
        lets it rest. rounds: () int32, at most, 1 to ROUNDS.
    acceptance: for measurements with weights that predict nothing: the probability by slot with which a draft counts as
        accepted if those before it are, whatever the model says of it.

    → the tokens after the appended ones (ROUNDS, 1 + N, B) int32; how many of them each round gave (ROUNDS, B) int32, 0
    in those that were not needed; the last one (1, B); its logits (B, vocab); cache.
    """
    ids, counts, last, logits = results
    T, B, some = ids.shape[1], len(slots), len(slots) < len(cache.length)
    of_each = jax.tree.map(lambda x: jnp.repeat(x, T), params)

    def one(carry: tuple) -> tuple:
        i, cache, room, anchor, ids, kept_in, logits = carry
        following = cache.length[:, None] + jnp.arange(1, T + 1, dtype=jnp.int32)  # positions of what is chosen

        def choose(x: Array, slot: int) -> Array:
            return jnp.maximum(sampling.sample(x, params, following[:, slot]), 0)  # any token, where x is not finite

        drafts = drafter.draft(w, cache, anchor, room > 0, T - 1, choose, cfg, compute)
        run, n, seen = jnp.concatenate([anchor[:, None], drafts], axis=1), jnp.minimum(room, T), drafter.tap(cfg)
        with _recorded(record, seen) as tap:
            every, pending = verify.verify(w, cache, run, n, cfg, compute, tap)
        said = sampling.sample(every.reshape(B * T, -1), of_each, following.reshape(-1)).reshape(B, T)
        if acceptance:
            right = _forced(params, following[:, 1:], acceptance)
        else:
            right = said[:, :-1] == drafts
        right &= jnp.arange(1, T, dtype=jnp.int32) < n[:, None]
        accepted = jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
        kept = jnp.where(room > 0, 1 + accepted, 0)
        moved = verify.commit(pending, kept)
        moved = drafter.follow(w, moved, seen, run, cache.length, kept, cfg, compute)

        newest = jnp.maximum(kept - 1, 0)[:, None]
        chosen = jnp.take_along_axis(said, newest, axis=1)[:, 0]
        anchor = jnp.where(kept > 0, chosen, anchor)
        logits = jnp.where(kept[:, None] > 0, jnp.take_along_axis(every, newest[..., None], axis=1)[:, 0], logits)
        room = jnp.where(anchor >= 0, room - kept, 0)  # nothing follows logits that are not finite
        return i + 1, moved, room, anchor, ids.at[i].set(said.T), kept_in.at[i].set(kept), logits

    def goes_on(carry: tuple) -> Array:
        return (carry[0] < rounds) & (carry[2] > 0).any()

    part = (
        (kv.take(cache, slots), ids[..., slots], last[0, slots], logits[slots])
        if some
        else (cache, ids, last[0], logits)
    )
    of_cache, of_ids, before, of_logits = part
    start = jnp.int32(0), of_cache, room, jnp.where(tokens >= 0, tokens, before), of_ids
    start = *start, jnp.zeros((ROUNDS, B), jnp.int32), of_logits
    _, of_cache, _, anchor, of_ids, kept_in, of_logits = lax.while_loop(goes_on, one, start)
    if not some:
        return of_ids, kept_in, anchor[None], of_logits, of_cache
    ids, counts = ids.at[..., slots].set(of_ids), jnp.zeros_like(counts).at[:, slots].set(kept_in)
    last, logits = last.at[:, slots].set(anchor), logits.at[slots].set(of_logits)
    return ids, counts, last, logits, kv.put(cache, slots, of_cache)


def _forced(params: sampling.Batch, position: Array, acceptance: Sequence[float]) -> Array:
    """Which drafts (B, N) count as accepted: drawn with the sequence's seed, for their positions."""

    def draw(seed: Array, positions: Array) -> Array:
        keys = jax.vmap(lambda p: jax.random.fold_in(jax.random.key(seed), p))(positions)
        return jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)

    return jax.vmap(draw)(jnp.asarray(params.seed), position) < jnp.array(acceptance, jnp.float32)[: position.shape[1]]


def speculate_args(
    tokens: Mapping[int, int | None], room: Mapping[int, int], rounds: int, params: Sequence[Sampling], size: int
) -> tuple[Any, ...]:
    """The arguments of `speculate_step` after `results`: those of `decode_args`, with the room by slot."""
    slots, ids, _, n, batch = decode_args(tokens, rounds, params, size)
    return slots, ids, np.array([room.get(slot, 0) for slot in slots.tolist()], np.int32), n, batch


def compiler_options(
    step: str, kernels: Kernels, backend: str | None = None, nested: bool = False
) -> dict[str, Any] | None:
    """XLA's options for a step, "prefill", "decode" or "speculate", on a backend, by default JAX's own.

    nested: whether its pass has loops, or calls the host.

    On a GPU a decoding step is recorded as a graph, in which independent kernels may run side by side: 4 % of the time
    on an H200. With Pallas kernels the graph includes the loop over tokens, which XLA would otherwise leave to the
    host: 0.18 ms a token (7 layers). Without them, or with experts in host memory, the loop contains loops, and a graph
    of these is untried. Prefill is not recorded, which makes it 6 % faster (7 layers, 2048 tokens).

    On a CPU most of the time to the first token is LLVM's. Its optimization level 1 compiles in two thirds of the time
    to code as fast.
    """
    backend = backend or jax.default_backend()
    if backend == "gpu" and step == "prefill":
        return {"xla_gpu_enable_command_buffer": ""}
    if backend == "gpu":
        options = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
        if kernels.all_pallas and not nested:  # XLA's default list, and WHILE
            recorded = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,WHILE"
            options["xla_gpu_enable_command_buffer"] = recorded
        return options
    given = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": 1} if backend == "cpu" and not given else None
