"""What an engine counts: requests, tokens and times; and a trace of its requests. No JAX."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ds4jax.engine.sequence import Sequence
from ds4jax.errors import Ds4Error

_LOG = logging.getLogger(__name__)
_TOTALS = (
    *("requests", "finished", "cancelled", "failed", "prompt_tokens", "cached_tokens", "generated_tokens"),
    *("suspended", "not_finite", "failed_steps", "lost_trace_lines"),
)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)


@dataclasses.dataclass
class Histogram:
    """How often which values came.

    bounds: upper ones, of all counts but the last. total: the sum of the values.
    """

    text: str
    bounds: tuple[float, ...]
    counts: list[int] = dataclasses.field(default_factory=list)
    total: float = 0.0

    def __post_init__(self):
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


class Counters:
    """Totals since the start, by name; written by the engine's thread, read by any."""

    def __init__(self, trace: str | Path | None = None):
        """trace: a file to which a JSON line is appended for every request that ends.

        Raises Ds4Error if it cannot be written.
        """
        self._totals: dict[str, float] = defaultdict(int)
        self._first = Histogram("Seconds from a request's arrival to its first token", _SECONDS)
        self._queued = Histogram("Seconds that a request waited for a slot", _SECONDS)
        self._token = Histogram(
            "Seconds from token to token of an answer; of a block of tokens, the mean", _TOKEN_SECONDS
        )
        self._path, self._trace = trace, None
        if trace:
            try:  # O_NONBLOCK: if it is a pipe, neither opening nor writing waits for its reader
                self._trace = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
            except OSError as error:
                raise Ds4Error(f"trace: {trace} cannot be written: {error.strerror}") from None

    def report(self) -> dict[str, Any]:
        """All totals, and the histograms under "histograms", by name."""
        histograms = {
            "time_to_first_token_seconds": self._first,
            "request_queue_time_seconds": self._queued,
            "inter_token_latency_seconds": self._token,
        }
        return {**{name: self._totals[name] for name in _TOTALS}, "histograms": histograms}

    def arrived(self) -> None:
        """A request has come."""
        self._totals["requests"] += 1

    def started(self, seq: Sequence) -> None:
        """A sequence has a slot."""
        seq.started_at = time.perf_counter()
        self._queued.observe(seq.started_at - seq.submitted_at)
        self._totals["prompt_tokens"] += seq.prompt_len
        self._totals["cached_tokens"] += seq.cached

    def first_token(self, seq: Sequence) -> None:
        """The prompt of a sequence is computed."""
        seq.first_token_at = seq.token_at = time.perf_counter()
        self._first.observe(seq.first_token_at - seq.submitted_at)

    def pace(self, seq: Sequence, tokens: int) -> float:
        """A block of tokens of an answer has come, not its first one; → seconds from token to token."""
        before, seq.token_at = seq.token_at, time.perf_counter()
        return (seq.token_at - before) / tokens

    def token(self, seconds: float | None) -> None:
        """A token of an answer is there. seconds: since the one before it; None for the first."""
        self._totals["generated_tokens"] += 1
        if seconds is not None:
            self._token.observe(seconds)

    def suspended(self) -> None:
        """A sequence had to give up its slot, and waits to go on."""
        self._totals["suspended"] += 1

    def not_finite(self) -> None:
        """The logits of a sequence were no numbers."""
        self._totals["not_finite"] += 1

    def step_failed(self) -> None:
        """An exception ended a step."""
        self._totals["failed_steps"] += 1

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
        try:
            os.write(self._trace, json.dumps(record).encode() + b"\n")
        except OSError as error:
            if not self._totals["lost_trace_lines"]:
                _LOG.warning("trace: %s cannot be written: %s; lines are lost", self._path, error.strerror)
            self._totals["lost_trace_lines"] += 1

    def close(self) -> None:
        """Close the trace."""
        if self._trace is not None:
            with contextlib.suppress(OSError):
                os.close(self._trace)
            self._trace = None
