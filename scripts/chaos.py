"""A server in which things go wrong, under load: ``python scripts/chaos.py --minutes 2``.

Requests are answered alone by a sound server. Then a server is started in which steps fail, numbers overflow, the disk
is full and files cannot be opened, at random; clients come, go and send what is hostile; and now and then the process
is killed and started again on the same folder. It fails unless every stream that was read to its end equals the answer
that its request got alone, every other one ends with an error that says why, and no memory is lost.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import errno
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import serving
import soak
from absl import flags

from ds4jax.errors import Ds4Error
from ds4jax.tools import cli

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
flags.DEFINE_float("minutes", 2.0, "How long.", flag_values=FLAGS)
flags.DEFINE_integer("streams", 16, "How many at once.", flag_values=FLAGS)
flags.DEFINE_integer("max_seqs", 4, "Slots of the server.", flag_values=FLAGS)
flags.DEFINE_integer("requests", 24, "Different requests.", flag_values=FLAGS)
flags.DEFINE_float("kill_every", 60.0, "Seconds, on average, until the process is killed; 0: never.", flag_values=FLAGS)
flags.DEFINE_float(
    "lost_after", 90.0, "Seconds after which a request that has not ended counts as lost; more for a busy machine.",
    1.0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("seed", 0, "Of the random choices.", flag_values=FLAGS)
flags.DEFINE_list("faulty_server", None, "Be the server in which things go wrong, with these flags.", flag_values=FLAGS)

DISK = 0.2  # GiB
EXPECTED = ("the model failed while it computed this", "not a finite number", "the server is stopping")
UNANSWERABLE = {
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "json_schema", "json_schema": s}}
        for s in (
            {"name": "a", "schema": {"type": "integer", "multipleOf": 2147483648}},
            {"name": "b", "schema": {"type": "string", "allOf": [{"pattern": f".*{i}.*"} for i in range(30)]}},
        )
    ]
    + [{"messages": [{"role": "user", "content": "Hi"}], "logit_bias": {"99999999": 1}}, {"messages": "?"}, {}],
    "/v1/completions": [{"prompt": "x " * 200_000, "max_tokens": 1}, {"prompt": [-1]}],
}


# ---- the server ------------------------------------------------------------------------------------------------------
def faulty_server(arguments: list[str], seed: int) -> int:
    """`ds4jax serve`, in which calls fail at random."""
    import jax

    from ds4jax.engine import kv_file, kv_store
    from ds4jax.engine.compiled_steps import CompiledSteps
    from ds4jax.engine.model_runner import ModelRunner
    from ds4jax.tools import serve

    rng = random.Random(seed)

    def spoil(owner: Any, name: str, rate: float, fault: Callable[[], None]) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            when = 0.5 if threading.current_thread() is threading.main_thread() else rng.random()  # not at the start
            if when < rate / 2:
                fault()
            result = real(*args, **kwargs)
            if when > 1 - rate / 2:
                fault()
            return result

        setattr(owner, name, call)

    def fail() -> None:
        raise RuntimeError("INTERNAL: a fault was injected")

    def no_memory() -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a fault was injected")

    def disk() -> None:
        raise OSError(number := rng.choice((errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EROFS)), os.strerror(number))

    def delay() -> None:
        time.sleep(rng.uniform(0, 0.5))

    for name, rate in (("prefill", 0.005), ("decode_block", 0.001), ("put", 0.005), ("choose", 0.005)):
        spoil(ModelRunner, name, rate, fail)
        spoil(ModelRunner, name, rate, delay)
    spoil(CompiledSteps, "get", 0.001, no_memory)
    spoil(kv_store, "write_whole", 0.05, disk)
    spoil(kv_file, "read", 0.05, disk)
    prefill = ModelRunner.prefill

    def overflow(*args: Any, **kwargs: Any) -> Any:
        sampled = prefill(*args, **kwargs)
        return sampled if rng.random() > 0.003 else dataclasses.replace(sampled, token=-1)

    setattr(ModelRunner, "prefill", overflow)  # noqa: B010
    return cli.run(serve.main, serve.FLAGS, serve.__doc__, arguments)


class Server:
    """The faulty server: killed and started again at the same address."""

    _process: asyncio.subprocess.Process

    def __init__(self, arguments: list[str], seed: int):
        self._arguments, self._seed, self.starts = arguments, seed, 0
        self.log: collections.deque[str] = collections.deque(maxlen=60)
        self.up = False  # whether it serves, or ended without having been told to

    async def start(self) -> None:
        self.starts += 1
        flags_given = ",".join(self._arguments)
        command = [__file__, f"--faulty_server={flags_given}", f"--seed={self._seed + self.starts}"]
        self._process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE)
        up = asyncio.Event()
        self._reader = asyncio.create_task(self._read(up))
        await asyncio.wait((asyncio.create_task(up.wait()), self._reader), timeout=300, return_when="FIRST_COMPLETED")
        if not up.is_set():
            raise RuntimeError(f"the server did not start: {''.join(self.log)}")
        self.up = True

    async def _read(self, up: asyncio.Event) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            if serving.LISTENING.search(text := line.decode()):
                up.set()
            self.log.append(text)

    async def end(self, how: signal.Signals) -> int:
        self.up = False
        self._process.send_signal(how)
        status = await asyncio.wait_for(self._process.wait(), 60)
        await self._reader
        return status

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None


# ---- the clients -----------------------------------------------------------------------------------------------------
class Chaos:
    """Clients of a server, and what became of their requests."""

    def __init__(self, url: str, server: Server, asks: list[soak.Ask], alone: list[Any], until: float):
        self.url, self.server, self.asks, self.alone, self.until = url, server, asks, alone, until
        self.counts: collections.Counter[str] = collections.Counter()
        self.memory: dict[int, list[float]] = collections.defaultdict(list)  # bytes, prefixes aside, by start

    async def stream(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        """Send one request. Raises RuntimeError if its answer is wrong or does not come."""
        i, starts = rng.randrange(len(self.asks)), self.server.starts
        give_up = rng.choice((None, None, None, 0.001, rng.uniform(0, 1), rng.uniform(0, 5)))
        try:
            async with asyncio.timeout(FLAGS.lost_after):
                said = await soak.answer(client, self.asks[i], give_up)
        except TimeoutError:
            raise RuntimeError(f"lost: {self.asks[i]} had no end within {FLAGS.lost_after:g} s") from None
        except httpx.TransportError:
            await self._excuse(starts, "the connection broke")
        except RuntimeError as error:
            if any(text in str(error) for text in EXPECTED):
                self.counts["told that it failed"] += 1
            else:
                await self._excuse(starts, str(error))
        else:
            if said is not None and said != self.alone[i]:
                raise RuntimeError(f"wrong: {self.asks[i]}: alone it said {self.alone[i]}, now {said}")
            self.counts["given up" if said is None else "equal"] += 1

    async def _excuse(self, starts: int, what: str) -> None:
        """A stream may break if the process was killed meanwhile."""
        await asyncio.sleep(0.5)
        if self.server.starts == starts and self.server.up:
            raise RuntimeError(what)
        self.counts["cut off by a kill"] += 1

    async def worker(self, rng: random.Random) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=FLAGS.lost_after) as client:
            while time.monotonic() < self.until:
                if self.server.up:
                    await self.stream(client, rng)
                else:
                    await asyncio.sleep(0.2)

    async def hostile(self, rng: random.Random) -> None:
        """Requests that cannot be answered get an error that is the client's; connections say nothing, or half."""
        host, port = self.url.removeprefix("http://").split(":")
        async with httpx.AsyncClient(base_url=self.url, timeout=FLAGS.lost_after) as client:
            while time.monotonic() < self.until:
                await asyncio.sleep(rng.uniform(0, 1))
                with contextlib.suppress(OSError, httpx.TransportError):
                    match rng.randrange(3):
                        case 0:
                            path = rng.choice(list(UNANSWERABLE))
                            response = await client.post(path, json=rng.choice(UNANSWERABLE[path]))
                            if not 400 <= response.status_code < 500:
                                raise RuntimeError(f"{path}: {response.status_code} {response.text[:300]}")
                            self.counts["refused"] += 1
                        case 1:
                            with socket.create_connection((host, int(port)), 5) as silent:
                                silent.sendall(
                                    rng.choice((b"", b"POST /v1/messages HTTP/1.1\r\n", b"\x16\x03\x01\x00"))
                                )
                                await asyncio.sleep(rng.uniform(0, 2))
                        case 2:
                            body = rng.randbytes(rng.randrange(1 << 20))
                            await client.post("/v1/responses", content=body)

    async def health(self) -> None:
        """A client that asks how things are gets an answer, whatever else goes on."""
        async with httpx.AsyncClient(base_url=self.url, timeout=FLAGS.lost_after) as client:
            while time.monotonic() < self.until:
                await asyncio.sleep(0.5)
                if self.server.ended and self.server.up:
                    raise RuntimeError(f"the server ended: {''.join(self.server.log)}")
                start, starts = time.monotonic(), self.server.starts
                with contextlib.suppress(httpx.TransportError):
                    await client.get("/health")
                    seconds = time.monotonic() - start
                    now = await serving.metrics(client)
                    if starts == self.server.starts:
                        self.counts["slowest health, ms"] = max(self.counts["slowest health, ms"], int(1000 * seconds))
                        self.memory[starts].append(now["process_resident_memory_bytes"] - now["ds4jax_prefix_bytes"])

    async def killer(self, rng: random.Random, every: float) -> None:
        while every and (seconds := rng.expovariate(1 / every)) + 20 < self.until - time.monotonic():
            await asyncio.sleep(seconds)
            await self.server.end(signal.SIGKILL)
            self.counts["kills"] += 1
            await self.server.start()


