"""What other threads ask of the thread that owns the model. Commands are carried out in the order they were put."""

from __future__ import annotations

import dataclasses

from ds4jax.engine.stream import Stream
from ds4jax.engine.types import Request


@dataclasses.dataclass(frozen=True)
class Submit:
    """Start a request; its events go to `stream`."""

    request: Request
    stream: Stream


@dataclasses.dataclass(frozen=True)
class Cancel:
    """End the request of `stream`, unless it has ended."""

    stream: Stream


@dataclasses.dataclass(frozen=True)
class Wake:
    """Look for work again: a prefix has been read from disk."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """End the engine once all requests have ended, or at `deadline` (of `time.perf_counter`)."""

    deadline: float


Command = Submit | Cancel | Wake | Stop
