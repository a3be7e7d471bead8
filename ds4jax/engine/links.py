"""What the devices of a mesh send each other in a step, and how long the sums among it take where that was measured.

``configs/links.json`` has the times by card, number of devices and size. Between two sizes, and beyond the largest,
time grows with the bytes as it does between the nearest two; what is smaller than the smallest takes as long.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ds4jax.engine import cards
from ds4jax.settings import CONFIG_DIR
from ds4jax.sharding import parts, share

if TYPE_CHECKING:
    from ds4jax.engine.compiled_steps import CompiledSteps

PATH = CONFIG_DIR / "links.json"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One kind of exchange in a step.

    what: whose results are exchanged. devices: number of those that take part. nbytes: size of the result on each.
    count: how often in a step.
    """

    what: Literal["attention", "experts", "logits"]
    devices: int
    nbytes: int
    count: int

    @property
    def is_sum(self) -> bool:
        """Whether the devices' parts are added; else they are put side by side."""
        return self.what != "logits"

    @property
    def sent(self) -> float:
        """Bytes that each device sends, in a ring, each time: a sum goes round twice."""
        return (2 if self.is_sum else 1) * self.nbytes * (self.devices - 1) / self.devices


def exchanges(programs: CompiledSteps, tokens: int, sequences: int) -> list[Exchange]:
    """What the devices exchange in a step that appends `tokens` to each of `sequences`.

    Each of the mesh's `dp` groups has its `share` of the sequences.
    """
    cfg, mesh = programs.cfg, programs.compute.mesh
    sequences = share(mesh, sequences)
    rows = tokens * sequences * cfg.embed_dim * np.dtype(programs.compute.dtype).itemsize
    tp = parts(mesh, "heads")
    found = [
        Exchange("attention", tp, rows, cfg.n_layers),
        Exchange("experts", parts(mesh, "experts"), rows, cfg.n_layers),
        Exchange("logits", tp, 4 * sequences * cfg.vocab_size, 1),
    ]
    return [exchange for exchange in found if exchange.devices > 1]


def seconds(card: cards.Card, devices: int, nbytes: int) -> float | None:
    """The time of one sum of so many bytes over so many devices; None where none was measured."""
    points = _table()["sums"].get(card.name, {}).get(str(devices))
    if points is None:
        return None
    (a, t), (b, u) = next((pair for pair in pairwise(points) if nbytes <= pair[1][0]), points[-2:])
    return (t + (u - t) * (max(nbytes, a) - a) / (b - a)) * 1e-6


def describe(programs: CompiledSteps, tokens: int, sequences: int) -> str:
    """What each device sends in such a step, in how many messages, and how long the sums take."""
    found = exchanges(programs, tokens, sequences)
    card, sums = programs.card or cards.here(), [exchange for exchange in found if exchange.is_sum]
    sent, messages = sum(e.sent * e.count for e in found), sum(e.count for e in found)
    text = f"{sent / 1e6:,.2f} MB in {messages} messages"
    if not sums:
        return text
    what = f"{sum(e.count for e in sums)} sums of {sums[0].nbytes / 2**10:,.10g} KiB"
    times = [one for e in sums if card and (one := seconds(card, e.devices, e.nbytes)) is not None]
    if len(times) < len(sums):
        return f"{text}; the time of {what} has not been measured"
    total = sum(e.count * one for e, one in zip(sums, times, strict=True))
    return f"{text}; {what} take {total * 1e3:.2f} ms, by {_table()['source']}"


@functools.cache
def _table() -> dict[str, Any]:
    """The content of PATH."""
    return json.loads(PATH.read_text())
