"""Bodies of requests: read while the client sends, within limits, and parsed so that nobody else has to wait."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds4jax.chat import template as prompt
from ds4jax.server.errors import ApiError

MAX_VALUES = 1_250_000
"""Of the JSON of a body: strings, keys and numbers count as one, objects and lists as OBJECT. Python's parser and its
garbage collector let no other thread run meanwhile, and take their time for each value, not for each byte: some 0.2 s
for these. A prompt of a million token ids is within it, and so are 50,000 messages."""
OBJECT = 16
LARGE = 1 << 20
"""Bytes; larger bodies are parsed one after the other, or the event loop would wait for several of them in a row."""
_LARGE = ThreadPoolExecutor(1, "large-bodies")
IN_FLIGHT = 8  # bodies of the largest size that all requests together may have


class Bodies:
    """Around the application: limits what is received of the bodies of requests.

    most: bytes of one body. All requests together, for as long as they are being answered, have IN_FLIGHT times that.
    timeout: seconds in which some of a body has to come. `receive` raises ApiError.
    """

    def __init__(self, app: ASGIApp, *, most: int, timeout: float):
        self._app, self._most, self._timeout = app, most, timeout
        self._room = IN_FLIGHT * most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = Request(scope).headers.get("content-length", "")
        size, more = 0, True

        async def limited() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            if size == 0 and declared.isdecimal():
                self._check(int(declared), int(declared))
            try:
                async with asyncio.timeout(self._timeout):
                    message = await receive()
            except TimeoutError:
                text = f"body: found nothing of it for {self._timeout:g} s, expected {declared or 'more'} bytes"
                raise ApiError(text, 408) from None
            if message["type"] == "http.request":
                new, more = len(message.get("body", b"")), message.get("more_body", False)
                self._check(size + new, new)
                size += new
                self._room -= new
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._room += size

    def _check(self, size: int, new: int) -> None:
        if size > self._most:
            raise ApiError(f"body: found more than {self._most} bytes, expected at most that", 413)
        if new > self._room:
            raise ApiError("body: found too many bytes in other requests, expected room for it; try again", 503)


async def read(request: Request, max_depth: int) -> dict[str, Any]:
    """The JSON object that was sent, nested at most `max_depth` deep. Raises ApiError, or ClientDisconnect."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError("content-encoding: found a compressed body, expected plain JSON", 415)
    chunks = [chunk async for chunk in request.stream()]
    body = b"".join(chunks)
    thread = _LARGE if len(body) > LARGE else None
    return await asyncio.get_running_loop().run_in_executor(thread, parse, body, max_depth)


def parse(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object that a body is. Raises ApiError for anything else, or for more than MAX_VALUES values."""
    if OBJECT * len(body) > MAX_VALUES and (n := _values(body)) > MAX_VALUES:
        text = f"body: found JSON of {n} values, an object or a list counted as {OBJECT}, expected at most {MAX_VALUES}"
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
    return strings + outside.count(b",") + OBJECT * (outside.count(b"[") + outside.count(b"{"))