async def run() -> None:
    rng, seconds = random.Random(FLAGS.seed), FLAGS.minutes * 60
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        common = [f"--config={FLAGS.config}", f"--max_seqs={FLAGS.max_seqs}", f"--port={port}", "--grace=5"]
        common += [f"--model={FLAGS.model}"] if FLAGS.model else []
        url = f"http://127.0.0.1:{port}"
        asks = [soak.make_request(rng) for _ in range(FLAGS.requests)]
        async with (
            serving.server(["-m", "ds4jax.serve", *common]),
            httpx.AsyncClient(base_url=url, timeout=120) as client,
        ):
            alone = [await soak.answer(client, ask) for ask in asks]
        budgets = [f"--kv_budget_gb={DISK}", "--prefix_budget_gb=0.1", f"--kv_dir={folder}/kv", "--trace=/dev/full"]
        server = Server([*common, *budgets], FLAGS.seed)
        await server.start()
        chaos = Chaos(url, server, asks, alone, time.monotonic() + seconds)
        tasks = [chaos.worker(random.Random(f"{FLAGS.seed} {n}")) for n in range(FLAGS.streams)]
        tasks += [chaos.hostile(random.Random(f"hostile {FLAGS.seed} {n}")) for n in range(2)]
        try:
            async with asyncio.TaskGroup() as group:
                for task in [*tasks, chaos.killer(rng, FLAGS.kill_every), chaos.health()]:
                    group.create_task(task)
        except* RuntimeError as errors:
            await server.end(signal.SIGKILL)
            raise Ds4Error(f"{errors.exceptions[0]}; until then {dict(chaos.counts)}") from None
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            await serving.settled(client)
        status = await server.end(signal.SIGTERM)
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    grown = max((soak.growth(memory) for memory in chaos.memory.values() if len(memory) > 40), default=0)
    if status not in (0, -signal.SIGTERM) or disk > DISK * 2**30 or grown > soak.GROWTH:
        text = f"status {status}, {disk} bytes on disk, memory grown by {grown} bytes"
        raise Ds4Error(f"in the end: {text}")
    mib = {"MiB on disk": round(disk / 2**20), "MiB grown": round(grown / 2**20, 1)}
    print(json.dumps({**chaos.counts, "starts": server.starts, **mib}))


def main() -> int:
    if FLAGS.faulty_server is not None:
        return faulty_server(FLAGS.faulty_server, FLAGS.seed)
    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
