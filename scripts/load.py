"""Decode rate, token gaps and reuse through HTTP: ``python scripts/load.py --streams 16 --prompt 2048 --answer 128``.

--streams answers of --answer tokens each, to different prompts of --prompt tokens, at once: the rate is what they get
together while all of them decode. Then one stream goes on while a prompt of --long tokens is read: the longest gap
between two of its tokens. Then a prompt of --prompt tokens several times: the time to its first token, at first and the
best of the others; and how much of it is computed again when its last 30 tokens have changed. Without --url a server is
started, with --synthetic one of random weights of that shape.
"""

from __future__ import annotations

import asyncio
import itertools
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
cli.define_synthetic(FLAGS)
flags.DEFINE_integer("streams", 16, "How many at once.", 1, flag_values=FLAGS)
flags.DEFINE_integer("prompt", 2048, "Tokens of each prompt.", 1, flag_values=FLAGS)
flags.DEFINE_integer("answer", 128, "Tokens of each answer.", 2, flag_values=FLAGS)
flags.DEFINE_integer("long", 28_000, "Tokens of the prompt beside which the gap is measured.", 1, flag_values=FLAGS)
flags.DEFINE_integer("ctx", None, "Of the server that is started; by default what this takes.", flag_values=FLAGS)
flags.DEFINE_integer("max_seqs", None, "Its slots; by default as many as streams, 2 at least.", 1, flag_values=FLAGS)

IDS = range(32, 127)  # of the prompts' tokens: text, with any tokenizer


def random_prompt(n: int, seed: int | str) -> list[int]:
    return random.Random(seed).choices(IDS, k=n)


async def stream(client: httpx.AsyncClient, times: list[float], prompt: list[int], answer: int) -> dict[str, Any]:
    """Appends to `times` when each piece of text came, in seconds; → the usage."""
    body = {"prompt": prompt, "max_tokens": answer, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"error: {(await response.aread()).decode()}")
        usage = {}
        async for event in serving.events(response):
            if "error" in event:
                raise SystemExit(f"error: {event['error']['message']}")
            if any(choice["text"] for choice in event["choices"]):
                times.append(time.perf_counter())
            usage = event.get("usage") or usage
    return usage


async def load(url: str, *, streams: int, prompt: int, answer: int, long: int) -> dict[str, float | None]:
    """What the module says, in seconds and tokens; None where nothing could be measured."""
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits()) as client:
        await stream(client, [], random_prompt(prompt, 0), 2)  # whatever is compiled or allocated at first use
        start, times = time.perf_counter(), [[] for _ in range(streams)]
        prompts = [random_prompt(prompt, i + 1) for i in range(streams)]
        usages = await asyncio.gather(*(stream(client, t, p, answer) for t, p in zip(times, prompts, strict=True)))
        tokens = [usage["completion_tokens"] for usage in usages]
        wall, latest = time.perf_counter() - start, max(t[0] for t in times) - start
        # All decode from the last first token to the first last one. A piece of text is a token, or nearly.
        begin, end = max(t[0] for t in times), min(t[-1] for t in times)
        counts = [sum(begin < at <= end for at in t) * n / len(t) for t, n in zip(times, tokens, strict=True)]

        beside: list[float] = []
        other = asyncio.create_task(stream(client, beside, random_prompt(64, "short"), 10**6))
        while len(beside) < 20 and not other.done():
            await asyncio.sleep(0.01)
        start_long = time.perf_counter()
        await stream(client, [], random_prompt(long, "long"), 1)
        end_long = time.perf_counter()
        other.cancel()
        await serving.settled(client)
        gaps = [(b - a, b) for a, b in itertools.pairwise(beside)]
        during = [gap for gap, at in gaps if start_long < at <= end_long]
        before = [gap for gap, at in gaps if at <= start_long]

        again, firsts = random_prompt(prompt, "twice"), []
        for _ in range(4):
            start, at = time.perf_counter(), []
            await stream(client, at, again, 2)
            firsts.append(at[0] - start)
        changed = await stream(client, [], [*again[:-30], *reversed(again[-30:])], 2)
    return {
        "tokens": sum(tokens),
        "seconds": round(wall, 3),
        "seconds_to_last_first_token": round(latest, 3),
        "decode_tokens_per_second": round(sum(counts) / (end - begin), 2) if end > begin else None,
        "long_prompt_seconds": round(end_long - start_long, 3),
        "longest_gap_before_seconds": round(max(before), 4) if before else None,
        "longest_gap_beside_long_prompt_seconds": round(max(during), 4) if during else None,
        "first_token_seconds": round(firsts[0], 4),
        "first_token_seconds_again": round(min(firsts[1:]), 4),
        "computed_again_of_30_changed": prompt - changed["prompt_tokens_details"]["cached_tokens"],
    }


async def run() -> None:
    ctx = FLAGS.ctx or max(FLAGS.prompt + FLAGS.answer, FLAGS.long + 2, 4096)
    command = ["-m", "ds4jax.serve", "--port=0", f"--config={FLAGS.config}", f"--ctx={ctx}"]
    command += [f"--max_seqs={FLAGS.max_seqs or max(2, FLAGS.streams)}"]
    command += [f"--{key}={FLAGS[key].value}" for key in ("model", "synthetic", "recipe") if FLAGS[key].value]
    async with serving.server(command, FLAGS.url) as url:
        measured = load(url, streams=FLAGS.streams, prompt=FLAGS.prompt, answer=FLAGS.answer, long=FLAGS.long)
        print(json.dumps(await measured))


def main() -> int:
    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
