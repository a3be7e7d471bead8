"""Bodies of requests: read while the client sends, within limits, and parsed so that nobody else has to wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds4jax import heap
from ds4jax.chat import template as prompt
from ds4jax.server.errors import ApiError

MAX_VALUES = 1_250_000
"""Of the JSON of a body: strings, keys and numbers count as one, objects and lists as VALUES_PER_OBJECT. Python's
parser and its garbage collector let no other thread run meanwhile, and take their time for each value, not for each
byte: some 0.2 s for these. A prompt of a million token ids is within it, and so are 50,000 messages."""
VALUES_PER_OBJECT = 16
LARGE = 1 << 20
"""Bytes; larger bodies are parsed one after the other, or the event loop would wait for several of them in a row."""
_LARGE_POOL = ThreadPoolExecutor(1, "large-bodies")
IN_FLIGHT = 8  # bodies of the largest size that all requests together may have
SMALL = 64 << 10
"""Bytes; there is always room for smaller bodies. As many as there are connections do not fill the memory."""
RATE = 10_000
"""Bytes a second that a body must come at on average, but for its first `timeout` seconds."""


class Bodies:
    """Around the application: limits what is received of the bodies of requests.

    most: bytes of one body. All requests together, for as long as they are being answered, have IN_FLIGHT times that,
    and the bodies of one client at most as much as they leave for others; but see SMALL. timeout: seconds in which some
    of a body has to come; see RATE as well. `receive` raises ApiError.
    """

    def __init__(self, app: ASGIApp, *, most: int, timeout: float):
        self._app, self._most, self._timeout = app, most, timeout
        self._room = IN_FLIGHT * most
        self._held = Counter[str]()  # bytes by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared, client = Request(scope).headers.get("content-length", ""), scope.get("state", {}).get("client", "")
        size, more, begun = 0, True, None
        now = asyncio.get_running_loop().time

        async def limited() -> Message:
            nonlocal size, more, begun
            if not more:
                return await receive()
            if begun is None:
                begun = now()
                if declared.isdecimal():
                    self._check(int(declared), int(declared), client)
            pause = now() + self._timeout
            end = begun + self._timeout + size / RATE
            try:
                async with asyncio.timeout_at(min(pause, end)):
                    message = await receive()
            except TimeoutError:
                found = f"nothing of it for {self._timeout:g} s"
                if end < pause:
                    found = f"{size} bytes of it in {end - begun:.1f} s"
                text = f"body: found {found}, expected {declared or 'more'} bytes, {RATE} a second on average"
                raise ApiError(text, 408) from None
            if message["type"] == "http.request":
                new, more = len(message.get("body", b"")), message.get("more_body", False)
                self._check(size + new, new, client)
                size += new
                self._take(new, client)
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._take(-size, client)
            if size > LARGE:
                _LARGE_POOL.submit(heap.trim)

    def _take(self, n: int, client: str) -> None:
        self._room -= n
        self._held[client] += n
        if not self._held[client]:
            del self._held[client]

    def _check(self, size: int, new: int, client: str) -> None:
        """Raises ApiError if a body of `size` bytes so far, `new` of them not yet counted, is too large."""
        if size > self._most:
            raise ApiError(f"body: found more than {self._most} bytes, expected at most that", 413)
        if size > SMALL and self._held[client] + new > self._room - new:
            raise ApiError("body: found too many bytes in other requests, expected room for it; try again", 503)


async def read(request: Request, max_depth: int) -> dict[str, Any]:
    """The JSON object that was sent, nested at most `max_depth` deep. Raises ApiError, or ClientDisconnect."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError("content-encoding: found a compressed body, expected plain JSON", 415)
    chunks = [chunk async for chunk in request.stream()]
    body = b"".join(chunks)
    thread = _LARGE_POOL if len(body) > LARGE else None
    return await asyncio.get_running_loop().run_in_executor(thread, parse, body, max_depth)


def parse(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object that a body is. Raises ApiError for anything else, or for more than MAX_VALUES values."""
    if VALUES_PER_OBJECT * len(body) > MAX_VALUES and (n := _values(body)) > MAX_VALUES:
        counted = f"an object or a list counted as {VALUES_PER_OBJECT}"
        text = f"body: found JSON of {n} values, {counted}, expected at most {MAX_VALUES}"
        raise ApiError(text, 413)
    try:
        value = prompt.read_json(body.decode())
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise ApiError(f"body: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(f"body: found a JSON {type(value).__name__}, expected an object")
    level: list[Any] = [value]
    for _ in range(max_depth):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return value
    raise ApiError(f"body: found JSON nested deeper than {max_depth}, expected at most that")


def _values(body: bytes) -> int:
    """About how many values and keys JSON has, rather too many: its strings, and its commas and brackets outside."""
    quotes = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # those that are left begin and end strings
    strings = quotes.count(b'"') // 2
    if strings > MAX_VALUES:
        return strings
    outside = b"".join(quotes.split(b'"')[::2])
    return strings + outside.count(b",") + VALUES_PER_OBJECT * (outside.count(b"[") + outside.count(b"{"))
