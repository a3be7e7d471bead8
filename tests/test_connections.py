"""Clients that are slow, silent, many or gone: others are served on, and the process ends in time."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, serving, wait_until_idle

from ds4jax.errors import Ds4Error
from ds4jax.server import bodies
from ds4jax.server.access import Keys
from ds4jax.server.app import Options
from ds4jax.server.connections import Limits, most_connections

PATH = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n".encode()

PROGRAM = """
import asyncio, logging, sys, time
logging.basicConfig()  # as a library may do when it is imported, before a tool begins
sys.path.insert(0, "tests")
from fake_engine import FakeEngine
from ds4jax.server import tokens
from ds4jax.server.app import Options
from ds4jax.server.connections import Limits, most_connections
from ds4jax.server.replay import Replay
from ds4jax.tools import cli, serve

class Engine(FakeEngine):
    async def close(self, grace=0.0):
        await asyncio.to_thread(time.sleep, grace if self.running else 0)

tokens.detokenize = lambda engine, body: time.sleep(60)  # work that takes its time
engine = Engine(lambda request: "word " * min(100_000, request.max_tokens), delay=0.001, ctx=1_000_000)
options, limits, grace = eval(sys.argv[1])
serving = lambda: asyncio.run(serve.serve(engine, options, Replay(), serve.bind("127.0.0.1", 0), grace, limits))
sys.exit(cli.exit_status(serving))
"""


@contextlib.contextmanager
def process(
    setting: str, descriptors: int | None = None, read: bool = True
) -> Iterator[tuple[tuple[str, int], subprocess.Popen, list]]:
    """(address, process, lines of its stderr from "serving" on) of a server of its own.

    setting: an expression, (options, limits, grace). descriptors: what `ulimit -n` says. read: whether stderr is read
    while it runs.
    """

    command = [sys.executable, "-c", PROGRAM, setting]
    if descriptors is not None:
        command = ["bash", "-c", f'ulimit -n {descriptors} && exec "$@"', "bash", *command]
    root = Path(__file__).parents[1]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root)
    assert server.stderr is not None
    lines: list[str] = []
    try:
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"serving .* at http://127.0.0.1:(\d+)", line):
                break
        else:
            raise AssertionError(lines)
        del lines[:-1]
        reader = threading.Thread(target=lambda: lines.extend(server.stderr or ()))
        if read:
            reader.start()
        yield ("127.0.0.1", int(found[1])), server, lines
    finally:
        server.kill()
        server.wait()
        if not read:
            reader.start()
        reader.join()
        server.stderr.close()


@contextlib.contextmanager
def connections(url: str, n: int) -> Iterator[list[socket.socket]]:
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(n)]


def everything(sock: socket.socket) -> bytes:
    """What comes until the other side closes; raises TimeoutError if it does not."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while new := sock.recv(1 << 16):
            data += new
    return data


def drip(sock: socket.socket, data: bytes, pause: float) -> bytes:
    """What comes until the other side closes, while the data are sent byte by byte."""
    for i in range(len(data)):
        with contextlib.suppress(OSError):
            sock.send(data[i : i + 1])
        if select.select([sock], [], [], pause)[0]:
            break
    return everything(sock)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(lambda _: "</think>Hello")


# ---- one slow client -------------------------------------------------------------------------------------------------
def test_a_head_must_come_in_time(engine):
    """However often a byte of it comes."""
    with serving(engine, limits=Limits(head=0.5)) as url, connections(url, 3) as (silent, slow, again):
        start = time.monotonic()
        answer = drip(slow, HEAD * 99, 0.05)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer
        assert "head: found a part" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert everything(silent) == b"" and everything(again) == b"" and 0.4 < time.monotonic() - start < 4
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_connection_is_kept_for_a_while(engine):
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(engine, limits=Limits(head=0.5, idle=1.0)) as url, connections(url, 2) as (idle, slow):
        for sock in (idle, slow):
            sock.sendall(get)
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 ")
        time.sleep(0.7)  # longer than a head may take
        slow.sendall(get[:9])
        start = time.monotonic()
        assert everything(slow).startswith(b"HTTP/1.1 408 ") and 0.3 < time.monotonic() - start < 3
        assert everything(idle) == b""


