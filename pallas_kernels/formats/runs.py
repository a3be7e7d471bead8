"""What `matmul` needs of a format: loads of a matrix in runs that a thread holds, and the weights made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Ref = Any

RUN = 16  # bytes: the widest load of a thread


class Piece(NamedTuple):
    """Weights of a row of a matrix: scale[i] · codes[i, j] − minimum[i].

    codes: float32 (C, c), several that share scale and minimum, (C,) or None for 1 and 0. Of R rows, codes are
    (R, C, c), scale and minimum (R, C).
    """

    codes: list[Array]
    scale: Array | None = None
    minimum: Array | None = None


class Loaded(NamedTuple):
    """columns: of each array of codes of each piece, int32 (C, c). decode: dtype → pieces in it, or in float32."""

    columns: list[list[Array]]
    decode: Callable[[str], list[Piece]]


@dataclass(frozen=True)
class Runs:
    """load: refs of the planes, layer, row (or rows (R,)), first column, number of columns, columns in a run (c),
    whether in interpret mode → what was loaded.

    run: columns that a thread holds together, where the format decides. dot: the dtype in which weights meet x in the
    tensor cores, None if they cannot. narrow: codes of one byte, of which a thread has more columns in a row than of x.
    table: uint32, what `decode` looks up in memory; it comes after the planes.
    """

    load: Callable[..., Loaded]
    run: int | None = None
    dot: str | None = "float16"
    narrow: bool = False
    table: tuple[int, ...] = ()


def columns_of(first: Array, n: int, run: int) -> Array:
    """Columns first … first + n − 1 in runs: int32 (n // run, run)."""
    shape = (n // run, run)
    return first + lax.broadcasted_iota(jnp.int32, shape, 0) * run + lax.broadcasted_iota(jnp.int32, shape, 1)


def blocks_of(first: Array, n: int, run: int, block: int) -> Array:
    """The number of the block that each run lies in: int32 (n // run,)."""
    nth = lax.iota(jnp.int32, n // run)
    return lax.div(first, np.int32(block)) + (
        nth * (run // block) if run >= block else lax.div(nth, np.int32(block // run))
    )


def read(plane: Ref, layer: Array, rows: Array, index: Array) -> Array:
    """plane[layer, row, index], or of rows (R,) with a leading axis R."""
    if rows.ndim == 0:
        return plane[layer, rows, index]
    return plane[layer, rows.reshape(-1, *(1,) * index.ndim), index[None]]


WORDS = RUN // 4  # of 4-bit codes in a thread's run


def words_of_run(q: Ref, layer: Array, rows: Array, first: Array, n: int) -> tuple[Array, Array]:
    """The words (…, C, WORDS) of columns first … first + n − 1, and their indices (C, WORDS) in the row."""
    index = columns_of(lax.div(first, np.int32(8)), n // 8, WORDS)
    return read(q, layer, rows, index), index


def nibble(words: Array, i: int) -> Array:
    return (words >> jnp.uint32(4 * i)) & jnp.uint32(15)
