"""Which of a kernel's tile sizes a test runs; scripts/autotune.py checks the results of all that it times."""

import dataclasses
from collections.abc import Iterable


def each_value(configs: Iterable) -> list:
    """Some of ``configs``, so that each value of each field is among them."""
    seen: set[tuple] = set()
    chosen = []
    for config in configs:
        values = set(dataclasses.asdict(config).items())
        if not values <= seen:
            chosen.append(config)
            seen |= values
    return chosen
