"""What an engine counts: requests, tokens, the time to the first token; and a trace of its requests. No JAX."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ds4jax.engine.sequence import Sequence
from ds4jax.errors import Ds4Error

TTFT_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the time-to-first-token histogram, in seconds."""

_TOTALS = (
    *("requests", "finished", "cancelled", "failed", "prompt_tokens", "cached_tokens", "generated_tokens"),
    *("ttft_seconds", "ttft_count"),
)


class Counters:
    """Totals since the start, by name; written by the engine's thread, read by any."""

    def __init__(self, trace: str | Path | None = None):
        """trace: a file to which a JSON line is appended for every request that ends.

        Raises Ds4Error if it cannot be written.
        """
        self._totals: dict[str, float] = defaultdict(int)
        self._ttft = [0] * (len(TTFT_BOUNDS) + 1)
        try:
            self._trace = open(trace, "a", encoding="utf-8") if trace else None
        except OSError as error:
            raise Ds4Error(f"trace: {trace} cannot be written: {error.strerror}") from None

    def report(self) -> dict[str, Any]:
        """All totals. ttft_counts: requests per bound of TTFT_BOUNDS, and above the last."""
        return {**{name: self._totals[name] for name in _TOTALS}, "ttft_counts": list(self._ttft)}

    def arrived(self) -> None:
        """A request has come."""
        self._totals["requests"] += 1

    def started(self, seq: Sequence) -> None:
        """A sequence has a slot."""
        seq.started_at = time.perf_counter()
        self._totals["prompt_tokens"] += seq.prompt_len
        self._totals["cached_tokens"] += seq.cached

    def first_token(self, seq: Sequence) -> None:
        """The prompt of a sequence is computed."""
        seq.first_token_at = time.perf_counter()
        seconds = seq.first_token_at - seq.submitted_at
        self._ttft[sum(seconds > bound for bound in TTFT_BOUNDS)] += 1
        self._totals["ttft_seconds"] += seconds
        self._totals["ttft_count"] += 1

    def token(self) -> None:
        """A token of an answer is there."""
        self._totals["generated_tokens"] += 1

    def ended(self, seq: Sequence, reason: str) -> None:
        """A sequence has ended: "stop", "length", "cancelled", "failed" or "stopped"."""
        self._totals["finished" if reason in ("stop", "length") else reason] += 1
        if self._trace is None:
            return
        now = time.perf_counter()
        record = {
            "time": round(time.time(), 3),
            "reason": reason,
            "prompt_tokens": seq.prompt_len,
            "cached_tokens": seq.cached,
            "generated_tokens": len(seq.tokens) - seq.prompt_len,
            "queued_seconds": round((seq.started_at or now) - seq.submitted_at, 6),
            "first_token_seconds": seq.first_token_at and round(seq.first_token_at - seq.submitted_at, 6),
            "seconds": round(now - seq.submitted_at, 6),
        }
        self._trace.write(json.dumps(record) + "\n")
        self._trace.flush()

    def close(self) -> None:
        """Close the trace."""
        if self._trace is not None:
            self._trace.close()
