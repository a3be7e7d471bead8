"""Which experts the tokens of a run went to: recorded by the steps, kept in a file, replayed for a plan.

The file is a line of JSON (version, layers, experts, and used: the experts of a token), then the passes, one after the
other: the rows of the call and how many of them are tokens, two little-endian uint32, then the experts of these tokens,
int16 (tokens, layers, used).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from ds4jax.config import ModelConfig
from ds4jax.errors import Ds4Error, show
from ds4jax.model.residency import HALF_LIFE, takes_few

log = logging.getLogger(__name__)

VERSION = 1
_PASS = struct.Struct("<II")
_FIELDS = ("layers", "experts", "used")

Record = Callable[[np.ndarray], Any]
"""Called after a pass with int32 (layers, rows, used), -1 in rows that are no tokens."""


class Recording:
    """A `Tap` that takes note of routing, and at the end gives the experts of all layers to `record`."""

    def __init__(self, record: Record):
        self._record = record
        self._ids: list[jax.Array] = []

    def __call__(self, layer: int, name: str, value: Any) -> None:
        if name == "routing":
            self._ids.append(value.ids)

    def write(self) -> None:
        """Give the pass to `record`, within the step. Passes come in order: each needs the cache of the one before."""
        io_callback(self._record, None, jnp.stack(self._ids))


class Writer:
    """A `Record` that appends every pass to a file at once; if that fails, it warns and writes no more.

    Raises Ds4Error if the file cannot be made.
    """

    def __init__(self, path: str | os.PathLike, cfg: ModelConfig):
        self._path: Path | None = Path(path)
        shape = dict(zip(_FIELDS, (cfg.n_layers, cfg.n_experts, cfg.n_experts_used), strict=True))
        try:
            self._path.write_bytes(json.dumps({"version": VERSION} | shape).encode() + b"\n")
        except OSError as error:
            raise Ds4Error(f"{self._path}: cannot be written: {error.strerror}") from None

    def __call__(self, ids: np.ndarray) -> None:
        ids = np.asarray(ids).transpose(1, 0, 2)
        tokens = ids[ids[:, 0, 0] >= 0]
        if self._path is None or not len(tokens):
            return
        try:
            with open(self._path, "ab") as file:
                file.write(_PASS.pack(len(ids), len(tokens)) + tokens.astype("<i2").tobytes())
        except OSError as error:
            log.warning("%s: cannot be written: %s; routing is no longer recorded", self._path, error.strerror)
            self._path = None


@dataclasses.dataclass(frozen=True)
class Trace:
    """A file that was read.

    experts: of a layer. used: of a token. passes: the rows of each call, and int16 (tokens, layers, used).
    """

    experts: int
    used: int
    passes: list[tuple[int, np.ndarray]]

    @classmethod
    def read(cls, path: str | os.PathLike, cfg: ModelConfig) -> Self:
        """Raises Ds4Error for a file that is no trace, or one of another shape than the model's."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise Ds4Error(f"{path}: cannot be read: {error.strerror}") from None
        line, _, rest = data.partition(b"\n")
        expected = {"version": VERSION, "layers": cfg.n_layers, "experts": cfg.n_experts, "used": cfg.n_experts_used}
        try:
            header = json.loads(line)
        except ValueError:
            header = None
        if header != expected:
            found = show(header if header is not None else line[:80])
            raise Ds4Error(f"{path}: found {found}, expected a trace of the model's experts: {expected}")
        passes, at, shape = [], 0, (cfg.n_layers, cfg.n_experts_used)
        while at + _PASS.size <= len(rest):
            rows, tokens = _PASS.unpack_from(rest, at)
            at += _PASS.size
            size = 2 * tokens * shape[0] * shape[1]
            if not 0 < tokens <= rows or at + size > len(rest):
                break  # cut off while it was written
            ids = np.frombuffer(rest, "<i2", size // 2, at).reshape(tokens, *shape)
            if ids.min() < 0 or ids.max() >= cfg.n_experts:
                raise Ds4Error(f"{path}: found expert {ids.min()} to {ids.max()}, expected 0 to {cfg.n_experts - 1}")
            passes.append((rows, ids))
            at += size
        if not passes:
            raise Ds4Error(f"{path}: found no pass, expected one at least")
        return cls(cfg.n_experts, cfg.n_experts_used, passes)


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a trace would have asked of slots.

    tokens: of all passes of few tokens; found, lacked: the experts that these found in slots, and did not. chunks: how
    many passes of many tokens there were; streamed: the experts that these read from host memory.
    """

    tokens: int
    found: int
    lacked: int
    chunks: int
    streamed: int

    @property
    def hit_rate(self) -> float:
        """The share of experts that passes of few tokens found in slots."""
        return self.found / max(1, self.found + self.lacked)


def replay(trace: Trace, layers: Sequence[tuple[int, ...]], slots: Sequence[int]) -> Replay:
    """What slots would have found of a trace, by what `model.residency` does, in numpy. layers, slots: of each pool."""
    few = [all(takes_few(rows, trace.used, trace.experts, n) for n in slots) for rows, _ in trace.passes]
    pools = [_replay_pool(trace, of, n) for of, n in zip(layers, slots, strict=True)]
    found, lacked, streamed = map(sum, zip(*pools, strict=True))
    tokens = sum(len(ids) for (_, ids), is_few in zip(trace.passes, few, strict=True) if is_few)
    return Replay(tokens, found, lacked, few.count(False), streamed)


def _replay_pool(trace: Trace, layers: tuple[int, ...], slots: int) -> tuple[int, int, int]:
    """Of one pool: experts found, lacked and streamed."""
    n_layers, n = len(layers), trace.experts
    number = np.arange(slots)
    holds = number % n_layers * n + number // n_layers
    slot = np.full(n_layers * n, -1)
    slot[holds] = number
    worth = np.full(n_layers * n, -np.inf, np.float32)
    found = lacked = streamed = 0
    for now, (rows, ids) in enumerate(trace.passes):
        for own, layer in enumerate(layers):
            which, times = np.unique(ids[:, layer], return_counts=True)
            which = own * n + which
            uses = np.float32(now) / np.float32(HALF_LIFE) + np.log2(times.astype(np.float32))
            worth[which] = np.logaddexp2(worth[which], uses)
            lacking = which[slot[which] < 0]
            if not takes_few(rows, trace.used, n, slots):
                streamed += len(lacking)
                continue
            found, lacked = found + len(which) - len(lacking), lacked + len(lacking)
            of_slot = worth[holds]
            of_slot[slot[which[slot[which] >= 0]]] = np.inf
            places = np.argsort(of_slot, kind="stable")[: len(lacking)]
            slot[holds[places]] = -1
            slot[lacking], holds[places] = places, lacking
    return found, lacked, streamed
