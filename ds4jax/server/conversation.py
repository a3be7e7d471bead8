"""One request from `Ask` to its last event: render, submit, parse, count. All that the APIs share; no HTTP here.

    (conversation,) = await start(engine, ask, replay)     # raises ApiError while a status can still be sent
    async for event in conversation: ...                   # ds4jax.chat.parser's events, and Tick
    conversation.finish, conversation.usage, conversation.message

A conversation that is dropped or cancelled, at whatever point, gives its place in the engine back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ds4jax.chat import calls
from ds4jax.chat import parser as chat_parser
from ds4jax.chat import template as chat
from ds4jax.chat.calls import Calling
from ds4jax.chat.parser import Event, Finish, OutputParser, TextDelta, ToolCallFinished
from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.engine.form import Begin, Either, TooHard
from ds4jax.engine.types import Budget, Failed, Finished, Prefilled, Request, Scored, Started, Token
from ds4jax.engine.types import Event as EngineEvent
from ds4jax.errors import Ds4Error
from ds4jax.io.tokenizer import Special, StreamDecoder, Tokenizer
from ds4jax.server.ask import Ask
from ds4jax.server.errors import ApiError, overflow
from ds4jax.server.replay import Replay

if TYPE_CHECKING:  # llguidance takes a while to import
    from ds4jax.engine.grammar import Grammar

_GRAMMARS = ThreadPoolExecutor(1, "grammar")

BLAME = 2.0
"""Seconds to find out which of the tools makes a grammar impossible."""
ADMISSION = 1.0
"""Seconds to wait for a place in the engine before the first event goes out without the number of cached tokens."""


@dataclasses.dataclass(frozen=True)
class Tick:
    """Comes every so many seconds, whatever else does: a stream that said nothing since the last one should give a sign
    of life. prefilled: tokens of the prompt so far, of total."""

    prefilled: int
    total: int


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens. cached: those of the prompt that were not computed anew. reasoning: those of the completion that thought.

    The token that ends a turn counts as part of the completion.
    """

    prompt: int
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclasses.dataclass
class Logprob:
    """A token of the text.

    token: the bytes it stands for. text: what it adds to the text, nothing if it ends inside a character. logprob: None
    for the first token of a prompt. top: the likeliest ones in its place, with the token itself if any was asked for.
    """

    token: bytes
    text: str
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]


