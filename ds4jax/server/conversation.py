"""One request from `Ask` to its last event: render, submit, parse, count. All that the APIs share; no HTTP here.

    conversation = await Conversation.start(engine, ask, replay)     # raises ApiError while a status can still be sent
    async for event in conversation: ...                     # ds4jax.chat.parser's events, and Tick
    conversation.finish, conversation.usage, conversation.message

A conversation that is dropped or cancelled, at whatever point, gives its place in the engine back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ds4jax.chat import parser as chat_parser
from ds4jax.chat import template as chat
from ds4jax.chat.parser import Event, Finish, OutputParser, TextDelta
from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.engine.types import Event as EngineEvent
from ds4jax.engine.types import Failed, Finished, Prefilled, Request, Started, Token
from ds4jax.io.tokenizer import Special, Tokenizer
from ds4jax.server.ask import Ask
from ds4jax.server.errors import ApiError, overflow
from ds4jax.server.replay import Replay

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


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A token of the text: the bytes it stands for, its log-probability, and the likeliest ones in its place."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


class Conversation:
    """An async iterator over the events of one answer; see the module.

    Attributes: ask; usage and logprobs (of the text, so far).
    """

    def __init__(
        self, engine: AsyncEngine, ask: Ask, replay: Replay, request: Request, parser: OutputParser, tick: float
    ):
        self.ask, self.usage = ask, Usage(len(request.tokens))
        self._finish: Finish | None = None
        self.logprobs: list[Logprob] = []
        self._pending: list[Logprob] = []  # of tokens read, whose text has not been shown
        self._engine, self._replay, self._parser, self._tick = engine, replay, parser, tick
        self._prefilled = 0
        self._started = self._first = self._last = _now()  # the prompt's computation, the first token, the last
        self._events: list[Event] = []
        self._stream = engine.submit(request)

    @classmethod
    async def start(
        cls,
        engine: AsyncEngine,
        ask: Ask,
        replay: Replay | None = None,
        *,
        id_prefix: str = "call_",
        tick: float = 5.0,
    ) -> Conversation:
        """Render, check and submit; returns once the engine has admitted the request, or after ADMISSION seconds.

        replay: remembers turns with calls; without it, none is. id_prefix: of the ids of tool calls. tick: seconds
        between `Tick` events.
        Raises ApiError, or an error of the engine.
        """
        replay = Replay() if replay is None else replay
        request, parser = await asyncio.to_thread(_prepare, engine, ask, replay, id_prefix)
        conversation = cls(engine, ask, replay, request, parser, tick)
        try:
            if (event := await conversation._receive(_now() + ADMISSION)) is not None:
                await conversation._on(event)
        except BaseException:
            conversation.cancel()
            raise
        return conversation

    @property
    def message(self) -> dict[str, Any]:
        """The answer as an assistant message in Chat Completions' form; see `ds4jax.chat.parser.message`."""
        return chat_parser.message(self._events)

    @property
    def timings(self) -> dict[str, float]:
        """Tokens, milliseconds and rates of prompt and answer, under llama.cpp's names.

        The prompt's time lasts to the first token, and has none of the wait for a place; the answer's begins there.
        """
        prompt, cached, predicted = self.usage.prompt - self.usage.cached, self.usage.cached, self.usage.completion

        def rates(name: str, tokens: int, seconds: float, steps: int) -> dict[str, float]:
            each, rate = (1e3 * seconds / steps, steps / seconds) if steps and seconds else (0.0, 0.0)
            of = {"n": tokens, "ms": 1e3 * seconds, "per_token_ms": each, "per_second": rate}
            return {f"{name}_{key}": value for key, value in of.items()}

        before = rates("prompt", prompt, self._first - self._started, prompt)
        return {"cache_n": cached} | before | rates("predicted", predicted, self._last - self._first, predicted - 1)

    @property
    def finish(self) -> Finish:
        """The last event, once it is out."""
        assert self._finish is not None
        return self._finish

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

    async def run(self) -> None:
        """Go on to the end."""
        async for _ in self:
            pass

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
                self._started = self._first = self._last = _now()
                return []
            case Prefilled(done):
                self._prefilled = done
                return []
            case Token():
                events = self._token(event)
            case Finished(reason):
                events = self._parser.finish(reason)
            case Failed(error):
                raise error
        self._events += events
        if events and isinstance(events[-1], Finish):
            self._finish = events[-1]
            if turn := self._finish.turn:  # kept before the client can know of it
                await asyncio.to_thread(self._replay.remember, turn)
        return events

    def _token(self, token: Token) -> list[Event]:
        self._last = _now()
        if not self.usage.completion:
            self._first = self._last
        thought = self._parser.reasoning_tokens
        events = self._parser.push(token.id)
        reasoning = self._parser.reasoning_tokens
        self.usage = dataclasses.replace(self.usage, completion=self.usage.completion + 1, reasoning=reasoning)
        if token.logprob is not None and reasoning == thought and token.id != self._engine.tokenizer.eos_id:
            spell = self._engine.tokenizer.id_to_bytes
            top = tuple((spell(id), logprob) for id, logprob in token.top)
            self._pending.append(Logprob(spell(token.id), token.logprob, top))
        if any(isinstance(event, TextDelta) for event in events):  # tokens of a tool call never get here
            self.logprobs += self._pending
            self._pending = []
        return events


