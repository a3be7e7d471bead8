"""A connection between two processes of one server: who may have one, and signs of life. No JAX.

Both sides prove that they know a secret, without saying it; what follows is neither encrypted nor signed. A connection
has a thread that reads and one that writes, so that nobody waits for a process that has stopped reading.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ds4jax.engine import messages
from ds4jax.engine.messages import Malformed

BEAT = 1.0
"""Seconds from one sign of life to the next, where nothing else is said."""
GREETING = 5.0
"""Seconds that each step of the greeting may take."""
SMALL = 64 << 10, 0
"""The most bytes of JSON and of arrays in a message whose sender is not known, or says nothing large."""


class Refused(Exception):
    """Why the other side is not let in."""


def introduce(sock: socket.socket, secret: bytes, hello: Any) -> None:
    """Open a connection as the side that has asked for it. hello: says who this is. Raises as `_greet` does."""
    _greet(sock, secret, asks=True)
    _write(sock, hello)


def answer(sock: socket.socket, secret: bytes) -> Any:
    """Open a connection as the side that was asked; → what the other says of itself. Raises as `_greet` does."""
    _greet(sock, secret, asks=False)
    return _short(sock)


def _greet(sock: socket.socket, secret: bytes, asks: bool) -> None:
    """Make sure that the other side knows the secret, and show that this one does.

    asks: whether this side has opened the connection. Raises Refused, OSError or Malformed.
    """
    mine = secrets.token_hex(16)
    _write(sock, mine)
    theirs = _short(sock)
    if not isinstance(theirs, str) or len(theirs) != len(mine):
        raise Refused("found something else than a greeting")
    _write(sock, _proof(secret, asks, mine, theirs))
    found = _short(sock)
    expected = _proof(secret, not asks, theirs, mine)
    if not isinstance(found, str) or not hmac.compare_digest(found.encode(), expected.encode()):
        raise Refused("found another secret")


def _proof(secret: bytes, asks: bool, own: str, other: str) -> str:
    return hmac.digest(secret, f"ds4jax {asks} {own} {other}".encode(), "sha256").hex()


def _write(sock: socket.socket, value: Any) -> None:
    sock.settimeout(GREETING)
    sock.sendall(b"".join(messages.pack(value)))


def _short(sock: socket.socket) -> Any:
    deadline = time.monotonic() + GREETING

    def heard() -> None:  # a byte now and then is not enough
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)

    heard()
    return messages.read(sock, *SMALL, heard)


class Connection:
    """Messages to and from another process, once it is greeted.

    Attributes: peer (its address), heard (`time.monotonic` when it last said anything), closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        receive: Callable[[Any], None],
        lost: Callable[[str], None],
        beat: Callable[[], Any] = lambda: None,
        limits: tuple[int, int] = (messages.MOST_JSON, messages.MOST_DATA),
    ):
        """receive: called with every message but signs of life of None. lost: called with the reason, once, when
        nothing more will come. beat: gives what to say as a sign of life. The first two in a thread of the connection.
        limits: the most bytes of JSON and of arrays that a message may have.
        """
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer, self.heard, self.closed = address(sock.getpeername()), time.monotonic(), False
        self._sock, self._receive, self._lost, self._beat = sock, receive, lost, beat
        self._busy, self._limits = False, limits
        self._unsent: queue.SimpleQueue[list[bytes | memoryview] | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Begin to read and to write."""
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"channel-{work.__name__}", daemon=True).start()

    def send(self, value: Any) -> None:
        """Say something, soon."""
        self.post(messages.pack(value))

    def post(self, packed: list[bytes | memoryview]) -> None:
        """`send` what `messages.pack` has made."""
        self._unsent.put(packed)

    def close(self, seconds: float) -> None:
        """Say what is still to be said, and nothing more; returns when it is written, or after some seconds."""
        self._unsent.put(None)
        deadline = time.monotonic() + seconds
        while not self.closed and time.monotonic() < deadline:
            time.sleep(0.01)

    @property
    def writes(self) -> bool:
        """Whether something is still to be written."""
        return self._busy or not self._unsent.empty()

    def _hear(self) -> None:
        self.heard = time.monotonic()

    def _read(self) -> None:
        try:
            while True:
                message = messages.read(self._sock, *self._limits, self._hear)
                if message is not None:
                    self._receive(message)
        except Malformed as error:
            self._lost(f"it sent what is no message: {error}")
        except OSError:
            self._lost("its connection was closed: it has ended, or was killed")

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader says so
            while True:
                try:
                    pieces = self._unsent.get(timeout=BEAT)
                except queue.Empty:
                    pieces = messages.pack(self._beat())
                if pieces is None:
                    break
                self._busy = True
                for piece in pieces:
                    self._sock.sendall(piece)
                self._busy = False
        self.closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises OSError."""
    (family, *_, where), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    sock = socket.socket(family, socket.SOCK_STREAM)
    with closed_by_errors(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(64)
    return sock


@contextlib.contextmanager
def closed_by_errors(sock: socket.socket) -> Iterator[None]:
    """An exception inside closes a socket."""
    try:
        yield
    except BaseException:
        sock.close()
        raise


def pipe(one: socket.socket, other: socket.socket) -> None:
    """Pass on what either side says to the other, in two threads, until both have ended.

    The end of one is not passed on: the other sees silence.
    """
    for source, target in ((one, other), (other, one)):
        source.settimeout(None)
        threading.Thread(target=_pass_on, args=(source, target), name="channel-pipe", daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


def address(name: tuple[Any, ...]) -> str:
    """A socket's name as HOST:PORT."""
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
