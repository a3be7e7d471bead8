"""The limits of the device at hand, measured: the bandwidth of a copy and the FLOPs of a matrix product."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

WARM = 3  # launches until a program runs as a graph
ROUND = 0.05  # seconds


@dataclass(frozen=True)
class Device:
    """A device and its limits.

    bandwidth: bytes per second of a copy, read and written. rate: bfloat16 FLOPs per second of a large product.
    """

    name: str
    bandwidth: float
    rate: float

    def floor(self, nbytes: float, flops: float) -> float:
        """The least seconds that a computation of so many bytes and FLOPs can take."""
        return max(nbytes / self.bandwidth, flops / self.rate)


def seconds(launch: Callable[[], Any], repeats: int = 5) -> float:
    """The time of a launch: the median of `repeats` rounds of many, each with one wait at its end."""
    for _ in range(WARM):
        jax.block_until_ready(launch())
    start = time.perf_counter()
    jax.block_until_ready(launch())
    n = min(100, max(2, math.ceil(ROUND / (time.perf_counter() - start))))
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = None
        for _ in range(n):
            out = launch()
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / n)
    return statistics.median(rounds)


def measure() -> Device:
    """Measure the first device."""
    small = jax.default_backend() == "cpu"
    x = jnp.zeros((2**20 if small else 2**28,), jnp.int32)
    copy = jax.jit(lambda x: x + 1)
    bandwidth = 2 * x.nbytes / seconds(lambda: copy(x))
    n = 256 if small else 8192
    a = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return Device(jax.devices()[0].device_kind, bandwidth, 2 * n**3 / seconds(lambda: product(a)))
