"""The engine for callers in other threads: each request is a stream of events, read in an event loop. No text here.

    engine = AsyncEngine.open(Settings.load("tiny"), max_seqs=4)
    async for event in engine.generate(Request(tokens, max_tokens=100, sampling=Sampling())):
        ...
    await engine.close()

One thread owns the model: it carries out commands and steps the `Engine`. JAX is imported by `AsyncEngine.open` only,
after the environment is set.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ds4jax import heap
from ds4jax.engine.commands import Cancel, Command, Stop, Submit, Wake
from ds4jax.engine.form import Begin, Form
from ds4jax.engine.sequence import Sequence
from ds4jax.engine.stream import Stream
from ds4jax.engine.types import EngineFailed, Event, Failed, Overloaded, Request, StepFailed, Stopping, TooMany
from ds4jax.errors import Ds4Error

if TYPE_CHECKING:
    from ds4jax.engine.engine import Engine
    from ds4jax.engine.grammar import Grammar
    from ds4jax.engine.grammar_compiler import GrammarCompiler
    from ds4jax.engine.hosts import Leader
    from ds4jax.engine.kv_store import KVStore
    from ds4jax.engine.model_runner import ModelRunner
    from ds4jax.engine.prefix_cache import PrefixCache
    from ds4jax.io.checkpoint import Checkpoint
    from ds4jax.io.synthetic import Synthetic
    from ds4jax.settings import Settings

log = logging.getLogger(__name__)

MAX_FAILURES = 5  # steps in a row that fail before the engine gives up
STALLED = 60.0
"""A step hangs if it takes more seconds than this, and ten times longer than any before."""
STALLED_COMPILING = 1800.0
"""A step that is being compiled hangs if it takes more seconds than this."""
TELLING = 0.5
"""Seconds in which readers hear that the process is about to end."""
CLOSING = 60.0
"""Seconds after the grace in which the last step must end."""


class AsyncEngine:
    """An engine in a thread of its own.

    Attributes: tokenizer, ctx (tokens of prompt and answer together), model_name, profile, kv_store (or None), device
    (what the model runs on).
    """

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        synthetic: str | None = None,
        recipe: str = "q2",
        max_seqs: int | None = None,
        kv_dir: str | Path | None = None,
        kv_budget_bytes: int = 16 << 30,
        prefix_budget_bytes: int = 2 << 30,
        trace: str | Path | None = None,
        trace_routing: str | Path | None = None,
        progress: bool = False,
        model: Checkpoint | Synthetic | None = None,
        hosts: Leader | None = None,
        **limits: Any,
    ) -> Self:
        """Load the model of `settings`, or a synthetic one in the types of a recipe, and compile its steps.

        max_seqs: sequences at once, by default the settings' batch. kv_dir: a folder for prefixes, for this engine
        alone, of at most kv_budget_bytes. prefix_budget_bytes: of memory, for prefixes. trace: a file to which a JSON
        line is appended for every request that ends. trace_routing: a file for the experts of every token. progress:
        report loading and compilation on stderr. model: where it is open already. hosts: other processes that
        have some of its devices. limits: of requests, see `AsyncEngine`.
        Raises Ds4Error for what cannot be loaded or does not fit into memory.
        """
        settings.set_environment()
        from ds4jax.engine import model_runner
        from ds4jax.engine.fingerprint import of_runner, open_store
        from ds4jax.engine.prefix_cache import PrefixCache
        from ds4jax.engine.routing_trace import Writer

        model = model or model_runner.open_model(settings, synthetic, recipe)
        record = Writer(trace_routing, model.cfg) if trace_routing else None
        meet = hosts.meet if hosts else lambda facts: None
        runner = model_runner.serving_runner(
            model, settings, max_seqs, progress, record, loaded=lambda runner: meet(of_runner(runner))
        )
        heap.trim()
        store = open_store(kv_dir, kv_budget_bytes, runner) if kv_dir else None
        if hosts:
            meet({})
            runner.tell = hosts.tell
        name = f"synthetic-{synthetic}" if synthetic else Path(settings.model).stem
        cache = PrefixCache(prefix_budget_bytes, store)
        return cls(runner, cache, name=name, trace=trace, hosts=hosts, **limits)

    def __init__(
        self,
        runner: ModelRunner,
        prefix_cache: PrefixCache | None = None,
        *,
        name: str = "model",
        trace: str | Path | None = None,
        max_waiting: int = 1024,
        waiting_per_client: int | None = None,
        running_per_client: int | None = None,
        patience: float = math.inf,
        gap: float = math.inf,
        hosts: Leader | None = None,
    ):
        """Start the thread. The runner and the prefix cache are from now on its own.

        name: of the model, for clients. trace: see `open`. max_waiting: the most requests without a slot, of all
        clients; waiting_per_client, running_per_client: the most of one client without a slot, and with one. patience:
        seconds after which a request without a slot fails. gap: seconds from token to token of an answer that chunks of
        prompts are cut to keep. hosts: other processes, whose runners do the same; a step that fails ends all of them.
        """
        import jax

        from ds4jax.engine.counters import Counters
        from ds4jax.engine.engine import Engine

        self.device = jax.devices()[0].device_kind
        self.tokenizer, self.model_name, self.ctx = runner.tokenizer, name, runner.settings.ctx
        self.profile = runner.profile
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._engine: Engine = Engine(
            runner,
            prefix_cache,
            counters=Counters(trace),
            wake=lambda: self._commands.put(Wake()),
            per_client=running_per_client,
            patience=patience,
            gap=gap,
        )
        self._hosts = hosts
        if hosts:
            hosts.save = self.abandon
        self._max_waiting, self._waiting_per_client = max_waiting, waiting_per_client
        self._refusal: Ds4Error | None = None  # why no request is accepted any more
        self._deadline: float | None = None  # when the thread ends
        self._grammars: GrammarCompiler | None = None
        self._lock = threading.Lock()  # guards the refusal and the grammars
        self._counting = threading.Lock()  # guards the next one
        self._submitted = collections.Counter[str]()  # requests that the thread does not know yet, by client
        self._step_began: float | None = None  # `time.perf_counter` when the present step or command did
        self._longest_step = 0.0  # seconds, without compiling
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- for callers, from any thread --------------------------------------------------------------------------------
    @property
    def failed(self) -> bool:
        """Whether the model cannot run any more. Thread-safe."""
        return isinstance(self._refusal, EngineFailed)

    @property
    def problem(self) -> str:
        """Why nothing is answered at present: the engine has failed, stops or hangs; or "". Thread-safe."""
        return str(self._refusal) if self._refusal else self.hang

    @property
    def hang(self) -> str:
        """That a step takes far longer than it should; or "". Thread-safe."""
        began, compiling = self._step_began, self._engine.runner.steps.compiling
        limit = STALLED_COMPILING if compiling else max(STALLED, 10 * self._longest_step)
        seconds = 0.0 if began is None else time.perf_counter() - began
        return f"no step has ended for {seconds:.0f} s" if seconds > limit else ""

    @property
    def full(self) -> bool:
        """Whether a request would be refused because too many wait. Thread-safe."""
        return len(self._engine.scheduler.waiting) + self._commands.qsize() >= self._max_waiting

    def stack(self) -> str:
        """What the engine's thread is doing."""
        if not self._thread.is_alive():  # another thread may have its number by now
            return "the thread has ended\n"
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "the thread ends\n"

    @property
    def kv_store(self) -> KVStore | None:
        """Where prefixes are kept on disk."""
        cache = self._engine.prefix_cache
        return None if cache is None else cache.store

    def submit(self, request: Request) -> Stream:
        """Start a request; what is wrong with it is raised by the stream."""
        stream = Stream(lambda stream: self._commands.put(Cancel(stream)))
        try:
            self._engine.check(request)
            with self._lock:
                if self._refusal:
                    raise self._refusal
                if self.full:
                    raise Overloaded(f"{self._max_waiting} requests are waiting already")
                most = self._waiting_per_client
                if most is not None and self._waiting(request.client) >= most:
                    raise TooMany(f"{most} requests of this key are waiting already")
                self._count(request.client, 1)
                self._commands.put(Submit(request, stream))
        except Ds4Error as error:
            stream.push(Failed(error))
        return stream

    def _count(self, client: str, more: int) -> None:
        with self._counting:
            self._submitted[client] += more

    def _waiting(self, client: str) -> int:
        """How many requests of a client wait for their first slot, those apart that can have a free one."""
        scheduler = self._engine.scheduler
        waiting = sum(seq.client == client and seq.started_at is None for seq in list(scheduler.waiting))
        return waiting + self._submitted[client] - scheduler.free

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
        with self._lock:
            self._refusal = self._refusal or Stopping("the server is stopping")
        self._commands.put(Stop(time.perf_counter() + grace))
        await asyncio.to_thread(self._thread.join, grace + CLOSING)
        if self._hosts:
            await asyncio.to_thread(self._hosts.stop)
        if self._thread.is_alive():
            return log.error("the engine does not end; what it computed is not saved. It is at\n%s", self.stack())
        if (cache := self._engine.prefix_cache) is not None:
            await asyncio.to_thread(cache.close, save)
        if self._grammars is not None:
            await asyncio.to_thread(self._grammars.close)
        self._engine.counters.close()

    def abandon(self) -> None:
        """The process is about to end while the thread may hang: tell the readers, and write prefixes to disk."""
        error = Stopping("the server is stopping: one of its processes is lost")
        with self._lock:
            self._refusal = error
        for seq in list(self._engine.scheduler):
            seq.emit(Failed(error))
        if (cache := self._engine.prefix_cache) is not None:
            cache.close(save=True)
        time.sleep(TELLING)

    def slots(self) -> list[Sequence | None]:
        """See `Engine.slots`."""
        return self._engine.slots()

    def metrics(self) -> dict[str, Any]:
        """See `Engine.metrics`."""
        return self._engine.metrics()

    def grammar(self, form: Form, begin: Begin) -> Grammar:
        """The grammar of a form. Raises GrammarError (a Ds4Error)."""
        from ds4jax.engine.grammar_compiler import GrammarCompiler

        with self._lock:
            if self._grammars is None:
                self._grammars = GrammarCompiler(self.tokenizer)
        return self._grammars(form, begin)

    # ---- the thread that owns the model ------------------------------------------------------------------------------
    def _run(self) -> None:
        error: Ds4Error = Stopping("the server is stopping")
        try:
            worked, failures = False, 0
            while self._receive(busy=worked):
                began = self._step_began = time.perf_counter()
                compiled = self._engine.runner.steps.seconds
                try:
                    worked, failures = self._engine.step(), 0
                    seconds = time.perf_counter() - began - (self._engine.runner.steps.seconds - compiled)
                    self._longest_step = max(self._longest_step, seconds)
                except Exception as failure:
                    if self._hosts:  # they cannot be made to agree again
                        self._hosts.fail(failure)
                    failures += 1
                    if failures == MAX_FAILURES:
                        raise
                    log.exception("a step failed")
                    text = f"the model failed while it computed this, and goes on: {type(failure).__name__}"
                    self._engine.recover(StepFailed(text))
                    worked = True
                finally:
                    self._step_began = None
            self._engine.stop(error)
        except BaseException as failure:
            log.exception("the engine failed")
            error = EngineFailed(f"the model cannot run any more: {failure}")
        finally:
            with self._lock:
                self._refusal = error
            for seq in self._engine.scheduler:
                seq.emit(Failed(error))
            while not self._commands.empty():
                if isinstance(command := self._commands.get(), Submit):
                    command.stream.push(Failed(error))

    def _receive(self, busy: bool) -> bool:
        """Carry out the commands that are there, having waited for one unless busy; → whether to go on."""
        try:
            if not busy and not self._over():
                left = 1.0 if len(self._engine) else None  # so that nobody waits too long for a slot, or a disk
                if self._deadline is not None:
                    left = max(0.0, min(self._deadline - time.perf_counter(), 1.0))
                self._carry_out(self._commands.get(timeout=left))
            while True:
                self._carry_out(self._commands.get_nowait())
        except queue.Empty:
            return not self._over()

    def _over(self) -> bool:
        return self._deadline is not None and (not len(self._engine) or time.perf_counter() >= self._deadline)

    def _carry_out(self, command: Command) -> None:
        self._step_began = time.perf_counter()
        match command:
            case Submit(request, stream):
                try:
                    stream.sequence = self._engine.add(request, stream.push)
                except Exception as error:
                    stream.push(Failed(error))
                self._count(request.client, -1)
            case Cancel(stream):
                if stream.sequence is not None:
                    self._engine.cancel(stream.sequence)
            case Stop(deadline):
                self._deadline = deadline
            case Wake():
                pass
        self._step_began = None
