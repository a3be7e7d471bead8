"""What is free in the process's heap goes back to the system."""

import asyncio
import platform
from pathlib import Path

import numpy as np
import pytest

from ds4jax import heap
from ds4jax.server import bodies


def resident() -> int:
    """Bytes of the process's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_what_is_free_goes_back():
    blocks = [np.ones(60_000, np.uint8) for _ in range(4000)]  # small enough for the heap
    full = resident()
    del blocks[:-1]  # the last one keeps the end of the heap in use
    heap.trim()
    assert resident() < full - 180_000_000


def test_another_allocator(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.trim()


@pytest.mark.parametrize("size, trims", [(1000, 0), (bodies.LARGE + 1, 1)])
def test_after_a_large_body(monkeypatch, size, trims):
    calls = []
    monkeypatch.setattr(heap, "trim", lambda: calls.append(1))

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    async def receive():
        return {"type": "http.request", "body": bytes(size), "more_body": False}

    async def send(message):
        raise AssertionError(message)

    scope = {"type": "http", "headers": [], "path": "/", "method": "POST"}
    asyncio.run(bodies.Bodies(app, most=32 << 20, timeout=5)(scope, receive, send))
    bodies._LARGE_POOL.submit(lambda: None).result()
    assert len(calls) == trims
