"""The events of one request, handed from the engine's thread to a reader in an event loop. No JAX."""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Callable
from typing import Self

from ds4jax.engine.sequence import Sequence
from ds4jax.engine.types import Event, Failed, Finished


class Stream:
    """An asynchronous iterator over the events of one request, for one reader.

    It ends after `Finished`, and raises the error of `Failed`. sequence: set by the engine's thread once the request
    has come there.
    """

    def __init__(self, on_cancel: Callable[[Stream], None]):
        self.sequence: Sequence | None = None
        self._on_cancel = on_cancel
        self._events: collections.deque[Event] = collections.deque()
        self._waiter: asyncio.Future | None = None
        self._lock = threading.Lock()  # guards the two above
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._over:
            with self._lock:
                if self._events:
                    event = self._events.popleft()
                    self._over = isinstance(event, Finished | Failed)
                    if isinstance(event, Failed):
                        raise event.error
                    return event
                self._waiter = waiter = asyncio.get_running_loop().create_future()
            await waiter
        raise StopAsyncIteration

    def push(self, event: Event) -> None:
        """Hand an event to the reader. Thread-safe."""
        with self._lock:
            self._events.append(event)
        self._wake()

    def cancel(self) -> None:
        """End the request, unless it is over: after the present step it runs no more. Thread-safe; no event follows."""
        if self._over:
            return
        self._over = True
        self._on_cancel(self)
        self._wake()

    async def aclose(self) -> None:
        """`cancel`."""
        self.cancel()

    def _wake(self) -> None:
        """Let a waiting reader look again."""
        with self._lock:
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            try:
                waiter.get_loop().call_soon_threadsafe(_set, waiter)
            except RuntimeError:  # the reader's loop is closed
                self._on_cancel(self)


def _set(waiter: asyncio.Future) -> None:
    if not waiter.done():
        waiter.set_result(None)
