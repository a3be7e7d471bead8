"""The engine: one generation loop for any number of sequences that share a model. Tokens in and out, no text.

    engine = Engine(ModelRunner.load(settings))
    engine.add(Request(tokens, max_tokens=100, sampling=Sampling()), emit=print)
    while len(engine):
        engine.step()

All of it happens in the thread that calls `step`. `AsyncEngine` serves callers in other threads.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ds4jax.engine.chunks import serving_sizes
from ds4jax.engine.constraints import constraints_of, edits
from ds4jax.engine.counters import Counters
from ds4jax.engine.model_runner import Block, ModelRunner, Rounds, check_prompt
from ds4jax.engine.pace import Pace
from ds4jax.engine.prefix_cache import PrefixCache
from ds4jax.engine.prefix_reuse import PrefixReuse
from ds4jax.engine.scheduler import Scheduler
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.speculation import Speculation
from ds4jax.engine.types import (
    ALIGN,
    MAX_LOGPROBS,
    ContextOverflow,
    Event,
    Failed,
    Finished,
    FinishReason,
    Overloaded,
    Prefilled,
    Request,
    Scored,
    Started,
    StepFailed,
    Token,
)
from ds4jax.errors import Ds4Error


class Engine:
    """Continues sequences, step by step, as many at once as the model runner has slots.

    Attributes: runner, ctx (tokens of prompt and answer together), scheduler (all sequences that have not ended),
    prefix_cache (or None), speculation (None without a drafter), counters.
    """

    def __init__(
        self,
        runner: ModelRunner,
        prefix_cache: PrefixCache | None = None,
        *,
        sizes: list[int] | None = None,
        counters: Counters | None = None,
        wake: Callable[[], None] = lambda: None,
        per_client: int | None = None,
        patience: float = math.inf,
        gap: float = math.inf,
    ):
        """runner: from now on the engine's own. prefix_cache: without one, every prompt is computed whole.

        sizes: what chunks of prompts are padded to, ascending, the chunk itself last; by default `serving_sizes`.
        wake: called, in another thread, when a step that found no work may find some. per_client: the most slots that
        a client has. patience: seconds after which a request without a slot fails. gap: seconds from token to token of
        an answer, which chunks of prompts are cut to keep, see `pace`.
        """
        self.runner, self.ctx, self.prefix_cache = runner, runner.settings.ctx, prefix_cache
        self.counters = Counters() if counters is None else counters
        self._sizes = serving_sizes(runner.settings) if sizes is None else sizes
        self.scheduler = Scheduler(
            runner.batch, min(self._sizes[-1], runner.settings.prefill_chunk), per_client,
            passes_marks=all(size % ALIGN == 0 for size in self._sizes),
        )  # fmt: skip
        counts = runner.steps.draft_counts
        self.speculation = Speculation(counts) if counts else None
        self._reuse = PrefixReuse(runner, self.scheduler, prefix_cache)
        self._wake, self._patience = wake, patience
        aligned = [size for size in self._sizes if size % ALIGN == 0]  # shorter chunks are not cut
        self._pace = Pace(aligned, gap) if aligned and gap < math.inf else None
        self._on_device: set[Sequence] = set()  # sequences whose last token is the last one of the last block read
        self._ahead: _Decoding | None = None  # a block that was begun before the tokens of the one before it were read

    def __len__(self) -> int:
        """Number of sequences that have not ended."""
        return len(self.scheduler)

    # ---- sequences come and go ---------------------------------------------------------------------------------------
    def check(self, request: Request) -> None:
        """Raises Ds4Error if a request cannot run. Thread-safe."""
        vocab = self.runner.cfg.vocab_size
        if len(request.tokens) >= self.ctx:
            raise ContextOverflow(len(request.tokens), self.ctx)
        if request.max_tokens < 0:
            raise Ds4Error(f"max_tokens: found {request.max_tokens}, expected at least 0")
        for name in ("logprobs", "prompt_logprobs"):
            if (n := getattr(request, name)) is not None and not 0 <= n <= MAX_LOGPROBS:
                raise Ds4Error(f"{name}: found {n}, expected 0 to {MAX_LOGPROBS}")
        for i, _ in request.sampling.logit_bias:
            if not 0 <= i < vocab:
                raise Ds4Error(f"logit_bias: found token id {i}, expected 0 to {vocab - 1}")
        check_prompt(request.tokens, self.runner.cfg, self.ctx)

    def add(self, request: Request, emit: Callable[[Event], None]) -> Sequence:
        """Start a request that `check` accepts. emit: takes its events, during `step`."""
        stop_ids = request.stop_ids
        seq = Sequence(
            request,
            limit=min(self.ctx, len(request.tokens) + request.max_tokens),
            stop_ids=frozenset([self.runner.tokenizer.eos_id]) if stop_ids is None else stop_ids,
            emit=emit,
        )
        seq.constraints = constraints_of(request, seq.tokens, seq.stop_ids)
        self._reuse.arrive(seq, self._wake)
        self.counters.arrived()
        self.scheduler.add(seq)
        return seq

    def cancel(self, seq: Sequence) -> None:
        """End a sequence, unless it has ended. No event follows."""
        if seq in self.scheduler:
            self._end(seq, "cancelled")

    def stop(self, error: Ds4Error) -> None:
        """End all sequences with this error, and finish their snapshots."""
        for seq in list(self.scheduler):
            self._end(seq, "stopped")
            seq.emit(Failed(error))
        while self._reuse.take_piece():
            pass

    def recover(self, error: Ds4Error) -> None:
        """Go on after an exception in a step: sequences with a slot end with this error, the others still wait."""
        self.counters.step_failed()
        self._reuse.forget()
        self._on_device, self._ahead = set(), None
        for seq in [*self.scheduler.prefilling, *self.scheduler.decoding]:
            self.scheduler.remove(seq)
            self.counters.ended(seq, "failed")
            seq.emit(Failed(error))
        self.runner.reset()

    def slots(self) -> list[Sequence | None]:
        """Who has each slot. Thread-safe."""
        by_slot = {seq.slot: seq for seq in self.scheduler}
        return [by_slot.get(slot) for slot in range(self.runner.batch)]

    def metrics(self) -> dict[str, Any]:
        """Counters since the start, and the present state. Thread-safe."""
        stats, plan, cache = self.runner.stats, self.runner.plan, self.prefix_cache
        store = None if cache is None else cache.store
        slots = self.slots()
        held = sum(seq.computed for seq in slots if seq)
        return {
            "waiting": len(self.scheduler.waiting),
            "running": sum(seq is not None for seq in slots),
            "prefilling": len(self.scheduler.prefilling),
            "decoding": len(self.scheduler.decoding),
            "slots": self.runner.batch,
            "cache_use_percent": 100 * held / (self.runner.batch * self.ctx),
            **self.counters.report(),
            **(self.speculation.report() if self.speculation else {}),
            "prefill_tokens": stats.prefill_tokens,
            "prefill_seconds": stats.prefill_seconds,
            "decode_tokens": stats.decode_tokens,
            "decode_seconds": stats.decode_seconds,
            "compile_seconds": stats.compile_seconds,
            "weights_bytes": plan.weights,
            "cache_bytes": plan.cache,
            "prefix_bytes": 0 if cache is None else cache.nbytes,
            "prefixes": 0 if cache is None else len(cache),
            "disk_bytes": 0 if store is None else store.nbytes,
            "disk_prefixes": 0 if store is None else len(store),
        }

    def _fail(self, seq: Sequence, error: Ds4Error, keep: bool = True) -> None:
        self._end(seq, "failed", keep)
        seq.emit(Failed(error))

    def _end(self, seq: Sequence, reason: FinishReason | str, keep: bool = True) -> None:
        """keep: whether what was computed may be of use."""
        if keep:
            self._reuse.end(seq, cancelled=reason == "cancelled")
        else:
            self._reuse.discard(seq)
        self.scheduler.remove(seq)
        self.counters.ended(seq, reason)

    # ---- the loop ----------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """Compute a chunk of one prompt and a token of every answer, or without a chunk a block; → whether any.

        With a drafter, a token may be several, and a block some rounds of drafts: see `Speculation`. A piece of a
        snapshot takes the place of the chunk, so that answers never wait for both. While there is nothing but answers,
        the device has the next block before the tokens of the last one are read.
        """
        self._check_patience()
        finished, quiet = self._ahead, not (self._reuse.busy or self.scheduler.waiting or self.scheduler.prefilling)
        if finished and not quiet:
            self._read(finished)
        if not self._reuse.busy and (victim := self.scheduler.victim(self._reuse.start)):
            self._reuse.suspend(victim)
            self.counters.suspended()
        copied = self._reuse.take_piece()
        admitted = [] if self._reuse.busy else self.scheduler.admit(self._reuse.start)
        for seq in admitted:
            self._start(seq)
        if chunk := None if copied else self._next_chunk():
            self._prefill(*chunk)
        resting = self._reuse.must_rest()
        decoding = [seq for seq in self.scheduler.decoding if seq not in resting]
        if self._ahead or decoding:
            now = self._ahead or self._begin(decoding, alone=not (copied or chunk))
            self._ahead = self._begin_ahead(now) if quiet else None
            self._read(now)
        return bool(finished or admitted or copied or chunk or decoding)

    def _next_chunk(self) -> tuple[Sequence, int] | None:
        if not self._pace or not self.scheduler.decoding:
            return self.scheduler.next_chunk()
        stats, drafting = self.runner.stats, self.speculation and self.speculation.chosen
        step = max(stats.token_seconds, stats.round_seconds if drafting else 0.0)
        return self.scheduler.next_chunk(self._pace.longest(step))

    def _check_patience(self) -> None:
        now = time.perf_counter()
        for seq in [seq for seq in self.scheduler.waiting if not seq.suspended]:
            if (waited := now - seq.submitted_at) > self._patience:
                self._fail(seq, Overloaded(f"found no place within {waited:.0f} s; the server is busy"))

    def _start(self, seq: Sequence) -> None:
        if seq.suspended:
            self.runner.put(seq.held_slot, seq.suspended.planes, seq.request.sampling)
            seq.suspended = None
            self._on_device.discard(seq)
            return
        seq.cached = seq.computed
        self.counters.started(seq)
        seq.emit(Started(seq.cached, seq.prompt_len))
        if seq.base:
            self.runner.put(seq.held_slot, seq.base.planes, seq.request.sampling)
            if seq.base.logits is not None:
                self._first_token(seq, self._tokens({0: seq}, {}, seq.base.logits[None]))

    def _prefill(self, seq: Sequence, end: int) -> None:
        """The chunk of a prompt that ends at position `end`."""
        tokens = seq.tokens[seq.computed : end]
        top = seq.request.prompt_logprobs
        targets = () if top is None else seq.tokens[seq.computed + 1 : end + 1]
        stats, passed = self.runner.stats, self.scheduler.passed_mark(seq, end)
        before = stats.prefill_seconds
        mark = 0 if passed is None else passed - seq.computed
        sampled = self.runner.prefill(
            seq.held_slot, tokens, seq.request.sampling, seq.computed > 0, self._sizes, targets, mark
        )
        if self._pace:
            self._pace.took(len(tokens), stats.prefill_seconds - before)
        self.scheduler.advance(seq, end)
        if sampled.token < 0 or any(not np.isfinite(x).all() for x in sampled.scores[:1]):
            return self._not_finite(seq)
        seq.emit(Prefilled(end, seq.prompt_len))
        if top is not None and targets:
            seq.emit(Scored(tuple(_scored(targets, sampled.scores, top))))
        self._reuse.prefilled(seq, sampled, passed)
        if end == seq.prompt_len:
            self._first_token(seq, self._tokens({0: seq}, {0: sampled.token}, sampled.batch_logits))

    def _room(self, seq: Sequence, begun: int = 0) -> int:
        """How many tokens a call may append to a sequence at most. begun: those that are being decoded already."""
        if seq.request.logits or seq.request.logprobs is not None:
            return 1  # the host sees the logits of the last token of a call only
        end = seq.computed + begun
        room = min(self.ctx - end, seq.constraints.free if seq.constraints else math.inf)
        if self.prefix_cache is not None:  # calls end where a snapshot may be taken
            room = min(room, ALIGN - end % ALIGN)
        return int(room)

    def _block(self, seqs: list[Sequence], begun: int = 0) -> int:
        """How many tokens to decode in one call: the device need not wait for the host in between, but streams and new
        requests wait for the end of the call. begun: tokens of each sequence that are being decoded already."""
        wanted = max(seq.limit - len(seq.tokens) for seq in seqs) - begun
        return self.runner.block(min(wanted, *(self._room(seq, begun) for seq in seqs)))

    def _begin(self, seqs: list[Sequence], alone: bool) -> _Decoding:
        """Let the device go on with these sequences. alone: whether nothing else waits, and it may take longer."""
        by_slot = {seq.held_slot: seq for seq in seqs}
        last = {slot: None if seq in self._on_device else seq.tokens[-1] for slot, seq in by_slot.items()}
        if self.speculation:
            room = {slot: min(self._room(seq), seq.limit - len(seq.tokens)) for slot, seq in by_slot.items()}
            if drafts := self.speculation.choose(len(seqs), sum(n > 1 for n in room.values())):
                # A sequence with room for one token does not wait for several rounds of the others.
                rounds = self.runner.rounds() if alone and min(room.values()) > 1 else 1
                return _Decoding(by_slot, self.runner.speculate(last, room, drafts, rounds), drafts, room)
        n = self._block(seqs) if alone else 1
        return _Decoding(by_slot, self.runner.decode_block(last, n), tokens=n)

    def _begin_ahead(self, now: _Decoding) -> _Decoding | None:
        """Let the device go on with the block after one whose tokens are not known yet, if nothing is to come between.

        For a sequence that turns out to have ended the block is in vain.
        """
        n = now.tokens
        going = (seq for seq in now.by_slot.values() if seq in self.scheduler.decoding)
        seqs = [seq for seq in going if len(seq.tokens) + n < seq.limit]
        ends = [seq.computed + n for seq in seqs]
        if now.drafts or not seqs or any(seq.constraints for seq in seqs) or max(ends) >= self.ctx:
            return None  # the host has to see the tokens first
        if self.prefix_cache is not None and any(end % ALIGN == 0 for end in ends):
            return None  # a snapshot may be taken
        if self.speculation and self.speculation.choose(len(seqs)):
            return None  # how far there is room for drafts depends on the tokens
        n = self._block(seqs, n)
        last = {seq.held_slot: None for seq in seqs}
        return _Decoding({seq.held_slot: seq for seq in seqs}, self.runner.decode_block(last, n), tokens=n)

    def _read(self, begun: _Decoding) -> None:
        """Wait for the tokens of a call, and give them to the sequences that have not ended since it began."""
        if begun is self._ahead:
            self._ahead = None
        ids = begun.block.tokens()
        if self.speculation:
            begun.tell(self.speculation)
        by_slot = {slot: seq for slot, seq in begun.by_slot.items() if seq in self.scheduler.decoding}
        last, held = {slot: ids[slot][-1] for slot in by_slot}, {slot: len(ids[slot]) for slot in by_slot}
        final = self._tokens(by_slot, last, begun.block.batch_logits, held)
        self._on_device = {seq for seq in by_slot.values() if not seq.constraints}
        for slot, seq in by_slot.items():
            seconds = self.counters.pace(seq, held[slot])
            for token in [*(Token(i) for i in ids[slot][:-1]), final[slot]]:
                self.scheduler.advance(seq, seq.computed + 1)
                self._reuse.decoded(seq)
                if self._emit(seq, token, seconds):
                    break  # what the block has beyond the end is dropped

    def _tokens(
        self, seqs: Mapping[int, Sequence], sampled: Mapping[int, int], logits: Any, held: Mapping[int, int] = {}
    ) -> dict[int, Token]:
        """The next token of some sequences, by their row of logits (B, vocab).

        sampled: what was drawn on the device, by row; drawn again where there is none, or under constraints. held:
        tokens that the sequences' slots hold beyond `computed`, by row.
        """
        tokens = {row: Token(id) for row, id in sampled.items() if not seqs[row].constraints}
        if special := {row: seq for row, seq in seqs.items() if row not in tokens}:
            tokens |= self._choose(special, logits, held)
        if with_logits := [row for row, seq in seqs.items() if seq.request.logits]:
            host = np.asarray(logits, np.float32)
            tokens |= {row: dataclasses.replace(tokens[row], logits=host[row]) for row in with_logits}
        return tokens

    def _choose(self, seqs: Mapping[int, Sequence], logits: Any, held: Mapping[int, int]) -> dict[int, Token]:
        """`_tokens` of sequences whose logits are edited."""
        rows = [seqs.get(row) for row in range(len(logits))]
        anyone = next(iter(seqs.values())).request.sampling
        params = [seq.request.sampling if seq else anyone for seq in rows]
        changes = edits([seq.constraints if seq else None for seq in rows], logits.shape[1])
        positions = [seq.computed + held.get(row, 0) if seq else 0 for row, seq in enumerate(rows)]
        chosen = self.runner.choose(logits, params, changes, positions)
        ids = chosen[0].tolist()
        tokens = {}
        for row, seq in seqs.items():
            one, top = slice(row, row + 1), seq.request.logprobs
            tokens[row] = Token(ids[row]) if top is None else _scored(ids[one], [x[one] for x in chosen[1:]], top)[0]
        return tokens

    def _first_token(self, seq: Sequence, tokens: Mapping[int, Token]) -> None:
        self.counters.first_token(seq)
        if seq.request.max_tokens:
            self._emit(seq, tokens[0])
        else:
            self._end(seq, "length")
            seq.emit(Finished("length"))

    def _emit(self, seq: Sequence, token: Token, seconds: float | None = None) -> bool:
        """Append a token to its sequence; → whether that has ended. seconds: since the token before it, if any."""
        if token.id < 0:
            self._not_finite(seq)
            return True
        if seq.constraints:
            seq.constraints.push(token.id)
            if seq.constraints.error:
                self._fail(seq, Ds4Error(f"grammar: {seq.constraints.error}"))
                return True
        seq.tokens.append(token.id)
        self.counters.token(seconds)
        seq.emit(token)
        reason = "stop" if token.id in seq.stop_ids else "length" if len(seq.tokens) >= seq.limit else None
        if reason:
            self._end(seq, reason)
            seq.emit(Finished(reason))
        return bool(reason)

    def _not_finite(self, seq: Sequence) -> None:
        """End a sequence whose logits are no numbers, and what was kept of it."""
        self.counters.not_finite()
        self.runner.clear(seq.held_slot)
        self._fail(seq, StepFailed("the model computed a logit that is not a finite number"), keep=False)


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """A call for some sequences, by slot, that the device has begun: a block of so many tokens, or rounds of drafts.

    room: of each sequence by slot, where drafts are made.
    """

    by_slot: dict[int, Sequence]
    block: Block | Rounds
    drafts: int = 0
    room: Mapping[int, int] = dataclasses.field(default_factory=dict)
    tokens: int = 0

    def tell(self, rule: Speculation) -> None:
        """Let the rule know what the call was worth, once it has been read."""
        if isinstance(self.block, Rounds):
            kept, room = self.block.kept().tolist(), list(self.room.values())
            rule.ran(len(room), self.drafts, kept, room, self.block.seconds)
        else:
            rule.plain(len(self.by_slot), self.tokens, self.block.seconds)


def _scored(ids: list[int], scores: Iterable[np.ndarray], top: int) -> list[Token]:
    """Tokens with what `sampling.logprobs` says of them, `top` of the likeliest beside each."""
    own, best_ids, best = (x.tolist() for x in scores)
    rows = zip(ids, own, best_ids, best, strict=True)
    return [Token(id, logprob, tuple(zip(t[:top], p[:top], strict=True))) for id, logprob, t, p in rows]
