"""For scripts that load a server: starting one, and reading its streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

LISTENING = re.compile(r"serving .* at (http://\S+)")


@contextlib.asynccontextmanager
async def server(command: Sequence[str], url: str | None = None) -> AsyncIterator[str]:
    """The address of a server that runs while the block does, and is told to stop at its end; or `url`, if given.

    command: arguments of Python. Its stderr is passed on. Raises SystemExit if it ends before it serves.
    """
    if url:
        yield url
        return
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        while True:
            line = (await process.stderr.readline()).decode()
            sys.stderr.write(line)
            if found := LISTENING.search(line):
                break
            if not line:
                raise SystemExit(f"error: the server ended with status {await process.wait()}")
        rest = asyncio.create_task(_pass_on(process.stderr))
        yield found[1]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
    await rest


async def _pass_on(stream: asyncio.StreamReader) -> None:
    while line := await stream.readline():
        sys.stderr.write(line.decode())


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a stream's events, as they come; comments and [DONE] are left out."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's metrics by name and labels."""
    lines = (await client.get("/metrics")).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def settled(client: httpx.AsyncClient, seconds: float = 30.0) -> None:
    """Returns once no request runs or waits. Raises RuntimeError if that takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        now = await metrics(client)
        if not any(now[f"ds4jax_{key}"] for key in ("waiting", "prefilling", "decoding")):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"something still runs: {now}")
        await asyncio.sleep(0.05)
