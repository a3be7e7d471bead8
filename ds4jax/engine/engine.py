"""The engine: any number of requests at once, each a stream of events. No HTTP and no text here: tokens in and out.

    engine = Engine.open(Settings.load("tiny"), max_seqs=4)
    async for event in engine.generate(Request(tokens, max_tokens=100)):
        ...
    await engine.close()

One thread owns the model. It takes requests from an inbox, asks the scheduler what to compute, and hands the streams
their tokens; streams are read in event loops. JAX is imported by `Engine.open` only, after the environment is set.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from ds4jax.engine.constraints import Constraints, edits
from ds4jax.engine.keys import key_of
from ds4jax.engine.kv_store import KVStore
from ds4jax.engine.prefix_cache import PrefixCache, Snapshot, positions
from ds4jax.engine.scheduler import ALIGN, Job, Scheduler
from ds4jax.errors import Ds4Error

if TYPE_CHECKING:
    from ds4jax.engine.grammar import Grammar, Vocabulary
    from ds4jax.engine.model_runner import ModelRunner, Sampled
    from ds4jax.engine.sampling import Sampling
    from ds4jax.engine.snapshot import Planes
    from ds4jax.settings import Settings

MAX_NOTES = 100_000  # in memory
LATE = 64  # tokens that an answer may have gone on for when its reader's decision to end it arrives
TTFT_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the time-to-first-token histogram, in seconds."""

log = logging.getLogger(__name__)


# ---- errors that a stream may raise ----------------------------------------------------------------------------------
class ContextOverflow(Ds4Error):
    """The prompt leaves no room for an answer. prompt: its tokens; ctx: what a sequence can hold."""

    def __init__(self, prompt: int, ctx: int):
        super().__init__(f"prompt: found {prompt} tokens, expected at most {ctx - 1} (ctx is {ctx})")
        self.prompt, self.ctx = prompt, ctx


class Overloaded(Ds4Error):
    """Too many requests wait already."""


class Stopping(Ds4Error):
    """The engine is being closed."""


class EngineFailed(Ds4Error):
    """The model cannot run any more; only a restart helps."""


# ---- requests and events ---------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt, BOS included, and how to continue it.

    max_tokens: as far as there is room in the context. stop_ids: tokens that end the answer; None: the model's EOS.
    logprobs: None, or how many of the likeliest tokens to report beside each token's own. grammar: of `Engine.grammar`.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None


@dataclasses.dataclass(frozen=True)
class Started:
    """The request has a slot; `cached_tokens` of its prompt need not be computed."""

    cached_tokens: int
    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """`done` of the prompt's `total` tokens are computed."""

    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of the answer. logprob, top (id, logprob): as the request asks, of the model's own distribution."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """The answer is complete. stop: its last token is one of `stop_ids`; length: max_tokens or the context ended it."""

    reason: Literal["stop", "length"]


Event = Started | Prefilled | Token | Finished


