"""Prometheus metrics: what the engine counts, answers by how they ended and how long they are, requests by status."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ds4jax.engine.async_engine import AsyncEngine
from ds4jax.server.conversation import Conversation
from ds4jax.server.replay import Replay

# Of what the engine reports, the present state; all else counts up.
_GAUGES = {"waiting", "running", "prefilling", "decoding", "slots", "weights_bytes", "cache_bytes", "cache_use_percent"}
_GAUGES |= {"draft_tokens", "prefix_bytes", "prefixes", "disk_bytes", "disk_prefixes"}

_TOKENS = tuple(float(2**i) for i in range(21))
_SECONDS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    def __init__(self, engine: AsyncEngine, replay: Replay):
        self._engine, self._replay, self._registry = engine, replay, CollectorRegistry()

        def histogram(name: str, text: str, bounds: Sequence[float]) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(f"ds4jax_{name}", text, buckets=bounds, registry=self._registry)

        self._requests = Counter(
            "ds4jax_http_requests", "Answers by path and status", ("path", "status"), registry=self._registry
        )
        self._successes = Counter(
            "ds4jax_request_success",
            "Complete answers, by how they ended",
            ("finished_reason",),
            registry=self._registry,
        )
        self._prompts = histogram("request_prompt_tokens", "Tokens of the prompt of a complete answer", _TOKENS)
        self._answers = histogram("request_generation_tokens", "Tokens of a complete answer", _TOKENS)
        self._seconds = histogram("e2e_request_latency_seconds", "From arrival to the end of an answer", _SECONDS)
        ProcessCollector(registry=self._registry)  # this process's memory and time
        self._registry.register(self)

    def request(self, path: str, status: int) -> None:
        """Count an answer; 499: the client left before there was one."""
        self._requests.labels(path, status).inc()

    def ended(self, talks: Sequence[Conversation]) -> None:
        """Count complete answers."""
        for talk in talks:
            self._successes.labels(talk.finish.reason).inc()
            self._prompts.observe(talk.usage.prompt)
            self._answers.observe(talk.usage.completion)
            self._seconds.observe(talk.last - talk.arrived)

    def text(self) -> bytes:
        """In the text format that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        values, works = self._engine.metrics(), not self._engine.problem
        yield GaugeMetricFamily("ds4jax_works", "Whether requests are answered", value=int(works))
        if works:
            values["disk_bytes"] = values.get("disk_bytes", 0) + self._replay.nbytes
        else:  # the last state is not the present one
            values = {key: value for key, value in values.items() if key not in _GAUGES}
        histograms, places = values.pop("histograms"), values.pop("drafts_by_place", [])
        for key, value in values.items():
            kind = GaugeMetricFamily if key in _GAUGES else CounterMetricFamily
            yield kind(f"ds4jax_{key}", key.replace("_", " ").capitalize(), value=value)
        for i, name in enumerate(("tried", "accepted") if places else ()):
            family = CounterMetricFamily(
                f"ds4jax_drafts_{name}", f"Drafts {name}, by place in a round", labels=["place"]
            )
            for place, counts in enumerate(places, 1):
                family.add_metric([str(place)], counts[i])
            yield family
        for key, found in histograms.items():
            counts = itertools.accumulate(found.counts)
            buckets = list(zip([*map(str, found.bounds), "+Inf"], counts, strict=True))
            yield HistogramMetricFamily(f"ds4jax_{key}", found.text, buckets=buckets, sum_value=found.total)
