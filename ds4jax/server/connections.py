"""Connections: accepted while there is room, closed where a client is too slow, and ended in time."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ds4jax.errors import Ds4Error
from ds4jax.server.errors import ApiError

_LOG = logging.getLogger(__name__)

RESERVED_DESCRIPTORS = 256
"""File descriptors that are kept for all but connections: files of the model and of prefixes, devices, libraries."""
MOST_DESCRIPTORS = 65536  # more are not asked for
MOST_CONNECTIONS = 4096  # unless more are wanted
MOST_REFUSED = 64  # refused connections that are kept a moment
MOST_AT_ONCE = 16 << 10
"""Bytes taken of a connection before it is another's turn. A body in chunks of one byte costs 0.1 ms for each."""
QUIET = 60.0
"""Seconds in which the same warning of uvicorn is logged once. Anyone can cause one by sending what is not HTTP."""
LAST_SECONDS = 2.0  # that clients have at the end to take what was written for them


@dataclasses.dataclass(frozen=True)
class Limits:
    """What connections may take; times in seconds.

    connections: at once; one more gets 503. head: for the head of a request, from the connection or, where one was kept
    open, from the first byte. idle: from an answer to the next request. write: for which a client may take nothing of
    what is there for it. rest_of_body: for what is left of a body that was answered before its end.
    """

    connections: int = 1000
    head: float = 15.0
    idle: float = 75.0
    write: float = 60.0
    rest_of_body: float = 10.0


def most_connections(wanted: int | None = None) -> int:
    """How many connections there may be at once: `wanted`, or what file descriptors allow, at most MOST_CONNECTIONS.

    Raises this process's limit of descriptors as far as it may. Raises Ds4Error if they do not suffice for `wanted`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
        if soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    else:
        soft = MOST_DESCRIPTORS
    room = max(soft - RESERVED_DESCRIPTORS, soft // 4)
    if wanted is not None and wanted > room:
        raise Ds4Error(f"max_connections: found {wanted}, expected at most {room} where `ulimit -n` is {soft}")
    return min(room, MOST_CONNECTIONS) if wanted is None else wanted


class _Seldom(logging.Filter):
    """Lets each warning pass once in QUIET seconds, and all errors; uvicorn has only a few different ones."""

    def __init__(self):
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, text = time.monotonic(), str(record.msg)
        if record.levelno > logging.WARNING or now - self._said.get(text, float("-inf")) > QUIET:
            self._said[text] = now
            return True
        return False


class Connection(H11Protocol):
    """One connection: uvicorn's, and `check` closes it where the client is too slow."""

    def __init__(self, limits: Limits, **uvicorns: Any):
        super().__init__(**uvicorns)
        self._limits = limits
        self._head: float | None = self.loop.time()  # since when the head of a request has been awaited, if one is
        self._answered = 0.0  # when the last answer was complete

    def connection_made(self, transport: Any) -> None:
        transport.max_size = MOST_AT_ONCE
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._head is None and self.conn.their_state is h11.IDLE:
            self._head = self.loop.time()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head = None

    def on_response_complete(self) -> None:
        self._answered = self.loop.time()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # any byte of an old body would stop uvicorn's timer; `check` closes

    def check(self, now: float) -> None:
        """Close the connection if a request, its head, or the rest of a body already answered takes too long."""
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            if self._head is None:
                if now - self._answered > self._limits.idle:
                    self.transport.close()
            elif now - self._head > self._limits.head:
                if self.conn.trailing_data[0]:  # a part of it has come
                    text = f"head: found a part of one after {self._limits.head:g} s, expected a whole one"
                    self.transport.write(_whole(ApiError(text, 408)))
                self.transport.close()
        elif self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            if now - self._answered > self._limits.rest_of_body:
                self.transport.close()

    def shutdown(self) -> None:
        with contextlib.suppress(h11.LocalProtocolError):  # of a connection that is being closed already
            super().shutdown()


class Server(uvicorn.Server):
    """uvicorn at `listener`, a bound socket, within `limits`.

    begun: is called once it listens. close: is awaited once the server is to stop, and ends the answers that still run.
    Clients then have LAST_SECONDS to take what is left; a process that serves in its main thread ends at once at a
    second SIGTERM or SIGINT.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        limits: Limits | None = None,
        *,
        begun: Callable[[], None] = lambda: None,
        close: Callable[[], Awaitable[None]] | None = None,
    ):
        config = uvicorn.Config(app, loop="asyncio", http=H11Protocol, ws="none", log_level="warning", lifespan="on")
        super().__init__(config)
        logging.getLogger("uvicorn.error").filters = [_Seldom()]
        self._listener, self._limits, self._begun, self._close = listener, limits or Limits(), begun, close
        self._refused = collections.deque[tuple[float, socket.socket]]()
        text = f"connections: found {self._limits.connections} already, expected fewer; try again"
        self._full = _whole(ApiError(text, 503, code="overloaded"))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # which connections inherit; the system closes those it concerns
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self._limits.write))
        self._listener.setblocking(False)
        self._listener.listen(2048)
        self._accepting = asyncio.create_task(self._accept())
        self._threads = ThreadPoolExecutor(thread_name_prefix="requests")
        asyncio.get_running_loop().set_default_executor(self._threads)
        self._begun()

    async def on_tick(self, counter: int) -> bool:
        if counter % 5 == 0:  # every half a second
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check(now)
            while self._refused and now - self._refused[0][0] > 1:
                self._refused.popleft()[1].close()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listener.close()
        ending = asyncio.create_task(super().shutdown())
        # What there is to be done at the end does not wait for what clients keep threads busy with.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())
        if self._close is not None:
            await self._close()
        await asyncio.wait([ending], timeout=LAST_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.wait([ending], timeout=1.0)
        ending.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _, sock in self._refused:
            sock.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        for one in (signal.SIGTERM, signal.SIGINT):  # the next one is the system's business, whatever Python does
            signal.signal(one, signal.SIG_DFL)

    async def _accept(self) -> None:
        """Accept connections for ever. asyncio's own way would log thousands of lines without a free descriptor."""
        loop, told = asyncio.get_running_loop(), float("-inf")
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if loop.time() - told > 60:
                    _LOG.error("connections: none can be accepted for now: %s", error.strerror)
                    told = loop.time()
                await asyncio.sleep(1.0)
                continue
            if len(self.server_state.connections) >= self._limits.connections:
                self._refuse(sock, loop.time())
                await asyncio.sleep(0)
                continue
            try:
                await loop.connect_accepted_socket(self._connection, sock)
            except Exception:
                _LOG.exception("a connection could not be begun")
                sock.close()

    def _connection(self) -> Connection:
        state = self.lifespan.state
        return Connection(self._limits, config=self.config, server_state=self.server_state, app_state=state)

    def _refuse(self, sock: socket.socket, now: float) -> None:
        """Answer 503. The socket is kept a moment: what a client sends to a closed one would undo the answer."""
        with contextlib.suppress(OSError):
            sock.send(self._full)
            sock.shutdown(socket.SHUT_WR)
        self._refused.append((now, sock))
        if len(self._refused) > MOST_REFUSED:
            self._refused.popleft()[1].close()


def _whole(error: ApiError) -> bytes:
    """An answer, head and all, after which the connection is closed."""
    response = error.response()
    response.headers["connection"] = "close"
    head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 %d \r\n%s\r\n%s" % (error.status, head, response.body)
