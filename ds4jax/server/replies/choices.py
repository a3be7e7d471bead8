"""What Chat Completions and Completions have in common: an object with choices, each an answer of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

from ds4jax.chat.parser import Event, Finish
from ds4jax.server.conversation import Conversation, Tick
from ds4jax.server.replies.sse import Reply, event, new_id

DONE = b"data: [DONE]\n\n"


class Choice:
    """One answer: the parts of its choice in a stream, and the whole one."""

    def __init__(self, conversation: Conversation, index: int):
        self.conversation, self.ask, self._index = conversation, conversation.ask, index

    def on(self, e: Event) -> list[dict[str, Any]]:
        """What an event adds, a dict for each chunk; `Finish` gives the last one."""
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError

    def part(
        self, logprobs: Any, finish: Finish | None = None, tokens: Sequence[int] = (), **said: Any
    ) -> dict[str, Any]:
        """The JSON of a part. tokens: the ids that were sampled for it, also those that add nothing to the text."""
        ids = {"token_ids": tokens} if self.ask.token_ids else {}
        reason = finish and ("stop" if finish.reason in ("stop_sequence", "error") else finish.reason)
        return {"index": self._index, **said, "logprobs": logprobs, "finish_reason": reason} | ids


class ChoicesReply(Reply):
    """An answer with one choice for each conversation."""

    id_start: ClassVar[str]
    kind: ClassVar[str]  # of the object
    chunk_kind: ClassVar[str]
    choice: ClassVar[type[Choice]]

    def __init__(self, conversations: Sequence[Conversation], model: str):
        super().__init__(conversations, model)
        self.id, self._talks = new_id(self.id_start), conversations
        self._choices = [self.choice(talk, i) for i, talk in enumerate(conversations)]
        self._open = len(conversations)

    def on(self, e: Event, index: int = 0) -> bytes:
        parts = self._choices[index].on(e)
        if isinstance(e, Finish):
            self._open -= 1
            if not self._open:
                self._last = parts.pop()
        return b"".join(event(self._chunk([part])) for part in parts)

    def idle(self, tick: Tick) -> bytes:
        if not self.ask.progress or tick.prefilled >= tick.total:
            return super().idle(tick)
        talk = self.conversation
        milliseconds = round(1e3 * (asyncio.get_running_loop().time() - talk.started))
        progress = {"total": tick.total, "cache": talk.usage.cached, "processed": tick.prefilled}
        return event(self._chunk([]) | {"prompt_progress": progress | {"time_ms": milliseconds}})

    def end(self) -> bytes:
        if self.ask.include_usage:
            return event(self._chunk([self._last])) + event(self._chunk([]) | self._measured()) + DONE
        return event(self._chunk([self._last]) | {"timings": timings(self._talks)}) + DONE

    def whole(self) -> dict[str, Any]:
        return self.head(self.id, self.kind) | {"choices": [one.whole() for one in self._choices]} | self._measured()

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.head(self.id, self.chunk_kind) | {"choices": choices}

    def _measured(self) -> dict[str, Any]:
        return {"usage": usage(self._talks), "timings": timings(self._talks)}


def usage(talks: Sequence[Conversation]) -> dict[str, Any]:
    """Tokens in OpenAI's words. A prompt counts once, however many answers it has."""
    first = [talk.usage for talk in talks[:: talks[0].ask.n]]
    prompt, completion = sum(tokens.prompt for tokens in first), sum(talk.usage.completion for talk in talks)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(tokens.cached for tokens in first)},
        "completion_tokens_details": {"reasoning_tokens": sum(talk.usage.reasoning for talk in talks)},
    }


def timings(talks: Sequence[Conversation]) -> dict[str, float]:
    """Tokens, milliseconds and rates of prompts and answers, under llama.cpp's names.

    The prompts' time lasts to the first token, the answers' from there; waiting for a place is in neither. Of several
    conversations the time is that from the first beginning to the last end.
    """
    started, first = min(talk.started for talk in talks), [talk.first for talk in talks]
    cached = sum(talk.usage.cached for talk in talks)
    predicted = sum(talk.usage.completion for talk in talks)
    steps = sum(max(talk.usage.completion - 1, 0) for talk in talks)  # the first token of each belongs to the prompt

    def rates(name: str, tokens: int, seconds: float, steps: int) -> dict[str, float]:
        each, rate = (1e3 * seconds / steps, steps / seconds) if steps and seconds else (0.0, 0.0)
        of = {"n": tokens, "ms": 1e3 * seconds, "per_token_ms": each, "per_second": rate}
        return {f"{name}_{key}": value for key, value in of.items()}

    prompt = sum(talk.usage.prompt for talk in talks) - cached
    before = rates("prompt", prompt, max(first) - started, prompt)
    return {"cache_n": cached} | before | rates("predicted", predicted, max(t.last for t in talks) - min(first), steps)