class Conversation:
    """An async iterator over the events of one answer; see the module.

    Attributes: ask; usage; prompt (token ids); logprobs (of the text, so far) and prompt_logprobs (of the prompt that
    the text begins with); sampled (token ids, so far); arrived, started, first, last: when it was submitted, when the
    prompt began to be computed, and when the first and the last token came.
    """

    def __init__(
        self, engine: AsyncEngine, ask: Ask, replay: Replay, request: Request, parser: OutputParser, tick: float
    ):
        self.ask, self.usage = ask, Usage(len(request.tokens))
        self._finish: Finish | None = None
        self._stopped = False  # by one of `ask.stop_ids`, which may come anywhere
        self.logprobs: list[Logprob] = []
        self._pending: list[Logprob] = []  # of tokens read, whose text has not been shown
        self._shown = 0  # characters of the text that are out, up to the first call
        self._spelled = 0  # characters whose log-probabilities are in `logprobs`
        self._taken = 0  # log-probabilities that `new_logprobs` has given
        self.sampled: list[int] = []
        self._told = 0  # token ids that `new_tokens` has given
        self._called = False  # whether a call is finished
        tokenizer = engine.tokenizer
        self._spell = StreamDecoder(tokenizer)
        # Tokens that add nothing to the text: EOS; in a chat the end of a thought, in a raw prompt BOS.
        self._silent = {tokenizer.eos_id}
        self._silent.add(tokenizer.special(Special.THINK_CLOSE) if ask.prompt is None else tokenizer.bos_id)
        self._engine, self._replay, self._parser, self._tick = engine, replay, parser, tick
        self.prompt = request.tokens
        self.prompt_logprobs = [] if request.prompt_logprobs is None else [self._logprob(Token(self.prompt[0]))]
        self._prefilled = 0
        self.arrived = self.started = self.first = self.last = _now()
        self._events: list[Event] = []
        self._stream = engine.submit(request)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as an assistant message in Chat Completions' form; see `ds4jax.chat.parser.message`."""
        return chat_parser.message(self._events)

    @property
    def prompt_text(self) -> str:
        """The prompt as it was given; of token ids, their text without BOS."""
        if isinstance(self.ask.prompt, str):
            return self.ask.prompt
        tokenizer = self._engine.tokenizer
        return tokenizer.decode(id for id in self.prompt if id not in self._silent)

    @property
    def finish(self) -> Finish:
        """The last event, once it is out."""
        assert self._finish is not None
        return self._finish

    def new_logprobs(self) -> list[Logprob]:
        """Those of `logprobs` that have come since the last call."""
        new = self.logprobs[self._taken :]
        self._taken += len(new)
        return new

    def new_tokens(self) -> list[int]:
        """Those of `sampled` that have come since the last call."""
        new = self.sampled[self._told :]
        self._told += len(new)
        return new

    def cancel(self) -> None:
        """Give the place in the engine back. Nothing more comes; may be called at any time, several times."""
        self._stream.cancel()

    async def __aiter__(self) -> AsyncIterator[Event | Tick]:
        next_tick = _now() + self._tick
        try:
            while self._finish is None:
                if (event := await self._receive(next_tick)) is None:
                    next_tick = _now() + self._tick
                    yield Tick(self._prefilled, self.usage.prompt)
                    continue
                for said in await self._on(event):
                    yield said
        finally:
            self.cancel()

    async def admitted(self) -> None:
        """Wait until the engine has a place for it, for ADMISSION seconds at most."""
        if (event := await self._receive(_now() + ADMISSION)) is not None:
            await self._on(event)

    async def _receive(self, until: float) -> EngineEvent | None:
        """The engine's next event, or None if none comes before then; a stream may be given up while it waits."""
        try:
            async with asyncio.timeout_at(until):
                return await anext(self._stream)
        except TimeoutError:
            return None

    async def _on(self, event: EngineEvent) -> list[Event]:
        match event:
            case Started(cached):
                self.usage = dataclasses.replace(self.usage, cached=cached)
                self.started = self.first = self.last = _now()
                return []
            case Prefilled(done):
                self._prefilled = done
                self.first = self.last = _now()
                return []
            case Scored(tokens):
                self.prompt_logprobs += map(self._logprob, tokens)
                return []
            case Token():
                events = self._token(event)
                if events and isinstance(events[-1], Finish):
                    self._flush()
            case Finished(reason):
                self._flush()
                events = self._parser.finish(reason, cut=self._stopped)
            case Failed(error):
                raise error
        self._events += events
        if events and isinstance(events[-1], Finish):
            self._finish = events[-1]
            # Kept before the client can know of it. Of a turn that was continued these are not all its tokens.
            if (turn := self._finish.turn) and not self.ask.continues:
                await asyncio.to_thread(self._replay.remember, turn)
        for said in events:
            self._called |= isinstance(said, ToolCallFinished)
            self._shown += len(said.text) if isinstance(said, TextDelta) and not self._called else 0
        self._release()
        return events

    def _token(self, token: Token) -> list[Event]:
        self.last = _now()
        self.sampled.append(token.id)
        if not self.usage.completion:
            self.first = self.last
            self._flush()
        if token.id in self.ask.stop_ids:  # ends the answer, and is nothing of it
            self._stopped = True
            self.usage = dataclasses.replace(self.usage, completion=self.usage.completion + 1)
            return []
        thought = self._parser.reasoning_tokens
        events = self._parser.push(token.id)
        reasoning = self._parser.reasoning_tokens
        self.usage = dataclasses.replace(self.usage, completion=self.usage.completion + 1, reasoning=reasoning)
        listed = self.ask.prompt is not None or token.id not in self._silent  # EOS is a token of a raw text
        if token.logprob is not None and reasoning == thought and listed:
            self._pending.append(self._logprob(token))
        return events

    def _logprob(self, token: Token) -> Logprob:
        tokenizer = self._engine.tokenizer
        top = dict(token.top)
        if top and token.logprob is not None:
            top.setdefault(token.id, token.logprob)
        return Logprob(
            tokenizer.id_to_bytes(token.id),
            "" if token.id in self._silent else self._spell.push(token.id),
            token.logprob,
            tuple((tokenizer.id_to_bytes(id), logprob) for id, logprob in top.items()),
        )

    def _flush(self) -> None:
        """The prompt or the answer ends, perhaps inside a character: the last token gets what stands for it."""
        last = self._pending[-1:] if self.usage.completion else self.prompt_logprobs[-1:]
        if text := self._spell.flush():
            for item in last:
                item.text += text

    def _release(self) -> None:
        """Move log-probabilities to `logprobs`, as far as the text is out.

        A token's is moved once its last character is out, at the end of the text once its first one is. Those of a
        call, of what comes after one and of what a stop string cuts off are never moved.
        """
        n, spelled, end = 0, self._spelled, self._spelled
        for i, item in enumerate(self._pending, 1):
            begin, end = end, end + len(item.text)
            if begin > self._shown or item.text and (begin if self._finish else end - 1) >= self._shown:
                break
            if item.text or self._finish:
                n, spelled = i, end
        self.logprobs += self._pending[:n]
        self._pending, self._spelled = self._pending[n:], spelled


