"""A model in Python, from text to text; see `Model`.

from ds4jax import Model

with Model("tiny") as model:
    print(model.chat("What is the capital of France?"))
    for piece in model.stream("Write a poem."):
        print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from ds4jax.chat.parser import TextDelta, ThinkingDelta
from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.engine.types import Sampling, seed_or_random
from ds4jax.errors import Ds4Error
from ds4jax.server.ask import Ask
from ds4jax.server.conversation import Conversation, Logprob, start
from ds4jax.settings import Settings, names

type Messages = str | Sequence[dict[str, Any]]
"""A message of the user, or a conversation in Chat Completions' form."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What an answer grows by: some text, or some of the thought before it."""

    text: str = ""
    reasoning: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A complete answer; `str` gives its text.

    message: the assistant's, to be appended to a conversation; it has the tool calls. reasoning: the thought. finish:
    "stop", "length" (a limit cut it off), "stop_sequence" or "tool_calls". prompt_tokens, cached_tokens (those of them
    that were not computed again), completion_tokens. logprobs: of the tokens of the text, if they were asked for.
    """

    text: str
    reasoning: str
    message: dict[str, Any]
    finish: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: tuple[Logprob, ...] = ()

    def __str__(self) -> str:
        return self.text


class Model:
    """A model that is loaded, and answers.

    Answers take these arguments, all of them optional: think (off, on, low, high, max), max_tokens (None: all the room
    there is), temperature, top_p, top_k, min_p, seed (None: a random one), presence_penalty, frequency_penalty,
    repetition_penalty, min_tokens, stop (strings that end the text), logprobs (how many of the likeliest tokens to
    report beside each), schema (the JSON schema of the answer), tools (as in Chat Completions), and system (a system
    prompt).

    Calls from several threads, or several tasks, share the model's slots. What is wrong raises Ds4Error.
    Attributes: engine, tokenizer, ctx (tokens of prompt and answer together).
    """

    def __init__(
        self, model: str | Path = "tiny", *, config: str | Path = "tiny", batch: int | None = None, **settings: Any
    ):
        """Load a model and compile its steps.

        model: a config's name or path (.toml), or a GGUF file (a path, hf:OWNER/REPO/FILE, or a folder of
            ``ds4jax checkpoint``) to run as `config` says.
        batch: how many answers at once. settings: keys of a config that replace the file's, ctx=8192 for example.
        """
        if str(model) in names() or str(model).endswith(".toml"):
            loaded = Settings.load(model, **settings)
        else:
            loaded = Settings.load(config, model=str(model), **settings)
        self._serve(AsyncEngine.open(loaded, max_seqs=batch, max_waiting=2**31))

    @classmethod
    def of(cls, engine: AsyncEngine) -> Self:
        """A model around an engine, which is closed with it."""
        self = cls.__new__(cls)
        self._serve(engine)
        return self

    def _serve(self, engine: AsyncEngine) -> None:
        self.engine, self.tokenizer, self.ctx = engine, engine.tokenizer, engine.ctx
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ds4jax", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Free the model's memory. It answers no more."""
        if self._thread.is_alive():
            self._wait(self.engine.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- answers -----------------------------------------------------------------------------------------------------
    def chat(self, messages: Messages, **how: Any) -> Answer:
        """Answer. how: see `Model`."""
        return self._wait(self.chat_async(messages, **how))

    def batch(self, conversations: Iterable[Messages], **how: Any) -> list[Answer]:
        """Answer several, as many at once as there are slots; in the order of the questions."""
        return self._wait(self.batch_async(conversations, **how))

    def stream(self, messages: Messages, **how: Any) -> Iterator[Piece]:
        """Answer piece by piece. If the iterator is closed, the model stops."""
        return self._stream(_asked(messages, how))

    def complete(self, prompt: str | Sequence[int], **how: Any) -> Answer:
        """Continue a text, or token ids, without a chat template."""
        return self._wait(self._answer(_asked_raw(prompt, how)))

    # ---- the same in an event loop -----------------------------------------------------------------------------------
    async def chat_async(self, messages: Messages, **how: Any) -> Answer:
        """`chat` in the caller's event loop."""
        return await self._answer(_asked(messages, how))

    async def batch_async(self, conversations: Iterable[Messages], **how: Any) -> list[Answer]:
        """`batch` in the caller's event loop. If one fails, the others are given up."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._answer(_asked(one, how))) for one in conversations]
        return [task.result() for task in tasks]

    async def stream_async(self, messages: Messages, **how: Any) -> AsyncIterator[Piece]:
        """`stream` in the caller's event loop."""
        async with contextlib.aclosing(self._pieces(_asked(messages, how))) as pieces:
            async for piece in pieces:
                yield piece

    # ---- tokens ------------------------------------------------------------------------------------------------------
    def encode(self, text: str) -> list[int]:
        """The token ids of a text; control tokens are not read from it."""
        return self.tokenizer.encode_text(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Raises Ds4Error for one that the vocabulary does not have."""
        return self.tokenizer.decode(ids)

    # ---- within ------------------------------------------------------------------------------------------------------
    async def _answer(self, ask: Ask) -> Answer:
        (talk,) = await start(self.engine, ask)
        async for _ in talk:
            pass
        return _answer_of(talk)

    async def _pieces(self, ask: Ask) -> AsyncGenerator[Piece]:
        (talk,) = await start(self.engine, ask)
        try:
            async for event in talk:
                match event:
                    case TextDelta(text):
                        yield Piece(text=text)
                    case ThinkingDelta(text):
                        yield Piece(reasoning=text)
        finally:
            talk.cancel()

    def _stream(self, ask: Ask) -> Iterator[Piece]:
        pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()

        async def read() -> None:
            try:
                async with contextlib.aclosing(self._pieces(ask)) as found:
                    async for piece in found:
                        pieces.put(piece)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)
                raise

        reading = asyncio.run_coroutine_threadsafe(read(), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            reading.cancel()

    def _wait[T](self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work in this model's event loop. It is cancelled if the caller is interrupted."""
        if not self._thread.is_alive():
            work.close()
            raise Ds4Error("the model: found it closed, expected it open")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except ExceptionGroup as group:  # of a batch
            raise group.exceptions[0] from None
        finally:
            future.cancel()


_SAMPLING = {field.name for field in dataclasses.fields(Sampling)} - {"logit_bias"}
_OTHERS = {"think", "max_tokens", "stop", "logprobs", "schema", "tools"}


def _ask(how: dict[str, Any], **prompt: Any) -> Ask:
    """What to ask of the engine. how: the caller's arguments. Raises Ds4Error."""
    if unknown := how.keys() - _SAMPLING - _OTHERS:
        known = sorted(_SAMPLING | _OTHERS | ({"system"} if "messages" in prompt else set()))
        raise Ds4Error(f"found the argument {min(unknown)!r}, expected some of {', '.join(known)}")
    sampling: dict[str, Any] = {name: how[name] for name in _SAMPLING & how.keys()}
    sampling["seed"] = seed_or_random(sampling.get("seed"))
    stop = how.get("stop") or ()
    return Ask(
        "",
        True,
        Sampling(**sampling),
        think=how.get("think", "on"),
        max_tokens=how.get("max_tokens"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=how.get("logprobs"),
        form=how.get("schema"),
        tools=how.get("tools"),
        **prompt,
    )


def _asked(messages: Messages, how: dict[str, Any]) -> Ask:
    how = dict(how)
    system = how.pop("system", "")
    found = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return _ask(how, messages=[{"role": "system", "content": system}] * bool(system) + found)


def _asked_raw(prompt: str | Sequence[int], how: dict[str, Any]) -> Ask:
    return _ask(how, prompt=prompt if isinstance(prompt, str) else [int(id) for id in prompt])


def _answer_of(talk: Conversation) -> Answer:
    message, usage = talk.message, talk.usage
    return Answer(
        text=message["content"] or "",
        reasoning=message.get("reasoning_content", ""),
        message=message,
        finish=talk.finish.reason,
        prompt_tokens=usage.prompt,
        cached_tokens=usage.cached,
        completion_tokens=usage.completion,
        logprobs=tuple(talk.logprobs),
    )
