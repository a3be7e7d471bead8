"""How prompts are cut into chunks, and which lengths chunks are padded to. Prefill is compiled for each such length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ds4jax.engine.types import ALIGN
from ds4jax.model.transformer import bucket
from ds4jax.settings import Settings

LARGEST_BUCKET = 2**20
"""No chunk is longer: see `Settings`."""


def serving_sizes(settings: Settings) -> list[int]:
    """The lengths that chunks are padded to where prompts of any length come, ascending; the last is the chunk itself.

    There are few, since each takes a while to compile. Chunks end at multiples of the last. If that is 128, a prompt is
    computed in the same pieces wherever it starts, so a run that reuses a prefix computes the same bits as a cold one.
    In longer chunks, which a GPU needs for speed, a token's sums may be added in another order.
    """
    chunk = settings.prefill_chunk
    chunk = chunk // ALIGN * ALIGN or 1 << chunk.bit_length() - 1
    smaller = (32,) if chunk <= ALIGN else (ALIGN, 4 * ALIGN, 16 * ALIGN, 64 * ALIGN)
    return [*(size for size in smaller if size < chunk), chunk]


def chunk_lengths(lengths: Iterable[int], chunk: int) -> set[int]:
    """The lengths of the chunks, of at most `chunk` tokens, that prompts of these lengths are computed in."""
    return {min(chunk, n - start) for n in lengths for start in range(0, n, chunk)}


def chunk_sizes(lengths: Iterable[int], chunk: int) -> list[int]:
    """The buckets that the chunks of prompts of these lengths are padded to, ascending."""
    return sorted({bucket(n, LARGEST_BUCKET) for n in chunk_lengths(lengths, chunk)})


def pad(tokens: Sequence[int], sizes: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded to the first of `sizes` that is enough, or to a bucket: (1, T) int32, and their number (1,)."""
    enough = (size for size in sizes if size >= len(tokens))
    padded = np.zeros((1, next(enough, bucket(len(tokens), LARGEST_BUCKET))), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded, np.array([len(tokens)], np.int32)