async def start(
    engine: AsyncEngine, ask: Ask, replay: Replay | None = None, *, id_prefix: str = "call_", tick: float = 5.0
) -> list[Conversation]:
    """Render, check and submit; returns once the engine has admitted the requests, or after ADMISSION seconds.

    replay: remembers turns with calls; without it, none is. id_prefix: of the ids of tool calls. tick: seconds between
    `Tick` events.
    → a conversation for each of `ask.choices()`. Raises ApiError, or an error of the engine.
    """
    replay = Replay() if replay is None else replay
    grammar = None
    if ask.form is not None or ask.calling != Calling():
        # One after the other in a thread of its own: a grammar that takes long delays only other grammars.
        grammar = await asyncio.get_running_loop().run_in_executor(_GRAMMARS, _grammar, engine, ask)
    prepared = await asyncio.to_thread(_prepare, engine, ask, replay, id_prefix, grammar)
    talks = [Conversation(engine, one, replay, request, parser, tick) for one, request, parser in prepared]
    waiting = [asyncio.ensure_future(talk.admitted()) for talk in talks]
    try:
        await asyncio.gather(*waiting)
    except BaseException:
        for task, talk in zip(waiting, talks, strict=True):
            task.cancel()
            talk.cancel()
        raise
    return talks


async def together(talks: Sequence[Conversation]) -> AsyncIterator[tuple[int, Event | Tick]]:
    """The events of several conversations as they come, each with the conversation's place; of ticks only one's.

    Ends all of them when one fails, or when this iterator is closed.
    """
    queue = asyncio.Queue[tuple[int, Event | Tick | Exception | None]]()
    taken = [asyncio.Event() for _ in talks]  # no conversation goes on while its last event is being written

    async def read(i: int) -> None:
        try:
            async for event in talks[i]:
                taken[i].clear()
                queue.put_nowait((i, event))
                await taken[i].wait()
            queue.put_nowait((i, None))
        except Exception as error:
            queue.put_nowait((i, error))

    left = {i: asyncio.ensure_future(read(i)) for i in range(len(talks))}
    tasks = list(left.values())
    try:
        while left:
            i, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                del left[i]
            elif not isinstance(event, Tick) or i == min(left):
                yield i, event
            taken[i].set()
    finally:
        for task, talk in zip(tasks, talks, strict=True):
            task.cancel()
            talk.cancel()


async def run(talks: Sequence[Conversation]) -> None:
    """Go on to the end of all of them."""
    async for _ in together(talks):
        pass


def _now() -> float:
    return asyncio.get_running_loop().time()