@pytest.mark.parametrize("last", [b"{}", b"{}POST"])
def test_the_rest_of_a_body_does_not_keep_a_connection_for_ever(engine, last):
    """It comes after the answer, when the next request may begin."""
    with serving(engine, limits=Limits(idle=0.5)) as url, connections(url, 1) as (sock,):
        sock.sendall(b"POST /none HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += sock.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 404 ")
        sock.sendall(last)
        start = time.monotonic()
        assert everything(sock) == b"" and time.monotonic() - start < 4


def test_a_body_must_go_on(engine, monkeypatch):
    """At a pace, too: one that comes byte by byte is not waited for."""
    monkeypatch.setattr(bodies, "RATE", 8)
    with serving(engine, Options(body_timeout=0.3)) as url, connections(url, 3) as (slow, steady, dripping):
        slow.sendall(HEAD + b"Content-Length: 99\r\n\r\n{")
        answer = everything(slow)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"body: found nothing of it for 0.3 s" in answer
        body = json.dumps(HI).encode()
        steady.sendall(HEAD + f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert drip(steady, body, 0.05).startswith(b"HTTP/1.1 200 ")  # in all longer than 0.3 s
        dripping.sendall(HEAD + b"Content-Length: 99\r\n\r\n")
        answer = drip(dripping, body, 0.2)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert re.search(rb"body: found \d bytes of it in [01]\.\d s, expected 99 bytes, 8 a second on average", answer)


def test_the_rest_of_a_body_that_was_refused_is_not_read_for_ever(engine):
    with serving(engine, Options(max_body=1000), Limits(rest_of_body=0.5)) as url, connections(url, 1) as (sock,):
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        start, answer = time.monotonic(), b""
        with pytest.raises(OSError):
            while time.monotonic() - start < 8:
                sock.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
                if select.select([sock], [], [], 0.01)[0]:
                    answer += sock.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 413 ") and 0.4 < time.monotonic() - start < 4


def test_a_client_that_takes_nothing_is_dropped():
    """And its place in the engine is free; one that has nothing to take is not."""
    engine = FakeEngine(lambda _: "word " * 20_000, delay=0.005, ctx=1_000_000)
    with serving(engine, limits=Limits(write=1.0)) as url, connections(url, 1) as (sock,):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps(HI | {"stream": True}).encode()
        sock.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 10
        while not engine.running:
            assert time.monotonic() < deadline
        while engine.running:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_side_has_left(stream):
    """As behind nginx: for the server, a client that will send no more looks like one that is gone."""
    engine = FakeEngine(lambda _: "word " * 1000, delay=0.01)
    with serving(engine) as url, connections(url, 1) as (sock,):
        body = json.dumps(HI | {"stream": stream}).encode()
        sock.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 10
        while not engine.running:
            assert time.monotonic() < deadline
        sock.shutdown(socket.SHUT_WR)
        everything(sock)
        wait_until_idle(engine)


def test_what_is_not_http_is_logged_seldom(engine, capfd):
    with serving(engine) as url:
        for _ in range(50):
            with connections(url, 1) as (sock,):
                sock.sendall(b"GARBAGE\r\n\r\n")
                assert everything(sock).startswith(b"HTTP/1.1 400 ")
    assert capfd.readouterr().err.count("Invalid HTTP request received.") == 1


def test_a_stream_may_be_silent_for_longer_than_a_write():
    engine = FakeEngine(lambda _: "a", delay=1.0)
    with serving(engine, Options(keep_alive=60), Limits(write=0.3, head=0.3, idle=0.3)) as url:
        text = httpx.post(f"{url}{PATH}", json=HI | {"stream": True, "think": False}, timeout=20).text
        assert text.endswith("data: [DONE]\n\n")


# ---- many ------------------------------------------------------------------------------------------------------------
def test_one_connection_too_many_is_told(engine):
    with serving(engine, limits=Limits(connections=3)) as url, connections(url, 3) as kept:
        while True:
            with connections(url, 1) as (sock,):
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = sock.recv(1 << 16)
            if b" 503 " in answer:
                break
        head, body = answer.split(b"\r\n\r\n")
        assert b"retry-after: 1" in head and json.loads(body)["error"]["code"] == "overloaded"
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            httpx.post(f"{url}{PATH}", json=HI).raise_for_status()
        kept[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept[0].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        kept[1].close()
        deadline = time.monotonic() + 5
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < deadline


def test_as_many_connections_as_descriptors_allow(monkeypatch):
    limits = {"now": (1024, 1024)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, now: limits.update(now=now))
    assert most_connections() == 768 and most_connections(5) == 5 and limits["now"] == (1024, 1024)
    with pytest.raises(Ds4Error, match="^max_connections: found 769, expected at most 768 where `ulimit -n` is 1024$"):
        most_connections(769)
    limits["now"] = (256, 256)
    assert most_connections() == 64
    for hard, most in ((4096, 4096), (1 << 20, 65536), (resource.RLIM_INFINITY, 65536)):
        limits["now"] = (1024, hard)
        assert most_connections(most - 256) == most - 256 and limits["now"] == (most, hard)
        assert most_connections() == min(most - 256, 4096)


@contextlib.contextmanager
def streamed(address: tuple[str, int]) -> Iterator[Callable[[float], float]]:
    """A stream that runs meanwhile; a function that reads it for so many seconds: → the longest gap, in seconds."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=10))
        response = stack.enter_context(client.stream("POST", PATH, json=HI | {"stream": True, "max_tokens": 100_000}))
        pieces = response.iter_raw()
        next(pieces)

        def longest_gap(seconds: float) -> float:
            start = now = time.monotonic()
            longest = 0.0
            while now - start < seconds:
                next(pieces)
                before, now = now, time.monotonic()
                longest = max(longest, now - before)
            return longest

        yield longest_gap


@pytest.mark.parametrize(
    ("limits", "logged"),
    [
        ("Limits(most_connections())", ""),  # they are refused in time
        ("Limits(5000)", "connections: none can be accepted for now: Too many open files"),
    ],
)
def test_silent_connections_do_not_stall_others(limits, logged):
    """1,100 of them at `ulimit -n 1024`."""
    with process(f"(Options(), {limits}, 0.0)", 1024) as (address, _, log), streamed(address) as longest_gap:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                stack.enter_context(socket.create_connection(address, timeout=5))
            assert longest_gap(2.0) < 0.5
        assert len(log) == 1 + bool(logged) and logged in log[-1], log
        deadline = time.monotonic() + 5
        while True:  # they are gone: everything is as before
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://{address[0]}:{address[1]}/health", timeout=1).status_code == 200:
                    break
            assert time.monotonic() < deadline


def test_a_log_that_nobody_reads_stops_nobody():
    """Each of these requests is logged as a line of 1 kB, and a pipe holds 64 KiB."""
    fields = {f"{i}" * 40: 1 for i in range(20)}
    with process("(Options(), None, 0.0)", read=False) as (address, _, lines):
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=5) as http:
            for _ in range(120):
                assert http.post(PATH, json=HI | {"max_tokens": 1} | fields).status_code == 200
    assert 30 < len(lines) < 120 and "not known, and ignored" in lines[1]


def test_a_body_in_the_smallest_chunks_does_not_stall_others():
    with process("(Options(), None, 0.0)") as (address, _, _), streamed(address) as longest_gap:
        with socket.create_connection(address) as sock:
            sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            sock.setblocking(False)
            for _ in range(20):
                with contextlib.suppress(BlockingIOError):
                    sock.send(b"1\r\n \r\n" * 50_000)
                assert longest_gap(0.1) < 0.5


# ---- bodies of all requests ------------------------------------------------------------------------------------------
def test_bodies_of_all_requests_have_a_limit(monkeypatch):
    """For as long as they are being answered. There is room left for other clients, and for small ones of any."""
    monkeypatch.setattr(bodies, "SMALL", 200)
    first, second = ({"x-api-key": f"key-of-{name}"} for name in ("anna", "ben"))
    keys = Keys.of([("anna", "key-of-anna"), ("ben", "key-of-ben")])
    engine = FakeEngine(lambda _: "word " * 1000 + "…", delay=0.05)
    large = json.dumps(HI | {"x": "y" * 900, "stream": True}).encode()
    begin = HEAD + f"X-Api-Key: key-of-anna\r\nContent-Length: {len(large)}\r\n\r\n".encode()
    with serving(engine, Options(max_body=1000, keys=keys)) as url, connections(url, bodies.IN_FLIGHT // 2) as all_:
        for sock in all_:
            sock.sendall(begin + large)
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
        answer = httpx.post(f"{url}{PATH}", content=large, headers=first)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["message"].startswith("body: found too many bytes in other requests")
        for _ in range(3):
            assert httpx.post(f"{url}/tokenize", json={"prompt": "a"}, headers=first).status_code == 200
            assert httpx.post(f"{url}/tokenize", json={"prompt": "a" * 900}, headers=first).status_code == 503
            assert httpx.post(f"{url}/tokenize", json={"prompt": "a" * 900}, headers=second).status_code == 200
        all_[0].close()
        deadline = time.monotonic() + 5
        while True:
            with httpx.stream("POST", f"{url}{PATH}", content=large, headers=first) as response:
                if response.status_code == 200:
                    break
            assert time.monotonic() < deadline


def test_json_of_too_many_values_is_refused_unparsed():
    n = bodies.MAX_VALUES
    for value in (b"1,", b"{},", b"[],", b'"\\\\",', b'{"a\\"":[]},', b"[1,"):
        with pytest.raises(
            bodies.ApiError, match=r"^body: found JSON of \d+ values, .* expected at most 1250000$"
        ) as error:
            bodies.parse(b'{"x":[' + value * n, 256)
        assert error.value.status == 413
    text = 'a, "quoted" [text] {of} a \\ path: C:\\"' * 100_000
    assert bodies.parse(json.dumps({"x": text}).encode(), 2) == {"x": text}
    ids = list(range(1 << 20))
    assert bodies.parse(json.dumps({"prompt": ids}).encode(), 3) == {"prompt": ids}
    messages = HI["messages"] * 50_000
    assert bodies.parse(json.dumps({"messages": messages}).encode(), 3) == {"messages": messages}


# ---- the end ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def stubborn() -> Iterator[Any]:
    """Connects clients to an address: idle, with half a head, with no or half a body, one that reads nothing."""
    with contextlib.ExitStack() as stack:

        def connect(address: tuple[str, int]) -> None:
            body = json.dumps(HI | {"stream": True}).encode()
            request = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            for data in (b"", HEAD[:9], HEAD + b"Content-Length: 9\r\n\r\n", request[:-9], request, request):
                sock = stack.enter_context(socket.create_connection(address, timeout=5))
                sock.sendall(data)
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")

        yield connect


def test_the_process_ends_in_time_whatever_clients_do(stubborn):
    with process("(Options(), None, 1.0)") as (address, server, log), contextlib.ExitStack() as stack:
        stubborn(address)
        busy = b"POST /detokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
        for _ in range(40):  # more than there are threads
            stack.enter_context(socket.create_connection(address)).sendall(busy)
        time.sleep(0.5)
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == -signal.SIGTERM and 0.9 < time.monotonic() - start < 1.0 + 5.0
    assert len(log) == 1, log


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(stubborn, second):
    with process("(Options(), None, 60.0)") as (address, server, _):
        stubborn(address)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.poll() is None
        start = time.monotonic()
        server.send_signal(second)
        assert server.wait(20) == -second and time.monotonic() - start < 1.0