def _now() -> float:
    return asyncio.get_running_loop().time()


def _grammar(engine: AsyncEngine, ask: Ask) -> Any:
    """What the text must be, or None. Thoughts are free."""
    if ask.form is None:
        return None
    if ask.tools:
        raise ApiError("tools: found beside a format, expected one of them: a format leaves no room for calls")
    thinks = ask.prompt is None and ask.think != "off"
    return engine.grammar(ask.form, engine.tokenizer.special(Special.THINK_CLOSE) if thinks else None)


def render(engine: AsyncEngine, ask: Ask, replay: Replay) -> list[int]:
    """The token ids of a request's prompt. Raises Ds4Error."""
    tokenizer = engine.tokenizer
    if isinstance(ask.prompt, list):
        if wrong := [id for id in ask.prompt if not 0 <= id < tokenizer.vocab_size]:
            raise ApiError(f"prompt: found token id {wrong[0]}, expected 0 to {tokenizer.vocab_size - 1}")
        return ask.prompt
    if ask.prompt is not None:
        _check_size(engine, [ask.prompt])
        return tokenizer.encode_raw(ask.prompt)
    assert ask.messages is not None
    segments = chat.render(
        ask.messages,
        think=ask.think,
        profile=chat.effort_profile(tokenizer.chat_template),
        ctx=engine.ctx,
        tools=ask.tools,
        response_format=ask.form if isinstance(ask.form, dict) else None,
        replay=replay.recall(ask.messages),
    )
    _check_size(engine, segments)
    return chat.to_ids(tokenizer, segments)


def _check_size(engine: AsyncEngine, segments: Sequence[chat.Segment]) -> None:
    """Refuses what cannot fit by its mere size, before minutes are spent on cutting it into tokens."""
    least = sum(len(segment) for segment in segments if isinstance(segment, str)) // _longest(engine.tokenizer)
    if least >= engine.ctx:
        raise overflow(least, engine.ctx, " (at least)")


@functools.cache
def _longest(tokenizer: Tokenizer) -> int:
    """Characters of the longest token, at least."""
    return max(map(len, tokenizer.tokens))


def _prepare(engine: AsyncEngine, ask: Ask, replay: Replay, id_prefix: str) -> tuple[Request, OutputParser]:
    raw = ask.prompt is not None
    parser = OutputParser(
        engine.tokenizer,
        thinking=not raw and ask.think != "off",
        tools=ask.tools,
        stop=ask.stop,
        raw=raw,
        new_id=lambda: chat_parser.new_call_id(id_prefix),
    )
    tokens = render(engine, ask, replay)
    if len(tokens) >= engine.ctx:
        raise overflow(len(tokens), engine.ctx)
    request = Request(
        tokens=tokens,
        max_tokens=min(ask.max_tokens or engine.ctx, engine.ctx),
        sampling=ask.sampling,
        logprobs=ask.logprobs,
        grammar=_grammar(engine, ask),
    )
    return request, parser