def _grammar(engine: AsyncEngine, ask: Ask) -> Grammar | None:
    """What the text or the calls must be, or None. Thoughts are free. Raises Ds4Error."""
    tokenizer, calling, form = engine.tokenizer, ask.calling, None if ask.calling.required else ask.form
    after = (tokenizer.special(Special.THINK_CLOSE),) if _thinks(ask) else ()
    if not ask.tools or calling == Calling() and form is None:
        return None if form is None else engine.grammar(form, Begin(after))
    free = form is None and not calling.required  # to call or not
    begin = Begin((*after, tokenizer.special(Special.DSML)), must=False) if free else Begin(after)
    block = calls.grammar(tokenizer, ask.tools, calling, begun=free)
    try:
        return engine.grammar(block if form is None else Either(form, block), begin)
    except TooHard:
        raise
    except Ds4Error as error:  # which should name the one that is wrong
        if form is not None:
            engine.grammar(form, begin)
        end = time.monotonic() + BLAME
        for tool in chat.normalise_tools(ask.tools):
            if time.monotonic() > end:
                break
            if calling.only is None or tool["name"] in calling.only:
                one = calls.grammar(tokenizer, [tool], dataclasses.replace(calling, only=None), begun=free)
                try:
                    engine.grammar(one, begin)
                except Ds4Error as its:
                    raise ApiError(f"tools: {tool['name']}: {its}", param="tools") from None
        raise error


def _thinks(ask: Ask) -> bool:
    """Whether the answer begins inside a thought."""
    return ask.messages is not None and chat.opens_thought(ask.messages, think=ask.think, continues=ask.continues)


def render(engine: AsyncEngine, ask: Ask, replay: Replay) -> list[int]:
    """The token ids of a request's prompt. Raises Ds4Error."""
    tokenizer = engine.tokenizer
    if isinstance(ask.prompt, list):
        check_ids(engine, ask.prompt, "prompt")
        return ask.prompt
    if ask.prompt is not None:
        _check_size(engine, [ask.prompt])
        return tokenizer.encode_raw(ask.prompt)
    assert ask.messages is not None
    segments = chat.render(
        ask.messages,
        think=ask.think,
        profile=engine.profile.name,
        ctx=engine.ctx,
        tools=ask.tools,
        response_format=ask.form if isinstance(ask.form, dict) and not ask.calling.required else None,
        continues=ask.continues,
        replay=replay.recall(ask.messages),
    )
    _check_size(engine, segments)
    return chat.to_ids(tokenizer, segments)


def check_ids(engine: AsyncEngine, ids: Sequence[int], where: str) -> None:
    """Raises ApiError if an id is none of the vocabulary's."""
    end = engine.tokenizer.vocab_size
    if wrong := next((id for id in ids if not 0 <= id < end), None):
        raise ApiError(f"{where}: found token id {wrong}, expected 0 to {end - 1}", param=where)


def _check_size(engine: AsyncEngine, segments: Sequence[chat.Segment]) -> None:
    """Refuses what cannot fit by its mere size, before minutes are spent on cutting it into tokens."""
    least = sum(len(segment) for segment in segments if isinstance(segment, str)) // _longest(engine.tokenizer)
    if least >= engine.ctx:
        raise overflow(least, engine.ctx, " (at least)")


@functools.cache
def _longest(tokenizer: Tokenizer) -> int:
    """Characters of the longest token, at least."""
    return max(map(len, tokenizer.tokens))


def _prepare(
    engine: AsyncEngine, ask: Ask, replay: Replay, id_prefix: str, grammar: Grammar | None
) -> list[tuple[Ask, Request, OutputParser]]:
    """What to submit for each of `ask.choices()`."""
    thinking, out = _thinks(ask), []
    check_ids(engine, sorted(ask.stop_ids), "stop_token_ids")
    budget = None
    if ask.budget is not None and thinking:
        budget = Budget(ask.budget, engine.tokenizer.special(Special.THINK_CLOSE))
    for i, one in enumerate(ask.choices()):
        if i % ask.n == 0:
            tokens = render(engine, one, replay)
            if len(tokens) >= engine.ctx:
                raise overflow(len(tokens), engine.ctx)
        parser = OutputParser(
            engine.tokenizer,
            thinking=thinking,
            tools=ask.tools,
            stop=ask.stop,
            raw=ask.prompt is not None,
            new_id=lambda: chat_parser.new_call_id(id_prefix),
        )
        request = Request(
            tokens=tokens,
            max_tokens=engine.ctx if ask.max_tokens is None else min(ask.max_tokens, engine.ctx),
            sampling=one.sampling,
            logprobs=ask.logprobs,
            prompt_logprobs=ask.logprobs if ask.echo_prompt else None,
            stop_ids=frozenset({engine.tokenizer.eos_id}) | ask.stop_ids if ask.stop_ids else None,
            grammar=grammar,
            budget=budget,
            client=ask.client,
        )
        out.append((one, request, parser))
    return out
