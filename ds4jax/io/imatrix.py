"""Importance matrices as files: how strongly a text drove each column of each weight matrix.

The files are those of llama.cpp's llama-imatrix. `ds4jax.tools.imatrix` makes them, `ds4jax.io.convert` uses them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ds4jax.errors import Ds4Error, show
from ds4jax.io.gguf import GGUFFile, TensorData, write_gguf
from ds4jax.io.recipes import Type

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The importances of one tensor's columns.

    sums: (matrices, columns), of x² over the tokens. counts: (matrices,), of tokens. Both are floats ≥ 0.
    """

    sums: np.ndarray
    counts: np.ndarray

    def __add__(self, other: Entry) -> Entry:
        return Entry(self.sums.astype(np.float64) + other.sums, self.counts.astype(np.float64) + other.counts)

    def means(self) -> np.ndarray:
        """Mean of x², float32 (matrices, columns); 1 for a matrix that saw no token, such as an unused expert.

        Raises Ds4Error for values that are negative or not finite.
        """
        bad = sum(int((~(np.isfinite(x) & (x >= 0))).sum()) for x in (self.sums, self.counts))
        if bad:
            raise Ds4Error(f"imatrix: found {bad} sums or counts that are negative or not finite")
        counts = self.counts[:, None].astype(np.float64)
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Imatrix:
    """An importance matrix: what some texts drove, tensor by tensor.

    entries: tensor name → Entry. datasets: names of the texts, which had `chunks` × `chunk_size` tokens.
    """

    entries: dict[str, Entry]
    datasets: list[str]
    chunks: int
    chunk_size: int

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Open a file of `write`, or of llama.cpp's llama-imatrix. The sums are read when they are used.

        For each tensor NAME it has F32 tensors NAME.in_sum2, dims [columns, matrices], and NAME.counts, dims
        [1, matrices], or [1] for all of them. Raises Ds4Error (llama.cpp's older format, .dat, is not GGUF).
        """
        with GGUFFile.open(path) as file:

            def get(key: str, kind: type) -> Any:
                value = file.metadata.get(key)
                if type(value) is not kind:
                    raise Ds4Error(f"{path}: key '{key}': found {show(value)}, expected {kind.__name__}")
                return value

            if get("general.type", str) != "imatrix":
                raise Ds4Error(
                    f"{path}: key 'general.type': found {show(file.metadata['general.type'])}, expected 'imatrix'"
                )
            entries = {}
            for name in file.tensors:
                if name.endswith(_SUMS):
                    stem = name.removesuffix(_SUMS)
                    sums, counts = (file.array(stem + end) for end in (_SUMS, _COUNTS))
                    sums, counts = np.atleast_2d(sums), counts.reshape(-1)
                    if sums.ndim != 2 or len(counts) not in (1, len(sums)):
                        raise Ds4Error(
                            f"{path}: tensor {show(stem + _COUNTS)}: found {len(counts)} values, "
                            f"expected 1 or {len(sums)}, as {_SUMS} has shape {sums.shape}"
                        )
                    entries[stem] = Entry(sums, np.broadcast_to(counts, len(sums)))
            if not entries:
                raise Ds4Error(f"{path}: found no tensor *{_SUMS}")
            chunks, chunk_size = (get(f"imatrix.{key}", int) for key in ("chunk_count", "chunk_size"))
            return cls(entries, get("imatrix.datasets", list), chunks, chunk_size)

    def write(self, path: str | Path) -> None:
        """Write the file that `read` describes; the same contents give the same bytes. Raises GGUFError."""
        metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": self.datasets,
            "imatrix.chunk_count": self.chunks,
            "imatrix.chunk_size": self.chunk_size,
        }
        tensors = []
        for name, entry in sorted(self.entries.items()):
            for end, values in ((_SUMS, entry.sums), (_COUNTS, entry.counts[:, None])):
                values = values.astype(np.float32)
                tensors.append((name + end, TensorData(values.shape, Type.F32, functools.partial(np.asarray, values))))
        write_gguf(path, metadata, tensors)

    def entry(self, name: str, matrices: int, columns: int) -> Entry | None:
        """The entry of a tensor with that many matrices and columns, or None.

        A tensor that is one matrix here but several in the file, as llama.cpp has one for each group of
        ``attn_output_a``, gets their sum. Raises Ds4Error for sums of another shape.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if matrices == 1:
            entry = Entry(entry.sums.sum(0, keepdims=True), entry.counts.sum(keepdims=True))
        if entry.sums.shape != (matrices, columns):
            raise Ds4Error(
                f"imatrix: tensor {show(name)}: found sums for {entry.sums.shape}, expected {(matrices, columns)}"
            )
        return entry


def merge(parts: Sequence[Imatrix]) -> Imatrix:
    """Add importance matrices up, as if one run had read all their texts. Raises Ds4Error if shapes differ."""
    entries: dict[str, Entry] = {}
    for part in parts:
        for name, entry in part.entries.items():
            old = entries.get(name)
            if old is not None and old.sums.shape != entry.sums.shape:
                raise Ds4Error(
                    f"imatrix: tensor {show(name)}: found sums for {entry.sums.shape} and for {old.sums.shape}, "
                    "expected files of one model"
                )
            entries[name] = entry if old is None else old + entry
    size = parts[0].chunk_size
    tokens = sum(part.chunks * part.chunk_size for part in parts)
    return Imatrix(entries, [name for part in parts for name in part.datasets], -(-tokens // max(1, size)), size)