class Stream:
    """The events of one request, an asynchronous iterator for one reader. Raises Ds4Error where the request failed."""

    def __init__(self, cancel: Callable[[Stream], None]):
        self._on_cancel = cancel
        self._events: collections.deque[Event | Ds4Error | None] = collections.deque()  # None: the end
        self._waiter: asyncio.Future | None = None
        self._lock = threading.Lock()
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._over:
            with self._lock:
                if self._events:
                    event = self._events.popleft()
                    self._over = not isinstance(event, Event)
                    if isinstance(event, Ds4Error):
                        raise event
                    if event is None:
                        break
                    return event
                self._waiter = waiter = asyncio.get_running_loop().create_future()
            await waiter
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End the request, unless it is over: within one step nothing of it runs. Thread-safe; no event follows."""
        if self._over:
            return
        self._over = True
        self._on_cancel(self)
        self._push(None)

    async def aclose(self) -> None:
        """`cancel`."""
        self.cancel()

    def _push(self, *events: Event | Ds4Error | None) -> None:
        with self._lock:
            self._events += events
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            try:
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)
            except RuntimeError:  # the reader's loop is closed
                self._on_cancel(self)


def _wake(waiter: asyncio.Future) -> None:
    if not waiter.done():
        waiter.set_result(None)


@dataclasses.dataclass(eq=False, kw_only=True)
class _Running(Job):
    """A request on its way: limit is the number of tokens, prompt and answer, at which it ends."""

    request: Request
    stream: Stream
    stop_ids: frozenset[int]
    limit: int
    constraints: Constraints | None  # None: no more than the model's own tokens are needed
    reading: Future[Snapshot | None] | None = None  # from disk
    base: Snapshot | None = None  # where it starts
    latest: Snapshot | None = None  # the last one that was taken of it
    # At the last multiples of 128 in its answer, what is needed to take one.
    tails: collections.deque[tuple[int, Planes]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=2)
    )
    state: Planes | None = None  # at `later`
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    cached: int = 0
    started: float | None = None
    first_token: float | None = None


@dataclasses.dataclass
class _Due:
    """A snapshot of the first `end` tokens of a job that is still to be taken.

    pieces: of `ModelRunner.take`; the first comes before anything else happens in the slot. complete: of a whole
    prompt, the token sampled after it.
    """

    job: _Running
    end: int
    pieces: Iterator[Planes | None]
    complete: Sampled | None
    begun: bool = False


class Engine:
    """A model that answers requests.

    Attributes: settings, tokenizer, model_name, ctx (tokens of prompt and answer together), chat_template (the
    file's, or None).
    """

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        synthetic: str | None = None,
        max_seqs: int | None = None,
        kv_dir: str | Path | None = None,
        kv_budget_bytes: int = 16 << 30,
        prefix_budget_bytes: int = 2 << 30,
        trace: str | Path | None = None,
        progress: bool = False,
    ) -> Self:
        """Load the model of `settings`, or a synthetic one (see `model_runner.open_model`), and compile its steps.

        max_seqs: sequences at once, by default the settings' batch. kv_dir: a folder for prefixes and notes, for this
        engine alone, of at most kv_budget_bytes. prefix_budget_bytes: of memory, for prefixes. trace: a file to which a
        JSON line is appended for every request that ends. progress: report loading and compilation on stderr.
        Raises Ds4Error for what cannot be loaded or does not fit into memory.
        """
        settings.set_environment()
        from ds4jax.engine import compile_cache, model_runner
        from ds4jax.engine.fingerprint import fingerprint

        compile_cache.keep_compilations()
        model = model_runner.open_model(settings, synthetic)
        loaded = model_runner.ModelRunner(model, settings, max_seqs, progress, _sizes(settings))
        loaded.compile()
        store = KVStore(kv_dir, kv_budget_bytes, fingerprint(loaded)) if kv_dir else None
        name = f"synthetic-{synthetic}" if synthetic else Path(settings.model).stem
        return cls(loaded, PrefixCache(prefix_budget_bytes, store), name=name, trace=trace)

    def __init__(
        self,
        runner: ModelRunner,
        prefixes: PrefixCache | None = None,
        *,
        name: str = "model",
        trace: str | Path | None = None,
        max_waiting: int = 1024,
    ):
        """An engine of a runner, which from now on is its own, as are the prefixes (None: a few, in memory).

        name: of the model, for clients. max_waiting: requests without a slot, at most.
        """
        self.settings, self.tokenizer = runner.settings, runner.tokenizer
        self.ctx, self.chat_template = runner.settings.ctx, runner.tokenizer.chat_template
        self.model_name = name
        self._runner, self._max_waiting = runner, max_waiting
        self._prefixes = PrefixCache(2 << 30) if prefixes is None else prefixes
        self._sizes = _sizes(runner.settings)
        self._scheduler = Scheduler(runner.batch, self._sizes[-1])
        self._trace = _open_trace(trace) if trace else None
        self._inbox: list[tuple[str, Any]] = []
        self._changed = threading.Condition()  # guards the inbox and the two below
        self._refusal: Ds4Error | None = None  # why no request is accepted any more
        self._deadline: float | None = None  # when the engine stops
        self._jobs: dict[Stream, _Running] = {}
        self._due: collections.deque[_Due] = collections.deque()  # before prompts, and before anyone gets a slot
        self._followed: set[_Running] = set()  # jobs whose last token is what the last block ended with
        self._counts: dict[str, float] = collections.defaultdict(int)
        self._ttft = [0] * (len(TTFT_BOUNDS) + 1)
        self._notes: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()  # guards the two above
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- for callers, from any thread --------------------------------------------------------------------------------
    def submit(self, request: Request) -> Stream:
        """Start a request; what is wrong with it is raised by the stream."""
        stream = Stream(lambda stream: self._post("cancel", stream))
        with self._changed:
            error = self._refusal or self._problem(request)
            if error is None:
                self._inbox.append(("submit", (request, stream)))
                self._changed.notify()
        if error is not None:
            stream._push(error)
        return stream

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """The events of a request, which is cancelled if this iterator is closed early."""
        stream = self.submit(request)
        try:
            async for event in stream:
                yield event
        finally:
            stream.cancel()

    async def close(self, grace: float = 0.0, save: bool = True) -> None:
        """Stop: requests that do not end within `grace` seconds raise Stopping, as do new ones from now on.

        save: write all prefixes to disk, if there is a folder for them, those of interrupted requests included.
        """
        with self._changed:
            self._refusal = self._refusal or Stopping("the server is stopping")
            self._deadline = time.perf_counter() + grace
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._prefixes.close, save)
        if self._trace:
            self._trace.close()

    def metrics(self) -> dict[str, Any]:
        """Counters since the start, and the present state. `ttft_counts`: per bound of TTFT_BOUNDS, and above."""
        stats, counts, store = self._runner.stats, self._counts, self._prefixes.store
        return {
            "waiting": len(self._scheduler.waiting),
            "prefilling": len(self._scheduler.prefilling),
            "decoding": len(self._scheduler.decoding),
            "slots": self._runner.batch,
            **{key: counts[key] for key in ("requests", "finished", "cancelled", "failed")},
            **{key: counts[key] for key in ("prompt_tokens", "cached_tokens", "generated_tokens")},
            **{key: counts[key] for key in ("ttft_seconds", "ttft_count")},
            "ttft_counts": list(self._ttft),
            "prefill_tokens": stats.prefill_tokens,
            "prefill_seconds": stats.prefill_seconds,
            "decode_tokens": stats.decode_tokens,
            "decode_seconds": stats.decode_seconds,
            "compile_seconds": stats.compile_seconds,
            "weights_bytes": self._runner.plan.weights,
            "cache_bytes": self._runner.plan.cache,
            "prefix_bytes": self._prefixes.nbytes,
            "prefix_count": len(self._prefixes),
            "disk_bytes": 0 if store is None else store.nbytes,
            "disk_count": 0 if store is None else len(store),
        }

    def grammar(self, schema: Mapping[str, Any] | Literal["json_object"], after: int | None = None) -> Grammar:
        """What an answer must be: JSON of a schema, or any JSON object. Raises GrammarError (a Ds4Error).

        after: the answer is free up to this token, such as the end of the model's thoughts.
        """
        from ds4jax.engine import grammar

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = grammar.Vocabulary(self.tokenizer)
        return grammar.Grammar(self._vocabulary, schema, after)

    def put_note(self, key: str, value: Any) -> None:
        """Keep a small JSON value under `key`: in the folder for prefixes, or in memory, where the oldest make room."""
        if (store := self._prefixes.store) is not None:
            store.put_note(key, value)
            return
        with self._lock:
            self._notes[key] = value
            self._notes.move_to_end(key)
            while len(self._notes) > MAX_NOTES:
                self._notes.popitem(last=False)

    def note(self, key: str) -> Any:
        """The value kept under `key`, or None."""
        store = self._prefixes.store
        return self._notes.get(key) if store is None else store.note(key)

    def _problem(self, request: Request) -> Ds4Error | None:
        from ds4jax.engine.model_runner import check_prompt
        from ds4jax.engine.sampling import MAX_LOGPROBS

        if len(request.tokens) >= self.ctx:
            return ContextOverflow(len(request.tokens), self.ctx)
        if request.max_tokens < 1:
            return Ds4Error(f"max_tokens: found {request.max_tokens}, expected at least 1")
        if len(self._scheduler.waiting) + len(self._inbox) >= self._max_waiting:
            return Overloaded(f"{self._max_waiting} requests are waiting already")
        if (n := request.logprobs) is not None and not 0 <= n <= MAX_LOGPROBS:
            return Ds4Error(f"logprobs: found {n}, expected 0 to {MAX_LOGPROBS}")
        for i, _ in request.sampling.logit_bias:
            if not 0 <= i < self._runner.cfg.vocab_size:
                return Ds4Error(f"logit_bias: found token id {i}, expected 0 to {self._runner.cfg.vocab_size - 1}")
        try:
            check_prompt(request.tokens, self._runner.cfg, self.ctx)
        except Ds4Error as error:
            return error
        return None

    def _post(self, what: str, value: Any) -> None:
        with self._changed:
            self._inbox.append((what, value))
            self._changed.notify()

    # ---- the engine's thread -----------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            worked = False
            while self._take_inbox(worked):
                worked = self._step()
            error: Ds4Error = Stopping("the server is stopping")
            for job in list(self._jobs.values()):
                self._end(job, "stopped")
                job.stream._push(error)
            while self._take_due():
                pass
        except Exception as e:
            log.exception("the engine failed")
            error = EngineFailed(f"the model cannot run any more: {e}")
        with self._changed:
            self._refusal = error
            rest, self._inbox = self._inbox, []
        streams = [*self._jobs, *(value[1] for what, value in rest if what == "submit")]
        for stream in streams:
            stream._push(error)

    def _take_inbox(self, busy: bool) -> bool:
        """Take in what has arrived, having waited for something unless busy; → whether to go on."""
        with self._changed:
            while not self._inbox and not busy and not self._over():
                self._changed.wait(self._deadline and max(0, self._deadline - time.perf_counter()))
            inbox, self._inbox = self._inbox, []
        for what, value in inbox:
            getattr(self, f"_{what}")(value)
        return not self._over()

    def _over(self) -> bool:
        return self._deadline is not None and (not len(self._scheduler) or time.perf_counter() >= self._deadline)

    def _submit(self, value: tuple[Request, Stream]) -> None:
        request, stream = value
        tokens = [int(t) for t in request.tokens]
        stop_ids = frozenset([self.tokenizer.eos_id]) if request.stop_ids is None else request.stop_ids
        limit = min(self.ctx, len(tokens) + request.max_tokens)
        constraints = _constraints(request, tokens, stop_ids)
        job = _Running(
            tokens, len(tokens), request=request, stream=stream, stop_ids=stop_ids, limit=limit, constraints=constraints
        )
        job.marks = positions(job.prompt, self._scheduler.chunk, self._prefixes.shared(job.key))
        found = self._prefixes.find(job.key)
        job.reading = self._prefixes.fetch(job.key, found.length if found else 0)
        if job.reading:
            job.reading.add_done_callback(lambda _: self._post("wake", None))
        self._jobs[stream] = job
        self._counts["requests"] += 1
        self._scheduler.add(job)

    def _wake(self, _: None) -> None:
        """The loop goes on."""

    def _cancel(self, stream: Stream) -> None:
        if job := self._jobs.get(stream):
            self._end(job, "cancelled")

    def _end(self, job: _Running, reason: str) -> None:
        due = any(due.job is job for due in self._due)
        if not due and job.slot is not None and job.cached < job.done < job.prompt and job.done % ALIGN == 0:
            job.tails.append((job.done, {}))  # an interrupted prompt
        if len(job.tails) == 2 and not (reason == "cancelled" and job.done - job.tails[-1][0] < LATE):
            job.tails.popleft()
        for tail in job.tails:
            self._remember(job, *tail)
        if job.latest and not due and not job.tails:  # else what is due is saved when it is taken
            self._prefixes.save(job.latest)
        del self._jobs[job.stream]
        self._scheduler.remove(job)
        self._counts["finished" if reason in ("stop", "length") else reason] += 1
        if self._trace:
            now = time.perf_counter()
            record = {
                "time": round(time.time(), 3),
                "reason": reason,
                "prompt_tokens": job.prompt,
                "cached_tokens": job.cached,
                "generated_tokens": len(job.tokens) - job.prompt,
                "queued_seconds": round((job.started or now) - job.submitted, 6),
                "first_token_seconds": job.first_token and round(job.first_token - job.submitted, 6),
                "seconds": round(now - job.submitted, 6),
            }
            self._trace.write(json.dumps(record) + "\n")
            self._trace.flush()

    def _step(self) -> bool:
        """A chunk of one prompt and a token of every answer; without a chunk, a few. → whether there was any work.

        A piece of a snapshot takes the place of the chunk, so that answers do not wait for both.
        """
        due = self._take_due()
        admitted = [] if self._due else self._scheduler.admit(self._start)
        for job in admitted:
            self._started(job)
        if chunk := None if due else self._scheduler.next_chunk():
            self._prefill(*chunk)
        resting = {due.job for due in self._due if not due.begun}
        if decoding := [job for job in self._scheduler.decoding if job not in resting]:
            self._decode(decoding, 1 if due or chunk else self._block(decoding))
        return bool(admitted or due or chunk or decoding)

    def _start(self, job: _Running) -> int | None:
        """Where a waiting request can start now, or None if it had better wait."""
        if job.reading:
            if not job.reading.done():
                return None
            if snapshot := job.reading.result():
                self._prefixes.put(snapshot)
            job.base, job.reading = snapshot, None
        if job.leader and self._scheduler.should_wait(job, 0):
            return None
        found = self._prefixes.find(job.key)
        if found and (job.base is None or found.length > job.base.length):
            job.base = found
        have = job.base.length if job.base else 0
        return None if self._scheduler.should_wait(job, have) else have

    def _started(self, job: _Running) -> None:
        job.started, job.cached = time.perf_counter(), job.done
        self._counts["prompt_tokens"] += job.prompt
        self._counts["cached_tokens"] += job.cached
        job.stream._push(Started(job.cached, job.prompt))
        if job.base:
            self._runner.put(job.slot, job.base.planes, job.request.sampling)
            if job.base.logits is not None:
                self._first_token(job, self._choose(job.base.logits[None], {0: job})[0])

    def _prefill(self, job: _Running, end: int) -> None:
        tokens = job.tokens[job.done : end]
        step = self._runner.prefill(job.slot, tokens, job.request.sampling, job.done > 0, self._sizes)
        self._scheduler.advance(job, end)
        job.stream._push(Prefilled(end, job.prompt))
        complete = end == job.prompt
        if not complete and end in job.marks and self._scheduler.ends_next(job):
            job.later, job.state = end, self._runner.state(job.slot)  # the whole prompt has nearly the same rows
        elif end in job.marks or complete and end >= ALIGN:
            self._remember(job, end, complete=step if complete else None)
        if complete:
            special = {0: job} if job.constraints else {}
            self._first_token(job, self._choose(step.batch_logits, special).get(0, Token(step.token)))

    def _block(self, jobs: list[_Running]) -> int:
        """How many tokens at once: the device need not wait for the host in between, but streams and arrivals wait."""
        if any(job.constraints for job in jobs):
            return 1
        longest = max(job.limit - len(job.tokens) for job in jobs)
        room = min(min(ALIGN - job.done % ALIGN, self.ctx - job.done) for job in jobs)  # snapshots are taken in between
        return self._runner.block(min(longest, room))

    def _decode(self, jobs: list[_Running], n: int) -> None:
        last = {job.slot: None if job in self._followed else job.tokens[-1] for job in jobs}
        block = self._runner.decode_block(last, n)
        tokens = {slot: [Token(i) for i in ids] for slot, ids in block.tokens().items()}
        special = self._choose(block.batch_logits, {job.slot: job for job in jobs if job.constraints}, after=1)
        tokens |= {slot: [token] for slot, token in special.items()}
        self._followed = {job for job in jobs if job.slot not in special}
        for job in jobs:
            for token in tokens[job.slot]:
                self._scheduler.advance(job, job.done + 1)
                if job.done % ALIGN == 0:
                    job.tails.append((job.done, self._runner.state(job.slot)))
                if self._emit(job, token):
                    break  # what the block has beyond the end is dropped

    def _remember(self, job: _Running, end: int, state: Planes | None = None, complete: Sampled | None = None) -> None:
        """A snapshot of the first `end` tokens of a job is due: as its slot is now, or was when `state` was taken."""
        self._due.append(_Due(job, end, self._runner.take(job.slot, end, state), complete))

    def _take_due(self) -> bool:
        """A piece of the first snapshot that is due. → whether there was one."""
        if not self._due:
            return False
        due = self._due[0]
        planes, due.begun = next(due.pieces), True
        if planes is None:
            return True
        self._due.popleft()
        job = due.job
        kept = {} if due.complete and due.end not in job.marks else {due.end: planes}
        if due.complete:
            self._prefixes.put(Snapshot(key_of(job.tokens[: due.end]), planes, due.complete.logits))
            if job.later:
                kept[job.later], job.state = self._runner.earlier(planes, job.later, job.state), None
        for end, planes in sorted(kept.items()):
            job.latest = Snapshot(key_of(job.tokens[:end]), planes)
            self._prefixes.put(job.latest)
        if job.latest and job.stream not in self._jobs:
            self._prefixes.save(job.latest)
        return True

    def _choose(self, logits: Any, jobs: dict[int, _Running], after: int = 0) -> dict[int, Token]:
        """The next tokens of some jobs, by their row of logits (B, vocab), as their constraints want them.

        after: tokens that the jobs' slots hold beyond `done`.
        """
        if not jobs:
            return {}
        rows = [jobs.get(i) for i in range(len(logits))]
        one = next(iter(jobs.values())).request.sampling
        params = [job.request.sampling if job else one for job in rows]
        changes = edits([job.constraints if job else None for job in rows], logits.shape[1])
        position = [job.done + after if job else 0 for job in rows]
        chosen = self._runner.choose(logits, params, changes, position)
        ids, logprobs, top_ids, top = (x.tolist() for x in chosen)
        tokens = {}
        for i, job in jobs.items():
            n = job.request.logprobs
            best = () if n is None else tuple(zip(top_ids[i][:n], top[i][:n], strict=True))
            tokens[i] = Token(ids[i], None if n is None else logprobs[i], best)
        return tokens

    def _first_token(self, job: _Running, token: Token) -> None:
        job.first_token = time.perf_counter()
        seconds = job.first_token - job.submitted
        self._ttft[sum(seconds > bound for bound in TTFT_BOUNDS)] += 1
        self._counts["ttft_seconds"] += seconds
        self._counts["ttft_count"] += 1
        self._emit(job, token)

    def _emit(self, job: _Running, token: Token) -> bool:
        """→ whether it was the last one."""
        if job.constraints:
            job.constraints.push(token.id)
            if job.constraints.error:
                self._end(job, "failed")
                job.stream._push(Ds4Error(f"json_schema: {job.constraints.error}"))
                return True
        job.tokens.append(token.id)
        self._counts["generated_tokens"] += 1
        job.stream._push(token)
        reason = "stop" if token.id in job.stop_ids else "length" if len(job.tokens) >= job.limit else None
        if reason:
            self._end(job, reason)
            job.stream._push(Finished(reason), None)
        return bool(reason)


def _sizes(settings: Settings) -> list[int]:
    """What the chunks of a prompt are padded to, the largest chunk last: few sizes, as each takes a while to compile.

    Chunks end at multiples of the largest. If that is 128, a prompt is therefore computed in the same pieces wherever
    it starts, and what is reused is what a cold run computes, bit for bit. In larger ones, which a GPU needs for speed,
    a token's sums may be added up in another order.
    """
    chunk = settings.prefill_chunk
    chunk = chunk // ALIGN * ALIGN or 1 << chunk.bit_length() - 1
    smaller = (32,) if chunk <= ALIGN else (ALIGN, 4 * ALIGN, 16 * ALIGN, 64 * ALIGN)
    return [*(size for size in smaller if size < chunk), chunk]


def _open_trace(path: str | Path) -> TextIO:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise Ds4Error(f"trace: {path} cannot be written: {error.strerror}") from None


def _constraints(request: Request, prompt: list[int], stop_ids: frozenset[int]) -> Constraints | None:
    s = request.sampling
    plain = s.presence_penalty == s.frequency_penalty == 0 and s.repetition_penalty == 1
    if plain and not s.logit_bias and not s.min_tokens and request.logprobs is None and not request.grammar:
        return None
    if request.grammar:
        from ds4jax.engine.grammar import Matcher

        return Constraints(s, prompt, stop_ids, Matcher(request.grammar))
    return Constraints(s, prompt, stop_ids, None)
