"""Prometheus metrics: what the engine counts, and requests by path and status."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.engine.counters import TTFT_BOUNDS
from ds4jax.server.replay import Replay

# Of what the engine reports, the present state; all else counts up.
_GAUGES = {"waiting", "prefilling", "decoding", "slots", "weights_bytes", "cache_bytes"}
_GAUGES |= {"prefix_bytes", "prefix_count", "disk_bytes", "disk_count"}


class Metrics:
    def __init__(self, engine: AsyncEngine, replay: Replay):
        self._engine, self._replay, self._registry = engine, replay, CollectorRegistry()
        self._requests = Counter(
            "ds4jax_http_requests", "Answers by path and status", ("path", "status"), registry=self._registry
        )
        ProcessCollector(registry=self._registry)  # this process's memory and time
        self._registry.register(self)

    def request(self, path: str, status: int) -> None:
        """Count an answer; 499: the client left before there was one."""
        self._requests.labels(path, status).inc()

    def text(self) -> bytes:
        """In the text format that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        values = self._engine.metrics()
        values["disk_bytes"] = values.get("disk_bytes", 0) + self._replay.nbytes
        counts, total = values.pop("ttft_counts"), values.pop("ttft_seconds")
        del values["ttft_count"]
        for key, value in values.items():
            kind = GaugeMetricFamily if key in _GAUGES else CounterMetricFamily
            yield kind(f"ds4jax_{key}", key.replace("_", " ").capitalize(), value=value)
        bounds = [*map(str, TTFT_BOUNDS), "+Inf"]
        buckets = [(bound, sum(counts[: i + 1])) for i, bound in enumerate(bounds)]
        text = "Seconds from a request's arrival to its first token"
        yield HistogramMetricFamily("ds4jax_time_to_first_token_seconds", text, buckets=buckets, sum_value=total)
