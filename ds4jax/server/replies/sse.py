"""Server-sent events, and what the four APIs have in common when they write them."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any, ClassVar

from ds4jax.chat.parser import Event
from ds4jax.server.conversation import Conversation, Tick
from ds4jax.server.errors import ApiError


def dumps(value: Any) -> str:
    """JSON in ASCII: some clients split lines where Unicode would, at U+2028 or U+0085."""
    return json.dumps(value, separators=(",", ":"))


def event(data: Any, name: str | None = None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(data)}\n\n".encode()


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


class Reply:
    """One answer in one API's form: `whole` if it was run to its end, or what these return, one after the other:
    `begin`, then `on` for each event and `idle` meanwhile, then `end` or, after an error, `fail`.
    """

    id_prefix: ClassVar[str] = "call_"  # of tool calls

    def __init__(self, conversation: Conversation, model: str):
        """model: the name to answer under."""
        self.conversation, self.ask = conversation, conversation.ask
        self.model, self.created = model, int(time.time())

    def begin(self) -> bytes:
        raise NotImplementedError

    def on(self, e: Event) -> bytes:
        raise NotImplementedError

    def end(self) -> bytes:
        raise NotImplementedError

    def idle(self, tick: Tick) -> bytes:
        """A comment, which clients skip."""
        return f": prefill {tick.prefilled}/{tick.total}\n\n".encode()

    def fail(self, error: ApiError) -> bytes:
        return event(error.openai())

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError
