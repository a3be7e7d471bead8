"""Server-sent events, and the base class of the four APIs' replies."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import ds4jax
from ds4jax.chat.parser import Event
from ds4jax.server.conversation import Conversation, Tick
from ds4jax.server.errors import ApiError

if TYPE_CHECKING:
    from ds4jax.server.stored import Stored


def dumps(value: Any) -> str:
    """Write JSON in ASCII: some clients split lines where Unicode does, at U+2028 or U+0085."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def event(data: Any, name: str | None = None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(data)}\n\n".encode()


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


class Reply:
    """One answer in one API's form, as one object or as a stream of server-sent events.

    `whole` gives the object, once the conversation has ended. The stream is what these return, in this order: `begin`;
    `on` for each event, and `idle` when there was none for a while; `end` or, after an error, `fail`. What clients take
    for the first token never comes before it: `begin` says nothing where the API's first event is one of the answer.
    """

    id_prefix: ClassVar[str] = "call_"  # of tool calls

    def __init__(self, conversations: Sequence[Conversation], model: str):
        """conversations: one, except where an API has several choices. model: the name to answer under."""
        self.conversation, self.ask = conversations[0], conversations[0].ask
        self.model, self.created = model, int(time.time())

    def head(self, id: str, kind: str) -> dict[str, Any]:
        """The first fields of OpenAI's objects of a kind."""
        about = {"created": self.created, "model": self.model, "system_fingerprint": f"ds4jax-{ds4jax.__version__}"}
        return {"id": id, "object": kind} | about

    def begin(self) -> bytes:
        return b""

    def on(self, e: Event, index: int = 0) -> bytes:
        """index: of the conversation."""
        raise NotImplementedError

    def end(self) -> bytes:
        raise NotImplementedError

    def idle(self, tick: Tick) -> bytes:
        """A comment, which clients skip."""
        return f": prefill {tick.prefilled}/{tick.total}\n\n".encode()

    def fail(self, error: ApiError) -> bytes:
        return event(error.openai())

    def keep(self, stored: Stored) -> None:
        """Keep the answer, where the API has such a thing, after `end` or `whole` and before the client has it."""

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError
