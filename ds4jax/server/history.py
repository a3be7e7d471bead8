"""The last minutes of the server, sampled so that the page has them when it is opened."""

from __future__ import annotations

import asyncio
import bisect
import collections
import itertools
import resource
import time
from pathlib import Path
from typing import Any

from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.engine.counters import Histogram
from ds4jax.server.replay import Replay

EVERY = 2.0
"""Seconds from sample to sample."""
SECONDS = 900.0
"""How long a sample is kept."""
WINDOW = 60.0
"""Seconds over which quantiles and shares are taken."""
_STATE = (
    *("waiting", "running", "prefilling", "decoding", "slots", "requests", "weights_bytes", "cache_bytes"),
    *("cache_use_percent", "prefix_bytes", "prefixes", "disk_prefixes"),
)
"""What of the engine's metrics is in a sample as it is."""
_HISTOGRAMS = {"first": "time_to_first_token_seconds", "gap": "inter_token_latency_seconds"}
"""The engine's histograms whose quantiles are in a sample, by their names there."""


class History:
    """Samples of an engine's metrics, one every EVERY seconds while `run` does."""

    def __init__(self, engine: AsyncEngine, replay: Replay):
        self._engine, self._replay = engine, replay
        self._samples: collections.deque[dict[str, Any]] = collections.deque(maxlen=int(SECONDS / EVERY))
        self._counts: collections.deque[dict[str, Any]] = collections.deque(maxlen=int(WINDOW / EVERY) + 1)

    async def run(self) -> None:
        """Sample until it is cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(EVERY)

    def sample(self) -> None:
        """Take a sample."""
        found, now = self._engine.metrics(), time.time()
        drafts = found.get("drafts_by_place", [])
        known = found["histograms"]
        histograms: dict[str, Histogram] = {key: known[name] for key, name in _HISTOGRAMS.items() if name in known}
        counts = {
            "time": now,
            **{name: found.get(f"{name}_tokens", 0) for name in ("generated", "prefill", "prompt", "cached")},
            **{name: list(one.counts) for name, one in histograms.items()},
            "tried": sum(of_place[0] for of_place in drafts),
            "accepted": sum(of_place[1] for of_place in drafts),
        }
        last, first = (self._counts[i] if self._counts else counts for i in (-1, 0))
        seconds = now - last["time"] or EVERY
        sample = {"time": now, **{name: found[name] for name in _STATE if name in found}}
        sample["disk_bytes"] = found.get("disk_bytes", 0) + self._replay.nbytes
        if (process := _resident_bytes()) is not None:
            sample["process_bytes"] = process
        sample["answer_tokens"] = (counts["generated"] - last["generated"]) / seconds
        sample["prompt_tokens"] = (counts["prefill"] - last["prefill"]) / seconds
        for name, part, whole in (("reused", "cached", "prompt"), ("accepted", "accepted", "tried")):
            if n := counts[whole] - first[whole]:
                sample[name] = 100 * (counts[part] - first[part]) / n
        if "accepted" not in sample and "drafts_by_place" in found:
            sample["accepted"] = None
        for name, one in histograms.items():
            new = [n - m for n, m in zip(counts[name], first[name], strict=True)]
            sample |= {f"{name}_p{p}": quantile(one, new, p / 100) for p in (50, 95)}
        self._counts.append(counts)
        self._samples.append(sample)

    def since(self, moment: float, last: int | None = None) -> dict[str, Any]:
        """Samples after a moment, in seconds since 1970, and the present time. last: at most this many, the newest."""
        samples = [sample for sample in self._samples if sample["time"] > moment]
        return {"now": time.time(), "seconds": SECONDS, "samples": samples if last is None else samples[-last:]}


def quantile(histogram: Histogram, counts: list[int], q: float) -> float | None:
    """The value that a share q of the observations lies below; None if there are no observations.

    counts: how many are in each bin of the histogram. Within a bin they are taken as evenly spread; for those above the
    last bound, the result is that bound.
    """
    bounds, rank = (0.0, *histogram.bounds), q * sum(counts)
    if not rank:
        return None
    totals = list(itertools.accumulate(counts))
    i = bisect.bisect_left(totals, rank)
    if i >= len(bounds) - 1:
        return bounds[-1]
    return bounds[i] + (bounds[i + 1] - bounds[i]) * (rank - (totals[i] - counts[i])) / counts[i]


def _resident_bytes() -> int | None:
    """Bytes of memory that this process occupies; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
