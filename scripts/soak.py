"""Many streams at once against one server, many of them given up half way: ``python scripts/soak.py --minutes 2``.

First each request is answered alone, greedily. Then --streams workers send them again and again, by all four APIs, and
disconnect from some at a random moment. It fails unless every stream that was read to its end equals the answer that
its request got alone, no slot stays taken, and the server's memory stops growing. It reports how long short requests
waited for their first token.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import sys
import time
from typing import Any

import httpx
import serving
from absl import flags

from ds4jax.tools import cli

FLAGS = flags.FlagValues()
cli.define_model(FLAGS)
flags.DEFINE_string("url", None, "A running server; by default one is started.", flag_values=FLAGS)
flags.DEFINE_float("minutes", 2.0, "How long.", flag_values=FLAGS)
flags.DEFINE_integer("streams", 32, "How many at once.", flag_values=FLAGS)
flags.DEFINE_integer("max_seqs", 4, "Slots of the server that is started.", flag_values=FLAGS)
flags.DEFINE_integer("requests", 32, "Different requests.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the random choices.", flag_values=FLAGS)

GROWTH = 64 << 20  # bytes by which the server may grow in the second half of the time, its prefixes aside
WORDS = "apple river seven Paris window blue garden train paper cloud music winter number stone".split()
Ask = tuple[str, dict[str, Any]]  # path and body


def make_request(rng: random.Random) -> Ask:
    """A greedy request with a prompt and an answer of random lengths. Some begin alike."""
    text = " ".join(rng.choices(WORDS, k=rng.choice((2, 10, 60, 200))))
    common = "Remember these words and say them again. " * rng.choice((0, 3, 12))
    options = {"temperature": 0, "stream": True}
    n = rng.choice((1, 5, 20, 60))
    history = [{"role": "user", "content": common + text}]
    return rng.choice(
        [
            ("/v1/chat/completions", options | {"messages": history, "max_tokens": n}),
            ("/v1/completions", options | {"prompt": common + text, "max_tokens": n}),
            ("/v1/messages", options | {"messages": history, "max_tokens": n}),
            ("/v1/responses", options | {"input": history, "max_output_tokens": n, "reasoning": {"summary": "auto"}}),
        ]
    )


def is_short(ask: Ask) -> bool:
    """Whether its prompt fits into one chunk, with any tokenizer."""
    return len(json.dumps(ask[1])) < 400


async def answer(
    client: httpx.AsyncClient, ask: Ask, give_up: float | None = None, firsts: list[float] | None = None
) -> tuple[str, ...] | None:
    """What a stream said, thoughts and text, once its last event is there.

    give_up: seconds until it is disconnected; then None, unless it ended before. firsts: a list to which the
    seconds to its first text are added. Raises RuntimeError for a stream that ends without its last event.
    """
    path, body = ask
    said: list[str] = []
    start = time.perf_counter()
    try:
        async with asyncio.timeout(give_up), client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{path}: {response.status_code} {(await response.aread()).decode()}")
            async for event in serving.events(response):
                text, over = _read(path, event)
                if text and firsts is not None and not any(said):
                    firsts.append(time.perf_counter() - start)
                said.append(text)
                if over:
                    return "".join(said), over
    except TimeoutError:
        return None
    raise RuntimeError(f"{path}: the stream ended early, after {said!r}")


def _read(path: str, event: dict[str, Any]) -> tuple[str, str]:
    """The text that an event adds, and what its being the last one says of the end."""
    match path, event:
        case _, {"error": error} | {"response": {"error": {} as error}}:
            raise RuntimeError(f"{path}: {error}")
        case "/v1/messages", {"type": "message_delta", "delta": delta}:
            return "", delta["stop_reason"]
        case "/v1/messages", {"delta": delta}:
            return delta.get("thinking", "") + delta.get("text", ""), ""
        case "/v1/responses", {"type": "response.completed" | "response.incomplete" as kind}:
            return "", kind
        case "/v1/responses", {"delta": text}:
            return text, ""
        case _, {"choices": [choice]}:
            delta = choice.get("delta", {})
            text = choice.get("text") or delta.get("reasoning_content") or delta.get("content") or ""
            return text, choice["finish_reason"] or ""
    return "", ""


def growth(memory: list[float]) -> float:
    """By how many bytes memory, measured now and then, has grown in the second half of the time."""
    return max(memory[len(memory) * 3 // 4 :]) - max(memory[: len(memory) // 2])


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile of the seconds to the first tokens of short requests."""
    ordered = sorted(seconds)
    return {f"first token p{p}": round(ordered[len(ordered) * p // 100], 3) for p in (50, 99) if ordered}


async def soak(url: str, *, seconds: float, streams: int, requests: int, seed: int) -> dict[str, Any]:
    """→ how many streams ended how, and the memory. Raises RuntimeError for the first thing that is wrong."""
    rng = random.Random(seed)
    limits = httpx.Limits(max_connections=streams + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        asks = [make_request(rng) for _ in range(requests)]
        alone = [await answer(client, ask) for ask in asks]
        if await answer(client, asks[0]) != alone[0]:
            raise RuntimeError("the same request, alone, was answered in two ways")
        counts: collections.Counter[str] = collections.Counter()
        memory: list[float] = []
        firsts: list[float] = []
        start = time.monotonic()

        async def worker(rng: random.Random) -> None:
            while time.monotonic() - start < seconds:
                i = rng.randrange(len(asks))
                give_up = rng.choice((None, None, None, 0.001, rng.uniform(0, 1), rng.uniform(0, 5)))
                said = await answer(client, asks[i], give_up, firsts if is_short(asks[i]) else None)
                if said is not None and said != alone[i]:
                    raise RuntimeError(f"{asks[i][0]}: alone it said {alone[i]}, among others {said}")
                counts["given up" if said is None else "equal"] += 1

        async def watch() -> None:
            while time.monotonic() - start < seconds:
                now = await serving.metrics(client)
                memory.append(now["process_resident_memory_bytes"] - now["ds4jax_prefix_bytes"])
                await asyncio.sleep(seconds / 40)

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            for n in range(streams):
                group.create_task(worker(random.Random(f"{seed} {n}")))
        await serving.settled(client)
        if await answer(client, asks[0]) != alone[0]:
            raise RuntimeError("afterwards, the same request was answered in another way")
    if (grown := growth(memory)) > GROWTH:
        raise RuntimeError(f"memory: grew by {grown / 2**20:.0f} MiB in the second half: {memory}")
    return {
        **counts,
        "seconds": round(time.monotonic() - start, 1),
        **percentiles(firsts),
        "MiB": round(memory[-1] / 2**20),
        "MiB grown in the second half": round(grown / 2**20, 1),
    }


async def run() -> None:
    options = {"seconds": FLAGS.minutes * 60, "streams": FLAGS.streams, "requests": FLAGS.requests, "seed": FLAGS.seed}
    command = ["-m", "ds4jax.serve", "--port=0", f"--config={FLAGS.config}", f"--max_seqs={FLAGS.max_seqs}"]
    command += [f"--model={FLAGS.model}"] if FLAGS.model else []
    async with serving.server(command, FLAGS.url) as url:
        print(json.dumps(await soak(url, **options)))


def main() -> int:
    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
